"""What is known exactly because we made the data: KL(p_data‖p_θ), the theory's figures, by splits.

A prompt has few responses y with p_data(y|x) > 0, so every expectation over p_data is a short sum;
whatever probability the model keeps beyond them is its share of wrong answers.

Dimensions: P prompts, N responses, K responses that p_data gives one prompt, B pairs. Nats.
"""
import torch
from torch.special import entr

from data.responses import all_logps
from spin_loss import loss_floor, optimal_next_policy, spin_loss


@torch.no_grad()
def evaluate(model, responses, world, config, t) -> dict[str, dict]:
    """Exact KL, TV and off-support mass of `model`, and the theory's figures, for each split.

    For t = 0 the loss is that of SFT and its floor the entropy of p_data. From t = 1 on
    `responses` hold this iteration's opponent and its draws. Lengths in nats, mean over prompts.
    """
    player_N, opponent_N = all_logps(model, responses, config.logprob), responses.opponent_N
    data_PK = responses.on_support(responses.data_N.log())
    player_PK, p_PK = responses.on_support(player_N), data_PK.exp()
    known_PK = p_PK > 0
    off_P = 1 - player_PK.exp().sum(1)
    exact_P = {"kl": (p_PK * (data_PK - player_PK).where(known_PK, 0)).sum(1),
               "off_support": off_P,
               "tv": ((p_PK - player_PK.exp()).abs().sum(1) + off_P) / 2,
               # −Σ p log p, all answers off the support counted as one more answer
               "entropy": entr(player_PK.exp()).sum(1) + entr(off_P.clamp(min=0))}
    if t == 0:
        exact_P["loss_floor"] = -(p_PK * data_PK.where(known_PK, 0)).sum(1)
    else:
        opponent_PK = responses.on_support(opponent_N)
        theory = config.method == "spin" and not config.history and config.anchor != "sft"
        if config.loss == "logistic" and theory:
            exact_P["loss_floor"] = loss_floor(data_PK, opponent_PK)
        # The exponential loss halves the exponent (λ → 2λ); SPACE aims at p_data, as λ = 1 does.
        lam = {"logistic": config.lam, "exponential": 2 * config.lam, "space": 1.0}.get(config.loss)
        if lam and theory:
            predicted_PK = optimal_next_policy(data_PK, opponent_PK, lam)
            gap_PK = (data_PK - predicted_PK).where(known_PK, 0)
            exact_P["predicted_kl"] = (p_PK * gap_PK).sum(1)
            distance_PK = (predicted_PK.exp() - player_PK.exp()).abs()
            exact_P["predicted_tv"] = (distance_PK.sum(1) + 1 - player_PK.exp().sum(1)) / 2
    found = {}
    for split, prompts in world.splits.items():
        row = dict.fromkeys(("kl", "tv", "off_support", "entropy", "predicted_kl", "predicted_tv",
                             "loss", "loss_floor", "logp_real", "logp_generated", "margin"))
        row |= {name: value_P[prompts].mean().item() for name, value_P in exact_P.items()}
        row["logp_real"] = responses.mean(responses.data_N, player_N, prompts)
        row["loss"] = -row["logp_real"]
        if t:
            part = responses.select(prompts)
            chosen = torch.isin(responses.prompt_N, prompts)
            player, opponent = player_N[chosen], opponent_N[chosen]
            i, j, weight = part.pairs(part.data_N, part.negative_N)
            args = player[i], player[j], opponent[i], opponent[j], config.lam
            row["loss"] = (weight * spin_loss(*args, config.loss, config.mu)).sum().item()
            row["margin"] = (weight * (1 - spin_loss(*args, "correlation"))).sum().item()
            row["logp_generated"] = responses.mean(responses.generated_N, player_N, prompts)
        families = {world.rows[p]["family"]: [] for p in prompts.tolist()}
        for p in prompts.tolist():
            families[world.rows[p]["family"]].append(exact_P["kl"][p].item())
        row["families"] = {name: sum(kls) / len(kls) for name, kls in families.items()}
        found[split] = row
    found["train"]["shown"] = [player_PK[p][known_PK[p]].exp().tolist() for p in world.shown]
    return found
