"""The objective: log p_θ(y|x), the SPIN loss on top of it, and what the theory says it reaches.

    L(θ) = E_{x, y~p_data, y'~p_t} ℓ( λ log p_θ(y|x)/p_t(y|x) − λ log p_θ(y'|x)/p_t(y'|x) )

Equation and theorem numbers are those of Chen et al., arXiv 2401.01335. All values are in nats.

Reading order: `token_logps` and `sequence_logps`, the log-probabilities → `LOSSES`, `spin_loss` and
`pair_loss` → `mass_anchor` → the theory, `optimal_next_policy` and `loss_floor` → `FusedLogps`,
which computes `token_logps` in less memory; it is the hardest part, and can be left for last.

Dimensions: B sequences or pairs, T tokens, S = T−1 scored positions, D width, V vocabulary, C
columns of V. For log-probabilities: U hidden states, N targets. For losses and the anchor: tables
of N responses to each of P prompts. For the theory: K responses.
"""
import functools
import math
import warnings

import torch
import torch.nn.functional as F


# --- log-probabilities ---------------------------------------------------------------------------

def token_logps(hidden_UD, weight_VD, targets_N, impl="eager", state_N=None):
    """log p(target) = z_target − log Σ_v exp z_v, where z = weight @ hidden. [N], nats.

    Target n is predicted by hidden_UD[state_N[n]], so that several targets may share a state and
    its logits; without state_N, by hidden_UD[n]. "fused" gives the same numbers and holds the
    logits of one block of the vocabulary at a time. Raises ValueError for an unknown impl.
    """
    if state_N is None:
        state_N = torch.arange(len(targets_N), device=targets_N.device)
    if impl == "fused":
        return FusedLogps.apply(hidden_UD, weight_VD, targets_N, state_N)
    if impl != "eager":
        raise ValueError(f"impl is {impl!r}; use 'eager' or 'fused'")
    logp_UV = (hidden_UD @ weight_VD.T).log_softmax(dim=1)
    return logp_UV[state_N, targets_N]


def sequence_logps(model, tokens_BT, response_BT, impl="eager"):
    """log p_θ(y|x) = Σ_k log p_θ(y_k | x, y_<k): a sum over the response, END included. [B], nats.

    response_BT is True on the tokens of y, END among them; prompt and padding add nothing. This is
    the definition, one row for each response. Training calls `response_logps` in data/responses.py:
    the same sum, where what the responses to one prompt share is read once.
    """
    # Position i has read the tokens 0…i, so it scores token i+1.
    hidden_BSD = model.hidden(tokens_BT[:, :-1])
    target_BS, scored_BS = tokens_BT[:, 1:], response_BT[:, 1:]
    logp_N = token_logps(hidden_BSD[scored_BS], model.head_weight, target_BS[scored_BS], impl)
    sequence_N = scored_BS.nonzero()[:, 0]
    return logp_N.new_zeros(len(tokens_BT)).index_add(0, sequence_N, logp_N)


# --- the losses ----------------------------------------------------------------------------------

# A loss is a function of two log-ratios: r = log p_θ(y)/p_t(y) of the real response and
# s = log p_θ(y')/p_t(y') of the generated one. To add a loss, add a line: `--loss` offers it then;
# with a line in THEOREM_LAM below, its prediction is shown too. FORMULAS in tests/test_theory.py
# wants it as well.
LOSSES = {
    "logistic": lambda r, s, lam: F.softplus(-lam * (r - s)),  # Eq. 4.7: ℓ(u) = log(1 + e^−u)
    "hinge": lambda r, s, lam: F.relu(1 - lam * (r - s)),
    "exponential": lambda r, s, lam: torch.exp(-lam * (r - s)),
    "correlation": lambda r, s, lam: 1 - lam * (r - s),
    # SPACE, arXiv 2512.07175, with as many generated as real responses: it asks of each response
    # alone, "real or generated?" It has no λ.
    "space": lambda r, s, lam: F.softplus(-r) + F.softplus(s),
}


def spin_loss(policy_real_B, policy_generated_B, opponent_real_B, opponent_generated_B, lam,
              loss="logistic"):
    """The loss of each pair (y, y'), not averaged (Eq. 4.7). Arguments are log-probs in nats.

    They have shape [B], or any shapes that broadcast. Raises ValueError for an unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; use one of {', '.join(LOSSES)}")
    r_B = policy_real_B - opponent_real_B
    s_B = policy_generated_B - opponent_generated_B
    return LOSSES[loss](r_B, s_B, lam)


def pair_loss(player_PN, opponent_PN, real_PN, generated_PN, lam, loss="logistic"):
    """E_{y, y'} of `spin_loss`, over all pairs of each prompt's responses. [P], nats.

    The first two are log p_θ and log p_t of N responses to each of P prompts. real_PN and
    generated_PN are the weights of a response as y and as y'; both sum to 1 over a prompt.
    """
    weight_PNN = real_PN[:, :, None] * generated_PN[:, None, :]  # y down the rows, y' across
    # A pair that has no weight is given r = s = 0: its loss might overflow, and 0 · ∞ is NaN.
    ratio_PN, has_weight_PNN = player_PN - opponent_PN, weight_PNN > 0
    r_PNN = torch.where(has_weight_PNN, ratio_PN[:, :, None], 0.0)
    s_PNN = torch.where(has_weight_PNN, ratio_PN[:, None, :], 0.0)
    loss_PNN = spin_loss(r_PNN, s_PNN, 0.0, 0.0, lam, loss)  # log p_t is subtracted already
    return (weight_PNN * loss_PNN).sum(dim=(1, 2))


# --- what the loss cannot see --------------------------------------------------------------------

def mass_anchor(player_PN, opponent_PN, log_share_PN):
    """−log min(1, m) for each prompt, where m = Σ_n share_n p_θ(y_n)/p_t(y_n). [P], nats.

    The loss (but for SPACE's) depends on differences of log-ratios alone. So one factor on p_θ of
    every response that it sees changes nothing, and probability leaks to strings that nobody has
    sampled. README.md, "What the loss cannot see", has the reasons, also for the penalty's form.

    m estimates Σ_y p_θ(y) = 1 from the responses at hand: each adds share · p_θ/p_t. The share of a
    real response is p_t, so it adds p_θ itself; that of any other is its fraction of the samples
    (not generated_PN, its weight in the loss). m falls as probability leaks. A rare response with a
    large ratio may lift m above 1; that is no leak, and min(1, m) does not reward it. (Where
    samples are few, m scatters about 1 even without a leak; then the mean of −log min(1, m) is
    above 0, and the anchor pushes a little.) For padding log_share_PN is −∞ and opponent_PN is 0.
    """
    # The bracket is exactly 0 for a real response, so that it adds p_θ itself.
    log_m_P = (player_PN + (log_share_PN - opponent_PN)).logsumexp(dim=1)
    return -log_m_P.clamp(max=0)


# --- the theory ----------------------------------------------------------------------------------

def optimal_next_policy(logp_data_K, logp_opponent_K, lam):
    """Theorem 5.4: p_{t+1} ∝ p_t (p_data/p_t)^{1/λ}, normalised over the last dimension. Nats.

    Where p_data is 0 the prediction is 0. Raises ValueError where p_t is 0 and p_data is not
    (the theorem supposes that p_t covers p_data), and for λ ≤ 0.

    >>> half, data = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> optimal_next_policy(data, half, lam=1.0).exp()  # one step, all the way
    tensor([0.9000, 0.1000])
    >>> optimal_next_policy(data, half, lam=2.0).exp()  # √0.9 : √0.1 = 3 : 1
    tensor([0.7500, 0.2500])
    """
    support_K = logp_data_K > -math.inf
    if not lam > 0 or bool((support_K & (logp_opponent_K == -math.inf)).any()):
        raise ValueError("Theorem 5.4 needs λ > 0, and p_t > 0 wherever p_data > 0")
    score_K = (1 - 1 / lam) * logp_opponent_K + logp_data_K / lam
    return score_K.masked_fill(~support_K, -math.inf).log_softmax(dim=-1)


# The λ with which Theorem 5.4 holds for other losses. Exponential: two responses, of which one is
# real and the other generated with probability A, or the other way round with probability B, cost
# A e^−λΔ + B e^λΔ, where Δ is the difference of their log-ratios. The slope is 0 where
# e^2λΔ = A/B; for the logistic loss it is e^λΔ = A/B. So λ counts twice.
# SPACE asks of each response alone, and its optimum is p_data itself. The straight losses, hinge
# and correlation, have no such optimum.
THEOREM_LAM = {
    "logistic": lambda lam: lam,
    "exponential": lambda lam: 2 * lam,
    "space": lambda lam: 1.0,
}


def loss_floor(logp_data_K, logp_opponent_K):
    """Lemma C.2: min_θ L = log 2 − JSD(p₊‖p₋) for the logistic loss, whatever λ is. Nats.

    p₊(y, y') = p_data(y) p_t(y'), and p₋ is p₊ with y and y' exchanged. Written out it is
    Σ p₊ log(1 + p₋/p₊), to which responses outside the support of p_data add nothing: they may be
    left out, and p_t then sums to less than 1. Reduces the last dimension.
    """
    plus_KK = logp_data_K[..., :, None] + logp_opponent_K[..., None, :]
    minus_KK = logp_opponent_K[..., :, None] + logp_data_K[..., None, :]
    ratio_KK = torch.where(plus_KK > -math.inf, minus_KK - plus_KK, 0.0)  # else 0 · log(0/0)
    return (plus_KK.exp() * F.softplus(ratio_KK)).sum(dim=(-2, -1))


# --- the same log-probabilities in less memory ---------------------------------------------------

# How many logits a block holds: 4 MB that stay in a CPU's cache; a GPU wants few, large products.
BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}
LEAST_COLUMNS = 64  # narrower products waste more than they save


class FusedLogps(torch.autograd.Function):
    """`token_logps` with the logits made one block of the vocabulary at a time, then dropped.

    Forward: max is the largest logit of the columns so far, and sum = Σ exp(z_v − max) over them.
    A block raises max to new = max(max, its own), so sum becomes
    sum · exp(max − new) + Σ_block exp(z_v − new). At the end log p(y) = (z_y − max) − log sum, for
    z_y − (max + log sum) would round off digits of log sum.

    Backward: ∂log p(y)/∂z_v = 1[v = y] − exp(z_v − max)/sum. With g = ∂L/∂log p(y), each block's
    logits, made anew from h and W, turn in place into G = g (1[v = y] − exp(z_v − max)/sum), summed
    over the targets y of a state; then dH += G W_block, and dW_block = Gᵀ H is final. So there are
    four matrix products instead of three, unless the vocabulary fits one block: its logits are kept
    for the backward pass.
    """
    @staticmethod
    def forward(ctx, hidden_UD, weight_VD, targets_N, state_N):
        max_U = hidden_UD.new_full((len(hidden_UD),), -math.inf)
        sum_U = hidden_UD.new_zeros(len(hidden_UD))
        target_logit_N = hidden_UD.new_full(targets_N.shape, math.nan)
        join = compiled(join_block, hidden_UD.device.type)
        for first, weight_CD, logits_UC in logit_blocks(hidden_UD, weight_VD):
            column_N, inside_N = columns_of(targets_N, first, len(weight_CD))
            target_logit_N = torch.where(inside_N, logits_UC[state_N, column_N], target_logit_N)
            max_U, sum_U = join(logits_UC, max_U, sum_U)
        # If the last block was also the first, keep it for the backward pass.
        ctx.logits_UV = logits_UC if len(weight_CD) == len(weight_VD) else None
        ctx.save_for_backward(hidden_UD, weight_VD, targets_N, state_N, max_U, sum_U)
        return (target_logit_N - max_U[state_N]) - sum_U.log()[state_N]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        """∂L/∂hidden and ∂L/∂weight from grad_N = ∂L/∂log p; None for the indices."""
        hidden_UD, weight_VD, targets_N, state_N, max_U, sum_U = ctx.saved_tensors
        grad_hidden_UD = torch.zeros_like(hidden_UD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        blocks = logit_blocks(hidden_UD, weight_VD)
        if ctx.logits_UV is not None:
            blocks = [(0, weight_VD, ctx.logits_UV)]
            ctx.logits_UV = None  # overwritten below; a second backward pass makes it again
        to_gradient_ = compiled(minus_scaled_exp_, hidden_UD.device.type)
        grad_U = torch.zeros_like(sum_U).index_add(0, state_N, grad_N)
        for first, weight_CD, logits_UC in blocks:
            column_N, inside_N = columns_of(targets_N, first, len(weight_CD))
            to_gradient_(logits_UC, max_U, grad_U / sum_U)  # −g softmax; below, + g
            logits_UC.index_put_((state_N, column_N), grad_N * inside_N, accumulate=True)
            if grad_hidden_UD is not None:
                grad_hidden_UD.addmm_(logits_UC, weight_CD)
            if grad_weight_VD is not None:
                torch.mm(logits_UC.T, hidden_UD,
                         out=grad_weight_VD[first:first + len(weight_CD)])
        return grad_hidden_UD, grad_weight_VD, None, None


def logit_blocks(hidden_UD, weight_VD):
    """Yield (first column, weight_CD, logits_UC) for one block of the vocabulary after another.

    All blocks share one buffer: a block's logits are gone once the next one is asked for.
    """
    U, V = len(hidden_UD), len(weight_VD)
    C = min(V, max(LEAST_COLUMNS, BLOCK_LOGITS[hidden_UD.device.type] // max(1, U)))
    buffer_UC = hidden_UD.new_empty(U, C)
    for first in range(0, V, C):
        weight_CD = weight_VD[first:first + C]
        logits_UC = torch.mm(hidden_UD, weight_CD.T, out=buffer_UC[:, :len(weight_CD)])
        yield first, weight_CD, logits_UC


def columns_of(targets_N, first, C):
    """Each target's column in a block, and whether it is there at all (else column is any)."""
    column_N = (targets_N - first).clamp(0, C - 1)
    return column_N, column_N == targets_N - first


def join_block(logits_UC, max_U, sum_U):
    """One more block joins the running maximum and the running sum."""
    new_max_U = torch.maximum(max_U, logits_UC.amax(dim=1))
    old_sum_U = sum_U * (max_U - new_max_U).exp()
    return new_max_U, old_sum_U + (logits_UC - new_max_U[:, None]).exp().sum(dim=1)


def minus_scaled_exp_(logits_UC, max_U, scale_U):
    """logits ← −scale · exp(logits − max), in place: the block is read once and written once."""
    logits_UC.copy_((logits_UC - max_U[:, None]).exp() * -scale_U[:, None])


@functools.cache
def compiled(body, device):
    """`body` through torch.compile; where that fails, `body` itself after one warning.

    Tried once on a few numbers, so that an error of the caller's own (out of memory, say) is never
    mistaken for a missing compiler, and no block is changed twice.
    """
    fast = torch.compile(body, dynamic=True)  # dynamic: the number of tokens differs at every step
    try:
        # A slice of a buffer, as blocks are; and two numbers for each of its rows.
        fast(torch.zeros(4, 9, device=device)[:, :8], *torch.zeros(2, 4, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no C++ compiler, no Triton, an unsupported Python, …
        warnings.warn(f"fused log-probs run uncompiled: torch.compile met {type(error).__name__}")
        return body
    return fast
