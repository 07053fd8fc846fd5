"""How many tensor operations a training step takes at the default sizes, and how often it waits.

tests/bench/step.py counts them; its counter is tried on operations counted by hand first.
"""
from types import SimpleNamespace

import pytest
import torch

import train
from bench.measure import OperationCounter
from bench.step import Stage, step_operations, step_waits
from data.responses import sft_responses
from data.run.options import prepare


def test_counter_counts_operations_but_no_views():
    x = torch.ones(3, 4)
    with OperationCounter() as counter:
        y = x @ x.T  # mm, and a view
        y = (y + 1)[0].view(3, 1)  # add, and two views
        y.exp_().expand(3, 2)[:, None].softmax(0)  # exp_, two views, softmax
    assert dict(counter.operations) == {"aten::mm": 1, "aten::add.Tensor": 1, "aten::exp_": 1,
                                        "aten::_softmax": 1}


@pytest.fixture(scope="module", params=[0, 1], ids=["sft", "spin"])
def stage(request):
    """A stage at the default sizes, against a fresh model."""
    config = train.Config(device="cpu", sft_samples=64, negatives=2, batch_size=128)
    world, _ = prepare(config)
    policy, run = train.new_policy(world, config), SimpleNamespace(config=config, world=world)
    responses = train.self_play(policy, 0, run) if request.param else sft_responses(world)
    return Stage(request.param, config, world, policy, responses)


def test_a_part_of_a_step_takes_few_operations(stage):
    """A step reads its prompts in a few parts, and each takes about 200 operations."""
    operations = step_operations(stage)
    parts = [len(list(stage.responses.parts(prompts))) for prompts in train.prompt_batches(
        stage.world.splits["train"], 3, stage.config, stage.t)][2]
    assert operations["aten::_fused_adam_"] == 1 and operations.total() > 100, "a whole step"
    most = 100 + 200 * parts
    assert operations.total() <= most, f"{operations.total()}: {operations.most_common(12)}"


def test_a_step_waits_once(stage):
    assert step_waits(stage).total() <= 1
