"""SPIN without a network: a policy that is a table, one logit for each of K answers.

    L(θ) = Σ_y Σ_y' p_data(y) p_t(y') ℓ(…)   every pair of answers, each with its probability

Nothing is sampled and each iteration is minimised to machine precision, so that what is left is
the theory: what one exact iteration reaches, and what repeating it does.
Reading order: `expected_loss` → `minimise` → `minimise_hinge` → `descend` → `next_policy` →
`self_play` → `frequencies`.

Dimensions: K answers, B pairs of answers. Log-probabilities in nats, all in float64.
"""
import torch

from spin_loss import spin_loss


def log_table(*probabilities):
    """A policy, written as probabilities: its log-probs, float64 [K]."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


DATA = log_table(0.34, 0.24, 0.18, 0.12, 0.08, 0.04)  # p_data of six answers, and p_0, which
WEAK = log_table(0.08, 0.12, 0.18, 0.26, 0.30, 0.06)  # … knows them all but ranks them badly
FAR = 100  # nats. Beyond it e^−KL leaves float64, and a minimum can no longer be seen


def kl(p_K, q_K) -> float:
    """KL(p‖q) in nats; answers with p = 0 add nothing."""
    return torch.where(p_K.exp() > 0, p_K.exp() * (p_K - q_K), 0.0).sum().item()


def expected_loss(logits_K, data_K, opponent_K, lam, loss="logistic", mu=1.0, generated_K=None):
    """E ℓ over y ~ p_data and y' ~ p_t, exactly. logits_K: log p_θ up to a constant, [..., K].

    generated_K replaces p_t as the source of y': the frequencies in a finite sample of it.
    """
    if loss == "space":  # The others never see that constant, and left alone they stay exact
        logits_K = logits_K.log_softmax(-1)  # down to probabilities of e^−60.
    count = len(data_K)
    i_B, j_B = torch.cartesian_prod(torch.arange(count), torch.arange(count)).unbind(1)
    loss_B = spin_loss(logits_K[..., i_B], logits_K[..., j_B], opponent_K[i_B], opponent_K[j_B],
                       lam, loss, mu)
    return loss_B @ (data_K[i_B] + (opponent_K if generated_K is None else generated_K)[j_B]).exp()


def minimise(loss_of, start_K, steps=500):
    """Newton's method on the logits, each step halved until the loss no longer rises."""
    logits_K = start_K.clone()
    for _ in range(steps):
        x_K = logits_K.clone().requires_grad_()
        value = loss_of(x_K)
        slope_K, = torch.autograd.grad(value, x_K, create_graph=True)
        hessian_KK = torch.stack([torch.autograd.grad(s, x_K, retain_graph=True)[0]
                                  for s in slope_K])
        seen = hessian_KK.diagonal() != 0  # a logit that the loss cannot see stays where it is
        solve = seen.clone()
        solve[hessian_KK.diagonal().argmax()] = False  # a common shift changes nothing: hold one
        curve_KK = hessian_KK[solve][:, solve]
        factor_KK, bent = torch.linalg.cholesky_ex(curve_KK)
        if bent:  # not convex here (SPACE): where it curves down, Newton would climb
            curve_L, axis_KL = torch.linalg.eigh(curve_KK)
            factor_KK = torch.linalg.cholesky((axis_KL * curve_L.abs()) @ axis_KL.T)
        step_K = torch.zeros_like(logits_K)
        step_K[solve] = torch.cholesky_solve(-slope_K.detach()[solve, None], factor_KK)[:, 0]
        step_K[seen] -= step_K[seen].mean()  # … then keep the sum, as gradient descent would
        while loss_of(logits_K + step_K) > value + 1e-16 and step_K.abs().max() > 1e-12:
            step_K /= 2
        logits_K += step_K
        if step_K.abs().max() <= 1e-12:
            break
    return logits_K


def minimise_hinge(loss_of, start_K, lam):
    """Raise the best group of answers by 1/λ, as long as some group lowers the loss.

    Exact: the hinge is linear between kinks, which lie where a difference of log-ratios is
    ±1/λ. So a corner of it is a minimum: all log-ratios there are whole multiples of 1/λ (the
    linear program is the dual of a network flow), and where no group helps, nothing does (the
    loss is L-convex: Murota, Discrete Convex Analysis, 2003, on the L-optimality criterion).
    """
    groups_GK = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(start_K)).to(start_K)
    logits_K = start_K.clone()
    while True:
        loss_G = loss_of(logits_K + groups_GK / lam)  # group 0 is empty: the loss as it is
        if loss_G.min() > loss_G[0] - 1e-13:
            return logits_K
        logits_K += groups_GK[loss_G.argmin()] / lam


def descend(loss_of, start_K, steps, size=1.0):
    """Plain gradient descent on the logits: for a loss without a minimum, or for stopping early."""
    logits_K = start_K.clone()
    for _ in range(steps):
        x_K = logits_K.clone().requires_grad_()
        logits_K -= size * torch.autograd.grad(loss_of(x_K), x_K)[0]
    return logits_K.log_softmax(0)


def next_policy(data_K, opponent_K, lam=1.0, loss="logistic", mu=1.0, generated_K=None,
                start_K=None):
    """p_{t+1}: the policy with the least expected loss against p_t. Normalised log-probs, nats."""
    if loss == "correlation":
        raise ValueError("the correlation loss has no minimum: it falls for ever")
    loss_of = lambda logits_K: expected_loss(logits_K, data_K, opponent_K, lam, loss, mu,
                                             generated_K)
    start_K = opponent_K if start_K is None else start_K  # the player starts as its own opponent
    if loss == "hinge":
        return minimise_hinge(loss_of, start_K, lam).log_softmax(0)
    return minimise(loss_of, start_K).log_softmax(0)


def self_play(data_K, start_K, iterations=8, **how):
    """Algorithm 1, exactly: [p_0, p_1, …]. Stops early where p_t is FAR from p_data."""
    policies = [start_K]
    while len(policies) <= iterations and kl(data_K, policies[-1]) < FAR:
        policies.append(next_policy(data_K, policies[-1], **how))
    return policies


def frequencies(logp_K, n, generator):
    """n answers drawn from a policy: the log of how often each came. Nats."""
    draw_N = torch.multinomial(logp_K.exp(), n, replacement=True, generator=generator)
    return (draw_N.bincount(minlength=len(logp_K)).double() / n).log()
