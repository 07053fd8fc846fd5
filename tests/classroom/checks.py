"""What the claims of the exercises stand on: how values are compared, and mistakes are named.

A claim is a function of checks_model.py, checks_loss.py or checks_training.py. It takes the module
that holds the attempt, tries it, and raises `Broken` with a diagnosis where it does not hold. Its
name is what the student reads. What is right is told by loops over plain numbers, by enumeration
or by torch's own functions, never by this repository's code.

Values leave torch as plain numbers before they are compared, by functions that are bound here,
before the attempt is loaded: an attempt cannot compare in its own favour.
"""
import math
import random

import torch

torch.set_num_threads(1)
TOLIST = torch.Tensor.tolist
DETACH = torch.Tensor.detach
GRAD = torch.autograd.grad
KINDS = (torch.Tensor, torch.nn.Parameter)
CLAIMS = {}  # {function: {claim: what tries it}}
STAND_INS = {}  # {name: a stand-in for a function of another exercise}
SEED = 0


class Broken(Exception):
    """A claim does not hold; the message is the diagnosis, in one line."""


def claim(function):
    """Register a claim about one of exercises.toml's functions."""
    def keep(body):
        CLAIMS.setdefault(function, {})[body.__name__] = body
        return body
    return keep


def claims_of(function):
    from classroom import checks_loss, checks_model, checks_training  # noqa: F401 (they register)
    return CLAIMS[function]


def stand_in(body):
    STAND_INS[body.__name__] = body
    return body


def stand_ins(names):
    """What stands for these names; what no claim has a stand-in for does nothing."""
    return {name: STAND_INS.get(name, Quiet()) for name in names}


class Quiet:
    """Does nothing: may be called, entered, read and unpacked into two."""
    def __call__(self, *args, **how):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key):
        return self

    def __iter__(self):
        return iter((self, self))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def warm_up(seed):
    """Choose the random inputs, and make torch load what it loads late."""
    global SEED
    SEED = seed
    x = torch.ones(3, 3, requires_grad=True)
    (x @ x).softmax(1).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        x @ x


# --- inputs --------------------------------------------------------------------------------------

def dice(salt=0) -> random.Random:
    """Random numbers of one claim; they differ from grading to grading, not within one."""
    return random.Random(f"{SEED} {salt}")


def table(rng, *shape, low=-1.0, high=1.0):
    """Nested lists of random numbers."""
    if len(shape) == 1:
        return [rng.uniform(low, high) for _ in range(shape[0])]
    return [table(rng, *shape[1:], low=low, high=high) for _ in range(shape[0])]


def tensor(values, grad=False, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def log_shares(rng, K):
    """K random log-probabilities that sum to 1, none of them tiny."""
    weights = [rng.uniform(0.1, 1) for _ in range(K)]
    return [math.log(w / sum(weights)) for w in weights]


# --- comparing -----------------------------------------------------------------------------------

def plain(value, what="your result"):
    """A tensor as nested lists of numbers, and its shape. Raises Broken for anything else."""
    if type(value) not in KINDS:
        kind = "nothing (None)" if value is None else f"of type {type(value).__name__}"
        raise Broken(f"{what} is {kind}; a torch.Tensor is expected")
    return TOLIST(DETACH(value)), list(value.shape)


def flat(values):
    if isinstance(values, (list, tuple)):
        return [x for value in values for x in flat(value)]
    return [values]


def shape_of(values):
    return [len(values), *shape_of(values[0] if values else 0)] if isinstance(
        values, (list, tuple)) else []


def alike(one, two, tolerance):
    """Whether two nested lists have one shape and nearly the same numbers; NaN equals NaN."""
    if shape_of(one) != shape_of(two):
        return False
    return all(a == b or abs(a - b) <= tolerance * (1 + abs(b)) or (a != a and b != b)
               for a, b in zip(flat(one), flat(two)))


def number(x) -> str:
    return str(x) if isinstance(x, (bool, int, str)) else f"{x:.5g}"


def expect(got, right, mistakes=(), what="your result", tolerance=1e-4):
    """Raise Broken unless `got` is `right`; name the mistake whose value it is.

    `mistakes` are pairs (words, value), or a dictionary. Values are nested lists; that of `got`
    may be a tensor or numbers.
    """
    if not isinstance(got, (int, float, list, tuple)):
        got = plain(got, what)[0]
    if alike(got, right, tolerance):
        return
    for words, value in (mistakes.items() if isinstance(mistakes, dict) else mistakes):
        if not alike(value, right, tolerance) and alike(got, value, tolerance):
            raise Broken(f"{words}{sample(got, right)}")
    if shape_of(got) != shape_of(right):
        raise Broken(f"{what} has shape {shape_of(got)}, expected {shape_of(right)}")
    pairs = list(zip(flat(got), flat(right)))
    if any(isinstance(g, float) and math.isnan(g) for g, _ in pairs):
        raise Broken(f"{what} is NaN where it should be "
                     f"{number(next(r for g, r in pairs if math.isnan(g)))}")
    raise Broken(f"{what} is not right{sample(got, right)}")


def sample(got, right) -> str:
    """The first number that is wrong, beside what it should be."""
    if shape_of(got) != shape_of(right):
        return f": shape {shape_of(got)}, expected {shape_of(right)}"
    for i, (g, r) in enumerate(zip(flat(got), flat(right))):
        if not alike(g, r, 1e-4):
            at = f", number {i + 1} of {len(flat(right))}" if shape_of(right) else ""
            return f" ({number(g)}, expected {number(r)}{at})"
    return ""


def require(holds, words):
    """Raise Broken with these words unless something holds."""
    if not holds:
        raise Broken(words)


def require_gradient(value, *sources, words="no gradient flows through your result: it was "
                     "detached, or made anew from numbers"):
    """Each source must get a gradient that is not all 0. Returns the gradients."""
    plain(value)
    require(value.requires_grad, words)
    gradients = GRAD(value.sum(), sources, allow_unused=True)
    for gradient in gradients:
        require(gradient is not None and any(flat(TOLIST(gradient))), words)
    return gradients


def require_value_error(call, name, words):
    """`call` must raise ValueError, with `name` in its message where one is given."""
    try:
        call()
    except ValueError as error:
        require(name in str(error), f"the ValueError's message should contain {name!r}")
    else:
        raise Broken(words)
