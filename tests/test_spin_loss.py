"""spin_loss.py: what its functions say together. What each one does alone is in the claims.

The oracle is L-BFGS in float64 on a table of K responses, where every expectation is exact. A test
takes the module that it tests as an argument, so that test_mistakes.py can give it a wrong one.
"""
import math

import pytest
import torch
from torch.testing import assert_close

import spin_loss
from conftest import all_responses, tiny_gpt

DATA = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64).log()
WEAK = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64).log()  # the opponent p_t


def population_loss(m, logp_K, data_K, opponent_K, lam=1.0, loss="logistic"):
    """E over y ~ p_data and y' ~ p_t, by the function that trains."""
    return m.pair_loss(logp_K[None], opponent_K[None], data_K.exp()[None], opponent_K.exp()[None],
                       lam, loss)[0]


def minimise(m, data_K, opponent_K, lam=1.0, loss="logistic", anchor=0.0):
    """L-BFGS over the logits of a table; returns (log-probs at the minimum, the minimum)."""
    logits_K = opponent_K.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits_K], max_iter=1000, tolerance_grad=1e-13,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def total():
        optimizer.zero_grad()
        logp_K = logits_K.log_softmax(0)
        leak = m.mass_anchor(logp_K[None], opponent_K[None], opponent_K[None])[0]
        value = population_loss(m, logp_K, data_K, opponent_K, lam, loss) + anchor * leak
        value.backward()
        return value
    optimizer.step(total)
    return logits_K.detach().log_softmax(0), total().item()


def test_all_response_probabilities_sum_to_one(m=spin_loss):
    """Every response of up to 4 tokens, the unfinished ones too: 1 + 3 + 9 + 27 + 81 of them."""
    model, prompt, responses = tiny_gpt(), [2, 0], all_responses(4, 3, 4)
    assert len(responses) == 121
    tokens_BT = torch.tensor([(prompt + y + [0] * 4)[:6] for y in responses])
    response_BT = torch.tensor([[False] * 2 + [i < len(y) for i in range(4)] for y in responses])
    total = m.sequence_logps(model, tokens_BT, response_BT).double().exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5), f"the probabilities sum to {total}"


def test_expected_gradient_at_start_is_half_lambda_times_sft(m=spin_loss):
    """λℓ'(0) · ∇ E log p_θ(y), with ℓ'(0) = −½; a softmax table has ∇ E log p_θ = p_data − p_θ."""
    for loss, slope in (("logistic", -0.5), ("hinge", -1), ("exponential", -1),
                        ("correlation", -1)):
        for lam in (0.1, 1.0, 4.0):
            logits_K = WEAK.clone().requires_grad_()
            population_loss(m, logits_K.log_softmax(0), DATA, WEAK, lam, loss).backward()
            assert_close(logits_K.grad, slope * lam * (DATA.exp() - WEAK.exp()), atol=1e-14, rtol=0)


def test_data_distribution_is_a_fixed_point(m=spin_loss):
    """Theorem 5.2: with p_t = p_data nothing beats staying, and staying costs log 2."""
    for lam in (0.2, 1.0, 5.0):
        logits_K = DATA.clone().requires_grad_()
        loss = population_loss(m, logits_K.log_softmax(0), DATA, DATA, lam)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
        assert logits_K.grad.abs().max() < 1e-15
        assert population_loss(m, WEAK, DATA, DATA, lam) > math.log(2)
        assert_close(m.optimal_next_policy(DATA, DATA, lam), DATA, atol=1e-14, rtol=0)


def test_exact_optimum_is_theorem_5_4(m=spin_loss):
    """For the losses of THEOREM_LAM with their own λ; the mass anchor leaves it where it is.

    And the logistic loss there is its floor, whatever λ is.
    """
    for loss, lams in (("logistic", (0.4, 0.75, 1.0, 2.0, 5.0)), ("exponential", (0.5, 2.0)),
                       ("space", (1.0, 3.0))):
        for lam in lams:
            right_K = m.optimal_next_policy(DATA, WEAK, m.THEOREM_LAM[loss](lam))
            for anchor in (0.0, 2.0):
                best_K, least = minimise(m, DATA, WEAK, lam, loss, anchor)
                assert_close(best_K, right_K, atol=1e-6, rtol=0, msg=lambda text: (
                    f"{loss}, λ = {lam}: the optimum is not Theorem 5.4's: {text}"))
                if loss == "logistic":
                    assert m.loss_floor(DATA, WEAK).item() == pytest.approx(least, abs=1e-10)


def test_self_play_diverges_below_lambda_one_half(m=spin_loss):
    """And converges above; each iteration is solved by L-BFGS, not by the theorem."""
    for lam, least, most in ((0.4, 1.5, math.inf), (0.75, 0, 0.6), (3.0, 0, 0.6)):
        opponent_K, errors = (0.9 * DATA + 0.1 * WEAK).log_softmax(0), []  # KL(p_data‖p_t)
        for _ in range(6):
            errors.append((DATA.exp() * (DATA - opponent_K)).sum().item())
            opponent_K, _ = minimise(m, DATA, opponent_K, lam)
        ratios = [after / before for before, after in zip(errors, errors[1:])]
        assert least < min(ratios) and max(ratios) < most, (lam, errors)


def test_losses_cannot_see_a_common_shift_but_space_and_the_anchor_can(m=spin_loss):
    for loss in m.LOSSES:
        value, shifted = (population_loss(m, DATA - c, DATA, WEAK, 1.0, loss) for c in (0, 1))
        assert (abs(value - shifted) > 0.01) == (loss == "space"), loss
    leak = [m.mass_anchor(DATA[None] - c, WEAK[None], WEAK[None]).item() for c in (0, 1)]
    assert leak == pytest.approx([0, 1], abs=1e-12)


def test_loss_is_finite_where_exp_would_overflow(m=spin_loss):
    zero_B, far_B = torch.zeros(2), torch.tensor([1000.0, -1000.0])
    assert m.spin_loss(far_B, zero_B, zero_B, zero_B, 1.0).tolist() == [0.0, 1000.0]
