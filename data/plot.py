"""The picture a student came for, drawn from metrics.jsonl and config.json: any run can be redrawn.

Reading order: `read` → the four panels → `draw_convergence` → `draw_gif`.
Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""
import json
import math
from pathlib import Path

import matplotlib
matplotlib.use("Agg")  # files only: no screen is needed
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter

BLACK, ORANGE, SKY, GREEN, BLUE, RED = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00".split()
SHADES = [SKY, ORANGE, GREEN, RED, BLUE]


def read(out):
    """Returns what config.json says of the world, and a function that picks rows of metrics.jsonl."""
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
                    label=f"measured, {split} prompts")
    rows = [r for r in pick("iteration", "train") if r["predicted_kl"]]
    ax.plot([r["iteration"] for r in rows], [r["predicted_kl"] for r in rows], "^:", color=GREEN,
            label="Theorem 5.4, from the p$_t$ before")
    ax.axhline(world["counting_kl"], color=BLACK, ls="-.", lw=1,
               label="counting the SFT set, prompt by prompt")
    ax.set(yscale="log", xlabel="iteration (0 is SFT)", ylabel="KL(p_data‖p_θ), nats",
           title="(a) distance to p_data")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8)


def draw_loss(ax, pick):
    """(b) the loss of self-play beside the least value it can have."""
    rows = [r for r in pick("step", "train") if r["iteration"]]
    for t in sorted({r["iteration"] for r in rows}):
        part = [r for r in rows if r["iteration"] == t]
        x = [t - 1, *(at(r, rows) for r in part)]
        label = "loss L(θ; p$_t$)" if t == 1 else None
        start = [math.log(2)] if part[0]["loss_floor"] is not None else [float("nan")]
        ax.plot(x, start + [r["loss"] for r in part], ".-", color=BLUE, label=label)
        if part[0]["loss_floor"] is not None:
            ax.hlines(part[0]["loss_floor"], t - 1, t, color=GREEN, lw=3,
                      label="its floor, log 2 − JSD" if t == 1 else None)
    ax.axhline(math.log(2), color=BLACK, ls=":", label="log 2: player = opponent")
    ax.set(xlabel="iteration", ylabel="loss, nats", title="(b) a rising best loss is success")
    ax.legend(fontsize=8)


def draw_logps(ax, pick):
    """(c) the log-probs behind the loss: if both fall while the margin grows, mass leaks."""
    rows = [r for r in pick("step", "train") if r["iteration"]]
    x = [at(r, rows) for r in rows]
    for key, colour, mark, label in (
            ("logp_real", BLUE, "o-", "mean log p_θ(y|x), real"),
            ("logp_generated", RED, "s-", "mean log p_θ(y'|x), generated"),
            ("margin", BLACK, "^:", "margin λ(r − r')")):
        ax.plot(x, [r[key] for r in rows], mark, color=colour, ms=4, label=label)
    ax.set(xlabel="iteration", ylabel="nats", title="(c) log-probabilities and margin")
    ax.legend(fontsize=8)


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
                  fontsize=8, rotation=20, ha="right")
    ax.set(title=shown["prompt"], ylim=(0, 1), ylabel="probability")
    ax.title.set_fontsize(10)


def draw_convergence(out):
    """Write out/convergence.png; called after each iteration, so that one can watch it."""
    world, pick = read(out)
    figure, axes = plt.subplots(2, 4, figsize=(17, 8.5))
    figure.delaxes(axes[0, 3])
    draw_kl(axes[0, 0], world, pick)
    done = pick("iteration", "train")
    if len(done) > 1:
        draw_loss(axes[0, 1], pick)
        draw_logps(axes[0, 2], pick)
    series = [[(f"p_{r['iteration']}" + (" (SFT)" if r["iteration"] == 0 else ""),
                SHADES[r["iteration"] % len(SHADES)], p)
               for r in done for p in [r["shown"][i]]] for i in range(len(world["shown"]))]
    for ax, shown, bars in zip(axes[1], world["shown"], series):
        draw_bars(ax, shown, bars)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc=(0.78, 0.62), fontsize=11,
                  title="(d) below: p_data beside p_θ\nafter each iteration")
    figure.tight_layout()
    figure.savefig(Path(out) / "convergence.png", dpi=80)
    plt.close(figure)


def draw_gif(out):
    """Write out/convergence.gif: the bars of panel (d), moving over the training steps."""
    world, pick = read(out)
    rows = pick("step", "train")
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8))

    def frame(k):
        row = rows[k]
        for i, (ax, shown) in enumerate(zip(axes, world["shown"])):
            ax.clear()
            draw_bars(ax, shown, [("p_θ", BLUE, row["shown"][i])])
        stage = f"iteration {row['iteration']}" if row["iteration"] else "SFT"
        figure.suptitle(f"{stage}, step {row['step']}: KL {row['kl']:.3f} nats "
                        f"(black: p_data, blue: p_θ)")
        figure.tight_layout()

    frames = [*range(len(rows)), *[len(rows) - 1] * 5]
    FuncAnimation(figure, frame, frames).save(Path(out) / "convergence.gif", PillowWriter(fps=4),
                                              dpi=60)
    plt.close(figure)
