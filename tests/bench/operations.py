"""How many tensor operations one training step dispatches, and how often it waits for the device.

A model this small spends its time on starting operations, not inside them: on a GPU each is a
kernel launch, on a CPU each is a barrier between threads. Views move no data and are not counted.
A host synchronisation makes Python wait until the device has caught up: to read a number
(`.item()`, `bool(tensor)`) or a whole tensor (`.tolist()`), or because values decide a shape
(`nonzero`, a mask as an index). They are counted on a CPU too, where nothing has to wait.

    python tests/bench/operations.py

Reading order: `OperationCounter` → `waits_for_device` → `operations_of_a_step`.
"""
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402  (the line above makes it importable)
from data.responses import sft_responses  # noqa: E402
from data.tokenizer import load_encoding  # noqa: E402
from data.world import World, read_world  # noqa: E402

WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal",
         "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount",
         "aten::repeat_interleave")
READS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)  # never dispatched on a CPU


class OperationCounter(TorchDispatchMode):
    """Counts by name what is dispatched inside `with OperationCounter() as counter:`."""
    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), Counter()
        self.reads = Reads(self.waits)

    def __enter__(self):
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.operations[func.name()] += 1
        if waits_for_device(func, args):
            self.waits[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts the Python functions that copy a whole tensor to the host."""
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits_for_device(func, args) -> bool:
    """Whether Python cannot go on before the result of this operation is known.

    A mask as an index is one such case: how many elements it selects decides the result's shape.
    """
    name = func.name().split(".")[0]
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8)
                   for index in args[1])
    return name in WAITS


def operations_of_a_step(method="spin", **settings):
    """(operations, waits) of one whole step of `train.fit`, two Counters by name.

    The step is everything from one batch to the next: building it, the objective, the backward
    pass, clipping, the optimiser, the rate's schedule and the average. The step measured is the
    third, when the optimiser and the average have set up what they keep. method "sft" is the
    SFT stage; "spin" trains against a fresh model. `settings` are those of train.Config.
    """
    config = replace(train.Config(), **settings)
    # All steps are averaged and none is reported; the run is left as its fourth step begins.
    config = replace(config, method=method, steps=5, sft_steps=5, reports=1, average=1.0)
    world = World(read_world(config.data), load_encoding(config.encoding), config.sft_samples,
                  config.seed, config.block_size)
    run = SimpleNamespace(config=config, world=world, restore=lambda learner, steps: 0)
    player = train.new_player(world, config)
    responses = sft_responses(world) if method == "sft" else train.self_play(player, config, 0, run)
    counter, starts = OperationCounter(), []

    class Watched:
        """The responses, noting what has been counted whenever a step begins."""
        def batch(self, *args):
            starts.append((counter.operations.copy(), counter.waits.copy()))
            if len(starts) == 4:
                raise Enough
            return responses.batch(*args)

    with counter, suppress(Enough):
        train.fit(player, train.OBJECTIVES[method], Watched(), 0 if method == "sft" else 1, run)
    before, after = starts[2:]
    return after[0] - before[0], after[1] - before[1]


class Enough(Exception):
    """The step to be measured is over."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in ("sft", "spin"):
        operations, waits = operations_of_a_step(method)
        print(f"{method:>4}: {operations.total()} operations, {waits.total()} waits "
              f"({', '.join(f'{name} {n}' for name, n in waits.most_common()) or 'none'})")
        for name, n in operations.most_common(12):
            print(f"      {n:4} {name}")
