"""Several processes, one run: `torchrun --nproc_per_node=2 train.py` (plain torch.distributed).

Each process generates its share of the responses and computes the gradient of its share of a
batch; process 0 alone prints and writes. Without torchrun there is one process, and every function
here does nothing or the obvious. Where one process fails, torchrun ends the others.
"""
import os
import sys

import torch
import torch.distributed as dist

from data import InputError


def start(device: str) -> str:
    """Join the processes that torchrun started, if it did. Returns the device of this one.

    device is "auto", "cpu" or "cuda". Raises InputError where there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device auto or cpu")
    if not dist.is_torchelastic_launched():
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except (RuntimeError, ValueError) as error:
            names = [name for name in os.environ if name.startswith(("GLOO", "NCCL", "MASTER"))]
            raise InputError(f"torchrun's processes cannot reach each other; look at "
                             f"{', '.join(names)} ({str(error)[:100]})") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(item) -> list:
    """Every process's item, in all of them."""
    items = [item] * ranks()
    if ranks() > 1:
        dist.all_gather_object(items, item)
    return items


def add_gradients(model):
    """Let each gradient be the sum over processes."""
    if ranks() > 1:
        for p in model.parameters():
            dist.all_reduce(p.grad)
