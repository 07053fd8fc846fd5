"""SPIN without a network: a policy is a table with one logit for each of K responses.

    L(θ) = Σ_y Σ_y' p_data(y) p_t(y') loss(r, s),   r = log p_θ(y)/p_t(y),  s = log p_θ(y')/p_t(y')

The sum runs over every pair of responses, so nothing is sampled, and each iteration is minimised
to machine precision. What is left is the theory: what one exact iteration reaches, and what
repeating it does.

Reading order: p_data, p_0 and `kl` → the losses and `expected_loss` → `minimise` and two others →
`next_policy`, `play` → how fast self-play converges: `contraction` measures the factor,
`predicted_factor` predicts it → α-SPIN and T-SPIN, two games that do not end at p_data.

Dimensions: K responses, G groups of responses. A policy is the vector of its K log-probabilities,
in nats and float64.
"""
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian, jacobian

from spin_loss import LOSSES


# --- policies ------------------------------------------------------------------------------------

def log_table(*probabilities):
    """A policy from its probabilities: their logarithms, float64 [K]."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


# Six responses, called A to F. p_0 gives each of them some probability, but ranks them badly.
DATA = log_table(0.34, 0.24, 0.18, 0.12, 0.08, 0.04)  # p_data
WEAK = log_table(0.08, 0.12, 0.18, 0.26, 0.30, 0.06)  # p_0

# KL in nats. Beyond it the rarest p_t(y) soon falls below e^−745, which float64 rounds to 0, and no
# minimum can be found.
FAR = 100


def kl(p_K, q_K) -> float:
    """KL(p‖q) in nats. Responses with p = 0 add nothing."""
    return torch.where(p_K.exp() > 0, p_K.exp() * (p_K - q_K), 0.0).sum().item()


# --- losses --------------------------------------------------------------------------------------

def is_pairwise(loss) -> bool:
    """Whether a loss depends on r − s alone, so that adding 1 to both r and s changes nothing."""
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; use one of {', '.join(LOSSES)}")
    r, s = torch.tensor([0.3, -0.4], dtype=torch.float64)
    loss_of = LOSSES[loss]
    return torch.allclose(loss_of(r, s, 1.0, 1.0), loss_of(r + 1, s + 1, 1.0, 1.0))


def expected_loss(logits_K, data_K, opponent_K, lam=1.0, loss="logistic", mu=1.0,
                  generated_K=None):
    """The mean loss over y ~ p_data and y' ~ p_t, exactly. logits_K may have leading dimensions.

    opponent_K is the policy in the log-ratios. generated_K is where y' comes from: the opponent
    too unless it is given, for example as the frequencies in a finite sample.
    """
    if generated_K is None:
        generated_K = opponent_K
    # A pairwise loss does not change when a constant is added to all logits. They stay as they
    # are, for normalising would round off the gradient of responses as rare as e^−60.
    if not is_pairwise(loss):
        logits_K = logits_K.log_softmax(-1)
    ratio_K = logits_K - opponent_K
    loss_KK = LOSSES[loss](ratio_K[..., :, None], ratio_K[..., None, :], lam, mu)
    weight_KK = (data_K[:, None] + generated_K[None, :]).exp()
    return (weight_KK * loss_KK).sum(dim=(-2, -1))


# --- minimising ----------------------------------------------------------------------------------

def minimise(loss_of, start_K, steps=500):
    """Newton's method on the logits, each step halved until the loss no longer rises."""
    logits_K = start_K.clone()
    for _ in range(steps):
        value = loss_of(logits_K)
        step_K = newton_step(jacobian(loss_of, logits_K), hessian(loss_of, logits_K))
        while loss_of(logits_K + step_K) > value + 1e-16 and step_K.abs().max() > 1e-12:
            step_K = step_K / 2
        logits_K = logits_K + step_K
        if step_K.abs().max() <= 1e-12:
            break
    return logits_K


def newton_step(slope_K, hessian_KK):
    """−(Hessian)⁻¹ slope, for a Hessian that cannot be inverted as it is.

    A logit that the loss does not depend on has a zero on the diagonal, and stays where it is.
    Adding a constant to all logits changes nothing either: so one logit is held while the others
    are solved for (L of them), and the step is then shifted to sum to 0, as the gradient does.
    """
    seen = hessian_KK.diagonal() != 0
    solved = seen.clone()
    solved[hessian_KK.diagonal().argmax()] = False
    hessian_LL = hessian_KK[solved][:, solved]
    factor_LL, failed = torch.linalg.cholesky_ex(hessian_LL)
    if failed:  # The loss is not convex here. Where it curves down, Newton's step would climb.
        curvature_L, axes_LL = torch.linalg.eigh(hessian_LL)
        factor_LL = torch.linalg.cholesky((axes_LL * curvature_L.abs()) @ axes_LL.T)
    step_K = torch.zeros_like(slope_K)
    step_K[solved] = torch.cholesky_solve(-slope_K[solved, None], factor_LL)[:, 0]
    step_K[seen] -= step_K[seen].mean()
    return step_K


def minimise_hinge(loss_of, start_K, lam):
    """Raise the best group of responses by 1/λ, as long as some group lowers the loss.

    This is exact. The hinge is linear between its kinks, which lie where two log-ratios differ by
    1/λ. So some minimum is a corner, where all log-ratios differ by whole multiples of 1/λ (the
    linear program is the dual of a network flow). Where raising no group lowers the loss, nothing
    does (the loss is L-convex: Murota, Discrete Convex Analysis, 2003, L-optimality criterion).
    """
    groups_GK = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(start_K)).to(start_K)
    logits_K = start_K.clone()
    while True:
        loss_G = loss_of(logits_K + groups_GK / lam)
        unchanged = loss_G[0]  # group 0 is empty
        if loss_G.min() > unchanged - 1e-13:
            return logits_K
        logits_K += groups_GK[loss_G.argmin()] / lam


def descend(loss_of, start_K, steps, size=1.0):
    """Gradient descent on the logits: for a loss without a minimum, or to stop early."""
    logits_K = start_K.clone()
    for _ in range(steps):
        logits_K = logits_K - size * jacobian(loss_of, logits_K)
    return logits_K.log_softmax(0)


# --- self-play -----------------------------------------------------------------------------------

def next_policy(data_K, opponent_K, lam=1.0, loss="logistic", mu=1.0, generated_K=None,
                start_K=None):
    """p_{t+1}: the policy with the least expected loss against p_t. [K]

    The player starts as its own opponent, or from start_K. Raises ValueError for the correlation
    loss, which has no minimum.
    """
    if loss == "correlation":
        raise ValueError("the correlation loss has no minimum: it falls for ever")
    if start_K is None:
        start_K = opponent_K

    def loss_of(logits_K):
        return expected_loss(logits_K, data_K, opponent_K, lam, loss, mu, generated_K)

    if loss == "hinge":
        return minimise_hinge(loss_of, start_K, lam).log_softmax(0)
    return minimise(loss_of, start_K).log_softmax(0)


def play(data_K, first_K, iterations=8, **settings):
    """Algorithm 1 without sampling, from p_0: [p_0, p_1, …]. Stops where p_t is FAR from p_data.

    `settings` are those of `next_policy`: lam, loss, mu.
    """
    policies = [first_K]
    while len(policies) <= iterations and kl(data_K, policies[-1]) < FAR:
        policies.append(next_policy(data_K, policies[-1], **settings))
    return policies


def frequencies(policy_K, n, generator):
    """Sample n responses from a policy; return the logarithm of each one's frequency. [K]"""
    response_N = torch.multinomial(policy_K.exp(), n, replacement=True, generator=generator)
    return (response_N.bincount(minlength=len(policy_K)).double() / n).log()


# --- how fast self-play converges ----------------------------------------------------------------

def contraction(before_K, after_K, data_K=DATA) -> float:
    """The factor c in log(p_{t+1}/p_data) = c log(p_t/p_data) + const, by least squares.

    For the logistic loss c = 1 − 1/λ, whatever p_t is (Theorem 5.4).
    """
    before_K = (before_K - data_K) - (before_K - data_K).mean()
    after_K = (after_K - data_K) - (after_K - data_K).mean()
    return (before_K @ after_K / before_K.square().sum()).item()


def behaviour(factor) -> str:
    """What becomes of log(p_t/p_data) if each iteration multiplies it by this factor.

    >>> behaviour(-1.5), behaviour(0.01)
    ('× −1.5: DIVERGES', '× 0.01: geometric')
    """
    size = abs(factor)
    if size < 1e-9:
        return "× 0: one step"
    if abs(size - 1) < 1e-9:
        word = "2-cycle"
    elif size > 1:
        word = "DIVERGES"
    else:
        word = "oscillates" if factor < 0 else "geometric"
    sign = "−" if factor < 0 else ""
    return f"× {sign}{size:.3g}: {word}"


def predicted_factor(loss, lam=1.0, mu=1.0) -> float:
    """1 + L_r / (L_rr + L_ss − L_r − L_s), L's derivatives at r = s = 0: c close to p_data.

    Why: let e = log(p_t/p_data) and x = log(p_{t+1}/p_t) be small. Normalisation, E_{p_t} e^x = 1,
    makes E_{p_t} x = −½ E x², so E_{p_data} x = −½ E x² − E ex. To second order the expected loss
    is then a constant plus ½ (L_rr + L_ss − L_r − L_s) E x² − L_r E ex. Its minimum is at
    x = e L_r / (L_rr + L_ss − L_r − L_s), and log(p_{t+1}/p_data) is e + x.

    For a loss ℓ(λ(r − s)) this is 1 + ℓ'(0)/(2λ ℓ''(0)). It is −inf for hinge and correlation,
    which have no curvature at 0: there the formula says nothing.

    >>> predicted_factor("logistic", lam=2.0), predicted_factor("exponential", lam=2.0)
    (0.5, 0.75)
    """
    def loss_of(ratios):
        return LOSSES[loss](ratios[0], ratios[1], lam, mu)

    zero = torch.zeros(2, dtype=torch.float64)
    slope_r, slope_s = jacobian(loss_of, zero)
    curvature = hessian(loss_of, zero).trace()
    return (1 + slope_r / (curvature - slope_r - slope_s)).item()


# --- two games that do not end at p_data ---------------------------------------------------------

def fixed_point(next_of, start_K, iterations=100):
    """Where p ← next_of(p) stands still, played from start_K. [K], or None if it never does."""
    policy_K = start_K
    for _ in range(iterations):
        before_K, policy_K = policy_K, next_of(policy_K)
        if (policy_K - before_K).abs().max() < 1e-8:
            return policy_K
    return None


def next_alpha_spin(data_K, opponent_K, first_K, alpha, lam=1.0):
    """α-SPIN (arXiv 2404.04291): log-ratios to p_0^α p_t^{1−α} instead of p_t. [K]

    This is what a KL penalty towards p_0, called first_K here, amounts to. y' still comes from
    p_t, so Theorem 5.4's argument gives p_{t+1} ∝ p_0^α p_t^{1−α} (p_data/p_t)^{1/λ}.
    """
    reference_K = (alpha * first_K + (1 - alpha) * opponent_K).log_softmax(0)
    return next_policy(data_K, reference_K, lam, generated_K=opponent_K)


def alpha_spin_limit(data_K, first_K, alpha, lam=1.0):
    """α-SPIN's fixed point, ∝ p_0^{αλ/(1+αλ)} p_data^{1/(1+αλ)}. [K]

    It follows from p_{t+1} = p_t above. An iteration multiplies log(p_t/limit) by 1 − α − 1/λ, so
    a penalty does not help a small λ: self-play diverges below λ = 1/(2 − α) instead of ½.
    """
    share = alpha * lam / (1 + alpha * lam)
    return (share * first_K + (1 - share) * data_K).log_softmax(0)


def next_t_spin(data_K, opponent_K, first_K, alpha=1.0, beta=1.0):
    """T-SPIN (arXiv 2601.08198): ℓ(α log p(y)/p(y')) + β ℓ(α log p(y')/p(y_0)), y_0 ~ p_0. [K]

    ℓ is the logistic loss. There is no p_t in the log-ratios; it is only where y' comes from. The
    loss is that of a Bradley–Terry model: response i has strength p_θ(i)^α, and has beaten j
    p_data(i) p_t(j) + β p_t(i) p_0(j) times.
    """
    no_reference_K = torch.zeros_like(data_K)

    def loss_of(logits_K):
        real_over_generated = expected_loss(logits_K, data_K, no_reference_K, alpha,
                                            generated_K=opponent_K)
        generated_over_first = expected_loss(logits_K, opponent_K, no_reference_K, alpha,
                                             generated_K=first_K)
        return real_over_generated + beta * generated_over_first

    return minimise(loss_of, opponent_K).log_softmax(0)


def t_spin_limit_near_uniform(data_K, first_K, alpha=1.0, beta=1.0):
    """∝ (p_data/p_0^β)^{1/(α(1+β) + 1 − β)}: T-SPIN's fixed point, to first order. [K]

    First order in how far p_data and p_0 are from uniform; exact for β = 0. An exact formula need
    not exist: for one choice of three responses with α = β = 1, the fixed point is a root of a
    polynomial of degree 7 that cannot be solved in radicals (tests/test_theory_table.py).
    """
    return ((data_K - beta * first_K) / (alpha * (1 + beta) + 1 - beta)).log_softmax(0)
