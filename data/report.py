"""What one reads while it runs: progress lines, a few answers, the closing table.

Reading order: `greet` → `Progress` → `show_answers` → `closing_table`, in order of appearance.
"""
import json
import time
from pathlib import Path

import torch

from sample import generate


def greet(player, world, config, state):
    """Say what will run, on what, from where."""
    count = sum(p.numel() for p in player.parameters())
    splits = ", ".join(f"{len(v)} {k}" for k, v in world.splits.items())
    kind = "float32" + (", products in bfloat16," if player.bfloat16 else "")
    print(f"{count:,} parameters in {kind} on {world.device} ({torch.get_num_threads()} threads); "
          f"{splits} prompts; {config.method}, λ = {config.lam:g}, {config.loss} loss, "
          f"anchor {config.anchor}", flush=True)
    if state["iteration"] > config.iters:
        print(f"The run in {config.out} is complete; a higher --iters would go on.")
    elif config.resume:
        print(f"Going on in iteration {state['iteration']} after step {state.get('step', 0)}.")


class Progress:
    """When to evaluate within a stage, and the line that tells of it."""
    def __init__(self, config, t, state):
        self.t, self.steps = t, config.steps if t else config.sft_steps
        self.reports, self.losses = config.reports, []
        self.first, self.began = state.get("step", 0), time.time()

    def due(self, step, loss) -> bool:
        """Note the loss of a step; True `reports` times in the stage, the last step included."""
        self.losses.append(loss)
        return step * self.reports // self.steps > (step - 1) * self.reports // self.steps

    def show(self, step, found):
        """Loss (mean since the last line) beside its floor, exact KL, time left in the stage."""
        row, loss = found["train"], sum(self.losses) / len(self.losses)
        floor = "" if row["loss_floor"] is None else f" (floor {row['loss_floor']:.3f})"
        left = (time.time() - self.began) / (step - self.first) * (self.steps - step)
        print(f"{f'iteration {self.t}' if self.t else 'SFT':<12} step {step:4d}/{self.steps}  "
              f"loss {loss:.3f}{floor}  KL {row['kl']:.3f}  off-support {row['off_support']:6.1%}  "
              f"{left:3.0f} s left", flush=True)
        self.losses = []


def show_answers(model, world, config):
    """Five fresh responses to each of the prompts shown."""
    rng = torch.Generator(world.device).manual_seed(config.seed)
    prompts = [world.prompts[p] for p in world.shown for _ in range(5)]
    drawn = generate(model, prompts, max_new_tokens=world.max_new_tokens,
                     end_token=world.end_token, generator=rng)
    texts = [world.encoding.decode([k for k in y if k != world.end_token]) for y in drawn]
    for i, p in enumerate(world.shown):
        print(f"    {world.rows[p]['prompt']:<34} {' | '.join(texts[5 * i:5 * i + 5])}")


def closing_table(config, seconds):
    """The iteration rows of metrics.jsonl, as a table."""
    rows = [json.loads(line) for line in open(Path(config.out) / "metrics.jsonl")]
    rows = {(r["iteration"], r["split"]): r for r in rows if r["event"] == "iteration"}
    cell = lambda value, form: f"{'–' if value is None else format(value, form):>11}"
    print("\niteration         KL  predicted  off-supp.         TV  held-out KL       loss"
          "      floor")
    for t in range(config.iters + 1):
        row, held = rows[t, "train"], rows.get((t, "heldout"), {"kl": None})
        print(f"{t:>9}" + cell(row["kl"], ".4f") + cell(row["predicted_kl"], ".4f")
              + cell(row["off_support"], ".2%") + cell(row["tv"], ".4f") + "  "
              + cell(held["kl"], ".4f") + cell(row["loss"], ".4f") + cell(row["loss_floor"], ".4f"))
    print("KL(p_data‖p_θ), losses and floors in nats; iteration 0 is SFT, its floor the entropy of "
          "p_data.")
    print(f"{config.out}/convergence.png and .gif drawn; {seconds:.0f} s in all")
