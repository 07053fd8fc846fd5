"""What is known exactly because we made the data: KL(p_data‖p_θ), the theory's figures, by splits.

A prompt has few responses y with p_data(y|x) > 0, so every expectation over p_data is a short sum;
whatever probability the policy keeps beyond them is its off-support mass.

Reading order: `evaluate` → `exact_figures`, `loss_figures`, `theory` → `theorem_lam`.
Dimensions: P prompts, N responses, K responses that p_data gives one prompt, B pairs. Nats.
"""
import math

import numpy as np
import torch

from data.responses import all_logps, pairs
from spin_loss import LOSSES, loss_floor, loss_slopes, optimal_next_policy


def evaluate(policy, responses, world, config, stage) -> dict[str, dict]:
    """Exact figures of a policy, for each split: means over its prompts.

    `stage` is the index t of the policy p_t that is being made; from 1 on `responses` hold the
    samples of the opponent that it is trained against. The loss of SFT, which makes p_0, has the
    entropy of p_data for its floor. predicted_kl says how far the theorem's prediction is from
    p_data, predicted_tv how far the policy is from that prediction.
    """
    player_N = all_logps(policy, responses.trees, config.logprob)
    figure_P = exact_figures(player_N, responses)
    figure_P |= loss_figures(player_N, responses, world, config, stage)
    length_P = sum_P(responses, responses.data_N * responses.trees.length_N)
    found = {}
    for split, prompts in world.splits.items():
        families = {}
        for p in prompts:
            families.setdefault(world.rows[p]["family"], []).append(float(figure_P["kl"][p]))
        found[split] = {name: None if x_P is None else float(x_P[prompts].mean())
                        for name, x_P in figure_P.items()}
        found[split]["families"] = {name: sum(kls) / len(kls) for name, kls in families.items()}
        found[split]["nll_per_token"] = found[split]["nll"] / float(length_P[prompts].mean())
    found["train"]["shown"] = [shown(player_N, responses, world, p) for p in world.shown()]
    return found


def sum_P(responses, x_N):
    """Σ over the responses of each prompt, [P]."""
    return np.bincount(responses.prompt_N, weights=x_N)


def exact_figures(player_N, responses) -> dict:
    """KL, total variation, off-support mass, how much of it is on responses that were sampled, and
    the mean log p of real responses, with either sign; [P] each."""
    right_N, p_N = responses.data_N > 0, np.exp(player_N)
    log_data_N = np.log(np.where(right_N, responses.data_N, 1))
    off_P = 1 - sum_P(responses, np.where(right_N, p_N, 0))
    apart_N = np.where(right_N, np.abs(responses.data_N - p_N), 0)
    logp_P = sum_P(responses, responses.data_N * player_N)
    return {"kl": sum_P(responses, responses.data_N * log_data_N) - logp_P,
            "tv": (sum_P(responses, apart_N) + off_P) / 2, "off_support": off_P,
            "sampled_wrong": sum_P(responses, np.where(right_N, 0, p_N)),
            "logp_real": logp_P, "nll": -logp_P}


def loss_figures(player_N, responses, world, config, stage) -> dict:
    """The method's own loss, what the theory says of it, and the log-probs behind it, [P] each.

    The loss is exact over y ~ p_data; y' has the shares that training gives it (`known_shares`).
    """
    figure_P = dict.fromkeys(("predicted_kl", "predicted_tv", "loss", "loss_floor",
                              "logp_generated", "margin"))
    if stage == 0 or config.method == "sft":
        entropy_N = -responses.data_N * np.log(np.where(responses.data_N > 0, responses.data_N, 1))
        figure_P["loss"] = -sum_P(responses, responses.data_N * player_N)
        figure_P["loss_floor"] = None if world.empirical else sum_P(responses, entropy_N)
    if stage == 0:
        return figure_P
    ratio_N = player_N - responses.opponent_N
    figure_P["logp_generated"] = sum_P(responses, responses.generated_N * player_N)
    figure_P["margin"] = config.lam * sum_P(
        responses, (responses.data_N - responses.generated_N) * ratio_N)
    if config.method == "spin":
        figure_P["loss"] = pair_loss(ratio_N, responses, config, "data_N")
        if not (world.empirical or config.history or config.anchor == "sft"):
            figure_P |= theory(player_N, responses, config)
    if config.method == "dpo":
        figure_P["loss"] = pair_loss(ratio_N, responses, config, "generated_N", ranked=True)
    return figure_P


def pair_loss(ratio_N, responses, config, first, ranked=False, most=1 << 20):
    """The mean loss over the pairs of each prompt, [P]; some prompts at a time, to bound memory."""
    first_N, second_N, loss_P = getattr(responses, first), responses.generated_N, []
    first_response, P = responses.trees.first_response, len(responses.trees.answer_P)
    chunk = max(1, most * P // max(1, int((np.diff(first_response) ** 2).sum())))
    for p in range(0, P, chunk):
        rows = slice(first_response[p], first_response[min(P, p + chunk)])
        prompt_N = responses.prompt_N[rows] - p
        i_B, j_B, weight_B = pairs(prompt_N, first_N[rows], second_N[rows])
        if ranked:  # DPO's oracle prefers what p_data prefers
            weight_B = weight_B * (responses.data_N[rows][i_B] > responses.data_N[rows][j_B])
        ratios = (torch.from_numpy(ratio_N[rows][index_B]) for index_B in (i_B, j_B))
        loss_B = LOSSES[config.loss](*ratios, config.lam, config.mu).numpy()
        count = min(P, p + chunk) - p
        total_P = np.bincount(prompt_N[i_B], weights=weight_B * loss_B, minlength=count)
        if ranked:
            total_P /= np.maximum(1e-3, np.bincount(prompt_N[i_B], weights=weight_B,
                                                    minlength=count))
        loss_P.append(total_P)
    return np.concatenate(loss_P)


def theory(player_N, responses, config) -> dict:
    """The loss's floor, KL(p_data‖prediction) by Theorem 5.4 and TV(policy, prediction), [P]."""
    lam = theorem_lam(config.loss, config.lam, config.mu)
    P = len(responses.trees.answer_P)
    names = ["loss_floor"] if config.loss == "logistic" else []
    names += ["predicted_kl", "predicted_tv"] if lam else []
    figure_P = {name: np.empty(P) for name in names}
    for prompts, rows_PK in by_support(responses):
        log_data_PK = torch.from_numpy(np.log(responses.data_N[rows_PK]))
        opponent_PK = torch.from_numpy(responses.opponent_N[rows_PK])
        if config.loss == "logistic":
            figure_P["loss_floor"][prompts] = loss_floor(log_data_PK, opponent_PK).numpy()
        if lam:
            predicted_PK = optimal_next_policy(log_data_PK, opponent_PK, lam)
            player_PK = torch.from_numpy(player_N[rows_PK]).exp()
            kl_P = (log_data_PK.exp() * (log_data_PK - predicted_PK)).sum(1)
            apart_P = (predicted_PK.exp() - player_PK).abs().sum(1) + 1 - player_PK.sum(1)
            figure_P["predicted_kl"][prompts] = kl_P.numpy()
            figure_P["predicted_tv"][prompts] = apart_P.numpy() / 2
    return figure_P


def by_support(responses, most=1 << 22):
    """Yield (prompts, rows_PK) of prompts to which p_data gives equally many responses, K.

    So they form a table without padding. A few at a time: the floor needs P·K² numbers.
    """
    right_N = np.flatnonzero(responses.data_N > 0)
    count_P = np.bincount(responses.prompt_N[right_N])
    first_P = np.cumsum(count_P) - count_P
    for K in np.unique(count_P):
        prompts = np.flatnonzero(count_P == K)
        chunk = max(1, most // int(K) ** 2)
        for start in range(0, len(prompts), chunk):
            some = prompts[start:start + chunk]
            yield some, right_N[first_P[some][:, None] + np.arange(K)]


def theorem_lam(loss, lam, mu=1.0):
    """The λ with which Theorem 5.4 gives this loss's exact optimum, or None if it does not.

    At the optimum of a loss ℓ(λ(r − s)) each pair is balanced, p₊ ∂L/∂r(Δ, 0) = −p₋ ∂L/∂s(0, Δ),
    and for a loss f(r) + g(s) the same holds for each response with p_data and p_t in place of p₊
    and p₋. So where log(−∂L/∂s(0, x) / ∂L/∂r(x, 0)) is c·x for every x, Theorem 5.4 holds with c
    for λ: c = λ for the logistic loss, 2λ for the exponential. A loss f(r) + g(s) needs c = 1 (then
    it aims at p_data), since otherwise the normalisation of p_θ moves the optimum.

    >>> theorem_lam("exponential", lam=1.0), theorem_lam("space", lam=5.0)
    (2.0, 1.0)
    >>> theorem_lam("hinge", lam=1.0) is None  # flat beyond u = 1
    True
    """
    slopes = lambda r, s: loss_slopes(loss, r / lam, s / lam, lam, mu)
    rates = []
    for x in (-1.5, -0.5, 0.5, 1.5):
        real_slope, generated_slope = slopes(x, 0.0)[0], slopes(0.0, x)[1]
        if not real_slope < 0 < generated_slope:
            return None
        rates.append(math.log(-generated_slope / real_slope) * lam / x)
    if min(rates) < 1e-6 or max(rates) - min(rates) > 1e-6:
        return None
    depends_on_difference = np.allclose(slopes(0.5, 0.0), slopes(1.5, 1.0), rtol=1e-9, atol=0)
    return round(rates[0], 6) if depends_on_difference or abs(rates[0] - 1) < 1e-6 else None


def shown(player_N, responses, world, p) -> list[float]:
    """p_θ of each response that p_data gives prompt p, in the order of the data file."""
    first, number_of = responses.trees.first_response[p], responses.trees.responses[p].index
    return [math.exp(player_N[first + number_of(y)]) for y in likeliest(world.data[p])]


def likeliest(probabilities, most=8) -> dict:
    """The likeliest of some responses, as many as a picture has room for, in the same order."""
    kept = sorted(probabilities, key=probabilities.get, reverse=True)[:most]
    return {y: p for y, p in probabilities.items() if y in kept}
