"""What one reads while it runs: progress lines, a few responses, the closing table.

Reading order: `print_start` → `print_progress` → `print_responses` → `print_closing_table`, in
order of appearance.
"""
import torch


def print_start(player, run):
    """Say what will run, on what, and from where."""
    config, world = run.config, run.world
    count = sum(p.numel() for p in player.parameters())
    splits = ", ".join(f"{len(prompts)} {split}" for split, prompts in world.splits.items())
    kind = "float32" + (", products in bfloat16," if config.precision == "bfloat16" else "")
    threads = torch.get_num_threads()
    print(f"{count:,} parameters in {kind} on {player.head_weight.device} ({threads} "
          f"thread{'s' * (threads > 1)}); {splits} prompts; {config.method}, λ = {config.lam:g}, "
          f"{config.loss} loss, anchor {config.anchor}", flush=True)
    if run.stage > config.iters:
        print(f"The run in {config.out} is complete; a higher --iters would go on.")
    elif config.resume:
        print(f"Going on in iteration {run.stage} after step {run.state['step']}.")


def print_progress(t, step, steps, found, weights, seconds_left, empirical):
    """One report of a stage: the policy's exact loss and distance, and the time left.

    `weights` says whose figures these are: the raw weights', which the high learning rate tosses
    about, or, in the later part of a stage, their average, which becomes p_t.
    """
    row, heldout = found["train"], found.get("heldout")
    loss = f"loss {row['loss']:.3f}" if row["loss"] is not None else "loss –"
    if row["loss_floor"] is not None:
        loss += f" (floor {row['loss_floor']:.3f})"
    if empirical:
        distance = f"−log p: {row['nll']:.2f}"
        distance += f", held out {heldout['nll']:.2f}" if heldout else ""
        distance += f"  margin {row['margin']:.2f}" if row["margin"] is not None else ""
    else:
        distance = f"KL {row['kl']:.3f}  off-support {row['off_support']:5.1%}"
    print(f"{f'iteration {t}' if t else 'SFT':<12} step {step:3d}/{steps}  {loss}  {distance}  "
          f"{weights}, {seconds_left:.0f} s left", flush=True)


def print_responses(prompts, responses):
    """A few fresh responses to each of the prompts shown."""
    for prompt, texts in zip(prompts, responses):
        texts = [short(text, 40) for text in texts]
        print(f"    {short(prompt, 34):<34} {' | '.join(texts)}", flush=True)


def short(text, longest) -> str:
    """One printable line of at most so many characters."""
    joiners = "\u200c\u200d"  # zero width; Hindi, Persian and family emoji need them
    text = "".join(c if c.isprintable() or c in joiners else "□" for c in " ".join(text.split()))
    return text if len(text) <= longest else text[:longest - 1] + "…"


# Columns of the closing table: heading, split, key, format.
EXACT = [("KL", "train", "kl", ".4f"), ("predicted", "train", "predicted_kl", ".4f"),
         ("off-supp.", "train", "off_support", ".2%"), ("TV", "train", "tv", ".4f"),
         ("held-out KL", "heldout", "kl", ".4f"), ("loss", "train", "loss", ".4f"),
         ("floor", "train", "loss_floor", ".4f")]
EMPIRICAL = [("−log p", "train", "nll", ".3f"), ("per token", "train", "nll_per_token", ".4f"),
             ("held out", "heldout", "nll", ".3f"),
             ("per token", "heldout", "nll_per_token", ".4f"),
             ("margin", "train", "margin", ".3f"), ("loss", "train", "loss", ".4f")]


def print_closing_table(rows, out, seconds, empirical):
    """The iteration rows of metrics.jsonl, as a table, and what one should not overlook."""
    rows = {(r["iteration"], r["split"]): r for r in rows if r["event"] == "iteration"}
    columns = EMPIRICAL if empirical else EXACT
    print(f"\n{'iteration':>9}" + "".join(f"{head:>13}" for head, *_ in columns))
    for t in sorted({t for t, _ in rows}):
        cells = [cell(rows.get((t, split), {}).get(key), form) for _, split, key, form in columns]
        print(f"{t:>9}" + "".join(cells))
    if empirical:
        print("−log p of the real responses, summed over tokens, means over prompts, in nats; e to "
              "the power of\n“per token” is the perplexity. Plain pairs do not say what p_data is.")
    else:
        print("KL(p_data‖p_θ), losses and their floor, the least that they can be, in nats; "
              "iteration 0 is\nSFT, whose floor is the entropy of p_data.")
    if not empirical:
        for (t, split), row in list(rows.items())[-2:]:
            families = ", ".join(f"{name} {kl:.3f}" for name, kl in row["families"].items())
            print(f"KL of p_{t} by family, {split}: {families}")
    print_turn(rows, "nll" if empirical else "kl")
    print(f"{out}/convergence.png and .gif drawn; {seconds:.0f} s in all")


def print_turn(rows, key):
    """Say so if held-out prompts, or train prompts, were nearer to the data at an earlier time."""
    name = {"kl": "KL", "nll": "−log p"}[key]
    for split, words in (("train", "Train"), ("heldout", "Held-out")):
        values = {t: row[key] for (t, s), row in rows.items() if s == split}
        if values and min(values.values()) < values[max(values)]:
            best = min(values, key=values.get)
            print(f"{words} prompts got worse after iteration {best}: {name} "
                  f"{values[best]:.3f} → {values[max(values)]:.3f}.")


def cell(value, form) -> str:
    """A number in its column, or a dash where there is none."""
    return f"{'–' if value is None else format(value, form):>13}"
