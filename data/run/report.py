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


def print_progress(t, step, steps, row, seconds_left):
    """One report: the exact loss beside its floor, exact KL, time left in the stage."""
    floor = "" if row["loss_floor"] is None else f" (floor {row['loss_floor']:.3f})"
    print(f"{f'iteration {t}' if t else 'SFT':<12} step {step:4d}/{steps}  "
          f"loss {row['loss']:.3f}{floor}  KL {row['kl']:.3f}  "
          f"off-support {row['off_support']:6.1%}  {seconds_left:3.0f} s left", flush=True)


def print_responses(prompts, responses):
    """A few fresh responses to each of the prompts shown."""
    for prompt, texts in zip(prompts, responses):
        print(f"    {prompt:<34} {' | '.join(texts)}", flush=True)


def print_closing_table(rows, out, seconds):
    """The iteration rows of metrics.jsonl, as a table."""
    rows = {(r["iteration"], r["split"]): r for r in rows if r["event"] == "iteration"}
    print(f"\n{'iteration':>9}{'KL':>11}{'predicted':>11}{'off-supp.':>11}{'TV':>11}"
          f"{'held-out KL':>13}{'loss':>11}{'floor':>11}")
    for t, split in rows:
        if split == "train":
            row, heldout = rows[t, "train"], rows.get((t, "heldout"), {"kl": None})
            print(f"{t:>9}" + cell(row["kl"], ".4f") + cell(row["predicted_kl"], ".4f")
                  + cell(row["off_support"], ".2%") + cell(row["tv"], ".4f") + "  "
                  + cell(heldout["kl"], ".4f") + cell(row["loss"], ".4f")
                  + cell(row["loss_floor"], ".4f"))
    print("KL(p_data‖p_θ), losses and floors in nats; iteration 0 is SFT, its floor the entropy of "
          "p_data.")
    print(f"{out}/convergence.png and .gif drawn; {seconds:.0f} s in all")


def cell(value, form) -> str:
    """A number in its column, or a dash where there is none."""
    return f"{'–' if value is None else format(value, form):>11}"
