"""A GPT from scratch: GPT-2's architecture, without dropout.

    x = wte[token] + wpe[position];  for each block: x += attn(ln_1(x)); x += mlp(ln_2(x))
    logits = ln_f(x) @ wteᵀ          (the head is the token embedding itself: "tied")

Reading order: `GPTConfig` → `causal_mask` → `KVCache` → `Attention` → `MLP` → `Block` → `GPT`.

Dimensions: B batch, T tokens read in this call, C tokens that can be seen (those in the cache, then
the T new ones), D width, H heads, K = D/H head size, V vocabulary; N rows picked out of B; 1
broadcasts. A suffix tells a tensor's shape: logits_BTV.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """Sizes. GPT-2 small would be (50257, 1024, 12, 12, 768)."""
    vocab_size: int
    block_size: int  # the longest sequence: one learned position vector each
    n_layer: int
    n_head: int
    n_embd: int


def causal_mask(query_BT, key_BC):
    """visible_BTC: True where a query may see a key. Both are given by their positions.

    >>> causal_mask(torch.tensor([[1, 2]]), torch.tensor([[0, 1, 2]]))
    tensor([[[ True,  True, False],
             [ True,  True,  True]]])
    """
    return key_BC[:, None, :] <= query_BT[:, :, None]  # its own position and those before


class KVCache:
    """The keys and values of all tokens read so far, so that each token is read once."""
    def __init__(self):
        self.layers = {}  # layer: (k_BHCK, v_BHCK)

    def __len__(self):
        """How many tokens each row holds."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k_BHTK, v_BHTK):
        """Append one layer's new keys and values; return all of them, [B, H, C, K] each."""
        k_BHCK, v_BHCK = k_BHTK, v_BHTK
        if layer in self.layers:
            k_BHCK, v_BHCK = (torch.cat(pair, dim=2) for pair in
                              zip(self.layers[layer], (k_BHTK, v_BHTK)))
        self.layers[layer] = k_BHCK, v_BHCK
        return k_BHCK, v_BHCK

    def keep(self, row_N):
        """Let row n be what row row_N[n] was: repeat, reorder or drop rows."""
        self.layers = {layer: (k_BHCK[row_N], v_BHCK[row_N])
                       for layer, (k_BHCK, v_BHCK) in self.layers.items()}


class Attention(nn.Module):
    """Each token gathers values from the tokens that it may see: softmax(q kᵀ / √K) v."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTD, visible_BTC, cache: KVCache | None = None, layer: int = 0):
        """Returns y_BTD. What visible_BTC hides gets the score −∞, hence the weight 0."""
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.view(B, T, self.n_head, D // self.n_head).transpose(1, 2)
            for part_BTD in self.c_attn(x_BTD).split(D, dim=2))
        k_BHCK, v_BHCK = (k_BHTK, v_BHTK) if cache is None else cache.extend(layer, k_BHTK, v_BHTK)
        # All heads have the same mask.
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHCK, v_BHCK, visible_BTC[:, None])
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, applied to each token alone."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTD):
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))  # GPT-2's GELU


class Block(nn.Module):
    """Attention, then the MLP; each reads a LayerNorm of the stream and adds to it ("pre-norm")."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x_BTD, visible_BTC, cache=None, layer=0):
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), visible_BTC, cache, layer)
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT(nn.Module):
    """tokens → logits of the next token: logits[:, i] score token i + 1."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:  # LayerNorm's own weights stay 1
                # Each block adds two terms to the residual stream; this keeps its variance the
                # same for any depth (GPT-2's initialisation).
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink)

    @property
    def head_weight(self):
        """The output matrix [V, D]: logits = hidden @ head_weightᵀ. Tied to the embedding."""
        return self.wte.weight

    def hidden(self, tokens_BT, position_BT=None, visible_BTC=None, cache: KVCache | None = None):
        """Read tokens_BT, after those in the cache if one is given; returns hidden_BTD after ln_f.

        Without position_BT and visible_BTC a row is one text: positions count from 0, and the mask
        is causal. So padding on the right may be any token: no token before it sees it. Raises
        ValueError if the tokens do not fit block_size. Positions that are given must be below
        block_size, and come with a mask of their own, as in data/responses.py and `generate`.
        """
        T, past = tokens_BT.shape[1], 0 if cache is None else len(cache)
        key_1C = torch.arange(past + T, device=tokens_BT.device)[None]
        if position_BT is None:
            if past + T > self.config.block_size:
                raise ValueError(f"{past + T} tokens do not fit the model's block_size of "
                                 f"{self.config.block_size}")
            position_BT = key_1C[:, past:].expand_as(tokens_BT)
        if visible_BTC is None:
            visible_BTC = causal_mask(position_BT, key_1C)
        x_BTD = self.wte(tokens_BT) + self.wpe(position_BT)
        for layer, block in enumerate(self.h):
            x_BTD = block(x_BTD, visible_BTC, cache, layer)
        return self.ln_f(x_BTD)

    def forward(self, tokens_BT, cache: KVCache | None = None):
        """logits_BTV, for the token after each of tokens_BT."""
        return self.hidden(tokens_BT, cache=cache) @ self.head_weight.T
