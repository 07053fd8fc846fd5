"""How cost grows with each size, and what a width does to MFU; a part of tests/bench_train.py.

Tables are random here, so that one size can grow while the others stay: a step has 32 prompts of
8 tokens with 16 responses of 8 tokens each, close to what a default step has (508 rows). Self-play
and evaluation run on the committed world, on a part of it, or on copies of it.

Reading order: `synthetic` → `step_cost` → the sweeps → `growth` → `draw`.
Dimensions: P prompts, N = P × EACH responses, T and S tokens of a prompt and a response.
"""
import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import train
from bench_logps import BLACK, BLUE, GREEN, ORANGE, PURPLE
from bench_train import alternate, flops, new_player, roof, row, show
from baselines import generate_uncached
from data.exact import evaluate
from data.plot import LARGE
from data.responses import Responses, all_logps
from data.world import World
from sample import generate

EACH = 16


# --- a table of any size -------------------------------------------------------------------------

def synthetic(P, T, S, V) -> Responses:
    """P random prompts, each with EACH random responses, half real and half generated."""
    N, rng = P * EACH, torch.Generator().manual_seed(0)
    tokens = lambda *shape: torch.randint(V, shape, generator=rng)
    real_N = (torch.arange(N) % EACH < EACH // 2) / (EACH // 2)
    generated_N = 2 / EACH - real_N
    empty_PK = torch.full((P, 1), -1)
    return Responses(tokens(P, T), torch.full((P,), T), empty_PK, torch.arange(P)
                     .repeat_interleave(EACH), tokens(N, S), torch.full((N,), S), real_N, real_N,
                     generated_N, torch.zeros(N), torch.zeros(N), generated_N)


def step_cost(m, rounds, P=32, T=8, S=8, V=512, n_embd=64):
    """(CPU seconds of a SPIN step, MFU), median over rounds, beside the roof in the same turns."""
    torch.manual_seed(0)
    config = replace(m.config, steps=rounds + 1, negatives=1, batch_size=P, block_size=256,
                     n_embd=n_embd)
    player, table = new_player(config, V), synthetic(P, T, S, V)
    table.opponent_N = all_logps(player, table, config.logprob)
    steps, (size, mm) = train.fit(player, table, torch.arange(P), config, 1, {}), roof()
    times = alternate({"step": lambda: next(steps), "roof": mm}, rounds)
    seconds = statistics.median(times["step"])
    useful = flops(player, P * T, P * EACH * S, 6)
    return seconds, useful / seconds * statistics.median(times["roof"]) / size


# --- the sweeps: {curve: ([sizes], [CPU seconds])} -----------------------------------------------

def sweep(sizes, cost):
    return sizes, [cost(size) for size in sizes]


def play_sweep(m, parts, rounds):
    """Self-play's table, and an evaluation, for an iteration on a part of the world's prompts."""
    found = {"self-play": ([], []), "evaluation": ([], [])}
    for part in parts:
        rows = m.world.rows * max(1, int(part))
        rows = rows[:int(len(m.world.rows) * part)]
        world = World(rows, m.world.encoding, m.config.sft_samples, 0, m.config.block_size)
        table = train.self_play(world, m.config, 1)
        times = alternate({
            "self-play": lambda: train.self_play(world, m.config, 1),
            "evaluation": lambda: evaluate(m.player, table, world, m.config, 1)}, rounds)
        for name, seconds in times.items():
            found[name][0].append(len(rows))
            found[name][1].append(statistics.median(seconds))
    return found


def generation_sweep(m, lengths, rounds, B=64, T=8):
    """B random prompts, no END (so nothing leaves), each answered by exactly `length` tokens."""
    torch.manual_seed(0)
    model = new_player(m.config, 512, block_size=max(lengths) + T)
    prompts, found = torch.randint(512, (B, T)).tolist(), {}
    for name, function in (("cached", generate), ("uncached", generate_uncached)):
        run = lambda length: function(model, prompts, max_new_tokens=length, end_token=-1,
                                      generator=torch.Generator().manual_seed(0))
        longest = 64 if name == "uncached" else max(lengths)  # it takes too long beyond
        found[name] = sweep([n for n in lengths if n <= longest], lambda length: statistics.median(
            alternate({"": lambda: run(length)}, rounds)[""]))
    return found


def growth(m, quick, out):
    """All sweeps: a line each, with the slope at the large end, and the figure."""
    rounds, cut = (1, 2) if quick else (7, None)
    step = partial(step_cost, m, rounds)
    seconds = lambda **size: step(**size)[0]
    panels = {
        "prompts": {"SPIN step": sweep((8, 16, 32, 64, 128, 256)[:cut], lambda P: seconds(P=P))}
        | play_sweep(m, (1 / 8, 1 / 4, 1 / 2, 1, 2)[:cut], 1 if quick else 3),
        "response length, tokens": {
            "SPIN step": sweep((4, 8, 16, 32, 64, 128)[:cut], lambda S: seconds(S=S))},
        "vocabulary": {"SPIN step": sweep((256, 1024, 4096, 16384)[:cut],
                                          lambda V: seconds(V=V))},
        "tokens made, each of 64 answers": generation_sweep(m, (8, 16, 32, 64, 128, 248)[:cut],
                                                            1 if quick else 3)}
    widths = (32, 64, 128, 256, 512)[:cut]
    by_width = [step(n_embd=D) for D in widths]
    panels["width"] = {"SPIN step": (widths, [seconds for seconds, _ in by_width])}
    print()
    row("cost against", "of", "CPU ms at each size", "slope, log-log, last two")
    row(*["---"] * 4)
    for against, curves in panels.items():
        for name, (sizes, costs) in curves.items():
            slope = math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])
            row(against, name, ", ".join(f"{x}: {show(1e3 * y)}" for x, y in zip(sizes, costs)),
                f"{slope:.2f}")
    row("width", "MFU of a SPIN step", ", ".join(f"{D}: {mfu:.1%}" for D, (_, mfu) in
                                                 zip(widths, by_width)), "")
    draw(panels, widths, [mfu for _, mfu in by_width], Path(out))


# --- the figure ----------------------------------------------------------------------------------

def draw(panels, widths, mfus, out):
    import matplotlib.pyplot as plt
    style = {"SPIN step": (BLUE, "o-"), "self-play": (ORANGE, "s--"), "evaluation": (GREEN, "^:"),
             "cached": (BLUE, "o-"), "uncached": (ORANGE, "s--")}
    with plt.rc_context(LARGE):
        figure, axes = plt.subplots(2, 3, figsize=(16, 9.5), layout="constrained")
        for ax, (against, curves) in zip(axes.flat, panels.items()):
            for name, (sizes, costs) in curves.items():
                colour, mark = style[name]
                ax.plot(sizes, [1e3 * y for y in costs], mark, color=colour, label=name, ms=8)
            sizes, costs = next(iter(curves.values()))  # a guide through the first curve's end
            ax.plot(sizes, [1e3 * costs[-1] * x / sizes[-1] for x in sizes], "-", color=BLACK,
                    alpha=0.35, lw=1.5, label="slope 1: doubled size, doubled cost")
            ax.set(xscale="log", yscale="log", xlabel=against, ylabel="CPU ms, one thread")
            ticks = sorted({*sizes, *(s[-1] for s, _ in curves.values())})
            ax.set_xticks(ticks, [str(x) for x in ticks])
            ax.set_ylim(top=8 * ax.get_ylim()[1])  # room for the legend
        ax = axes.flat[-1]
        ax.plot(widths, [100 * mfu for mfu in mfus], "D-", color=PURPLE, ms=8)
        ax.axhline(50, color=BLACK, ls=":", lw=1.5, label="half of what torch.mm reaches")
        ax.set(xscale="log", xlabel="width", ylabel="MFU of a SPIN step, %", ylim=(0, 100))
        ax.set_xticks(widths, [str(D) for D in widths])
        for ax in axes.flat:
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.legend(loc="upper left")
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / "bench_train.png", dpi=80)
        plt.close(figure)
    print(f"{out / 'bench_train.png'} drawn")
