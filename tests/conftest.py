"""Shared by the tests: the repository root on sys.path, a tiny GPT, and its oracles.

`gpt2_by_hand` is the model written once more as plain functions. On it stand `logp_by_hand`, which
reads the whole prefix anew for every token (no cache, no batch, no padding), and
`exact_probabilities`, which lists every response.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig  # noqa: E402  (the line above makes it importable)

torch.set_num_threads(1)


def tiny_gpt(vocab_size=4, block_size=8, n_layer=2, n_head=2, n_embd=8, seed=0) -> GPT:
    """A GPT whose weights are all random and large, biases too: no term can hide by being 0."""
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
            if "ln_" in name and name.endswith("weight"):
                p += 1
    return model.eval()


def gpt2_by_hand(model, tokens_BT):
    """GPT-2 from the weights alone: torch's own attention, normalisation and GELU."""
    w = dict(model.named_parameters())
    return gpt2_logits(w, model.config.n_layer, model.config.n_head, tokens_BT, lambda x, name:
                       F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"]))


def gpt2_logits(w, n_layer, n_head, tokens_BT, linear):
    """The logits from tensors by name; linear(x, name) says how a matrix is laid out."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
    x = w["wte.weight"][tokens_BT] + w["wpe.weight"][:tokens_BT.shape[1]]
    for i in range(n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        wide = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        bent = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        x = x + linear(bent, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@torch.no_grad()
def logp_by_hand(model, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) in nats, one forward pass a token."""
    total = 0.0
    for k, token in enumerate(response):
        logits_V = gpt2_by_hand(model, torch.tensor([[*prompt, *response[:k]]]))[0, -1].double()
        total += (logits_V[token] - logits_V.logsumexp(0)).item()
    return total


def all_responses(vocab_size: int, end: int, longest: int) -> list[list[int]]:
    """Every response of at most `longest` tokens: closed by END, or cut short at `longest`.

    Vocabulary {0, 1} with END = 1: [[1], [0, 1], [0, 0]] for longest = 2.
    """
    closed, open_ = [], [[]]
    for _ in range(longest):
        closed += [y + [end] for y in open_]
        open_ = [y + [v] for y in open_ for v in range(vocab_size) if v != end]
    return closed + open_


def exact_probabilities(model, prompt, longest, end, temperature=1.0, top_k=None):
    """{response: probability} of everything that sampling can give, by enumeration."""
    exact, vocab_size = {}, model.config.vocab_size
    for y in all_responses(vocab_size, end, longest):
        p = 1.0
        for k, token in enumerate(y):
            with torch.no_grad():
                z = gpt2_by_hand(model, torch.tensor([prompt + y[:k]]))[0, -1].tolist()
            allowed = sorted(z, reverse=True)[:top_k]
            p *= (z[token] in allowed) * math.exp(z[token] / temperature) / sum(
                math.exp(v / temperature) for v in allowed)
        exact[tuple(y)] = p
    return exact
