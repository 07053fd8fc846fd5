"""What is known exactly because we made the data: KL(p_data‖p_θ), the theory's figures, by splits.

A prompt has few responses y with p_data(y|x) > 0, so every expectation over p_data is a short sum;
whatever probability the model keeps beyond them is its share of wrong answers.

Reading order: `evaluate` → `kl`, `theory`, `losses`.
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
    player_N = all_logps(model, responses, config.logprob)
    data_PK, player_PK = map(responses.on_support, (responses.data_N.log(), player_N))
    known_PK, off_P = data_PK > -torch.inf, 1 - player_PK.exp().sum(1)
    exact_P = {"kl": kl(data_PK, player_PK), "off_support": off_P,
               "tv": ((data_PK.exp() - player_PK.exp()).abs().sum(1) + off_P) / 2,
               # −Σ p log p, all answers off the support counted as one more answer
               "entropy": entr(player_PK.exp()).sum(1) + entr(off_P.clamp(min=0))}
    if t == 0:
        exact_P["loss_floor"] = entr(data_PK.exp()).sum(1)
    elif config.method == "spin" and not config.history and config.anchor != "sft":
        exact_P |= theory(data_PK, responses.on_support(responses.opponent_N), player_PK, config)
    found = {}
    for split, prompts in world.splits.items():
        row = dict.fromkeys(("kl", "tv", "off_support", "entropy", "predicted_kl", "predicted_tv",
                             "loss", "loss_floor", "logp_real", "logp_generated", "margin"))
        row |= {name: value_P[prompts].mean().item() for name, value_P in exact_P.items()}
        row["logp_real"] = responses.mean(responses.data_N, player_N, prompts)
        row["loss"] = -row["logp_real"]
        if t:
            row |= losses(player_N, responses, prompts, config)
        families = {}
        for p in prompts.tolist():
            families.setdefault(world.rows[p]["family"], []).append(exact_P["kl"][p].item())
        row["families"] = {name: sum(kls) / len(kls) for name, kls in families.items()}
        found[split] = row
    found["train"]["shown"] = [player_PK[p][known_PK[p]].exp().tolist() for p in world.shown]
    return found


def kl(data_PK, other_PK):
    """KL(p_data‖other) of each prompt, nats; −∞ in data_PK marks places without a response."""
    gap_PK = (data_PK - other_PK).where(data_PK > -torch.inf, 0)
    return (data_PK.exp() * gap_PK).sum(1)


def theory(data_PK, opponent_PK, player_PK, config):
    """What the loss can reach at best, what Theorem 5.4 predicts, and how far the player is off."""
    found_P = {}
    if config.loss == "logistic":
        found_P["loss_floor"] = loss_floor(data_PK, opponent_PK)
    # The exponential loss halves the exponent (λ → 2λ); SPACE aims at p_data, as λ = 1 does.
    lam = {"logistic": config.lam, "exponential": 2 * config.lam, "space": 1.0}.get(config.loss)
    if lam:
        predicted_PK = optimal_next_policy(data_PK, opponent_PK, lam)
        distance_PK = (predicted_PK.exp() - player_PK.exp()).abs()
        found_P["predicted_kl"] = kl(data_PK, predicted_PK)
        found_P["predicted_tv"] = (distance_PK.sum(1) + 1 - player_PK.exp().sum(1)) / 2
    return found_P


def losses(player_N, responses, prompts, config):
    """The self-play loss on some prompts: exact over y ~ p_data, over the draws for y'."""
    part, chosen_N = responses.select(prompts), torch.isin(responses.prompt_N, prompts)
    player_N, opponent_N = player_N[chosen_N], part.opponent_N
    i_B, j_B, weight_B = part.pairs(part.data_N, part.negative_N)
    args = player_N[i_B], player_N[j_B], opponent_N[i_B], opponent_N[j_B], config.lam
    return {"loss": (weight_B * spin_loss(*args, config.loss, config.mu)).sum().item(),
            "margin": (weight_B * (1 - spin_loss(*args, "correlation"))).sum().item(),
            "logp_generated": part.mean(part.generated_N, player_N,
                                        torch.arange(len(prompts), device=prompts.device))}
