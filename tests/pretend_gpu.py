"""A GPU rehearsed on a CPU: is each tensor where it should be, and how often would Python wait?

    with PretendGPU() as gpu:
        train.main(train.Config(device="cuda"))
    print(gpu.waits)  # how often which function would have waited for the GPU

Every tensor is an ordinary CPU tensor. Those "on the GPU" carry a mark on their storage, so that a
view has the mark of what it shows. This mode sees each torch function that Python calls, and
 - marks what it returns: as `device=`, `.to` and the like ask, else as its arguments are marked;
 - lets `Tensor.device` report the mark;
 - raises RuntimeError if a function meets tensors with and without the mark, as CUDA would. A CPU
   tensor without dimensions is a number, and may stand beside tensors on the GPU. (CUDA also lets
   a CPU tensor be an index, and waits for the copy; that is an error here.)
 - counts a wait where the host needs a value that the GPU still computes: to read it, to give a
   result its shape, or to copy memory that is not pinned.

It cannot show what no Python call does: kernels, compiled code, speed; and it does not look inside
a backward pass.

Reading order: `Generator` → `PretendGPU` → `asked_device`, `tensors_in`, `has_mask`.
"""
from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "__format__",
         "__repr__", "equal", "allclose", "is_nonzero"}
SHAPES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
          "repeat_interleave"}  # the values of their arguments decide the shape of the result
BETWEEN_DEVICES = {"to", "copy_", "__set__", "_has_compatible_shallow_copy_type"}


class Generator(torch.Generator):
    """A CPU's generator that says that it is on the device which was asked for."""
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.asked = torch.device(device)

    @property
    def device(self):
        return self.asked


GROUPED = torch._C._group_tensors_by_device_and_dtype


def grouped(tensors, with_indices=False):
    """What the optimiser and clipping sort tensors by; torch reads the device in C++, so unseen."""
    return {(list(tensors_in([group]))[0].device, dtype): group
            for (_, dtype), group in GROUPED(tensors, with_indices).items()}


class PretendGPU(TorchFunctionMode):
    """`waits` counts by name the functions that would have waited for the GPU."""
    def __init__(self):
        super().__init__()
        self.waits, self.patches = Counter(), ExitStack()

    def __enter__(self):
        for owner, name, value in [
                (torch.cuda, "is_available", lambda: True), (torch.cuda, "device_count", lambda: 1),
                (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "is_current_stream_capturing", lambda: False),
                (torch._C, "_group_tensors_by_device_and_dtype", grouped),
                (torch, "Generator", Generator)]:
            self.patches.enter_context(patch.object(owner, name, value))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.__name__
        tensors = list(tensors_in([args, kwargs]))
        marked = any(map(on_gpu, tensors))
        if name == "__get__" and func.__self__.__name__ in ("device", "is_cuda"):
            is_device = func.__self__.__name__ == "device"
            return torch.device("cuda", 0) if is_device and marked else marked or func(*args)
        if name == "pin_memory":
            pinned = args[0].clone()
            pinned.untyped_storage().pinned = True
            return pinned
        if name == "_parse_to":  # of `Module.to`, which then moves each tensor
            return func(*args, **kwargs)

        asked, args = asked_device(name, args, kwargs)
        self.check(name, tensors, marked, asked, kwargs)
        if self.must_wait(name, args, kwargs, tensors, marked, asked):
            self.waits[name] += 1
        found = func(*args, **kwargs)
        to_gpu = marked if asked is None else asked == "cuda"
        if name == "copy_":
            to_gpu = on_gpu(args[0])
        if asked and isinstance(found, torch.Tensor) and tensors and to_gpu != marked:
            found = found.clone()  # what has been moved shares nothing with what it was
        for tensor in tensors_in([found]):
            tensor.untyped_storage().on_gpu = to_gpu
        return found

    def check(self, name, tensors, marked, asked, kwargs):
        """Raise RuntimeError where CUDA would: tensors or a generator on two devices."""
        if marked and name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if marked and name not in BETWEEN_DEVICES and not all(
                on_gpu(x) or x.dim() == 0 for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found "
                               f"cuda:0 and cpu")
        generator = kwargs.get("generator")
        if generator is not None and (generator.device.type == "cuda") != (
                marked or asked == "cuda"):
            raise RuntimeError(f"{name}: the generator is on {generator.device}, the numbers not")

    @staticmethod
    def must_wait(name, args, kwargs, tensors, marked, asked) -> bool:
        """Whether Python cannot go on before the GPU has done what it was told so far."""
        if name in ("to", "copy_"):
            moves = asked not in (None, "cuda" if marked else "cpu") or (
                name == "copy_" and len({on_gpu(x) for x in tensors}) == 2)
            pinned = all(on_gpu(x) or is_pinned(x) for x in tensors)
            return moves and not (kwargs.get("non_blocking") and pinned and asked != "cpu")
        if name in ("tensor", "as_tensor"):  # from Python's own memory
            return asked == "cuda"
        return marked and (name in READS | SHAPES or (name == "where" and len(args) == 1)
                           or (name in ("__getitem__", "__setitem__") and has_mask(args[1])))


def on_gpu(tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def is_pinned(tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def asked_device(name, args, kwargs):
    """("cpu", "cuda" or None if no device is asked for, the arguments with "cpu" in its place)."""
    device = {"cpu": "cpu", "cuda": "cuda"}.get(name)
    if kwargs.get("device") is not None:
        device, kwargs["device"] = kwargs["device"], "cpu"
    if name == "to":
        is_device = lambda arg: isinstance(arg, (str, torch.device))
        device = next(filter(is_device, args), device)
        args = tuple("cpu" if is_device(arg) else arg for arg in args)
    return device if device is None else torch.device(device).type, args


def tensors_in(items):
    """All tensors in nested lists, tuples and dictionaries."""
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors_in(item)
        elif isinstance(item, dict):
            yield from tensors_in(item.values())


def has_mask(index) -> bool:
    """Whether an index holds a mask: how many elements it selects is known to the GPU alone."""
    return any(x.dtype in (torch.bool, torch.uint8) for x in tensors_in([index]))
