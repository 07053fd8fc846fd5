"""Two other ways to play, as exercises: what the paper's authors do, beside this repository's way.

    python tests/classroom/variants.py history     the y' of the iteration before count too
    python tests/classroom/variants.py pairs       one y' for each y, not all pairs

Each command trains for two short iterations, as train.py does it and then in the other way, from
the same SFT model, and prints KL(p_data‖p_θ) on train prompts. It takes about a minute.

Dimensions: P prompts with a table of N responses each; n pairs of a prompt. Losses in nats.
"""
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
import train  # noqa: E402  (the line above makes it importable)
from data.responses import self_play_responses  # noqa: E402
from spin_loss import spin_loss  # noqa: E402
from train import sample_responses  # noqa: E402


def self_play_with_history(opponent, t, run):
    """`self_play` of train.py, with the responses of p_{t−1} beside those of p_t, from t = 1 on.

    All of them are scored by p_t, the opponent of this iteration.
    """
    samples = sample_responses(opponent, run.world, run.config, t)
    if t > 0:
        before = sample_responses(run.policy(t - 1), run.world, run.config, t - 1)
        samples = [now + then for now, then in zip(samples, before)]
    return self_play_responses(run.world, samples, opponent, run.config)


def sampled_pair_loss(player_PN, opponent_PN, real_PN, generated_PN, lam, loss="logistic", n=16):
    """`pair_loss` estimated from n pairs (y, y') of each prompt. [P], nats.

    Each call draws new pairs: y by its weight real_PN, and its own y' by generated_PN.
    """
    real_Pn = torch.multinomial(real_PN, n, replacement=True)
    generated_Pn = torch.multinomial(generated_PN, n, replacement=True)
    return spin_loss(player_PN.gather(1, real_Pn), player_PN.gather(1, generated_Pn),
                     opponent_PN.gather(1, real_Pn), opponent_PN.gather(1, generated_Pn),
                     lam, loss).mean(dim=1)


# --- a short run of each -------------------------------------------------------------------------

VARIANTS = {"history": ("self_play", self_play_with_history),
            "pairs": ("pair_loss", sampled_pair_loss)}


def kls(folder) -> list[float]:
    """KL after SFT and after each of two short iterations."""
    config = train.Config(out=str(folder), iters=2, sft_steps=150, steps=100, reports=1)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(config)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["kl"] for row in rows if row["event"] == "iteration" and row["split"] == "train"]


def main(name):
    place, ours = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        print("KL after SFT and two iterations")
        for label, function in (("train.py's way", getattr(train, place)), (name, ours)):
            setattr(train, place, function)
            numbers = kls(Path(folder, label))
            print(f"{label:>16}" + "".join(f"{kl:>9.3f}" for kl in numbers), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in VARIANTS]:
        sys.exit(f"variants.py: give one of {', '.join(VARIANTS)}")
    main(sys.argv[1])
