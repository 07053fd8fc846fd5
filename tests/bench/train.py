"""How fast training is: beside its own past, beside other people's code, and as sizes grow.

    python tests/bench/train.py                  all parts that need nothing installed (8 minutes)
    python tests/bench/train.py --parts steps    one part; several may be named
    python tests/bench/train.py --quick          tiny sizes: does it still run?

steps    One step of SFT and of iterations 1, 2 and 3, now and as it was at commit c002988
         (baseline.py): processor time, tensor operations, and how often Python must wait for the
         device. The opponents p_0, p_1, p_2 and their responses come from a real default run.
peers    Examples and pairs a processor second beside TRL's trainers and beside a careful loop on
         Hugging Face's GPT-2 (peers.py). Needs `pip install transformers==5.24.0 trl==1.16.0`.
growth   Time and memory as prompts or distinct prefixes become more (growth.py).
shares   Where the time of `python train.py --iters 3` goes.

One thread, float32. The clock is processor time, and what is compared takes turns in one process
(measure.py). Reading order: `step_table` → `shares` → `main`; then steps.py, baseline.py,
peers.py, growth.py.
"""
import argparse
import importlib.util
import io
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402  (the line above makes what follows importable)

import train  # noqa: E402
from bench import baseline  # noqa: E402
from bench.growth import growth  # noqa: E402
from bench.measure import cpu_seconds, head, in_turns, machine, row, show  # noqa: E402
from bench.steps import (TINY, fit_before, fit_now, material, prefixes_of_a_step,  # noqa: E402
                         step_operations, step_seconds)
from data.responses import Responses, all_logps  # noqa: E402
from data.run.checkpoint import Run  # noqa: E402

PARTS = ("steps", "peers", "growth", "shares")


# --- a step, now and before ----------------------------------------------------------------------

def step_table(stages, quick):
    head("a step of", "response tokens", "after distinct prefixes", "CPU ms now", "CPU ms before",
         "now / before", "operations now / before", "waits now / before")
    for stage in stages:
        name = f"iteration {stage.t}" if stage.t else "SFT"
        steps, rounds = (5, 1) if quick else (14, 9)
        seconds = in_turns({fit.__name__: lambda fit=fit: step_seconds(fit, stage, steps)
                            for fit in (fit_now, fit_before)}, rounds)
        now, before = seconds["fit_now"], seconds["fit_before"]
        operations, waits = zip(*(step_operations(fit, stage) for fit in (fit_now, fit_before)))
        tokens, prefixes = prefixes_of_a_step(stage)
        row(name, show(tokens), show(prefixes), show(1e3 * now), show(1e3 * before),
            f"{now / before:.2f}", "{} / {}".format(*operations), "{} / {}".format(*waits))
    pass_table(stages[1:], quick)


def pass_table(stages, quick):
    """The opponent's log-probs of all responses, once in an iteration."""
    head("the opponent's pass in", "CPU ms now", "CPU ms before", "now / before")
    for stage in stages:
        seconds = in_turns({
            "now": lambda: cpu_seconds(lambda: all_logps(stage.player, stage.responses.trees)),
            "before": lambda: cpu_seconds(lambda: baseline.all_logps(stage.player, stage.table)),
        }, 1 if quick else 3)
        row(f"iteration {stage.t}", show(1e3 * seconds["now"]), show(1e3 * seconds["before"]),
            f"{seconds['now'] / seconds['before']:.2f}")


# --- where a run's time goes ---------------------------------------------------------------------

class Clock:
    """Wall and processor seconds by purpose. What one function calls of the others is theirs."""
    def __init__(self):
        self.wall, self.cpu, self.running = Counter(), Counter(), ["the rest"]
        self.last = time.perf_counter(), time.process_time()

    def note(self):
        """Credit what has passed since the last note to the purpose that runs now."""
        now = time.perf_counter(), time.process_time()
        self.wall[self.running[-1]] += now[0] - self.last[0]
        self.cpu[self.running[-1]] += now[1] - self.last[1]
        self.last = now

    def timed(self, purpose, function):
        def wrapped(*args, **kwargs):
            self.note()
            self.running.append(purpose)
            try:
                return function(*args, **kwargs)
            finally:
                self.note()
                self.running.pop()
        return wrapped


PURPOSES = [
    (train, "prepare", "reading the world"), (train, "sample_responses", "sampling"),
    (train, "self_play_responses", "prefix trees"), (train, "sft_responses", "prefix trees"),
    (train, "all_logps", "the opponent's pass"), (train, "evaluate", "evaluation"),
    (Responses, "batch", "training: batches"), (train, "fit", "training: steps"),
    (train, "show_responses", "responses shown"),
    (Run, "report", "saving, printing, convergence.png"), (Run, "close", "convergence.gif")]


def shares(sizes):
    """`python train.py --iters 3` with its functions under a clock."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, check=True)
    start = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        config, clock = train.Config(**{"iters": 3, "device": "cpu", "out": out} | sizes), Clock()
        for owner, name, purpose in PURPOSES:
            stack.enter_context(patch.object(owner, name,
                                             clock.timed(purpose, getattr(owner, name))))
        stack.enter_context(redirect_stdout(io.StringIO()))
        train.main(config)
        clock.note()
    total = clock.wall.total() + start
    head(f"python train.py --iters {config.iters} --threads {config.threads}", "wall s", "share",
         "CPU s")
    for name, seconds in (clock.wall + Counter({"start and imports": start})).most_common():
        cpu = f"{clock.cpu[name]:.2f}" if name in clock.cpu else ""
        row(name, f"{seconds:.2f}", f"{seconds / total:.1%}", cpu)
    row("all", f"{total:.2f}", "100%", f"{clock.cpu.total():.2f}")


# --- the run -------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, but peers only "
                        "where transformers and trl are installed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round; its figures "
                        "mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the figure")
    return parser.parse_args()


def main(args) -> None:
    torch.set_num_threads(1)
    parts, began = args.parts, time.time()
    installed = all(importlib.util.find_spec(name) for name in ("transformers", "trl"))
    if parts and "peers" in parts and not installed:
        sys.exit("bench/train.py: --parts peers: install transformers and trl first (see --help)")
    parts = parts or [part for part in PARTS if part != "peers" or installed]
    print(f"{machine()}, torch {torch.__version__}, one thread, float32")
    if "steps" in parts:
        step_table(material(args.quick), args.quick)
    if "peers" in parts:
        from bench.peers import peer_tables
        peer_tables(args.quick)
    if "growth" in parts:
        growth(args.quick, args.out)
    if "shares" in parts:
        shares(TINY | {"iters": 1} if args.quick else {})
    print(f"\n{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main(parse_args())
