"""Which method comes nearest to p_data, and what wins where real responses are few?

    python tests/study/study.py             all of it; about 45 minutes of one core
    python tests/study/study.py --quick     a small world and few steps: does everything run?

Writes STUDY.md and study.png. A run that is complete in --out is not repeated, so an interrupted
study goes on where it was.

Each method is tuned by one rule: λ where the loss has one, at the best of three iterations; then
the learning rate, after one iteration; then the iteration to stop after. Best is the least KL on
held-out prompts, in the mean over two seeds that nothing else uses. The values tried are widened
until the best one lies inside, or at a limit. The results are those of three other seeds.

Reading order: what is compared → `best`, `widen`, `tune` → the page → the picture → `main`.
"""
import argparse
import io
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from bench.measure import machine  # noqa: E402
from data.run.figures import HELDOUT, LEAKED, RIGHT, TRAIN, own_style  # noqa: E402
from study.runs import (QUICK, Job, minutes, rows_of, run_all, small_world,  # noqa: E402
                        spread, table, values)

METHODS = {"SPIN": Job(), "SPACE": Job({"loss": "space"}),
           "DPO": Job({"opponent": "sft", "iters": 1}, "dpo"), "more SFT": Job({"method": "sft"})}
DATA = {"ample": {}, "scarce": {"sft_samples": 2}}  # real responses to each train prompt
RATES, RATE_LIMITS = (1e-3, 4e-3), (2e-4, 2e-2)  # widened by factors of 4
LAMS, LAM_LIMITS = (2.0, 8.0), (0.4, 130.0)
TUNING, SEEDS, SCARCE_LAMS = (10, 11), (0, 1, 2), (2.0, 8.0, 32.0)


# --- tuning --------------------------------------------------------------------------------------

def run(jobs, args, what):
    """Train the runs that are not there yet, and remember all of them for the page."""
    args.jobs += jobs
    run_all(jobs, args.out, what)


def best(job, args) -> tuple[float, int]:
    """(KL, t): the least KL on held-out prompts, in the mean over tuning seeds, is after p_t."""
    rows = [rows_of(job | {"seed": seed}, args.out, "heldout")[1:] for seed in args.tuning]
    means = [statistics.mean(row["kl"] for row in some) for some in zip(*rows)]
    return min((kl, t) for t, kl in enumerate(means, 1)) if means else (float("inf"), 1)


def widen(jobs, name, values, limits, args):
    """Try values of one setting for each job. Returns {key: {value: (KL, t)}}."""
    tried = {key: dict.fromkeys(values) for key in jobs}
    while new := [(key, value) for key, scores in tried.items()
                  for value, score in scores.items() if score is None]:
        run([jobs[key] | {name: value, "seed": seed} for seed in args.tuning
             for key, value in new], args, name)
        for key, value in new:
            tried[key][value] = best(jobs[key] | {name: value}, args)
        for scores in tried.values():
            if (further := beyond_the_edge(scores, limits)) is not None:
                scores[further] = None
    return tried


def beyond_the_edge(scores, limits, factor=4):
    """The next value to try if the best one so far is the least or the largest; else None.

    >>> beyond_the_edge({1.0: (0.2, 1), 4.0: (0.1, 1)}, (0.5, 20.0))
    16.0
    >>> beyond_the_edge({1.0: (0.3, 1), 4.0: (0.2, 1), 16.0: (0.25, 1)}, (0.5, 99.0))  # 4 is inside
    """
    chosen, low, high = min(scores, key=scores.get), min(scores), max(scores)
    if chosen == high and high * factor <= limits[1]:
        return high * factor
    if chosen == low and low / factor >= limits[0]:
        return low / factor
    return None


def choose(jobs, name, tried):
    """The jobs with the best value of one setting."""
    return {key: jobs[key] | {name: min(scores, key=scores.get)} for key, scores in tried.items()}


def tune(args):
    """Returns the values tried, {"lr": …, "lam": …}, and {(data, method): (job, stop)}."""
    jobs = {(data, method): Job(args.base | job.settings | some, job.variant)
            for data, some in DATA.items() for method, job in METHODS.items()}
    with_lam = {key: job for key, job in jobs.items() if key[1] in ("SPIN", "DPO")}
    lams = widen(with_lam, "lam", LAMS, LAM_LIMITS, args)
    jobs |= choose(with_lam, "lam", lams)
    one = {key: job | {"iters": 1} for key, job in jobs.items()}
    rates = widen(one, "lr", RATES, RATE_LIMITS, args)
    jobs = choose(jobs, "lr", rates)
    run([job | {"seed": seed} for job in jobs.values() for seed in args.tuning], args, "stop")
    chosen = {}
    for key, job in jobs.items():
        stop = best(job, args)[1]
        chosen[key] = job | {"iters": stop}, stop
    return {"lr": rates, "lam": lams}, chosen


# --- the page ------------------------------------------------------------------------------------

def tuning_table(tried) -> str:
    """KL in the mean over the tuning seeds, and the iteration after which it is least."""
    columns = sorted({value for scores in tried.values() for value in scores})
    rows = []
    for (data, method), scores in tried.items():
        chosen = min(scores, key=scores.get)
        cells = {value: f"{kl:.3f} at {t}" for value, (kl, t) in scores.items()}
        cells[chosen] = f"**{cells[chosen]}**"
        rows.append([f"{method}, {data}", *(cells.get(value, "") for value in columns)])
    return table(["", *(f"{value:g}" for value in columns)], rows)


def methods_table(chosen, data, args) -> str:
    """Each method, tuned and stopped: mean and range over seeds."""
    def cells(job, t):
        return [spread(values(seeds_of(job, args), args.out, key, t, split), form)
                for key, split, form in (("kl", "train", ".3f"), ("kl", "heldout", ".3f"),
                                         ("kl_wrong", "heldout", ".3f"),
                                         ("proportions", "heldout", ".3f"),
                                         ("off_support", "heldout", ".1%"))]
    some = {method: one for (d, method), one in chosen.items() if d == data}
    rows = [["SFT, where all start", "", *cells(some["SPIN"][0], 0)]]
    rows += [[method, job.command(), *cells(job, stop)] for method, (job, stop) in some.items()]
    return table(["method", "command", "KL, train", "KL, held out", "… wrong responses",
                  "… proportions", "off-support, held out"], rows)


def seeds_of(job, args) -> list[Job]:
    """The job with each of the seeds of the results."""
    return [job | {"seed": seed} for seed in args.seeds]


def scarce_table(jobs, args) -> str:
    """λ and iterations on scarce data: what KL is made of, and where the probability is."""
    def cells(some, t):
        held = [values(some, args.out, key, t, "heldout")
                for key in ("kl", "kl_wrong", "proportions")]
        seen, off = (values(some, args.out, key, t) for key in ("seen", "off_support"))
        return [*map(spread, held), *(spread(shares, ".0%") for shares in (
            seen, [1 - a - b for a, b in zip(seen, off)], off))]
    rows = [["SFT", *cells(seeds_of(jobs[min(jobs)], args), 0)]]
    for lam, job in jobs.items():
        some = seeds_of(job, args)
        rows += [[f"λ = {lam:g}, iteration {t}", *cells(some, t)]
                 for t in range(1, len(rows_of(some[0], args.out)))]
    return table(["", "KL, held out", "… wrong responses", "… proportions",
                  "train: in the SFT set", "train: right, not in it", "train: wrong"], rows)


PAGE = """# The study: tables

[README.md](README.md) says what was found. Written by `python tests/study/study.py`: {runs} runs,
{minutes:.0f} minutes of processor time of one core. Machine: {machine}.

![the methods, and λ on scarce data]({picture})

## Methods

Mean and range over seeds {seeds}, which nothing was tuned on; each method stopped after the
iteration that tuning chose. KL is KL(p_data‖p_θ) in nats. Behind the KL on held-out prompts stand
its two parts: what wrong responses add, −log p_θ(right), and what is due to the proportions of the
right ones. Off-support is the probability of wrong responses. A command gives the run with seed 0;
DPO is a function of the study, `dpo_objective` in runs.py.

{methods}## Scarce data: λ and iterations

SPIN with the default settings but for `--sft-samples 2 --lam …`. The last three columns say where
the probability is on train prompts.

{scarce}## Tuning

KL on held-out prompts, in the mean over seeds {tuning}, and after which iteration it is least. Bold
is chosen. λ is chosen first, at the default rate and the best of three iterations (DPO has one);
the rate then, after one iteration.

λ:

{lams}Learning rate, at that λ:

{rates}"""


def write(args, chosen, scarce, tried):
    """The page and the picture."""
    args.picture.write_bytes(draw(chosen, scarce, args))
    methods = "".join(f"{data.capitalize()} data, {count} real responses a prompt:\n\n"
                      f"{methods_table(chosen, data, args)}"
                      for data, count in (("ample", 2048), ("scarce", 2)))
    args.page.write_text(PAGE.format(
        runs=len({job.path(args.out) for job in args.jobs}), minutes=minutes(args.jobs, args.out),
        machine=machine(), picture=os.path.relpath(args.picture, args.page.parent),
        seeds=", ".join(map(str, args.seeds)), tuning=", ".join(map(str, args.tuning)),
        methods=methods, scarce=scarce_table(scarce, args), rates=tuning_table(tried["lr"]),
        lams=tuning_table(tried["lam"])).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {args.page}")


# --- the picture ---------------------------------------------------------------------------------

def draw(chosen, scarce, args) -> bytes:
    """(a), (b) the methods' KL; (c) KL on scarce data, and (d) what it is made of."""
    with own_style(13):
        figure = Figure(figsize=(14, 9.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        for ax, letter, data, count in zip(axes[0], "ab", DATA, ("2048", "two")):
            draw_methods(ax, {m: one for (d, m), one in chosen.items() if d == data}, args)
            ax.set_title(f"({letter}) {data} data: {count} real responses a prompt")
        draw_iterations(axes[1, 0], scarce, {"kl": (HELDOUT, "")}, args)
        axes[1, 0].set_title("(c) SPIN on scarce data: KL on held-out prompts")
        draw_iterations(axes[1, 1], scarce, {"kl_wrong": (LEAKED, "wrong responses, "),
                                             "proportions": (RIGHT, "proportions, ")}, args)
        axes[1, 1].set_title("(d) what that KL is made of")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=80)
    return picture.getvalue()


def draw_methods(ax, some, args):
    """A line for each method: the mean as a dot, the range as a bar."""
    rows = {"SFT, the start": (some["SPIN"][0], 0), **some}
    for split, colour, mark, shift in (("train", TRAIN, "o", -0.12),
                                       ("heldout", HELDOUT, "s", 0.12)):
        for y, (job, stop) in enumerate(rows.values()):
            numbers = values(seeds_of(job, args), args.out, "kl", stop, split)
            ax.plot([min(numbers), max(numbers)], [y + shift] * 2, color=colour, lw=3)
            ax.plot(statistics.mean(numbers), y + shift, mark, color=colour, ms=9)
        ax.plot([], [], mark + "-", color=colour, ms=9, lw=3,
                label="train prompts" if split == "train" else "held-out prompts")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_xlabel("KL(p_data‖p_θ), nats; lower is better")
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.4)
    ax.legend()


def draw_iterations(ax, jobs, parts, args):
    """The mean over seeds at every report, a line style for each λ, a colour for each part."""
    for (lam, job), style in zip(jobs.items(), ("-", "--", ":")):
        rows = [rows_of(seed, args.out, "heldout", last=False) for seed in seeds_of(job, args)]
        rows = [[row for row in some if row["iteration"]] for some in rows]
        start = [rows_of(seed, args.out, "heldout")[0] for seed in seeds_of(job, args)]
        points = [start, *zip(*rows)]
        steps = max(row["step"] for row in rows[0])
        x = [0.0, *(row["iteration"] - 1 + row["step"] / steps for row in rows[0])]
        for key, (colour, label) in parts.items():
            y = [statistics.mean(row[key] for row in point) for point in points]
            ax.plot(x, y, style, color=colour, label=f"{label}λ = {lam:g}")
    ax.set_xlabel("iterations")
    ax.set_ylabel("nats")
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend
    ax.set_xticks(range(int(max(x)) + 1))
    ax.grid(alpha=0.4)
    ax.legend(ncols=len(parts), loc="upper right")


# --- all of it -----------------------------------------------------------------------------------

def main(args):
    args.base, args.tuning, args.seeds, args.jobs = {}, TUNING, SEEDS, []
    args.page = ROOT / "tests" / "study" / "STUDY.md"
    args.picture = ROOT / ".github" / "assets" / "study.png"
    if args.quick:
        args.base, args.tuning, args.seeds = QUICK | {"data": small_world(args.out)}, (10,), (0, 1)
        args.page, args.picture = Path(args.out) / "STUDY.md", Path(args.out) / "study.png"
    tried, chosen = tune(args)
    scarce = {lam: Job(args.base | DATA["scarce"] | {"lam": lam, "reports": 10})
              for lam in SCARCE_LAMS}
    jobs = [job for job, _ in chosen.values()] + list(scarce.values())
    run([job | {"seed": seed} for seed in args.seeds for job in jobs], args, "results")
    write(args, chosen, scarce, tried)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="its numbers mean nothing")
    parser.add_argument("--out", default="out/study/runs", help="folder of the runs")
    main(parser.parse_args())
