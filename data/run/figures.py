"""The pictures of a run, drawn from the rows of metrics.jsonl: any run can be drawn again.

Reading order: the four panels → `draw_convergence` → `draw_gif`, in which panel (d) moves.
Both return the file's bytes. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""
import io
import math
import tempfile
from pathlib import Path

import matplotlib
matplotlib.use("Agg")  # files only: no screen is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import PillowWriter

BLACK, ORANGE, SKY, GREEN, BLUE, RED = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00".split()
SHADES = [SKY, ORANGE, GREEN, RED, BLUE]
LARGE = {"font.size": 14, "legend.fontsize": 12, "axes.titlesize": 15, "lines.linewidth": 2}


def pick(rows, event, split="train") -> list[dict]:
    return [row for row in rows if row["event"] == event and row["split"] == split]


def place(row, rows) -> float:
    """Where a row stands on the axis of iterations: SFT ends at 0, iteration t at t."""
    last = max(r["step"] for r in rows if r["iteration"] == row["iteration"])
    return row["iteration"] - 1 + row["step"] / last


def draw_kl(ax, rows):
    """(a) KL at each iteration, measured and predicted."""
    for split, colour, mark, label in (("train", BLUE, "o-", "train prompts"),
                                       ("heldout", ORANGE, "s--", "held-out prompts")):
        some = pick(rows, "iteration", split)
        if some:
            ax.plot([r["iteration"] for r in some], [r["kl"] for r in some], mark, color=colour,
                    label=label)
    some = [r for r in pick(rows, "iteration") if r["predicted_kl"]]
    ax.plot([r["iteration"] for r in some], [r["predicted_kl"] for r in some], "^:", color=GREEN,
            label="Theorem 5.4 predicts")
    ax.set(yscale="log", xlabel="iteration (0 is SFT)", ylabel="KL(p_data‖p_θ), nats",
           title="(a) distance from p_data")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()


def draw_loss(ax, rows):
    """(b) the loss of self-play beside the least value it can have."""
    rows = [r for r in pick(rows, "step") if r["iteration"]]
    for t in sorted({r["iteration"] for r in rows}):
        part = [r for r in rows if r["iteration"] == t]
        floor = part[0]["loss_floor"]
        start = math.nan if floor is None else math.log(2)
        ax.plot([t - 1, *(place(r, rows) for r in part)], [start, *(r["loss"] for r in part)],
                ".-", color=BLUE, label="loss" if t == 1 else None)
        if floor is not None:
            ax.hlines(floor, t - 1, t, color=GREEN, lw=3,
                      label="its floor, log 2 − JSD" if t == 1 else None)
    ax.axhline(math.log(2), color=BLACK, ls=":", label="log 2: player = opponent")
    ax.set(xlabel="iteration", ylabel="loss, nats", title="(b) the loss and its floor",
           xticks=range(rows[-1]["iteration"] + 1))
    ax.legend()


def draw_logps(ax, rows):
    """(c) the log-probs behind the loss: if both fall while the margin grows, mass leaks."""
    rows = [r for r in pick(rows, "step") if r["iteration"]]
    x = [place(r, rows) for r in rows]
    for key, colour, mark, label in (
            ("logp_real", BLUE, "o-", "log p_θ, real responses"),
            ("logp_generated", RED, "s-", "log p_θ, generated responses"),
            ("margin", BLACK, "^:", "margin λ(r − s)")):
        ax.plot(x, [r[key] for r in rows], mark, color=colour, ms=4, label=label)
    ax.set(xlabel="iteration", ylabel="nats", title="(c) log-probabilities and margin",
           xticks=range(rows[-1]["iteration"] + 1))
    ax.legend()


def draw_bars(ax, shown, series):
    """(d) p_data beside p_θ for one prompt. series: [(label, colour, probabilities)]."""
    names = [*shown["responses"], "(other)"]
    width = 0.8 / (len(series) + 1)
    heights = [("p_data", BLACK, [*shown["responses"].values(), 0])]
    heights += [(label, colour, [*p, max(0.0, 1 - sum(p))]) for label, colour, p in series]
    for k, (label, colour, height) in enumerate(heights):
        left = [i + (k - len(series) / 2) * width for i in range(len(names))]
        ax.bar(left, height, width, color=colour, label=label)
    ax.set_xticks(range(len(names)), [n if len(n) < 13 else n[:12] + "…" for n in names],
                  rotation=25, ha="right", fontsize=12, parse_math=False)
    held = "\n(held out)" if shown["split"] == "heldout" else "\n(a training prompt)"
    ax.set(title=shown["prompt"] + held, ylim=(0, 1))
    ax.title.set(fontsize=13, parse_math=False)  # a $ in a prompt is a dollar


def draw_convergence(rows, shown) -> bytes:
    """convergence.png, from the rows so far and the prompts shown in panel (d)."""
    done = pick(rows, "iteration")
    with plt.rc_context(LARGE):
        figure = plt.figure(figsize=(16, 10), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
        axes = top.subplots(1, 3)
        draw_kl(axes[0], rows)
        if len(done) > 1:
            draw_loss(axes[1], rows)
            draw_logps(axes[2], rows)
        panels = bottom.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for i, (ax, row) in enumerate(zip(panels, shown)):
            draw_bars(ax, row, [(name(r["iteration"]), SHADES[r["iteration"] % len(SHADES)],
                                 r["shown"][i]) for r in done])
        panels[0].set_ylabel("(d) probability of a response")
        bottom.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center",
                      ncols=len(done) + 1)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=80)
        plt.close(figure)
    return picture.getvalue()


def name(t: int) -> str:
    """What the legend calls the policy after iteration t."""
    return f"p$_{{{t}}}$" + (" (SFT)" if t == 0 else "")


def draw_gif(rows, shown) -> bytes:
    """convergence.gif: the bars of panel (d), a frame for each report."""
    rows = pick(rows, "step")
    figure, axes = plt.subplots(1, len(shown), figsize=(15, 4.2), dpi=60, sharey=True,
                                squeeze=False)
    for ax, row in zip(axes[0], shown):
        draw_bars(ax, row, [("p_θ", BLUE, [0] * len(row["responses"]))])
        ax.containers[1][-1].set_height(0)  # "(other)" too: the background has no blue
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    freeze_background(figure)
    writer = PillowWriter(fps=4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convergence.gif"
        with writer.saving(figure, path, figure.dpi):
            for row in [*rows, *[rows[-1]] * 5]:  # the last one stays a while
                for ax, p in zip(axes[0], row["shown"]):
                    for bar, height in zip(ax.containers[1], [*p, max(0.0, 1 - sum(p))]):
                        bar.set_height(height)
                stage = f"iteration {row['iteration']}" if row["iteration"] else "SFT"
                figure.suptitle(f"{stage}, step {row['step']}: KL(p_data‖p_θ) = {row['kl']:.3f} "
                                f"nats (black: p_data, blue: p_θ)")
                writer.grab_frame()
        plt.close(figure)
        return path.read_bytes()


def freeze_background(figure):
    """Replace all that never moves by a picture of it: 40 frames in 1 s instead of 6 s."""
    figure.canvas.draw()
    figure.figimage(np.array(figure.canvas.buffer_rgba()), zorder=-1)
    for ax in figure.axes:
        ax.set_axis_off()
