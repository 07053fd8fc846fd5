"""What each mistake that published SPIN and DPO code makes does to a run, one at a time.

    python tests/study/mistakes.py                  seed 0; writes MISTAKES.md
    python tests/study/mistakes.py --seeds 0 1 2    means over these seeds

The mistakes are those that tests/classroom/mistakes.toml calls published. Each is made in a copy of
the repository, and train.py runs there. A mistake may spoil the metrics too, so KL and off-support
are measured here, on the saved policies, by the right code. A run that is complete in --out is not
repeated.

Reading order: `mistakes`, `rows` → `train_with`, `measured`: one run → `line`, `main`: the page.
"""
import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train  # noqa: E402  (the line above makes it importable)
from bench.measure import machine  # noqa: E402
from classroom.workspace import catalogue, with_mistake  # noqa: E402
from data.metrics import evaluate  # noqa: E402
from data.responses import sft_responses  # noqa: E402
from data.run.files import load_policy  # noqa: E402
from data.run.options import flag_of, prepare  # noqa: E402
from study.runs import spread, table  # noqa: E402

FLAGS, PAGE = {"iters": 3, "device": "cpu"}, ROOT / "tests" / "study" / "MISTAKES.md"
NOT_CALLED = ("spin_loss.py sequence_logps", "sample.py ask")  # by a run of train.py
RIGHT = ("", {"published": "none: the code as it is", "old": "", "new": ""})
SAMPLED = {"shares": "sampled"}  # with known weights it matters little how responses are drawn


def mistakes() -> list[tuple[str, dict]]:
    """("file function", an entry of mistakes.toml) for each published mistake that a run meets."""
    return [(place, wrong) for place, entry in catalogue().items() if place not in NOT_CALLED
            for wrong in entry["wrong"] if "published" in wrong]


def rows() -> list[tuple[str, dict, dict]]:
    """(place, entry, flags) of each row: the default flags, then SAMPLED where it matters."""
    plain = [RIGHT, *mistakes()]
    drawn = [one for one in plain if one is RIGHT or "drawn greedily" in one[1]["published"]]
    return [(*one, {}) for one in plain] + [(*one, SAMPLED) for one in drawn]


# --- one run -------------------------------------------------------------------------------------

def train_with(place, wrong, flags, folder) -> dict:
    """Run train.py with a mistake; returns its own metrics, and what its policies are."""
    copy, out, began = folder / "copy", folder / "out", time.monotonic()
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("tests", "out", ".*", "__pycache__"))
    file, _, function = place.partition(" ")
    if file:
        text = with_mistake((copy / file).read_text("utf-8"), function, wrong)
        (copy / file).write_text(text, encoding="utf-8")
    words = [f"{flag_of(name)}={value}" for name, value in flags.items()]
    subprocess.run([sys.executable, "train.py", f"--out={out}", *words], cwd=copy, check=True,
                   stdout=subprocess.DEVNULL)
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    own = [{name: row[name] for name in ("kl", "loss", "loss_floor")}
           for row in map(json.loads, lines)
           if row["event"] == "iteration" and row["split"] == "train"]
    return {"own": own, "true": measured(out, len(own), flags),
            "seconds": time.monotonic() - began}


def measured(out, count, flags) -> list[dict]:
    """KL and off-support of p_0, p_1, … on train prompts, by the code without a mistake."""
    config = train.Config(**flags)
    world, _ = prepare(config)
    policies = [load_policy(out / f"iteration_{t}.pt")[0] for t in range(count)]
    found = [evaluate(policy, sft_responses(world), world, config, 0) for policy in policies]
    return [{name: one["train"][name] for name in ("kl", "off_support")} for one in found]


# --- the page ------------------------------------------------------------------------------------

HEAD = ["mistake", "in", "KL: SFT → 1 → 2 → 3", "KL at the end, as the run prints it",
        "off-support", "loss (floor) after 1", "loss (floor) after 3"]
ABOUT = """Written by `python tests/study/mistakes.py`, which runs `python train.py --iters 3` with
one mistake at a time: {runs} runs, {minutes:.0f} minutes in all. Machine: {cores} cores of an
{machine}, Python {python}; other programs shared it. Seeds: {seeds}. KL is KL(p_data‖p_t) in nats,
off-support the probability of wrong responses, both on train prompts at the end of an iteration,
and measured on the saved policies by the right code. The other columns are what somebody sees who
makes the mistake: it may spoil the metrics too, and the floor. Where the loss is right, the floor
is the least value it can take, and it rises to log 2 = 0.6931 as the opponent gets better."""
LEARNED = """**The loss shows few of them.** It stays at log 2 where both sides of a pair are
the same (same labels, inverted mask), and far above its floor where prompt tokens are scored. A
mean over tokens, or no shift, lets SFT's loss fall below the entropy of p_data, so that the KL
which the run prints is negative: no right code does that. With the sign flipped the loss reaches
its floor, and both fall where they should rise to log 2; with a frozen opponent they stay where
they were.

**Some leave the loss near its floor, and the model is bad.** Another prompt at generation, or
another model's log-probs: KL stops several times too high. Without END, or with END unscored, the
KL that the run prints is small too, and its responses never end: look at samples.

**Some do not show here.** Truncated responses are rare in this world, and what follows the first
END is learned at once, so a second END, or END as padding, costs next to nothing. Greedy or top-p
responses do no harm, because right responses are weighed by p_t itself, whatever was sampled
(`known_shares`); without these weights, in the last three rows, they ruin the run. Responses of
the live player, with its log-probs, even bring KL lower: three iterations become 75 short ones, at
25 times as many samples, and the loss stays near log 2. From one seed, a difference of ten or
twenty percent says nothing.

A run does not call `sequence_logps`, the definition, nor `ask` of sample.py: the catalogue has
mistakes there as well, which only tests meet. Padding itself cannot be scored in a run, for `grow`
lists the steps of responses alone; its row is that of responses padded with END before."""


def title(wrong, flags) -> str:
    name = ": ".join(filter(None, [wrong["published"], wrong.get("here")]))
    return name + "".join(f"; `{flag_of(flag)} {value}`" for flag, value in flags.items())


def line(place, wrong, flags, runs) -> list[str]:
    """A line of the table: means over seeds, and the range where there are several."""
    mean = lambda whose, name, t, form: spread([run[whose][t][name] for run in runs], form)
    last = len(runs[0]["true"]) - 1
    losses = [f"{mean('own', 'loss', t, '.4f')} ({mean('own', 'loss_floor', t, '.4f')})"
              for t in (1, last)]
    return [title(wrong, flags), f"`{place.split()[-1]}`" if place else "",
            " → ".join(mean("true", "kl", t, ".3g") for t in range(last + 1)),
            mean("own", "kl", last, ".3g"), mean("true", "off_support", last, ".2%"), *losses]


def main(args):
    lines, seconds, out = [], 0, Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, (place, wrong, flags) in enumerate(rows(), 1):
        name, runs = repr((place, wrong["old"], wrong["new"], flags)).encode(), []
        for seed in args.seeds:
            path = out / f"{hashlib.sha256(name).hexdigest()[:12]}_{seed}.json"
            if not path.exists():
                print(f"{i}/{len(rows())}, seed {seed}: {title(wrong, flags)}", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    run = train_with(place, wrong, FLAGS | flags | {"seed": seed}, Path(folder))
                path.write_text(json.dumps(run), encoding="utf-8")
            runs.append(json.loads(path.read_text("utf-8")))
        lines.append(line(place, wrong, flags, runs))
        seconds += sum(run["seconds"] for run in runs)
    about = ABOUT.format(runs=len(lines) * len(args.seeds), minutes=seconds / 60, machine=machine(),
                         cores=os.cpu_count(), python=platform.python_version().rpartition(".")[0],
                         seeds=", ".join(map(str, args.seeds)))
    text = "\n\n".join(textwrap.fill(" ".join(words.split()), 98, break_on_hyphens=False)
                       for words in (about, *LEARNED.split("\n\n")))
    PAGE.write_text(f"# What each published mistake does to a run\n\n{text}\n\n"
                    f"{table(HEAD, lines).rstrip()}\n", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    parser.add_argument("--out", default="out/study/mistakes", help="folder of the runs")
    main(parser.parse_args())
