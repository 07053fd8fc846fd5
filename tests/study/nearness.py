"""What the distance between a run and Theorem 5.4's prediction is made of, and where a leak goes.

    python tests/study/nearness.py                  for the run in out/
    python tests/study/nearness.py --out out/main   for another one

    KL(p_data‖p_{t+1})  =  the theorem's KL  +  leak  +  set  +  optimisation

leak is −log p(right): what wrong responses add. set is how much the theorem's KL grows if it is
given the SFT set's frequencies, which training sees, in place of p_data. What is left, in the
proportions of right responses, is optimisation. All in nats, means over train prompts. A second
line has the probability of wrong responses that the opponent sampled and of other wrong ones, and
the mean log p of real and of generated responses, each before and after the iteration.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from data.metrics import evaluate, prediction, theory_metrics  # noqa: E402  (by the line above)
from data.responses import self_play_responses  # noqa: E402
from data.run.files import load_policy  # noqa: E402
from data.run.options import flags_of_the_run, prepare  # noqa: E402
from study.runs import parts_of  # noqa: E402
from train import Config, sample_responses  # noqa: E402


def kl_of_the_set(responses, prompts, config) -> float:
    """The theorem's KL(p_data‖p_{t+1}) with the SFT set's frequencies in place of p_data."""
    total = 0.0
    for part in responses.parts(prompts):
        predicted_PN = prediction(replace(part, data_PN=part.real_PN), config)
        found = theory_metrics(part.opponent_PN.double(), predicted_PN, part)
        total += found["predicted_kl"].sum().item()
    return total / len(prompts)


def parts_of_the_distance(policy, responses, world, config) -> dict:
    """{name: its mean over train prompts}, for a policy and the responses it was trained on."""
    metrics = evaluate(policy, responses, world, config, 1)["train"]
    leak = parts_of(policy, responses, world)["train"]["kl_wrong"]
    of_the_set = kl_of_the_set(responses, world.splits["train"], config)
    theorem = metrics["predicted_kl"]
    return {"KL": metrics["kl"], "theorem": theorem, "leak": leak, "set": of_the_set - theorem,
            "optimisation": metrics["kl"] - leak - of_the_set}


def where_it_is(policy, responses, world, config) -> dict:
    """{name: its mean over train prompts}, for one policy and the samples of its opponent."""
    metrics = evaluate(policy, responses, world, config, 1)["train"]
    return {"sampled wrong": metrics["sampled_wrong"],
            "other wrong": metrics["off_support"] - metrics["sampled_wrong"],
            "log p real": metrics["logp_real"], "generated": metrics["logp_generated"]}


def main(out):
    config = Config(**flags_of_the_run(out, vars(Config())))
    world, _ = prepare(config)
    policies = [load_policy(out / f"iteration_{t}.pt")[0] for t in range(config.iters + 1)]
    for t, (opponent, policy) in enumerate(zip(policies, policies[1:])):
        samples = sample_responses(opponent, world, config, t)
        responses = self_play_responses(world, samples, opponent, config)
        found = parts_of_the_distance(policy, responses, world, config)
        print(f"iteration {t + 1}  " + "  ".join(f"{name} {x:.5f}" for name, x in found.items()))
        before, after = (where_it_is(one, responses, world, config) for one in (opponent, policy))
        print(" " * 13 + "  ".join(f"{name} {x:.3f} → {after[name]:.3f}"
                                   for name, x in before.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", type=Path, help="folder of a run of train.py")
    main(parser.parse_args().out)
