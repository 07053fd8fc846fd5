"""What one reads while a run goes on: progress lines, a few responses, the closing table.

Reading order, which is the order of appearance: `print_start` → `Countdown` → `print_progress`,
`print_step` → `print_responses` → `print_closing_table`. Losses and KLs are in nats, means over
prompts.
"""
import time

import torch


def print_start(player, config, world, stage, step):
    """Say what will run and on what; with --resume, from where."""
    count, threads = sum(p.numel() for p in player.parameters()), torch.get_num_threads()
    splits = ", ".join(f"{len(prompts)} {split}" for split, prompts in world.splits.items())
    about = f"self-play, λ = {config.lam:g}, {config.loss} loss, anchor {config.anchor}"
    print(f"{count:,} parameters in float32 on {player.head_weight.device} ({threads} "
          f"thread{'s' * (threads > 1)}); {splits} prompts;\n"
          f"{about if config.method == 'spin' else 'SFT in every iteration'}", flush=True)
    if stage > config.iters:
        print(f"The run in {config.out} is complete; a higher --iters would go on.")
    elif config.resume:
        print(f"Going on in {stage_name(stage)} after step {step}.")


def stage_name(stage) -> str:
    return f"iteration {stage}" if stage else "SFT"


class Countdown:
    """A sign of life every 5 seconds, while many responses are sampled."""
    def __init__(self, what, total):
        self.what, self.total = what, total
        self.began = self.said = time.monotonic()

    def say(self, done):
        now = time.monotonic()
        if now - self.said > 5:
            self.said, left = now, (now - self.began) * (self.total / done - 1)
            print(f"{self.what} {done:,} of {self.total:,} responses ({left:3.0f} s left)",
                  flush=True)


def print_progress(stage, step, steps, found, seconds_left, empirical):
    """One report of a stage: the loss and the distance from the data, and the time left."""
    row, heldout = found["train"], found.get("heldout")
    loss = f"loss {row['loss']:.3f}"
    if row["loss_floor"] is not None:
        loss += f" (floor {row['loss_floor']:.3f})"
    distance = f"KL {row['kl']:.3f}  off-support {row['off_support']:5.1%}"
    if empirical:
        distance = f"−log p {row['nll']:.2f}"
        distance += f", held out {heldout['nll']:.2f}" if heldout else ""
        distance += f"  margin {row['margin']:.2f}" if row["margin"] is not None else ""
    print_step(stage, step, steps, seconds_left, f"  {loss}  {distance}")


def print_step(stage, step, steps, seconds_left, found=""):
    """How far a stage is; without a report it is a sign of life between two that are far apart."""
    print(f"{stage_name(stage)}, step {step:3d}/{steps} ({seconds_left:3.0f} s left){found}",
          flush=True)


def print_responses(prompts, responses):
    """A few fresh responses to each of the prompts shown."""
    for prompt, texts in zip(prompts, responses):
        texts = [short(text, 40) or "(empty)" for text in texts]
        print(f"    {short(prompt, 34):<34} {' | '.join(texts)}", flush=True)


def short(text, longest) -> str:
    """One printable line of at most so many characters."""
    joiners = "\u200c\u200d"  # zero width; Hindi, Persian and family emoji need them
    text = "".join(c if c.isprintable() or c in joiners else "□" for c in " ".join(text.split()))
    return text if len(text) <= longest else text[:longest - 1] + "…"


LOSS = ("loss", "train", "loss", ".4f",
        "of SPIN: y from p_data, y' weighed as in training, no anchor; of SFT, −log p of y")

# Columns of the closing table: heading, split, key, format, and what stands below the table.
EXACT = [
    ("KL", "train", "kl", ".4f", "KL(p_data‖p_t) in nats, the mean of {train} train prompts"),
    ("held-out KL", "heldout", "kl", ".4f", "the mean of {heldout}"),
    ("predicted KL", "train", "predicted_kl", ".4f",
     "where Theorem 5.4 puts the KL, from the opponent of this iteration (train)"),
    ("TV to that", "train", "predicted_tv", ".4f",
     "total variation between p_t and the prediction; 0 if it came true (train)"),
    ("off-support", "train", "off_support", ".2%",
     "what p_t gives to responses that p_data never gives (train)"),
    LOSS,
    ("floor", "train", "loss_floor", ".4f",
     "the least that this loss can be, with the same y'; of SFT's, the entropy of p_data"),
]
EMPIRICAL = [
    ("−log p", "train", "nll", ".3f",
     "of a real response, all its tokens, in nats; the mean of {train} train prompts"),
    ("per token", "train", "nll_per_token", ".4f", "e to this power is the perplexity (train)"),
    ("held out", "heldout", "nll", ".3f", "−log p, the mean of {heldout}"),
    ("margin", "train", "margin", ".3f",
     "λ × how much more log p rose for real than for generated responses (train)"),
    LOSS,
]


def print_closing_table(rows, out, seconds, empirical, counts):
    """The iteration rows of metrics.jsonl as a table, and what its columns mean.

    counts: {"train": number of prompts, "heldout": number of prompts}.
    """
    rows = {(r["iteration"], r["split"]): r for r in rows if r["event"] == "iteration"}
    columns = [column for column in (EMPIRICAL if empirical else EXACT)
               if any(row.get(column[2]) is not None
                      for (_, split), row in rows.items() if split == column[1])]
    print(f"\n{'iteration':>9}" + "".join(f"{heading:>13}" for heading, *_ in columns))
    for t in sorted({t for t, _ in rows}):
        cells = [cell(rows[t, split].get(key), form) for _, split, key, form, _ in columns]
        print(f"{t:>9}" + "".join(cells))
    heldout = f"{(n := counts.get('heldout', 0))} held-out prompt{'s' * (n != 1)}"
    for heading, *_, words in columns:
        print(f"  {heading:<13}{words.format(train=counts['train'], heldout=heldout)}")
    if not empirical:
        print_families(rows)
    print_turn(rows, "nll" if empirical else "kl")
    print(f"{out}/convergence.png and .gif drawn; {seconds:.0f} s in all")


def cell(value, form) -> str:
    """A number in its column, or a dash where there is none."""
    return f" {'–' if value is None else format(value, form):>12}"


def print_families(rows):
    """The last policy's KL by family of prompts, if there are several."""
    last = max(t for t, _ in rows)
    for (t, split), row in rows.items():
        if t == last and len(row["families"]) > 1:
            families = ", ".join(f"{name} {kl:.3f}" for name, kl in row["families"].items())
            print(f"KL of p_{t}, {split}: {families}")


def print_turn(rows, key):
    """Say so if train or held-out prompts were nearer to the data after an earlier iteration."""
    name = {"kl": "KL", "nll": "−log p"}[key]
    for split, words in (("train", "Train"), ("heldout", "Held-out")):
        values = {t: row[key] for (t, s), row in rows.items() if s == split}
        if values and min(values.values()) < values[max(values)]:
            best = min(values, key=values.get)
            print(f"{words} prompts got worse after iteration {best}: {name} "
                  f"{values[best]:.3f} → {values[max(values)]:.3f}.")
