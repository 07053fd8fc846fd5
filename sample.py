"""Sampling: drawing answers y ~ p_θ(·|x), one token after another.

    y_k ~ softmax(logits / temperature),  logits from (x, y_<k),  until END

Self-play needs exactly this at temperature 1 with nothing cut off: only then is an answer a
sample of p_t, which every theorem of the paper supposes.

Reading order: `next_tokens` → `generate` → `load_checkpoint` → `main`, a talk with the saved models.
Dimensions: B answers in the making, P distinct prompts, T prompt tokens, V vocabulary.
"""
import argparse
import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import torch

from data.tokenizer import END, build_encoding, frame, parse_ranks
from model import GPT, GPTConfig


def next_tokens(logits_BV, temperature=1.0, top_k=None, generator=None):
    """Draw one token a row by inverting the cumulative distribution; temperature 0 is greedy."""
    if temperature == 0:
        return logits_BV.argmax(dim=1)
    if top_k is not None:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    cdf_BV = (logits_BV.float() / temperature).softmax(dim=1).cumsum(dim=1)
    # Subtle: the sum of float32 probabilities is not quite 1, so u is drawn below what it is.
    u_B1 = cdf_BV[:, -1:] * torch.rand(len(cdf_BV), 1, generator=generator, device=cdf_BV.device)
    u_B1 = torch.minimum(u_B1, cdf_BV[:, -1:].nextafter(torch.zeros_like(u_B1)))
    return torch.searchsorted(cdf_BV, u_B1, right=True)[:, 0]  # first token with cdf > u


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int, end_token: int,
             temperature: float = 1.0, top_k: int | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    """Answer each prompt (token lists of any lengths); [[5, 6]] -> [[9, 3, end_token]], say.

    An answer ends with end_token, or without it where max_new_tokens or the model's block_size
    cut it short. Equal prompts are read once and finished answers leave the batch. `generator`
    lives on the model's device. Raises ValueError for an empty or too long prompt, a
    temperature < 0, a top_k < 1.
    """
    if not all(prompts) or any(len(p) > model.config.block_size for p in prompts):
        raise ValueError(f"a prompt needs 1 to {model.config.block_size} tokens (the block_size)")
    if not 0 <= temperature < float("inf") or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be ≥ 0 and top_k {top_k} ≥ 1 or None")
    if not prompts:
        return []
    device = model.head_weight.device
    distinct = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    length_P = torch.tensor([len(p) for p in distinct], device=device)
    longest = int(length_P.max())
    tokens_PT = torch.tensor([p + (0,) * (longest - len(p)) for p in distinct], device=device)

    # Read all but the last token of each prompt; that one is the first to be fed in the loop.
    cache = model.read(tokens_PT, length_P - 1)
    row_B = torch.tensor([distinct[tuple(p)] for p in prompts], device=device)
    cache, last_B = cache.rows(row_B), tokens_PT[row_B, length_P[row_B] - 1]
    alive_B = torch.arange(len(prompts), device=device)  # which answers are still being written
    room_B = model.config.block_size - length_P[row_B] + 1
    answers = torch.full((len(prompts), max_new_tokens), -1, device=device)
    for k in range(max_new_tokens):
        last_B = next_tokens(model(last_B[:, None], cache)[:, -1], temperature, top_k, generator)
        answers[alive_B, k] = last_B
        going = ((last_B != end_token) & (k + 1 < room_B)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(alive_B):
            cache, alive_B, last_B, room_B = (
                cache.rows(going), alive_B[going], last_B[going], room_B[going])
    return [row[:n].tolist() for row, n in zip(answers.cpu(), (answers >= 0).sum(dim=1).tolist())]
