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

def plain(value, what="your result"):
    """A tensor as nested lists of numbers. Raises Broken for anything else."""
    if not isinstance(value, torch.Tensor):
        kind = "nothing (None)" if value is None else f"of type {type(value).__name__}"
        raise Broken(f"{what} is {kind}; a torch.Tensor is expected")
    return value.detach().tolist()


def flat(values):
    return [x for v in values for x in flat(v)] if isinstance(values, (list, tuple)) else [values]


def shape_of(values):
    return [len(values), *shape_of(values[0] if values else 0)] if isinstance(
        values, (list, tuple)) else []


def alike(one, two, tolerance=1e-4):
    """Whether two nested lists have one shape and nearly the same numbers; NaN equals NaN."""
    return shape_of(one) == shape_of(two) and all(
        a == b or abs(a - b) <= tolerance * (1 + abs(b)) < math.inf or (a != a and b != b)
        for a, b in zip(flat(one), flat(two)))


def expect(got, right, mistakes=(), what="the result", tolerance=1e-4):
    """Raise Broken unless `got` is `right`; say which of the known mistakes gives its value.

    mistakes is {what is wrong: the value that it gives}. Values are numbers, lists or tensors.
    """
    number = lambda x: x if isinstance(x, (int, float, list, tuple)) else plain(x, what)
    got, right = number(got), number(right)
    if alike(got, right, tolerance):
        return
    for words, value in (dict(mistakes) | anywhere(right)).items():
        if not alike(number(value), right) and alike(got, number(value)):
            raise Broken(f"{words}{first_wrong(got, right)}")
    if shape_of(got) != shape_of(right):
        raise Broken(f"{what} has shape {shape_of(got)}, expected {shape_of(right)}")
    nan = any(x != x for x in flat(got)) and not any(x != x for x in flat(right))
    raise Broken(f"{what} is {'NaN in places' if nan else 'not right'}{first_wrong(got, right)}")


def anywhere(right) -> dict:
    """Mistakes that any list of numbers may suffer, in the form of `expect`."""
    numbers = flat(right)
    if any(isinstance(x, bool) or not abs(x) < 700 for x in numbers):
        return {}
    each = lambda f, x=right: [each(f, y) for y in x] if isinstance(x, list) else f(x)
    found = {"the sign is wrong": each(lambda x: -x),
             "this is a probability; its logarithm is asked for": each(math.exp),
             "this is in bits; nats are asked for": each(lambda x: x / math.log(2))}
    if len(numbers) > 1:
        found |= {"this is one number, a sum; one for each is asked for": sum(numbers),
                  "this is one number, a mean; one for each is asked for":
                      sum(numbers) / len(numbers)}
    return found


def first_wrong(got, right) -> str:
    """The first number that is wrong, beside what it should be."""
    if shape_of(got) != shape_of(right):
        return f" (shape {shape_of(got)}, expected {shape_of(right)})"
    pairs = list(zip(flat(got), flat(right)))
    i = next(i for i, pair in enumerate(pairs) if not alike(*pair))
    at = f", number {i + 1} of {len(pairs)}" if len(pairs) > 1 else ""
    return f" ({pairs[i][0]:.5g}, expected {pairs[i][1]:.5g}{at})"


def require(holds, words):
    """Raise Broken with these words unless something holds."""
    if not holds:
        raise Broken(words)


def gradients(value, *sources):
    """The gradients of a result's sum. Raises Broken where a source is not on its graph."""
    plain(value)
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
