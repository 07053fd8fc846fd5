"""One step of training: processor time, tensor operations, waits for a device.

    python tests/bench/step.py            SFT and iterations 1, 2, 3 of a default run (2 minutes)
    python tests/bench/step.py --quick    tiny sizes: does it still run?

A step is everything from one batch to the next: building it, the objective, the backward pass,
clipping, the optimiser and the learning-rate schedule. A wait makes Python stand still until the
device has caught up; tests/pretend_gpu.py counts them without a GPU.

Reading order: `Stage` → `stages` → `fit` → what a step costs → `main`.
"""
import copy
import io
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402  (the line above makes what follows importable)

import train  # noqa: E402
from bench.measure import OperationCounter, head, in_turns, machine, row, show  # noqa: E402
from data.responses import Responses, sft_responses  # noqa: E402
from data.run.files import load_policy  # noqa: E402
from data.run.options import prepare  # noqa: E402
from data.world import World  # noqa: E402
from model import GPT  # noqa: E402
from pretend_gpu import PretendGPU  # noqa: E402

QUICK = dict(n_layer=1, n_embd=32, sft_samples=16, negatives=4, batch_size=32, sft_steps=20,
             sft_lr=1e-2, steps=10, reports=1)


@dataclass
class Stage:
    """What the training of p_t starts from: SFT for t = 0, else against p_{t−1}."""
    t: int
    config: train.Config
    world: World
    policy: GPT
    responses: Responses


def stages(iters=3, **settings) -> list[Stage]:
    """Run `python train.py`, and take its policies: the stages 0 (SFT) to iters."""
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()):
        config = train.Config(**{"device": "cpu", "out": out, "iters": iters - 1} | settings)
        train.main(config)
        policies = [load_policy(Path(out) / f"iteration_{t}.pt")[0] for t in range(iters)]
        world, _ = prepare(config)
        found = [Stage(0, config, world, train.new_policy(world, config), sft_responses(world))]
        for t, opponent in enumerate(policies):
            run = SimpleNamespace(config=config, world=world)
            found.append(Stage(t + 1, config, world, opponent, train.self_play(opponent, t, run)))
    return found


def fit(stage, steps, after_step, device="cpu"):
    """`train.fit` itself for some steps: nothing is saved, and after_step() follows each."""
    config = replace(stage.config, steps=steps, sft_steps=steps)
    run = SimpleNamespace(config=config, world=stage.world, device=device,
                          restore=lambda learner: 0, report=lambda *_: after_step())
    objective = train.OBJECTIVES[config.method if stage.t else "sft"]
    policy = copy.deepcopy(stage.policy).to(device)
    with patch.object(train, "show_responses", lambda *_: None):
        return train.fit(policy, objective, stage.responses, stage.t, run)


# --- what a step costs ---------------------------------------------------------------------------

def step_seconds(stage, steps=14, first=2) -> float:
    """Mean processor seconds of a step; the first ones are left out."""
    times = []
    fit(stage, steps, lambda: times.append(time.process_time()))
    return (times[-1] - times[first]) / (len(times) - 1 - first)


def step_operations(stage, device="cpu") -> Counter:
    """Tensor operations of one step by name: the third, when Adam has set up what it keeps."""
    with OperationCounter() as counter:
        return after_third_step(stage, counter.operations, device)


def step_waits(stage) -> Counter:
    """How often which function would wait for a GPU, in one step."""
    with PretendGPU() as gpu:
        return after_third_step(stage, gpu.waits, "cuda")


def after_third_step(stage, counts, device) -> Counter:
    """What the third step adds to some counts."""
    found = []
    fit(stage, 3, lambda: found.append(counts.copy()), device)
    return found[2] - found[1]


def places_of_a_step(stage) -> tuple[float, float]:
    """Means over steps: response tokens to score, and the places in rows that are read for them."""
    tokens, places = 0, 0
    batches = train.prompt_batches(stage.world.splits["train"], 20, stage.config, stage.t)
    for prompts in batches:
        for part in stage.responses.parts(prompts):
            tokens += sum(len(rows.target_S) for rows in part.pieces)
            places += sum(rows.token_RT.numel() for rows in part.pieces)
    return tokens / len(batches), places / len(batches)


def main(quick):
    torch.set_num_threads(1)
    print(f"{machine()}, one thread; default settings of train.py")
    head("a step of", "response tokens", "places read", "CPU ms", "operations", "waits")
    found = stages(1, **QUICK) if quick else stages()
    names = {f"iteration {stage.t}" if stage.t else "SFT": stage for stage in found}
    seconds = in_turns({name: lambda stage=stage: step_seconds(stage)
                        for name, stage in names.items()}, 1 if quick else 9)
    for name, stage in names.items():
        tokens, places = places_of_a_step(stage)
        row(name, show(tokens), show(places), show(1e3 * seconds[name]),
            step_operations(stage).total(), step_waits(stage).total())


if __name__ == "__main__":
    main("--quick" in sys.argv)
