"""The stages of a run, and single steps of them, today's and those of commit c002988.

Reading order: `Stage` → `material` → `fit_now`, `fit_before` → what a step costs.
"""
import copy
import io
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train  # noqa: E402  (the line above makes what follows importable)
from bench import baseline  # noqa: E402
from bench.operations import OperationCounter  # noqa: E402
from data.responses import Responses, sft_responses  # noqa: E402
from data.run.checkpoint import load_policy  # noqa: E402
from data.run.prepare import load_world  # noqa: E402
from data.tokenizer import load_encoding  # noqa: E402
from data.world import World  # noqa: E402
from model import GPT  # noqa: E402

TINY = dict(n_layer=1, n_embd=32, sft_samples=16, negatives=4, batch_size=32, sft_steps=20,
            sft_lr=1e-2, steps=10, reports=1)


# --- what is measured: the four stages of a run --------------------------------------------------

@dataclass
class Stage:
    """What the training of p_t starts from: SFT for t = 0, else against p_{t−1}."""
    t: int
    config: train.Config
    world: World
    player: GPT
    responses: Responses

    @cached_property
    def table(self) -> baseline.Table:
        """The responses as the step of commit c002988 took them."""
        return baseline.table_of(self.world, self.responses)

    def run(self, steps):
        """Stands for data/run/checkpoint.py's Run: these settings, nothing saved."""
        config = replace(self.config, steps=steps, sft_steps=steps, reports=1)
        return SimpleNamespace(config=config, world=self.world,
                               restore=lambda learner, steps: 0)


def material(quick, iters=3, **settings) -> list[Stage]:
    """Run `python train.py` and take its world, its policies and their responses.

    Returns the stages 0 (SFT) to iters.
    """
    print("training the opponents with python train.py's settings …", flush=True)
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()):
        config = train.Config(device="cpu", out=out, iters=iters - 1,
                              **(TINY if quick else {}) | settings)
        train.main(config)
        policies = [load_policy(Path(out) / f"iteration_{t}.pt")[0] for t in range(iters)]
        world = load_world(config, load_encoding(config.encoding, config.pattern))
    stages = [Stage(0, config, world, train.new_player(world, config), sft_responses(world))]
    for t, opponent in enumerate(policies):
        responses = train.self_play(opponent, config, t, stages[0].run(1))
        stages.append(Stage(t + 1, config, world, opponent, responses))
    return stages


# --- steps ---------------------------------------------------------------------------------------

class Enough(Exception):
    """Ends the training before its last step, after which it would evaluate and report."""


def limited(steps, at_step):
    """at_step itself, but it raises Enough when it is called once more than `steps` times."""
    left = iter(range(steps))

    def counted():
        if next(left, None) is None:
            raise Enough
        at_step()
    return counted


class Watched:
    """Responses that call at_step() as each step takes its batch."""
    def __init__(self, responses, at_step):
        self.responses, self.at_step = responses, at_step

    def batch(self, *args):
        self.at_step()
        return self.responses.batch(*args)


def fit_now(stage, steps, at_step):
    """`train.fit` itself, for some steps. Returns the player, not averaged."""
    player, objective = copy.deepcopy(stage.player), train.OBJECTIVES["spin" if stage.t else "sft"]
    responses = Watched(stage.responses, limited(steps, at_step))
    with suppress(Enough):
        train.fit(player, objective, responses, stage.t, stage.run(steps + 1))
    return player


def fit_before(stage, steps, at_step):
    """The same number of steps of commit c002988, on the same prompts in the same order."""
    player, train_prompts = copy.deepcopy(stage.player), stage.world.splits["train"]
    with suppress(Enough):
        baseline.fit(player, stage.table, train_prompts, stage.run(steps + 1).config, stage.t,
                     limited(steps, at_step))
    return player


def step_seconds(fit, stage, steps=14, first=2) -> float:
    """Mean processor seconds of a step, from one batch to the next; the first ones left out."""
    times = []
    fit(stage, steps, lambda: times.append(time.process_time()))
    return (times[-1] - times[first]) / (len(times) - 1 - first)


def step_operations(fit, stage, steps=6, which=4) -> tuple[int, int]:
    """(tensor operations, waits for the device) of one step, in which weights are averaged."""
    starts, stage = [], replace(stage, config=replace(stage.config, average=1.0))
    with OperationCounter() as counter:
        fit(stage, steps, lambda: starts.append(
            (counter.operations.total(), counter.waits.total())))
    (operations, waits), (later_operations, later_waits) = starts[which:which + 2]
    return later_operations - operations, later_waits - waits


def prefixes_of_a_step(stage) -> tuple[float, float]:
    """Means over steps: response tokens to score, and distinct prefixes that they follow."""
    tokens, prefixes = [], []
    for prompts in train.prompt_batches(stage.world.splits["train"], 20, stage.config, stage.t):
        batch = stage.responses.trees.batch(prompts)
        tokens.append(len(batch.edge_L))
        prefixes.append(len(batch.scored_U))
    return statistics.mean(tokens), statistics.mean(prefixes)
