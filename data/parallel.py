"""Several processes, one run: `torchrun --nproc_per_node=2 train.py` (torch.distributed as it comes).

Each process answers its share of the prompts and computes the gradient of its share of a batch;
process 0 alone prints and writes. Without torchrun there is one process, and nothing here acts.
"""
import os
import sys

import torch
import torch.distributed as dist


def start(device: str) -> str:
    """Join the processes that torchrun started, if it did. Returns the device of this one."""
    if "RANK" not in os.environ:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def by_the_first(work):
    """Let process 0 alone do `work()`; returns its result in all of them."""
    result = [work() if rank() == 0 else None]
    if ranks() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def gather(part: dict) -> dict:
    """The union of every process's dict, in all of them."""
    parts = [part] * ranks()
    if ranks() > 1:
        dist.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


def add_gradients(model):
    """Let each gradient be the sum over processes."""
    for p in model.parameters() if ranks() > 1 else ():
        dist.all_reduce(p.grad)
