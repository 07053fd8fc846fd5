"""The objective: log p_θ(y|x), the SPIN loss on top of it, and what the theory says it reaches.

    L(θ) = E_{x, y~p_data, y'~p_t} ℓ( λ log p_θ(y|x)/p_t(y|x) − λ log p_θ(y'|x)/p_t(y'|x) )

Equation and theorem numbers are those of Chen et al., arXiv 2401.01335. All values are in nats.

Reading order: `token_logps` and `sequence_logps`, the log-probabilities → `LOSSES` and `spin_loss`
→ `mass_anchor` → the theory, `optimal_next_policy` and `loss_floor` → `FusedLogps`, which computes
`token_logps` in less memory; it is the hardest part, and can be left for last.

Dimensions: B sequences or pairs, T tokens, S = T−1 scored positions, N flat tokens or responses,
P prompts, D width, V vocabulary, C columns of V, K responses that a prompt may get.
"""
import functools
import math
import warnings

import torch
import torch.nn.functional as F


# --- log-probabilities ---------------------------------------------------------------------------

def token_logps(hidden_ND, weight_VD, targets_N, impl="eager", rows_N=None):
    """log p(target) = z_target − log Σ_v exp z_v, where z = weight @ hidden. [N], nats.

    One target for each hidden state. Or, with rows_N, target n is for hidden_ND[rows_N[n]]: several
    targets share a state and its logits, and there need not be N states. float32. "fused" gives the
    same numbers and holds the logits of one block of the vocabulary at a time (float64 stays
    float64). Raises ValueError for an unknown impl.
    """
    if impl == "fused":
        hidden_ND = hidden_ND if rows_N is None else hidden_ND.index_select(0, rows_N)
        return fused_token_logps(hidden_ND, weight_VD, targets_N)
    if impl != "eager":
        raise ValueError(f"impl is {impl!r}; use 'eager' or 'fused'")
    with torch.autocast(hidden_ND.device.type, enabled=False):  # a bfloat16 logit is off by 0.01
        logits_UV = (hidden_ND.to(weight_VD.dtype) @ weight_VD.T).float()
    logp_UV = logits_UV.log_softmax(dim=1)  # U hidden states; without rows_N, U = N
    if rows_N is None:
        return logp_UV.gather(1, targets_N[:, None])[:, 0]
    return logp_UV[rows_N, targets_N]


def sequence_logps(model, tokens_BT, response_BT, impl="eager"):
    """log p_θ(y|x) = Σ_k log p_θ(y_k | x, y_<k): a sum over the response, END included. [B], nats.

    response_BT is True on the tokens of y, END among them; prompt and padding add nothing.
    This is the definition. Training uses `response_logps` in data/responses.py, which gives the
    same numbers faster.
    """
    hidden_BSD = model.hidden(tokens_BT[:, :-1])  # Position i has read tokens 0…i, …
    target_BS, scored_BS = tokens_BT[:, 1:], response_BT[:, 1:]  # … so it scores token i+1.
    logp_N = token_logps(hidden_BSD[scored_BS], model.head_weight, target_BS[scored_BS], impl)
    row_N = scored_BS.nonzero()[:, 0]
    return logp_N.new_zeros(len(tokens_BT)).index_add(0, row_N, logp_N)


# --- the losses ----------------------------------------------------------------------------------

# A loss is a function of two log-ratios: r = log p_θ(y)/p_t(y) of the real response and
# s = log p_θ(y')/p_t(y') of the generated one. To add a loss, add a line: `--loss`, the scale of
# its gradient and the theorem's prediction all follow from the function itself.
LOSSES = {
    "logistic": lambda r, s, lam, mu: F.softplus(-lam * (r - s)),  # Eq. 4.7: ℓ(u) = log(1 + e^−u)
    "hinge": lambda r, s, lam, mu: F.relu(1 - lam * (r - s)),
    "exponential": lambda r, s, lam, mu: torch.exp(-lam * (r - s)),
    "correlation": lambda r, s, lam, mu: 1 - lam * (r - s),
    # SPACE, arXiv 2512.07175: −log σ_μ(r) − μ log σ_{1/μ}(−s) with σ_μ(u) = 1/(1 + μ e^−u). Two
    # classifiers ask "real or generated?", with μ generated responses to a real one.
    "space": lambda r, s, lam, mu: (F.softplus(math.log(mu) - r)
                                    + mu * F.softplus(s - math.log(mu))),
    # IPO, arXiv 2310.12036: its (r − s − 1/(2τ))² is this one divided by λ², at λ = 2τ.
    "squared": lambda r, s, lam, mu: (lam * (r - s) - 1).square(),
    # KLIEP (Sugiyama et al. 2008). Its mean is SFT's loss plus a constant: E_{p_t} e^s = Σ p_θ = 1.
    "kliep": lambda r, s, lam, mu: s.exp() - r,
    # DDO, arXiv 2503.01103: a GAN's discriminator, made of the policy's own log-ratio.
    "ddo": lambda r, s, lam, mu: F.softplus(-lam * r) + F.softplus(lam * s),
    # SPPO, arXiv 2405.00675, where the real response always wins; its η is 1/λ.
    "sppo": lambda r, s, lam, mu: (lam * r - 0.5).square() + (lam * s + 0.5).square(),
}


def spin_loss(policy_real_B, policy_generated_B, opponent_real_B, opponent_generated_B, lam,
              loss="logistic", mu=1.0):
    """The loss L(r, s) of each pair (y, y'), not averaged. Arguments are log-probs in nats, [B].

    r is the log-ratio log p_θ/p_t of the real response, s that of the generated one (Eq. 4.7).
    logistic, hinge, exponential, correlation and squared depend on λ(r − s) alone; space, kliep,
    ddo and sppo use r and s separately. space and kliep ignore λ; only space uses μ. Raises
    ValueError for an unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; use one of {', '.join(LOSSES)}")
    real_ratio_B = policy_real_B - opponent_real_B
    generated_ratio_B = policy_generated_B - opponent_generated_B
    return LOSSES[loss](real_ratio_B, generated_ratio_B, lam, mu)


def loss_slopes(loss, r, s, lam, mu=1.0):
    """(∂L/∂r, ∂L/∂s) of one loss at the log-ratios r and s; float64, by autograd."""
    return slopes_of(LOSSES[loss], r, s, lam, mu)


@functools.cache  # By the function, not its name: a loss that is replaced is differentiated anew.
def slopes_of(loss_of, r, s, lam, mu):
    """`loss_slopes` of a function; remembered, since each training step asks for the same ones."""
    r, s = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (r, s))
    slopes = torch.autograd.grad(loss_of(r, s, lam, mu), (r, s), materialize_grads=True)
    return tuple(slope.item() for slope in slopes)


def sft_scale(loss, lam, mu=1.0):
    """1 / |∂L/∂r| at r = s = 0: the factor that gives a loss the first gradient of SFT.

    At the start of an iteration p_θ = p_t. So both log-ratios are 0, and E_{y'~p_t} ∇log p_t(y') =
    ∇Σp_t = 0. What is left of ∇L is (∂L/∂r) · E_{y~p_data} ∇log p_θ(y), a multiple of SFT's
    gradient. The factor is 1/(λ|ℓ'(0)|) for a loss ℓ(λ(r − s)), so 2/λ for the logistic one, and
    (1 + μ)/μ for SPACE.

    >>> round(sft_scale("logistic", lam=4.0), 6), round(sft_scale("hinge", lam=4.0), 6)
    (0.5, 0.25)
    """
    return 1 / abs(loss_slopes(loss, 0.0, 0.0, lam, mu)[0])


# --- what the loss cannot see --------------------------------------------------------------------

def mass_anchor(policy_N, opponent_N, log_share_N, prompt_N, P=None):
    """(1 − m) log 1/m, where m = min(1, Σ_n share_n p_θ(y'_n)/p_t(y'_n)); a mean over P prompts.

    Adding one constant to every log p_θ changes no margin, so SPIN lets probability leak to
    strings that nobody sampled. Over all strings, E_{y'~p_t}[p_θ(y')/p_t(y')] = Σ_y' p_θ(y') = 1
    for every θ. Over the sampled y', m falls below 1 as p_θ moves probability elsewhere. At
    Theorem 5.4's optimum p_θ has only right responses; if all of them are among the y', each with
    its share p_t(y'), m is 1 there, and the penalty leaves that optimum where it is.

    For a small leak the penalty is about (1 − m)². As m → 0 its slope in log m tends to −1, while
    that of (1 − m)² tends to 0: a large leak can still be undone. m > 1 is not penalised: it comes
    from a rare response with a huge ratio, and a penalty would lower every log p_θ. log_share_N
    are the logs of the shares that the y' have under p_t; prompt_N numbers the prompts 0 … P−1.
    """
    P = int(prompt_N.max()) + 1 if P is None else P
    # log m by log-sum-exp for each prompt, since the ratio itself overflows at 89 nats.
    term_N = policy_N + (log_share_N - opponent_N)
    top_P = term_N.new_full((P,), -1e30).scatter_reduce(0, prompt_N, term_N.detach(), "amax")
    sum_P = term_N.new_zeros(P).index_add(0, prompt_N, (term_N - top_P[prompt_N]).exp())
    log_m_P = (top_P + sum_P.log()).clamp(max=0)
    return (log_m_P.expm1() * log_m_P).mean()


# --- the theory ----------------------------------------------------------------------------------

def optimal_next_policy(logp_data_K, logp_opponent_K, lam):
    """Theorem 5.4: p_{t+1} ∝ p_t (p_data/p_t)^{1/λ}, normalised over the last dimension. Nats.

    Where p_data is 0 the prediction is 0. Raises ValueError where p_t is 0 and p_data is not
    (the theorem supposes that p_t covers p_data), and for λ ≤ 0.

    >>> half, data = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> optimal_next_policy(data, half, lam=1.0).exp()  # one step, all the way
    tensor([0.9000, 0.1000])
    >>> optimal_next_policy(data, half, lam=2.0).exp()  # √9 : √1
    tensor([0.7500, 0.2500])
    """
    support_K = logp_data_K > -math.inf
    if not lam > 0 or bool((support_K & (logp_opponent_K == -math.inf)).any()):
        raise ValueError("Theorem 5.4 needs λ > 0, and p_t > 0 wherever p_data > 0")
    score_K = (1 - 1 / lam) * logp_opponent_K + logp_data_K / lam
    return score_K.masked_fill(~support_K, -math.inf).log_softmax(dim=-1)


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


def fused_token_logps(hidden_ND, weight_VD, targets_N):
    """`token_logps` through `FusedLogps`: logits in float32 at least, also of bfloat16 inputs."""
    hidden_ND = hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    if len(targets_N) == 0:
        return (hidden_ND @ weight_VD.to(hidden_ND.dtype).T).sum(dim=1)  # empty, but differentiable
    return FusedLogps.apply(hidden_ND, weight_VD, targets_N)


class FusedLogps(torch.autograd.Function):
    """`token_logps` with the logits made one block of the vocabulary at a time, then dropped.

    Forward: m is the largest logit so far, s = Σ exp(z_v − m) over the columns so far. A block
    raises m to m' = max(m, its own), so s becomes s exp(m − m') + Σ_block exp(z_v − m'). At the
    end log p(y) = (z_y − m) − log s, for z_y − (m + log s) would round off digits of log s.

    Backward: ∂log p(y)/∂z_v = 1[v = y] − exp(z_v − m)/s. With g = ∂L/∂log p(y), each block's
    logits, made anew from h and W, turn in place into G = g (1[v = y] − exp(z_v − m)/s); then
    dH += G W_block, and dW_block = Gᵀ H is final. So there are four matrix products instead of
    three, unless the vocabulary fits one block: its logits are kept for the backward pass.
    """
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        max_N = hidden_ND.new_full(targets_N.shape, -math.inf)
        sum_N = hidden_ND.new_zeros(targets_N.shape)
        target_logit_N = hidden_ND.new_full(targets_N.shape, math.nan)
        join = compiled(join_block, hidden_ND.device.type)
        for first, weight_CD, logits_NC in logit_blocks(hidden_ND, weight_VD):
            column_N, inside_N = columns_of(targets_N, first, len(weight_CD))
            logit_N = logits_NC.gather(1, column_N[:, None])[:, 0]
            target_logit_N = torch.where(inside_N, logit_N, target_logit_N)
            max_N, sum_N = join(logits_NC, max_N, sum_N)
        one_block = len(weight_CD) == len(weight_VD)  # the vocabulary is small:
        ctx.logits_NC = logits_NC if one_block else None  # keep the block, do not make it twice
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, max_N, sum_N)
        return (target_logit_N - max_N) - sum_N.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        """∂L/∂hidden and ∂L/∂weight from grad_N = ∂L/∂log p; None for the targets."""
        hidden_ND, weight_VD, targets_N, max_N, sum_N = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        blocks = logit_blocks(hidden_ND, weight_VD)
        if ctx.logits_NC is not None:
            blocks = [(0, weight_VD.to(hidden_ND.dtype), ctx.logits_NC)]
            ctx.logits_NC = None  # overwritten below; a second backward pass makes it again
        to_gradient_ = compiled(minus_softmax_, hidden_ND.device.type)
        for first, weight_CD, logits_NC in blocks:
            column_N, inside_N = columns_of(targets_N, first, len(weight_CD))
            to_gradient_(logits_NC, max_N, grad_N / sum_N)
            logits_NC.scatter_add_(1, column_N[:, None], (grad_N * inside_N)[:, None])
            if grad_hidden_ND is not None:
                grad_hidden_ND.addmm_(logits_NC, weight_CD)
            if grad_weight_VD is not None:
                # out=, as in logit_blocks: autocast leaves such a product in float32.
                block_CD = torch.mm(logits_NC.T, hidden_ND, out=torch.empty_like(weight_CD))
                grad_weight_VD[first:first + len(weight_CD)] = block_CD
        return grad_hidden_ND, grad_weight_VD, None


def logit_blocks(hidden_ND, weight_VD):
    """Yield (first column, weight_CD, logits_NC) for one block of the vocabulary after another.

    All blocks share one buffer: a block's logits are gone once the next one is asked for.
    """
    N, V = len(hidden_ND), len(weight_VD)
    C = min(V, max(LEAST_COLUMNS, BLOCK_LOGITS.get(hidden_ND.device.type, 1 << 20) // N))
    buffer_NC = hidden_ND.new_empty(N, C)
    for first in range(0, V, C):
        weight_CD = weight_VD[first:first + C].to(hidden_ND.dtype)
        # Subtle: autocast leaves a product with out= alone, so these logits stay float32.
        logits_NC = torch.mm(hidden_ND, weight_CD.T, out=buffer_NC[:, :len(weight_CD)])
        yield first, weight_CD, logits_NC


def columns_of(targets_N, first, C):
    """Each target's column in a block, and whether it is there at all (else column is any)."""
    column_N = (targets_N - first).clamp(0, C - 1)
    return column_N, column_N == targets_N - first


def join_block(logits_NC, max_N, sum_N):
    """One more block joins the running maximum and the running sum."""
    new_max_N = torch.maximum(max_N, logits_NC.amax(dim=1))
    old_sum_N = sum_N * (max_N - new_max_N).exp()
    return new_max_N, old_sum_N + (logits_NC - new_max_N[:, None]).exp().sum(dim=1)


def minus_softmax_(logits_NC, max_N, scale_N):
    """logits ← −scale · exp(logits − max), in place: the block is read once and written once."""
    logits_NC.copy_((logits_NC - max_N[:, None]).exp() * -scale_N[:, None])


@functools.cache
def compiled(body, device):
    """`body` through torch.compile; where that fails, `body` itself after one warning.

    Tried once on a few numbers, so that an error of the caller's own (out of memory, say) is never
    mistaken for a missing compiler, and no block is changed twice.
    """
    fast = torch.compile(body, dynamic=True)  # dynamic: the number of tokens differs at every step
    try:
        fast(torch.zeros(4, 9, device=device)[:, :8], *torch.zeros(2, 4, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no C++ compiler, no Triton, an unsupported Python, …
        warnings.warn(f"fused log-probs run uncompiled: torch.compile met {type(error).__name__}")
        return body
    return fast
