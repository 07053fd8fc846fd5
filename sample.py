"""Sampling: drawing responses y ~ p_θ(·|x), one token after another.

    y_k ~ softmax(logits / temperature),  logits from (x, y_<k),  until END

Self-play needs exactly this at temperature 1 with nothing cut off: only then is a response
a sample of p_t, which every theorem of the paper supposes.

Reading order: `next_tokens` → `generate` → `main`, which asks every policy that a run has saved.
Dimensions: B responses in the making, T tokens read in one call, V vocabulary; in the cache C
tokens, H heads of size K, R places in reserve; N sequences that are picked out of others.
"""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import InputError
from data.run.checkpoint import load_policy
from data.run.options import check_limits, command, option, parse_args
from data.run.report import short
from data.tokenizer import END, frame
from model import GPT, KVCache


def next_tokens(logits_BV, temperature=1.0, top_k=None, generator=None):
    """Draw one token a row by inverting the cumulative distribution; temperature 0 is greedy."""
    if temperature == 0:
        return logits_BV.argmax(dim=1)
    if top_k is not None:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    # Subtract the maximum first: dividing by a tiny temperature then cannot give ∞ − ∞.
    logits_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)).float()
    p_BV = (logits_BV / max(temperature, 1e-30)).softmax(dim=1)
    if p_BV.device.type != "cpu":
        return torch.multinomial(p_BV, 1, generator=generator)[:, 0]
    # On a CPU this is ten times as fast as torch.multinomial. A GPU's parallel cumsum need not be
    # monotone, and might give some room to a token of probability 0: hence multinomial there.
    cdf_BV = p_BV.cumsum(dim=1)
    # Subtle: the float32 cumsum may end slightly off 1. Scale u by its last entry, and keep it
    # strictly below.
    u_B1 = cdf_BV[:, -1:] * torch.rand(len(cdf_BV), 1, generator=generator, device=cdf_BV.device)
    u_B1 = torch.minimum(u_B1, cdf_BV[:, -1:].nextafter(torch.zeros_like(u_B1)))
    return torch.searchsorted(cdf_BV, u_B1, right=True)[:, 0]  # first token with cdf > u


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int, end_token: int,
             temperature: float = 1.0, top_k: int | None = None,
             generator: torch.Generator | None = None) -> list[list[int]]:
    """One response to each prompt, as token lists; [[5, 6]] -> [[9, 3, end_token]], say.

    A response ends with end_token, or without it where max_new_tokens or the model's block_size
    cut it short. Equal prompts are read once and finished responses leave the batch. `generator`
    lives on the model's device. Raises ValueError for an empty or too long prompt, a
    temperature < 0, a top_k < 1.
    """
    block_size, device = model.config.block_size, model.head_weight.device
    if not all(prompts) or any(len(p) > block_size for p in prompts):
        raise ValueError(f"a prompt needs 1 to {block_size} tokens (the block_size)")
    if not 0 <= temperature < float("inf") or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be ≥ 0 and top_k {top_k} ≥ 1 or None")
    if not prompts:
        return []
    cache = read_prompts(model, prompts, RoomyCache() if max_new_tokens > 64 else KVCache())
    last_B = torch.tensor([p[-1] for p in prompts], device=device)
    # The last token drawn is never read, hence + 1.
    room_B = torch.tensor([block_size - len(p) + 1 for p in prompts], device=device)
    unfinished_B = torch.arange(len(prompts), device=device)  # which rows are still in the batch
    max_new_tokens = min(max_new_tokens, int(room_B.max()))
    responses = torch.full((len(prompts), max_new_tokens), -1, device=device)
    for k in range(max_new_tokens):
        logits_BV = model(last_B[:, None], cache)[:, -1]
        last_B = next_tokens(logits_BV, temperature, top_k, generator)
        responses[unfinished_B, k] = last_B
        going = ((last_B != end_token) & (k + 1 < room_B)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(unfinished_B):
            cache = cache.rows(going)
            unfinished_B, last_B, room_B = unfinished_B[going], last_B[going], room_B[going]
    length_B = (responses >= 0).sum(dim=1).tolist()
    return [row[:n] for row, n in zip(responses.tolist(), length_B)]


class RoomyCache(KVCache):
    """A KVCache with room for tokens to come: a new one seldom copies those before it.

    That pays for long responses: twice as fast for 1024 tokens (data/GPT2.md).
    """
    def extend(self, layer, k_BHTK, v_BHTK, room=16):
        if layer not in self.layers:
            return super().extend(layer, k_BHTK, v_BHTK)
        held, first = self.layers[layer], self.width - k_BHTK.shape[2]
        if held[0].shape[2] < self.width:
            B, H, T, K = k_BHTK.shape
            empty_BHRK = k_BHTK.new_empty(B, H, room + T, K)
            held = [torch.cat([x[:, :, :first], empty_BHRK], dim=2) for x in held]
            self.layers[layer] = held
        for x, new in zip(held, (k_BHTK, v_BHTK)):
            x[:, :, first:self.width] = new
        return [x[:, :, :self.width] for x in held]

    def rows(self, index_N):
        new = RoomyCache()
        vars(new).update(vars(super().rows(index_N)))
        return new


def read_prompts(model, prompts, cache) -> KVCache:
    """Give back a cache that has read all but the last token of each prompt, equal prompts once.

    The last token is the first that `generate` feeds to the model.
    """
    distinct = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    longest, device = max(map(len, distinct)), model.head_weight.device
    padded = [[*p[:-1], *[-1] * (longest - len(p))] for p in distinct]
    model.hidden(torch.tensor(padded, dtype=torch.long, device=device), cache)
    return cache.rows(torch.tensor([distinct[tuple(p)] for p in prompts], device=device))


def rows_that_fit(model, tokens) -> int:
    """How many responses to sample at once: their keys and values stay below 256 MB, 2 GB on a GPU.
    """
    numbers = 1 << (26 if model.head_weight.device.type == "cpu" else 29)
    a_row = 2 * model.config.n_layer * model.config.n_embd * tokens
    return max(1, min(4096, numbers // a_row))


@dataclass
class SampleConfig:
    """What to ask; each field is a flag."""
    out: str = option("out", "folder of a run of train.py")
    prompt: tuple = option((), "what to ask; may be repeated; the default is four of the world's")
    samples: int = option(1000, "responses sampled from each policy", 1, 10**7)
    show: int = option(8, "most frequent responses to list", 0)
    temperature: float = option(1.0, "1 is p_θ itself; 0 is greedy", 0, 1e6)
    top_k: int = option(0, "only the k likeliest tokens (not p_θ any more); 0: all of them", 0)
    max_new_tokens: int = option(0, "longest response; 0: two tokens longer than any in the data",
                                 0, 10**6)
    seed: int = option(0, "of the sampling", 0, 2**31)


def main(args: SampleConfig):
    """Print, for each prompt, how often each saved policy gives each response, beside p_data."""
    check_limits(args)
    paths = {p.stem[10:]: p for p in Path(args.out).glob("iteration_*.pt")}
    names = sorted(filter(str.isdecimal, paths), key=int)
    if not names:
        raise InputError(f"--out {args.out}: no iteration_*.pt there; run python train.py first")
    policies = [load_policy(paths[name]) for name in names]
    world = policies[0][2]
    for prompt in args.prompt or list(world)[::max(1, len(world) // 4)][:4]:
        counts = [count_responses(*policy, prompt, args) for policy in policies]
        print_counts(prompt, world.get(prompt, {}), names, counts, args)


def count_responses(model, encoding, world, prompt, args) -> Counter:
    """How often the policy gives each (response as text, whether it ended) to a prompt."""
    tokens, end = frame(encoding, prompt, "")[0], encoding.encode_single_token(END)
    if len(tokens) > model.config.block_size:
        raise InputError(f"--prompt {prompt[:30]!r}: {len(tokens)} tokens, and the model reads "
                         f"{model.config.block_size}; shorten it")
    longest = args.max_new_tokens or 2 + max(
        len(frame(encoding, "", y)[1]) for responses in world.values() for y in responses)
    rng, counts = torch.Generator().manual_seed(args.seed), Counter()
    chunk = rows_that_fit(model, len(tokens) + longest)
    for first in range(0, args.samples, chunk):
        for y in generate(model, [tokens] * min(chunk, args.samples - first), end_token=end,
                          max_new_tokens=longest, temperature=args.temperature,
                          top_k=args.top_k or None, generator=rng):
            counts[encoding.decode([k for k in y if k != end]), y[-1:] == [end]] += 1
    return counts


def print_counts(prompt, p_data, names, counts, args):
    """One table: p_data beside the frequencies under p_0, p_1, …"""
    common = [y for y, _ in sum(counts, Counter()).most_common(args.show)]
    head = "".join(f"{'p_' + name:>8}" for name in names)
    print(f"\n{short(prompt, 90)}\n{'p_data':>10}{head}   response")
    for y, ended in dict.fromkeys([*((y, True) for y in p_data), *common]):
        truth = f"{p_data[y]:>10.3f}" if ended and y in p_data else f"{'0' if p_data else '?':>10}"
        print(truth + "".join(f"{c[y, ended] / args.samples:>8.3f}" for c in counts)
              + f"   {y!r}{'' if ended else ' …'}")
    cut = [sum(n for (_, ended), n in c.items() if not ended) for c in counts]
    if any(cut):
        print(f"{'cut short':>10}" + "".join(f"{n / args.samples:>8.3f}" for n in cut)
              + "   … marks a response without its end; --max-new-tokens allows longer ones")


if __name__ == "__main__":
    command("sample.py", lambda: main(parse_args(
        SampleConfig, "Ask each saved policy p_0, p_1, … and compare its responses with p_data.")))
