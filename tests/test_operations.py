"""How many operations a training step dispatches at the default sizes, and how often it waits.

The counter is tests/bench/operations.py; here it is tried on operations counted by hand first.
"""
import pytest
import torch

from bench.operations import OperationCounter, operations_of_a_step

BEFORE = {"spin": 1042, "sft": 986}  # at commit c002988, which also waited about 29 times


def test_counter_counts_operations_but_no_views():
    x = torch.ones(3, 4)
    with OperationCounter() as counter:
        y = x @ x.T  # mm, and a view
        y = (y + 1)[0].view(3, 1)  # add, and two views
        y.exp_().expand(3, 2)[:, None].softmax(0)  # exp_, two views, softmax
    assert dict(counter.operations) == {"aten::mm": 1, "aten::add.Tensor": 1, "aten::exp_": 1,
                                        "aten::_softmax": 1}
    assert not counter.waits


def test_counter_sees_every_way_to_wait():
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: int(x[0]), lambda: x[mask],
                 lambda: mask.nonzero(), lambda: x.sum().tolist(), lambda: float(x.max()),
                 lambda: torch.where(mask), lambda: x.masked_select(mask), lambda: x.unique(),
                 lambda: torch.equal(x, x), lambda: x.tolist(), lambda: x.cpu(),
                 lambda: x.numpy()):
        with OperationCounter() as counter:
            wait()
        assert counter.waits.total() >= 1
    with OperationCounter() as counter:
        x[torch.tensor([2, 0, 1])].masked_fill(x > 0, 1.0).index_select(0, torch.tensor([1]))
        x.index_add(0, torch.tensor([1]), x[:1])
    assert not counter.waits


@pytest.mark.parametrize("method, most", [("spin", 300), ("sft", 280)])
def test_a_step_takes_few_operations_and_waits_once(method, most):
    """One whole step of `train.fit` on the committed world, averaging included."""
    operations, waits = operations_of_a_step(method)
    assert operations["aten::_fused_adam_"] == 1 and operations.total() > 100, "a whole step"
    assert operations.total() <= most, f"{operations.total()}: {operations.most_common(12)}"
    assert operations.total() < BEFORE[method] / 3
    assert waits.total() <= 1, f"besides the check of the gradient's norm: {dict(waits)}"
