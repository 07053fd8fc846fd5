"""The objective: log p_θ(y|x), the SPIN loss on top of it, and what the theory says it reaches.

    L(θ) = E_{x, y~p_data, y'~p_t} ℓ( λ log p_θ(y|x)/p_t(y|x) − λ log p_θ(y'|x)/p_t(y'|x) )

Equation and theorem numbers are those of Chen et al., arXiv 2401.01335.
Reading order: `token_logps` → `FusedLogps` (the same in less memory) → `sequence_logps` →
`space_loss` → `spin_loss` → `mass_anchor` → `optimal_next_policy` → `loss_floor`.
`python spin_loss.py` plays SPIN exactly on a table of six answers: no network, no data.

Dimensions: B sequences or pairs, T tokens, S = T−1 scored positions, N flat tokens or answers,
P prompts, D width, V vocabulary, C columns of it, K answers that a prompt may get. Nats.
"""
import functools
import math
import warnings

import torch
import torch.nn.functional as F

LOSSES = ("logistic", "hinge", "exponential", "correlation", "space")
TILE, LEAST_C = 1 << 20, 64  # logits in one block (4 MB stay in cache), and its fewest columns


def token_logps(hidden_ND, weight_VD, targets_N, impl="eager"):
    """log p(target) = z_target − log Σ_v exp z_v, logits z = hidden @ weightᵀ; float32, nats."""
    if impl not in ("eager", "fused"):
        raise ValueError(f"impl is {impl!r}; use 'eager' or 'fused'")
    if impl == "fused" and len(targets_N):  # the same, without the table that comes next
        h_ND = hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32))
        return FusedLogps.apply(h_ND, weight_VD, targets_N)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # a bfloat16 logit is off by 0.01
        logits_NV = (hidden_ND.to(weight_VD.dtype) @ weight_VD.T).float()
    return logits_NV.log_softmax(dim=1).gather(1, targets_N[:, None])[:, 0]


def compiled(body, *tensors):  # by torch.compile; where that fails, plainly after one warning
    try:
        return FusedLogps.compile(body, dynamic=True)(*tensors)  # dynamic: N differs at every step
    except Exception as error:  # no C++ compiler, no Triton, …
        FusedLogps.compile = lambda body, dynamic: body
        warnings.warn(f"fused log-probs run uncompiled: torch.compile met {type(error).__name__}")
    return body(*tensors)


def absorb(logits_NC, max_N, sum_N):  # one more block joins the running maximum and sum
    new_N = torch.maximum(max_N, logits_NC.amax(1))
    return new_N, sum_N * (max_N - new_N).exp() + (logits_NC - new_N[:, None]).exp().sum(1)


def minus_softmax_(logits_NC, max_N, scale_N):  # in place: a block is read once, written once
    logits_NC.copy_((logits_NC - max_N[:, None]).exp() * -scale_N[:, None])


class FusedLogps(torch.autograd.Function):
    """`token_logps` with the logits made one block of the vocabulary at a time, then dropped.

    Forward: m is the largest logit so far, s = Σ exp(z_v − m) over the columns so far. A block
    raises m to m' = max(m, its own), so s becomes s exp(m − m') + Σ_block exp(z_v − m'). At the
    end log p(y) = (z_y − m) − log s, for z_y − (m + log s) would round off digits of log s.
    Backward: ∂log p(y)/∂z_v = 1[v = y] − exp(z_v − m)/s. With g = ∂L/∂log p(y), each block's
    logits, made anew from h and W, turn in place into G = g (1[v = y] − exp(z_v − m)/s); then
    dH += G W_block, and dW_block = Gᵀ H is final. (So four matrix products instead of three.)
    """
    compile = functools.cache(torch.compile)

    @staticmethod
    def blocks(h_ND, weight_VD, y_N):  # first row, W_block, logits, where in them the targets are
        C = min(len(weight_VD), max(LEAST_C, TILE // len(h_ND)))
        buffer_NC = h_ND.new_empty(len(h_ND), C)  # every block's logits lie here in turn
        for a in range(0, len(weight_VD), C):
            W_CD = weight_VD[a:a + C].to(h_ND.dtype)
            logits_NC = torch.mm(h_ND, W_CD.T, out=buffer_NC[:, :len(W_CD)])  # autocast spares out=
            yield a, W_CD, logits_NC, (n := (y_N // C == a // C).nonzero()[:, 0], y_N[n] - a)

    @staticmethod
    def forward(ctx, h_ND, weight_VD, y_N):
        z_N, max_N, sum_N = (h_ND.new_full(y_N.shape, x) for x in (math.nan, -math.inf, 0))
        for a, W_CD, logits_NC, at in FusedLogps.blocks(h_ND, weight_VD, y_N):
            z_N[at[0]] = logits_NC[at]
            max_N, sum_N = compiled(absorb, logits_NC, max_N, sum_N)
        ctx.kept = [(a, W_CD, logits_NC, at)] if a == 0 else []  # V is small: one block held all
        ctx.save_for_backward(h_ND, weight_VD, y_N, max_N, sum_N)
        return (z_N - max_N) - sum_N.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        """∂L/∂h and ∂L/∂W from grad_N = ∂L/∂log p, as the class says; None for the targets."""
        h_ND, weight_VD, y_N, max_N, sum_N = ctx.saved_tensors
        dH_ND = torch.zeros_like(h_ND) if ctx.needs_input_grad[0] else None
        dW_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        blocks = [ctx.kept.pop()] if ctx.kept else FusedLogps.blocks(h_ND, weight_VD, y_N)
        for a, W_CD, logits_NC, at in blocks:
            compiled(minus_softmax_, logits_NC, max_N, grad_N / sum_N)
            logits_NC[at] += grad_N[at[0]]
            if dH_ND is not None:
                dH_ND.addmm_(logits_NC, W_CD)
            if dW_VD is not None:
                dW_VD[a:a + len(W_CD)] = torch.mm(logits_NC.T, h_ND, out=torch.empty_like(W_CD))
        return dH_ND, dW_VD, None


def sequence_logps(model, tokens_BT, response_BT, impl="eager"):
    """log p_θ(y|x) = Σ_k log p_θ(y_k | x, y_<k): a sum over the response, END included. [B], nats.

    response_BT is True on the tokens of y, END among them; prompt and padding add nothing.
    """
    hidden_BSD = model.hidden(tokens_BT[:, :-1])  # Position i has read tokens 0…i, …
    target_BS, scored_BS = tokens_BT[:, 1:], response_BT[:, 1:]  # … so it scores token i+1.
    logp_N = token_logps(hidden_BSD[scored_BS], model.head_weight, target_BS[scored_BS], impl)
    row_N = scored_BS.nonzero()[:, 0]
    return logp_N.new_zeros(len(tokens_BT)).index_add(0, row_N, logp_N)


def space_loss(real_B, generated_B, mu=1.0):
    """−log σ_μ(r) − μ log σ_{1/μ}(−r'), σ_μ(u) = 1/(1 + μ e^−u): SPACE, arXiv 2512.07175.

    Two classifiers, "real or generated?", μ generated answers to a real one: it sees r and r'
    themselves, not only r − r', and needs no λ. Unreduced; arguments are log-ratios in nats.
    """
    return F.softplus(math.log(mu) - real_B) + mu * F.softplus(generated_B - math.log(mu))


def spin_loss(policy_real_B, policy_generated_B, opponent_real_B, opponent_generated_B, lam,
              loss="logistic", mu=1.0):
    """ℓ(λ(r − r')) for each pair (y, y'), unreduced; arguments are log-probs in nats.

    r = log p_θ(y|x)/p_t(y|x) is the real answer's log-ratio, r' the generated one's.
    "space" is not a function of r − r' and has no λ: `space_loss`, with μ.
    """
    real_B = policy_real_B - opponent_real_B
    generated_B = policy_generated_B - opponent_generated_B
    margin_B = lam * (real_B - generated_B)
    if loss == "logistic":
        return F.softplus(-margin_B)  # Eq. 4.7 with ℓ(u) = log(1 + e^−u)
    if loss == "hinge":
        return F.relu(1 - margin_B)
    if loss == "exponential":
        return torch.exp(-margin_B)
    if loss == "correlation":
        return 1 - margin_B
    if loss == "space":
        return space_loss(real_B, generated_B, mu)
    raise ValueError(f"loss is {loss!r}; use one of {', '.join(LOSSES)}")


def mass_anchor(policy_N, opponent_N, share_N, prompt_N):
    """Mean over prompts of (1 − m) log 1/m, m = min(1, Σ_n share_n p_θ(y'_n)/p_t(y'_n)): the leak.

    Adding one constant to every log p_θ changes no margin, so SPIN lets probability leak to
    strings that nobody sampled. But E_{y'~p_t}[p_θ(y')/p_t(y')] = Σ_y' p_θ(y') = 1 wherever p_t
    covers p_θ, at Theorem 5.4's optimum too, so this penalty leaves that optimum where it is.
    It is (1 − m)² for a small leak; a large one it pulls back with constant force, where the
    square's would vanish. An excess is one rare answer's huge ratio: punishing it would push
    everything down. share_N sums to 1 a prompt; prompt_N numbers the prompts 0, 1, …
    """
    ratio_N = share_N * (policy_N - opponent_N).exp()
    m_P = ratio_N.new_zeros(int(prompt_N.max()) + 1).index_add(0, prompt_N, ratio_N)
    m_P = m_P.clamp(1e-30, 1)
    return ((m_P - 1) * m_P.log()).mean()


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

    p₊(y, y') = p_data(y) p_t(y'), p₋ the same with y and y' exchanged. Written out it is
    Σ p₊ log(1 + p₋/p₊), to which answers outside the support of p_data add nothing: they may be
    left out, and p_t then sums to less than 1. Reduces the last dimension.
    """
    plus_KK = logp_data_K[..., :, None] + logp_opponent_K[..., None, :]
    minus_KK = logp_opponent_K[..., :, None] + logp_data_K[..., None, :]
    ratio_KK = torch.where(plus_KK > -math.inf, minus_KK - plus_KK, 0.0)  # else 0 · log(0/0)
    return (plus_KK.exp() * F.softplus(ratio_KK)).sum(dim=(-2, -1))


if __name__ == "__main__":
    from data.theory import main  # here, so that the objective itself imports no other file
    main()
