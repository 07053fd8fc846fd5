"""Sampling: drawing responses y ~ p_θ(·|x), one token after another.

    y_k ~ softmax(logits / temperature),  logits from (x, y_<k),  until END

Self-play needs exactly this, at temperature 1 and without top-k: only then is a response a sample
of p_t, which every theorem of the paper supposes. A response that becomes too long is cut short: it
has no END, and counts as a wrong response with a log-probability of its own.

Reading order: `next_tokens` → `generate` → `expectation` → `main`, which asks every policy that a
run has saved.
Dimensions: B responses in the making, P distinct prompts of at most T tokens, C tokens in the
cache, D width, V vocabulary; N samples of one prompt.
"""
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from data import InputError  # first: it sets sys.excepthook, which names a missing package

import torch
from torch.nn.utils.rnn import pad_sequence

from data.run.console import Countdown, short
from data.run.files import load_policy
from data.run.options import check_limits, command, option, parse_args
from data.tokenizer import END, frame
from model import GPT, KVCache
from spin_loss import sequence_logps


def next_tokens(logits_BV, temperature=1.0, top_k=None, generator=None):
    """Draw one token a row, [B]; temperature 0 is greedy, top_k keeps the k likeliest alone."""
    if temperature == 0:
        return logits_BV.argmax(dim=1)
    if top_k is not None:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    # Subtract the maximum first: dividing by a tiny temperature then cannot give ∞ − ∞.
    logits_BV = logits_BV - logits_BV.amax(dim=1, keepdim=True)
    p_BV = (logits_BV / max(temperature, 1e-30)).softmax(dim=1)  # 1e-50 would be 0 in float32
    return torch.multinomial(p_BV, 1, generator=generator)[:, 0]


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
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]

    # Read the distinct prompts, padded on the right, then give each response a row of its own.
    distinct = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens_PT = pad_sequence([torch.tensor(p) for p in distinct], batch_first=True).to(device)
    length_P = torch.tensor([len(p) for p in distinct], device=device)
    row_B = torch.tensor([distinct[tuple(p)] for p in prompts], device=device)
    cache = KVCache()
    hidden_PTD = model.hidden(tokens_PT, cache=cache)
    last_PD = hidden_PTD[torch.arange(len(distinct), device=device), length_P - 1]
    cache.keep(row_B)
    logits_BV = (last_PD @ model.head_weight.T)[row_B]

    position_B = length_P[row_B]  # of the token that is drawn next
    # True on a prompt's own tokens; a column is added for each token that is drawn.
    visible_BC = torch.arange(tokens_PT.shape[1], device=device) < position_B[:, None]
    unfinished_B = torch.arange(len(prompts), device=device)  # whose rows are still in the batch
    # The shortest prompt leaves most room. + 1, because the last token drawn is never read and so
    # needs no position.
    most = min(max_new_tokens, block_size + 1 - min(map(len, distinct)))
    responses = torch.full((len(prompts), most), -1, device=device)  # −1: no token
    for k in range(most):
        token_B = next_tokens(logits_BV, temperature, top_k, generator)
        responses[unfinished_B, k] = token_B
        # A token that is to be read needs a position below block_size.
        going = ((token_B != end_token) & (position_B < block_size)).nonzero()[:, 0]
        if not len(going) or k + 1 == most:
            break
        if len(going) < len(unfinished_B):
            cache.keep(going)
            unfinished_B, token_B = unfinished_B[going], token_B[going]
            position_B, visible_BC = position_B[going], visible_BC[going]
        visible_BC = torch.cat([visible_BC, torch.ones_like(visible_BC[:, :1])], dim=1)
        hidden_B1D = model.hidden(token_B[:, None], position_B[:, None], visible_BC[:, None], cache)
        logits_BV = hidden_B1D[:, 0] @ model.head_weight.T
        position_B = position_B + 1
    length_B = (responses >= 0).sum(dim=1).tolist()
    return [row[:n] for row, n in zip(responses.tolist(), length_B)]


def rows_that_fit(model, tokens) -> int:
    """How many responses to sample at once: their keys and values stay below 256 MB, 2 GB on a GPU.
    """
    numbers = 1 << (26 if model.head_weight.device.type == "cpu" else 29)
    a_row = 2 * model.config.n_layer * model.config.n_embd * tokens
    return max(1, min(4096, numbers // a_row))


def samples_of(model, prompt, n, *, generator, **how) -> list[list[int]]:
    """n responses to one prompt, some at a time; `how` is what `generate` needs."""
    chunk = rows_that_fit(model, len(prompt) + how["max_new_tokens"])
    samples, countdown = [], Countdown("sampled", n)
    while len(samples) < n:
        some = [prompt] * min(chunk, n - len(samples))
        samples += generate(model, some, generator=generator, **how)
        countdown.say(len(samples))
    return samples


@torch.no_grad()
def expectation(f, model, prompt, samples) -> tuple[float, float]:
    """E_{y~p_θ(·|x)} f(y), estimated from samples of p_θ, with the estimate's standard error.

    For expectations over all strings, not only over known ones. f(y, log p_θ(y|x)) is a number; the
    entropy of p_θ is the expectation of −log p_θ(y|x), in nats:

        expectation(lambda y, logp: -logp, model, prompt, samples)
    """
    counts = Counter(map(tuple, samples))
    values = []
    for y, count in counts.items():
        tokens_1T = torch.tensor([[*prompt, *y]], device=model.head_weight.device)
        response_1T = torch.arange(tokens_1T.shape[1], device=tokens_1T.device)[None] >= len(prompt)
        values += [f(y, sequence_logps(model, tokens_1T, response_1T).item())] * count
    values_N = torch.tensor(values, dtype=torch.float64)
    return values_N.mean().item(), values_N.std().item() / len(samples)**0.5


@dataclass
class SampleConfig:
    """What to ask; each field is a flag."""
    out: str = option("out", "folder of a run of train.py")
    prompt: tuple = option((), "what to ask; may be repeated; the default is four from the data")
    samples: int = option(1000, "responses sampled from each policy", 2, 10**7)
    show: int = option(8, "most frequent responses to list", 0)
    temperature: float = option(1.0, "1 is p_θ itself; 0 is greedy", 0, 1e6)
    top_k: int = option(0, "only the k likeliest tokens (not p_θ any more); 0: all of them", 0)
    max_new_tokens: int = option(0, "longest response; 0: two tokens longer than any in the data",
                                 0, 10**6)
    seed: int = option(0, "of the sampling", 0, 2**31)


def main(args: SampleConfig):
    """Print, for each prompt, how often each saved policy gives each response, beside p_data."""
    check_limits(args)
    paths = {p.stem.removeprefix("iteration_"): p for p in Path(args.out).glob("iteration_*.pt")}
    names = sorted(filter(str.isdecimal, paths), key=int)
    if not names:
        raise InputError(f"--out {args.out}: no iteration_*.pt there; run python train.py first")
    saved = [load_policy(paths[name]) for name in names]  # (model, encoding, {prompt: its row})
    _, encoding, rows = saved[0]
    if not args.max_new_tokens:
        args = replace(args, max_new_tokens=2 + max(
            len(frame(encoding, "", y)[1]) for row in rows.values() for y in row["responses"]))
    rng = torch.Generator().manual_seed(args.seed)
    for prompt in args.prompt or list(rows)[::max(1, len(rows) // 4)][:4]:
        found = [ask(model, encoding, prompt, args, rng) for model, encoding, _ in saved]
        print_answers(prompt, rows.get(prompt, {}), names, found, args)


def ask(model, encoding, prompt, args, rng):
    """How often a policy gives each (response as text, whether it ended), and its entropy."""
    x, end = frame(encoding, prompt, "")[0], encoding.encode_single_token(END)
    if len(x) > model.config.block_size:
        raise InputError(f"--prompt {prompt[:30]!r}: {len(x)} tokens, and the model reads "
                         f"{model.config.block_size}; shorten it")
    samples = samples_of(model, x, args.samples, max_new_tokens=args.max_new_tokens, end_token=end,
                         temperature=args.temperature, top_k=args.top_k or None, generator=rng)
    counts = Counter((encoding.decode([k for k in y if k != end]), y[-1:] == [end])
                     for y in samples)
    return counts, expectation(lambda y, logp: -logp, model, x, samples)


def print_answers(prompt, row, names, found, args):
    """One table: p_data beside the frequencies under p_0, p_1, …"""
    counts, p_data = [count for count, _ in found], row.get("responses", {})
    common = [y for y, _ in sum(counts, Counter()).most_common(args.show)]
    shown = dict.fromkeys([*((y, True) for y in p_data), *common])
    head = "".join(f"{'p_' + name:>8}" for name in names)
    split = {"heldout": "(held out)", "train": "(a training prompt)"}.get(row.get("split"), "")
    data = "in data" if row.get("empirical") else "p_data"
    print(f"\n{short(prompt, 80)}  {split or '(not in the data)'}\n{data:>10}{head}   response")
    for y, ended in shown:
        truth = f"{p_data[y]:>10.3f}" if ended and y in p_data else f"{'0' if p_data else '?':>10}"
        print(truth + "".join(f"{c[y, ended] / args.samples:>8.3f}" for c in counts)
              + f"   {y!r}{'' if ended else ' …'}")
    cut = [sum(n for (_, ended), n in c.items() if not ended) for c in counts]
    if any(cut):
        print(f"{'cut short':>10}" + "".join(f"{n / args.samples:>8.3f}" for n in cut)
              + "   … marks a response without its end; --max-new-tokens allows longer ones")
    others = [1 - sum(c[y] for y in shown) / args.samples for c in counts]
    print(f"{'':>10}" + "".join(f"{share:>8.3f}" for share in others) + "   all others")
    if args.temperature == 1 and not args.top_k:
        exact = f"{sum(p * -math.log(p) for p in p_data.values()):.3f}" if p_data else "?"
        print(f"{exact:>10}" + "".join(f" {entropy:>7.3f}" for _, (entropy, _) in found)
              + f"   entropy, nats (± at most {max(error for _, (_, error) in found):.3f})")


if __name__ == "__main__":
    command("sample.py", lambda: main(parse_args(
        SampleConfig, "Ask each saved policy p_0, p_1, … and compare its responses with p_data.")))
