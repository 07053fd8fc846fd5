"""What is known exactly because we made the data: KL(p_data‖p_θ), and what the theory predicts.

A prompt has few responses y with p_data(y|x) > 0, so every expectation over p_data is a short sum.
Whatever probability the policy keeps beyond them is its off-support mass.

All of these are sums over *known* responses: those of p_data and those that were sampled. Subtle: a
quantity that needs all strings, such as the entropy of p_θ, is no such sum, for the probability on
unknown strings would be left out. `expectation` in sample.py estimates it from samples.

Reading order: `evaluate` → `exact_metrics` → `loss_metrics` → `theory_metrics`.
Dimensions: P prompts, N responses. Log-probs and losses in nats.
"""
import numpy as np
import torch

from data.responses import response_logps
from spin_loss import THEOREM_LAM, loss_floor, optimal_next_policy, pair_loss


@torch.no_grad()
def evaluate(policy, responses, world, config, t) -> dict[str, dict]:
    """The metrics of a policy on its way to p_t, for each split: means over its prompts.

    From t = 1 on, `responses` hold samples of the opponent against which it is trained.
    predicted_kl says how far Theorem 5.4's prediction is from p_data, predicted_tv how far the
    policy is from that prediction. What does not exist (a prediction for SFT, say) is None.
    """
    metric_P, shown = {}, {p: None for p in world.shown()}
    for part in responses.parts(range(len(world.prompts)), policy.head_weight.device):
        player_PN = response_logps(policy, part, config.logprob).double()
        found = exact_metrics(player_PN, part) | loss_metrics(player_PN, part, config, t, world)
        predicted_PN = None
        if has_prediction(config, t, world):
            predicted_PN = prediction(part, config)
            found |= theory_metrics(player_PN, predicted_PN, part)
        for name, x_P in found.items():
            metric_P.setdefault(name, np.empty(len(world.prompts)))[part.prompts] = x_P.cpu()
        for i, p in enumerate(part.prompts):
            if p in shown:
                index = [responses.tables[p].responses.index(y) for y in likeliest(world.data[p])]
                shown[p] = [None if x_PN is None else x_PN[i, index].exp().tolist()
                            for x_PN in (player_PN, predicted_PN)]
    found = {split: means(metric_P, prompts, world) for split, prompts in world.splits.items()}
    found["train"]["shown"], found["train"]["shown_predicted"] = map(list, zip(*shown.values()))
    return found


# What every row of metrics.jsonl has. A metric more needs no line here; a column of the closing
# table is a line of `EXACT` in data/run/console.py.
NAMES = ("kl", "tv", "off_support", "sampled_wrong", "predicted_kl", "predicted_tv", "loss",
         "loss_floor", "logp_real", "logp_generated", "margin")


def means(metric_P, prompts, world) -> dict:
    """The means over some prompts, and the KL of each family of them."""
    found = dict.fromkeys(NAMES) | {name: float(x_P[prompts].mean())
                                    for name, x_P in metric_P.items()}
    families = {}
    for p in prompts:
        families.setdefault(world.rows[p]["family"], []).append(float(metric_P["kl"][p]))
    found["families"] = {name: sum(kls) / len(kls) for name, kls in families.items()}
    length = np.mean([sum(share * len(y) for y, share in world.data[p].items()) for p in prompts])
    found["nll"] = -found["logp_real"]
    found["nll_per_token"] = found["nll"] / float(length)
    return found


def exact_metrics(player_PN, part) -> dict:
    """KL, total variation, off-support mass, how much of it is on responses that this iteration's
    opponent gave, and the mean log p of real responses; [P] each."""
    data_PN, right_PN = part.data_PN.double(), part.data_PN > 0
    p_PN = player_PN.exp() * part.is_response_PN
    off_P = 1 - (p_PN * right_PN).sum(1)
    logp_real_P = (data_PN * player_PN).sum(1)
    return {"kl": torch.xlogy(data_PN, data_PN).sum(1) - logp_real_P,
            "tv": (((data_PN - p_PN).abs() * right_PN).sum(1) + off_P) / 2, "off_support": off_P,
            "sampled_wrong": (p_PN * ~right_PN).sum(1), "logp_real": logp_real_P}


def loss_metrics(player_PN, part, config, t, world) -> dict:
    """The loss, the least that it can be, and the log-probs behind it, [P] each.

    The loss is exact over y ~ p_data; y' has the weights that training gives it. Its floor has the
    same weights. The loss of SFT has the entropy of p_data for its floor. Where p_data is known by
    its samples alone, there is no floor.
    """
    data_PN, generated_PN = part.data_PN.double(), part.generated_PN.double()
    opponent_PN, found = part.opponent_PN.double(), {}
    if t > 0:
        found["logp_generated"] = (generated_PN * player_PN).sum(1)
        found["margin"] = config.lam * (
            (data_PN - generated_PN) * (player_PN - opponent_PN)).sum(1)
    if t == 0 or config.method == "sft":
        found["loss"] = -(data_PN * player_PN).sum(1)
        floor_P = -torch.xlogy(data_PN, data_PN).sum(1)
    else:
        found["loss"] = pair_loss(player_PN, opponent_PN, data_PN, generated_PN, config.lam,
                                  config.loss)
        floor_P = loss_floor(data_PN.log(), generated_PN.log())
        if config.loss != "logistic":
            floor_P = None
    if floor_P is not None and not world.empirical:
        found["loss_floor"] = floor_P
    return found


def has_prediction(config, t, world) -> bool:
    """Whether Theorem 5.4 says where this iteration ends."""
    return (t > 0 and config.method == "spin" and config.anchor != "sft"
            and config.loss in THEOREM_LAM and not world.empirical)


def prediction(part, config):
    """Theorem 5.4's log p_{t+1}, [P, N]; −∞ for wrong responses and padding.

    It is made with p_data itself. Training knows p_data by the SFT set alone, so even an exact
    iteration would end a little beside it.
    """
    lam = THEOREM_LAM[config.loss](config.lam)
    return optimal_next_policy(part.data_PN.double().log(), part.opponent_PN.double(), lam)


def theory_metrics(player_PN, predicted_PN, part) -> dict:
    """KL(p_data‖prediction), and the total variation of the policy and the prediction; [P] each."""
    data_PN, right_PN = part.data_PN.double(), part.data_PN > 0
    log_ratio_PN = torch.where(right_PN, data_PN.log() - predicted_PN, 0.0)
    p_PN = player_PN.exp() * right_PN
    apart_P = (p_PN - predicted_PN.exp()).abs().sum(1) + 1 - p_PN.sum(1)
    kl_P = (data_PN * log_ratio_PN).sum(1).clamp(min=0)  # below 0 only by rounding
    return {"predicted_kl": kl_P, "predicted_tv": apart_P / 2}


def likeliest(probabilities, most=8) -> dict:
    """The likeliest of some responses, as many as a picture has room for, in the same order."""
    kept = sorted(probabilities, key=probabilities.get, reverse=True)[:most]
    return {y: p for y, p in probabilities.items() if y in kept}
