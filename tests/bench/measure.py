"""How the benchmarks measure: processor time, tensor operations, peak memory, one line a result.

The clock is processor time of one thread, which other programs disturb little. What is compared
takes turns in one process, so that both meet the same machine; a figure is the median over turns.
"""
import gc
import platform
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MB = 1e6


def machine() -> str:
    """Processor, torch."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text("utf-8")) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, torch {torch.__version__}"


def cpu_seconds(run) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def seconds(run, device) -> float:
    """Processor seconds of one call on a CPU; on a GPU the seconds until it is done."""
    if device == "cpu":
        return cpu_seconds(run)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(contenders, rounds) -> dict[str, float]:
    """The median over rounds of what each contender returns; the first round does not count."""
    found = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            found[name].append(run())
    return {name: statistics.median(values[1:]) for name, values in found.items()}


class OperationCounter(TorchDispatchMode):
    """Counts by name what is dispatched inside `with OperationCounter() as counter:`.

    A model this small spends its time on starting operations, not inside them. Views move no data
    and are not counted.
    """
    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.operations[func.name()] += 1
        return func(*args, **(kwargs or {}))


def resident(key) -> int:
    """VmRSS (memory now) or VmHWM (the most since the last reset) of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_memory(run, device) -> float:
    """Bytes that a call needs at its worst moment, beyond what is allocated before it.

    On a CPU this is the process's resident memory, so Linux only.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
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
