"""Where the wall time of `python train.py --iters 3` goes; a part of tests/bench_train.py.

The functions of train.py run under a clock that counts what each takes itself, without what it
calls of the others. Start and imports come from a process of their own. On a machine that other
programs use, two threads wait for each other and wall time says little: there, set
OMP_NUM_THREADS=1 and read the processor seconds.
"""
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch

import train


class Clock:
    """Wall and processor seconds by purpose; what one calls of the others is theirs alone."""
    def __init__(self):
        self.seconds, self.cpu, self.stack = Counter(), Counter(), ["the rest"]
        self.mark = time.perf_counter(), time.process_time()

    def switch(self):
        now = time.perf_counter(), time.process_time()
        self.seconds[self.stack[-1]] += now[0] - self.mark[0]
        self.cpu[self.stack[-1]] += now[1] - self.mark[1]
        self.mark = now

    def wrap(self, name, function):
        def timed(*args, **kwargs):
            self.switch()
            self.stack.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()
        return timed

    def wrap_steps(self, name, function):
        """The same for a generator, which works while it is asked for its next item."""
        def timed(*args):
            ask_next, done = self.wrap(name, next), object()
            yield from iter(lambda steps=function(*args): ask_next(steps, done), done)
        return timed


PURPOSES = {
    "fit": "training", "draw": "self-play: generation", "all_logps": "self-play: opponent's pass",
    "self_play": "self-play: tables", "evaluate": "evaluation", "draw_convergence": "figure",
    "draw_gif": "GIF", "save_checkpoint": "checkpoints", "show_answers": "answers shown",
    "prepare": "reading the world"}


def shares(sizes, threads, row):
    """`python train.py --iters 3`, its functions under a clock, with the threads it would use."""
    torch.set_num_threads(threads)
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", "import train"], cwd=Path(train.__file__).parent,
                   check=True)
    start, after = time.perf_counter() - start, os.times()
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        config = train.Config(out=out, **({"iters": 3} | sizes))
        clock = Clock()
        for name, purpose in PURPOSES.items():
            wrap = clock.wrap_steps if name == "fit" else clock.wrap
            stack.enter_context(patch.object(train, name, wrap(purpose, getattr(train, name))))
        stack.enter_context(patch.object(train.Rescue, "save", clock.wrap(
            "checkpoints", train.Rescue.save)))
        stack.enter_context(redirect_stdout(io.StringIO()))
        train.main(config)
        clock.switch()
    clock.seconds["start and imports"] = start
    clock.cpu["start and imports"] = sum(after[2:4]) - sum(before[2:4])  # of child processes
    total, cpu = clock.seconds.total(), clock.cpu.total()
    row(f"python train.py --iters {config.iters}, threads: {threads}", "wall s", "share", "CPU s",
        "share")
    row(*["---"] * 5)
    for name, seconds in clock.seconds.most_common():
        row(name, f"{seconds:.2f}", f"{seconds / total:.1%}", f"{clock.cpu[name]:.2f}",
            f"{clock.cpu[name] / cpu:.1%}")
    row("all", f"{total:.2f}", "100%", f"{cpu:.2f}", "100%")
    torch.set_num_threads(1)
