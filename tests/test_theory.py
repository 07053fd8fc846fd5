"""SPIN on a table (`python -m data.theory`): exact self-play, every loss, what SPIN cannot see.

The oracles share nothing with what they check: losses and theorems written out with `math`, sums
over all pairs in plain Python, slopes by finite differences, minima by enumeration.
"""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from data import theory
from data.theory import (DATA, GENERATED_SAMPLE, REAL_SAMPLE, WEAK, contraction, expected_loss, kl,
                         log_table, next_policy, predicted_factor)

ROOT = Path(__file__).resolve().parents[1]
D, P = DATA.exp().tolist(), WEAK.exp().tolist()


def softplus(u):
    return math.log(1 + math.exp(u))


def space(mu):
    return lambda r, s, lam: (-math.log(1 / (1 + mu * math.exp(-r)))
                              - mu * math.log(1 / (1 + math.exp(s) / mu)))


# Every loss in plain Python, and its factor near p_data as THEORY.md gives it.
FORMULAS = {
    "logistic": lambda r, s, lam: softplus(-lam * (r - s)),
    "hinge": lambda r, s, lam: max(0.0, 1 - lam * (r - s)),
    "exponential": lambda r, s, lam: math.exp(-lam * (r - s)),
    "correlation": lambda r, s, lam: 1 - lam * (r - s),
    "space": space(1),
    "space μ=4": space(4),
    "squared": lambda r, s, lam: (1 - lam * (r - s)) ** 2,
    "kliep": lambda r, s, lam: math.exp(s) - r,
    "ddo": lambda r, s, lam: softplus(-lam * r) + softplus(lam * s),
    "sppo": lambda r, s, lam: (lam * r - 0.5) ** 2 + (lam * s + 0.5) ** 2,
}
FACTORS = {
    "logistic": lambda lam: 1 - 1 / lam,
    "exponential": lambda lam: 1 - 1 / (2 * lam),
    "squared": lambda lam: 1 - 1 / (2 * lam),
    "sppo": lambda lam: 1 - 1 / (4 * lam),
    "ddo": lambda lam: 1 - 1 / lam,
    "kliep": lambda lam: 0,
    "space": lambda lam: 0,
    "space μ=4": lambda lam: 0,
}
smooth_losses = pytest.mark.parametrize("loss", FACTORS)
two_lambdas = pytest.mark.parametrize("lam", [0.7, 3.0])


def normalised(weights):
    return [w / sum(weights) for w in weights]


def mean_loss(logits, loss, lam, generated=P):
    """Σ_y Σ_y' p_data(y) generated(y') L(r(y), r(y')), in plain Python."""
    policy = normalised([math.exp(z) for z in logits])
    ratio = [math.log(q / p) for q, p in zip(policy, P)]
    return sum(d * g * FORMULAS[loss](r, s, lam)
               for d, r in zip(D, ratio) for g, s in zip(generated, ratio))


def play_by_hand(lam, iterations):
    """[(p_t, KL(p_data‖p_t))] by Theorem 5.4, in plain Python."""
    p, path = P, []
    for _ in range(iterations + 1):
        path.append((p, sum(d * math.log(d / q) for d, q in zip(D, p))))
        p = normalised([q * (d / q) ** (1 / lam) for d, q in zip(D, p)])
    return path


# ---- Algorithm 1 on a table ----------------------------------------------------------------------

@pytest.mark.parametrize("loss", theory.ZOO)
def test_expected_loss_is_the_sum_over_all_pairs(loss):
    logits = [2.0, 0.3, -1.0, 0.5, 0.0, 0.1]
    for generated_K, generated in ((None, P), (DATA.flip(0), D[::-1])):
        logits_K = torch.tensor(logits, dtype=torch.float64)
        got = expected_loss(logits_K, DATA, WEAK, 1.7, loss, generated_K)
        assert got.item() == pytest.approx(mean_loss(logits, loss, 1.7, generated), rel=1e-12)


@two_lambdas
@smooth_losses
def test_next_policy_is_a_minimum(loss, lam):
    """Each slope is 0 by central differences, and no random step lowers the loss."""
    best = next_policy(DATA, WEAK, lam, loss).tolist()
    smallest, h = mean_loss(best, loss, lam), 1e-4
    for k in range(6):
        up, down = ([z + sign * h * (i == k) for i, z in enumerate(best)] for sign in (1, -1))
        assert abs(mean_loss(up, loss, lam) - mean_loss(down, loss, lam)) / (2 * h) < 1e-7
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0, 3.0):
        for step in size * torch.randn(10, 6, generator=generator):
            assert mean_loss([z + x for z, x in zip(best, step.tolist())], loss, lam) > smallest


# ---- Every loss ----------------------------------------------------------------------------------

def measured_factor(loss, lam=1.0):
    """The factor of one exact iteration that starts close to p_data."""
    direction_K = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0]).double()
    near_K = (DATA + 1e-5 * direction_K).log_softmax(0)
    return contraction(near_K, next_policy(DATA, near_K, lam, loss))


@two_lambdas
@smooth_losses
def test_one_formula_predicts_the_factor_of_every_loss(loss, lam):
    assert predicted_factor(loss, lam) == pytest.approx(FACTORS[loss](lam), abs=1e-12)
    assert measured_factor(loss, lam) == pytest.approx(FACTORS[loss](lam), abs=1e-4)


def test_the_formula_also_predicts_the_factor_of_a_loss_added_in_one_line(monkeypatch):
    """Neither a function of r − s nor a sum f(r) + g(s). By hand: L_r = −1.5, L_s = 0.5, L_rr = 1
    and L_ss = 2, so the factor is 1 − 1.5/(1 + 2 + 1.5 − 0.5) = 0.625."""
    monkeypatch.setitem(theory.ZOO, "added", lambda r, s, lam: (
        (-r).exp() - 0.5 * r + s ** 2 + 0.5 * s - 0.4 * r * s))
    assert predicted_factor("added") == pytest.approx(0.625, abs=1e-12)
    assert measured_factor("added") == pytest.approx(0.625, abs=1e-4)


@two_lambdas
@pytest.mark.parametrize("data", [D, [0.5, 0.32, 0.18, 0, 0, 0]], ids=["all right", "3 wrong"])
def test_squared_loss_has_a_closed_form_which_does_not_remove_wrong_responses(data, lam):
    """p_{t+1} ∝ p_t e^{cq}, q = (p_data − p_t)/(p_data + p_t), c = 1/(λ(1 − E_{p_t} q))."""
    q = [(d - p) / (d + p) for d, p in zip(data, P)]
    c = 1 / (lam * (1 - sum(p * x for p, x in zip(P, q))))
    right = normalised([p * math.exp(c * x) for p, x in zip(P, q)])
    got = next_policy(log_table(*data), WEAK, lam, "squared").exp().tolist()
    assert got == pytest.approx(right, abs=1e-10)


def test_exponential_loss_ends_where_the_logistic_one_does_at_twice_the_lambda():
    right = normalised([p * (d / p) ** (1 / 3) for d, p in zip(D, P)])
    got = next_policy(DATA, WEAK, 1.5, "exponential").exp().tolist()
    assert got == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("loss", ["ddo", "kliep", "space", "space μ=4"])
def test_one_iteration_of_these_losses_ends_at_p_data(loss):
    assert_close(next_policy(DATA, WEAK, 1.0, loss), DATA, atol=1e-12, rtol=0)


# Each response raised by 0 to 4 steps of 1/λ: 5⁶ policies.
LATTICE = torch.cartesian_prod(*[torch.arange(5.0).double()] * 6)


def hinge_step(opponent_K, lam):
    """The best policy whose log-ratios are whole multiples of 1/λ, by enumeration."""
    loss_N = expected_loss(opponent_K + LATTICE / lam, DATA, opponent_K, lam, "hinge")
    return opponent_K + LATTICE[loss_N.argmin()] / lam


@pytest.mark.parametrize("lam", [1.0, 2.0])
def test_hinge_moves_log_p_by_multiples_of_one_over_lambda_and_ends_in_a_cycle(lam):
    """A step is a minimum: raising any group of responses by a little does not help. That suffices
    for a sum of convex functions of differences: its steepest slope is along some group."""
    policies = [WEAK]
    groups_GK = 1e-3 * torch.cartesian_prod(*[torch.arange(2.0).double()] * 6)
    for _ in range(12):
        best_K = hinge_step(policies[-1], lam)
        loss_G = expected_loss(best_K + groups_GK, DATA, policies[-1], lam, "hinge")
        assert loss_G.min() >= loss_G[0] - 1e-12  # group 0 is empty
        policies.append(best_K.log_softmax(0))
    assert_close(policies[-1], policies[-3], atol=1e-9, rtol=0)
    assert min(kl(DATA, p_K) for p_K in policies) > 0.001
    assert all((p_K - DATA).max() - (p_K - DATA).min() < 1 / lam for p_K in policies[-2:])


def test_correlation_loss_falls_without_end():
    direction = [d - p for d, p in zip(D, P)]
    fall = sum(x * x for x in direction)
    for size in (1, 100, 10000):
        logits_K = WEAK + size * torch.tensor(direction)
        value = expected_loss(logits_K, DATA, WEAK, 1.0, "correlation").item()
        assert value == pytest.approx(1 - size * fall, rel=1e-6)


@pytest.mark.parametrize("loss", ["hinge", "correlation"])
def test_a_loss_without_curvature_is_refused(loss):
    with pytest.raises(ValueError, match="curved"):
        next_policy(DATA, WEAK, loss=loss)


# ---- Samples -------------------------------------------------------------------------------------

@two_lambdas
def test_one_step_from_samples_weighs_by_their_frequencies(lam):
    """p_{t+1} ∝ p_t (p̂/q̂)^{1/λ} over what both sides hold."""
    got_K = next_policy(REAL_SAMPLE, WEAK, lam, generated_K=GENERATED_SAMPLE)[:5].log_softmax(0)
    real, generated = REAL_SAMPLE.exp().tolist(), GENERATED_SAMPLE.exp().tolist()
    right = normalised([P[k] * (real[k] / generated[k]) ** (1 / lam) for k in range(5)])
    assert got_K.exp().tolist() == pytest.approx(right, abs=1e-12)


def test_spin_leaves_an_unsampled_response_where_it_is_and_space_does_not():
    real, generated = REAL_SAMPLE.exp().tolist(), GENERATED_SAMPLE.exp().tolist()
    left_over = 1 - sum(P[k] * real[k] / generated[k] for k in range(5))
    ends = theory.play_blind_direction()
    spin, space_ends = ends["logistic"], ends["space"]
    assert spin[0][1] < 0.01 and spin[2][1] > 0.35
    assert [value for *_, value in spin] == pytest.approx([spin[0][2]] * 3, abs=1e-14)
    assert [end for _, end, _ in space_ends] == pytest.approx([left_over] * 3, abs=1e-10)


# ---- The command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """One run with the default λs: the lines that it prints, and its figure."""
    folder = tmp_path_factory.mktemp("theory") / "new"
    done = subprocess.run([sys.executable, "-m", "data.theory", "--out", folder], cwd=ROOT,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines(), folder / "theory.png"


def test_it_prints_no_wide_line_and_draws_the_figure(printed):
    assert max(map(len, printed[0])) <= 100
    picture = printed[1].read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 30_000


def test_printed_kl_and_behaviour_are_those_of_theorem_5_4(printed):
    rows = [line.split() for line in printed[0] if " × " in line]
    words = ["diverges", "2-cycle", "oscillates", "step", "geometric", "geometric"]
    assert [float(row[0]) for row in rows] == theory.LAMBDAS and [row[-1] for row in rows] == words
    for row in rows:
        factor = row[row.index("×") + 1].rstrip(":").replace("−", "-")
        assert float(factor) == pytest.approx(1 - 1 / float(row[0]), abs=5e-4)
        for cell, (_, exact_kl) in zip(row[1:10], play_by_hand(float(row[0]), 8)):
            if exact_kl < theory.FAR:
                assert float(cell) == pytest.approx(exact_kl, rel=6e-3, abs=6e-4)
            else:
                assert cell == "far"


def test_printed_minima_are_the_floor_of_lemma_c_2(printed):
    """log 2 − JSD, where the JSD is the mean of KL(p₊‖M) and KL(p₋‖M), M = (p₊ + p₋)/2."""
    plus = [d * p for d in D for p in P]
    minus = [p * d for p in P for d in D]
    jsd = sum(a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b))
              for a, b in zip(plus, minus)) / 2
    found = [float(line.split()[3]) for line in printed[0] if line.startswith("  λ =")]
    assert found == pytest.approx([math.log(2) - jsd] * 6, abs=1e-10)


def test_printed_floor_rises_to_log_2(printed):
    line, = (line for line in printed[0] if "floor at λ = 2" in line)
    floors = [float(cell) for cell in line.split()[-9:]]
    assert floors == sorted(floors) and floors[-1] == round(math.log(2), 4)


def test_printed_kl_with_sampled_responses_is_near_its_theory(printed):
    rows = [line.split() for line in printed[0] if line.startswith(("  200", "  2000", "  20000"))]
    assert len(rows) == 9
    for n, lam, _, found, shown in rows:
        exact = 5 / (2 * int(n) * (2 * int(lam) - 1))
        assert float(shown) == pytest.approx(exact, rel=0.05)
        assert float(found) == pytest.approx(exact, rel=0.4)


def test_the_smallest_and_the_largest_lambda_are_printed_and_drawn(tmp_path, capsys):
    theory.main(["--lam", "0.01", "100", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "× −99: diverges" in printed and "× 0.99: geometric" in printed
    assert (tmp_path / "theory.png").exists()


@pytest.mark.parametrize("flags, word", [(["--lam", "0"], "0.01 to 100"),
                                         (["--lam", "nan"], "0.01 to 100"),
                                         (["--lam", "two"], "two"),
                                         (["--lam", *"1234567"], "six"),
                                         (["--bogus"], "--bogus"),
                                         (["--out", "spin_loss.py"], "spin_loss.py")])
def test_bad_flags_end_in_one_line_and_status_2(flags, word, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        theory.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error


def test_help_is_printed_where_the_console_cannot_show_lambda():
    done = subprocess.run([sys.executable, "-m", "data.theory", "--help"], cwd=ROOT,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
                          capture_output=True)
    assert done.returncode == 0 and b"up to six values of ?" in done.stdout, done.stderr
