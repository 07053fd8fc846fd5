"""Claims about spin_loss.py: log-probabilities, losses, the anchor, the theory, the kernel."""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from classroom.checks import (Broken, alike, claim, dice, expect, gradients, numbers, require,
                              require_gradient, require_value_error, shares, table)
from spin_loss import LOSSES

# --- token_logps ---------------------------------------------------------------------------------


def token_case(name, U=6, V=5, D=3, grad=False):
    rng = dice(name)
    targets = [rng.randrange(V) for _ in range(U)]
    return table(rng, U, D, grad=grad), table(rng, V, D, grad=grad), torch.tensor(targets)


def check_token(got, hidden_UD, weight_VD, targets_N, state_N=None):
    own = torch.arange(len(targets_N)) % len(hidden_UD)
    state_N = own if state_N is None else state_N
    z_UV = (hidden_UD @ weight_VD.T).detach()
    p_UV = z_UV.exp() / z_UV.exp().sum(1, keepdim=True)
    right = p_UV[state_N, targets_N].log()
    expect(got, right, {
        "this is the logit itself; subtract log Σ exp z": z_UV[state_N, targets_N],
        "these are all tokens' log-probabilities; pick that of the target": p_UV[state_N].log(),
        "every state is scored for every target: [N, N]": p_UV.log()[state_N][:, targets_N],
        "the softmax runs over the states, dim=0; it belongs over the vocabulary":
            (z_UV.exp() / z_UV.exp().sum(0))[state_N, targets_N].log(),
        "state_N is None here, and an index None adds an axis: let it be 0, 1, 2, …":
            p_UV.log()[None, targets_N % len(z_UV)],
        "state_N picks the states, not the targets":
            p_UV.log()[own, targets_N[state_N % len(targets_N)]],
        "state_N is ignored: target n belongs to hidden_UD[state_N[n]]":
            p_UV[own, targets_N].log()})


@claim("spin_loss.py", "token_logps")
def log_p_is_the_logit_minus_log_sum_exp(m):
    case = token_case("softmax")
    check_token(m.token_logps(*case), *case)


@claim("spin_loss.py", "token_logps")
def large_logits_do_not_overflow(m):
    got = m.token_logps(torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    require(bool(numbers(got).isfinite().all()), "with logits of ±1000 exp overflows; "
            "subtract the largest logit first, as log_softmax does")
    expect(got, [-2000.0], what="with logits of ±1000 log p")


@claim("spin_loss.py", "token_logps")
def several_targets_may_share_one_state(m):
    hidden_UD, weight_VD, _ = token_case("rows", U=3)
    targets_N, state_N = torch.tensor([4, 0, 2, 1, 3]), torch.tensor([2, 0, 0, 1, 2])
    got = m.token_logps(hidden_UD, weight_VD, targets_N, state_N=state_N)
    check_token(got, hidden_UD, weight_VD, targets_N, state_N)


@claim("spin_loss.py", "token_logps")
def gradients_reach_states_and_weights(m):
    hidden_UD, weight_VD, targets_N = token_case("gradient", grad=True)
    got, _ = require_gradient(m.token_logps(hidden_UD, weight_VD, targets_N), hidden_UD, weight_VD)
    p_UV = (hidden_UD @ weight_VD.T).softmax(1)
    expect(got, (F.one_hot(targets_N, 5) - p_UV) @ weight_VD, what="the gradient of the states")


@claim("spin_loss.py", "token_logps")
def fused_is_the_kernel_and_other_names_are_refused(m):
    """"fused" is FusedLogps.apply, here a stand-in that shows what it was given."""
    def apply(hidden_UD, weight_VD, targets_N, state_N):
        require(state_N is not None, "FusedLogps.apply is given state_N None; it needs one always")
        return 100 * hidden_UD[state_N, 0] + targets_N + len(weight_VD) / 1000
    m.FusedLogps = SimpleNamespace(apply=apply)
    case, state_N = token_case("fused"), torch.tensor([5, 1, 1, 0, 2, 3])
    value = lambda rows: 100 * case[0][rows, 0] + case[2] + 0.005
    own = value(torch.arange(6))
    expect(m.token_logps(*case, "fused"), own, {
        'impl="fused" changes nothing: return what FusedLogps.apply gives':
            (case[0] @ case[1].T).log_softmax(1)[torch.arange(6), case[2]]},
        'with impl="fused" the result of FusedLogps.apply')
    expect(m.token_logps(*case, "fused", state_N), value(state_N),
           {'impl="fused" ignores state_N': own}, 'with impl="fused" and state_N FusedLogps.apply')
    require_value_error(lambda: m.token_logps(*case, impl="quick"), "quick",
                        'impl="quick" is accepted; an unknown name must raise ValueError')


# --- sequence_logps ------------------------------------------------------------------------------

END = 3
CHAIN = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.4, 0.05, 0.3], [0.6, 0.1, 0.1, 0.2], [0.2, 0.3, 0.4, 0.1]]


class MarkovChain:
    """A model whose next token depends on the last one alone: p(v after u) = CHAIN[u][v]."""
    def __init__(self):
        self.head_weight = torch.tensor(CHAIN).log().T.clone().requires_grad_()

    def hidden(self, tokens_BT, *_, **__):
        return F.one_hot(tokens_BT, 4).float()


def sequence(m, rows, impl="eager"):
    """sequence_logps of rows (prompt, response, padding); and the model, and impls passed on."""
    impls, model = [], MarkovChain()

    def token_logps(hidden_UD, weight_VD, targets_N, impl="eager", state_N=None):
        impls.append(impl)
        require(hidden_UD.dim() == 2, f"token_logps is given states of shape "
                f"{list(hidden_UD.shape)}, expected a flat list of those to be scored, [N, D]")
        state_N = hidden_UD.argmax(1) if state_N is None else hidden_UD.argmax(1)[state_N]
        return weight_VD[targets_N, state_N]
    m.token_logps = token_logps
    tokens = [[*x, *y, *padding] for x, y, padding in rows]
    scored = [[False] * len(x) + [True] * len(y) + [False] * len(padding)
              for x, y, padding in rows]
    return m.sequence_logps(model, torch.tensor(tokens), torch.tensor(scored), impl), model, impls


def check_sequence(m, rows):
    step = lambda u, v: math.log(CHAIN[u][v])
    steps = lambda tokens: sum(map(step, tokens, tokens[1:]))
    right, wrong = [], {}
    for x, y, pad in rows:
        value, last = steps(x[-1:] + y), step((x + y)[-2], y[-1])
        right.append(value)
        for words, number in {
                "each token is scored by the logits that have read it; those before it predict it":
                    sum(step(v, v) for v in y),
                "you averaged over tokens; a log-probability is their sum": value / len(y),
                "the prompt is scored too": steps(x + y),
                "the padding is scored too": steps(x[-1:] + y + pad),
                "prompt and padding are scored too: the mask is not used": steps(x + y + pad),
                "the mask is inverted: this is all but the response": steps(x + y + pad) - value,
                "END is not scored: without it long responses look as likely as short ones":
                    value - last,
                "END is scored twice": value + last,
                "each row keeps one token alone: add them up": last,
                "you divide by the row's length; a log-probability is a sum":
                    value / (len(x + y + pad) - 1),
                "the shift goes the wrong way: a token is scored by the one after it":
                    steps((y + pad[:1])[::-1]),
                "the first token of the response is not scored: shift the mask as you shift the "
                "targets": value - step(x[-1], y[0]),
                "the mask was not shifted: it must stand with the targets, not with the inputs":
                    steps(y + pad[:1])}.items():
            wrong.setdefault(words, []).append(number)
    expect(sequence(m, rows)[0], right, wrong)


@claim("spin_loss.py", "sequence_logps")
def token_is_scored_by_the_logits_before_it(m):
    check_sequence(m, [([0, 2], [1, 2, END], [])])


@claim("spin_loss.py", "sequence_logps")
def logprob_is_a_sum_over_response_tokens_not_a_mean(m):
    for n in (1, 2, 5):
        check_sequence(m, [([0], [1] * n + [END], [])])


@claim("spin_loss.py", "sequence_logps")
def prompt_and_padding_are_not_scored(m):
    check_sequence(m, [([0, 1, 2], [1, 0, END], [0, 1])])
    check_sequence(m, [([2], [0, 2, END], [1, 2])])


@claim("spin_loss.py", "sequence_logps")
def end_token_is_scored(m):
    """Once, with its own probability; else a response would look as likely as its beginning."""
    check_sequence(m, [([0, 1], [2, END], [0]), ([1, 0], [1, END], [0])])
    check_sequence(m, [([0], [END], [0]), ([1], [END], [0])])


@claim("spin_loss.py", "sequence_logps")
def each_row_gets_its_own_sum_and_the_implementation_is_passed_on(m):
    check_sequence(m, [([0, 1, 2], [2, END], [0, 0]), ([1], [0, 1, 2, 0, 2, END], []),
                       ([2, 2], [1, 0, END], [0, 0])])
    got, model, impls = sequence(m, [([0, 1], [2, END], [])], impl="fused")
    require(set(impls) == {"fused"}, 'token_logps was not given impl="fused"')
    require_gradient(got, model.head_weight)


# --- spin_loss -----------------------------------------------------------------------------------

SOFTPLUS = lambda u: math.log1p(math.exp(-abs(u))) + max(u, 0)
ELL = {"logistic": lambda u: SOFTPLUS(-u), "hinge": lambda u: max(0, 1 - u),
       "exponential": lambda u: math.exp(-u), "correlation": lambda u: 1 - u}


def written_out(loss, r, s, lam):
    """A loss of two log-ratios, as the papers print it."""
    return SOFTPLUS(-r) + SOFTPLUS(s) if loss == "space" else ELL[loss](lam * (r - s))


def check_spin(m, lam, loss="logistic", B=5):
    four = table(dice(f"four {lam} {loss}"), 4, B, low=-3, high=-1)
    rows = four.T.tolist()
    each = lambda rule: [written_out(loss, *rule(*row)) for row in rows]
    right = each(lambda p, g, op, og: (p - op, g - og, lam))
    expect(m.spin_loss(*four, lam, loss), right, {
        "the sign of the margin is flipped: real and generated are exchanged, or a log-ratio is "
        "upside down (it is log p_θ − log p_t)": each(lambda p, g, op, og: (g - og, p - op, lam)),
        "λ is missing": each(lambda p, g, op, og: (p - op, g - og, 1)),
        "λ is applied twice: LOSSES multiplies by it already":
            each(lambda p, g, op, og: (p - op, g - og, lam * lam)),
        "λ multiplies the first log-ratio only":
            each(lambda p, g, op, og: (lam * (p - op), g - og, 1)),
        "the opponent is left out, or one of its log-probs stands in both log-ratios":
            each(lambda p, g, op, og: (p, g, lam)),
        "the ratio itself is taken; its logarithm is asked for, a difference": each(
            lambda p, g, op, og: (math.exp(p - op), math.exp(g - og), lam)),
        "logarithms are divided; the log of a ratio is a difference": each(
            lambda p, g, op, og: (p / op, g / og, lam)),
        "a log-ratio is of one response: real with real, generated with generated": each(
            lambda p, g, op, og: (p - g, op - og, lam)),
        "the opponent's two log-probs are exchanged": each(
            lambda p, g, op, og: (p - og, g - op, lam)),
        "the two log-ratios are added; their difference is asked for":
            each(lambda p, g, op, og: (p - op, og - g, lam)),
        "the real response's log-ratio stands for both": each(
            lambda p, g, op, og: (p - op, p - op, lam)),
        "this is the logistic loss; `loss` is not used":
            [written_out("logistic", p - op, g - og, lam) for p, g, op, og in rows]}, "the loss")


@claim("spin_loss.py", "spin_loss")
def loss_is_its_formula_written_out(m):
    for lam in (0.1, 2.0, 3.0):
        check_spin(m, lam)


@claim("spin_loss.py", "spin_loss")
def loss_is_log_2_when_player_equals_opponent(m):
    real, generated = table(dice("same"), 3, low=-9), table(dice("too"), 3, low=-9)
    expect(m.spin_loss(real, generated, real, generated, 5.0), [math.log(2)] * 3, {
        "the opponent is left out: both log-ratios should be 0 here":
            F.softplus(-5 * (real - generated)),
        "0 instead of log 2: ℓ(0) = log(1 + e^0)": [0.0] * 3}, "the loss")


@claim("spin_loss.py", "spin_loss")
def every_loss_in_the_table_can_be_chosen(m):
    """Those of the paper, SPACE, and whatever else is put there."""
    for loss in ("hinge", "exponential", "correlation", "space"):
        check_spin(m, 0.3, loss)
    m.LOSSES["mine"] = lambda r, s, lam: 1000 * r + s + 10_000 * lam
    four = torch.tensor([[-1.0, -2.0], [-3.0, -5.0], [-1.5, -2.25], [-3.5, -5.0]])
    expect(m.spin_loss(*four, 2.0, "mine"), [20_500.5, 20_250.0], {
        "λ is not passed on": [10_500.5, 10_250.0], "r and s are exchanged": [20_500.5, 20_000.25],
        "the opponent's two log-probs are exchanged": [22_498.5, 22_997.25]}, "a loss of our own")
    require_value_error(lambda: m.spin_loss(*four, 1.0, "focal"), "focal",
                        'loss="focal" is accepted; an unknown name must raise ValueError')


@claim("spin_loss.py", "spin_loss")
def gradient_pushes_the_real_response_up_and_the_generated_one_down(m):
    four = [table(dice(n), 4, low=-3, high=-1, grad=True) for n in range(4)]
    real, generated = require_gradient(m.spin_loss(*four, 2.0), *four[:2])
    require(max(real.tolist()) < 0 < min(generated.tolist()), "the loss should fall as log p_θ(y) "
            "rises, and rise with log p_θ(y'); yours does not")


# --- pair_loss -----------------------------------------------------------------------------------


def pair_case(P=2, N=3):
    rng = dice("pairs")
    return (table(rng, P, N, low=-4, high=-1), table(rng, P, N, low=-4, high=-1),
            shares(rng, P, N), shares(rng, P, N))


def spin_loss_alone(m):
    """Give the module a spin_loss, so that what calls it is judged by itself."""
    m.spin_loss = lambda a, b, c, d, lam, loss="logistic": LOSSES[loss](a - c, b - d, lam)


def check_pairs(m, player, opponent, real, generated, lam=2.0, loss="logistic"):
    spin_loss_alone(m)
    P, N = player.shape
    tables = [x.tolist() for x in (player, opponent, real, generated)]

    def each(rule, lam=lam, loss=loss):
        """Σ weight · ℓ(r, s) for each prompt; rule(i, j, x, o, a, b) gives (weight, r, s)."""
        return [sum(weight * written_out(loss, r, s, lam) for i in range(N) for j in range(N)
                    for weight, r, s in [rule(i, j, *prompt)]) for prompt in zip(*tables)]
    weighed = lambda weight: each(lambda i, j, x, o, a, b: (
        weight(i, j, a, b), x[i] - o[i], x[j] - o[j]))
    pair = lambda i, j, x, o, a, b: (a[i] * b[j], x[i] - o[i], x[j] - o[j])
    right = each(pair)
    expect(m.pair_loss(player, opponent, real, generated, lam, loss), right, {
        "real and generated responses share one log-ratio: the same labels for both": each(
            lambda i, j, x, o, a, b: (a[i] * b[j], x[i] - o[i], x[i] - o[i])),
        "y and y' are exchanged, or the sign of the margin is flipped: real_PN weighs y, and the "
        "loss falls as log p_θ(y) rises": weighed(lambda i, j, a, b: b[i] * a[j]),
        "the opponent's log-probs are exchanged": each(
            lambda i, j, x, o, a, b: (a[i] * b[j], x[i] - o[j], x[j] - o[i])),
        "each y is compared with the y' of its own number only; all pairs are asked for":
            weighed(lambda i, j, a, b: a[i] * b[j] * (i == j)),
        "a pair of one response with itself is left out; it has its weight too":
            weighed(lambda i, j, a, b: a[i] * b[j] * (i != j)),
        "the weights are added; multiply them": weighed(lambda i, j, a, b: a[i] + b[j]),
        "the weights are not used: this is the mean over all pairs":
            weighed(lambda i, j, a, b: 1 / N**2),
        "the weights are not used: this is the sum over all pairs": weighed(lambda *_: 1),
        "you divide by the number of pairs; the weights sum to 1 already":
            weighed(lambda i, j, a, b: a[i] * b[j] / N**2),
        "y' is not weighed": weighed(lambda i, j, a, b: a[i]),
        "y is not weighed": weighed(lambda i, j, a, b: b[j]),
        "spin_loss gets r − s as one log-ratio; `space` needs r and s apart": each(
            lambda i, j, x, o, a, b: (a[i] * b[j], x[i] - o[i] - x[j] + o[j], 0.0)),
        "the opponent is left out: r(y) = log p_θ(y)/p_t(y)": each(
            lambda i, j, x, o, a, b: (a[i] * b[j], x[i], x[j])),
        "`loss` is not passed on": each(pair, loss="logistic"),
        "λ is missing": each(pair, lam=1.0)}, "the loss")


@claim("spin_loss.py", "pair_loss")
def it_is_the_mean_over_all_pairs_of_a_prompt(m):
    check_pairs(m, *pair_case())
    check_pairs(m, *pair_case(), lam=0.5, loss="exponential")
    check_pairs(m, *pair_case(), loss="space")


@claim("spin_loss.py", "pair_loss")
def a_large_log_ratio_counts_in_full(m):
    player, *others = pair_case()
    try:
        check_pairs(m, player + 30 * torch.eye(2, 3), *others)
    except Broken:
        raise Broken("a log-ratio of 30 does not count in full: mask the pairs without weight, "
                     "and clamp nothing") from None


@claim("spin_loss.py", "pair_loss")
def a_response_without_weight_changes_nothing(m):
    """Padding, say, whatever its log-ratio: 0 · ∞ must not become NaN, nor its gradient."""
    player, opponent, real, generated = pair_case()
    spin_loss_alone(m)
    more = lambda x, value: torch.cat([x.detach(), torch.full((2, 1), value).double()], 1)
    wide, none = more(player, 800.0).requires_grad_(), [more(real, 0.0), more(generated, 0.0)]
    for far in (0.0, 1600.0):
        got = m.pair_loss(wide, more(opponent, far), *none, 2.0, "exponential")
        expect(got, m.pair_loss(player, opponent, real, generated, 2.0, "exponential"), {
            "0 · ∞ is NaN: mask the log-ratios of pairs without weight before the loss":
                [math.nan] * 2}, "with padding the loss")
        gradient, = require_gradient(got, wide)
        require(bool(gradient.isfinite().all()), "0 · ∞ makes the gradient NaN: mask the "
                "log-ratios of pairs without weight before the loss")


# --- mass_anchor ---------------------------------------------------------------------------------


def check_anchor(m, player, opponent, share):
    of = lambda log_m: [-min(0.0, x) for x in log_m.tolist()]
    log_m = lambda ratio, s=share: (s * ratio.exp()).sum(1).log()
    ratio, right = player - opponent, of(log_m(player - opponent))
    one, mass = torch.ones_like(share), (share * ratio.exp()).sum(1).clamp(max=1)
    expect(m.mass_anchor(player, opponent, share.log()), right, {
        "m > 1 is punished too: m = min(1, …)": -log_m(ratio),
        "m < 1 is free and m > 1 counts, with max(1, …); it is min(1, …): clamp(max=0)":
            -log_m(ratio).clamp(min=0),
        "each ratio is held to 1; it is their sum that may be at most 1":
            of(log_m(ratio.clamp(max=0))),
        "the shares are made to sum to 1; take them as they are":
            of(log_m(ratio, share / share.sum(1, keepdim=True))),
        "this is m; −log m is asked for": mass,
        "this is 1 − m; −log m is asked for": 1 - mass,
        "this is (1 − m)²; −log m is asked for": (1 - mass)**2,
        "this is (1 − m) log 1/m; −log m is asked for": -(1 - mass) * mass.log(),
        "the ratio is upside down: it is p_θ/p_t": of(log_m(-ratio)),
        "the opponent is left out: the ratio is p_θ/p_t": of(log_m(player)),
        "the shares are not used": of(log_m(ratio, one)),
        "the shares are not used: this is a plain mean": of(log_m(ratio, one / share.shape[1])),
        "log_share_PN is a logarithm already": of(log_m(ratio + share, one)),
        "all prompts are taken together: each has its own m":
            of((share * ratio.exp()).sum(1).mean().log().expand(len(share))),
        "this is one number for all prompts; each has its own m":
            -min(0.0, math.log(float((share * ratio.exp()).sum()))),
        "m is the mean of the ratios, not of their logarithms": of((share * ratio).sum(1))},
        "the anchor")


@claim("spin_loss.py", "mass_anchor")
def it_is_minus_log_m_for_each_prompt(m):
    """All ratios small; both kinds, with shares below 1 in sum and padding; all large."""
    rng = dice("anchor")
    opponent, share = table(rng, 3, 4, low=-4, high=-1), shares(rng, 3, 4)
    fall = torch.stack([table(rng, 4, low=a, high=a + 1) for a in (2, -0.5, -4)])
    fall[1, :2], share[1, 3] = torch.tensor([-0.5, 0.5]), 0
    share[1] *= 0.3
    check_anchor(m, opponent - fall, opponent, share)


@claim("spin_loss.py", "mass_anchor")
def huge_and_tiny_ratios_stay_finite(m):
    half = torch.tensor([[0.5, 0.5]]).log()
    for shift, right in ((-200.0, 200.0), (200.0, 0.0)):
        player = torch.tensor([[-5.0 + shift, -6.0 + shift]], requires_grad=True)
        got = m.mass_anchor(player, torch.tensor([[-5.0, -6.0]]), half)
        value = numbers(got).sum().item()
        require(math.isfinite(value), f"a ratio of e^{shift:g} gives {value}: use logarithms "
                f"throughout (logsumexp), no exp before the sum")
        expect(value, right, {"below some m the anchor no longer grows: do not clamp m from below":
                              value if 0 < value < 150 else math.nan},
               f"the anchor at a ratio of e^{shift:g}")
        gradient, = gradients(got, player)
        require(bool(gradient.isfinite().all()), f"the gradient at e^{shift:g} is not finite")


@claim("spin_loss.py", "mass_anchor")
def its_slope_is_one_for_each_nat_that_leaks(m):
    """However small the leak: c nats off every log p_θ cost c."""
    opponent = shares(dice("slope"), 1, 4).log()
    for c in (0.01, 1.0, 30.0):
        shift = torch.tensor(-c, dtype=torch.float64, requires_grad=True)
        got = m.mass_anchor(opponent + shift, opponent, opponent)
        expect(got, [c], what=f"the anchor where every log p_θ has fallen by {c:g}")
        slope, = require_gradient(got, shift)
        expect(slope, -1.0, what=f"its slope where every log p_θ has fallen by {c:g}")


# --- optimal_next_policy -------------------------------------------------------------------------


def check_theorem(m, data, opponent, lam):
    normal = lambda score, axis=-1: score - score.logsumexp(axis, keepdim=True)
    score = opponent + (data - opponent) / lam
    right = normal(score)
    expect(m.optimal_next_policy(data, opponent, lam), right, {
        "the two factors are exchanged: p_data gets 1/λ, p_t gets 1 − 1/λ":
            normal((1 - 1 / lam) * data + opponent / lam),
        "the exponent is 1/λ, not λ": normal(opponent + (data - opponent) * lam),
        "it is not normalised: Σ p_{t+1} must be 1": score,
        "the ratio is upside down: it is p_data/p_t": normal(opponent - (data - opponent) / lam),
        "p_t is missing before the ratio": normal((data - opponent) / lam),
        "this is p_data: λ is not used": data, "this is p_t: p_data is not used": opponent,
        "p_t keeps its whole weight: collect what stands before log p_t, 1 − 1/λ":
            normal(opponent + data / lam),
        "it is normalised over the first axis; it should be over the last": normal(score, 0)},
        "log p_{t+1}")


@claim("spin_loss.py", "optimal_next_policy")
def it_is_the_formula_in_logarithms_row_by_row(m):
    for lam in (0.7, 2.0, 5.0):
        check_theorem(m, shares(dice("d"), 3, 5).log(), shares(dice("o"), 3, 5).log(), lam)


@claim("spin_loss.py", "optimal_next_policy")
def probability_zero_and_what_the_theorem_excludes(m):
    data, half = torch.tensor([0.75, 0.25, 0.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    opponent = torch.tensor([0.25, 0.25, 0.5, 0.0]).log()
    for lam in (0.5, 1.0, 2.0):
        try:
            got = numbers(m.optimal_next_policy(data, opponent, lam))
        except ValueError:
            raise Broken("p_t = 0 is refused where p_data = 0 too; there it is allowed") from None
        require(not bool(got.isnan().any()), "NaN where p_data is 0: −inf · 0 or inf − inf; "
                "put −inf there before you normalise")
        power = [0.25 * (p / 0.25) ** (1 / lam) for p in (0.75, 0.25)]
        expect(got, [math.log(p / sum(power)) for p in power] + [-math.inf] * 2,
               what="log p_{t+1} where p_data is 0 in places")
    for lam in (0.0, -1.0):
        require_value_error(lambda: m.optimal_next_policy(half, half, lam), "",
                            f"λ = {lam:g} is accepted; it must raise ValueError")
    require_value_error(lambda: m.optimal_next_policy(half, data[[0, 2]], 2.0), "",
                        "p_t = 0 where p_data > 0 is accepted; it must raise ValueError")


# --- loss_floor ----------------------------------------------------------------------------------


def check_floor(m, data, opponent):
    """data and opponent are probabilities, [K] each."""
    plus, log2 = data[:, None] * opponent, math.log(2)
    minus = plus.T
    kl = lambda a, b: float(torch.where((a > 0) & (b > 0), a * (a / b).log(), 0.0).sum())
    middle = (plus + minus) / 2
    jsd = (kl(plus, middle) + kl(minus, middle)) / 2
    single = (kl(data, (data + opponent) / 2) + kl(opponent, (data + opponent) / 2)) / 2
    right = float(torch.where(plus > 0, plus * torch.log1p(minus / plus), 0.0).sum())
    got = m.loss_floor(data.log(), opponent.log())
    expect(got, right, {
        "NaN where a probability is 0: 0 · log(0/0) and −inf − (−inf) must become 0": math.nan,
        "log 2 − JSD holds for whole distributions only, and here p_t sums to less than 1":
            log2 - jsd,
        "this is the JSD itself": jsd,
        "this is log 2 − 2 JSD: the JSD is half the sum of the two KLs": log2 - 2 * jsd,
        "this is the JSD of p_data and p_t; p₊ and p₋ are distributions of pairs (y, y')":
            log2 - single,
        "a KL(p₊‖p₋) stands where the JSD belongs": log2 - kl(plus, minus),
        "log 2 is missing: this is −JSD": -jsd,
        "p₊ is not used as a weight: this is the mean over pairs":
            float(torch.log1p(minus / plus).mean()),
        "it is always log 2: your p₊ and p₋ are the same": log2}, "the floor")


@claim("spin_loss.py", "loss_floor")
def it_is_what_is_left_at_the_best_margin_of_each_pair(m):
    check_floor(m, shares(dice("floor"), 5), shares(dice("floor o"), 5))
    check_floor(m, torch.tensor([0.9, 0.1]).double(), torch.tensor([0.1, 0.9]).double())


@claim("spin_loss.py", "loss_floor")
def it_is_log_2_when_the_opponent_is_perfect(m):
    data = shares(dice("perfect"), 4).log()
    expect(m.loss_floor(data, data), math.log(2), {
        "0 where it should be log 2: against p_t = p_data nothing can be told apart": 0.0},
        "the floor against p_t = p_data")


@claim("spin_loss.py", "loss_floor")
def probability_zero_adds_nothing_and_may_be_left_out(m):
    """Where p_data leaves responses out, p_t sums to less than 1, and is not normalised."""
    for data, opponent in (([0.5, 0.5, 0.0], [0.2, 0.2, 0.6]), ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0]),
                           ([0.3, 0.7], [1.0, 0.0]), ([0.5, 0.5], [1.0, math.exp(-200)])):
        check_floor(m, torch.tensor(data).double(), torch.tensor(opponent).double())
    data, opponent = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.2, 0.3]).double()
    whole = (data[:, None] * opponent / 0.5)
    if alike(m.loss_floor(data.log(), opponent.log()),
             (whole * torch.log1p(whole.T / whole)).sum()):
        raise Broken("p_t was normalised: leave it as it is, so that what is left out adds nothing")
    check_floor(m, data, opponent)


@claim("spin_loss.py", "loss_floor")
def leading_axes_are_a_batch(m):
    data, opponent = shares(dice("batch"), 2, 3), shares(dice("floors"), 2, 3)
    plus = data[:, :, None] * opponent[:, None, :]
    right = (plus * torch.log1p(plus.transpose(1, 2) / plus)).sum((1, 2))
    expect(m.loss_floor(data.log(), opponent.log()), right, what="the floor of two rows")


# --- FusedLogps.backward -------------------------------------------------------------------------


def check_backward(m, columns, again=False):
    """Both gradients of the kernel, with blocks of so many columns, beside those of log_softmax."""
    m.BLOCK_LOGITS, m.LEAST_COLUMNS, m.compiled = {"cpu": 0}, columns, lambda body, device: body
    rng, V = dice("backward"), 7
    h, W = table(rng, 4, 3), table(rng, V, 3)
    y = torch.tensor([rng.randrange(V) for _ in range(4)] + [0, 0])  # twice that of one state
    row, g = torch.tensor([2, 0, 1, 3, 2, 2]), table(rng, 6, low=0.3, high=2)
    top, logits = (h @ W.T).amax(1), h @ W.T
    saved = h, W, y, row, top, (logits - top[:, None]).exp().sum(1)
    ctx = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True, True, False, False),
                          logits_UV=logits.clone() if columns >= V else None)

    before, got = [x.clone() for x in (*saved, g)], m.FusedLogps.backward(ctx, g)
    require(isinstance(got, tuple) and len(got) == 4, "four gradients are expected, one for each "
            "argument of forward: (∂L/∂hidden, ∂L/∂weight, None, None)")
    require(all(map(torch.equal, (*saved, g), before)), "saved tensors and grad_N stay as they "
            "are; yours changes one of them")
    if again:
        for one, two in zip(got[:2], m.FusedLogps.backward(ctx, g)):
            expect(two, one, what="a second backward pass finds another gradient, so the first one "
                   "overwrote what it needs: it")
    z = h @ W.T
    share = (z - z.amax(1, keepdim=True)).exp()
    p, hot = share / share.sum(1, keepdim=True), F.one_hot(y, V).double()
    add = lambda G: torch.zeros(4, V).double().index_add(0, row, G)
    right = add(g[:, None] * (hot - p[row]))  # ∂L/∂z
    once = right * 0
    once[row] = g[:, None] * (hot - p[row])
    last = torch.where(torch.arange(V) >= (V - 1) // columns * columns, right, 0.0)
    wrong = {
        "the target's 1 is missing: 1[v = y] − softmax": add(-g[:, None] * p[row]),
        "grad_N is not used: each token's gradient is multiplied by its own": add(hot - p[row]),
        "exp(z − max) is not divided by the sum": add(g[:, None] * (hot - share[row])),
        "the largest logit is not subtracted: exp(z − max)":
            add(g[:, None] * (hot - p[row] * z.amax(1).exp()[row, None])),
        "the target's 1 is not multiplied by grad_N": add(hot - g[:, None] * p[row]),
        "only the last target of a state counts; those that share a state add up": once,
        "only one block of the vocabulary is in it: sum over all blocks": last}
    for value, of, what in ((got[0], lambda G: G @ W, "∂L/∂hidden"),
                            (got[1], lambda G: G.T @ h, "∂L/∂weight")):
        expect(value, of(right), {words: of(G) for words, G in wrong.items()}, what)
    for i in range(2):
        ctx.needs_input_grad = (i == 1, i == 0, False, False)
        require(m.FusedLogps.backward(ctx, g)[i] is None,
                "where ctx.needs_input_grad is False, None is expected")


@claim("spin_loss.py", "FusedLogps.backward")
def both_gradients_are_those_of_log_softmax(m):
    for columns in (3, 1, 2, 7, 64):
        check_backward(m, columns)


@claim("spin_loss.py", "FusedLogps.backward")
def a_second_backward_pass_finds_the_same_gradient(m):
    for columns in (3, 64):
        check_backward(m, columns, again=True)
