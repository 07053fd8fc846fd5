"""The pictures of a run, drawn from the rows of metrics.jsonl: convergence.png and convergence.gif.

    (a) distance from p_data     (b) the loss and its floor     (c) where the probability is
    (d) p_data beside p_0, p_1, … for four prompts; in convergence.gif these bars move

Where the data are plain pairs, p_data is not known: (a) shows the negative log-likelihood of the
real responses instead, (c) shows log-probabilities, and (d) is left out.

Reading order: the panels, (a) to (d) → `draw_convergence` and `draw_gif`, which return a file's
bytes → `Window`, which shows the panels while a run goes on.
"""
import contextlib
import functools
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from data.run.console import short

# MPLBACKEND names a kind of window. A notebook sets it, also for the programs that it starts, and
# matplotlib cannot be imported where that kind is not installed. A picture in a file needs none, so
# matplotlib is imported without it.
backend = os.environ.pop("MPLBACKEND", None)
import matplotlib
import matplotlib.style
from matplotlib.animation import PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

if backend is not None:
    os.environ["MPLBACKEND"] = backend
    if "matplotlib.pyplot" not in sys.modules:  # the later plots of a notebook still find it
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend

# A colour has one meaning in all panels. Most are Okabe and Ito's, which colour-blind readers tell
# apart.
DATA, TRAIN, HELDOUT, THEORY = "black", "#0072B2", "#E69F00", "#009E73"  # THEORY: 5.4, the floor
RIGHT, SAMPLED, LEAKED, GREY = "#56B4E9", "#CC79A7", "#D55E00", "#999999"
PURPLES = matplotlib.colormaps["Purples"]  # p_0, p_1, …, the last one darkest
POLICY = PURPLES(0.8)


def own_style(size):
    """A context with matplotlib's defaults, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", {
        "font.size": size, "axes.titlesize": "medium", "legend.fontsize": "small",
        "lines.linewidth": 2, "text.parse_math": False}])  # a $ in a prompt is a dollar


def pick(rows, event, split="train") -> list[dict]:
    """The rows of one kind, in order."""
    return [row for row in rows if row["event"] == event and row["split"] == split]


def spin_reports(rows) -> tuple[list[dict], list[float]]:
    """The reports after SFT, and their places on the axis of iterations: t ends at t."""
    rows = [row for row in pick(rows, "step") if row["iteration"]]
    steps = max((row["step"] for row in rows), default=1)
    return rows, [row["iteration"] - 1 + row["step"] / steps for row in rows]


def by_iteration(rows) -> list[tuple[list[float], list[dict]]]:
    """(places, reports) of each iteration: 1, 2, …"""
    found = {}
    for row, place in zip(*spin_reports(rows)):
        places, reports = found.setdefault(row["iteration"], ([], []))
        places.append(place)
        reports.append(row)
    return list(found.values())


# --- the panels ----------------------------------------------------------------------------------

def draw_distance(ax, rows, empirical):
    """(a) the KL of p_0, p_1, …, and where Theorem 5.4 puts it; or the NLL."""
    key, word = ("nll", "NLL") if empirical else ("kl", "KL")
    train, heldout = pick(rows, "iteration"), pick(rows, "iteration", "heldout")
    for some, colour, style, label in ((train, TRAIN, "o-", "train prompts"),
                                       (heldout, HELDOUT, "s--", "held-out prompts")):
        if some:
            ax.plot([row["iteration"] for row in some], [row[key] for row in some], style,
                    color=colour, label=f"{label}: {some[-1][key]:.3g} at the end")
    for row in train:
        if row["predicted_kl"] is not None:
            t, value = row["iteration"], row["predicted_kl"]
            label = f"train, as Theorem 5.4 predicts: {value:.3g} at the end"
            ax.hlines(value, t - 0.2, t + 0.2, color=THEORY, lw=3,
                      label=label if row is train[-1] else None)
    ax.set(title=f"(a) {word} on train prompts: {train[0][key]:.3g} → {train[-1][key]:.3g}",
           ylabel="−log p of a real response, nats" if empirical else "KL(p_data‖p_θ), nats",
           xlim=(-0.5, train[-1]["iteration"] + 0.5))
    if not empirical:
        log_axis(ax)
    finish(ax)


def log_axis(ax):
    """A log axis with plain numbers: … 1, 2, 5, 10, 20, … or, of many decades, the powers of 10."""
    low, high = ax.dataLim.intervaly
    ax.set(yscale="log", ylim=(max(low, 1e-9) / 2, max(high, 1e-9) * 2))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def draw_loss(ax, rows, start):
    """(b) the loss in each iteration and its floor. `start`: where each iteration begins."""
    for t, (x, reports) in enumerate(by_iteration(rows), 1):
        y = [row["loss"] for row in reports]
        if start is not None:
            x, y = [t - 1, *x], [start, *y]
        ax.plot(x, y, ".-", color=TRAIN, label="the loss on train prompts" if t == 1 else None)
        floor = reports[0]["loss_floor"]
        if floor is not None:
            ax.hlines(floor, t - 1, t, color=THEORY, lw=3,
                      label="its floor, the least that it can be" if t == 1 else None)
    if start is not None:
        name = "log 2" if abs(start - np.log(2)) < 1e-6 else f"{start:.3g}"
        ax.axhline(start, color=GREY, ls=":", label=f"{name}: each iteration begins at p_θ = p_t")
    title = "(b) the loss"
    if floor is not None:
        title = f"(b) loss ends {y[-1] - reports[-1]['loss_floor']:.3f} above its floor"
    ax.set(title=title, ylabel="nats", xlim=(-0.05, x[-1] + 0.05))
    finish(ax)


def draw_masses(ax, rows):
    """(c) how much probability is on right responses, on sampled wrong ones, and elsewhere.

    On a log axis. Each iteration has a new opponent with new samples, so two lines start afresh
    there. The point at 0 is all that p_0 has wrong.
    """
    p_0, iterations = pick(rows, "iteration")[0], by_iteration(rows)
    rows, places = spin_reports(rows)
    wrong = [row["off_support"] for row in (p_0, *rows)]
    ax.plot([0, *places], [1 - share for share in wrong], color=RIGHT, zorder=3, label="right")
    ax.plot([0, *places], wrong, color=GREY, lw=6, alpha=0.6, label="wrong, all together")
    for t, (x, reports) in enumerate(iterations, 1):
        sampled = [row["sampled_wrong"] for row in reports]
        others = [row["off_support"] - row["sampled_wrong"] for row in reports]
        for shares, style, colour, label in (
                (sampled, ".--", SAMPLED, "wrong, sampled by the opponent of the iteration"),
                (others, ".-", LEAKED, "wrong, not sampled: leaks go here")):
            ax.plot(x, shares, style, color=colour, label=label if t == 1 else None)
    ax.set(title=f"(c) wrong: {wrong[0]:.1%} → {wrong[-1]:.1%}", yscale="log", ylim=(1e-5, 1.3),
           ylabel="probability under p_θ, train", xlim=(-0.05, places[-1] + 0.05))
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    finish(ax)


def draw_logps(ax, rows):
    """(c) for plain pairs: the log-probs behind the loss. If both fall, probability leaks."""
    rows, places = spin_reports(rows)
    for key, colour, mark, label in (
            ("logp_real", DATA, "o-", "log p_θ of real responses"),
            ("logp_generated", POLICY, "s-", "log p_θ of the opponent's responses"),
            ("margin", LEAKED, "^:", "margin: λ × the difference of log p_θ/p_t")):
        ax.plot(places, [row[key] for row in rows], mark, color=colour, ms=4, label=label)
    ax.set(title="(c) log-probabilities and margin, train", ylabel="nats",
           xlim=(-0.05, places[-1] + 0.05))
    finish(ax)


def finish(ax):
    """Whole iterations on the axis, and a legend below it, where it covers no curve."""
    ax.set_xlabel("iteration (SFT ends at 0)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)


def draw_bars(ax, prompt, policies, width):
    """(d) p_data beside some policies, for one prompt. policies: [(colour, p, predicted)]."""
    names = [legible(name, 12) for name in (*prompt["responses"], "(other)")]
    bars = [(DATA, [*prompt["responses"].values()], None), *policies]
    for k, (colour, p, predicted) in enumerate(bars):
        draw_policy(ax, k, width, colour, p, predicted)
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    held = "held out" if prompt["split"] == "heldout" else "a train prompt"
    ax.set_title(f"{legible(prompt['prompt'], 36)}\n({held})", fontsize="small")
    ax.set(ylim=(0, 1.02), xlim=(-0.6, len(names) - 0.4))


def draw_policy(ax, k, width, colour, p, predicted) -> list:
    """The bars of one policy, the k-th of those shown, and marks where Theorem 5.4 puts them."""
    left = [i - 0.42 + k * width for i in range(len(p) + 1)]
    artists = [*ax.bar(left, with_other(p), width, align="edge", color=colour)]
    if predicted:
        # A little shorter than the bar: the marks of bars of like height stay apart.
        ends = [[x + part * width for x in left] for part in (0.15, 0.85)]
        artists.append(ax.hlines(with_other(predicted), *ends, color=THEORY, lw=3, zorder=3,
                                 clip_on=False))
    return artists


def with_other(p) -> list[float]:
    """Probabilities, and what is left for all other responses."""
    return [*p, max(0.0, 1 - sum(p))]


def predictions(row) -> list:
    """Where Theorem 5.4 puts the policy of a row, for each prompt shown; None where unknown."""
    return row.get("shown_predicted") or [None] * len(row["shown"])


def draw_legend(figure, policies, rows, place):
    """The colours of (d). policies: [(name, colour)]."""
    handles = [Patch(color=colour, label=name) for name, colour in [("p_data", DATA), *policies]]
    if any(any(predictions(row)) for row in rows):
        handles.append(Line2D([], [], color=THEORY, lw=3,
                              label="where Theorem 5.4 puts the top of a bar"))
    figure.legend(handles=handles, loc=place, ncols=len(handles), frameon=False)


def policy_name(row) -> str:
    """What the legend calls the policy of a row."""
    if row["event"] == "step":
        return "p_θ now"
    return f"p_{row['iteration']}" + (" (SFT)" if row["iteration"] == 0 else "")


def legible(text, longest) -> str:
    """A text that the pictures' font can draw, cut to some characters."""
    known = characters_of_the_font()
    return short("".join(c if ord(c) in known or c.isspace() else "□" for c in text), longest)


@functools.cache
def characters_of_the_font() -> set[int]:
    return set(FT2Font(findfont("DejaVu Sans")).get_charmap())


# --- the pictures --------------------------------------------------------------------------------

def draw_convergence(rows, shown, empirical=False, start=None) -> bytes:
    """convergence.png, from the rows so far and the prompts of panel (d)."""
    picture = io.BytesIO()
    with own_style(13):
        figure = Figure(figsize=(16, 5.2 if empirical else 11), dpi=80)
        FigureCanvasAgg(figure)
        draw_panels(figure, rows, shown, empirical, start)
        figure.savefig(picture, format="png")
    return picture.getvalue()


def draw_panels(figure, rows, shown, empirical, start):
    """All panels, on an empty figure."""
    top, bottom = (figure, None) if empirical else figure.subfigures(2, 1, height_ratios=(1.15, 1))
    axes = panels(top, 3, False, wspace=0.3, bottom=0.36, top=0.93)
    if pick(rows, "iteration"):
        draw_distance(axes[0], rows, empirical)
    if spin_reports(rows)[0]:
        draw_loss(axes[1], rows, start)
        (draw_logps if empirical else draw_masses)(axes[2], rows)
    for ax, begin in zip(axes, ("after SFT", "in iteration 1", "in iteration 1")):
        if not ax.has_data():
            ax.set(xticks=[], yticks=[])
            ax.text(0.5, 0.5, f"begins {begin}", ha="center", transform=ax.transAxes)
    if bottom:
        draw_policies(bottom, rows, shown)


def panels(figure, n, sharey, **room):
    """n axes beside each other."""
    room |= {"left": 0.06, "right": 0.98}
    return figure.subplots(1, n, sharey=sharey, squeeze=False, gridspec_kw=room)[0]


def draw_policies(figure, rows, shown):
    """(d) for each prompt. Of many iterations the first, the last and some between."""
    done = pick(rows, "iteration")
    if rows[-1]["event"] == "step":  # within an iteration, for the window
        done.append(pick(rows, "step")[-1])
    some = [done[i * (len(done) - 1) // 4] for i in range(5)] if len(done) > 5 else done
    shades = [PURPLES(0.25 + 0.75 * (k + 1) / len(some)) for k in range(len(some))]
    axes = panels(figure, len(shown), True, wspace=0.1, bottom=0.22, top=0.79)
    for i, (ax, prompt) in enumerate(zip(axes, shown)):
        policies = [(shade, row["shown"][i], predictions(row)[i])
                    for row, shade in zip(some, shades)]
        draw_bars(ax, prompt, policies, 0.84 / (len(some) + 1))
    axes[0].set_ylabel("(d) probability")
    draw_legend(figure, zip(map(policy_name, some), shades), some, "upper center")


def draw_gif(rows, shown, empirical=False) -> bytes:
    """convergence.gif, a frame for each report: the bars of (d), or the curve of (a)."""
    rows, writer = pick(rows, "step"), PillowWriter(fps=4)
    with own_style(13), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convergence.gif"
        figure = Figure(figsize=(15, 4.5), dpi=60)
        FigureCanvasAgg(figure)
        axes = draw_still_parts(figure, rows, shown, empirical)
        freeze(figure)
        with writer.saving(figure, path, figure.dpi):
            for k, row in enumerate([*rows, *[rows[-1]] * 5]):  # the last frame stays a while
                figure.suptitle(frame_title(row, empirical))
                artists = draw_moving_parts(axes, rows[:k + 1], empirical)
                writer.grab_frame()
                for artist in artists:
                    artist.remove()
        return path.read_bytes()


def freeze(figure):
    """Put a picture in the place of all that never moves: frames are then drawn much faster."""
    figure.canvas.draw()
    still = np.array(figure.canvas.buffer_rgba())
    figure.legends.clear()
    for ax in figure.axes:
        ax.set_axis_off()
        ax.set_title("")
    figure.figimage(still, zorder=-1)


def draw_still_parts(figure, rows, shown, empirical):
    """What is the same in every frame of the GIF. Returns the axes."""
    axes = panels(figure, 1 if empirical else len(shown), True, wspace=0.1, bottom=0.34, top=0.78)
    if empirical:
        axes[0].plot([row["nll"] for row in rows], color=GREY)
        axes[0].set(xlabel="report", ylabel="−log p, nats")
        return axes
    for ax, prompt in zip(axes, shown):
        draw_bars(ax, prompt, [], 0.42)
    axes[0].set_ylabel("probability")
    draw_legend(figure, [("p_θ", POLICY)], rows, "lower center")
    return axes


def draw_moving_parts(axes, rows, empirical) -> list:
    """What is new in a frame of the GIF: the curve as far as the last of the rows, or its bars."""
    if empirical:
        return axes[0].plot([row["nll"] for row in rows], color=TRAIN)
    return [artist for ax, p, predicted in zip(axes, rows[-1]["shown"], predictions(rows[-1]))
            for artist in draw_policy(ax, 1, 0.42, POLICY, p, predicted)]


def frame_title(row, empirical) -> str:
    stage = f"iteration {row['iteration']}" if row["iteration"] else "SFT"
    name, key = ("−log p", "nll") if empirical else ("KL(p_data‖p_θ)", "kl")
    return f"{stage}, step {row['step']}: {name} = {row[key]:.3f} nats on train prompts"


class Window:
    """--show: the panels in a window, drawn anew at each report."""

    def __init__(self):
        import matplotlib.pyplot as plt  # here, since it looks for a display
        self.figure = None
        with own_style(9), contextlib.suppress(ImportError):  # no such kind of window here
            figure = plt.figure(figsize=(13, 9))
            if figure.canvas.required_interactive_framework:
                self.figure = figure
                figure.show()
        if self.figure is None:
            print("--show: there is no display here; convergence.png shows the same panels")

    def redraw(self, rows, shown, empirical=False, start=None):
        import matplotlib.pyplot as plt
        if self.figure is None or not plt.fignum_exists(self.figure.number):
            return  # there is no display, or the user has closed the window
        with own_style(9):
            self.figure.clear()
            draw_panels(self.figure, rows, shown, empirical, start)
            self.figure.canvas.draw()
        self.figure.canvas.flush_events()
