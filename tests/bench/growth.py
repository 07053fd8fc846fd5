"""How time and memory grow with the number of prompts, and with the responses to each prompt.

A part of tests/bench/train.py (`--parts growth`), which draws out/bench_growth.png.

prompts    The world again and again with a number before each prompt, so that all prompts are
           distinct: 400 to 50 000 of them, with 8 responses each.
responses  The default world, with 32 to 2048 responses to each prompt.

SFT makes p_0. Then come all things that an iteration does with all of its responses, and steps of
training; a step takes 32 prompts. Each size is measured in a process of its own: processor time of
one thread, and the most memory that the process held, above what it held after its imports.

Reading order: `measure`, one size → `growth`, all of them → `draw`.
"""
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402  (the line above makes what follows importable)

import train  # noqa: E402
from bench.measure import (BLACK, BLUE, GREEN, MB, ORANGE, PURPLE, head, resident,  # noqa: E402
                           row, show)
from bench.steps import Stage, fit_now, step_seconds  # noqa: E402
from data.metrics import evaluate  # noqa: E402
from data.responses import all_logps, self_play_responses, sft_responses  # noqa: E402
from data.run.prepare import load_world  # noqa: E402
from data.tokenizer import load_encoding  # noqa: E402
from data.world import read_world  # noqa: E402

SIZES = {"prompts": (400, 2_000, 10_000, 50_000), "responses": (32, 128, 512, 2_048)}
QUICK = {"prompts": (100, 200), "responses": (4, 8)}
PROMPTS_A_STEP = 32


# --- one size, in a process of its own -----------------------------------------------------------

class Laps:
    """Processor seconds between one call and the next, by name."""
    def __init__(self):
        self.seconds, self.last = Counter(), time.process_time()

    def __call__(self, name):
        now = time.process_time()
        self.seconds[name] += now - self.last
        self.last = now


def numbered_world(P, folder) -> str:
    """The file of a world of P prompts: the default rows, each prompt with a number before it."""
    path, rows = Path(folder) / "numbered.jsonl", read_world()
    with open(path, "w", encoding="utf-8") as file:
        for p in range(P):
            row = {key: rows[p % len(rows)][key] for key in ("family", "responses", "split")}
            file.write(json.dumps(row | {"prompt": f"{p}. {rows[p % len(rows)]['prompt']}"}) + "\n")
    return str(path)


def measure(kind, size, sft_steps) -> dict:
    """CPU seconds by name, the number of distinct prefixes, and the peak memory in bytes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = train.Config(device="cpu", out=folder, negatives=8 if kind == "prompts" else size)
        config = replace(config, batch_size=PROMPTS_A_STEP * config.negatives)
        if kind == "prompts":
            config = replace(config, data=numbered_world(size, folder))
        before, lap = resident("VmRSS"), Laps()
        world = load_world(config, load_encoding(config.encoding, config.pattern))
    stage = Stage(0, config, world, train.new_player(world, config), sft_responses(world))
    lap("the world and its trees")
    p_0 = fit_now(stage, sft_steps, lambda: None)
    lap("SFT")
    samples = train.sample_responses(p_0, world, config, 0)
    lap("sampling")

    def opponent_logps(trees):
        lap("prefix trees")
        logp_N = all_logps(p_0, trees)
        lap("the opponent's pass")
        return logp_N
    responses = self_play_responses(world, samples, None, opponent_logps)
    lap("prefix trees")  # what is left: the shares
    evaluate(p_0, responses, world, config, 1)
    lap("evaluation")
    lap.seconds["a step"] = step_seconds(fit_now, Stage(1, config, world, p_0, responses), 5)
    return {"seconds": lap.seconds, "prefixes": len(responses.trees.columns["token"]),
            "memory": resident("VmHWM") - before}


# --- all sizes -----------------------------------------------------------------------------------

def in_own_process(kind, size, quick) -> dict:
    command = [sys.executable, __file__, kind, str(size), "4" if quick else "240"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed: too little memory?"])[-1]
        raise SystemExit(f"bench/growth.py: {size} {kind}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def growth(quick, out):
    """Print a line for each size and draw the figure."""
    found = {}
    for kind, sizes in (QUICK if quick else SIZES).items():
        head(kind, "distinct prefixes", "peak memory, MB", "sampling, CPU s", "prefix trees",
             "the opponent's pass", "evaluation", "a step, CPU ms")
        found[kind] = []
        for size in sizes:
            one = in_own_process(kind, size, quick)
            found[kind].append((size, one))
            seconds = one["seconds"]
            row(f"{size:,}", f"{one['prefixes']:,}", show(one["memory"] / MB), *(
                show(seconds[name]) for name in CURVES), show(1e3 * seconds["a step"]))
        (_, one), (_, other) = found[kind][-2:]
        slope = lambda get: math.log(get(other) / get(one)) / math.log(
            other["prefixes"] / one["prefixes"])
        row("slope, log-log", "1", f"{slope(lambda x: x['memory']):.2f}", *(
            f"{slope(lambda x: x['seconds'][name]):.2f}" for name in [*CURVES, "a step"]))
    draw(found, Path(out))


# --- the figure ----------------------------------------------------------------------------------

CURVES = {"sampling": (BLUE, "o-"), "prefix trees": (ORANGE, "s--"),
          "the opponent's pass": (GREEN, "^:"), "evaluation": (PURPLE, "D-.")}


def draw(found, out):
    """Time on the left, memory on the right, against the number of distinct prefixes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(len(found), 2, figsize=(13, 5 * len(found)), squeeze=False,
                                layout="constrained")
    for (kind, results), (left, right) in zip(found.items(), axes):
        prefixes = [one["prefixes"] for _, one in results]
        for name, (colour, mark) in CURVES.items():
            left.plot(prefixes, [one["seconds"][name] for _, one in results], mark, color=colour,
                      label=name)
        memory = [one["memory"] / MB for _, one in results]
        right.plot(prefixes, memory, "o-", color=BLACK, label="most memory above imports")
        right.plot(prefixes, [memory[-1] * x / prefixes[-1] for x in prefixes], "-", color=GREEN,
                   alpha=0.4, lw=5, zorder=0, label="linear")
        left.set_ylabel("CPU seconds, one thread")
        right.set_ylabel("MB")
        for ax in (left, right):
            ax.set(xscale="log", yscale="log", title=f"{results[0][0]:,} to {results[-1][0]:,} "
                   + ("prompts" if kind == "prompts" else "responses to each prompt"),
                   xlabel="distinct prefixes of all responses")
            ax.grid(alpha=0.3)
            ax.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "bench_growth.png", dpi=80)
    plt.close(figure)
    print(f"{out / 'bench_growth.png'} drawn")


if __name__ == "__main__":  # one size; `growth` reads what this prints
    kind, size, sft_steps = sys.argv[1:]
    print(json.dumps(measure(kind, int(size), int(sft_steps))))
