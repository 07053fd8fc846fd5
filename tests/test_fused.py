"""The fused log-probs of spin_loss.py: the plain ones, without the table of logits.

The oracle is the definition written out in float64, one token and one column at a time, and its
gradients by hand; finite differences (gradcheck) judge the two gradients once more.
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

import spin_loss
import train
from conftest import known_mistake
from spin_loss import token_logps

ROOT = Path(__file__).resolve().parents[1]


def by_hand(h_ND, W_VD, y_N, g_N):
    """log p, dL/dh and dL/dW for L = Σ g_n log p_n; float64, exact to about 1e-15."""
    h, W = h_ND.detach().double(), W_VD.detach().double()
    logp, dh, dW = [], torch.zeros_like(h), torch.zeros_like(W)
    for n, (y, g) in enumerate(zip(y_N.tolist(), g_N.double().tolist())):
        logits = [(h[n] * w).sum().item() for w in W]
        top = max(logits)
        log_total = math.log(math.fsum(math.exp(z - top) for z in logits))
        logp.append((logits[y] - top) - log_total)
        for v, z in enumerate(logits):
            slope = g * ((v == y) - math.exp(z - top - log_total))
            dh[n] += slope * W[v]
            dW[v] += slope * h[n]
    return torch.tensor(logp, dtype=torch.float64), dh, dW


def computed(h_ND, W_VD, y_N, g_N, impl="fused"):
    """The same three from token_logps."""
    h, W = h_ND.detach().requires_grad_(), W_VD.detach().requires_grad_()
    logp_N = token_logps(h, W, y_N, impl)
    logp_N.backward(g_N.to(logp_N.dtype))
    return logp_N.detach(), h.grad, W.grad


def example(N=7, D=5, V=11, scale=1.0, seed=0, dtype=torch.float32):
    """Random h, W, y, and an upstream gradient g of both signs."""
    rng = torch.Generator().manual_seed(seed)
    h, W, g = (torch.randn(*size, generator=rng) for size in ((N, D), (V, D), (N,)))
    return (scale * h).to(dtype), W.to(dtype), torch.randint(V, (N,), generator=rng), g


@pytest.fixture
def columns(monkeypatch):
    """columns(C): from now on a block has C columns, and its pointwise work is not compiled."""
    def set_columns(C):
        monkeypatch.setattr(spin_loss, "BLOCK_LOGITS", {"cpu": 0})
        monkeypatch.setattr(spin_loss, "LEAST_COLUMNS", C)
        monkeypatch.setattr(spin_loss, "compiled", lambda body, device: body)
    return set_columns


def assert_all_close(got, right, rtol=1e-5, atol=1e-6):
    for a, b in zip(got, right, strict=True):
        assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


# ---- The same numbers ---------------------------------------------------------------------------

@pytest.mark.parametrize("C", [1, 4, 11, 64])
def test_fused_value_and_both_gradients_match_the_definition(columns, C):
    columns(C)
    case = h, W, y, g = example()
    got, right = computed(*case), by_hand(*case)
    targets = [h.double() * 0, W.double() * 0]  # G = g 1[v = y] alone
    for n, v in enumerate(y.tolist()):
        targets[0][n] += g[n] * W[v]
        targets[1][v] += g[n] * h[n]
    ones = by_hand(h, W, y, torch.ones_like(g))
    for name, a, b, target, one in zip("hW", got[1:], right[1:], targets, ones[1:]):
        hint = known_mistake(a, {
            "the sign is turned round": -b, "grad_N is missing": one,
            "1[v = y] is missing": b - target,
            "the softmax is missing: only the target is pulled up": target,
            "nothing was added to the zeros": b * 0})
        right_here = torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)
        assert right_here, f"∂L/∂{name} is wrong{hint}"
    assert_all_close(got, right)


def test_plain_value_and_both_gradients_match_the_definition():
    case = example()
    assert_all_close(computed(*case, impl="eager"), by_hand(*case))


def test_fused_and_plain_logprobs_agree_in_value_and_gradient():
    case = example(N=300, D=16, V=6000)  # two blocks with the sizes in use
    assert 3000 < spin_loss.BLOCK_LOGITS["cpu"] // 300 < 6000
    assert_all_close(computed(*case), computed(*case, impl="eager"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("C", [2, 64])
def test_gradients_pass_finite_differences(columns, C):
    columns(C)
    h, W, y, _ = example(N=4, D=3, V=7, dtype=torch.float64)
    h.requires_grad_(), W.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, W: token_logps(h, W, y, "fused"), (h, W))


def test_block_size_changes_nothing(columns):
    case = example(N=9, V=50, dtype=torch.float64)
    columns(50)
    whole = computed(*case)
    for C in (1, 3, 7, 25, 49):
        columns(C)
        assert_all_close(computed(*case), whole, rtol=1e-12, atol=1e-13)


def test_order_of_the_vocabulary_changes_nothing(columns):
    columns(7)
    h, W, y, g = example(N=9, V=50, dtype=torch.float64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    logp, dh, dW = computed(h, W, y, g)
    assert_all_close(computed(h, W[order], order.argsort()[y], g), (logp, dh, dW[order]),
                     rtol=1e-12, atol=1e-13)


# ---- Edges --------------------------------------------------------------------------------------

def test_logits_of_ten_thousand_keep_their_digits(columns):
    columns(2)
    z = torch.tensor([1e4, 1e4 - 1, -1e4, 1e4 - 2, 0.0])
    W, h, y = z[:, None], torch.ones(5, 1), torch.arange(5)
    g = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    (logp, dh, dW), right = computed(h, W, y, g), by_hand(h, W, y, g)
    assert_all_close((logp, dW), (right[0], right[2]))
    assert_all_close([dh], [right[1]], atol=1e-2)  # sums of terms near 1e4


def test_equal_logits_share_the_probability(columns):
    columns(3)
    logp_N, dh, _ = computed(torch.zeros(4, 5), example()[1], torch.tensor([0, 3, 9, 10]),
                             torch.ones(4))
    assert_close(logp_N, torch.full((4,), -math.log(11)))
    assert_close(dh, example()[1][[0, 3, 9, 10]] - example()[1].mean(0), atol=1e-6, rtol=1e-5)


def test_the_only_token_has_probability_one():
    logp_N, dh, dW = computed(*example(V=1, scale=100))
    assert logp_N.eq(0).all() and dh.eq(0).all() and dW.eq(0).all()


def test_no_tokens_give_no_logprobs_and_zero_gradients():
    logp_N, dh, dW = computed(*example(N=0))
    assert logp_N.shape == (0,) and logp_N.dtype == torch.float32
    assert dh.shape == (0, 5) and dW.eq(0).all()


def test_strides_of_the_inputs_do_not_matter(columns):
    columns(4)
    h, W, y, g = example()
    strided = h.T.contiguous().T, W.T.contiguous().T, y.repeat_interleave(2)[::2], g
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    assert_all_close(computed(*strided), by_hand(h, W, y, g))


@pytest.mark.parametrize("C", [4, 64])
def test_either_input_may_need_no_gradient(columns, C):
    columns(C)
    h, W, y, g = example()
    _, dh, dW = by_hand(h, W, y, g)
    a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
    token_logps(a, W, y, "fused").backward(g)
    token_logps(h, b, y, "fused").backward(g)
    assert_all_close((a.grad, b.grad), (dh, dW))


def test_opponent_under_no_grad_stores_nothing(columns):
    columns(64)
    h, W, y, _ = example(V=4096, N=32)
    with torch.no_grad():
        logp_N = token_logps(h.requires_grad_(), W, y, "fused")
    assert logp_N.grad_fn is None and logp_N.untyped_storage().nbytes() == 32 * 4


@pytest.mark.parametrize("C", [4, 64])
def test_a_second_backward_pass_finds_the_same_gradient(columns, C):
    columns(C)  # The first one overwrites the logits: no later one may take them for logits.
    h, W, y, g = example()
    logp_N = token_logps(h.requires_grad_(), W, y, "fused")
    first, = torch.autograd.grad(logp_N, h, g, retain_graph=True)
    second, = torch.autograd.grad(logp_N, h, g)
    assert_close(first, second)


def test_a_target_outside_the_vocabulary_is_not_scored_silently(columns):
    columns(64)
    assert token_logps(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([4, -1]),
                       "fused").isnan().all()


def test_unknown_implementation_is_refused_by_name():
    with pytest.raises(ValueError, match="'quick'; use 'eager' or 'fused'"):
        token_logps(*example()[:3], impl="quick")


# ---- Precision ----------------------------------------------------------------------------------

def test_bfloat16_inputs_lose_no_more_than_float32_log_softmax_does(columns):
    columns(64)
    case = example(N=40, D=32, V=300, dtype=torch.bfloat16)
    right, fused, plain = by_hand(*case), computed(*case), computed(*case, impl="eager")
    assert fused[0].dtype == torch.float32 and fused[1].dtype == fused[2].dtype == torch.bfloat16
    for got, other, exact in zip(fused, plain, right):
        error, allowed = (got - exact).abs().max(), (other - exact).abs().max()
        assert error <= allowed, f"error {error:.2g}, that of the plain way {allowed:.2g}"


def test_autocast_leaves_the_logprobs_in_float32(columns):
    columns(4)
    case = example()
    with torch.autocast("cpu", torch.bfloat16):
        got = computed(*case)
    assert got[0].dtype == torch.float32
    assert_all_close(got, by_hand(*case))


# ---- In use -------------------------------------------------------------------------------------

MEMORY = """
import ctypes, torch
from spin_loss import token_logps
torch.set_num_threads(1)
def run(impl, N, V):
    h, W = torch.randn(N, 64, requires_grad=True), torch.randn(V, 64, requires_grad=True)
    token_logps(h, W, torch.randint(V, (N,)), impl).sum().backward()
def megabytes(key):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if key in line)
run("fused", 64, 40_000), run("fused", 65, 40_000)  # compiles
for impl in ("fused", "eager"):
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # forget the highest so far
    before = megabytes("VmRSS")
    run(impl, 2048, 16_384)
    print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_fused_memory_stays_under_a_bound_that_the_plain_way_breaks():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, check=True, text=True,
                          capture_output=True)
    fused, eager = map(float, done.stdout.split())
    assert fused < 64 < 128 < eager, f"{fused:.0f} and {eager:.0f} MB; a table of logits has 128"


def test_without_a_compiler_a_warning_and_the_same_numbers(tmp_path):
    script = ("import torch; from spin_loss import token_logps as f\n"
              "h, W = torch.eye(3, requires_grad=True), torch.eye(3)\n"
              "for _ in range(3): f(h, W, torch.arange(3), 'fused').sum().backward()\n"
              "print(f(h, W, torch.arange(3), 'fused').tolist())")
    env = {**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, text=True,
                          capture_output=True, check=True)
    assert done.stderr.count("uncompiled: torch.compile met InductorError") == 2, done.stderr
    assert json.loads(done.stdout) == pytest.approx([1 - math.log(math.e + 2)] * 3)


@pytest.fixture
def fresh_compiler(monkeypatch):
    """fresh_compiler(f): from now on torch.compile returns f(body), and nothing is compiled yet."""
    def set_compiler(compiler):
        monkeypatch.setattr(torch, "compile", lambda body, dynamic: compiler(body))
        spin_loss.compiled.cache_clear()
    yield set_compiler
    spin_loss.compiled.cache_clear()


def failing(error, good_calls):
    """A compiler whose code does its work, yet raises `error` after so many good calls."""
    def compiler(body):
        calls = []

        def fast(*args):
            calls.append(args)
            result = body(*args)
            if len(calls) > good_calls:
                raise error
            return result
        return fast
    return compiler


def test_running_out_of_memory_is_not_mistaken_for_a_missing_compiler(fresh_compiler, recwarn):
    for good_calls in (0, 1):  # in the trial, and in the caller's own work
        fresh_compiler(failing(torch.OutOfMemoryError("no memory left"), good_calls))
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            computed(*example())
    assert not [w for w in recwarn if "uncompiled" in str(w.message)]


def test_a_compiler_that_fails_costs_one_warning_for_each_body(fresh_compiler):
    fresh_compiler(failing(RuntimeError("no compiler here"), good_calls=0))
    with pytest.warns(UserWarning, match="uncompiled: torch.compile met RuntimeError") as caught:
        for seed in range(3):
            case = example(seed=seed)
            assert_all_close(computed(*case), by_hand(*case))
    assert len(caught) == 2, "join_block and minus_softmax_, once each"


def test_no_block_is_changed_twice(fresh_compiler, monkeypatch):
    """The trial works on its own numbers; an error in a caller's block is not tried again there."""
    case = example()
    real_blocks, seen = spin_loss.logit_blocks, []

    def watched(hidden_ND, weight_VD):
        for first, weight_CD, logits_NC in real_blocks(hidden_ND, weight_VD):
            seen.append(logits_NC.untyped_storage().data_ptr())
            yield first, weight_CD, logits_NC
    changed = []

    def compiler(body):
        def fast(logits_NC, *rest):
            if body is spin_loss.minus_softmax_:
                changed.append(logits_NC.untyped_storage().data_ptr())
            return body(logits_NC, *rest)
        return fast
    monkeypatch.setattr(spin_loss, "logit_blocks", watched)
    fresh_compiler(compiler)
    assert_all_close(computed(*case), by_hand(*case))
    assert [block in seen for block in changed] == [False, True], (
        "the first call is the trial, on numbers of its own; the second is the one block there is")

    fresh_compiler(failing(RuntimeError("broke half-way"), good_calls=1))
    with pytest.raises(RuntimeError, match="broke half-way"):
        computed(*case)


@pytest.mark.parametrize("device, most", [("cpu", 1 << 20), ("cuda", 1 << 26)])
def test_a_block_is_as_large_as_its_device_likes(monkeypatch, device, most):
    """Shapes alone: 50,257 columns for 2,048 tokens are 99 blocks on a CPU, 2 on a GPU."""
    shapes = []
    monkeypatch.setitem(spin_loss.BLOCK_LOGITS, "meta", spin_loss.BLOCK_LOGITS[device])
    hidden_ND, weight_VD = (torch.empty(n, 4, device="meta") for n in (2048, 50_257))
    for first, weight_CD, logits_NC in spin_loss.logit_blocks(hidden_ND, weight_VD):
        assert first == sum(shapes) and logits_NC.shape == (2048, len(weight_CD))
        shapes.append(len(weight_CD))
    assert sum(shapes) == 50_257 and max(shapes) * 2048 <= most
    assert len(shapes) == math.ceil(50_257 / (most // 2048))


def test_a_new_number_of_tokens_compiles_nothing_new():
    from torch._dynamo.utils import counters
    for N in (50, 51):
        computed(*example(N=N, V=20))
    counters.clear()
    for N in (2, 30, 77, 300):
        computed(*example(N=N, V=20))
    assert counters["stats"].get("unique_graphs", 0) == 0


def test_training_reaches_the_same_weights_with_either_implementation(tmp_path):
    world = tmp_path / "world.jsonl"
    world.write_text("".join(json.dumps(
        {"family": "coin", "prompt": f"Flip coin {i}.", "split": "heldout" if i == 3 else "train",
         "responses": {"heads": 0.25, "tails": 0.75}}) + "\n" for i in range(4)), encoding="utf-8")
    for impl in ("eager", "fused"):
        train.main(train.Config(iters=1, sft_steps=4, steps=4, reports=1, n_layer=1, n_embd=16,
                                batch_size=32, data=str(world), out=str(tmp_path / impl),
                                device="cpu", logprob=impl))
    start, eager, fused = (
        torch.load(tmp_path / file, weights_only=True)["model"] for file in
        ("eager/iteration_0.pt", "eager/iteration_1.pt", "fused/iteration_1.pt"))
    moved = max((eager[name] - start[name]).abs().max().item() for name in start)
    apart = max((eager[name] - fused[name]).abs().max().item() for name in start)
    assert apart < 1e-2 * moved, f"{apart:.2g} apart, after moving by {moved:.2g}"
