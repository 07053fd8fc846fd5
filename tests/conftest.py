"""Shared by the tests: the repository root on sys.path, a tiny GPT, and its oracle.

`logp_by_hand` reads the whole prefix anew for every token: no cache, no batch, no padding.
"""
import sys
from pathlib import Path

import torch

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


@torch.no_grad()
def logp_by_hand(model, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt) in nats, one forward pass a token."""
    total = 0.0
    for k, token in enumerate(answer):
        logits_V = model(torch.tensor([prompt + answer[:k]]))[0, -1].double()
        total += (logits_V[token] - logits_V.logsumexp(0)).item()
    return total


def all_answers(vocab_size: int, end: int, longest: int) -> list[list[int]]:
    """Every answer of at most `longest` tokens: closed by END, or cut short at `longest`.

    Vocabulary {0, 1} with END = 1: [[1], [0, 1], [0, 0]] for longest = 2.
    """
    closed, open_ = [], [[]]
    for _ in range(longest):
        closed += [y + [end] for y in open_]
        open_ = [y + [v] for y in open_ for v in range(vocab_size) if v != end]
    return closed + open_
