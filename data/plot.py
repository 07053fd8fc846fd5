"""The picture a student came for, drawn from metrics.jsonl and config.json: any run can be redrawn.

Reading order: `read` → the four panels → `draw_convergence`. (`gif.py` lets panel (d) move.)
Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""
import io
import json
import math
from pathlib import Path

import matplotlib
matplotlib.use("Agg")  # files only: no screen is needed
import matplotlib.pyplot as plt

from data.checkpoint import write

BLACK, ORANGE, SKY, GREEN, BLUE, RED = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00".split()
SHADES = [SKY, ORANGE, GREEN, RED, BLUE]
LARGE = {"font.size": 14, "legend.fontsize": 12, "axes.titlesize": 15, "lines.linewidth": 2}


def read(out):
    """What config.json says of the world, and a function that picks rows of metrics.jsonl."""
    rows = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    pick = lambda event, split: [r for r in rows if r["event"] == event and r["split"] == split]
    return json.loads((Path(out) / "config.json").read_text())["world"], pick


def at(row, rows):
    """Where a row stands on the axis of iterations: SFT ends at 0, iteration t at t."""
    last = max(r["step"] for r in rows if r["iteration"] == row["iteration"])
    return row["iteration"] - 1 + row["step"] / last


def draw_kl(ax, world, pick):
    """(a) KL at each iteration: measured, predicted, and what counting alone would reach."""
    for split, colour, mark in (("train", BLUE, "o-"), ("heldout", ORANGE, "s--")):
        rows = pick("iteration", split)
        if rows:
            ax.plot([r["iteration"] for r in rows], [r["kl"] for r in rows], mark, color=colour,
                    label="train prompts" if split == "train" else "held-out prompts")
    rows = [r for r in pick("iteration", "train") if r["predicted_kl"]]
    ax.plot([r["iteration"] for r in rows], [r["predicted_kl"] for r in rows], "^:", color=GREEN,
            label="Theorem 5.4 predicts")
    ax.axhline(world["counting_kl"], color=BLACK, ls="-.", lw=1,
               label="counting the SFT set")
    ax.set(yscale="log", xlabel="iteration (0 is SFT)", ylabel="KL(p_data‖p_θ), nats",
           title="(a) distance from p_data")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()


def draw_loss(ax, pick):
    """(b) the loss of self-play beside the least value it can have."""
    rows = [r for r in pick("step", "train") if r["iteration"]]
    for t in sorted({r["iteration"] for r in rows}):
        part = [r for r in rows if r["iteration"] == t]
        x = [t - 1, *(at(r, rows) for r in part)]
        label = "loss" if t == 1 else None
        start = [math.log(2)] if part[0]["loss_floor"] is not None else [float("nan")]
        ax.plot(x, start + [r["loss"] for r in part], ".-", color=BLUE, label=label)
        if part[0]["loss_floor"] is not None:
            ax.hlines(part[0]["loss_floor"], t - 1, t, color=GREEN, lw=3,
                      label="its floor, log 2 − JSD" if t == 1 else None)
    ax.axhline(math.log(2), color=BLACK, ls=":", label="log 2: player = p$_t$")
    ax.set(xlabel="iteration", ylabel="loss, nats", title="(b) the floor rises to log 2: success",
           xticks=range(rows[-1]["iteration"] + 1))
    ax.legend()


def draw_logps(ax, pick):
    """(c) the log-probs behind the loss: if both fall while the margin grows, mass leaks."""
    rows = [r for r in pick("step", "train") if r["iteration"]]
    x = [at(r, rows) for r in rows]
    for key, colour, mark, label in (
            ("logp_real", BLUE, "o-", "log p_θ, real answers"),
            ("logp_generated", RED, "s-", "log p_θ, generated answers"),
            ("margin", BLACK, "^:", "margin λ(r − r')")):
        ax.plot(x, [r[key] for r in rows], mark, color=colour, ms=4, label=label)
    ax.set(xlabel="iteration", ylabel="nats", title="(c) log-probabilities and margin",
           xticks=range(rows[-1]["iteration"] + 1))
    ax.legend()


def draw_bars(ax, shown, series):
    """(d) p_data beside p_θ for one prompt. series: [(label, colour, probabilities)]."""
    names = [*shown["responses"], "(other)"]
    width = 0.8 / (len(series) + 1)
    data = [*shown["responses"].values(), 0]
    for k, (label, colour, p) in enumerate([("p_data", BLACK, data), *series]):
        heights = p if label == "p_data" else [*p, max(0.0, 1 - sum(p))]
        ax.bar([i + (k - len(series) / 2) * width for i in range(len(names))], heights, width,
               color=colour, label=label)
    ax.set_xticks(range(len(names)), [n if len(n) < 13 else n[:12] + "…" for n in names],
                  rotation=25, ha="right", fontsize=12, parse_math=False)
    held = "\n(held out)" if shown["split"] == "heldout" else "\n(a training prompt)"
    ax.set(title=shown["prompt"] + held, ylim=(0, 1))
    ax.title.set(fontsize=13, parse_math=False)  # a $ in a prompt is a dollar


def draw_convergence(out):
    """Write out/convergence.png; called after each iteration, so that one can watch it."""
    world, pick = read(out)
    done = pick("iteration", "train")
    with plt.rc_context(LARGE):
        figure = plt.figure(figsize=(16, 10), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
        axes = top.subplots(1, 3)
        draw_kl(axes[0], world, pick)
        if len(done) > 1:
            draw_loss(axes[1], pick)
            draw_logps(axes[2], pick)
        panels = bottom.subplots(1, len(world["shown"]), sharey=True, squeeze=False)[0]
        for i, (ax, shown) in enumerate(zip(panels, world["shown"])):
            draw_bars(ax, shown, [(name(r["iteration"]), SHADES[r["iteration"] % len(SHADES)],
                                   r["shown"][i]) for r in done])
        panels[0].set_ylabel("(d) probability of an answer")
        bottom.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center",
                      ncols=len(done) + 1)
        save(figure, Path(out) / "convergence.png")


def name(t: int) -> str:
    """What the legend calls the model after iteration t."""
    return f"p$_{{{t}}}$" + (" (SFT)" if t == 0 else "")


def save(figure, path):
    """Write the figure whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    plt.close(figure)
    write(path, picture.getvalue())
