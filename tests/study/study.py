"""Which method comes nearer to p_data, what does each switch do, and each published mistake?

    python tests/study/study.py             all of it; about 80 minutes on two cores
    python tests/study/study.py --parts mistakes
    python tests/study/study.py --quick     a small world and few steps: does everything run?

Writes STUDY.md and study.png: here and into .github/assets if all of it was run, else into --out
(out/study). Every run is train.main with other settings, one thread each; all figures come from
the runs' metrics.jsonl. A run that is complete is not repeated, so an interrupted study goes on
where it was. Runs of one seed and one SFT set share their SFT model.

tune      For every method, with the mass anchor and without, with much data and with little: the
          rate, then λ or μ where the loss has one, then the iteration to stop after. A range of
          values is widened until the best one lies inside, or at a limit. Best is the least KL on
          held-out prompts in the mean over three seeds, which are used for nothing else.
methods   Each method as it was tuned, over five other seeds.
switches  One change of the default settings each, over three seeds.
mistakes  One mistake of published code each (mistakes.py), over three seeds.

Reading order: what is run → `work`, one run → `run_all` → `tune` → `main`; then report.py.
"""
import argparse
import contextlib
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch._dynamo  # noqa: E402, F401  (Adam loads it: once here instead of in every run)

import train  # noqa: E402  (sys.path makes it importable)
from data.errors import InputError  # noqa: E402
from data.run import checkpoint  # noqa: E402
from data.run.files import load, save  # noqa: E402
from data.world import WORLD  # noqa: E402
from spin_loss import LOSSES  # noqa: E402
from study import report  # noqa: E402
from study.mistakes import MISTAKES  # noqa: E402

# --- what is run: settings that differ from Config's defaults ------------------------------------

NO_ANCHOR = {"anchor": "none"}
SPIN, SPACE, DPO = {}, {"loss": "space"}, {"method": "dpo", "opponent": "sft"}
METHODS = {"SPIN": SPIN, "SPIN, no anchor": SPIN | NO_ANCHOR,
           "SPACE": SPACE, "SPACE, no anchor": SPACE | NO_ANCHOR,
           "DPO": DPO, "DPO, no anchor": DPO | NO_ANCHOR,
           "more SFT": {"method": "sft"}}  # no opponent, so nothing that an anchor could compare
SECOND = {"lam": [name for name in METHODS if "SPIN" in name or "DPO" in name],
          "mu": [name for name in METHODS if "SPACE" in name]}  # a loss has λ or μ, SFT has neither
DATA = {"ample": {}, "scarce": {"sft_samples": 2}}  # responses a prompt in the SFT set
RATES, RATE_LIMITS = (2e-3, 4e-3, 8e-3), (6e-5, 6.5e-2)  # widened by factors of 2
SECONDS = {"lam": (0.5, 2.0, 8.0), "mu": (0.25, 1.0, 4.0)}  # by factors of 4
SECOND_LIMITS = (0.03, 200.0)
SEEDS = {"tune": (10, 11, 12), "methods": (0, 1, 2, 3, 4), "switches": (0, 1, 2),
         "mistakes": (0, 1, 2)}
SWITCHES = [{}, {"opponent": "sft"}, {"history": 1}, {"anchor": "none"},
            {"anchor": "sft", "anchor_weight": 0.2}, {"lam": 0.4}, {"lam": 1.0}, {"lam": 5.0},
            {"negatives": 4, "batch_size": 256},  # as many prompts in a step
            *({"loss": loss} for loss in LOSSES if loss != train.Config.loss)]
QUICK = dict(n_layer=1, n_head=2, n_embd=32, negatives=4, batch_size=24, iters=2, sft_steps=60,
             sft_lr=1e-2, steps=4, warmup=2)
QUICK_SEEDS = {"tune": (10,), "methods": (0, 1), "switches": (0,), "mistakes": (0,)}
PARTS = ("tune", "methods", "switches", "mistakes")


# --- one run, in a process of its own ------------------------------------------------------------

def folder(out, settings, mistake=None) -> Path:
    """Where a run lives: its name is what it changes, so that no run is made twice."""
    changed = [f"{name}-{Path(value).stem if name == 'data' else value}"
               for name, value in sorted(settings.items()) if value != getattr(train.Config, name)]
    return Path(out) / ("_".join(changed + ([mistake] if mistake else [])) or "default")


def start_of(settings) -> dict:
    """The settings of the SFT run that a run starts from."""
    shared = {"seed", "sft_samples", "data", *QUICK} - {"negatives", "batch_size", "steps"}
    return {name: value for name, value in settings.items() if name in shared} | {"iters": 0}


def complete(path) -> bool:
    """Whether the run reached its end, or was given up."""
    return (path / "done").exists()


def go_on_from(start, path, config):
    """Copy an SFT run, so that train.main goes on from it with other settings."""
    shutil.copytree(start, path, dirs_exist_ok=True)
    (path / "done").unlink()
    world, _ = train.prepare(config)
    state = load(path / "latest.pt")
    save(path / "latest.pt", state | {"settings": checkpoint.settings(config, world)})


def work(job):
    """Train one run; what it prints goes to its folder. Returns (folder, what went wrong)."""
    out, settings, mistake = job
    path, start, wrong = folder(*job), folder(out, start_of(settings)), ""
    shutil.rmtree(path, ignore_errors=True)  # of an interrupted study
    checkpoint.draw_gif = checkpoint.draw_convergence = lambda *_: b""  # they cost seconds
    config = train.Config(**settings, out=str(path), reports=4, device="cpu", overwrite=True)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            if start != path:
                config = replace(config, overwrite=False)
                go_on_from(start, path, config)
                config = replace(config, resume=True)
            if mistake:
                MISTAKES[mistake][0](config)
            train.main(config)
        except InputError as error:  # a gradient that is not finite is a result: it is reported
            wrong = str(error)
    done = {"wrong": wrong, "cpu": time.process_time()}
    (path / "done").write_text(json.dumps(done), encoding="utf-8")
    return path, wrong


def run_all(jobs, args, what):
    """Do the jobs that are not complete, some at a time; a line each, with the time left.

    The SFT models that they start from come first.
    """
    starts = [(args.out, start_of(settings), None) for _, settings, _ in jobs]
    for name, some in ((f"SFT for {what}", starts), (what, jobs)):
        some = {folder(*job): job for job in some}
        some = [job for path, job in some.items() if not complete(path)]
        if not some:
            continue
        began = time.time()
        # A process for each run: what a mistake changed, and what torch remembers, ends with it.
        with multiprocessing.get_context("fork").Pool(args.workers, maxtasksperchild=1) as pool:
            for i, (path, wrong) in enumerate(pool.imap_unordered(work, some, chunksize=1), 1):
                left = (time.time() - began) / i * (len(some) - i) / 60
                print(f"{name} {i}/{len(some)}  {left:4.1f} min left  {path.name}"
                      + (f"  stopped: {wrong}" if wrong else ""), flush=True)


# --- tuning --------------------------------------------------------------------------------------

def kls(out, settings) -> list[float]:
    """KL on held-out prompts after each iteration; ∞ where the run had to stop before."""
    last = settings.get("iters", train.Config.iters)
    rows = report.rows_of(folder(out, settings), split="heldout")
    found = [row["kl"] for row in rows if row["iteration"]]
    return found + [float("inf")] * (last - len(found))


def kl_at_start(args, settings) -> float:
    """KL on held-out prompts of the SFT model, where every method starts, in the same mean."""
    paths = [folder(args.out, start_of(settings | {"seed": seed})) for seed in args.seeds["tune"]]
    return statistics.mean(report.values(paths, "kl", "heldout", 0))


def best_stop(args, settings) -> tuple[float, int]:
    """(least KL, after which iteration), of the mean over the tuning seeds."""
    runs = [kls(args.out, settings | {"seed": seed}) for seed in args.seeds["tune"]]
    means = [statistics.mean(values) for values in zip(*runs)]
    return min(means), 1 + means.index(min(means))


def beyond_the_edge(score_of, factor, limits):
    """The next value to try if the best one so far is the least or the largest; else None.

    >>> beyond_the_edge({1.0: 0.3, 2.0: 0.2, 4.0: 0.1}, 2, (0.5, 8.0))
    8.0
    >>> beyond_the_edge({1.0: 0.3, 2.0: 0.2, 4.0: 0.25}, 2, (0.5, 8.0)) is None  # 2 lies inside
    True
    """
    best, low, high = min(score_of, key=score_of.get), min(score_of), max(score_of)
    if best == high and high * factor <= limits[1]:
        return high * factor
    if best == low and low / factor >= limits[0]:
        return low / factor
    return None


def widen(args, what, settings_of, name, values, factor, limits):
    """Try values of one setting for several methods until each method's best lies inside.

    settings_of: {key: settings}. Returns {key: {value: (KL, stop)}}. All methods advance together,
    so that no process waits for another method's turn.
    """
    tried = {key: dict.fromkeys(values) for key in settings_of}
    while any(None in scores.values() for scores in tried.values()):
        new = [(key, value) for key, scores in tried.items()
               for value, score in scores.items() if score is None]
        run_all([(args.out, settings_of[key] | {name: value, "seed": seed}, None)
                 for seed in args.seeds["tune"] for key, value in new], args, what)
        for key, value in new:
            tried[key][value] = best_stop(args, settings_of[key] | {name: value})
        for scores in tried.values():
            further = beyond_the_edge(scores, factor, limits)
            if further is not None:
                scores[further] = None
    return tried


def tune(args, base):
    """Choose one setting after the other.

    Returns ({(data, method): {rate: (KL, stop)}}, {"lam": {…}, "mu": {…}},
    {(data, method): (settings, stop)}).
    """
    chosen = {(data, method): base | DATA[data] | METHODS[method]
              for data in DATA for method in METHODS}
    rates = widen(args, "rates", chosen, "lr", RATES, 2, RATE_LIMITS)
    for key, scores in rates.items():
        chosen[key] = chosen[key] | {"lr": min(scores, key=scores.get)}
    seconds = {}
    # A rate means the same for every λ and μ: train.py scales each loss to SFT's first gradient.
    for name, methods in SECOND.items():
        of = {key: settings for key, settings in chosen.items() if key[1] in methods}
        seconds[name] = widen(args, name, of, name, SECONDS[name], 4, SECOND_LIMITS)
        for key, scores in seconds[name].items():
            chosen[key] = chosen[key] | {name: min(scores, key=scores.get)}
    return rates, seconds, {key: (settings, best_stop(args, settings)[1])
                         for key, settings in chosen.items()}


# --- all of it -----------------------------------------------------------------------------------

def main(args):
    began, parts = time.time(), args.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"study.py: --parts {args.parts}: use some of {','.join(PARTS)}")
    base, found, args.seeds = {}, {}, SEEDS
    if args.quick:
        base, args.seeds = QUICK | {"data": small_world(args.out)}, QUICK_SEEDS
    if "tune" in parts or "methods" in parts:
        found["rates"], found["seconds"], found["chosen"] = tune(args, base)
        found["starts"] = {data: kl_at_start(args, base | some) for data, some in DATA.items()}
    if "methods" in parts:
        jobs = [(args.out, settings | {"seed": seed}, None) for seed in args.seeds["methods"]
                for settings, _ in found["chosen"].values()]
        run_all(jobs, args, "methods")
        found["methods"] = {
            key: ([folder(args.out, settings | {"seed": seed}) for seed in args.seeds["methods"]],
                  settings, stop) for key, (settings, stop) in found["chosen"].items()}
    for part, changes in (("switches", [(change, None) for change in SWITCHES]),
                          ("mistakes", [({}, mistake) for mistake in (None, *MISTAKES)])):
        if part in parts:
            runs = [([(args.out, base | {"seed": seed} | change, mistake)
                      for seed in args.seeds[part]], change, mistake)
                    for change, mistake in changes]
            run_all([job for jobs, _, _ in runs for job in jobs], args, part)
            found[part] = [([folder(*job) for job in jobs], change, mistake)
                           for jobs, change, mistake in runs]
    args.whole = not args.quick and set(parts) == set(PARTS)
    args.page = (ROOT / "tests" / "study" if args.whole else Path(args.out)) / "STUDY.md"
    args.figure = (ROOT / ".github" / "assets" if args.whole else Path(args.out)) / "study.png"
    report.write(args, found, time.time() - began)


def small_world(out) -> str:
    """Every eighth row of the world, both splits among them."""
    path = Path(out) / "small.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = WORLD.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[::8]), encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which ones, by commas")
    parser.add_argument("--quick", action="store_true", help="its figures mean nothing")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--out", default="out/study", help="folder of the runs and the results")
    main(parser.parse_args())
