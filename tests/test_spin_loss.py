"""spin_loss.py: what is scored, what the loss is, and where its optimum lies.

The oracles are a Markov chain whose log-probabilities are sums of table entries, formulas written
out with `math`, and L-BFGS in float64 on a table of K responses, where every expectation is exact.
"""
import doctest
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import conftest
import data.errors
import data.metrics
import data.responses
import data.run.checkpoint
import data.tokenizer
import model as model_module
import spin_loss as spin_module
import train
from conftest import all_responses, known_mistake, lbfgs, logp_by_hand, tiny_gpt
from spin_loss import (LOSSES, loss_floor, loss_slopes, mass_anchor, optimal_next_policy,
                       sequence_logps, sft_scale, spin_loss, token_logps)

DATA = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64).log()
WEAK = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64).log()  # the opponent p_t


class MarkovChain:
    """A "model" whose next token depends on the last one alone: p(v after u) = table[u][v]."""
    def __init__(self, table):
        self.head_weight = torch.tensor(table).log().T

    def hidden(self, tokens_BT, cache=None):
        return F.one_hot(tokens_BT, len(self.head_weight)).float()


TABLE = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.4, 0.05, 0.3], [0.6, 0.1, 0.1, 0.2], [0.2, 0.3, 0.4, 0.1]]
END = 3
UNIFORM = [[0.25] * 4] * 4  # each scored token adds −log 4, so the sum counts them


def scored_tokens(tokens, response) -> float:
    """How many tokens sequence_logps adds up, told by a model that finds all equally likely."""
    logp_B = sequence_logps(MarkovChain(UNIFORM), torch.tensor([tokens]), torch.tensor([response]))
    return -logp_B.item() / math.log(4)


# ---- Which tokens are scored, and by what -------------------------------------------------------

def test_token_is_scored_by_the_logits_before_it():
    tokens, response = [0, 2, 1, 2, END], [False, False, True, True, True]
    got = sequence_logps(MarkovChain(TABLE), torch.tensor([tokens]), torch.tensor([response]))
    right = math.log(TABLE[2][1]) + math.log(TABLE[1][2]) + math.log(TABLE[2][END])
    unshifted = math.log(TABLE[1][1]) + math.log(TABLE[2][2]) + math.log(TABLE[END][END])
    hint = known_mistake(got.item(), {
        "you score each token by the logits that have read it; those before it predict it":
            unshifted,
        "you averaged; a log-probability is a sum": right / 3,
        "your sum includes the prompt": right + math.log(TABLE[0][2])})
    assert got.item() == pytest.approx(right, abs=1e-5), (
        f"your sum is {got.item():.4f} nats, expected {right:.4f}{hint}")


def test_logprob_is_a_sum_over_response_tokens_not_a_mean():
    for n in (1, 2, 5):
        scored = scored_tokens([0, *[1] * n], [False, *[True] * n])
        assert scored == pytest.approx(n, abs=1e-5), (
            f"{n} tokens of −log 4 each, and your value is {scored:.3f} of them" + known_mistake(
                scored, {f"you averaged: your value is 1/{n} of the sum": 1,
                         "END is not scored": n - 1, "END is scored twice": n + 1}))


def test_prompt_and_padding_are_not_scored():
    for prompt, response, padding in ((1, 4, 0), (3, 4, 0), (1, 4, 2), (3, 4, 2)):
        scored = scored_tokens([0] * prompt + [1] * response + [0] * padding,
                               [False] * prompt + [True] * response + [False] * padding)
        others = prompt - 1 + padding  # no logits stand before the first token
        assert scored == pytest.approx(response, abs=1e-5), (
            f"{scored:.2f} tokens scored, {response} expected" + known_mistake(scored, {
                "your sum includes the prompt": prompt - 1 + response,
                "your sum includes the padding": response + padding,
                "your sum includes the prompt and the padding": response + others,
                "your mask is inverted: all but the response is scored": others,
                "END is not scored": response - 1, "you averaged": 1}))


def test_end_token_is_scored():
    """Once, with its own probability. Else a response would look as likely as its beginning."""
    chain = MarkovChain(TABLE)
    logp_B = sequence_logps(chain, torch.tensor([[0, 1, END], [0, 1, 0]]),
                            torch.tensor([[False, True, True], [False, True, False]]))
    difference = (logp_B[0] - logp_B[1]).item()
    assert difference == pytest.approx(math.log(TABLE[1][END]), abs=1e-5), (
        f"END adds {difference:.4f} nats, expected {math.log(TABLE[1][END]):.4f}" + known_mistake(
            difference, {"END is not scored": math.log(TABLE[0][1]),
                         "END is scored twice": 2 * math.log(TABLE[1][END])}))


def test_padding_and_batch_mates_change_nothing():
    model, short, long = tiny_gpt(), [1, 2, END], [0, 1, 2, 0, 1, END]
    for filler in range(4):
        tokens_BT = torch.tensor([short + [filler] * 3, long])
        response_BT = torch.tensor([[False, True, True] + [False] * 3, [False] * 2 + [True] * 4])
        got_B = sequence_logps(model, tokens_BT, response_BT)
        expected = [logp_by_hand(model, [1], [2, END]), logp_by_hand(model, [0, 1], long[2:])]
        assert_close(got_B, torch.tensor(expected), atol=1e-5, rtol=0)


def test_all_response_probabilities_sum_to_one():
    """Every response of up to 4 tokens, the unfinished ones too: 1 + 3 + 9 + 27 + 81 of them."""
    model, prompt, responses = tiny_gpt(), [2, 0], all_responses(4, END, 4)
    assert len(responses) == 121
    width = 2 + 4
    tokens_BT = torch.tensor([(prompt + y + [0] * 4)[:width] for y in responses])
    response_BT = torch.tensor([[False] * 2 + [i < len(y) for i in range(4)] for y in responses])
    total = sequence_logps(model, tokens_BT, response_BT).double().exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5), f"the probabilities sum to {total}"


def test_token_logps_match_a_softmax_written_out():
    hidden_ND, weight_VD = torch.randn(6, 3), torch.randn(5, 3)
    targets = [4, 0, 0, 2, 1, 3]
    got_N = token_logps(hidden_ND, weight_VD, torch.tensor(targets))
    for hidden, target, got in zip(hidden_ND.tolist(), targets, got_N.tolist()):
        z = [sum(a * b for a, b in zip(hidden, row)) for row in weight_VD.tolist()]
        log_total = math.log(sum(map(math.exp, z)))
        assert got == pytest.approx(z[target] - log_total, abs=1e-5), (
            f"{got:.5f} nats, expected {z[target] - log_total:.5f}" + known_mistake(got, {
                "the logit itself is not a log-probability: subtract log Σ exp": z[target],
                "this is the probability; take its log": math.exp(z[target] - log_total),
                "this is −log p, the loss, not log p": log_total - z[target],
                "log₂ is not nats": (z[target] - log_total) / math.log(2)}))
    far = token_logps(torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert far.item() == -2000, (
        f"{far.item()}, expected −2000: exp overflows here; subtract the largest logit first, or "
        f"let log_softmax do so")
    half = token_logps(hidden_ND.bfloat16(), weight_VD.bfloat16(), torch.tensor(targets))
    assert half.dtype == torch.float32, "sums of many small log-probs need float32"


@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_several_targets_may_share_one_hidden_state(monkeypatch, impl):
    """With rows_N, target n is scored by the state in row rows_N[n]; gradients add up there."""
    monkeypatch.setattr(spin_module, "compiled", lambda body, device: body)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(4, 3, generator=generator, requires_grad=True)
    weight_VD = torch.randn(5, 3, generator=generator)
    rows, targets, weight = [3, 0, 3, 3, 1], [4, 0, 1, 4, 2], [1.0, -2.0, 0.5, 3.0, 1.5]
    got_N = token_logps(hidden_ND, weight_VD, torch.tensor(targets), impl, torch.tensor(rows))
    (torch.tensor(weight) * got_N).sum().backward()
    z_NV = (hidden_ND.detach().double() @ weight_VD.double().T).tolist()
    softmax = lambda z: [math.exp(v) / sum(map(math.exp, z)) for v in z]
    right = [math.log(softmax(z_NV[n])[v]) for n, v in zip(rows, targets)]
    assert got_N.tolist() == pytest.approx(right, abs=1e-5), f"{got_N.tolist()}" + known_mistake(
        got_N, {"target n was scored by row n, not by row rows_N[n]": [
            math.log(softmax(z_NV[min(n, 3)])[v]) for n, v in enumerate(targets)]})
    slope_ND = torch.zeros(4, 3, dtype=torch.float64)
    for n, v, w in zip(rows, targets, weight):  # ∂log p(v)/∂z_u = 1[u = v] − p(u)
        slope_V = torch.tensor([w * ((u == v) - p) for u, p in enumerate(softmax(z_NV[n]))])
        slope_ND[n] += slope_V.double() @ weight_VD.double()
    assert_close(hidden_ND.grad.double(), slope_ND, atol=1e-5, rtol=0)


# ---- The loss -----------------------------------------------------------------------------------

def written_out(loss, real, generated, lam, mu=1.0):
    """Each loss at log-ratios r and r', as the papers print it."""
    u = lam * (real - generated)
    sigma = lambda m, v: 1 / (1 + m * math.exp(-v))
    return {"logistic": math.log(1 + math.exp(-u)), "hinge": max(0.0, 1 - u),
            "exponential": math.exp(-u), "correlation": 1 - u,
            "space": -math.log(sigma(mu, real)) - mu * math.log(sigma(1 / mu, -generated)),
            "squared": (u - 1) ** 2, "kliep": math.exp(generated) - real,
            "ddo": -math.log(sigma(1, lam * real)) - math.log(sigma(1, -lam * generated)),
            "sppo": (lam * real - 0.5) ** 2 + (lam * generated + 0.5) ** 2}[loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("lam", [0.1, 1.0, 3.0])
def test_loss_is_its_formula_written_out(loss, lam):
    policy_real, policy_generated = [-1.0, -2.5, -0.3, -4.0], [-3.0, -1.0, -0.9, -4.5]
    opponent_real, opponent_generated = [-2.0, -1.5, -0.7, -4.2], [-2.2, -1.9, -0.1, -3.0]
    columns = policy_real, policy_generated, opponent_real, opponent_generated
    for mu in (0.5, 1.0, 2.0) if loss == "space" else (1.0,):
        got_B = spin_loss(*(torch.tensor(c, dtype=torch.float64) for c in columns), lam, loss, mu)
        value = lambda lam, r, sign=1: [written_out(loss, sign * real, sign * generated, lam, mu)
                                        for real, generated in map(r, zip(*columns))]
        ratios = lambda c: (c[0] - c[2], c[1] - c[3])
        expected = value(lam, ratios)
        assert got_B.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12), (
            f"{got_B.tolist()}, expected {expected}" + known_mistake(got_B, {
                "the sign of the margin is flipped: real − generated": value(lam, ratios, -1),
                "λ is missing": value(1, ratios), "λ is squared": value(lam * lam, ratios),
                "the opponent is left out of the log-ratios": value(lam, lambda c: c[:2]),
                "the real response's log-ratio stands for both": value(
                    lam, lambda c: (c[0] - c[2],) * 2),
                "return a loss for each pair, not their mean": sum(expected) / len(expected)}))


def test_loss_rewards_real_responses_and_punishes_generated_ones():
    """The sign of the margin: d loss / d log p(y) < 0, d loss / d log p(y') > 0."""
    for loss in LOSSES:
        real_B, generated_B = (torch.tensor([-2.0], requires_grad=True) for _ in range(2))
        value_B = spin_loss(real_B, generated_B, torch.tensor([-2.1]), torch.tensor([-1.9]), 1.0,
                            loss)
        up, down = torch.autograd.grad(value_B.sum(), (real_B, generated_B))
        assert up.item() < 0 < down.item(), f"{loss}: is the sign of the margin flipped?"


def test_loss_is_log_2_when_player_equals_opponent():
    real_B, generated_B = torch.tensor([-1.0, -20.0]).double(), torch.tensor([-9.0, -0.1]).double()
    for lam in (0.1, 1.0, 10.0):
        loss_B = spin_loss(real_B, generated_B, real_B, generated_B, lam)
        assert loss_B.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)


def test_logistic_loss_is_finite_where_exp_would_overflow():
    zero_B, far_B = torch.zeros(2), torch.tensor([1000.0, -1000.0])
    assert spin_loss(far_B, zero_B, zero_B, zero_B, 1.0).tolist() == [0.0, 1000.0]


def test_unknown_names_are_refused_by_name():
    one_B = torch.zeros(1)
    with pytest.raises(ValueError, match="'cubic'.*logistic"):
        spin_loss(one_B, one_B, one_B, one_B, 1.0, "cubic")
    with pytest.raises(ValueError, match="'magic'"):
        token_logps(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), "magic")


# ---- The theorems, on a table of K responses ----------------------------------------------------

def population_loss(logp_K, data_K, opponent_K, lam=1.0, loss="logistic", mu=1.0):
    """E over y ~ p_data and y' ~ p_t, all K × K pairs with their probabilities."""
    pairs = torch.cartesian_prod(torch.arange(len(data_K)), torch.arange(len(data_K)))
    i_B, j_B = pairs.unbind(1)
    weight_B = (data_K[i_B] + opponent_K[j_B]).exp()
    loss_B = spin_loss(logp_K[i_B], logp_K[j_B], opponent_K[i_B], opponent_K[j_B], lam, loss, mu)
    return (weight_B * loss_B).sum()


def minimise(loss_of_logp, start_K):
    """L-BFGS over the logits of a table; returns (log-probs at the minimum, the minimum)."""
    return lbfgs(lambda logits_K: loss_of_logp(logits_K.log_softmax(0)), start_K)


def kl(p_K, q_K):
    return (p_K.exp() * (p_K - q_K)).sum().item()


@pytest.mark.parametrize("lam", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("loss, slope", [("logistic", -0.5), ("hinge", -1), ("exponential", -1),
                                         ("correlation", -1)])
def test_expected_gradient_at_start_is_half_lambda_times_sft(loss, slope, lam):
    """−λ/2 · ∇ E log p_θ(y); a softmax table has ∇ E_data log p_θ = p_data − p_θ. (λℓ'(0) else.)"""
    logits_K = WEAK.clone().requires_grad_()
    population_loss(logits_K.log_softmax(0), DATA, WEAK, lam, loss).backward()
    assert_close(logits_K.grad, slope * lam * (DATA.exp() - WEAK.exp()), atol=1e-14, rtol=0)


# One line, as in LOSSES.
QUARTIC = lambda r, s, lam, mu: (lam * (r - s) - 1) ** 2 + (lam * (r - s) / 4) ** 4  # noqa: E731
SCALES = {  # 1/(λ|ℓ'(0)|) for a loss ℓ(λ(r − s)), 1/|f'(0)| for f(r) + g(s)
    "logistic": lambda lam, mu: 2 / lam, "hinge": lambda lam, mu: 1 / lam,
    "exponential": lambda lam, mu: 1 / lam, "correlation": lambda lam, mu: 1 / lam,
    "space": lambda lam, mu: (1 + mu) / mu, "quartic": lambda lam, mu: 1 / (2 * lam),
    "squared": lambda lam, mu: 1 / (2 * lam), "kliep": lambda lam, mu: 1,
    "ddo": lambda lam, mu: 2 / lam, "sppo": lambda lam, mu: 1 / lam}


@pytest.mark.parametrize("loss", [*LOSSES, "quartic"])
@pytest.mark.parametrize("lam, mu", [(0.1, 1.0), (1.0, 0.3), (4.0, 3.0)])
def test_scaled_loss_has_the_first_gradient_of_sft(monkeypatch, loss, lam, mu):
    """On a table SFT's gradient is p_θ − p_data. The losses added here get their scale unasked."""
    monkeypatch.setitem(LOSSES, "quartic", QUARTIC)
    scale = sft_scale(loss, lam, mu)
    if loss in SCALES:
        right = SCALES[loss](lam, mu)
        assert scale == pytest.approx(right, rel=1e-12), f"{scale}, expected {right}" + (
            known_mistake(scale, {"2/λ is right for the logistic loss only": 2 / lam,
                                  "this is the slope; the scale is 1 over it": 1 / right}))
    logits_K = WEAK.clone().requires_grad_()
    (scale * population_loss(logits_K.log_softmax(0), DATA, WEAK, lam, loss, mu)).backward()
    assert_close(logits_K.grad, WEAK.exp() - DATA.exp(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("loss", [*LOSSES, "quartic"])
def test_slopes_of_a_loss_match_finite_differences(monkeypatch, loss):
    monkeypatch.setitem(LOSSES, "quartic", QUARTIC)
    at = lambda r, s: LOSSES[loss](*torch.tensor([r, s], dtype=torch.float64), 1.5, 2.0).item()
    for r, s, h in ((0.0, 0.0, 1e-5), (-0.4, 0.7, 1e-5), (1.0, -0.2, 1e-5)):
        right = ((at(r + h, s) - at(r - h, s)) / (2 * h), (at(r, s + h) - at(r, s - h)) / (2 * h))
        assert loss_slopes(loss, r, s, 1.5, 2.0) == pytest.approx(right, rel=1e-6, abs=1e-8)


COINS = [{"family": "coin", "prompt": f"Flip a coin with {p}% heads.", "split": "train",
          "responses": {"heads": p / 100, "tails": 1 - p / 100}} for p in (10, 30, 70, 90)]


def test_a_loss_is_added_in_one_line_and_trained_with(monkeypatch, tmp_path, capsys):
    """The flag, its limits, the scale and the figures all follow from the function itself."""
    path, out = tmp_path / "coins.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in COINS), encoding="utf-8")
    flags = ["--loss", "quartic", "--data", str(path), "--out", str(out)]
    with pytest.raises(data.errors.InputError, match="--loss quartic: use one of logistic, "):
        train.main(train.parse_args(train.Config, "", flags))

    monkeypatch.setitem(LOSSES, "quartic", QUARTIC)
    for name in ("draw_convergence", "draw_gif"):
        monkeypatch.setattr(data.run.checkpoint, name, lambda *whatever: b"")
    config = train.parse_args(train.Config, "", flags)
    train.main(replace(config, iters=1, lam=1.0, sft_steps=45, steps=150, sft_lr=4e-3, n_layer=1,
                       n_head=2, n_embd=32, negatives=16, reports=1, warmup=10, device="cpu"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    before, after = [row for row in rows if row["event"] == "iteration"]
    assert after["kl"] < 0.5 * before["kl"], (before, after)
    assert 0 < after["loss"] < 1 and after["margin"] > 0, "against itself the player loses 1"
    assert after["predicted_kl"] is None, "Theorem 5.4 does not give this loss's optimum"


def test_data_distribution_is_a_fixed_point():
    """Theorem 5.2: with p_t = p_data nothing beats staying, and staying costs log 2."""
    for lam in (0.2, 1.0, 5.0):
        logits_K = DATA.clone().requires_grad_()
        loss = population_loss(logits_K.log_softmax(0), DATA, DATA, lam)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
        assert logits_K.grad.abs().max() < 1e-15
        assert population_loss(WEAK, DATA, DATA, lam) > math.log(2)
        best_K, _ = minimise(lambda logp_K: population_loss(logp_K, DATA, DATA, lam), WEAK)
        assert_close(best_K, DATA, atol=1e-6, rtol=0)
        assert_close(optimal_next_policy(DATA, DATA, lam), DATA, atol=1e-14, rtol=0)


@pytest.mark.parametrize("lam", [0.4, 0.5, 0.75, 1.0, 2.0, 5.0])
def test_exact_optimum_is_theorem_5_4(lam):
    best_K, _ = minimise(lambda logp_K: population_loss(logp_K, DATA, WEAK, lam), WEAK)
    assert_close(best_K, optimal_next_policy(DATA, WEAK, lam), atol=1e-6, rtol=0)


def test_optimal_next_policy_is_the_formula_row_by_row():
    data_PK, weak_PK = torch.stack([DATA, WEAK]), torch.stack([WEAK, DATA.flip(0)])
    for lam in (0.3, 1.0, 2.5):
        got_PK = optimal_next_policy(data_PK, weak_PK, lam).exp().tolist()
        for got, data_K, weak_K in zip(got_PK, data_PK.exp().tolist(), weak_PK.exp().tolist()):
            weight = [p * (d / p) ** (1 / lam) for d, p in zip(data_K, weak_K)]
            power = lambda a, b, e: [p * (d / p) ** e for d, p in zip(a, b)]
            normal = lambda weight: [w / sum(weight) for w in weight]
            assert got == pytest.approx(normal(weight), rel=1e-12), (
                f"λ = {lam}: {got}, expected {normal(weight)}" + known_mistake(got, {
                    "the powers do not sum to 1 yet: normalise": weight,
                    "the exponent is 1/λ, not λ": normal(power(data_K, weak_K, lam)),
                    "p_data and p_t have changed places": normal(power(weak_K, data_K, 1 / lam)),
                    "p_t is missing in front": normal(
                        [(d / p) ** (1 / lam) for d, p in zip(data_K, weak_K)])}))


def test_optimal_next_policy_at_the_edge_of_its_support():
    no, half = -math.inf, math.log(0.5)
    data_K, weak_K = torch.tensor([half, half, no]), torch.tensor([0.3, 0.6, 0.1]).log()
    for lam in (0.5, 1.0, 2.0):
        assert optimal_next_policy(data_K, weak_K, lam)[2] == no, "p_data = 0 stays 0"
    assert_close(optimal_next_policy(data_K, data_K, 0.5), data_K)  # 0/0 in the third place
    for opponent_K, lam in ((torch.tensor([half, no, half]), 1.0), (weak_K, 0.0), (weak_K, -1.0)):
        with pytest.raises(ValueError, match="5.4 needs"):
            optimal_next_policy(data_K, opponent_K, lam)


def test_exponential_loss_has_half_the_exponent():
    """p_{t+1} ∝ p_t (p_data/p_t)^{1/(2λ)}."""
    for lam in (0.5, 1.0, 2.0):
        best_K, _ = minimise(
            lambda logp_K: population_loss(logp_K, DATA, WEAK, lam, "exponential"), WEAK)
        expected_K = (WEAK + (DATA - WEAK) / (2 * lam)).log_softmax(0)
        assert_close(best_K, expected_K, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_space_reaches_the_data_in_one_step_whatever_mu(mu):
    best_K, _ = minimise(
        lambda logp_K: population_loss(logp_K, DATA, WEAK, loss="space", mu=mu), WEAK)
    assert_close(best_K, DATA, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_space_asks_of_each_response_alone_whether_it_is_real(mu):
    sigma = lambda m, u: 1 / (1 + m * math.exp(-u))
    r, r_ = [0.7, -1.2, 2.0], [-0.4, 0.9, 1.5]
    value = lambda m, sign=1, weight=mu: [
        -math.log(sigma(m, a)) - weight * math.log(sigma(1 / m, -sign * b)) for a, b in zip(r, r_)]
    got_B = LOSSES["space"](*(torch.tensor(x, dtype=torch.float64) for x in (r, r_)), 7.0, mu)
    assert got_B.tolist() == pytest.approx(value(mu), rel=1e-12), (
        f"{got_B.tolist()}, expected {value(mu)}" + known_mistake(got_B, {
            "μ is missing before the second term": value(mu, weight=1),
            "μ and 1/μ have changed places": value(1 / mu),
            "the generated response should look generated: −r'": value(mu, sign=-1)}))
    far_B = LOSSES["space"](torch.tensor([-1000.0, 0]), torch.tensor([0, 1000.0]), 7.0, mu)
    assert far_B.isfinite().all(), "exp overflows; softplus does not"


def test_losses_of_each_response_alone_see_a_common_shift_and_the_others_cannot():
    for loss in LOSSES:
        value, shifted = (population_loss(DATA - c, DATA, WEAK, 1.0, loss).item() for c in (0, 1))
        sees = loss in ("space", "kliep", "ddo", "sppo")
        assert (abs(value - shifted) > 0.01) == sees, f"{loss}: {value}, {shifted}"


def errors_over_iterations(lam, iterations=6):
    """KL(p_data‖p_t) for t = 0, 1, …, each iteration solved by L-BFGS, not by the theorem."""
    opponent_K, errors = (0.9 * DATA + 0.1 * WEAK).log_softmax(0), []
    for _ in range(iterations):
        errors.append(kl(DATA, opponent_K))
        opponent_K, _ = minimise(
            lambda logp_K: population_loss(logp_K, DATA, opponent_K, lam), opponent_K)
    return errors


def test_self_play_diverges_below_lambda_one_half():
    errors = errors_over_iterations(lam=0.4)
    assert all(after > 1.5 * before for before, after in zip(errors, errors[1:])), errors


def test_self_play_converges_above_lambda_one_half():
    for lam in (0.75, 1.5, 3.0):
        errors = errors_over_iterations(lam)
        assert all(after < 0.6 * before for before, after in zip(errors, errors[1:])), (lam, errors)
    assert errors_over_iterations(lam=1.0)[1] < 1e-12, "λ = 1 arrives in one step"


def test_self_play_at_lambda_one_half_goes_round_in_circles():
    once_K = optimal_next_policy(DATA, WEAK, 0.5)
    assert kl(DATA, once_K) > 0.1
    assert_close(optimal_next_policy(DATA, once_K, 0.5), WEAK, atol=1e-12, rtol=0)


def test_log_error_shrinks_by_one_minus_one_over_lambda():
    """log(p_{t+1}/p_data) = (1 − 1/λ) log(p_t/p_data) + const: the sign flips below λ = 1."""
    for lam in (0.4, 0.75, 1.0, 2.0):
        before_K, after_K = WEAK - DATA, optimal_next_policy(DATA, WEAK, lam) - DATA
        assert_close(after_K - after_K[0], (1 - 1 / lam) * (before_K - before_K[0]),
                     atol=1e-12, rtol=0)


# ---- The floor, and what the loss cannot see ----------------------------------------------------

@pytest.mark.parametrize("lam", [0.5, 1.0, 3.0])
def test_loss_floor_is_the_minimum_whatever_lambda(lam):
    _, minimum = minimise(lambda logp_K: population_loss(logp_K, DATA, WEAK, lam), WEAK)
    assert loss_floor(DATA, WEAK).item() == pytest.approx(minimum, abs=1e-10)


def test_loss_floor_is_log_2_minus_the_jensen_shannon_divergence():
    d, p, jsd = DATA.exp().tolist(), WEAK.exp().tolist(), 0.0
    for y in range(5):
        for z in range(5):
            plus, minus = d[y] * p[z], p[y] * d[z]
            jsd += plus / 2 * math.log(2 * plus / (plus + minus))
            jsd += minus / 2 * math.log(2 * minus / (plus + minus))
    got, right = loss_floor(DATA, WEAK).item(), math.log(2) - jsd
    single = sum(a / 2 * math.log(2 * a / (a + b)) + b / 2 * math.log(2 * b / (a + b))
                 for a, b in zip(d, p))
    assert got == pytest.approx(right, abs=1e-14), f"{got}, expected {right}" + known_mistake(got, {
        "log 2 is missing": -jsd, "subtract the divergence": math.log(2) + jsd,
        "this is the divergence alone": jsd,
        "p₊ and p₋ are over pairs (y, y'), not over responses": math.log(2) - single})
    batch_P = loss_floor(torch.stack([DATA, DATA]), torch.stack([WEAK, DATA]))
    assert batch_P.tolist() == pytest.approx([math.log(2) - jsd, math.log(2)], abs=1e-14)


def test_loss_floor_rises_to_log_2_as_the_opponent_improves():
    floors = [loss_floor(DATA, ((1 - s) * WEAK + s * DATA).log_softmax(0)).item()
              for s in (0, 0.25, 0.5, 0.75, 1)]
    assert floors == sorted(floors) and floors[0] < floors[-1] - 0.05
    assert floors[-1] == pytest.approx(math.log(2), abs=1e-14)


def test_loss_floor_may_leave_out_what_the_data_never_says():
    data_K = torch.tensor([0.7, 0.3, 0.0, 0.0], dtype=torch.float64).log()
    weak_K = torch.tensor([0.2, 0.1, 0.4, 0.3], dtype=torch.float64).log()
    whole, part = loss_floor(data_K, weak_K).item(), loss_floor(data_K[:2], weak_K[:2]).item()
    assert whole == pytest.approx(part, abs=1e-15)
    d, p = [0.7, 0.3], [0.2, 0.1]
    by_hand = sum(d[y] * p[z] * math.log(1 + p[y] * d[z] / (d[y] * p[z]))
                  for y in range(2) for z in range(2))  # all other pairs add nothing
    assert whole == pytest.approx(by_hand, abs=1e-14)


ONE_PROMPT = torch.zeros(5, dtype=torch.long)


def test_mass_anchor_is_zero_at_theorem_5_4_optimum():
    for lam in (0.5, 1.0, 3.0):
        best_K = optimal_next_policy(DATA, WEAK, lam).requires_grad_()
        anchor = mass_anchor(best_K, WEAK, WEAK, ONE_PROMPT)
        anchor.backward()
        assert anchor.item() < 1e-25 and best_K.grad.abs().max() < 1e-12


def test_mass_anchor_resists_a_common_downward_shift():
    """c (1 − e^−c), whose slope in the shift −c is −(1 − e^−c) − c e^−c: it pushes back up.

    Also where c is large, where the slope of (1 − e^−c)² would be 2 e^−c, next to nothing.
    """
    for c in (0.1, 1.0, 30.0):
        shift = torch.tensor(-c, dtype=torch.float64, requires_grad=True)
        anchor = mass_anchor(DATA + shift, WEAK, WEAK, ONE_PROMPT)
        anchor.backward()
        assert anchor.item() == pytest.approx(c * (1 - math.exp(-c)), rel=1e-12)
        slope = -(1 - math.exp(-c)) - c * math.exp(-c)
        assert shift.grad.item() == pytest.approx(slope, rel=1e-12)


def test_mass_anchor_looks_at_each_prompt_and_at_shortfalls_only():
    """A leak at one prompt is not made good by an excess at another, nor is an excess punished."""
    share_N, prompt_N = torch.tensor([0.25, 0.75, 0.5, 0.5]), torch.tensor([0, 0, 1, 1])
    ratio_N = torch.tensor([0.4, 0.8, 9.0, 1.0])
    anchor = mass_anchor(ratio_N.log(), torch.zeros(4), share_N.log(), prompt_N)
    m = 0.25 * 0.4 + 0.75 * 0.8  # at the other prompt 5, which counts as 1
    assert anchor.item() == pytest.approx((1 - m) * math.log(1 / m) / 2, rel=1e-5)


HALF = math.log(0.5)


@pytest.mark.parametrize("policy, opponent, log_share, why", [
    ([-1.0, -5.0], [-120.0, -5.0], [-math.inf, 0.0], "exp(119) overflows, but its share is 0"),
    ([-1.0, -5.0], [-95.0, -5.0], [-95.0, 0.0], "exp(94) overflows, and its share all but does"),
    ([-0.5, -40.0], [-700.0, -2.0], [-700.0, 0.0], "no float holds such a share, but its log"),
    ([-3.0, -5.0], [-3.0, -1e4], [-90.0, 0.0], "exp(9995) overflows even a float64"),
    ([-1e4, -5.0], [-3.0, -4.0], [HALF, HALF], "exp(−9997) is 0"),
    ([-1e4, -2e4], [-3.0, -4.0], [HALF, HALF], "all ratios are 0: a leak of 10⁴ nats")])
def test_mass_anchor_is_finite_where_the_ratio_is_not(policy, opponent, log_share, why):
    """Value and gradient, against log m written out in exact logarithms."""
    policy_N = torch.tensor(policy, requires_grad=True)
    anchor = mass_anchor(policy_N, torch.tensor(opponent), torch.tensor(log_share),
                         torch.zeros(2, dtype=torch.long))
    anchor.backward()
    terms = [w - b + a for w, a, b in zip(log_share, policy, opponent)]
    log_m = max(terms) + math.log(sum(math.exp(x - max(terms)) for x in terms))
    right = -(1 - math.exp(log_m)) * log_m if log_m < 0 else 0.0
    assert anchor.item() == pytest.approx(right, rel=1e-5, abs=1e-6), why
    slope = math.exp(log_m) * log_m - (1 - math.exp(log_m)) if log_m < 0 else 0.0
    expected = [slope * math.exp(term - log_m) for term in terms]
    assert policy_N.grad.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6), why


def test_mass_anchor_is_zero_wherever_the_mass_is_one_or_more():
    for m in (1.0, 1.5, 1e30):
        policy_N = torch.tensor([math.log(m)] * 2, requires_grad=True)
        anchor = mass_anchor(policy_N, torch.zeros(2), torch.tensor([HALF, HALF]),
                             torch.zeros(2, dtype=torch.long))
        anchor.backward()
        assert anchor.item() == 0 and policy_N.grad.tolist() == [0, 0], m


def test_mass_anchor_is_a_mean_over_all_prompts_of_the_batch():
    """Over P of them: in the last ones no response may have a share."""
    one = torch.tensor([-1.0])
    zero_N, prompt_N = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    alone = mass_anchor(one, zero_N, zero_N, prompt_N).item()
    assert alone == pytest.approx(1 - math.exp(-1), rel=1e-6)
    both = mass_anchor(torch.tensor([-1.0, 0.0]), torch.zeros(2), torch.zeros(2),
                       torch.tensor([0, 1]), P=2).item()
    assert both == pytest.approx(alone / 2, rel=1e-6)


@pytest.mark.parametrize("module, examples", [
    (spin_module, 4), (data.tokenizer, 1), (model_module, 1), (conftest, 1), (data.responses, 8),
    (data.metrics, 2)], ids=lambda x: getattr(x, "__name__", ""))
def test_worked_examples_in_docstrings_are_true(module, examples):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= examples
