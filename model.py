"""A GPT from scratch: GPT-2's architecture, without dropout.

    h = wte[token] + wpe[position];  for each block: h += attn(ln_1(h)); h += mlp(ln_2(h))
    logits = ln_f(h) @ wteᵀ          (the head is the token embedding itself: "tied")

Reading order: `GPTConfig` → `KVCache` → `causal_mask` → `Attention` → `MLP` → `Block` → `GPT`.

Dimensions: B batch, T new tokens in this call, C tokens in the cache after them, D width, H heads,
K = D/H head size, V vocabulary; N sequences, or nodes of a tree, that are picked out of others. A
suffix tells a tensor's shape: logits_BTV.
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
    """Where each token stands, which tokens it may see, and the keys and values read so far.

    A model that is given the same cache again goes on reading where it stopped, so each token is
    read once. Rows may differ in length: token −1 is padding, which no token sees.
    """
    def __init__(self):
        self.layers = {}  # layer: (k_BHCK, v_BHCK)
        self.position_BC = None  # where each key stands
        self.length_B1 = 0  # how many tokens each row holds, padding not counted
        self.width = 0  # columns so far: no row is longer
        self.visible_BTC = None  # which keys the tokens read now may see

    def place(self, tokens_BT, block_size):
        """Append new tokens; return position_BT and note which keys they may see.

        Raises ValueError where a row would grow beyond block_size positions.
        """
        is_text_BT = tokens_BT >= 0
        position_BT = self.length_B1 + is_text_BT.cumsum(dim=1) - 1
        self.width += tokens_BT.shape[1]
        # The width counts padding too, so no row is longer. Only where it exceeds the block are the
        # real lengths looked at, for which a GPU has to be waited for.
        if self.width > block_size and int(position_BT.max()) >= block_size:
            raise ValueError(f"{int(position_BT.max()) + 1} tokens do not fit the model's "
                             f"block_size of {block_size}")
        self.length_B1 = self.length_B1 + is_text_BT.sum(dim=1, keepdim=True)
        # Padding as a key stands further right than any token can, where no token sees it.
        key_BT = position_BT.masked_fill(~is_text_BT, block_size)
        self.position_BC = key_BT if self.position_BC is None else torch.cat(
            [self.position_BC, key_BT], dim=1)
        self.visible_BTC = causal_mask(key_BT, self.position_BC)
        return position_BT.clamp(min=0)

    def in_rows(self, x_BTD):
        """A hook for data/responses.py, whose trees are flat lists of nodes; a text is returned
        unchanged."""
        return x_BTD

    def as_given(self, y_BTD):
        """Undo `in_rows`."""
        return y_BTD

    def extend(self, layer: int, k_BHTK, v_BHTK):
        """Append one layer's new keys and values; return all of them, [B, H, C, K] each."""
        if layer in self.layers:
            old_k_BHCK, old_v_BHCK = self.layers[layer]
            k_BHTK = torch.cat([old_k_BHCK, k_BHTK], dim=2)
            v_BHTK = torch.cat([old_v_BHCK, v_BHTK], dim=2)
        self.layers[layer] = k_BHTK, v_BHTK
        return k_BHTK, v_BHTK

    def rows(self, index_N) -> "KVCache":
        """A new cache whose row n is row index_N[n] of this one: repeat, reorder or drop rows."""
        new = KVCache()
        new.layers = {layer: (k_BHCK[index_N], v_BHCK[index_N])
                      for layer, (k_BHCK, v_BHCK) in self.layers.items()}
        new.position_BC, new.length_B1 = self.position_BC[index_N], self.length_B1[index_N]
        new.width = self.width
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

    def forward(self, x_BTD, cache: KVCache, layer: int):
        """Returns y_BTD. Each token sees what cache.visible_BTC says; the cache grows by T."""
        # A tree's nodes come as a flat list; attention alone needs them in rows. E = 3D.
        qkv_BTE = cache.in_rows(self.c_attn(x_BTD))
        B, T, D = *qkv_BTE.shape[:2], x_BTD.shape[-1]
        K = D // self.n_head
        q_BHTK, k_BHTK, v_BHTK = (part_BTD.view(B, T, self.n_head, K).transpose(1, 2)
                                  for part_BTD in qkv_BTE.split(D, dim=2))
        k_BHCK, v_BHCK = cache.extend(layer, k_BHTK, v_BHTK)
        score_BHTC = (q_BHTK / math.sqrt(K)) @ k_BHCK.transpose(2, 3)
        score_BHTC = score_BHTC.masked_fill(~cache.visible_BTC[:, None], float("-inf"))
        y_BHTK = score_BHTC.softmax(dim=3) @ v_BHCK
        return self.c_proj(cache.as_given(y_BHTK.transpose(1, 2).reshape(B, T, D)))


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

    def forward(self, x_BTD, cache, layer, wanted_N=None):
        """Returns x_BTD. With wanted_N: only those nodes of a tree; the MLP skips the others."""
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), cache, layer)
        if wanted_N is not None:
            x_BTD = x_BTD.index_select(0, wanted_N)
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
        self.block_dtype = torch.float32  # bfloat16: the blocks' matrix products, for a GPU
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

    def hidden(self, tokens_BT, cache: KVCache | None = None, wanted_N=None):
        """Read tokens_BT, after those in the cache if one is given; hidden states after ln_f.

        Returns hidden_BTD and adds the tokens to the cache. Token −1 is padding, which no token
        sees; without a cache, padding on the right may be any token: no token before sees it.
        wanted_N, for prefix trees, names the nodes whose hidden states are wanted. Raises
        ValueError beyond block_size positions.
        """
        cache = KVCache() if cache is None else cache
        position_BT = cache.place(tokens_BT, self.config.block_size)
        x_BTD = self.wte(tokens_BT.clamp(min=0)) + self.wpe(position_BT)
        # Weights, residual stream and head stay float32; autocast is for the blocks' products.
        mixed = self.block_dtype != torch.float32
        with torch.autocast(x_BTD.device.type, self.block_dtype) if mixed else nullcontext():
            for layer, block in enumerate(self.h):
                is_last = layer + 1 == len(self.h)
                x_BTD = block(x_BTD, cache, layer, wanted_N if is_last else None)
        return self.ln_f(x_BTD)

    def forward(self, tokens_BT, cache: KVCache | None = None):
        """logits_BTV, for the token after each of tokens_BT."""
        return self.hidden(tokens_BT, cache) @ self.head_weight.T
