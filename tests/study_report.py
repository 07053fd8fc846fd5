"""What study.py found, from the runs' metrics.jsonl alone: tests/STUDY.md and a figure.

Reading order: `rows_of`, `curve`, `best_moment` → tables, one a part → `draw_methods` → `write`.
"""
import json
import os
import statistics
from pathlib import Path

import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from bench_logps import machine
from data.plot import BLACK, BLUE, GREEN, LARGE, ORANGE, RED, plt, save
from train import Config

SPLITS, PURPLE = ("train", "heldout"), "#CC79A7"
STYLES = {"SPIN": (BLUE, "o-"), "SPIN, no anchor": (GREEN, "v--"), "more SFT": (BLACK, "s-"),
          "DPO": (RED, "D:"), "SPACE": (PURPLE, "^-.")}
FAULTS = {None: "the tutorial's own", "counts_only": "shares are counts of draws (no mistake)",
          "greedy": "greedy negatives", "cut_short": "cut after 3 tokens, left open (no mistake)",
          "cut_and_closed": "cut after 3 tokens, taken as finished",
          "wrong_opponent": "y' from p_t, log p_t(y) from the SFT model",
          "mean_of_tokens": "mean over tokens instead of sum", "no_end": "END not scored"}


def rows_of(path, event="iteration", split="train"):
    """Rows of a run's metrics.jsonl of one kind, in order."""
    rows = [json.loads(line) for line in open(Path(path) / "metrics.jsonl")]
    return [row for row in rows if row["event"] == event and row["split"] == split]


def values(path, key, split):
    """A figure after SFT and after each iteration; fewer where the run had to stop."""
    return [row[key] for row in rows_of(path, split=split)]


def curve(path, key, split):
    """(optimiser steps after SFT, value), where weights are being averaged: SFT's end at 0."""
    config = json.loads((Path(path) / "config.json").read_text())
    kept = [(0, values(path, key, split)[0])]
    for row in rows_of(path, "step", split):
        if row["iteration"] and row["step"] > config["steps"] * (1 - config["average"]):
            kept.append(((row["iteration"] - 1) * config["steps"] + row["step"], row[key]))
    return kept


def best_moment(path) -> int:
    """Which point of a run's curves has the least held-out KL: where one who may would stop."""
    kls = [kl for _, kl in curve(path, "kl", "heldout")]
    return kls.index(min(kls))


def command(settings) -> str:
    """What to type for a run, without the seed where it is the default."""
    flags = [f"--{k.replace('_', '-')} {v:g}" if isinstance(v, float) else
             f"--{k.replace('_', '-')} {v}" for k, v in settings.items()
             if k != "data" and v != getattr(Config, k)]
    return "`python train.py" + "".join(" " + flag for flag in flags) + "`"


def table(head, rows) -> str:
    """A Markdown table; numbers must be formatted already."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spread(numbers, form=".3f") -> str:
    """Mean and range."""
    return (f"{statistics.mean(numbers):{form}} "
            f"({min(numbers):{form}}–{max(numbers):{form}})")


# --- tables --------------------------------------------------------------------------------------

def grid_table(tries, folder) -> str:
    """KL on held-out prompts after the best and the last iteration; each best one bold."""
    text = ""
    for regime, found in tries.items():
        rates = sorted({s["lr"] for runs in found.values() for s in runs})
        rows = []
        for method, runs in found.items():
            ends = {(arm_of(s), s["lr"]): values(folder(s), "kl", "heldout")[1:] for s in runs}
            done = {k: (min(h), h[-1]) for k, h in ends.items()
                    if len(h) == runs[0].get("iters", Config.iters)}
            best = min(done, key=lambda k: done[k][0])
            for arm in dict.fromkeys(arm for arm, _ in ends):
                cells = [f"{done[arm, lr][0]:.3f} / {done[arm, lr][1]:.3f}"
                         if (arm, lr) in done else "stopped" if (arm, lr) in ends else ""
                         for lr in rates]
                cells = [f"**{c}**" if (arm, lr) == best else c for c, lr in zip(cells, rates)]
                rows.append([f"{method}{arm}", *cells])
        text += f"\n{regime}:\n\n" + table(["method", *map(str, rates)], rows)
    return text


def arm_of(settings) -> str:
    """λ and anchor, where a method has a choice of them."""
    if settings.get("method") == "dpo":
        return f", λ = {settings.get('lam', Config.lam):g}, anchor {settings.get('anchor', 'mass')}"
    return f", λ = {settings['lam']:g}" if "lam" in settings else ""


def methods_table(runs, folder) -> str:
    """Mean and range over seeds, at the end and at the best moment."""
    text = ""
    for regime, found in runs.items():
        start = [folder(s) for s in found["SPIN"]]
        rows = [["SFT, where all start", "", *(
            spread([values(p, "kl", split)[0] for p in start]) for split in SPLITS), "",
            *(spread([values(p, "off_support", split)[0] for p in start], ".1%")
              for split in SPLITS),
            spread([values(p, "entropy", "heldout")[0] for p in start], ".2f")]]
        for method, tries in found.items():
            paths = [folder(s) for s in tries]
            best = [curve(p, "kl", "heldout")[best_moment(p)] for p in paths]
            rows.append([
                method + arm_of(tries[0]), f"{tries[0]['lr']:g}",
                *(spread([values(p, "kl", split)[-1] for p in paths]) for split in SPLITS),
                f"{spread([k for _, k in best])} at {statistics.mean(x for x, _ in best):.0f}",
                *(spread([values(p, "off_support", split)[-1] for p in paths], ".1%")
                  for split in SPLITS),
                spread([values(p, "entropy", "heldout")[-1] for p in paths], ".2f")])
        data = rows_of(start[0], split="heldout")[0]["loss_floor"]
        text += (f"\n{regime} ({found['SPIN'][0].get('sft_samples', Config.sft_samples)} responses "
                 f"a training prompt), seeds {', '.join(str(s['seed']) for s in found['SPIN'])}; "
                 f"the entropy of p_data on held-out prompts is {data:.2f}:\n\n")
        text += table(["method", "lr", "KL, train", "KL, held-out", "best held-out, at step",
                       "off-support, train", "off-support, held-out", "entropy, held-out"], rows)
        text += "\n" + "\n".join(f"- {method}: {command(tries[0])}"
                                 for method, tries in found.items()) + "\n"
    return text


def scarce_table(runs, folder) -> str:
    """Each method at each rate: the moment of the least held-out KL, and the end."""
    rows = []
    for method, by_rate in runs.items():
        for lr, tries in by_rate.items():
            cells = []
            for path in map(folder, tries):
                curves = [curve(path, *what) for what in (
                    ("kl", "heldout"), ("kl", "train"), ("off_support", "heldout"))]
                cells.append([points[i][1] for i in (best_moment(path), -1) for points in curves])
            forms = (".3f", ".3f", ".1%") * 2
            rows.append([method, f"{lr:g}", *(spread(numbers, form) for numbers, form in
                                              zip(zip(*cells), forms))])
    return table(["method", "lr", "best: KL, held-out", "KL, train", "off-support, held-out",
                  "end: KL, held-out", "KL, train", "off-support, held-out"], rows)


def best_rate(by_rate, folder):
    """The runs of the rate with the least held-out KL along the way, in the mean over seeds."""
    return min(by_rate.values(), key=lambda tries: statistics.mean(
        curve(p, "kl", "heldout")[best_moment(p)][1] for p in map(folder, tries)))


def switches_table(jobs, folder, labels=None) -> str:
    """KL on both splits and off-support mass after SFT and after each iteration."""
    rows = []
    for job in jobs:
        path = folder(job[1], job[2])
        wrong = json.loads((path / "done").read_text())["wrong"]
        cells = [" → ".join(f"{v:{form}}" for v in values(path, key, split))
                 + (" → stopped" if wrong else "") for key, split, form in (
            ("kl", "train", ".3f"), ("kl", "heldout", ".3f"), ("off_support", "train", ".1%"))]
        rows.append([labels[job[2]] if labels else command(job[1]), *cells])
    return table(["run", "KL, train", "KL, held-out", "off-support, train"], rows)


# --- figures -------------------------------------------------------------------------------------

PANELS = [("kl", "train", "KL to p_data, nats\ntraining prompts"),
          ("kl", "heldout", "KL to p_data, nats\nheld-out prompts"),
          ("off_support", "heldout", "wrong answers, %\nheld-out prompts"),
          ("entropy", "heldout", "entropy, nats\nheld-out prompts")]


def draw_methods(runs, folder, path):
    """One row a regime, one column a figure: mean and range over the seeds, against steps."""
    with plt.rc_context(LARGE | {"font.size": 17, "axes.titlesize": 17, "lines.linewidth": 2.5}):
        figure, axes = plt.subplots(len(runs), 4, figsize=(19, 4.6 * len(runs)), squeeze=False,
                                    sharex=True, layout="constrained")
        for (regime, found), row in zip(runs.items(), axes):
            for ax, (key, split, title) in zip(row, PANELS):
                for method, tries in found.items():
                    draw_line(ax, [curve(folder(s), key, split) for s in tries], method,
                              100 if key == "off_support" else 1)
                if key == "entropy":
                    data = rows_of(folder(tries[0]), split=split)[0]["loss_floor"]
                    ax.axhline(data, color=ORANGE, lw=5, alpha=0.6, zorder=0)
                    ax.annotate("p_data", (0.98, data), xycoords=("axes fraction", "data"),
                                ha="right", va="bottom", color="#8a5f00")
                else:
                    ax.set_yscale("log")
                    ax.yaxis.set_major_formatter("{x:g}")
                    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # less than a decade
                    ax.yaxis.set_minor_formatter("{x:g}")
                ax.set_title(title if ax in axes[0] else "")
            few = found["SPIN"][0].get("sft_samples", Config.sft_samples)
            row[0].set_ylabel(f"{regime}: {few} responses\na prompt to learn from")
        for ax in axes[-1]:
            ax.set_xlabel("optimiser steps after SFT")
        lines = [Line2D([], [], color=STYLES[m][0], marker=STYLES[m][1][0], ls=STYLES[m][1][1:],
                        label=m) for m in found]
        figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), fontsize=18)
        save(figure, path)


def draw_line(ax, curves, method, scale):
    """The mean over seeds as a line, the range as a band."""
    colour, mark = STYLES[method]
    steps = [x for x, _ in curves[0]]
    columns = list(zip(*([scale * y for _, y in points] for points in curves)))
    ax.plot(steps[:len(columns)], [statistics.mean(c) for c in columns], mark, color=colour, ms=7)
    ax.fill_between(steps[:len(columns)], [min(c) for c in columns], [max(c) for c in columns],
                    color=colour, alpha=0.15, lw=0)


# --- the page ------------------------------------------------------------------------------------

TEXTS = {
    "grid": "## Learning rates\n\nKL(p_data‖p_θ) in nats on held-out prompts, after the best / the "
            "last iteration, one seed that no other part uses. Chosen, for every method alike, by "
            "the first number: bold. (So whoever should stop early may. Held-out prompts come "
            "from p_data too: nobody is favoured, and this seed decides nothing else.)\n",
    "methods": "## Methods\n\nMean and range over seeds, after the last iteration. KL and entropy "
               "in nats; entropy counts all wrong answers as one more answer. Best moment: the "
               "least held-out KL along the way, for whoever stops early.\n",
    "scarce": "## Little data, rates side by side\n\nTwo responses a training prompt, mean and "
              "range over seeds 0 to 4, at the moment of the least held-out KL (for whoever stops "
              "there) and at the end. Nothing is chosen here: the grid's one seed turned out "
              "unlike these, and its rate for SFT too low for them. The figure shows SPIN and "
              "SFT at the best of these rates.\n\n",
    "switches": "## What each switch does to KL\n\nSeed 0, after SFT → iterations 1, 2, 3. The "
                "commands give these runs, SFT included. Two are not expected to "
                "converge: the correlation loss 1 − u has no minimum, and below λ = ½ exact "
                "self-play overshoots further at every iteration (Theorem 5.4).\n\n",
    "fidelity": "## Mistakes of published code\n\nSeed 0, the default settings with one mistake "
                "each (`tests/study_faults.py`). Greedy, cut and wrong-opponent rows "
                "are to be compared with *counts of draws*: knowing p_t(y) exactly for the SFT "
                "set's answers, as the tutorial does, would hide the mistake.\n\n"}


def write(args, found, seconds, folder, cpu):
    """tests/STUDY.md and the figure; with --quick into --out."""
    page, where = Path(args.out) / "STUDY.md", Path(args.out)
    if not args.quick:
        page = Path(__file__).parent / "STUDY.md"
        where = page.parents[1] / ".github" / "assets"
    text = (f"# What `python tests/study.py` found\n\nWritten by the script, from its runs' "
            f"metrics alone. {machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
            f"`python tests/study.py --parts {args.parts}`"
            f"{' --quick' if args.quick else ''}: {cpu / 60:.0f} min of processor time in all, "
            f"so {cpu / 120:.0f} min on two cores.\n\n")
    if "grid" in found:
        text += TEXTS["grid"] + grid_table(found["grid"], folder) + "\n"
    if "methods" in found:
        text += TEXTS["methods"] + methods_table(found["methods"], folder) + "\n"
        drawn = found["methods"]
        if "scarce" in found:
            better = {method: best_rate(runs, folder) for method, runs in found["scarce"].items()}
            drawn = drawn | {"scarce": drawn["scarce"] | better}
        draw_methods(drawn, folder, where / "study.png")
    if "scarce" in found:
        text += TEXTS["scarce"] + scarce_table(found["scarce"], folder) + "\n"
    if "switches" in found:
        text += TEXTS["switches"] + switches_table(found["switches"], folder) + "\n"
    if "fidelity" in found:
        text += TEXTS["fidelity"] + switches_table(found["fidelity"], folder, FAULTS)
    page.write_text(text.rstrip() + "\n")
    print("\n" + text + f"wrote {page}; {seconds / 60:.1f} min")
