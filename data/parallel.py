"""Several processes, one run: `torchrun --nproc_per_node=2 train.py` (plain torch.distributed).

Each process answers its share of the prompts and computes the gradient of its share of a batch;
process 0 alone prints and writes. Without torchrun there is one process, and nothing here acts.
"""
import os
import sys

import torch
import torch.distributed as dist

from data.reader import InputError


def start(device: str) -> str:
    """Join the processes that torchrun started, if it did. Returns the device of this one."""
    if "RANK" not in os.environ:
        return device
    if device == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"torchrun started more processes than the {gpus} GPUs of this "
                             f"machine; lower --nproc_per_node, or use --device cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def leave(status: int):
    """End this process, among several without Python's cleaning up: gloo's threads may abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def by_the_first(work):
    """Let process 0 alone do `work()`; returns its result in all of them.

    What process 0 cannot do ends them all: it raises the InputError, the others just leave.
    """
    if ranks() == 1:
        return work()
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except InputError as caught:
            error = caught
    told = [result, error]
    dist.broadcast_object_list(told)
    if error or told[1]:
        raise error or SystemExit(2)
    return told[0]


def gather(part: dict) -> dict:
    """The union of every process's dict, in all of them."""
    parts = [part] * ranks()
    if ranks() > 1:
        dist.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


def largest(number: int) -> int:
    """The largest of the processes' numbers, in all of them: how they agree on what to do."""
    if ranks() == 1:
        return number
    number = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def add_gradients(model):
    """Let each gradient be the sum over processes."""
    for p in model.parameters() if ranks() > 1 else ():
        dist.all_reduce(p.grad)
