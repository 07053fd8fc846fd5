"""How the benchmarks measure: processor time, peak memory, the machine's name, one line a result.

The clock is processor time of one thread, which other programs disturb little. What is compared
takes turns in one process, so that both meet the same machine; a figure is the median over turns.
"""
import ctypes
import gc
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000"
ROOT = Path(__file__).resolve().parents[2]
MB = 1e6


def machine() -> str:
    """The name of the processor."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if "model name" in line:
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def cpu_seconds(run) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turns(contenders, rounds) -> dict[str, float]:
    """The median over rounds of what each contender returns; the first round does not count.

    contenders: {name: function}. Says how far it is on standard error.
    """
    found = {name: [] for name in contenders}
    for k in range(rounds + 1):
        for name, run in contenders.items():
            found[name].append(run())
        print(f"\r  round {k + 1} of {rounds + 1} ", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 24 + "\r", end="", file=sys.stderr, flush=True)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def resident(key) -> int:
    """VmRSS (memory now) or VmHWM (the most since the last reset) of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_memory(run, device="cpu") -> float:
    """Bytes that a call needs at its worst moment, beyond what is allocated before it.

    On a CPU this is the process's resident memory, so Linux only.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory would hide what is used anew
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def row(*cells):
    """Print one row of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells):
    """Print a table's first row and the line under it."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


def show(x: float) -> str:
    """Three figures: 0.0123, 1.23, 123, 12,300."""
    return f"{x:.3g}" if x < 999.5 else f"{float(f'{x:.3g}'):,.0f}"
