"""A GPT from scratch: GPT-2's architecture, nothing added and nothing left out.

    h = wte[token] + wpe[position];  for each block: h += attn(ln_1(h)); h += mlp(ln_2(h))
    logits = ln_f(h) @ wteᵀ          (the head is the token embedding itself: "tied")

Reading order: `GPTConfig` → `KVCache` → `causal_mask` → `Attention` → `MLP` → `Block` → `GPT`.

Dimensions: B batch, T tokens read now, C tokens in the cache after them, D width, H heads,
K = D/H head size, V vocabulary. A suffix tells a tensor's shape: logits_BTV.
"""
import math
from contextlib import nullcontext
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


class KVCache:
    """The keys and values of tokens read already, so that each token is read once.

    Rows may be ragged. A key stands at its token's position, and padding further right than any
    token can stand, where no token sees it.
    """
    def __init__(self):
        self.layers, self.position_BC, self.length_B1 = {}, None, 0

    def extend(self, layer: int, k_BHTK, v_BHTK):
        """Append one layer's new keys and values; return all of them, [B, H, C, K] each."""
        if layer in self.layers:
            k_BHTK, v_BHTK = (torch.cat(pair, dim=2)
                              for pair in zip(self.layers[layer], (k_BHTK, v_BHTK)))
        self.layers[layer] = k_BHTK, v_BHTK
        return k_BHTK, v_BHTK

    def rows(self, index_N) -> "KVCache":
        """Row n of the new cache is row index_N[n] of this one: repeat, reorder or drop rows."""
        new = KVCache()
        # (not k[index_N]: on a CPU its backward pass takes three times as long)
        new.layers = {i: (k.index_select(0, index_N), v.index_select(0, index_N))
                      for i, (k, v) in self.layers.items()}
        new.position_BC, new.length_B1 = self.position_BC[index_N], self.length_B1[index_N]
        return new


def causal_mask(query_BT, key_BC):
    """visible_BTC: True where a query may see a key. Both come as positions in the sequence.

    >>> causal_mask(torch.tensor([[1, 2]]), torch.tensor([[0, 1, 2]]))
    tensor([[[ True,  True, False],
             [ True,  True,  True]]])
    """
    return key_BC[:, None, :] <= query_BT[:, :, None]  # its own position and those before


class Attention(nn.Module):
    """Each token gathers values from the tokens at or before it, weighted by softmax(q·k/√K)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x_BTD, visible_BTC, cache: KVCache, layer: int):
        """Returns y_BTD, a query seeing a key where visible_BTC says so; the cache grows by T."""
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            part.view(B, T, self.n_head, D // self.n_head).transpose(1, 2)
            for part in self.c_attn(x_BTD).split(D, dim=2))
        k_BHTK, v_BHTK = cache.extend(layer, k_BHTK, v_BHTK)  # [B, H, C, K] from here on
        score_BHTC = q_BHTK @ k_BHTK.transpose(2, 3) / math.sqrt(D // self.n_head)
        score_BHTC = score_BHTC.masked_fill(~visible_BTC[:, None], float("-inf"))
        y_BHTK = score_BHTC.softmax(dim=3) @ v_BHTK
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Each token on its own: widen four times, bend, narrow."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTD):
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))  # GPT-2's GELU


class Block(nn.Module):
    """Communicate, then compute; LayerNorm before each ("pre-norm"), the residual stream free."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x_BTD, visible_BTC, cache, layer):
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
        self.bfloat16 = False  # True: the blocks' matrix products in bfloat16, for a GPU
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:  # LayerNorm's own weights stay 1
                # Each block adds twice to the residual stream; shrink so that its variance holds.
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink)

    @property
    def head_weight(self):
        """The output matrix [V, D]: logits = hidden @ head_weightᵀ. Tied to the embedding."""
        return self.wte.weight

    def hidden(self, tokens_BT, cache: KVCache | None = None):
        """Read tokens_BT, after those in the cache if one is given; hidden states after ln_f.

        Returns hidden_BTD and adds the tokens to the cache. Token −1 is padding, which no token
        sees; without a cache, padding on the right may be any token: no token before sees it.
        Raises ValueError beyond block_size positions.
        """
        cache, limit = KVCache() if cache is None else cache, self.config.block_size
        real_BT = tokens_BT >= 0
        position_BT = cache.length_B1 + real_BT.cumsum(dim=1) - 1
        if position_BT.numel() and int(position_BT.max()) >= limit:
            raise ValueError(f"{int(position_BT.max()) + 1} tokens do not fit the model's "
                             f"block_size of {limit}")
        cache.length_B1 = position_BT[:, -1:] + 1
        position_BT = position_BT.masked_fill(~real_BT, limit)
        cache.position_BC = position_BT if cache.position_BC is None else torch.cat(
            [cache.position_BC, position_BT], dim=1)
        visible_BTC = causal_mask(position_BT, cache.position_BC)
        x_BTD = self.wte(tokens_BT.clamp(min=0)) + self.wpe(position_BT.clamp(max=limit - 1))
        # Weights and residual stream stay float32, and so does the head, which is not in here.
        device = x_BTD.device.type
        with torch.autocast(device, torch.bfloat16) if self.bfloat16 else nullcontext():
            for layer, block in enumerate(self.h):
                x_BTD = block(x_BTD, visible_BTC, cache, layer)
        return self.ln_f(x_BTD)

    def read(self, tokens_BT, length_B) -> KVCache:
        """Read the first length_B[b] tokens of row b into a new cache."""
        cache, index_T = KVCache(), torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        self.hidden(tokens_BT.masked_fill(index_T >= length_B[:, None], -1), cache)
        return cache

    def forward(self, tokens_BT, cache: KVCache | None = None):
        """logits_BTV, for the token after each of tokens_BT."""
        return self.hidden(tokens_BT, cache) @ self.head_weight.T
