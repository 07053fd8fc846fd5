"""What study.py found, from the runs' metrics.jsonl alone: a page and a figure.

Reading order: `rows_of`, `spread`, `cell` → a table for each part → `draw_methods` → `write`.
"""
import json
import os
import statistics
import textwrap
from pathlib import Path

import torch

from bench.measure import BLUE, ORANGE, machine
from study.mistakes import MISTAKES
from train import Config


def rows_of(path, event="iteration", split="train") -> list[dict]:
    """Rows of a run's metrics.jsonl of one kind, in order."""
    lines = (Path(path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["event"] == event and row["split"] == split]


def values(paths, key, split, t) -> list[float]:
    """One figure after iteration t, for each run that came so far."""
    rows = [rows_of(path, split=split) for path in paths]
    return [some[t][key] for some in rows if len(some) > t]


def spread(numbers, form=".3f") -> str:
    """Mean and range: 0.040 (0.039–0.043)."""
    return f"{statistics.mean(numbers):{form}} ({min(numbers):{form}}–{max(numbers):{form}})"


def cell(paths, key, split, t, form=".3f") -> str:
    """The spread of one figure after iteration t; it says so if not every run came so far."""
    numbers = values(paths, key, split, t)
    if not numbers:
        return "stopped"
    lost = len(numbers) < len(paths)
    return spread(numbers, form) + (f", {len(numbers)} of {len(paths)} seeds" if lost else "")


def command(settings) -> str:
    """What to type for a run with the default seed."""
    changed = {name: value for name, value in settings.items()
               if name != "seed" and value != getattr(Config, name)}
    flags = [f" --{name.replace('_', '-')} {value:g}" if isinstance(value, float) else
             f" --{name.replace('_', '-')} {value}" for name, value in changed.items()]
    return f"`python train.py{''.join(flags)}`"


def table(head, rows) -> str:
    """A Markdown table; numbers must be formatted already."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


# --- tables --------------------------------------------------------------------------------------

def tuning_table(tried) -> str:
    """KL in the mean over the tuning seeds, and the iteration after which it is least."""
    tried_values = sorted({value for scores in tried.values() for value in scores})
    rows = []
    for (data, method), scores in tried.items():
        best = min(scores, key=scores.get)
        cells = [f"{scores[v][0]:.3f} at {scores[v][1]}" if v in scores else ""
                 for v in tried_values]
        rows.append([f"{method}, {data}", *(f"**{cell}**" if v == best else cell
                                            for v, cell in zip(tried_values, cells))])
    return table(["", *(f"{v:g}" for v in tried_values)], rows)


def methods_table(found, data) -> str:
    """Each method at its chosen stop: mean and range over seeds."""
    some = {method: one for (d, method), one in found.items() if d == data}
    columns = [("kl", "train", ".3f"), ("kl", "heldout", ".3f"), ("off_support", "train", ".1%"),
               ("off_support", "heldout", ".1%")]
    paths = some["SPIN"][0]
    rows = [["SFT, where all start", "", *(cell(paths, key, split, 0, form)
                                           for key, split, form in columns)]]
    for method, (paths, settings, stop) in some.items():
        rows.append([method, command(settings | {"iters": stop}), *(
            cell(paths, key, split, stop, form) for key, split, form in columns)])
    return table(["method", "command", "KL, train", "KL, held out", "off-support, train",
                  "off-support, held out"], rows)


def runs_table(found) -> str:
    """One run with its seeds a row: KL after each iteration, and off-support mass at the end."""
    rows = []
    for paths, change, mistake in found:
        name = MISTAKES[mistake][1] if mistake else command(change)
        full = json.loads((paths[0] / "config.json").read_text(encoding="utf-8"))["iters"]
        rows.append([name, *(cell(paths, "kl", "train", t) for t in range(1, full + 1)),
                     cell(paths, "kl", "heldout", full),
                     cell(paths, "off_support", "train", full, ".1%")])
    head = ["", *(f"KL, train, {t}" for t in range(1, full + 1)), "KL, held out, end",
            "off-support, train, end"]
    return table(head, rows)


# --- the figure ----------------------------------------------------------------------------------

def draw_methods(found, path):
    """A panel for each amount of data, a line for each method: means as dots, ranges as bars."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    kinds = list(dict.fromkeys(data for data, _ in found))
    with plt.rc_context({"font.size": 14}):
        figure, axes = plt.subplots(1, len(kinds), figsize=(14, 5), squeeze=False, sharey=True,
                                    layout="constrained")
        for ax, data in zip(axes.flat, kinds):
            some = {method: one for (d, method), one in found.items() if d == data}
            some = {"SFT, the start": (*some["SPIN"][:2], 0), **some}
            for split, colour, mark, shift in (("train", BLUE, "o", -0.12),
                                               ("heldout", ORANGE, "s", 0.12)):
                for y, (paths, _, stop) in enumerate(some.values()):
                    numbers = values(paths, "kl", split, stop)
                    if numbers:
                        ax.plot([min(numbers), max(numbers)], [y + shift] * 2, color=colour, lw=3)
                        ax.plot(statistics.mean(numbers), y + shift, mark, color=colour, ms=9)
                ax.plot([], [], mark + "-", color=colour, ms=9, lw=3,
                        label="training prompts" if split == "train" else "held-out prompts")
            settings = next(iter(some.values()))[1]
            few = settings.get("sft_samples", Config.sft_samples)
            ax.set(xlabel="KL(p_data‖p_θ), nats; lower is better",
                   title=f"{data} data: {few} responses a prompt")
            low, high = ax.get_xlim()
            if low <= 0 or high > 5 * low:
                ax.set_xscale("log")
                ax.xaxis.set_major_formatter("{x:g}")
            ax.set_yticks(range(len(some)), list(some))
            ax.grid(axis="x", alpha=0.4)
        axes[0, 0].invert_yaxis()
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path, dpi=80)
        plt.close(figure)


# --- the page ------------------------------------------------------------------------------------

METHODS = """
Mean and range over seeds that were not used for tuning ({}), each method stopped after the
iteration that tuning chose. KL in nats. "no anchor": `--anchor none`; else the mass anchor. SFT
has no opponent, hence no anchor. The commands give these runs with seed 0."""
TUNING = """
KL(p_data‖p_θ) in nats on held-out prompts, in the mean over seeds that nothing else uses ({}), and
after which iteration it is least. Bold is chosen: the same rule for every method. The range of
values was widened until the best lies inside, or at a limit (rates from 6e-5 to 0.065, λ and μ from
0.03 to 200): a method whose best is the lowest rate does best by hardly moving. The SFT models,
where all of them start, are at {}."""
SWITCHES = """
Mean and range over seeds {}; "2 of 3 seeds" where a run stopped, its gradient no longer finite. Two
are not expected to converge: the correlation loss 1 − u has no minimum, and below λ = ½ exact
self-play overshoots further at every iteration (Theorem 5.4)."""
MISTAKES_TEXT = """
The default settings with one mistake each (`tests/study/mistakes.py`), seeds {}. Rows on sampling
and on the wrong opponent are to be compared with the row of counts: knowing p_t(y) for the
responses of the SFT set, as the tutorial does, would hide these mistakes."""


def section(title, text) -> str:
    return f"## {title}\n\n{textwrap.fill(text.strip(), 98)}\n\n"


def write(args, found, seconds):
    """The page and, if methods were compared, the figure beside p_data."""
    seeds = lambda part: ", ".join(map(str, args.seeds[part]))
    done = [json.loads(path.read_text(encoding="utf-8")) for path in Path(args.out).glob("*/done")]
    cpu = sum(one["cpu"] for one in done) / 60
    flags = ("" if args.whole else f" --parts {args.parts}") + (" --quick" if args.quick else "")
    text = "# A fair comparison: the tables\n\n" + textwrap.fill(
        f"[README.md](README.md) says what is compared, and what was found. Written by `python "
        f"tests/study/study.py{flags}` from its runs' metrics. Machine: {machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}; {len(done)} runs, {cpu:.0f} minutes "
        f"of processor time.",
        98) + "\n\n"
    if "methods" in found:
        draw_methods(found["methods"], args.figure)
        link = os.path.relpath(args.figure, args.page.parent).replace(os.sep, "/")
        text += section("Methods", METHODS.format(seeds("methods")))
        text += f"![each method's distance from p_data]({link})\n\n"
        for data in dict.fromkeys(data for data, _ in found["methods"]):
            text += f"{data.capitalize()} data:\n\n" + methods_table(found["methods"], data)
    if "rates" in found:
        starts = " and ".join(f"{kl:.3f} ({data})" for data, kl in found["starts"].items())
        text += section("Tuning", TUNING.format(seeds("tune"), starts))
        text += "Learning rates, at the default λ and μ:\n\n" + tuning_table(found["rates"])
        for name, tried in found["seconds"].items():
            symbol = {"lam": "λ", "mu": "μ"}[name]
            text += f"{symbol}, at each method's best rate:\n\n" + tuning_table(tried)
    if "switches" in found:
        text += section("What each switch does", SWITCHES.format(seeds("switches")))
        text += runs_table(found["switches"])
    if "mistakes" in found:
        text += section("Mistakes of published code", MISTAKES_TEXT.format(seeds("mistakes")))
        text += runs_table(found["mistakes"])
    args.page.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"\n{text}wrote {args.page}; {seconds / 60:.1f} min")
