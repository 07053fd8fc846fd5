"""How fast a run is and where its time goes: SFT, self-play, generation, on this machine.

    python tests/bench_train.py                  everything, and out/bench_train.png (4 minutes)
    python tests/bench_train.py --parts rates    only the two tables (also: growth, shares)
    python tests/bench_train.py --parts rates --peer trl   beside TRL, if it is installed
    python tests/bench_train.py --quick          tiny sizes: does it still run?

The clock is processor time of one thread, which other programs disturb little. Contenders take
turns in one process; a figure is the median over rounds, a ratio the median of a round's ratios.
All run train.py's own `fit`, on the same prompts in the same order; only `answer_logps` and the
table of responses differ. The material is that of iteration 1, whose weak opponent gives the most
distinct responses: later iterations are faster. Memory: peak resident size of a new process
above what it has after imports and with the data loaded.

  row      a distinct (prompt, response) of a step's table: what is scored, once.
  example  a response of the SFT set: a step of SFT stands for sft_samples a prompt (128).
  pair     one generated response beside real ones: a step stands for batch_size of them (1024).
           The shipped loss sets each against all real responses of its prompt, a ready-made stack
           against one; both count as one pair. The opponent's pass over the whole table is in,
           divided by the iteration's steps; the generation of that table is not: it has rows
           of its own.
  MFU      6 (generation: 2) × parameters × useful tokens / seconds / the speed of a large
           torch.mm. Useful: a prompt's tokens once, and those of each distinct row (generation:
           of each response); no padding. The head counts for response tokens only, positions
           not at all. It is the same work for all contenders, so its ratios are those of time.

Baselines: "padded" is `sequence_logps` on rows of prompt + response, padded to the longest, no
prompt shared; "one by one" the same, one row at a time: both on the same distinct rows with the
same weights, so the same loss and gradient. "every draw" is padded with equal rows not merged:
all 128 examples a prompt, or 32 generated and 32 real ones. "uncached" generation reads the whole
sequence again for each token, and draws the same answers.

Reading order: `Material` → `WAYS` → `alternate` → `step_table`, `generation_table` → `peaks` →
`main`; then baselines.py; bench_growth.py, cost against size; bench_shares.py, where the wall
time of a run goes; bench_peers.py and bench_careful.py, other people's code.
"""
import argparse
import copy
import io
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from bench_logps import MB, ROOT, machine, peak_above_start  # (it puts the root on sys.path)

import data.responses as tables
import train
from baselines import generate_uncached, one_by_one, padded_logps, unmerged
from data.responses import Responses, answer_logps
from data.world import World
from model import GPT, GPTConfig
from sample import generate, save_checkpoint

THREADS = torch.get_num_threads()  # what a run of train.py would use; `shares` does
PARTS = ("rates", "growth", "shares")
TINY = dict(sft_samples=16, negatives=8, batch_size=64, sft_steps=40, steps=8)


# --- the material: what iteration 1 of a default run meets ---------------------------------------

@dataclass
class Material:
    config: train.Config
    world: World
    player: GPT  # after SFT
    sft: Responses  # the table of SFT, …
    spin: Responses  # … that of iteration 1, …
    sft_draws: Responses  # … and both with a row for every draw
    spin_draws: Responses


def prepare(folder, quick) -> Material:
    """SFT, then self-play's first table, as `train.main` makes them."""
    config = train.Config(device="cpu", out=str(folder), **(TINY if quick else {}))
    with redirect_stdout(io.StringIO()):
        world, _ = train.prepare(config)
    torch.manual_seed(config.seed)
    player, sft = new_player(config, world.encoding.n_vocab), world.tabulate()
    for _, _, parts in train.fit(player, sft, world.splits["train"], config, 0, {}):
        pass
    player = train.averaged(parts)
    save_checkpoint(folder / "iteration_0.pt", player, world)
    spin = train.self_play(world, config, 1)
    draws = train.draw(player, world, config, 1)  # the same once more: its chunks have own seeds
    rng, real = torch.Generator().manual_seed(0), []
    for shares in world.real:
        all_drawn = [y for y, p in shares.items() for _ in range(round(p * config.sft_samples))]
        real.append([all_drawn[i] for i in torch.randperm(len(all_drawn), generator=rng)])
    fewer = [r[:config.negatives] for r in real]  # as many real ones as generated ones
    return Material(config, world, player, sft, spin, unmerged(sft, real, [[]] * len(real)),
                    unmerged(spin, fewer, [list(d.elements()) for d in draws]))


def new_player(config, n_vocab, **sizes):
    config = replace(config, **sizes)
    return GPT(GPTConfig(n_vocab, config.block_size, config.n_layer, config.n_head,
                         config.n_embd))


# --- the contenders -------------------------------------------------------------------------------

WAYS = {"shipped": (answer_logps, ""), "padded": (padded_logps, ""),
        "padded, every draw": (padded_logps, "_draws"), "one by one": (one_by_one, "")}
GENERATORS = {"shipped": generate, "uncached": generate_uncached}


# --- one clock for all ---------------------------------------------------------------------------

def alternate(contenders, rounds, warm=1) -> dict[str, list[float]]:
    """CPU seconds of each, `rounds` times in turn, after `warm` calls that do not count."""
    found = {name: [] for name in contenders}
    for _ in range(rounds + warm):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    return {name: times[warm:] for name, times in found.items()}


def ratio(these, those) -> float:
    return statistics.median(a / b for a, b in zip(these, those))


def roof(size=1024):
    a, b = torch.randn(size, size), torch.randn(size, size)
    c = torch.empty(size, size)
    return 2 * size ** 3, lambda: torch.mm(a, b, out=c)


def flops(model, prompt_tokens, response_tokens, each):
    """`each` (2 or 6) × the parameters that a useful token meets."""
    head = model.head_weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head - model.wpe.weight.numel()
    return each * (body * (prompt_tokens + response_tokens) + head * response_tokens)


def stepper(way, table, config, prompts, t, player, opponent=None):
    """A function that makes one more step of `fit`, and (given an opponent) its pass, apart."""
    steps = train.fit(copy.deepcopy(player), table, prompts, config, t, {})

    def patched(run):
        with patch.object(train, "answer_logps", way), patch.object(tables, "answer_logps", way):
            return run()
    return (lambda: patched(lambda: next(steps)),
            lambda: patched(lambda: tables.all_logps(opponent, table, config.logprob)))


def work_of_a_step(table, config, prompts, t):
    """Means over the steps of a stage: prompt tokens, response tokens, distinct rows."""
    steps = config.steps if t else config.sft_steps
    order, found = train.prompt_order(len(prompts), steps, config, t), []
    for chosen in order:
        part = table.select(prompts[chosen])
        used_N = (part.real_N > 0) | (part.negative_N > 0)
        found.append((part.prompt_length_P.sum().item(), part.length_N[used_N].sum().item(),
                      used_N.sum().item()))
    return [statistics.mean(column) for column in zip(*found)]


# --- the two tables ------------------------------------------------------------------------------

def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def show(x: float) -> str:
    """Three figures: 0.0123, 1.23, 123, 12,300."""
    return f"{x:.3g}" if x < 999.5 else f"{float(f'{x:.3g}'):,.0f}"


def step_contenders(m, t, rounds):
    """{way: (one step, the opponent's pass)} for SFT (t = 0) or SPIN (t = 1)."""
    config = replace(m.config, steps=rounds + 1, sft_steps=rounds + 1)
    return config, {name: stepper(way, getattr(m, ("spin" if t else "sft") + draws), config,
                                  m.world.splits["train"], t, m.player, m.player)
                    for name, (way, draws) in WAYS.items()}


def step_table(m, memory, rounds):
    """SFT and SPIN: what a second of processor time does, beside the baselines."""
    row("work", "contender", "CPU ms a step", "distinct rows/s", "examples or pairs/s", "MFU",
        "time / shipped", "peak MB")
    row(*["---"] * 8)
    for t, work, unit in ((0, "SFT", "examples"), (1, "SPIN", "pairs")):
        config, contenders = step_contenders(m, t, rounds)
        size, mm = roof()
        times = alternate({"roof": mm} | {name: step for name, (step, _) in contenders.items()},
                          rounds)
        if t:  # the opponent's pass, spread over the steps of an iteration
            passes = alternate({name: run for name, (_, run) in contenders.items()}, 1, warm=0)
            for name, found in passes.items():
                share = statistics.median(found) / m.config.steps
                times[name] = [seconds + share for seconds in times[name]]
        prompt_tokens, response_tokens, rows = work_of_a_step(
            m.spin if t else m.sft, config, m.world.splits["train"], t)
        prompts = min(train.prompts_a_step(config), len(m.world.splits["train"]))
        nominal = prompts * (config.negatives if t else config.sft_samples)
        useful = flops(m.player, prompt_tokens, response_tokens, 6)
        for name in contenders:
            seconds = statistics.median(times[name])
            mfu = useful / seconds * statistics.median(times["roof"]) / size
            row(work, name, show(1e3 * seconds), show(rows / seconds),
                f"{show(nominal / seconds)} {unit}", f"{mfu:.2%}",
                f"{ratio(times[name], times['shipped']):.2f}", show(memory[work, name] / MB))


def requests(m):
    """What is asked of generation: {name: prompts}."""
    few = m.world.prompts[:64]
    return {"256 prompts": m.world.prompts[:256],
            f"64 × {m.config.negatives}": [x for x in few for _ in range(m.config.negatives)]}


def ask(m, name, prompts, seed=0):
    return GENERATORS[name](m.player, prompts, max_new_tokens=m.world.max_new_tokens,
                            end_token=m.world.end_token,
                            generator=torch.Generator().manual_seed(seed))


def generation_table(m, memory, rounds):
    row("generation", "contender", "CPU ms", "responses/s", "tokens/s", "MFU", "time / shipped",
        "peak MB")
    row(*["---"] * 8)
    for asked, prompts in requests(m).items():
        size, mm = roof()
        times = alternate({"roof": mm} | {name: lambda name=name: ask(m, name, prompts)
                                          for name in GENERATORS}, rounds)
        answers = ask(m, "shipped", prompts)
        tokens = sum(map(len, answers))
        read = sum(len(x) for x in set(map(tuple, prompts)))
        for name in GENERATORS:
            seconds = statistics.median(times[name])
            mfu = flops(m.player, read, tokens, 2) / seconds * statistics.median(
                times["roof"]) / size
            row(asked, name, show(1e3 * seconds), show(len(prompts) / seconds),
                show(tokens / seconds), f"{mfu:.2%}", f"{ratio(times[name], times['shipped']):.2f}",
                show(memory[asked, name] / MB))


def peaks(folder) -> dict:
    """{(work, contender): bytes}, two processes at a time: memory does not mind."""
    names = [(work, name) for work in ("SFT", "SPIN") for name in WAYS]
    names += [(asked, name) for asked in requests(load(folder)) for name in GENERATORS]
    # A fork server has imported all and computed nothing; each measurement is a fresh copy of it.
    context = get_context("forkserver")
    context.set_forkserver_preload(["bench_train"])
    with patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)), ProcessPoolExecutor(
            2, context, max_tasks_per_child=1) as pool:
        return dict(zip(names, pool.map(peak, *zip(*names), [folder] * len(names))))


def load(folder) -> Material:
    return torch.load(Path(folder) / "material.pt", weights_only=False)


def peak(work, name, folder):
    """What two steps, or one request, need at their worst moment beyond the loaded material."""
    torch.set_num_threads(1)
    m = load(folder)
    if work in ("SFT", "SPIN"):
        step, _ = step_contenders(m, int(work == "SPIN"), 2)[1][name]
        return peak_above_start(lambda: (step(), step()), "cpu")
    return peak_above_start(lambda: ask(m, name, requests(m)[work]), "cpu")


# --- the run -------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--peer", choices=("trl",), help="measure it beside ours")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the figure")
    return parser.parse_args()


def main(args) -> None:
    torch.set_num_threads(1)
    if args.peer:  # before anything is measured, so that one need not wait for the refusal
        import bench_peers
    began, rounds = time.time(), 1 if args.quick else 11
    print(f"{machine()}, torch {torch.__version__}, one thread, float32", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if "rates" in args.parts or "growth" in args.parts:
            m = prepare(Path(folder), args.quick)
        if "rates" in args.parts:
            torch.save(m, Path(folder) / "material.pt")
            size, mm = roof()
            seconds = statistics.median(alternate({"": mm}, 9)[""])
            print(f"torch.mm reaches {size / seconds / 1e9:.0f} GFLOP/s; "
                  f"{sum(p.numel() for p in m.player.parameters()):,} parameters\n")
            memory = peaks(folder)
            step_table(m, memory, rounds)
            print()
            generation_table(m, memory, rounds)
            if args.peer:
                bench_peers.peer_tables(m, 1 if args.quick else 5)
        if "growth" in args.parts:
            from bench_growth import growth
            growth(m, args.quick, args.out)
    if "shares" in args.parts:
        from bench_shares import shares
        print()
        shares(TINY | {"iters": 1} if args.quick else {}, THREADS, row)
    print(f"\n{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main(parse_args())
