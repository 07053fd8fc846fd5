"""Is SPIN better than more SFT, than DPO? What does each switch do, and each published mistake?

    python tests/study.py             all of it: tests/STUDY.md and .github/assets/study.png
    python tests/study.py --parts switches,fidelity
    python tests/study.py --quick     a tiny world and a few steps: does everything run?

Every run is train.main with other settings, two at a time on one thread each; all that is printed
and drawn comes from the runs' metrics.jsonl. A run that is complete is not repeated, so an
interrupted study goes on where it was. Runs of one seed and one SFT set share their SFT model.

Parts: grid (learning rates, chosen on the KL of held-out prompts), methods (five seeds, two sizes
of the SFT set, each method at its best rate), scarce (SPIN and more SFT on the small set, rates
side by side), switches, fidelity (mistakes of published code).
Reading order: what is run → `work`, one run → `run_all` → the parts → `main`. Beside it:
study_faults.py, the mistakes; study_report.py, tables and figure.
"""
import argparse
import contextlib
import json
import multiprocessing
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402  (the lines above make what follows importable)
import torch._dynamo  # noqa: E402, F401  (which AdamW loads: once here instead of in every run)
import train  # noqa: E402
from data.files import save_latest  # noqa: E402
from data.reader import WORLD, InputError  # noqa: E402
import study_report  # noqa: E402
from study_faults import FAULTS  # noqa: E402

# --- what is run: settings that differ from Config's defaults ------------------------------------

METHODS = {"SPIN": {}, "more SFT": {"method": "sft"}, "DPO": {"method": "dpo", "opponent": "sft"},
           "SPACE": {"loss": "space", "anchor": "none"}, "SPIN, no anchor": {"anchor": "none"}}
REGIMES = {"ample": {}, "scarce": {"sft_samples": 2}}  # responses a prompt in the SFT set: 128, 2
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SCARCE_RATES = RATES[3:6]
GRID_SEED = 10  # which no other part uses
SEEDS = range(5)
ARMS = {"SPIN": ({"lam": 1.0},),  # what else a method may choose, at every other rate
        "DPO": ({"anchor": "none"}, {"lam": 0.5}, {"lam": 8.0})}
SWITCHES = [{}, {"opponent": "sft"}, {"history": 1}, {"anchor": "none"},
            {"anchor": "sft", "anchor_weight": 0.2}, {"loss": "hinge"}, {"loss": "exponential"},
            {"loss": "correlation"}, {"loss": "space"}, {"lam": 0.4}, {"lam": 1.0}, {"lam": 5.0},
            {"negatives": 8, "batch_size": 256}]  # still 32 prompts a step
QUICK = dict(n_layer=1, n_head=2, n_embd=32, negatives=4, batch_size=24, iters=2, sft_steps=8,
             steps=4, warmup=2)

# --- one run, in a process of its own ------------------------------------------------------------

def folder(out, settings, fault=None) -> Path:
    """Where a run lives: what it changes is its name, so that no run is made twice."""
    changed = [f"{k}-{v}" for k, v in sorted(settings.items())
               if k != "data" and v != getattr(train.Config, k)]
    return Path(out) / ("_".join(changed + ([fault] if fault else [])) or "default")


def start_of(settings) -> dict:
    """The settings of the SFT run that a run starts from."""
    return {k: v for k, v in settings.items() if k in ("seed", "sft_samples", "data", *QUICK)
            and k not in ("negatives", "batch_size")} | {"iters": 0}


def complete(path) -> bool:
    """Whether the run reached its end, or was given up."""
    return (path / "done").exists()


def on_its_data_alone(objective):
    """`sft_objective` without the answers that are not in the SFT set: their weight is 0."""
    def wrapped(model, batch, config):
        kept_N = batch.real_N > 0
        return objective(model, replace(batch, **{
            name: value[kept_N] for name, value in vars(batch).items()
            if name.endswith(("_N", "_NS"))}), config)
    return wrapped


def work(job):
    """Train one run; what it prints goes to its folder. Returns (folder, what went wrong)."""
    out, settings, fault = job
    path, start, wrong = folder(*job), folder(out, start_of(settings)), ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    train.draw_gif = train.draw_convergence = lambda out: None  # a figure a run costs seconds
    if settings.get("method") == "sft":  # (not for SFT itself: its rounding starts every run)
        train.sft_objective = on_its_data_alone(train.sft_objective)
    config = train.Config(**settings, out=str(path), reports=4, device="cpu", overwrite=True)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "log.txt", "w") as log, contextlib.redirect_stdout(log):
        try:
            if start != path:  # go on from the SFT model, as --resume does
                world, _ = train.prepare(config)
                for name in ("iteration_0.pt", "metrics.jsonl"):
                    shutil.copy(start / name, path)
                save_latest(config, world, {"iteration": 1, "seconds": 0.0})
                config = replace(config, overwrite=False, resume=True)
            if fault:
                FAULTS[fault](config)
            train.main(config)
        except InputError as error:  # a loss that is not finite: a result, and it is reported
            wrong = str(error)
    (path / "done").write_text(json.dumps({"wrong": wrong, "cpu": time.process_time()}))
    return path, wrong


def run_all(jobs, out, what, workers):
    """Do the jobs that are not complete, `workers` at a time; a line each, with the time left."""
    jobs = [job for job in {str(folder(*job)): job for job in jobs}.values()
            if not complete(folder(*job))]
    if not jobs:
        return
    began = time.time()
    # A process a run: what a fault changed, and what torch remembers, ends with it.
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        for i, (path, wrong) in enumerate(pool.imap_unordered(work, jobs, chunksize=1), 1):
            left = (time.time() - began) / i * (len(jobs) - i) / 60
            note = f" stopped: {wrong}" if wrong else ""
            print(f"{what} {i}/{len(jobs)}  {left:4.1f} min left  {path.name}{note}", flush=True)


# --- the parts -----------------------------------------------------------------------------------

def with_starts(jobs, args, what):
    """The SFT models that the jobs start from, then the jobs."""
    starts = [(args.out, start_of(settings), None) for _, settings, _ in jobs]
    run_all(starts, args.out, "SFT starts", args.workers)
    run_all(jobs, args.out, what, args.workers)


def held_out(out, settings) -> float:
    """The least KL on held-out prompts after any iteration of a run that reached its end.

    Not the last one: where data are scarce every method should stop early, and this allows it.
    """
    last = settings.get("iters", train.Config.iters)
    rows = study_report.rows_of(folder(out, settings), "iteration", "heldout")
    after = [row["kl"] for row in rows if row["iteration"]]
    return min(after) if len(after) == last else float("inf")


def grid(args, base):
    """Every method at every rate; returns all tries and the best, {regime: {method: …}}."""
    tries = {regime: {method: [
        base | change | {"seed": GRID_SEED} | switch | arm | {"lr": lr}
        for arm in ({}, *ARMS.get(method, ())) for lr in (RATES[1::2] if arm else RATES)]
        for method, switch in METHODS.items()} for regime, change in REGIMES.items()}
    with_starts([(args.out, s, None) for found in tries.values() for runs in found.values()
                 for s in runs], args, "grid")
    best = {regime: {method: min(runs, key=partial(held_out, args.out))
                     for method, runs in found.items()} for regime, found in tries.items()}
    return tries, best


def methods(args, best):
    """{regime: {method: [settings, one a seed]}}, run."""
    runs = {regime: {method: [settings | {"seed": seed} for seed in SEEDS]
                     for method, settings in found.items()} for regime, found in best.items()}
    with_starts([(args.out, tries[i], None) for i in range(len(SEEDS)) for found in runs.values()
                 for tries in found.values()], args, "methods")  # seed by seed
    return runs


def scarce(args, base):
    """SPIN and more SFT with little data, each at several rates on all seeds: nothing chosen."""
    runs = {method: {lr: [base | REGIMES["scarce"] | {"seed": seed} | METHODS[method] | {"lr": lr}
                          for seed in SEEDS] for lr in SCARCE_RATES}
            for method in ("SPIN", "more SFT")}
    with_starts([(args.out, tries[i], None) for i in range(len(SEEDS))
                 for by_rate in runs.values() for tries in by_rate.values()], args, "scarce")
    return runs


def main(args):
    base = QUICK | {"data": tiny_world(args.out)} if args.quick else {}
    if not set(args.parts.split(",")) <= set(PARTS):
        raise SystemExit(f"study.py: --parts {args.parts}: use some of {','.join(PARTS)}")
    found = {}
    parts, began = args.parts.split(","), time.time()
    if "switches" in parts:
        found["switches"] = [(args.out, base | {"seed": 0} | s, None) for s in SWITCHES]
    if "fidelity" in parts:
        found["fidelity"] = [(args.out, base | {"seed": 0}, fault) for fault in (None, *FAULTS)]
    for part, jobs in found.items():
        with_starts(jobs, args, part)
    if "grid" in parts or "methods" in parts:
        found["grid"], best = grid(args, base)
    if "methods" in parts:
        found["methods"] = methods(args, best)
    if "scarce" in parts:
        found["scarce"] = scarce(args, base)
    cpu = sum(json.loads(done.read_text())["cpu"] for done in Path(args.out).glob("*/done"))
    study_report.write(args, found, time.time() - began, partial(folder, args.out), cpu)


def tiny_world(out) -> str:
    """Every eighth row of the world, both splits among them."""
    path = Path(out) / "tiny.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(WORLD.read_text().splitlines(keepends=True)[::8]))
    return str(path)


PARTS = ("grid", "methods", "scarce", "switches", "fidelity")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pool ends its workers
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which ones, by commas")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures mean "
                        "nothing")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--out", default="out/study", help="folder of the runs")
    main(parser.parse_args())
