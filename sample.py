"""Sampling: drawing answers y ~ p_θ(·|x), one token after another.

    y_k ~ softmax(logits / temperature),  logits from (x, y_<k),  until END

Self-play needs exactly this at temperature 1 with nothing cut off: only then is an answer a
sample of p_t, which every theorem of the paper supposes.

Reading order: `next_tokens` → `generate` → `load_checkpoint` → `main`, a talk with the models.
Dimensions: B answers in the making, P distinct prompts, T prompt tokens, V vocabulary.
"""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import InputError
from data.run.checkpoint import load_policy
from data.run.options import check_limits, command, option, parse_args
from data.tokenizer import END, frame
from model import GPT, KVCache


def next_tokens(logits_BV, temperature=1.0, top_k=None, generator=None):
    """Draw one token a row by inverting the cumulative distribution; temperature 0 is greedy."""
    if temperature == 0:
        return logits_BV.argmax(dim=1)
    if top_k is not None:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    p_BV = (logits_BV.float() / temperature).softmax(dim=1)
    if p_BV.device.type != "cpu":
        return torch.multinomial(p_BV, 1, generator=generator)[:, 0]
    # The same ten times as fast as multinomial does it on a CPU, whose cumsum goes from left to
    # right. (A parallel one need not rise: a token of probability 0 might get a sliver of it.)
    cdf_BV = p_BV.cumsum(dim=1)
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

    # Read all but the last token of each prompt; that one is the first to be fed in the loop.
    longest = int(length_P.max()) - 1
    padded = [[*p[:-1], *[-1] * (longest + 1 - len(p))] for p in distinct]
    cache = KVCache()
    model.hidden(torch.tensor(padded, dtype=torch.long, device=device), cache)
    row_B = torch.tensor([distinct[tuple(p)] for p in prompts], device=device)
    cache, last_B = cache.rows(row_B), torch.tensor([p[-1] for p in prompts], device=device)
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


@dataclass
class SampleConfig:
    """What to ask; each field is a flag."""
    out: str = option("out", "folder of a run of train.py")
    prompt: tuple = option((), "what to ask; may be repeated; the default is four of the world's")
    samples: int = option(1000, "responses drawn from each model", 1, 10**7)
    show: int = option(8, "most frequent responses to list", 0)
    temperature: float = option(1.0, "1 is p_θ itself", 0, 1e6)
    top_k: int = option(0, "only the k likeliest tokens (not p_θ any more); 0: all of them", 0)
    max_new_tokens: int = option(24, "longest response", 1, 10**6)
    seed: int = option(0, "of the draws", 0, 2**31)


def main(args: SampleConfig):
    """Print, for each prompt, how often each saved iteration gives each response, beside p_data."""
    check_limits(args)
    paths = {p.stem[10:]: p for p in Path(args.out).glob("iteration_*.pt")}
    names = sorted(filter(str.isdecimal, paths), key=int)
    if not names:
        raise InputError(f"--out {args.out}: no iteration_*.pt there; run python train.py first")
    saved = [load_policy(paths[name]) for name in names]
    world = saved[0][2]
    for prompt in args.prompt or list(world)[::max(1, len(world) // 4)][:4]:
        counts = []
        for model, encoding, _ in saved:
            rng, end = torch.Generator().manual_seed(args.seed), encoding.encode_single_token(END)
            tokens, limit = frame(encoding, prompt, "")[0], model.config.block_size
            if len(tokens) > limit:
                raise InputError(f"--prompt {prompt[:30]!r}: {len(tokens)} tokens, limit {limit}")
            drawn = generate(model, [tokens] * args.samples, max_new_tokens=args.max_new_tokens,
                             end_token=end, generator=rng, temperature=args.temperature,
                             top_k=args.top_k or None)
            counts.append(Counter(encoding.decode([k for k in y if k != end]) for y in drawn))
        data = world.get(prompt, {})
        common = [y for y, _ in sum(counts, Counter()).most_common(args.show)]
        head = "".join(f"{'p_' + name:>8}" for name in names)
        print(f"\n{prompt}\n{'p_data':>10}{head}   response")
        for y in dict.fromkeys([*data, *common]):
            truth = f"{data[y]:>10.3f}" if y in data else f"{'0' if data else '?':>10}"
            print(truth + "".join(f"{c[y] / args.samples:>8.3f}" for c in counts) + f"   {y!r}")


if __name__ == "__main__":
    command("sample.py", lambda: main(parse_args(
        SampleConfig, "Ask each saved iteration and compare its answers with p_data.")))
