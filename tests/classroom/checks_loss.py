"""Claims about spin_loss.py: log-probabilities, loss, anchor, theory, the fused kernel."""
import math
from types import SimpleNamespace

import torch

from classroom.checks import (GRAD, Broken, claim, dice, expect, flat, log_shares, plain, require,
                              require_gradient, require_value_error, stand_in, table, tensor)

# --- token_logps ---------------------------------------------------------------------------------

TOKEN = "spin_loss.token_logps"


@stand_in
def fused_token_logps(hidden_ND, weight_VD, targets_N):
    """Stands for the fused kernel: a value that shows what it was given."""
    return 100 * hidden_ND[:, 0] + targets_N + len(weight_VD) / 1000


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def log_p(logits, target):
    top = max(logits)
    return logits[target] - top - math.log(sum(math.exp(z - top) for z in logits))


def check_token(got, hidden, weight, targets, rows=None):
    rows = range(len(targets)) if rows is None else rows
    logits = [[dot(hidden[row], w) for w in weight] for row in rows]
    right = [log_p(z, y) for z, y in zip(logits, targets)]
    expect(got, right, [
        ("this is the logit itself; subtract log Σ exp z", [z[y] for z, y in zip(logits, targets)]),
        ("this is the probability; its logarithm is asked for", [math.exp(x) for x in right]),
        ("the sign is wrong: log p is negative, −log p is a loss", [-x for x in right]),
        ("this is log₂ p; nats are asked for, the natural logarithm",
         [x / math.log(2) for x in right]),
        ("softmax and log_softmax were both applied", [log_p([math.exp(log_p(z, u))
                                                              for u in range(len(z))], y)
                                                       for z, y in zip(logits, targets)]),
        ("these are all tokens' log-probabilities; pick that of the target",
         [[log_p(z, u) for u in range(len(z))] for z in logits]),
        ("every state is scored for every target: [N, N]; pick one target a state",
         [[log_p(z, y) for y in targets] for z in logits]),
        ("the softmax runs over the tokens of the batch, dim=0; it belongs over the vocabulary",
         [log_p(list(column), n) for column, n in
          ((list(zip(*logits))[y], n) for n, y in enumerate(targets))]),
        ("rows_N is ignored: target n belongs to hidden_ND[rows_N[n]]",
         [log_p([dot(hidden[n % len(hidden)], w) for w in weight], y)
          for n, y in enumerate(targets)]),
        ("this is the mean", sum(right) / len(right)),
        ("this is the mean of −log p", -sum(right) / len(right)),
    ], "the result")


def token_case(name, N=6, V=5, D=3):
    rng = dice(name)
    return table(rng, N, D), table(rng, V, D), [rng.randrange(V) for _ in range(N)]


@claim(TOKEN)
def log_p_is_the_logit_minus_log_sum_exp(m):
    hidden, weight, targets = token_case("softmax")
    got = m.token_logps(tensor(hidden), tensor(weight), torch.tensor(targets))
    check_token(got, hidden, weight, targets)


@claim(TOKEN)
def large_logits_do_not_overflow(m):
    got = m.token_logps(tensor([[1000.0]]), tensor([[1.0], [-1.0]]), torch.tensor([1]))
    value = plain(got)[0][0]
    require(value == -2000, f"logits of ±1000 give {value}, expected −2000: exp overflows; "
            f"subtract the largest logit first, as log_softmax does")


@claim(TOKEN)
def several_targets_may_share_one_state(m):
    hidden, weight, _ = token_case("rows", N=3)
    targets, rows = [4, 0, 2, 1, 3], [2, 0, 0, 1, 2]
    got = m.token_logps(tensor(hidden), tensor(weight), torch.tensor(targets),
                        rows_N=torch.tensor(rows))
    check_token(got, hidden, weight, targets, rows)


@claim(TOKEN)
def the_result_is_float32_and_exact(m):
    """bfloat16 inputs give float32; under autocast the logits of float32 inputs stay float32."""
    hidden, weight, targets = token_case("dtype")
    y = torch.tensor(targets)
    half = m.token_logps(tensor(hidden, dtype=torch.bfloat16), tensor(weight, dtype=torch.bfloat16),
                         y)
    plain(half)
    require(half.dtype == torch.float32, f"bfloat16 inputs give {half.dtype}, expected "
            f"torch.float32: sums of many small log-probs need it")
    right = [log_p([dot(h, w) for w in weight], t) for h, t in zip(hidden, targets)]
    with torch.autocast("cpu", torch.bfloat16):
        got = m.token_logps(tensor(hidden), tensor(weight), y)
    expect(got.float(), right, what="under autocast the product was made in bfloat16: log p",
           tolerance=1e-5)


@claim(TOKEN)
def gradients_reach_states_and_weights(m):
    hidden, weight, targets = token_case("gradient")
    h, w = tensor(hidden, grad=True), tensor(weight, grad=True)
    grad_h, _ = require_gradient(m.token_logps(h, w, torch.tensor(targets)), h, w)
    right = []
    for x, y in zip(hidden, targets):
        logits = [dot(x, row) for row in weight]
        p = [math.exp(log_p(logits, v)) for v in range(len(weight))]
        right.append([weight[y][d] - sum(a * row[d] for a, row in zip(p, weight))
                      for d in range(3)])
    expect(grad_h, right, what="the gradient of the states")


@claim(TOKEN)
def fused_and_unknown_names(m):
    """impl "fused" is fused_token_logps, on the chosen rows; any other name is a ValueError."""
    hidden, weight, targets = token_case("fused")
    args = tensor(hidden), tensor(weight), torch.tensor(targets)
    expect(m.token_logps(*args, impl="fused"), [100 * h[0] + y + 0.005
                                                for h, y in zip(hidden, targets)],
           what='with impl="fused" the value of fused_token_logps')
    rows = [5, 1, 1, 0, 2, 3]
    expect(m.token_logps(*args, "fused", torch.tensor(rows)),
           [100 * hidden[r][0] + y + 0.005 for r, y in zip(rows, targets)],
           {"impl=\"fused\" ignores rows_N": [100 * h[0] + y + 0.005
                                              for h, y in zip(hidden, targets)]},
           'with impl="fused" and rows_N the value of fused_token_logps')
    require_value_error(lambda: m.token_logps(*args, impl="quick"), "quick",
                        'impl="quick" is accepted; an unknown name must raise ValueError')


# --- sequence_logps ------------------------------------------------------------------------------

SEQUENCE = "spin_loss.sequence_logps"
END = 3
CHAIN = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.4, 0.05, 0.3], [0.6, 0.1, 0.1, 0.2], [0.2, 0.3, 0.4, 0.1]]


@stand_in
def token_logps(hidden_ND, weight_VD, targets_N, impl="eager", rows_N=None):
    """Stands for token_logps where a hidden state is a one-hot token, or holds [token, …]."""
    rows = range(len(targets_N)) if rows_N is None else rows_N.tolist()
    token_logps.impls.append(impl)
    states = [hidden_ND[row].argmax() for row in rows]
    found = [weight_VD[target, state] for target, state in zip(targets_N, states)]
    return torch.stack(found) if found else hidden_ND.sum(1)


class MarkovChain:
    """A model whose next token depends on the last one alone: p(v after u) = table[u][v]."""
    def __init__(self, table):
        self.head_weight = tensor(table).log().T.clone().requires_grad_()

    def hidden(self, tokens_BT, cache=None):
        return torch.nn.functional.one_hot(tokens_BT, len(self.head_weight)).float()

    def __call__(self, tokens_BT, cache=None):
        return self.hidden(tokens_BT) @ self.head_weight.T


def sequence(m, rows, table=CHAIN, impl="eager"):
    """sequence_logps of rows (prompt, response, padding)."""
    token_logps.impls = []
    tokens = [prompt + response + padding for prompt, response, padding in rows]
    scored = [[False] * len(prompt) + [True] * len(response) + [False] * len(padding)
              for prompt, response, padding in rows]
    return m.sequence_logps(MarkovChain(table), torch.tensor(tokens), torch.tensor(scored), impl)


def check_sequence(m, rows):
    got = sequence(m, rows)
    right, step = [], lambda u, v: math.log(CHAIN[u][v])
    steps = lambda tokens: sum(step(u, v) for u, v in zip(tokens, tokens[1:]))
    variants = {}
    for x, y, pad in rows:
        whole, value = x + y + pad, steps(x[-1:] + y)
        right.append(value)
        for words, wrong in {
                "each token is scored by the logits that have read it; those before it predict it":
                    sum(step(v, v) for v in y),
                "the tokens are shifted the wrong way: the logits at position i score token i+1":
                    sum(step(v, u) for u, v in zip(y, (y + pad)[1:])),
                "this is the mean over tokens; the log-probability of a response is the sum":
                    value / len(y),
                "the prompt is scored too": steps(x + y),
                "the padding is scored too": steps(x[-1:] + y + pad),
                "prompt and padding are scored too: the mask is not used": steps(whole),
                "the mask is inverted: this is all but the response": steps(whole) - value,
                "END is not scored: without it long responses look as likely as short ones":
                    value - step((x + y)[-2], y[-1]),
                "END is scored twice": value + step((x + y)[-2], y[-1]),
                "the first token of the response is not scored: shift the mask as you shift the "
                "targets": value - step(x[-1], y[0]),
                "this is the probability; its logarithm is asked for": math.exp(value),
                "the sign is wrong: log p is negative": -value,
                "the mask was not shifted: it must stand with the targets, not with the inputs":
                    steps(y + pad[:1])}.items():
            variants.setdefault(words, []).append(wrong)
    mean, total = sum(right) / len(right), sum(right)
    pairs = [*variants.items(), ("this is one number for the whole batch; one for each row is "
                                 "asked for", total), ("this is the mean over the batch", mean),
             ("each token's log-probability; their sum over the response is asked for",
              [step(u, v) for x, y, _ in rows for u, v in zip(x[-1:] + y, y)])]
    expect(got, right, pairs, "the result")


@claim(SEQUENCE)
def a_token_is_scored_by_the_logits_before_it(m):
    check_sequence(m, [([0, 2], [1, 2, END], [])])


@claim(SEQUENCE)
def it_is_the_sum_over_the_response_not_a_mean(m):
    for n in (1, 2, 5):
        check_sequence(m, [([0], [1] * n + [END], [])])


@claim(SEQUENCE)
def prompt_and_padding_are_not_scored(m):
    check_sequence(m, [([0, 1, 2], [1, 0, END], [0, 1])])
    check_sequence(m, [([2], [0, 2, END], [1, 2])])


@claim(SEQUENCE)
def end_is_scored_once(m):
    check_sequence(m, [([0], [END], [0]), ([1], [END], [0])])


@claim(SEQUENCE)
def each_row_gets_its_own_sum(m):
    check_sequence(m, [([0, 1, 2], [2, END], [0, 0]), ([1], [0, 1, 2, 0, 2, END], []),
                       ([2, 2], [1, 0, END], [0, 0])])


@claim(SEQUENCE)
def the_implementation_is_passed_on_and_a_gradient_flows(m):
    rows = [([0, 1], [2, END], [])]
    sequence(m, rows, impl="fused")
    require(token_logps.impls and set(token_logps.impls) == {"fused"},
            'token_logps was not given impl="fused", which sequence_logps was called with')
    model = MarkovChain(CHAIN)
    got = m.sequence_logps(model, torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]]))
    require_gradient(got, model.head_weight)


# --- spin_loss -----------------------------------------------------------------------------------

SPIN = "spin_loss.spin_loss"
SOFTPLUS = lambda u: math.log1p(math.exp(-abs(u))) + max(u, 0)


def spin(m, four, lam, **how):
    return m.spin_loss(*map(tensor, four), lam, **how)


def pairs_of_four(name, B=5):
    rng = dice(name)
    return [table(rng, B, low=-9, high=-1) for _ in range(4)]


def check_spin(m, four, lam, ell=lambda u: SOFTPLUS(-u), **how):
    each = lambda rule: [ell(rule(*values)) for values in zip(*four)]
    right = each(lambda p, g, op, og: lam * ((p - op) - (g - og)))
    expect(spin(m, four, lam, **how), right, [
        ("the margin has the wrong sign: real and generated are exchanged, or a log-ratio is "
         "upside down (it is log p_θ − log p_t)",
         each(lambda p, g, op, og: lam * ((g - og) - (p - op)))),
        ("λ is missing", each(lambda p, g, op, og: (p - op) - (g - og))),
        ("λ multiplies the first log-ratio only",
         each(lambda p, g, op, og: lam * (p - op) - (g - og))),
        ("λ multiplies the second log-ratio only",
         each(lambda p, g, op, og: (p - op) - lam * (g - og))),
        ("λ is applied twice: LOSSES multiplies by it already",
         each(lambda p, g, op, og: lam * lam * ((p - op) - (g - og)))),
        ("the opponent is left out", each(lambda p, g, op, og: lam * (p - g))),
        ("the opponent's two log-probs are exchanged, or added where a ratio needs a difference",
         each(lambda p, g, op, og: lam * ((p - og) - (g - op)))),
        ("the two log-ratios are added; their difference is asked for",
         each(lambda p, g, op, og: lam * ((p - op) + (g - og)))),
        ("this is the mean over the batch; one loss a pair is asked for", sum(right) / len(right)),
        ("this is the sum over the batch; one loss a pair is asked for", sum(right)),
        ("the sign of the loss is wrong", [-x for x in right]),
        ("this is the loss called logistic; `loss` is not used",
         [SOFTPLUS(-lam * ((p - op) - (g - og))) for p, g, op, og in zip(*four)]),
        ("these are log-ratios of probabilities where LOSSES wants log-ratios",
         each(lambda p, g, op, og: lam * (math.exp(p - op) - math.exp(g - og)))),
    ], "the loss")


@claim(SPIN)
def the_loss_is_its_formula(m):
    for lam in (0.1, 2.0, 3.0):
        check_spin(m, pairs_of_four("formula"), lam)


@claim(SPIN)
def it_is_log_2_when_the_player_is_the_opponent(m):
    real, generated = (table(dice(name), 3, low=-9, high=-1) for name in ("same", "too"))
    got = spin(m, (real, generated, real, generated), 5.0)
    expect(got, [math.log(2)] * 3, {
        "the opponent is left out: both log-ratios should be 0 here":
            [SOFTPLUS(-5 * (p - g)) for p, g in zip(real, generated)],
        "0 instead of log 2: ℓ(0) = log(1 + e^0)": [0.0] * 3}, "the loss")


@claim(SPIN)
def every_loss_in_the_table_can_be_chosen(m):
    four = pairs_of_four("others")
    for name, ell in (("hinge", lambda u: max(0, 1 - u)), ("exponential", lambda u: math.exp(-u)),
                      ("correlation", lambda u: 1 - u)):
        check_spin(m, four, 0.3, ell, loss=name)


@claim(SPIN)
def losses_get_r_s_lambda_and_mu(m):
    """Whatever stands in LOSSES is called with the two log-ratios, λ and μ."""
    m.LOSSES["mine"] = lambda r, s, lam, mu: 1000 * r + s + 10_000 * lam + 100_000 * mu
    four = [[-1.0, -2.0], [-3.0, -5.0], [-1.5, -2.25], [-3.5, -5.0]]
    say = lambda r, s, lam, mu: [1000 * a + b + 10_000 * lam + 100_000 * mu for a, b in zip(r, s)]
    r, s, none = [0.5, 0.25], [0.5, 0.0], [0.0, 0.0]
    expect(spin(m, four, 2.0, loss="mine", mu=3.0), say(r, s, 2, 3), {
        "μ is not passed on": say(r, s, 2, 1), "λ is not passed on": say(r, s, 1, 3),
        "r and s are exchanged": say(s, r, 2, 3), "r − s is passed where r is asked for":
            say([a - b for a, b in zip(r, s)], none, 2, 3),
        "the log-ratios are upside down: it is log p_θ − log p_t":
            say([-a for a in r], [-b for b in s], 2, 3),
        "log-probs are added where a ratio needs their difference":
            say([-2.5, -4.25], [-6.5, -10.0], 2, 3),
        "the opponent's two log-probs are exchanged": say([2.5, 3.0], [-1.5, -2.75], 2, 3),
        "λ r and λ s are passed; LOSSES multiplies by λ itself":
            say([2 * x for x in r], [2 * x for x in s], 2, 3)},
        "a new entry of LOSSES, called through spin_loss,")


@claim(SPIN)
def an_unknown_name_is_refused(m):
    four = pairs_of_four("unknown")
    check_spin(m, four, 1.0)
    try:
        require_value_error(lambda: spin(m, four, 1.0, loss="focal"), "focal",
                            'loss="focal" is accepted; an unknown name must raise ValueError')
    except KeyError:
        raise Broken('loss="focal" ends in KeyError; a ValueError that names it is asked '
                     'for') from None


@claim(SPIN)
def the_gradient_pushes_the_real_response_up_and_the_generated_one_down(m):
    four = [tensor(x, grad=True) for x in pairs_of_four("push")]
    real, generated = require_gradient(m.spin_loss(*four, 2.0), *four[:2],
                                       words="no gradient reaches the player's log-probs")
    require(max(plain(real)[0]) < 0 < min(plain(generated)[0]),
            "the loss should fall as log p_θ(y) rises, and rise with log p_θ(y'); yours does not")


# --- mass_anchor ---------------------------------------------------------------------------------

ANCHOR = "spin_loss.mass_anchor"


def leak(m, cap=True):
    capped = min(1, m) if cap else m
    return (1 - capped) * -math.log(capped)


def masses(policy, opponent, share, prompt, ratio=lambda p, o: math.exp(p - o)):
    found = [0.0] * (max(prompt) + 1)
    for p, o, s, x in zip(policy, opponent, share, prompt):
        found[x] += s * ratio(p, o)
    return found


def check_anchor(m, policy, opponent, share, prompt):
    got = m.mass_anchor(tensor(policy), tensor(opponent), tensor(share).log(),
                        torch.tensor(prompt))
    case, P = (policy, opponent, share, prompt), max(prompt) + 1
    each = [leak(x) for x in masses(*case)]
    count = [prompt.count(x) for x in prompt]
    whole = sum(masses(*case)) / P
    right = sum(each) / P
    expect(got, right, [
        ("this is the sum over prompts; their mean is asked for", sum(each)),
        ("one number for each prompt; their mean is asked for", each),
        ("m > 1 is punished too: m = min(1, …)", sum(leak(x, False) for x in masses(*case)) / P),
        ("this is (1 − m)²; (1 − m) log 1/m is asked for",
         sum((1 - min(1, x)) ** 2 for x in masses(*case)) / P),
        ("this is log 1/m; the factor 1 − m is missing",
         sum(-math.log(min(1, x)) for x in masses(*case)) / P),
        ("this is 1 − m; the factor log 1/m is missing",
         sum(1 - min(1, x) for x in masses(*case)) / P),
        ("the sign is wrong: log 1/m = −log m", -right),
        ("the ratio is upside down: it is p_θ/p_t", sum(leak(x) for x in masses(
            *case, ratio=lambda p, o: math.exp(o - p))) / P),
        ("the opponent is left out: the ratio is p_θ/p_t", sum(leak(x) for x in masses(
            *case, ratio=lambda p, o: math.exp(p))) / P),
        ("the shares are not used: m is a mean weighted by the shares", sum(leak(x) for x in masses(
            policy, opponent, [1 / c for c in count], prompt)) / P),
        ("the shares are not used: m is a mean weighted by the shares", sum(leak(x) for x in masses(
            policy, opponent, [1.0] * len(share), prompt)) / P),
        ("all prompts are taken together: each prompt has its own m", leak(whole)),
        ("all prompts are taken together, and not averaged: each prompt has its own m",
         leak(whole * P)),
        ("the mean of log-ratios is used; m is the mean of the ratios", sum(
            leak(math.exp(x)) for x in masses(*case, ratio=lambda p, o: p - o)) / P),
        ("the mean runs over responses; it should run over prompts",
         sum(each[x] for x in prompt) / len(prompt)),
        ("it is always 0", 0.0),
    ], "the anchor")


@claim(ANCHOR)
def it_is_its_formula(m):
    rng = dice("anchor")
    opponent = table(rng, 6, low=-4, high=-1)
    policy = [x - rng.uniform(0.3, 2) for x in opponent]
    check_anchor(m, policy, opponent, [0.2, 0.8, 0.5, 0.1, 0.4, 1.0], [0, 0, 1, 1, 1, 2])


@claim(ANCHOR)
def it_is_zero_where_nothing_leaks(m):
    """The mean of p_θ/p_t over y' ~ p_t is Σ p_θ = 1 when both are normalised."""
    opponent, policy = log_shares(dice("o"), 4), log_shares(dice("p"), 4)
    got = m.mass_anchor(tensor(policy), tensor(opponent), tensor(opponent), torch.tensor([0] * 4))
    expect(got, 0.0, {"p_t/p_θ is averaged; it is p_θ/p_t": leak(sum(
        math.exp(2 * o - p) for o, p in zip(opponent, policy)))}, "the anchor without a leak",
        tolerance=1e-5)
    policy = [x - 1 for x in policy]
    leaking = m.mass_anchor(tensor(policy), tensor(opponent), tensor(opponent),
                            torch.tensor([0] * 4))
    expect(leaking, 1 - math.exp(-1), what="the anchor after every log p_θ has fallen by 1")


@claim(ANCHOR)
def an_excess_is_free_and_each_prompt_counts_alone(m):
    """m = 2 in one prompt does not make up for m = ½ in another."""
    low, high = math.log(0.5), math.log(2)
    check_anchor(m, [-2 + low, -3 + low, -1 + high], [-2.0, -3.0, -1.0], [0.5, 0.5, 1.0], [0, 0, 1])


@claim(ANCHOR)
def prompts_may_come_in_any_order(m):
    check_anchor(m, [-3.0, -4.0, -2.5, -6.0], [-2.0, -3.5, -2.0, -4.0], [0.3, 1.0, 0.7, 1.0],
                 [1, 0, 1, 2])


@claim(ANCHOR)
def huge_and_tiny_ratios_stay_finite(m):
    for shift, right in ((-200.0, (1 - math.exp(-200)) * 200), (200.0, 0.0)):
        policy = tensor([-5.0 + shift, -6.0 + shift], grad=True)
        got = m.mass_anchor(policy, tensor([-5.0, -6.0]), tensor([0.5, 0.5]).log(),
                            torch.tensor([0, 0]))
        value = plain(got)[0]
        require(math.isfinite(value), f"a ratio of e^{shift:g} gives {value}: use logarithms, with "
                f"the largest term taken out, before any exp")
        expect(value, right, {"below some m the anchor no longer grows: do not clamp m from below":
                              value if 0 < value < right else math.nan},
               f"the anchor at a ratio of e^{shift:g}", tolerance=1e-3)
        gradient, = GRAD(got, policy)
        require(all(map(math.isfinite, flat(plain(gradient)[0]))),
                f"the gradient at a ratio of e^{shift:g} is not finite")


@claim(ANCHOR)
def the_gradient_lifts_what_has_leaked(m):
    policy = tensor([-3.0, -2.5], grad=True)
    got = m.mass_anchor(policy, tensor([-2.0, -2.0]), tensor([0.5, 0.5]).log(),
                        torch.tensor([0, 0]))
    gradient, = require_gradient(got, policy)
    require(max(plain(gradient)[0]) < 0, "raising log p_θ of a response should lower the anchor "
            "where m < 1; yours rises")


# --- optimal_next_policy -------------------------------------------------------------------------

THEOREM = "spin_loss.optimal_next_policy"


def normalised(scores):
    top = max(scores)
    total = top + math.log(sum(math.exp(s - top) for s in scores))
    return [s - total for s in scores]


def check_theorem(m, data, opponent, lam):
    rows = list(zip(data, opponent))
    each = lambda rule: [normalised([rule(d, o) for d, o in zip(*row)]) for row in rows]
    score = lambda d, o: o + (d - o) / lam
    right = each(score)
    expect(m.optimal_next_policy(tensor(data), tensor(opponent), lam), right, [
        ("the two factors are exchanged: p_data gets 1/λ, p_t gets 1 − 1/λ",
         each(lambda d, o: (1 - 1 / lam) * d + o / lam)),
        ("the exponent is 1/λ, not λ", each(lambda d, o: o + (d - o) * lam)),
        ("it is not normalised: Σ p_{t+1} must be 1", [[score(d, o) for d, o in zip(*row)]
                                                       for row in rows]),
        ("these are probabilities; their logarithms are asked for",
         [[math.exp(x) for x in row] for row in right]),
        ("the ratio is upside down: it is p_data/p_t", each(lambda d, o: o - (d - o) / lam)),
        ("p_t is missing before the ratio", each(lambda d, o: (d - o) / lam)),
        ("this is p_data: λ is not used", each(lambda d, o: d)),
        ("this is p_data^{1/λ} alone", each(lambda d, o: d / lam)),
        ("p_t keeps its whole weight: collect what stands before log p_t, 1 − 1/λ",
         each(lambda d, o: o + d / lam)),
        ("it is normalised over the first axis; it should be over the last",
         [list(row) for row in zip(*(normalised([score(*pair) for pair in zip(*column)])
                                     for column in zip(*(list(zip(*row)) for row in rows))
                                     for column in [list(zip(*column))]))]),
    ], "log p_{t+1}")


@claim(THEOREM)
def it_is_the_formula_in_logarithms(m):
    for lam in (0.7, 2.0, 5.0):
        check_theorem(m, [log_shares(dice("d"), 5)], [log_shares(dice("o"), 5)], lam)


@claim(THEOREM)
def lambda_1_arrives_at_p_data(m):
    data = log_shares(dice("one"), 4)
    got = m.optimal_next_policy(tensor(data), tensor(log_shares(dice("two"), 4)), 1.0)
    expect(got, data, what="with λ = 1 log p_{t+1}")


@claim(THEOREM)
def each_row_is_normalised_by_itself(m):
    rng = dice("batch")
    check_theorem(m, [log_shares(rng, 4) for _ in "abc"], [log_shares(rng, 4) for _ in "abc"], 2.0)


@claim(THEOREM)
def no_policy_has_a_lower_loss(m):
    """The slope of Σ p_data(y) p_t(y') ℓ(λ(r(y) − r(y'))) is 0 there, in each log p."""
    data, opponent, lam = log_shares(dice("slope"), 4), log_shares(dice("slopes"), 4), 1.7
    got = plain(m.optimal_next_policy(tensor(data, dtype=torch.float64),
                                      tensor(opponent, dtype=torch.float64), lam))[0]
    require(len(got) == 4, f"the result has {len(got)} entries, expected 4")
    ratio = [g - o for g, o in zip(got, opponent)]
    slopes = [0.0] * 4
    for y in range(4):
        for z in range(4):
            weight = math.exp(data[y] + opponent[z])
            slope = -lam / (1 + math.exp(lam * (ratio[y] - ratio[z])))
            slopes[y] += weight * slope
            slopes[z] -= weight * slope
    require(max(map(abs, slopes)) < 1e-6, f"a policy near yours has a lower loss: the slope in log "
            f"p_{{t+1}} of response {1 + max(range(4), key=lambda y: abs(slopes[y]))} is "
            f"{max(slopes, key=abs):.3f}, at an optimum it is 0")


@claim(THEOREM)
def where_p_data_is_zero_so_is_the_result(m):
    data = [math.log(0.75), math.log(0.25), -math.inf, -math.inf]
    for lam in (0.5, 1.0, 2.0):
        opponent = [math.log(0.25), math.log(0.25), math.log(0.5), -math.inf]
        got = plain(m.optimal_next_policy(tensor(data), tensor(opponent), lam))[0]
        require(not any(map(math.isnan, flat(got))),
                f"NaN for p_data = 0 (λ = {lam}): −inf · 0 or inf − inf; put −inf there before you "
                f"normalise")
        expect(got, normalised([math.log(0.25) + math.log(p / 0.25) / lam for p in (0.75, 0.25)])
               + [-math.inf] * 2, what="log p_{t+1} where p_data is 0 in places")


@claim(THEOREM)
def what_the_theorem_excludes_is_refused(m):
    half = [math.log(0.5)] * 2
    check_theorem(m, [half], [half], 2.0)
    for lam in (0.0, -1.0):
        try:
            require_value_error(lambda: m.optimal_next_policy(tensor(half), tensor(half), lam), "",
                                f"λ = {lam:g} is accepted; it must raise ValueError")
        except ZeroDivisionError:
            raise Broken("λ = 0 ends in ZeroDivisionError; a ValueError is asked for") from None
    require_value_error(
        lambda: m.optimal_next_policy(tensor(half), tensor([0.0, -math.inf]), 2.0), "",
        "p_t = 0 where p_data > 0 is accepted; it must raise ValueError")


# --- loss_floor ----------------------------------------------------------------------------------

FLOOR = "spin_loss.loss_floor"


def divergence(plus, minus):
    """JSD of two distributions, in nats, summed over their common support."""
    total = 0.0
    for p, q in zip(plus, minus):
        middle = (p + q) / 2
        total += sum(x * math.log(x / middle) for x in (p, q) if x > 0) / 2
    return total


def relative(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0 and b > 0)


def check_floor(m, data, opponent):
    p, q = [math.exp(x) for x in data], [math.exp(x) for x in opponent]
    K = range(len(p))
    plus, minus = [p[y] * q[z] for y in K for z in K], [q[y] * p[z] for y in K for z in K]
    right = sum(a * math.log1p(b / a) for a, b in zip(plus, minus) if a > 0)
    jsd, log2 = divergence(plus, minus), math.log(2)
    expect(m.loss_floor(tensor(data, dtype=torch.float64), tensor(opponent, dtype=torch.float64)),
           right, [
        ("this is the JSD itself; the floor is log 2 − JSD", jsd),
        ("this is log 2 + JSD; subtract it", log2 + jsd),
        ("this is log 2 − 2 JSD: the JSD is half the sum of the two KLs", log2 - 2 * jsd),
        ("this is the JSD of p_data and p_t; p₊ and p₋ are distributions of pairs (y, y')",
         log2 - divergence(p, q)),
        ("a KL(p₊‖p₋) stands where the JSD belongs", log2 - relative(plus, minus)),
        ("only the KL of p₊ to the middle is taken, doubled", log2 - 2 * relative(
            plus, [(a + b) / 2 for a, b in zip(plus, minus)])),
        ("this is in bits; nats are asked for", right / log2),
        ("log 2 is missing: this is −JSD", -jsd),
        ("the mean over pairs; a sum weighted by p₊ is asked for", right / len(plus)),
        ("p₊ and p₋ are exchanged within the logarithm: it is log(1 + p₋/p₊)", sum(
            a * math.log1p(a / b) for a, b in zip(plus, minus) if b > 0)),
        ("it is always log 2: your p₊ and p₋ are the same", log2),
        ("the sign is wrong", -right),
    ], "the floor")


@claim(FLOOR)
def it_is_log_2_minus_the_jensen_shannon_divergence_of_pairs(m):
    check_floor(m, log_shares(dice("floor"), 5), log_shares(dice("floor o"), 5))
    check_floor(m, [math.log(0.9), math.log(0.1)], [math.log(0.1), math.log(0.9)])


@claim(FLOOR)
def it_is_log_2_when_the_opponent_is_perfect(m):
    data = log_shares(dice("perfect"), 4)
    expect(m.loss_floor(tensor(data), tensor(data)), math.log(2), {
        "0 where it should be log 2: against p_t = p_data nothing can be told apart": 0.0},
        "the floor against p_t = p_data")


@claim(FLOOR)
def probability_zero_adds_nothing(m):
    half = math.log(0.5)
    for data, opponent in (([half, half, -math.inf], [math.log(0.2)] * 2 + [math.log(0.6)]),
                           ([half, half, -math.inf], [half, half, -math.inf]),
                           ([math.log(0.3), math.log(0.7)], [0.0, -math.inf])):
        value = plain(m.loss_floor(tensor(data), tensor(opponent)))[0]
        require(not isinstance(value, float) or not math.isnan(value), "NaN where a probability is "
                "0: 0 · log(0/0) and −inf − (−inf) must become 0 before the sum")
        check_floor(m, data, opponent)


@claim(FLOOR)
def responses_that_p_data_never_gives_may_be_left_out(m):
    """p_t then sums to less than 1, and must not be normalised."""
    data, opponent = [math.log(0.5), math.log(0.5)], [math.log(0.2), math.log(0.3)]
    p, q = [0.5, 0.5], [0.4, 0.6]
    pairs = [(p[y] * q[z], q[y] * p[z]) for y in (0, 1) for z in (0, 1)]
    whole = sum(a * math.log1p(b / a) for a, b in pairs)
    got = plain(m.loss_floor(tensor(data), tensor(opponent)))[0]
    require(abs(got - whole) > 1e-5 if isinstance(got, float) else True,
            "p_t was normalised: leave it as it is, so that what is left out adds nothing")
    short = [(p[y] * math.exp(opponent[z]), math.exp(opponent[y]) * p[z])
             for y in (0, 1) for z in (0, 1)]
    right = sum(a * math.log1p(b / a) for a, b in short)
    expect(got, right, {
        "log 2 − JSD holds for whole distributions only; sum p₊ log(1 + p₋/p₊) instead":
            math.log(2) - divergence(*zip(*short))}, "the floor of a part of the responses")


@claim(FLOOR)
def leading_axes_are_a_batch(m):
    rng = dice("batch floor")
    data, opponent = ([log_shares(rng, 3) for _ in "ab"] for _ in "do")
    got = m.loss_floor(tensor(data), tensor(opponent))
    right = []
    for d, o in zip(data, opponent):
        p, q = [math.exp(x) for x in d], [math.exp(x) for x in o]
        right.append(sum(p[y] * q[z] * math.log1p(q[y] * p[z] / (p[y] * q[z]))
                         for y in range(3) for z in range(3)))
    expect(got, right, {
        "one number for the whole batch; one for each row is asked for": sum(right)},
        "the floor of two rows")


@claim(FLOOR)
def very_unlikely_responses_do_no_harm(m):
    data, opponent = [math.log(0.5), math.log(0.5)], [-0.0, -200.0]
    value = plain(m.loss_floor(tensor(data, dtype=torch.float64),
                               tensor(opponent, dtype=torch.float64)))[0]
    # Against 0.5 · e^−200 all weight is on y' = 1: Σ p₊ log(1 + p₋/p₊) = ½ log 2, and half 0.
    expect(value, 0.5 * math.log(2), what="the floor with p_t(y) = e^−200")


# --- FusedLogps.backward -------------------------------------------------------------------------

FUSED = "spin_loss.FusedLogps.backward"


@stand_in
def compiled(body, device):
    """Stands for torch.compile: the body as it is."""
    return body


@stand_in
def logit_blocks(hidden_ND, weight_VD):
    """Stands for the original: blocks of three columns in one buffer that is used again."""
    columns = 3
    buffer = hidden_ND.new_empty(len(hidden_ND), columns)
    for first in range(0, len(weight_VD), columns):
        block = weight_VD[first:first + columns]
        logits = torch.mm(hidden_ND, block.T, out=buffer[:, :len(block)])
        yield first, block, logits
        buffer.fill_(math.nan)


class Context(SimpleNamespace):
    """Stands for what autograd hands to `backward`; unknown attributes are None."""
    def __getattr__(self, name):
        return None


def fused_case(name, N=4, V=7, D=3, one_block=False, needs=(True, True, False), equal=False):
    """(context, grad_N, hidden, weight, targets) as nested lists, and the forward pass's sums."""
    rng = dice(name)
    hidden, weight = table(rng, N, D), table(rng, V, D)
    targets, grad = [rng.randrange(V) for _ in range(N)], table(rng, N, low=0.3, high=2)
    if equal:
        targets = [4] * N
    logits = [[dot(h, w) for w in weight] for h in hidden]
    top = [max(z) for z in logits]
    total = [sum(math.exp(x - t) for x in z) for z, t in zip(logits, top)]
    ctx = Context(saved_tensors=(tensor(hidden), tensor(weight), torch.tensor(targets), tensor(top),
                                 tensor(total)),
                  needs_input_grad=needs, logits_NC=tensor(logits) if one_block else None)
    return ctx, grad, hidden, weight, targets, logits


def by_hand(grad, hidden, weight, targets, logits, hot=1.0, sign=1.0, upstream=True, shares=True):
    """(∂L/∂h, ∂L/∂W) by sums over plain numbers; the last four arguments make known mistakes."""
    N, V, D = len(hidden), len(weight), len(hidden[0])
    G = []
    for n in range(N):
        g = grad[n] if upstream else 1.0
        p = [math.exp(log_p(logits[n], v)) for v in range(V)]
        if not shares:  # not divided by the sum
            p = [math.exp(z - max(logits[n])) for z in logits[n]]
        G.append([sign * g * (hot * (v == targets[n]) - p[v]) for v in range(V)])
    return ([[sum(G[n][v] * weight[v][d] for v in range(V)) for d in range(D)] for n in range(N)],
            [[sum(G[n][v] * hidden[n][d] for n in range(N)) for d in range(D)] for v in range(V)])


def check_backward(m, name, **how):
    ctx, grad, *case = fused_case(name, **how)
    needs = ctx.needs_input_grad
    got = m.FusedLogps.backward(ctx, tensor(grad))
    require(isinstance(got, tuple) and len(got) == 3,
            "backward returns three things: ∂L/∂hidden, ∂L/∂weight and None for the targets")
    require(got[2] is None, "the third result is for the targets, which have no gradient: None")
    right = by_hand(grad, *case)
    for i, what in enumerate(("∂L/∂hidden", "∂L/∂weight")):
        if not needs[i]:
            require(got[i] is None,
                    f"{what} is not needed (ctx.needs_input_grad) and should be None")
            continue
        value, shape = plain(got[i], what)
        if shape == [len(right[i][0]), len(right[i])]:
            raise Broken(f"{what} is transposed: shape {shape}")
        wrong = [
            ("the sign is wrong: it is the gradient of log p, not of −log p",
             by_hand(grad, *case, sign=-1.0)[i]),
            ("the target's 1 is missing: 1[v = y] − softmax", by_hand(grad, *case, hot=0.0)[i]),
            ("grad_N is not used: each token's gradient is multiplied by its own",
             by_hand(grad, *case, upstream=False)[i]),
            ("exp(z − max) is not divided by the sum", by_hand(grad, *case, shares=False)[i]),
            ("the target's 1 is not multiplied by grad_N", blend(grad, case)[i])]
        V = len(case[1])
        for first in range(0, V, 3):
            columns = range(first, min(V, first + 3))
            wrong.append(("only one block of the vocabulary is in it: sum over all blocks"
                          if i == 0 else "only one block's rows are filled", only(
                              grad, case, columns)[i]))
        if i == 1 and alike_where_not_first(value, right[1]):
            wrong.append(("every block writes to the first rows: block `first` belongs to rows "
                          "first, first + 1, …", value))
        expect(value, right[i], wrong, what)


def blend(grad, case):
    """With 1[v = y] added without grad_N."""
    plain_, hot = by_hand(grad, *case, hot=0.0), by_hand([1.0] * len(grad), *case)
    cold = by_hand([1.0] * len(grad), *case, hot=0.0)
    return [[[a + b - c for a, b, c in zip(*rows)] for rows in zip(*tables)]
            for tables in zip(plain_, hot, cold)]


def only(grad, case, columns):
    """The gradients when only some columns of the vocabulary are seen."""
    hidden, weight, targets, logits = case
    full = by_hand(grad, *case)
    D = len(hidden[0])
    rows = []
    for n in range(len(hidden)):
        p = [math.exp(log_p(logits[n], v)) for v in range(len(weight))]
        rows.append([sum(grad[n] * ((v == targets[n]) - p[v]) * weight[v][d] for v in columns)
                     for d in range(D)])
    return rows, [row if v in columns else [0.0] * D for v, row in enumerate(full[1])]


def alike_where_not_first(got, right):
    """Whether the first rows hold the last block's gradient."""
    last = right[-1]
    return len(got) == len(right) and all(abs(a - b) < 1e-4 for a, b in zip(got[0], last))


@claim(FUSED)
def both_gradients_are_those_of_log_softmax(m):
    check_backward(m, "backward")


@claim(FUSED)
def equal_targets_add_up(m):
    check_backward(m, "equal", equal=True)


@claim(FUSED)
def a_vocabulary_of_whole_blocks_and_of_one_column_more(m):
    for V in (6, 4, 2):
        check_backward(m, f"columns {V}", V=V)


@claim(FUSED)
def a_kept_block_gives_the_same(m):
    """Where the vocabulary is one block, ctx.logits_NC holds its logits; they may be used."""
    check_backward(m, "kept", one_block=True)


@claim(FUSED)
def what_is_not_needed_is_none(m):
    check_backward(m, "needs", needs=(True, False, False))
    check_backward(m, "needs", needs=(False, True, False))


@claim(FUSED)
def inputs_are_left_alone(m):
    ctx, grad, *case = fused_case("alone")
    before = [plain(x)[0] for x in ctx.saved_tensors]
    gradient = tensor(grad)
    got = m.FusedLogps.backward(ctx, gradient)
    names = ("hidden", "weight", "targets", "max", "sum")
    for x, old, name in zip(ctx.saved_tensors, before, names):
        require(plain(x)[0] == old, f"the saved {name} was changed in place")
    expect(gradient, grad, what="grad_N after the call")
    require(isinstance(got, tuple) and len(got) == 3, "backward returns three things")
    expect(got[0], by_hand(grad, *case)[0], what="∂L/∂hidden")
