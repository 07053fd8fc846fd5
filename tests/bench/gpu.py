"""On a machine with a CUDA GPU: does everything work there, how fast, in how much memory?

    python tests/bench/gpu.py            one table, within 4 minutes
    python tests/bench/gpu.py --quick    tiny sizes: does it still run?

The main job runs on the GPU and on the CPU: kernels differ, so numbers do in their last digits, and
after some hundred steps the policies are as far apart as those of two seeds. Then a training step,
and log-probs at GPT-2's vocabulary. Without a GPU it says so. tests/pretend_gpu.py rehearses this
on a CPU.

Reading order: `main_job` → `step`, `waits` → `main`.
"""
import json
import os
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402  (the line above makes what follows importable)

import train  # noqa: E402
from bench.fused import measure  # noqa: E402
from bench.measure import MB, head, machine, row, show  # noqa: E402
from bench.step import QUICK, fit, stages, step_operations  # noqa: E402

GPU, CPU = "cuda", "cpu"


def last_kls(out) -> list[float]:
    """KL(p_data‖p_t) on train prompts for each t, of the run in a folder."""
    rows = map(json.loads, open(Path(out) / "metrics.jsonl", encoding="utf-8"))
    return [row["kl"] for row in rows if (row["event"], row["split"]) == ("iteration", "train")]


def main_job(device, settings):
    """(seconds, KL of each p_t, peak bytes on the GPU) of `python train.py`."""
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w", encoding="utf-8") as null:
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with redirect_stdout(null):
            train.main(train.Config(device=device, out=out, **settings))
        seconds = time.perf_counter() - began
        return seconds, last_kls(out), torch.cuda.max_memory_allocated()


def step(stage, device) -> float:
    """Seconds of a training step, from one to the next, all work done; the mean over ten."""
    times = []

    def note():
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    fit(stage, 14, note, device)
    return (times[-1] - times[3]) / 10


def waits(stage) -> int:
    """How often the GPU's driver says that Python waited, in one step."""
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        fit(stage, 3, lambda: found.append(len(said)), GPU)
        torch.cuda.set_sync_debug_mode("default")
    return found[2] - found[1]


def main(quick):
    if not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no GPU here, so there is nothing to measure")
        return
    settings, kls = QUICK if quick else {}, lambda found: ", ".join(f"{kl:.4f}" for kl in found)
    print(f"{torch.cuda.get_device_name()}; {machine()}, one thread")
    head("what", "GPU", "CPU")
    on = {device: main_job(device, settings) for device in (GPU, CPU)}
    row("main job, seconds", *(show(on[device][0]) for device in on))
    row("KL after SFT and each iteration", *(kls(on[device][1]) for device in on))
    row("peak memory, MB", show(on[GPU][2] / MB), "")
    for stage in stages(1, **settings):
        name = "SPIN" if stage.t else "SFT"
        row(f"a step of {name}, ms", *(show(1e3 * step(stage, device)) for device in on))
        row(f"a step of {name}, operations", *(step_operations(stage, device).total()
                                               for device in on))
        row(f"a step of {name}, waits", waits(stage), "")
    N, D, V = (64, 16, 4096) if quick else (2048, 384, 50257)
    for way in ("eager", "fused"):
        found = measure(way, N, D, V, GPU)
        row(f"log-probs {way}, N = {N}, D = {D}, V = {V:,}: ms, MB",
            f"{1e3 * found['seconds']:.2f}, {show(found['memory'] / MB)}", "")


if __name__ == "__main__":
    main("--quick" in sys.argv)
