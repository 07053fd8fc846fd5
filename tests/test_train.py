"""train.py from end to end, on a world of six prompts: what it promises, what it writes.

The oracle recomputes metrics from the saved weights with `logp_by_hand`, one token at a time.
Objectives, `fit`, `self_play` and the loop of `main` are among the claims.
"""
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import logp_by_hand
from data.run.files import load_policy
from data.run.options import parse_args
from data.tokenizer import frame
from processes import ROOT, rows_of, weights_of, without_figures, write_world
from spin_loss import LOSSES
from train import Config, main, prompt_batches, seed_for

SPLITS = ("train", "heldout")
KEYS = {"event", "method", "iteration", "step", "split", "kl", "tv", "off_support",
        "sampled_wrong", "predicted_kl", "predicted_tv", "loss", "loss_floor", "logp_real",
        "logp_generated", "margin", "nll", "nll_per_token", "families", "seconds"}
SMALL = dict(n_layer=1, n_head=2, n_embd=32, negatives=16, batch_size=64, reports=2,
             block_size=32, device="cpu")
QUICK = SMALL | dict(n_embd=16, negatives=4, batch_size=16, reports=1, sft_steps=4, steps=3,
                     iters=2)


@pytest.fixture(autouse=True, scope="module")
def no_figures():
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, all rows of metrics.jsonl) of two iterations that learn something."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(**SMALL, iters=2, sft_steps=45, steps=80, sft_lr=4e-3,
                    data=write_world(folder), out=str(folder / "out"))
    main(config)
    lines = (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return config, [json.loads(line) for line in lines]


def iteration_rows(rows):
    return [row for row in rows if row["event"] == "iteration"]


def by_hand(config, t, prompt):
    """{response: log p_t(response|prompt)} over the support, in nats."""
    model, encoding, world = load_policy(Path(config.out) / f"iteration_{t}.pt")
    return {y: logp_by_hand(model, *frame(encoding, prompt, y))
            for y in world[prompt]["responses"]}


# ---- The promise, and the files -----------------------------------------------------------------

def test_kl_falls_at_every_iteration(run):
    kl = [row["kl"] for row in iteration_rows(run[1]) if row["split"] == "train"]
    assert kl[0] > 0.4, f"SFT should leave something to do, KL {kl[0]}"
    assert kl[0] > kl[1] > kl[2] and kl[2] < 0.2 * kl[0], kl


def test_metrics_hold_one_row_for_each_iteration_and_split(run):
    config, rows = run
    assert [(r["iteration"], r["split"]) for r in iteration_rows(rows)] == [
        (t, split) for t in range(3) for split in SPLITS]
    for row in rows:
        more = {"shown", "shown_predicted"} if row["split"] == "train" else set()
        assert row.keys() == KEYS | more and row["event"] in ("iteration", "step"), row
        assert row["method"] == "spin" and set(row["families"]) <= {"f", "g"}
        for name in ("predicted_kl", "predicted_tv", "logp_generated", "margin"):
            assert (row[name] is None) == (row["iteration"] == 0), name
    assert [(r["iteration"], r["step"]) for r in rows if r["event"] == "step"] == [
        (t, step) for t, steps in enumerate([(23, 45), (40, 80), (40, 80)])
        for step in steps for _ in SPLITS]


def test_metrics_agree_with_a_recount_from_the_saved_weights(run):
    """KL, off-support mass, and Theorem 5.4's prediction from the policy before, which played."""
    config, rows = run
    world = load_policy(Path(config.out) / "iteration_0.pt")[2]
    for row in iteration_rows(rows):
        prompts, total = [x for x in world if world[x]["split"] == row["split"]], Counter()
        for x in prompts:
            p_data, p = world[x]["responses"], by_hand(config, row["iteration"], x)
            rest = 1 - sum(map(math.exp, p.values()))
            total["kl"] += sum(d * (math.log(d) - p[y]) for y, d in p_data.items())
            total["off_support"] += rest
            if row["iteration"]:
                before = by_hand(config, row["iteration"] - 1, x)
                odds = {y: math.exp(before[y] / 2) * d**0.5 for y, d in p_data.items()}  # λ = 2
                apart = sum(abs(odd / sum(odds.values()) - math.exp(p[y]))
                            for y, odd in odds.items())
                total["predicted_tv"] += (rest + apart) / 2
        for name, value in total.items():
            assert row[name] == pytest.approx(value / len(prompts), abs=1e-4), name


def test_printed_loss_is_never_below_its_floor(run):
    floors = [row["loss"] - row["loss_floor"] for row in run[1]]
    assert len(floors) == 18 and min(floors) > 0, floors
    trained = [row for row in iteration_rows(run[1]) if row["iteration"] and
               row["split"] == "train"]
    assert all(row["loss"] < math.log(2) for row in trained), "training must have helped"


def test_config_json_holds_the_whole_configuration_and_versions(run):
    whole = json.loads((Path(run[0].out) / "config.json").read_text(encoding="utf-8"))
    assert asdict(run[0]).items() <= whole.items()
    assert whole["versions"]["torch"] == torch.__version__
    assert set(whole["versions"]) == {"python", "torch", "tiktoken"}


# ---- Batches and seeds --------------------------------------------------------------------------

def test_no_step_takes_a_prompt_twice_and_all_come_equally_often():
    config = Config(batch_size=32, negatives=8)
    prompts = [3 * p for p in range(10)]
    batches = prompt_batches(prompts, 4000, config, 1)
    assert len(batches) == 4000 and all(len(set(step)) == len(step) == 4 for step in batches)
    counts = Counter(itertools.chain(*batches))  # 1600 each; σ = √(2000 · 0.8 · 0.2) = 18
    assert sorted(counts) == prompts and max(abs(n - 1600) for n in counts.values()) < 90
    assert set(itertools.chain(*prompt_batches(list(range(12)), 3, config, 1))) == set(range(12))
    assert batches[:7] == prompt_batches(prompts, 7, config, 1), "a pass depends on what follows"
    assert [len(step) for step in prompt_batches(prompts, 2, Config(), 1)] == [10, 10]


def test_every_purpose_has_random_numbers_of_its_own():
    """The order of iteration t, and each chunk of the responses to sample in it."""
    purposes = [(seed, t, *rest) for seed in range(3) for t in range(4)
                for rest in ((0,), (1, 0), (1, 64))]
    assert len({seed_for(*purpose) for purpose in purposes}) == len(purposes)
    assert seed_for(0, 1, 2) == seed_for(0, 1, 2)
    config = Config(batch_size=32, negatives=8)
    one, other = (prompt_batches(list(range(10)), 9, config, t) for t in (1, 2))
    assert one != other, "each iteration has an order of its own"


# ---- The switches -------------------------------------------------------------------------------

def weights_after(folder, **change):
    """The weights of p_2 after a very short run."""
    config = Config(**QUICK | {"data": write_world(folder), "out": str(folder / "out")} | change)
    main(config)
    for row in rows_of(config.out):
        assert math.isfinite(row["kl"]) and math.isfinite(row["loss"])
        assert row["loss_floor"] is None or row["loss"] > row["loss_floor"]
        if config.anchor == "sft":
            assert row["predicted_kl"] is None, "the theorem does not speak of this optimum"
    return torch.cat([p.flatten() for p in weights_of(config.out)[2].values()])


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    return weights_after(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("change", [
    *({"loss": loss} for loss in LOSSES if loss != "logistic"), {"lam": 1.0}, {"method": "sft"},
    {"anchor": "none"}, {"anchor": "sft"}, {"anchor_weight": 9.0}, {"shares": "sampled"},
    {"opponent": "sft"}, {"max_grad_norm": 0.01}, {"heldout": 0.4}, {"seed": 1}], ids=str)
def test_every_switch_runs_and_changes_the_result(tmp_path, change, plain_weights):
    difference = (weights_after(tmp_path, **change) - plain_weights).abs().max().item()
    assert difference > 1e-5, "the switch does nothing"


def test_plain_pairs_train_to_their_empirical_distribution(tmp_path):
    pairs = [{"prompt": "a", "response": y} for y in "xxxz"] + [{"prompt": "b", "response": "z"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    config = Config(**SMALL, iters=1, sft_steps=80, steps=60, data=str(path),
                    out=str(tmp_path / "out"))
    main(config)
    assert {row["split"] for row in rows_of(config.out)} == {"train"}
    assert all(row["loss_floor"] is None for row in rows_of(config.out)), "p_data is not known"
    p = by_hand(config, 1, "a")
    assert math.exp(p["x"]) == pytest.approx(0.75, abs=0.15)
    assert math.exp(p["z"]) == pytest.approx(0.25, abs=0.15)


# ---- Flags, and main in a notebook --------------------------------------------------------------

def test_every_field_is_a_flag_with_help_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Config, "Help.", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") + " " in text and f.metadata["why"], f.name
    assert parse_args(Config, "", []) == Config()
    config = parse_args(Config, "", ["--lam", "3", "--steps", "7", "--show", "--loss", "hinge"])
    assert config == Config(lam=3.0, steps=7, show=True, loss="hinge")


def test_main_takes_numpys_numbers_and_paths_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_world(tmp_path)
    main(Config(**QUICK | dict(iters=np.int64(0), lam=np.float32(2), lr=1, steps=np.int16(3),
                               data=Path("~/six.jsonl"), out="~/run")))
    whole = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert whole["lam"] == 2.0 and whole["data"] == str(tmp_path / "six.jsonl")
    assert weights_of(tmp_path / "run").keys() == {0}


# ---- Before the work begins ---------------------------------------------------------------------

def test_package_that_is_missing_is_one_line():
    done = subprocess.run([sys.executable, "-c", "import data, no_such_package"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "No module named 'no_such_package'; pip install -r requirements.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_during_the_imports_is_one_line():
    code = "import data, os, signal; os.kill(os.getpid(), signal.SIGINT); import torch"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -2 and done.stderr == "stopped before anything began\n"
