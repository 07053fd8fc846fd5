"""What the distance between a run and Theorem 5.4's prediction is made of, and where a leak goes.

    python tests/study/nearness.py                  for the run in out/
    python tests/study/nearness.py --out out/main   for another one, with the logistic loss

    KL(p_data‖p_{t+1})  =  the theorem's KL  +  leak  +  set  +  optimisation

leak is −log p(right): what wrong responses add. set is how much the theorem's KL grows if it is
given the SFT set's frequencies, which training sees, in place of p_data. What is left, in the
proportions of right responses, is optimisation. All in nats, means over train prompts. A second
line has the probability of wrong responses that the opponent sampled and of other wrong ones, and
the mean log p of real and of generated responses, each before and after the iteration.
"""
import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.responses import response_logps, self_play_responses  # noqa: E402
from data.run.files import load_policy  # noqa: E402
from data.run.options import prepare  # noqa: E402
from spin_loss import optimal_next_policy  # noqa: E402
from train import Config, sample_responses  # noqa: E402


@torch.no_grad()
def parts_of_the_distance(policy, responses, prompts, lam) -> dict:
    """{name: its mean over the prompts}, for a policy and the responses that it was trained on."""
    found = {}
    for part in responses.parts(prompts):
        player_PN, data_PN = response_logps(policy, part).double(), part.data_PN.double()

        def kl_of(logp_PN):
            ratio_PN = torch.where(data_PN > 0, data_PN.log() - logp_PN, 0.0)
            return (data_PN * ratio_PN).sum(dim=1)

        def theorem(target_PN):
            opponent_PN = part.opponent_PN.double()
            return kl_of(optimal_next_policy(target_PN.double().log(), opponent_PN, lam))

        leak_P = -(player_PN.exp() * (data_PN > 0)).sum(dim=1).log()
        kl_P, exact_P, set_P = kl_of(player_PN), theorem(data_PN), theorem(part.real_PN)
        for name, x_P in {"KL": kl_P, "theorem": exact_P, "leak": leak_P, "set": set_P - exact_P,
                          "optimisation": kl_P - leak_P - set_P}.items():
            found[name] = found.get(name, 0.0) + x_P.sum().item() / len(prompts)
    return found


@torch.no_grad()
def where_it_is(policy, responses, prompts) -> dict:
    """{name: its mean over the prompts}, for one policy and the samples of its opponent."""
    found = {}
    for part in responses.parts(prompts):
        logp_PN, right_PN = response_logps(policy, part).double(), part.data_PN > 0
        p_PN = logp_PN.exp() * part.is_response_PN
        for name, x_P in {"sampled wrong": (p_PN * ~right_PN).sum(dim=1),
                          "other wrong": 1 - p_PN.sum(dim=1),
                          "log p real": (part.data_PN * logp_PN).sum(dim=1),
                          "generated": (part.generated_PN * logp_PN).sum(dim=1)}.items():
            found[name] = found.get(name, 0.0) + x_P.sum().item() / len(prompts)
    return found


def main(out):
    saved = json.loads((out / "config.json").read_text("utf-8"))
    config = Config(**{f.name: saved[f.name] for f in fields(Config)})
    world, _ = prepare(config)
    policies = [load_policy(out / f"iteration_{t}.pt")[0] for t in range(config.iters + 1)]
    for t, (opponent, policy) in enumerate(zip(policies, policies[1:])):
        samples = sample_responses(opponent, world, config, t)
        responses, prompts = (self_play_responses(world, samples, opponent, config),
                              world.splits["train"])
        found = parts_of_the_distance(policy, responses, prompts, config.lam)
        print(f"iteration {t + 1}  " + "  ".join(f"{name} {x:.5f}" for name, x in found.items()))
        before, after = (where_it_is(one, responses, prompts) for one in (opponent, policy))
        print(" " * 13 + "  ".join(f"{name} {x:.3f} → {after[name]:.3f}"
                                   for name, x in before.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", type=Path, help="folder of a run of train.py")
    main(parser.parse_args().out)
