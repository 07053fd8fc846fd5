"""What the claims stand on: how a module is tried, how values are compared and mistakes are named.

A claim is a function of claims_*.py about one function of the product. It is given a module that
holds an implementation, tries it, and raises `Broken` with a diagnosis where the claim does not
hold. Its name is what a student reads, and with `test_` before it a test of the suite. What is
right is told by enumeration, by sums over plain numbers or by torch's own functions.

Reading order: `claim`, `load` → random inputs → `expect` and its kin.
"""
import math
import random
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = {}  # {(file, function): [its claims]}
SEED = ["0"]  # of the random inputs; a grading chooses another


class Broken(AssertionError):
    """A claim does not hold; the message is the diagnosis, in one line."""


def claim(file, function):
    """Register a claim about a function, such as "Attention.forward" of "model.py"."""
    def keep(body):
        body.file, body.function = file, function
        CLAIMS.setdefault((file, function), []).append(body)
        return body
    return keep


def load(file, text=None):
    """A fresh module with the text of a file of the product, so that a claim may change it."""
    module = types.ModuleType(f"tried_{Path(file).stem}")
    module.__file__ = file
    text = (ROOT / file).read_text("utf-8") if text is None else text
    exec(compile(text, file, "exec"), vars(module))
    return module


# --- inputs --------------------------------------------------------------------------------------

def dice(salt) -> random.Random:
    """Random numbers of one claim; they differ from grading to grading, not within one."""
    return random.Random(f"{SEED[0]} {salt}")


def table(rng, *shape, low=-1.0, high=1.0, grad=False):
    """A float64 tensor of random numbers."""
    numbers = [rng.uniform(low, high) for _ in range(math.prod(shape))]
    return torch.tensor(numbers, dtype=torch.float64).view(shape).requires_grad_(grad)


def shares(rng, *shape):
    """Random probabilities that sum to 1 over the last axis, none of them tiny."""
    weight = table(rng, *shape, low=0.1)
    return weight / weight.sum(-1, keepdim=True)


# --- comparing -----------------------------------------------------------------------------------

def require_tensor(value, what="your result"):
    """Raise Broken unless it is one."""
    kind = "nothing (None)" if value is None else f"of type {type(value).__name__}"
    require(torch.is_tensor(value), f"{what} is {kind}; a torch.Tensor is expected")


def numbers(value, what="the result") -> torch.Tensor:
    """A number, lists of numbers or a tensor as float64. Raises Broken for anything else."""
    if isinstance(value, (int, float, list, tuple)):
        return torch.tensor(value, dtype=torch.float64)
    require_tensor(value, what)
    return value.detach().double()


def close(one, two):
    """Which numbers of two tensors of one shape are nearly the same; NaN equals NaN."""
    return torch.isclose(one, two, rtol=1e-4, atol=1e-4, equal_nan=True)


def alike(one, two) -> bool:
    """Whether two results have one shape and nearly the same numbers."""
    one, two = numbers(one), numbers(two)
    return one.shape == two.shape and bool(close(one, two).all())


def expect(got, right, mistakes=(), what="the result"):
    """Raise Broken unless `got` is `right`; say which of the known mistakes gives its value.

    mistakes is {what is wrong: the value that it gives}. Values are numbers, lists or tensors.
    """
    got, right = numbers(got, what), numbers(right)
    if alike(got, right):
        return
    for words, value in (dict(mistakes) | anywhere(right)).items():
        if not alike(value, right) and alike(got, value):
            raise Broken(f"{words}{first_wrong(got, right)}")
    if got.shape != right.shape:
        raise Broken(f"{what} has shape {list(got.shape)}, expected {list(right.shape)}")
    nan = got.isnan().any() and not right.isnan().any()
    raise Broken(f"{what} is {'NaN in places' if nan else 'not right'}{first_wrong(got, right)}")


def anywhere(right) -> dict:
    """Mistakes that any result may suffer, in the form of `expect`."""
    found = {"the sign is wrong": -right,
             "this is a probability; its logarithm is asked for": right.exp(),
             "this is in bits; nats are asked for": right / math.log(2)}
    if right.numel() > 1:
        found |= {"this is one number, a sum; one for each is asked for": right.sum(),
                  "this is one number, a mean; one for each is asked for": right.mean()}
    return found


def first_wrong(got, right) -> str:
    """The first number that is wrong, beside what it should be."""
    if got.shape != right.shape:
        return f" (shape {list(got.shape)}, expected {list(right.shape)})"
    i = int((~close(got, right)).flatten().nonzero()[0])
    at = f", number {i + 1} of {right.numel()}" if right.numel() > 1 else ""
    return f" ({got.flatten()[i]:.5g}, expected {right.flatten()[i]:.5g}{at})"


def require(holds, words):
    """Raise Broken with these words unless something holds."""
    if not holds:
        raise Broken(words)


def gradients(value, *sources):
    """The gradients of a result's sum. Raises Broken where a source is not on its graph."""
    require_tensor(value)
    found = [None]
    if value.requires_grad:
        found = torch.autograd.grad(value.sum(), sources, allow_unused=True)
    require(not any(gradient is None for gradient in found), "no gradient flows through your "
            "result, or through a part of it: that was detached, or made anew from numbers")
    return found


def require_gradient(value, *sources):
    """The same, and none of them may be 0 everywhere."""
    found = gradients(value, *sources)
    require(all(map(torch.any, found)), "the gradient of your result is 0, as if it did not depend "
            "on what should learn")
    return found


def require_value_error(call, name, words):
    """`call` must raise ValueError, with `name` in its message."""
    try:
        call()
    except ValueError as error:
        require(name in str(error), f"the ValueError's message should contain {name!r}")
    except Exception as error:
        raise Broken(f"{words}; yours ends in {type(error).__name__}") from None
    else:
        raise Broken(words)
