"""The pictures of a run, drawn from the rows of metrics.jsonl: any run can be drawn again.

    (a) distance from p_data        (b) the loss and its floor      (c) where the probability is
    (d) p_data beside p_0, p_1, … for four prompts; in convergence.gif these bars move

Where the data are plain pairs, p_data is not known, and (a) shows the negative log-likelihood
instead; (c) shows log-probabilities and (d) is left out.

Reading order: the panels, (a) to (d) → `draw_convergence` and `draw_gif`, which return a file's
bytes → `show`, a window that follows a run: `python -m data.run.figures out --follow`.
Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""
import argparse
import functools
import io
import json
import math
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font

BLACK, ORANGE, SKY, GREEN, BLUE, RED = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00".split()
SHADES = [SKY, ORANGE, GREEN, RED, BLUE]
LARGE = {"font.size": 14, "legend.fontsize": 12, "axes.titlesize": 15, "lines.linewidth": 2}


def pick(rows, event, split="train") -> list[dict]:
    """The rows of one kind, in order."""
    return [row for row in rows if row["event"] == event and row["split"] == split]


def place(row, rows) -> float:
    """Where a row stands on the axis of iterations: SFT ends at 0, iteration t at t."""
    last = max(r["step"] for r in rows if r["iteration"] == row["iteration"])
    return row["iteration"] - 1 + row["step"] / last


def draw_kl(ax, rows, empirical):
    """(a) KL at each iteration, measured and predicted; or the negative log-likelihood."""
    key = "nll" if empirical else "kl"
    train, heldout = pick(rows, "iteration"), pick(rows, "iteration", "heldout")
    highest = max(row[key] for row in train[-1:] + heldout[-1:])
    for some, colour, mark, label in ((train, BLUE, "o-", "train prompts"),
                                      (heldout, ORANGE, "s--", "held-out prompts")):
        if some:
            ax.plot([r["iteration"] for r in some], [r[key] for r in some], mark, color=colour,
                    label=label)
            last = some[-1]
            ax.annotate(f"{last[key]:.3g}", (last["iteration"], last[key]), color=colour,
                        xytext=(7, 0), textcoords="offset points",
                        va="bottom" if last[key] == highest else "top",
                        fontsize=matplotlib.rcParams["font.size"] - 2)
    some = [r for r in train if r["predicted_kl"]]
    if some:
        ax.plot([r["iteration"] for r in some], [r["predicted_kl"] for r in some], "^:",
                color=GREEN, label="Theorem 5.4 predicts")
    first, last = train[0][key], train[-1][key]
    name = "−log p of a real response" if empirical else "KL(p_data‖p_θ)"
    ax.set(xlabel="iteration (0 is SFT)", ylabel=f"{name}, nats",
           title=f"(a) {'NLL' if empirical else 'KL'}, train: {first:.3g} → {last:.3g}")
    if not empirical:
        ax.set_yscale("log")
    ax.margins(x=0.25)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()


def draw_loss(ax, rows):
    """(b) the loss of each iteration beside its floor, the least that it can be."""
    rows = [r for r in pick(rows, "step") if r["iteration"]]
    for t in sorted({r["iteration"] for r in rows}):
        part = [r for r in rows if r["iteration"] == t]
        floor = part[0]["loss_floor"]
        label = "loss (raw weights, then averaged)" if t == rows[0]["iteration"] else None
        ax.plot([place(r, rows) for r in part], [r["loss"] for r in part], ".-", color=BLUE,
                label=label)
        if floor is not None:
            ax.hlines(floor, t - 1, t, color=GREEN, lw=3, label=label and "its floor")
    if rows[-1]["method"] != "sft":
        ax.axhline(math.log(2), color=BLACK, ls=":", label="log 2")
    title = "(b) the loss"
    if rows[-1]["loss_floor"] is not None:
        title = f"(b) loss ends {rows[-1]['loss'] - rows[-1]['loss_floor']:.3f} above its floor"
    low, high = ax.get_ylim()  # with room for the legend below the curves
    ax.set(xlabel="iteration", ylabel="nats", title=title, xticks=ticks(rows),
           ylim=(low - 0.35 * (high - low), high))
    ax.legend(loc="lower right")


def draw_masses(ax, rows):
    """(c) how much probability is on right responses, on sampled wrong ones, and elsewhere."""
    rows = [r for r in pick(rows, "step") if r["iteration"]]
    x = [place(r, rows) for r in rows]
    right = [1 - r["off_support"] for r in rows]
    sampled = [r["sampled_wrong"] for r in rows]
    leaked = [max(0.0, 1 - a - b) for a, b in zip(right, sampled)]
    ax.stackplot(x, right, sampled, leaked, colors=[BLUE, ORANGE, RED], labels=[
        "right", "wrong, sampled by the opponent", "wrong, never sampled: leaks go here"])
    for t in sorted({r["iteration"] for r in rows})[1:]:
        ax.axvline(t - 1, color="white", lw=1.5)
    ax.set(xlabel="iteration", ylabel="share of p_θ", ylim=(0, 1), xlim=(min(x), max(x) + 1e-9),
           title=f"(c) wrong at the end: {rows[-1]['off_support']:.1%}", xticks=ticks(rows))
    ax.legend(loc="lower right")


def draw_logps(ax, rows):
    """(c) for plain pairs: the log-probs behind the loss. If both fall, probability leaks."""
    rows = [r for r in pick(rows, "step") if r["iteration"]]
    x = [place(r, rows) for r in rows]
    for key, colour, mark, label in (
            ("logp_real", BLUE, "o-", "log p_θ, real responses"),
            ("logp_generated", RED, "s-", "log p_θ, generated responses"),
            ("margin", BLACK, "^:", "margin λ(r − s)")):
        ax.plot(x, [r[key] for r in rows], mark, color=colour, ms=4, label=label)
    ax.set(xlabel="iteration", ylabel="nats", title="(c) log-probabilities and margin",
           xticks=ticks(rows))
    ax.legend()


def ticks(rows) -> range:
    """Whole iterations, at most about ten of them."""
    last = rows[-1]["iteration"]
    return range(0, last + 1, 1 + last // 10)


def draw_bars(ax, shown, series):
    """(d) p_data beside p_θ for one prompt. series: [(label, colour, probabilities)]."""
    names, size = [*shown["responses"], "(other)"], matplotlib.rcParams["font.size"]
    width = 0.8 / (len(series) + 1)
    series = [("p_data", BLACK, [*shown["responses"].values()]), *series]
    for k, (label, colour, p) in enumerate(series):
        left = [i + (k + 0.5 - len(series) / 2) * width for i in range(len(names))]
        ax.bar(left, with_other(p), width, color=colour, label=label)
    ax.set_xticks(range(len(names)), [legible(name, 13) for name in names], rotation=25,
                  ha="right", fontsize=size - 2, parse_math=False)
    held = "\n(held out)" if shown["split"] == "heldout" else "\n(a training prompt)"
    ax.set(title=legible(shown["prompt"], 34) + held, ylim=(0, 1))
    ax.title.set(fontsize=size - 1, parse_math=False)  # a $ in a prompt is a dollar


def with_other(p) -> list[float]:
    """Probabilities and what is left for all other responses."""
    return [*p, max(0.0, 1 - sum(p))]


def legible(text, longest) -> str:
    """A text that the figure's font can draw, cut to some characters."""
    known = characters_of_the_font()
    text = "".join(c if ord(c) in known else "□" for c in " ".join(text.split()))
    return text if len(text) <= longest else text[:longest - 1] + "…"


@functools.cache
def characters_of_the_font() -> set[int]:
    return set(FT2Font(findfont("DejaVu Sans")).get_charmap())


def draw_convergence(rows, shown, empirical=False) -> bytes:
    """convergence.png, from the rows so far and the prompts shown in panel (d)."""
    figure, picture = Figure(figsize=(16, 5.5 if empirical else 10)), io.BytesIO()
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(LARGE):
        draw_panels(figure, rows, shown, empirical)
        figure.savefig(picture, format="png", dpi=80)
    return picture.getvalue()


def draw_panels(figure, rows, shown, empirical, live=False):
    """All panels, on an empty figure. `live`: also the reports within the stage that is running."""
    grid = figure.add_gridspec(1, 3, left=0.06, right=0.98, wspace=0.24, top=0.94,
                               bottom=0.13 if empirical else 0.57)
    axes, done = [figure.add_subplot(grid[i]) for i in range(3)], pick(rows, "iteration")
    steps, now = pick(rows, "step"), done
    if live and steps:
        key, now = "nll" if empirical else "kl", [*done[:1], steps[-1]]
        axes[0].plot([place(r, steps) for r in steps], [r[key] for r in steps], color=SKY, lw=1)
    if done:
        draw_kl(axes[0], rows, empirical)
    if now and not empirical:
        draw_panel_d(figure, now, shown)
    if any(row["iteration"] for row in rows):
        draw_loss(axes[1], rows)
        (draw_logps if empirical else draw_masses)(axes[2], rows)
    for ax, wait in zip(axes, ("after SFT", "in the first iteration", "in the first iteration")):
        if not ax.has_data():
            ax.text(0.5, 0.5, f"to come {wait}", ha="center", transform=ax.transAxes)


def draw_panel_d(figure, done, shown):
    """The row of bars below. Of many iterations the first, the last and some between."""
    some = [done[i] for i in sorted({round(i) for i in np.linspace(0, len(done) - 1, 5)})]
    grid = figure.add_gridspec(1, len(shown), left=0.06, right=0.98, wspace=0.08, top=0.40,
                               bottom=0.09)
    axes = [figure.add_subplot(grid[i]) for i in range(len(shown))]
    for i, (ax, row) in enumerate(zip(axes, shown)):
        draw_bars(ax, row, [(name(r), SHADES[k], r["shown"][i]) for k, r in enumerate(some)])
        ax.tick_params(labelleft=i == 0)
    axes[0].set_ylabel("(d) probability")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center", ncols=len(some) + 1,
                  bbox_to_anchor=(0.5, 0.485))


def name(row) -> str:
    """What the legend calls the policy of a row."""
    if row["event"] == "step":
        return "p_θ now"
    return f"p$_{{{row['iteration']}}}$" + (" (SFT)" if row["iteration"] == 0 else "")


def draw_gif(rows, shown, empirical=False) -> bytes:
    """convergence.gif, a frame for each report: panel (d)'s bars, or the likelihood's curve."""
    with matplotlib.rc_context({"font.size": 13}):
        return draw_frames(pick(rows, "step"), shown, empirical)


def draw_frames(rows, shown, empirical) -> bytes:
    """One frame for each of the rows."""
    figure = Figure(figsize=(15, 4.2), dpi=60)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 if empirical else len(shown), sharey=True, squeeze=False)[0]
    prepare, move = (prepare_curve, move_curve) if empirical else (prepare_bars, move_bars)
    prepare(axes, rows, shown)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    freeze_background(figure)
    writer = PillowWriter(fps=4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convergence.gif"
        with writer.saving(figure, path, figure.dpi):
            for row in [*rows, *[rows[-1]] * 5]:  # the last one stays a while
                move(axes, rows, row)
                stage = f"iteration {row['iteration']}" if row["iteration"] else "SFT"
                value = (f"−log p of a real response = {row['nll']:.2f} nats" if empirical else
                         f"KL on train prompts = {row['kl']:.3f} nats (black: p_data, blue: p_θ)")
                figure.suptitle(f"{stage}, step {row['step']}: {value}")
                writer.grab_frame()
        return path.read_bytes()


def prepare_bars(axes, rows, shown):
    for ax, row in zip(axes, shown):
        draw_bars(ax, row, [("p_θ", BLUE, [0] * len(row["responses"]))])
        ax.containers[1][-1].set_height(0)  # "(other)" too: the background has no blue


def move_bars(axes, rows, row):
    for ax, p in zip(axes, row["shown"]):
        for bar, height in zip(ax.containers[1], with_other(p)):
            bar.set_height(height)


def prepare_curve(axes, rows, shown):
    axes[0].plot([place(r, rows) for r in rows], [r["nll"] for r in rows], color=SKY)
    axes[0].set(xlabel="iteration (SFT ends at 0)", ylabel="nats")


def move_curve(axes, rows, row):
    for line in axes[0].lines[1:]:
        line.remove()
    axes[0].plot([place(row, rows)], [row["nll"]], "o", color=BLUE, ms=10)


def freeze_background(figure):
    """Replace all that never moves by a picture of it: then a frame takes a sixth of the time."""
    figure.canvas.draw()
    figure.figimage(np.array(figure.canvas.buffer_rgba()), zorder=-1)
    for ax in figure.axes:
        ax.set_axis_off()


# --- a window that follows a run -----------------------------------------------------------------

def read_run(out):
    """(rows, prompts shown, whether p_data is unknown) of a run, also while it is being written."""
    about = json.loads((Path(out) / "config.json").read_text("utf-8"))
    text = (Path(out) / "metrics.jsonl").read_text("utf-8")
    complete = text[:text.rfind("\n") + 1]  # a row may be half there
    return [json.loads(line) for line in complete.splitlines()], about["shown"], about["empirical"]


def show(out, follow):
    """A window with the panels of a run. With `follow` it is redrawn at each report until the run
    ends, and then closes; train.py holds the other end of standard input, to say so.
    """
    import matplotlib.pyplot as plt  # here, since it looks for a display
    if plt.get_backend().lower() == "agg":
        print(f"no display here: the picture is in {Path(out) / 'convergence.png'}")
        return
    ended = threading.Event()
    if follow and not sys.stdin.isatty():
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    figure, seen = plt.figure(figsize=(12, 7.5)), 0
    figure.show()
    while plt.fignum_exists(figure.number) and not ended.is_set():
        rows, shown, empirical = read_run(out)
        if len(rows) > seen:
            seen = len(rows)
            figure.clear()
            with matplotlib.rc_context({"font.size": 10}):
                draw_panels(figure, rows, shown, empirical, follow)
        figure.canvas.draw_idle()
        figure.canvas.flush_events()
        figure.canvas.start_event_loop(0.3)


def open_window(out):
    """Let a process of its own follow a run; it ends when this one does."""
    root = Path(__file__).resolve().parents[2]
    subprocess.Popen([sys.executable, "-m", "data.run.figures", str(Path(out).resolve()),
                      "--follow"], stdin=subprocess.PIPE, cwd=root)


def main(argv=None):
    """`python -m data.run.figures out`: show a run's panels in a window."""
    parser = argparse.ArgumentParser(prog="python -m data.run.figures", description=main.__doc__)
    parser.add_argument("out", help="the folder of a run of train.py")
    parser.add_argument("--follow", action="store_true",
                        help="redraw at each report, until the run ends")
    args = parser.parse_args(argv)
    try:
        show(args.out, args.follow)
    except OSError as error:
        parser.exit(2, f"figures: {error.filename}: {error.strerror}; name a run's folder\n")


if __name__ == "__main__":
    main()
