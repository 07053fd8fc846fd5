"""`python spin_loss.py`: exact self-play on a table, every loss's fixed point, finite samples.

The oracles share nothing with what they check: L-BFGS instead of Newton, the theorem written out
with `math`, sums over all pairs in plain Python, one-sided differences over every group of answers.
"""
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from conftest import lbfgs
from data import theory
from data.table import (DATA, WEAK, descend, expected_loss, frequencies, kl, log_table, next_policy,
                        self_play)

ROOT = Path(__file__).resolve().parents[1]
D, P = DATA.exp().tolist(), WEAK.exp().tolist()
REAL = log_table(0.3, 0.2, 0.3, 0.05, 0.15, 0)  # 20 draws a side, with no F among them
DRAWN = log_table(0.1, 0.2, 0.15, 0.2, 0.35, 0)


def pair_loss(x, data, drawn, loss_of_difference):
    """Σ_y Σ_y' p_data(y) p_t(y') ℓ(x_y − x_y'), x the log-ratios times λ; plain Python."""
    return sum(d * p * loss_of_difference(a - b) for d, a in zip(data, x) for p, b in zip(drawn, x))


def by_hand(lam, iterations):
    """[(p_t, KL(p_data‖p_t))] with Theorem 5.4 written out; plain Python."""
    p, path = P, []
    for _ in range(iterations + 1):
        path.append((p, sum(d * math.log(d / q) for d, q in zip(D, p))))
        weight = [q * (d / q) ** (1 / lam) for d, q in zip(D, p)]
        p = [w / sum(weight) for w in weight]
    return path


def hinge(u):
    return max(0.0, 1 - u)


# ---- The table game ------------------------------------------------------------------------------

def test_expected_loss_is_the_sum_over_all_pairs():
    x = [2.0, 0.3, -1.0, 0.5, 0.0, 0.1]
    logits_K, lam = WEAK + torch.tensor(x, dtype=torch.float64), 1.7
    scaled = [lam * v for v in x]
    for loss, formula in (("logistic", lambda u: math.log(1 + math.exp(-u))), ("hinge", hinge),
                          ("exponential", lambda u: math.exp(-u)),
                          ("correlation", lambda u: 1 - u)):
        for generated_K, drawn in ((None, P), (DATA.flip(0), D[::-1])):
            got = expected_loss(logits_K, DATA, WEAK, lam, loss, generated_K=generated_K).item()
            assert got == pytest.approx(pair_loss(scaled, D, drawn, formula), rel=1e-12), loss


@pytest.mark.parametrize("how", [dict(lam=0.5), dict(lam=1.0), dict(lam=5.0),
                                 dict(loss="exponential", lam=0.5), dict(loss="space", mu=0.1),
                                 dict(loss="space", mu=10.0)], ids=str)
def test_newton_and_lbfgs_find_the_same_minimum(how):
    loss_of = lambda logits_K: expected_loss(logits_K, DATA, WEAK, **{"lam": 1.0, **how})
    best_K, least = lbfgs(loss_of, WEAK)
    newton_K = next_policy(DATA, WEAK, **how)
    assert_close(newton_K, best_K, atol=1e-6, rtol=0)
    assert loss_of(newton_K).item() <= least + 1e-14


@pytest.mark.parametrize("lam", theory.LAMBDAS)
def test_eight_exact_iterations_follow_theorem_5_4(lam):
    run = self_play(DATA, WEAK, lam=lam)
    assert len(run) == 9
    for t, (measured_K, (p, exact)) in enumerate(zip(run, by_hand(lam, 8))):
        assert measured_K.exp().tolist() == pytest.approx(p, abs=1e-6), f"p_{t}"
        assert kl(DATA, measured_K) == pytest.approx(exact, abs=1e-6), f"KL at t = {t}"


def test_a_run_that_leaves_float64_stops_there():
    run = self_play(DATA, WEAK, lam=0.1)
    assert len(run) == 3 and kl(DATA, run[1]) < 100 < kl(DATA, run[2])


@pytest.mark.parametrize("lam, word", [(0.4, "DIVERGES"), (0.5, "2-cycle"), (0.75, "oscillates"),
                                       (1.0, "one step"), (2.0, "geometric"), (5.0, "geometric")])
def test_measured_factor_is_one_minus_one_over_lambda_and_so_is_its_word(lam, word):
    c = theory.contraction(WEAK, next_policy(DATA, WEAK, lam))
    assert c == pytest.approx(1 - 1 / lam, abs=1e-9) and word in theory.behaviour(c)


# ---- The loss zoo --------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [dict(lam=0.3), dict(lam=4.0), dict(loss="exponential", lam=0.3),
                                 dict(loss="space", mu=0.1), dict(loss="space", mu=10.0)], ids=str)
def test_against_the_data_the_data_is_the_only_optimum(how):
    for start_K in (WEAK, WEAK.flip(0), torch.zeros(6).double()):
        assert_close(next_policy(DATA, DATA, start_K=start_K, **how), DATA, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lam", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("opponent_K", [WEAK, (WEAK + 9 * DATA).div(10).log_softmax(0)],
                         ids=["far", "near"])
def test_hinge_step_is_an_exact_minimum_in_whole_multiples_of_one_over_lambda(opponent_K, lam):
    """No group of answers can rise or fall by a little and lower the loss.

    That suffices: near a point, a sum of convex functions of differences is the Lovász extension
    of a submodular function, so its steepest slope is along some group. L-BFGS looks too.
    """
    best_K = next_policy(DATA, opponent_K, lam, "hinge")
    x, drawn = [lam * r for r in (best_K - opponent_K).tolist()], opponent_K.exp().tolist()
    least = pair_loss(x, D, drawn, hinge)
    for group in itertools.product((0, 1e-3), repeat=6):
        moved = [a + g for a, g in zip(x, group)]
        assert pair_loss(moved, D, drawn, hinge) >= least - 1e-12, f"raising {group} helps"
    levels = [a - min(x) for a in x]
    assert levels == pytest.approx([round(a) for a in levels], abs=1e-9) and max(levels) >= 1
    for start_K in (opponent_K, DATA, WEAK.flip(0)):
        loss_of = lambda logits_K: expected_loss(logits_K, DATA, opponent_K, lam, "hinge")
        assert lbfgs(loss_of, start_K)[1] >= least - 1e-12


def test_hinge_near_the_data_lifts_what_is_too_rare_by_one_over_lambda():
    """Its sign, not its size: the step is as long for a small error as for a large one."""
    for size in (0.05, 0.005):
        opponent_K = (DATA + size * torch.tensor([1, -1, 1, -1, 2, -2.0])).log_softmax(0)
        step_K = next_policy(DATA, opponent_K, 2.0, "hinge") - opponent_K
        too_rare_K = opponent_K < DATA
        assert_close(step_K - step_K.min(), 0.5 * too_rare_K.double(), atol=1e-9, rtol=0)


def test_hinge_against_the_data_is_a_tie_within_one_over_lambda():
    """So p_data is a fixed point, but not one that a player is driven to."""
    lam = 2.0
    for spread, tie in ((0.2, True), (0.49, True), (0.51, False), (2.0, False)):
        x = [lam * spread * v for v in (0, 1, 0.3, 0.6, 0, 1)]
        value = pair_loss(x, D, D, hinge)
        assert value == pytest.approx(1, abs=1e-12) if tie else value > 1 + 1e-4
    assert_close(next_policy(DATA, DATA, lam, "hinge"), DATA)


@pytest.mark.parametrize("lam", [1.0, 2.0, 5.0])
def test_hinge_self_play_ends_in_a_cycle_around_the_data(lam):
    run = self_play(DATA, WEAK, 40, lam=lam, loss="hinge")
    assert_close(run[-1], run[-3], atol=1e-9, rtol=0)
    for p_K in run[-2:]:
        spread = (p_K - DATA).max() - (p_K - DATA).min()
        assert 0.1 / lam < spread < 1 / lam
    assert min(kl(DATA, p_K) for p_K in run) > 0.01 / lam ** 2


def test_correlation_loss_falls_for_ever_towards_one_answer():
    loss_of = lambda logits_K: expected_loss(logits_K, DATA, WEAK, 1.0, "correlation")
    direction = [d - p for d, p in zip(D, P)]
    fall = sum(v * v for v in direction)
    for steps in (10, 1000):
        p_K = descend(loss_of, WEAK, steps)
        assert loss_of(p_K).item() == pytest.approx(1 - steps * fall, rel=1e-9)
    assert p_K[0].exp() > 1 - 1e-9 and max(direction) == direction[0]
    with pytest.raises(ValueError, match="no minimum"):
        next_policy(DATA, WEAK, 1.0, "correlation")


def test_correlation_loss_stopped_early_reaches_the_data():
    policy_K, errors = WEAK, []
    for _ in range(150):
        errors.append(kl(DATA, policy_K))
        opponent_K = policy_K
        policy_K = descend(lambda z: expected_loss(z, DATA, opponent_K, 1.0, "correlation"),
                           opponent_K, steps=1)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


# ---- Finite samples ------------------------------------------------------------------------------

def test_with_finite_data_the_fixed_point_is_the_empirical_distribution():
    real_K = frequencies(DATA, 500, torch.Generator().manual_seed(0))
    assert kl(DATA, real_K) > 1e-3
    assert_close(self_play(real_K, WEAK, 30, lam=2.0)[-1], real_K, atol=1e-6, rtol=0)
    assert_close(next_policy(real_K, WEAK, loss="space"), real_K, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lam", [1.0, 3.0])
def test_drawn_opponents_keep_the_player_trembling_around_the_data(lam):
    """KL hovers at (K−1) / (2n(2λ−1)): a noise of variance 1/(n p) in each iteration's log-ratio,
    divided by λ, and forgotten at the rate (1 − 1/λ)."""
    n, generator, policy_K, errors = 5000, torch.Generator().manual_seed(0), DATA, []
    for _ in range(250):
        policy_K = next_policy(DATA, policy_K, lam, generated_K=frequencies(policy_K, n, generator))
        errors.append(kl(DATA, policy_K))
    assert sum(errors[10:]) / 240 == pytest.approx(5 / (2 * n * (2 * lam - 1)), rel=0.25)


def test_one_step_from_finite_draws_weighs_by_their_frequencies():
    """p_{t+1} ∝ p_t (p̂_real/p̂_drawn)^{1/λ} over what both drew: p_t does not cancel."""
    for lam in (1.0, 2.0):
        got_K = next_policy(REAL, WEAK, lam, generated_K=DRAWN)[:5].log_softmax(0)
        r, g = REAL.exp().tolist(), DRAWN.exp().tolist()
        weight = [P[k] * (r[k] / g[k]) ** (1 / lam) for k in range(5)]
        assert got_K.exp().tolist() == pytest.approx([w / sum(weight) for w in weight], abs=1e-9)


def test_spin_never_moves_the_logit_of_an_answer_that_neither_side_drew():
    torch.manual_seed(0)
    for loss, moves in (("logistic", False), ("hinge", False), ("exponential", False),
                        ("correlation", False), ("space", True)):
        logits_K = torch.randn(6, dtype=torch.float64).requires_grad_()
        expected_loss(logits_K, REAL, WEAK, 1.0, loss, generated_K=DRAWN).backward()
        assert (logits_K.grad[5] != 0) == moves, f"{loss}: {logits_K.grad[5]}"


def test_spin_leaves_an_undrawn_answer_where_it_is_and_space_pins_it():
    pinned = 1 - sum(p * r / g for p, r, g in zip(P, REAL.exp()[:5].tolist(), DRAWN.exp().tolist()))
    spin, space = [], []
    for logit in (-4.0, 0.0, 3.0):
        start_K = WEAK + torch.tensor([0, 0, 0, 0, 0, logit])
        for loss, ends in (("logistic", spin), ("space", space)):
            end_K = next_policy(REAL, WEAK, loss=loss, generated_K=DRAWN, start_K=start_K)
            ends.append((end_K[5].exp().item(),
                         expected_loss(end_K, REAL, WEAK, 1.0, loss, generated_K=DRAWN).item()))
    assert spin[0][0] < 0.01 and spin[2][0] > 0.5, "the blind direction has been lost"
    assert [value for _, value in spin] == pytest.approx([spin[0][1]] * 3, abs=1e-13)
    assert [p for p, _ in space] == pytest.approx([pinned] * 3, abs=1e-6)


def test_space_is_minimised_from_anywhere():
    """Its loss is not convex in the logits: far out, where p(F) is e^−15, it curves downwards."""
    generator, ends = torch.Generator().manual_seed(0), []
    for i in range(60):
        start_K = 4 * torch.randn(6, dtype=torch.float64, generator=generator)
        ends.append(next_policy(REAL, WEAK, loss="space", mu=(0.1, 1.0, 10.0)[i % 3],
                                generated_K=DRAWN, start_K=start_K).exp())
    for end_K in ends:
        assert_close(end_K, ends[0], atol=1e-6, rtol=0)


def test_space_drops_an_undrawn_answer_when_the_drawn_ones_leave_nothing_over():
    real_K, drawn_K = (log_table(*[c / 20 for c in counts])
                       for counts in ((7, 3, 4, 3, 3, 0), (1, 2, 4, 7, 6, 0)))
    assert sum(p * r / g for p, r, g in zip(P, (7, 3, 4, 3, 3), (1, 2, 4, 7, 6))) > 1
    end_K = next_policy(real_K, WEAK, loss="space", generated_K=drawn_K)
    assert end_K[5].exp() < 1e-6


def test_spin_sends_an_answer_that_one_side_alone_drew_to_infinity():
    """The loss keeps falling as its logit grows (drawn by the data) or sinks (by the opponent)."""
    for real_K, drawn_K, sign in ((log_table(0.5, 0.5, 0), log_table(0, 0.5, 0.5), 1),
                                  (log_table(0, 0.5, 0.5), log_table(0.5, 0.5, 0), -1)):
        values = [expected_loss(torch.tensor([sign * z, 0, 0]), real_K, torch.zeros(3).double(),
                                1.0, generated_K=drawn_K).item() for z in (0.0, 2.0, 8.0, 20.0)]
        assert all(after < before for before, after in zip(values, values[1:])), values


# ---- The script ----------------------------------------------------------------------------------

def test_the_script_prints_what_the_theory_says_and_draws_it(tmp_path, capsys):
    theory.main(["--out", str(tmp_path / "new")])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if " × " in line}
    for lam, word in (("0.4", "DIVERGES"), ("0.5", "2-cycle"), ("0.75", "oscillates"),
                      ("1", "one step"), ("2", "geometric"), ("5", "geometric")):
        assert rows[lam].endswith(word)
        exact = [divergence for _, divergence in by_hand(float(lam), 8)]
        printed = [float(x) for x in rows[lam].split()[1:10]]
        assert printed == pytest.approx(exact, rel=6e-3, abs=6e-4)
    gap, = (line for line in lines if "Largest difference" in line)
    assert float(gap.split()[-2]) < 1e-6
    floors = [line for line in lines if line.startswith("  λ =")]
    assert len(floors) == 6 and all(float(line.split()[-1]) < 1e-12 for line in floors)
    picture = (tmp_path / "new" / "theory.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 30_000


def test_one_lambda_that_diverges_is_printed_and_drawn(tmp_path, capsys):
    theory.main(["--lam", "0.1", "--out", str(tmp_path)])
    row, = (line for line in capsys.readouterr().out.splitlines() if " × " in line)
    assert row.split()[:3] == ["0.1", "0.444", f"{by_hand(0.1, 1)[1][1]:.3g}"]
    assert row.endswith("× −9: DIVERGES") and (tmp_path / "theory.png").exists()


@pytest.mark.parametrize("flags, word", [(["--lam", "0"], "0.01 to 100"),
                                         (["--lam", "nan"], "0.01 to 100"),
                                         (["--lam", *"1234567"], "six"), (["--bogus"], "bogus"),
                                         (["--out", "spin_loss.py"], "spin_loss.py")])
def test_bad_flags_end_in_one_line_and_status_2(flags, word, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        theory.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error


def test_spin_loss_runs_as_a_script_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "spin_loss.py"), "--lam", "0"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("spin_loss.py: ")
