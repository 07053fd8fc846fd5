"""The fused log-probs of spin_loss.py: the plain ones, without the table of logits.

The oracle is float64 autograd through log_softmax. What the backward pass does with blocks of any
width is among the claims.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import spin_loss

ROOT = Path(__file__).resolve().parents[1]


def example(U=7, D=5, V=11, N=9, scale=1.0, dtype=torch.float32):
    """Random h, W, targets, the state of each target, and an upstream gradient of both signs."""
    rng = torch.Generator().manual_seed(0)
    h, W, g = (torch.randn(*size, generator=rng) for size in ((U, D), (V, D), (N,)))
    y, row = torch.randint(V, (N,), generator=rng), torch.randint(U, (N,), generator=rng)
    return (scale * h).to(dtype), W.to(dtype), y, row, g.to(dtype)


def computed(case, impl="fused", m=spin_loss):
    """log p, ∂L/∂h and ∂L/∂W."""
    h, W = (x.detach().requires_grad_() for x in case[:2])
    logp_N = m.token_logps(h, W, case[2], impl, case[3])
    logp_N.backward(case[4])
    return logp_N.detach(), h.grad, W.grad


def by_autograd(case):
    """The same three in float64, by log_softmax."""
    h, W = (x.detach().double().requires_grad_() for x in case[:2])
    logp_N = (h @ W.T).log_softmax(1)[case[3], case[2]]
    logp_N.backward(case[4].double())
    return logp_N.detach(), h.grad, W.grad


def assert_all_close(got, right, rtol=1e-5, atol=1e-6):
    for a, b, name in zip(got, right, ("log p", "∂L/∂hidden", "∂L/∂weight"), strict=True):
        assert_close(a.double(), b.double(), rtol=rtol, atol=atol,
                     msg=lambda text: f"{name} differs from the plain way: {text}")


@pytest.fixture
def columns(monkeypatch):
    """columns(C): from now on a block has C columns, and its pointwise work is not compiled."""
    def set_columns(C):
        monkeypatch.setattr(spin_loss, "BLOCK_LOGITS", {"cpu": 0})
        monkeypatch.setattr(spin_loss, "LEAST_COLUMNS", C)
        monkeypatch.setattr(spin_loss, "compiled", lambda body, device: body)
    return set_columns


def test_fused_and_plain_logprobs_agree_in_value_and_gradient(m=spin_loss):
    """With the sizes in use, two blocks, and several targets for one state; and beside float64."""
    case = example(U=300, D=16, V=6000, N=400)
    assert 3000 < m.BLOCK_LOGITS["cpu"] // 300 < 6000
    assert_all_close(computed(case, m=m), computed(case, "eager", m), rtol=1e-4, atol=1e-5)
    assert_all_close(computed(example(), "eager", m), by_autograd(example()))


def test_logits_of_ten_thousand_keep_their_digits(columns):
    columns(4)
    assert_all_close(computed(example(scale=1e4)), by_autograd(example(scale=1e4)), rtol=1e-4)


class Largest(TorchDispatchMode):
    """While it is entered: the most elements that any tensor has which torch makes."""
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.untyped_storage().nbytes() // 4)
        return made


def test_fused_never_makes_the_table_of_logits(columns):
    """Forward and backward; nothing larger than the weight matrix, an eighth of the table here."""
    columns(512)
    for impl, expected in (("fused", 1 / 8), ("eager", 1)):
        with Largest() as largest:
            computed(example(U=256, D=32, V=4096, N=300), impl)
        assert largest.elements == expected * 256 * 4096, (impl, largest.elements)


def test_without_a_compiler_a_warning_and_the_same_numbers(tmp_path):
    script = ("import torch; from spin_loss import token_logps as f\n"
              "h, W = torch.eye(3, requires_grad=True), torch.eye(3)\n"
              "for _ in range(3): f(h, W, torch.arange(3), 'fused').sum().backward()\n"
              "print(f(h, W, torch.arange(3), 'fused').tolist())")
    env = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, text=True,
                          capture_output=True, check=True)
    assert done.stderr.count("uncompiled: torch.compile met InductorError") == 2, done.stderr
    assert json.loads(done.stdout) == pytest.approx([1 - math.log(math.e + 2)] * 3)


def test_running_out_of_memory_is_not_mistaken_for_a_missing_compiler(monkeypatch, recwarn):
    """Neither in the trial, nor later in the caller's own work."""
    for good_calls in (0, 1):
        calls = []

        def fast(*args):
            calls.append(args)
            if len(calls) > good_calls:
                raise torch.OutOfMemoryError("no memory left")
            return spin_loss.join_block(*args)
        monkeypatch.setattr(torch, "compile", lambda body, dynamic: fast)
        spin_loss.compiled.cache_clear()
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            computed(example())
    spin_loss.compiled.cache_clear()
    assert not [w for w in recwarn if "uncompiled" in str(w.message)]


def test_a_new_number_of_tokens_compiles_nothing_new():
    from torch._dynamo.utils import counters
    for U in (50, 51):
        computed(example(U=U, V=20))
    counters.clear()
    for U in (2, 30, 77, 300):
        computed(example(U=U, V=20))
    assert counters["stats"].get("unique_graphs", 0) == 0
