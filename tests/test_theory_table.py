"""SPIN on a table (`python -m data.theory`): exact self-play, every loss, finite samples.

The oracles share nothing with what they check: L-BFGS instead of Newton, losses and theorems
written out with `math`, sums over all pairs in plain Python, slopes along every group of responses.
"""
import doctest
import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sympy  # torch brings it
import torch
from torch.testing import assert_close

from conftest import lbfgs
from data.theory import __main__ as theory
from data.theory import table
from data.theory.figure import draw_theory
from data.theory.table import (DATA, WEAK, alpha_spin_limit, behaviour, contraction, descend,
                               expected_loss, fixed_point, frequencies, kl, log_table,
                               next_alpha_spin, next_policy, next_t_spin, predicted_factor,
                               play, t_spin_limit_near_uniform)

ROOT = Path(__file__).resolve().parents[1]
D, P = DATA.exp().tolist(), WEAK.exp().tolist()

# 20 responses a side, with no F among them.
REAL = log_table(0.3, 0.2, 0.3, 0.05, 0.15, 0)
GENERATED = log_table(0.1, 0.2, 0.15, 0.2, 0.35, 0)


def softplus(u):
    return math.log(1 + math.exp(u))


# Every loss as a function of r, s, λ and μ, in plain Python.
FORMULAS = {
    "logistic": lambda r, s, lam, mu: softplus(-lam * (r - s)),
    "hinge": lambda r, s, lam, mu: max(0.0, 1 - lam * (r - s)),
    "exponential": lambda r, s, lam, mu: math.exp(-lam * (r - s)),
    "correlation": lambda r, s, lam, mu: 1 - lam * (r - s),
    "space": lambda r, s, lam, mu: (-math.log(1 / (1 + mu * math.exp(-r)))
                                    - mu * math.log(1 / (1 + math.exp(s) / mu))),
    "squared": lambda r, s, lam, mu: (1 - lam * (r - s)) ** 2,
    "kliep": lambda r, s, lam, mu: math.exp(s) - r,
    "ddo": lambda r, s, lam, mu: softplus(-lam * r) + softplus(lam * s),
    "sppo": lambda r, s, lam, mu: (lam * r - 0.5) ** 2 + (lam * s + 0.5) ** 2,
}

# The losses with one smooth minimum. Near p_data some settings overshoot, and some fall short.
SMOOTH = [dict(loss="logistic", lam=0.7), dict(loss="logistic", lam=5.0),
          dict(loss="exponential", lam=0.4), dict(loss="exponential", lam=2.0),
          dict(loss="squared", lam=0.4), dict(loss="squared", lam=2.0),
          dict(loss="kliep"), dict(loss="ddo", lam=0.7), dict(loss="ddo", lam=3.0),
          dict(loss="sppo", lam=0.4), dict(loss="sppo", lam=1.0),
          dict(loss="space", mu=0.1), dict(loss="space", mu=10.0)]


def pair_loss(ratio, data, generated, loss_of):
    """Σ_y Σ_y' p_data(y) p_t(y') loss(r(y), r(y')), in plain Python."""
    return sum(d * g * loss_of(r, s)
               for d, r in zip(data, ratio) for g, s in zip(generated, ratio))


def hinge_loss(scaled_ratio, data, generated):
    return pair_loss(scaled_ratio, data, generated, lambda r, s: max(0.0, 1 - (r - s)))


def normalised(weights):
    return [w / sum(weights) for w in weights]


def play_by_hand(lam, iterations):
    """[(p_t, KL(p_data‖p_t))] by Theorem 5.4, in plain Python."""
    p, path = P, []
    for _ in range(iterations + 1):
        path.append((p, sum(d * math.log(d / q) for d, q in zip(D, p))))
        p = normalised([q * (d / q) ** (1 / lam) for d, q in zip(D, p)])
    return path


# ---- The game ------------------------------------------------------------------------------------

def test_every_loss_has_a_formula_here():
    assert set(FORMULAS) == set(table.LOSSES)


@pytest.mark.parametrize("loss", FORMULAS)
def test_expected_loss_is_the_sum_over_all_pairs(loss):
    weights = [p * math.exp(x) for p, x in zip(P, (2.0, 0.3, -1.0, 0.5, 0.0, 0.1))]
    policy = normalised(weights)
    ratio = [math.log(q / p) for q, p in zip(policy, P)]
    lam, mu = 1.7, 0.3
    for generated_K, generated in ((None, P), (DATA.flip(0), D[::-1])):
        for logits_K in (log_table(*policy), log_table(*weights)):  # a constant changes nothing
            got = expected_loss(logits_K, DATA, WEAK, lam, loss, mu, generated_K).item()
            right = pair_loss(ratio, D, generated, lambda r, s: FORMULAS[loss](r, s, lam, mu))
            assert got == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("settings", SMOOTH, ids=str)
def test_newton_and_lbfgs_find_the_same_minimum(settings):
    def loss_of(logits_K):
        return expected_loss(logits_K, DATA, WEAK, **settings)
    best_K, smallest = lbfgs(loss_of, WEAK)
    newton_K = next_policy(DATA, WEAK, **settings)
    assert_close(newton_K, best_K, atol=1e-6, rtol=0)
    assert loss_of(newton_K).item() <= smallest + 1e-14


@pytest.mark.parametrize("lam", theory.LAMBDAS)
def test_eight_exact_iterations_follow_theorem_5_4(lam):
    policies = play(DATA, WEAK, lam=lam)
    assert len(policies) == 9
    for t, (measured_K, (p, exact_kl)) in enumerate(zip(policies, play_by_hand(lam, 8))):
        assert measured_K.exp().tolist() == pytest.approx(p, abs=1e-6), f"p_{t}"
        assert kl(DATA, measured_K) == pytest.approx(exact_kl, abs=1e-6), f"KL at t = {t}"


def test_self_play_stops_where_p_t_leaves_float64():
    policies = play(DATA, WEAK, lam=0.1)
    assert len(policies) == 3 and kl(DATA, policies[1]) < 100 < kl(DATA, policies[2])


@pytest.mark.parametrize("lam, word", [(0.4, "DIVERGES"), (0.5, "2-cycle"), (0.75, "oscillates"),
                                       (1.0, "one step"), (2.0, "geometric"), (5.0, "geometric")])
def test_measured_factor_is_one_minus_one_over_lambda_and_is_put_in_words(lam, word):
    factor = contraction(WEAK, next_policy(DATA, WEAK, lam))
    assert factor == pytest.approx(1 - 1 / lam, abs=1e-9)
    assert word in behaviour(factor)


# ---- Every loss ----------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", SMOOTH, ids=str)
def test_against_p_data_the_only_minimum_is_p_data(settings):
    for start_K in (WEAK, WEAK.flip(0), torch.zeros(6).double()):
        assert_close(next_policy(DATA, DATA, start_K=start_K, **settings), DATA, atol=1e-6, rtol=0)


CLOSED_FORMS = {
    "logistic": lambda lam: 1 - 1 / lam,
    "exponential": lambda lam: 1 - 1 / (2 * lam),
    "squared": lambda lam: 1 - 1 / (2 * lam),
    "ddo": lambda lam: 1 - 1 / lam,
    "sppo": lambda lam: 1 - 1 / (4 * lam),  # 1 − η/4
    "kliep": lambda lam: 0,
    "space": lambda lam: 0,
}


def measured_factor(settings):
    """The factor of one exact iteration that starts close to p_data."""
    direction_K = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0], dtype=torch.float64)
    near_K = (DATA + 1e-5 * direction_K).log_softmax(0)
    return contraction(near_K, next_policy(DATA, near_K, **settings))


@pytest.mark.parametrize("settings", SMOOTH, ids=str)
def test_one_formula_predicts_the_factor_of_every_loss(settings):
    closed_form = CLOSED_FORMS[settings["loss"]](settings.get("lam", 1.0))
    assert predicted_factor(**settings) == pytest.approx(closed_form, abs=1e-12)
    assert measured_factor(settings) == pytest.approx(closed_form, abs=1e-4)


def test_the_formula_also_predicts_the_factor_of_a_loss_added_in_one_line(monkeypatch):
    """Neither a function of r − s nor a sum f(r) + g(s). By hand: L_r = −1.5, L_s = 0.5, L_rr = 1
    and L_ss = 2 at λ = 1, so the factor is 1 − 1.5/(1 + 2 + 1.5 − 0.5) = 0.625."""
    added = {"added": lambda r, s, lam, mu: (-lam * r).exp() - 0.5 * r + s ** 2 + 0.5 * s
             - 0.4 * r * s}
    monkeypatch.setitem(table.LOSSES, "added", added["added"])
    assert predicted_factor("added") == pytest.approx(0.625, abs=1e-12)
    assert measured_factor(dict(loss="added")) == pytest.approx(0.625, abs=1e-4)


def test_the_formula_says_nothing_where_a_loss_has_no_curvature():
    assert predicted_factor("hinge") == predicted_factor("correlation") == -math.inf


@pytest.mark.parametrize("lam", [0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("data", [D, [0.5, 0.32, 0.18, 0, 0, 0]], ids=["all right", "3 wrong"])
def test_squared_step_is_a_closed_form_which_does_not_remove_wrong_responses(data, lam):
    """p_{t+1} ∝ p_t e^{cq}, q = (p_data − p_t)/(p_data + p_t), c = 1/(λ(1 − E_{p_t} q))."""
    q = [(d - p) / (d + p) for d, p in zip(data, P)]
    c = 1 / (lam * (1 - sum(p * x for p, x in zip(P, q))))
    right = normalised([p * math.exp(c * x) for p, x in zip(P, q)])
    got = next_policy(log_table(*data), WEAK, lam, "squared").exp().tolist()
    assert got == pytest.approx(right, abs=1e-9)
    for wrong in (k for k in range(6) if data[k] == 0):  # p_0 has C, index 2, right already
        shrunk = got[wrong] / got[2] / (P[wrong] / P[2])
        assert shrunk == pytest.approx(math.exp(-c), rel=1e-9)


def test_expected_kliep_loss_is_the_sft_loss():
    """Up to a constant: E_{p_t} p_θ/p_t = 1, whatever p_θ is."""
    differences = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits_K = torch.randn(6, dtype=torch.float64, generator=generator)
        sft = -(DATA.exp() @ logits_K.log_softmax(0))
        differences.append((expected_loss(logits_K, DATA, WEAK, loss="kliep") - sft).item())
    assert differences == pytest.approx([differences[0]] * 3, abs=1e-12)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="use one of logistic"):
        next_policy(DATA, WEAK, loss="nonsense")


@pytest.mark.parametrize("lam", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("opponent_K", [WEAK, (WEAK + 9 * DATA).div(10).log_softmax(0)],
                         ids=["far", "near"])
def test_hinge_step_is_an_exact_minimum_in_whole_multiples_of_one_over_lambda(opponent_K, lam):
    """No group of responses can be raised by a little so that the loss falls.

    That suffices: near a point, a sum of convex functions of differences is the Lovász extension
    of a submodular function, so its steepest slope is along some group. L-BFGS looks too.
    """
    best_K = next_policy(DATA, opponent_K, lam, "hinge")
    scaled = [lam * r for r in (best_K - opponent_K).tolist()]
    generated = opponent_K.exp().tolist()
    smallest = hinge_loss(scaled, D, generated)
    for group in itertools.product((0, 1e-3), repeat=6):
        moved = [x + g for x, g in zip(scaled, group)]
        assert hinge_loss(moved, D, generated) >= smallest - 1e-12, f"raising {group} helps"
    levels = [x - min(scaled) for x in scaled]
    assert levels == pytest.approx([round(x) for x in levels], abs=1e-9) and max(levels) >= 1

    def loss_of(logits_K):
        return expected_loss(logits_K, DATA, opponent_K, lam, "hinge")
    for start_K in (opponent_K, DATA, WEAK.flip(0)):
        assert lbfgs(loss_of, start_K)[1] >= smallest - 1e-12


def test_hinge_near_p_data_raises_what_is_too_rare_by_one_over_lambda():
    """The sign of an error counts, not its size: the step is as long for a small one."""
    for size in (0.05, 0.005):
        opponent_K = (DATA + size * torch.tensor([1, -1, 1, -1, 2, -2.0])).log_softmax(0)
        step_K = next_policy(DATA, opponent_K, 2.0, "hinge") - opponent_K
        too_rare_K = opponent_K < DATA
        assert_close(step_K - step_K.min(), 0.5 * too_rare_K.double(), atol=1e-9, rtol=0)


def test_hinge_against_p_data_is_a_tie_within_one_over_lambda():
    """So p_data is a fixed point, but not one that a player is driven to."""
    lam = 2.0
    for spread, tie in ((0.2, True), (0.49, True), (0.51, False), (2.0, False)):
        scaled = [lam * spread * x for x in (0, 1, 0.3, 0.6, 0, 1)]
        value = hinge_loss(scaled, D, D)
        assert value == pytest.approx(1, abs=1e-12) if tie else value > 1 + 1e-4
    assert_close(next_policy(DATA, DATA, lam, "hinge"), DATA)


@pytest.mark.parametrize("lam", [1.0, 2.0, 5.0])
def test_hinge_self_play_ends_in_a_cycle_around_p_data(lam):
    policies = play(DATA, WEAK, 40, lam=lam, loss="hinge")
    assert_close(policies[-1], policies[-3], atol=1e-9, rtol=0)
    for p_K in policies[-2:]:
        spread = (p_K - DATA).max() - (p_K - DATA).min()
        assert 0.1 / lam < spread < 1 / lam
    assert min(kl(DATA, p_K) for p_K in policies) > 0.01 / lam ** 2


def test_correlation_loss_falls_for_ever_towards_one_response():
    def loss_of(logits_K):
        return expected_loss(logits_K, DATA, WEAK, loss="correlation")
    direction = [d - p for d, p in zip(D, P)]
    fall_per_step = sum(x * x for x in direction)
    for steps in (10, 1000):
        p_K = descend(loss_of, WEAK, steps)
        assert loss_of(p_K).item() == pytest.approx(1 - steps * fall_per_step, rel=1e-9)
    assert p_K[0].exp() > 1 - 1e-9 and max(direction) == direction[0]
    with pytest.raises(ValueError, match="no minimum"):
        next_policy(DATA, WEAK, loss="correlation")


def test_correlation_loss_reaches_p_data_with_one_step_an_iteration():
    policy_K, kl_T = WEAK, []
    for _ in range(150):
        kl_T.append(kl(DATA, policy_K))
        opponent_K = policy_K
        policy_K = descend(lambda z_K: expected_loss(z_K, DATA, opponent_K, loss="correlation"),
                           opponent_K, steps=1)
    assert kl_T == sorted(kl_T, reverse=True) and kl_T[-1] < 1e-8


# ---- Two games that do not end at p_data ---------------------------------------------------------

@pytest.mark.parametrize("alpha, lam", [(0.1, 1.0), (0.5, 2.0), (0.9, 1.5)])
def test_alpha_spin_step_and_fixed_point_are_the_closed_forms(alpha, lam):
    opponent = D[::-1]
    got_K = next_alpha_spin(DATA, log_table(*opponent), WEAK, alpha, lam)
    step = normalised([first ** alpha * p ** (1 - alpha) * (d / p) ** (1 / lam)
                       for d, p, first in zip(D, opponent, P)])
    assert got_K.exp().tolist() == pytest.approx(step, abs=1e-8)

    limit = normalised([first ** (alpha * lam / (1 + alpha * lam)) * d ** (1 / (1 + alpha * lam))
                        for d, first in zip(D, P)])
    found_K = fixed_point(lambda p_K: next_alpha_spin(DATA, p_K, WEAK, alpha, lam), WEAK)
    assert found_K.exp().tolist() == pytest.approx(limit, abs=1e-7)
    assert alpha_spin_limit(DATA, WEAK, alpha, lam).exp().tolist() == pytest.approx(limit)
    assert kl(DATA, found_K) > 1e-3, "it ends at p_data"


def test_alpha_spin_contracts_by_one_minus_alpha_minus_one_over_lambda():
    alpha, lam = 0.3, 2.0
    limit_K = alpha_spin_limit(DATA, WEAK, alpha, lam)
    next_K = next_alpha_spin(DATA, WEAK, WEAK, alpha, lam)
    assert contraction(WEAK, next_K, limit_K) == pytest.approx(1 - alpha - 1 / lam, abs=1e-9)


def t_spin_slopes(policy, opponent, first, data, alpha, beta):
    """dL/dlogit of T-SPIN's loss, divided by α; plain Python. All zero at the minimum."""
    slopes = [0.0] * len(policy)
    for i, j in itertools.product(range(len(policy)), repeat=2):
        wins = data[i] * opponent[j] + beta * opponent[i] * first[j]
        pull = wins * policy[j] ** alpha / (policy[i] ** alpha + policy[j] ** alpha)
        slopes[i] -= pull
        slopes[j] += pull
    return slopes


@pytest.mark.parametrize("alpha, beta", [(0.5, 1.0), (1.0, 0.5), (2.0, 5.0)])
def test_t_spin_step_is_stationary(alpha, beta):
    got = next_t_spin(DATA, DATA.flip(0), WEAK, alpha, beta).exp().tolist()
    assert t_spin_slopes(got, D[::-1], P, D, alpha, beta) == pytest.approx([0] * 6, abs=1e-10)


@pytest.mark.parametrize("alpha, beta", [(0.5, 1.0), (1.0, 0.5), (2.0, 5.0)])
def test_t_spin_has_a_fixed_point_that_is_not_p_data_and_depends_on_p_0(alpha, beta):
    found = {}
    for name, first_K in (("weak", WEAK), ("data", DATA)):
        for start_K in (WEAK, WEAK.flip(0)):  # it is the same from either start
            end_K = fixed_point(lambda p_K: next_t_spin(DATA, p_K, first_K, alpha, beta), start_K)
            end = end_K.exp().tolist()
            slopes = t_spin_slopes(end, end, first_K.exp().tolist(), D, alpha, beta)
            assert slopes == pytest.approx([0] * 6, abs=1e-8)
            assert end == pytest.approx(found.setdefault(name, end), abs=1e-6)
        assert kl(DATA, end_K) > 0.01
    assert max(abs(a - b) for a, b in zip(found["weak"], found["data"])) > 0.01


@pytest.mark.parametrize("alpha, beta", [(0.1, 0.1), (1.0, 1.0), (2.0, 5.0)])
def test_t_spin_turns_p_data_into_the_uniform_policy(alpha, beta):
    got_K = next_t_spin(DATA, DATA, DATA, alpha, beta)
    assert got_K.exp().tolist() == pytest.approx([1 / 6] * 6, abs=1e-9)


def test_t_spin_without_history_ends_at_p_data_to_the_power_1_over_1_plus_alpha():
    found_K = fixed_point(lambda p_K: next_t_spin(DATA, p_K, WEAK, alpha=2.0, beta=0.0), WEAK)
    right = normalised([d ** (1 / 3) for d in D])
    assert found_K.exp().tolist() == pytest.approx(right, abs=1e-7)


def test_t_spin_with_a_small_alpha_ends_in_a_cycle_of_two_policies():
    policy_K = WEAK
    for _ in range(60):
        before_K, policy_K = policy_K, next_t_spin(DATA, policy_K, WEAK, alpha=0.5, beta=0.5)
    after_K = next_t_spin(DATA, policy_K, WEAK, alpha=0.5, beta=0.5)
    assert_close(after_K, before_K, atol=1e-4, rtol=0)
    assert (after_K - policy_K).abs().max() > 1
    assert fixed_point(lambda p_K: next_t_spin(DATA, p_K, WEAK, 0.5, 0.5), WEAK, 60) is None


def test_t_spin_with_two_responses_ends_at_the_root_of_a_quadratic():
    """With α = 1 the odds ρ satisfy d₂ρ² + β(w₁ − w₂)ρ − d₁ = 0, where d is p_data and w is p_0."""
    d, w, beta = (0.7, 0.3), (0.2, 0.8), 0.5
    b = beta * (w[0] - w[1])
    odds = (-b + math.sqrt(b * b + 4 * d[0] * d[1])) / (2 * d[1])
    data_K, first_K = log_table(*d), log_table(*w)
    found_K = fixed_point(lambda p_K: next_t_spin(data_K, p_K, first_K, 1.0, beta), first_K)
    assert (found_K[0] - found_K[1]).exp().item() == pytest.approx(odds, rel=1e-6)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.5), (2.0, 2.0)])
def test_t_spin_formula_is_right_to_first_order_near_uniform(alpha, beta):
    """Half the distance from uniform: a quarter of the error."""
    errors = []
    for size in (0.02, 0.01):
        data_K, first_K = (size * DATA).log_softmax(0), (size * WEAK).log_softmax(0)
        found_K = fixed_point(lambda p_K: next_t_spin(data_K, p_K, first_K, alpha, beta), first_K)
        formula_K = t_spin_limit_near_uniform(data_K, first_K, alpha, beta)
        errors.append((found_K - formula_K).abs().max().item())
    assert errors[0] < 0.02 * size
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_a_fixed_point_of_t_spin_can_have_no_formula_in_radicals():
    """Three responses, α = β = 1: one ratio is a root of a degree-7 polynomial with group S_7.

    The polynomial is irreducible over Q, so its group acts transitively on 7 roots. Dedekind: its
    factors modulo primes are the cycle types of group elements. Here these are a 3-cycle, so the
    group holds all even permutations (Jordan), and a permutation of types 2 and 5, which is odd.
    """
    d = [sympy.Rational(n, 10) for n in (5, 3, 2)]
    w = [sympy.Rational(n, 7) for n in (1, 2, 4)]
    a, b = sympy.symbols("a b")
    p = [a, b, 1]  # up to a factor

    def slope(i):
        terms = [((d[i] * p[j] + p[i] * w[j]) * p[j] - (d[j] * p[i] + p[j] * w[i]) * p[i])
                 / (p[i] + p[j]) for j in range(3) if j != i]
        return sympy.numer(sympy.together(sum(terms)))

    factors = sympy.factor_list(sympy.resultant(slope(0), slope(1), b), a)[1]
    polynomial = max((sympy.Poly(factor, a) for factor, _ in factors), key=sympy.Poly.degree)
    assert polynomial.degree() == 7 and polynomial.is_irreducible

    data_K, first_K = log_table(0.5, 0.3, 0.2), log_table(1 / 7, 2 / 7, 4 / 7)
    found_K = fixed_point(lambda p_K: next_t_spin(data_K, p_K, first_K), first_K)
    ratio = (found_K[0] - found_K[2]).exp().item()
    assert min(abs(complex(root) - ratio) for root in polynomial.nroots()) < 1e-6

    integer_polynomial = polynomial.clear_denoms(convert=True)[1]
    cycle_types = set()
    for prime in sympy.primerange(5, 400):
        if integer_polynomial.LC() % prime:
            modular = sympy.Poly(integer_polynomial.as_expr(), a, modulus=prime)
            parts = modular.factor_list()[1]
            if all(multiplicity == 1 for _, multiplicity in parts):
                cycle_types.add(tuple(sorted(part.degree() for part, _ in parts)))
    assert {(1, 1, 1, 1, 3), (2, 5)} <= cycle_types


# ---- Finite samples ------------------------------------------------------------------------------

def test_with_finite_data_the_fixed_point_is_the_empirical_distribution():
    real_K = frequencies(DATA, 500, torch.Generator().manual_seed(0))
    assert kl(DATA, real_K) > 1e-3
    assert_close(play(real_K, WEAK, 30, lam=2.0)[-1], real_K, atol=1e-6, rtol=0)
    assert_close(next_policy(real_K, WEAK, loss="space"), real_K, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lam", [1.0, 3.0])
def test_with_sampled_opponents_p_t_keeps_moving_around_p_data(lam):
    """Mean KL (K−1) / (2n(2λ−1)): each iteration adds to the log-ratios a noise of variance
    1/(n p), divided by λ, and multiplies what was there by 1 − 1/λ."""
    n, generator, policy_K, kl_T = 5000, torch.Generator().manual_seed(0), DATA, []
    for _ in range(250):
        generated_K = frequencies(policy_K, n, generator)
        policy_K = next_policy(DATA, policy_K, lam, generated_K=generated_K)
        kl_T.append(kl(DATA, policy_K))
    assert sum(kl_T[10:]) / 240 == pytest.approx(5 / (2 * n * (2 * lam - 1)), rel=0.25)


def test_one_step_from_finite_samples_weighs_by_their_frequencies():
    """p_{t+1} ∝ p_t (p̂_real/p̂_generated)^{1/λ} over what both sides hold: p_t does not cancel."""
    for lam in (1.0, 2.0):
        got_K = next_policy(REAL, WEAK, lam, generated_K=GENERATED)[:5].log_softmax(0)
        real, generated = REAL.exp().tolist(), GENERATED.exp().tolist()
        right = normalised([P[k] * (real[k] / generated[k]) ** (1 / lam) for k in range(5)])
        assert got_K.exp().tolist() == pytest.approx(right, abs=1e-9)


@pytest.mark.parametrize("loss", FORMULAS)
def test_only_a_loss_of_r_minus_s_leaves_the_logit_of_an_unsampled_response_alone(loss):
    generator = torch.Generator().manual_seed(0)
    logits_K = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    expected_loss(logits_K, REAL, WEAK, 1.0, loss, generated_K=GENERATED).backward()
    pairwise = loss in ("logistic", "hinge", "exponential", "correlation", "squared")
    assert (logits_K.grad[5] == 0) == pairwise, f"gradient {logits_K.grad[5]}"


def test_spin_leaves_an_unsampled_response_where_it_is_and_space_does_not():
    pinned = 1 - sum(p * r / g
                     for p, r, g in zip(P, REAL.exp()[:5].tolist(), GENERATED.exp().tolist()))
    ends = {"logistic": [], "space": []}
    for logit in (-4.0, 0.0, 3.0):
        start_K = WEAK + torch.tensor([0, 0, 0, 0, 0, logit])
        for loss, found in ends.items():
            end_K = next_policy(REAL, WEAK, loss=loss, generated_K=GENERATED, start_K=start_K)
            value = expected_loss(end_K, REAL, WEAK, loss=loss, generated_K=GENERATED).item()
            found.append((end_K[5].exp().item(), value))
    spin, space = ends["logistic"], ends["space"]
    assert spin[0][0] < 0.01 and spin[2][0] > 0.5
    assert [value for _, value in spin] == pytest.approx([spin[0][1]] * 3, abs=1e-13)
    assert [p for p, _ in space] == pytest.approx([pinned] * 3, abs=1e-6)


def test_space_is_minimised_from_anywhere():
    """Its loss is not convex in the logits: far out, where p(F) is e^−15, it curves downwards."""
    generator, ends = torch.Generator().manual_seed(0), []
    for i in range(60):
        start_K = 4 * torch.randn(6, dtype=torch.float64, generator=generator)
        ends.append(next_policy(REAL, WEAK, loss="space", mu=(0.1, 1.0, 10.0)[i % 3],
                                generated_K=GENERATED, start_K=start_K).exp())
    for end_K in ends:
        assert_close(end_K, ends[0], atol=1e-6, rtol=0)


def test_space_drops_an_unsampled_response_when_the_sampled_ones_leave_nothing_over():
    real = [count / 20 for count in (7, 3, 4, 3, 3, 0)]
    generated = [count / 20 for count in (1, 2, 4, 7, 6, 0)]
    assert sum(p * r / g for p, r, g in zip(P, real, generated[:5])) > 1
    end_K = next_policy(log_table(*real), WEAK, loss="space", generated_K=log_table(*generated))
    assert end_K[5].exp() < 1e-6


def test_spin_sends_a_response_that_only_one_side_holds_to_infinity():
    """The loss keeps falling as its logit grows (on the real side) or sinks (on the other)."""
    uniform_K = torch.zeros(3).double()
    for real_K, generated_K, sign in ((log_table(0.5, 0.5, 0), log_table(0, 0.5, 0.5), 1),
                                      (log_table(0, 0.5, 0.5), log_table(0.5, 0.5, 0), -1)):
        values = [expected_loss(torch.tensor([sign * z, 0, 0]), real_K, uniform_K,
                                generated_K=generated_K).item() for z in (0.0, 2.0, 8.0, 20.0)]
        assert all(after < before for before, after in zip(values, values[1:])), values


# ---- The command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The default run: the lines that it prints, and its figure. StringIO has no `reconfigure`."""
    folder = tmp_path_factory.mktemp("theory") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        theory.main(["--out", str(folder)])
        lines = sys.stdout.getvalue().splitlines()
    return lines, folder / "theory.png"


def test_printed_kl_and_behaviour_are_those_of_theorem_5_4(printed):
    rows = {line.split()[0]: line for line in printed[0] if " × " in line}
    for lam, word in (("0.4", "DIVERGES"), ("0.5", "2-cycle"), ("0.75", "oscillates"),
                      ("1", "one step"), ("2", "geometric"), ("5", "geometric")):
        assert rows[lam].endswith(word)
        exact = [exact_kl for _, exact_kl in play_by_hand(float(lam), 8)]
        shown = [float(x) for x in rows[lam].split()[1:10]]
        assert shown == pytest.approx(exact, rel=6e-3, abs=6e-4)
    difference, = (line for line in printed[0] if "Largest difference" in line)
    assert float(difference.split()[-2]) < 1e-6


def test_printed_minima_are_at_the_floor(printed):
    differences = [float(line.split()[-1]) for line in printed[0] if line.startswith("  λ =")]
    assert len(differences) == 6 and max(differences) < 1e-12


def test_printed_factors_found_by_minimising_are_those_of_the_formula(printed):
    header = next(n for n, line in enumerate(printed[0]) if line.split()[:2] == ["theory", "found"])
    rows = [line[19:].split() for line in printed[0][header + 1:header + 12]]
    for formula, found, *_ in rows:
        assert float(formula) == pytest.approx(float(found), abs=1e-3)


def test_no_printed_line_is_wider_than_100_columns(printed):
    assert max(map(len, printed[0])) <= 100


def test_the_figure_is_written(printed):
    picture = printed[1].read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 30_000


def test_one_lambda_that_diverges_is_printed_and_drawn(tmp_path, capsys):
    runs = theory.show_theorem([0.1])
    row, = (line for line in capsys.readouterr().out.splitlines() if " × " in line)
    assert row.split()[:4] == ["0.1", "0.444", f"{play_by_hand(0.1, 1)[1][1]:.3g}", "far"]
    assert row.endswith("× −9: DIVERGES")
    draw_theory(tmp_path / "theory.png", runs, *theory.play_blind_direction())
    assert (tmp_path / "theory.png").exists()


@pytest.mark.parametrize("flags, word", [(["--lam", "0"], "0.01 to 100"),
                                         (["--lam", "nan"], "0.01 to 100"),
                                         (["--lam", *"1234567"], "six"),
                                         (["--bogus\nline"], "bogus line"),
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


def test_examples_in_docstrings_hold():
    assert doctest.testmod(table).failed == 0
