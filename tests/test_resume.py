"""Nothing lost: killed anywhere, a run goes on to the very bits of one that nobody disturbed.

And nothing of anybody else's touched: a run writes its own files, in a folder of its own.
"""
import os
import random
import shutil
import signal
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from data.run.files import load, save
from data.run.options import parse_args
from data.tokenizer import RANK_FILE
from processes import (SMALL, Script, assert_same_run, here, refused, rows_of, script, weights_of,
                       without_figures, write_world)
from train import Config, main


@pytest.fixture(autouse=True, scope="module")
def no_figures():
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(flags, --out) of a run of two iterations that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*SMALL, "--data", write_world(folder)]
    main(parse_args(Config, "", [*flags, "--out", str(folder / "out")]))
    return flags, folder / "out"


class Cut(BaseException):
    """The power goes out: no handler of an error runs."""


def cut_at(patch, name, when, at=1):
    """Stop at the at-th time that file `name` is replaced, or when a function `name` is called.

    when: "half" of the new file is written, "before" the old one is replaced, or "after" that;
    "torn" is "before", and of metrics.jsonl, which is appended to, the end is missing.
    """
    replace, calls = os.replace, count(1)

    def replace_or_stop(part, path):
        stops = Path(path).name == name and next(calls) == at
        if stops and when == "half":
            os.truncate(part, os.path.getsize(part) // 2)
        if stops and when == "torn":
            metrics = Path(path).with_name("metrics.jsonl")
            os.truncate(metrics, os.path.getsize(metrics) - 20)
        if not stops or when == "after":
            replace(part, path)
        if stops:
            raise Cut

    def stop(*args, **how):
        raise Cut
    if when == "call":
        patch.setattr({"generate": "train", "evaluate": "data.run.folder"}[name] + "." + name, stop)
    else:
        patch.setattr(os, "replace", replace_or_stop)


def cut_run(args, *where):
    """A run that ends where `cut_at` says, and must not end before."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, *where)
        main(parse_args(Config, "", args))


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    """--out of the same run, cut in iteration 1 after its first report, of two."""
    out = tmp_path_factory.mktemp("half") / "out"
    cut_run([*whole[0], "--out", str(out)], "latest.pt", "after", 3)
    return out


def copy(whole, tmp_path, run=None):
    """A run in a folder of its own: (flags with --out, --out)."""
    shutil.copytree(run or whole[1], tmp_path / "out")
    return [*whole[0], "--out", str(tmp_path / "out")], tmp_path / "out"


def content_of(folder) -> dict:
    """{name: bytes} of all that lies in a folder; a folder in it has None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in Path(folder).rglob("*")}


# ---- Kill it anywhere ---------------------------------------------------------------------------

def go_on(out) -> list:
    """The flag that goes on with what a killed run left; it may have had no time for a file."""
    return ["--resume"] if (out / "config.json").exists() else []


def test_run_killed_at_random_moments_equals_the_undisturbed_run(whole, tmp_path):
    """kill -9. Its files alone take it 1.2 s, since each takes 0.08 s; it lives for 4 × 0.2 s."""
    rng, out = random.Random(0), tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    for _ in range(4):
        running = Script(tmp_path, [*flags, *go_on(out)], hook=("quick", 0.08))
        running.wait_for("parameters")
        time.sleep(rng.uniform(0, 0.2))
        running.signal(signal.SIGKILL)
        status, _, err = running.wait()
        assert status == -signal.SIGKILL, f"it ended before it was killed: {status} {err}"
    main(parse_args(Config, "", [*flags, *go_on(out)]))
    assert_same_run(out, whole[1])


def test_run_cut_at_each_of_its_files_in_turn_equals_the_undisturbed_run(whole, tmp_path):
    """Each attempt goes on with what the one before has left, and is cut a little later."""
    out = tmp_path / "out"
    twice, report = ("half", "after"), ("half", "before", "torn", "after")
    order = [("config.json", twice), ("metrics.jsonl", twice), ("latest.pt", report),
             ("iteration_0.pt", twice), ("convergence.png", twice), ("latest.pt", report),
             ("generate", ["call"]), ("evaluate", ["call"]), ("config.json", twice),
             ("metrics.jsonl", twice), ("latest.pt", report), ("iteration_1.pt", twice),
             ("latest.pt", report), ("latest.pt", report), ("iteration_2.pt", twice),
             ("convergence.gif", twice)]
    cuts = [(name, when) for name, some in order for when in some]
    for cut in cuts:
        cut_run([*whole[0], "--out", str(out), *go_on(out)], *cut)
    main(parse_args(Config, "", [*whole[0], "--out", str(out), "--resume"]))
    assert_same_run(out, whole[1])


@pytest.mark.parametrize("cut", [("config.json", "half"), ("metrics.jsonl", "half"),
                                 ("latest.pt", "half")], ids=lambda cut: cut[0])
def test_run_cut_as_it_overwrites_can_be_started_again(whole, tmp_path, cut):
    flags, out = copy(whole, tmp_path)
    (out / "my notes.txt").write_text("mine", encoding="utf-8")
    cut_run([*flags, "--overwrite"], *cut)
    main(parse_args(Config, "", [*flags, "--overwrite"]))
    (out / "my notes.txt").unlink()
    assert_same_run(out, whole[1])


def test_slow_run_is_saved_between_its_reports(whole, tmp_path, monkeypatch, capsys):
    out, seconds = tmp_path / "out", count(step=31)
    with monkeypatch.context() as slow:
        slow.setattr("data.run.folder.time.monotonic", lambda: next(seconds))
        cut_run([*whole[0], "--out", str(out)], "latest.pt", "after", 3)
    assert load(out / "latest.pt")["step"] == 3, "no report is due there"
    assert "SFT, step   3/12" in capsys.readouterr().out
    main(parse_args(Config, "", [*whole[0], "--out", str(out), "--resume"]))
    assert_same_run(out, whole[1])


def test_ctrl_c_says_how_to_go_on(whole, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    running = Script(tmp_path, flags, hook=("quick", 0.25))
    running.wait_for("iteration 1")
    running.signal(signal.SIGINT)
    status, _, err = running.wait()
    assert (status, err) == (130, "train.py: stopped; go on with --resume and the same --out\n")
    status, text, err = here(capsys, ["--out", str(out), "--resume"])
    assert (status, err) == (0, "") and "Going on in iteration 1" in text
    assert_same_run(out, whole[1])


def test_full_disk_leaves_the_checkpoint_before(whole, tmp_path):
    """The limit lets SFT's policy through; a learner, with its optimiser, is larger."""
    out = tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    limit = (whole[1] / "iteration_0.pt").stat().st_size + 10_000
    status, _, err = script(tmp_path, flags, hook=("small_files", limit))
    assert status == 2 and err.count("\n") == 1, err
    assert "latest.pt" in err and "make room" in err
    assert not list(out.glob("tmp.*"))
    main(parse_args(Config, "", [*flags, *go_on(out)]))
    assert_same_run(out, whole[1])


# ---- Which flags may differ ---------------------------------------------------------------------

@pytest.mark.parametrize("flag, value", [
    ("--lam", "3.0"), ("--seed", "1"), ("--anchor", "none"), ("--steps", "11"), ("--n-embd", "32"),
    ("--logprob", "fused"), ("--shares", "sampled"), ("--heldout", "0.3"), ("--loss", "hinge")])
def test_flag_that_changes_the_numbers_is_refused_by_name(whole, tmp_path, capsys, flag, value):
    flags, out = copy(whole, tmp_path)
    before = content_of(out)
    refused(capsys, [*flags, flag, value, "--resume"], f"{flag} {value}", "was started with",
            "nothing is lost")
    assert content_of(out) == before


def test_other_reports_and_device_go_on_to_the_same_weights(whole, half, tmp_path, capsys):
    flags, out = copy(whole, tmp_path, half)
    status, _, err = here(capsys, [*flags, "--reports", "5", "--device", "auto", "--resume"])
    assert (status, err) == (0, "")
    for t, weights in weights_of(whole[1]).items():
        for name, p in weights_of(out)[t].items():
            assert torch.equal(p, weights[name])
    assert [row for row in rows_of(out) if row["event"] == "iteration"] == [
        row for row in rows_of(whole[1]) if row["event"] == "iteration"]


def test_changed_data_or_tokens_are_refused(whole, tmp_path, capsys):
    flags, _ = copy(whole, tmp_path)
    path = Path(write_world(tmp_path, "other.jsonl"))
    text = path.read_text(encoding="utf-8")
    for old, new in (("0.75", "0.7500001"), ("a cat", "a cut"), ('"g"', '"h"'), ("a pet", "pets"),
                     ('"split": "heldout"', '"split": "train"')):
        changed = text.replace(old, new)
        assert changed != text
        path.write_text(changed, encoding="utf-8")
        refused(capsys, [*flags, "--data", str(path), "--resume"], "--data", "other content")
    lines = RANK_FILE.read_text(encoding="utf-8").splitlines()
    (tmp_path / "my.tiktoken").write_text("\n".join(lines[:-1]), encoding="utf-8")
    refused(capsys, [*flags, "--encoding", str(tmp_path / "my.tiktoken"), "--resume"],
            "--encoding", "other content")


def test_the_same_rows_in_another_file_are_no_change(whole, tmp_path, capsys):
    flags, out = copy(whole, tmp_path)
    status, text, _ = here(capsys, [*flags, "--data", write_world(tmp_path, "other.jsonl"),
                                    "--resume"])
    assert status == 0 and "is complete" in text
    assert_same_run(out, whole[1])


@pytest.mark.parametrize("opponent", ["previous", "sft"])
def test_more_iterations_extend_a_run_as_if_it_had_been_longer(whole, tmp_path, capsys, opponent):
    flags = [*whole[0], "--opponent", opponent, "--out"]
    assert here(capsys, [*flags, str(tmp_path / "out"), "--iters", "1"])[0] == 0
    assert here(capsys, [*flags, str(tmp_path / "out"), "--iters", "2", "--resume"])[0] == 0
    longer = whole[1]
    if opponent == "sft":
        longer = tmp_path / "longer"
        assert here(capsys, [*flags, str(longer)])[0] == 0
    assert_same_run(tmp_path / "out", longer)


# ---- Whose files are touched --------------------------------------------------------------------

def test_folder_that_holds_files_but_no_run_is_refused_and_left_alone(whole, tmp_path, capsys,
                                                                      monkeypatch):
    """Even if they have a run's names, and even the data file itself."""
    for name, text in (("notes.txt", "mine"), ("latest.pt", "mine"), ("config.json", "{}"),
                       ("config.json", "[1]"), ("config.json", '{"model_type": "gpt2"}'),
                       ("config.json", "mine")):
        out = tmp_path / f"out{name}{len(text)}"
        out.mkdir()
        (out / name).write_text(text, encoding="utf-8")
        monkeypatch.chdir(out)
        data = write_world(out, "metrics.jsonl")
        before = content_of(out)
        for where in (str(out), "."):
            for more in ([], ["--overwrite"], ["--resume"]):
                refused(capsys, [*whole[0], "--data", data, "--out", where, *more],
                        "none is a run's config.json")
        assert content_of(out) == before


def test_existing_run_is_refused_and_overwrite_removes_what_a_run_writes_and_no_more(
        whole, tmp_path, capsys):
    flags, out = copy(whole, tmp_path)
    (out / "subfolder").mkdir()
    mine = ["my.png", "iteration_best.pt", "tmp.notes", "world.jsonl", "subfolder/latest.pt"]
    for name in mine:
        (out / name).write_text("mine", encoding="utf-8")
    before = content_of(out)
    refused(capsys, flags, "holds a run already", "--resume", "--overwrite")
    refused(capsys, [*flags, "--resume", "--overwrite"], "give one")
    assert content_of(out) == before
    assert here(capsys, [*flags, "--resume"])[0] == 0
    assert here(capsys, [*flags, "--iters", "0", "--overwrite"])[0] == 0
    assert set(content_of(out)) == {
        *mine, "subfolder", "config.json", "metrics.jsonl", "latest.pt", "iteration_0.pt",
        "convergence.png", "convergence.gif"}, "the earlier run's iterations are gone"
    assert all((out / name).read_text(encoding="utf-8") == "mine" for name in mine)
    assert {row["iteration"] for row in rows_of(out)} == {0}


def test_folder_that_holds_only_folders_is_taken(tmp_path, capsys, monkeypatch):
    """python train.py after python train.py --out out/leak."""
    without_figures(monkeypatch)
    (tmp_path / "out" / "leak").mkdir(parents=True)
    (tmp_path / "out" / "leak" / "mine.txt").write_text("mine", encoding="utf-8")
    flags = [*SMALL, "--iters", "0", "--data", write_world(tmp_path)]
    main(parse_args(Config, "", [*flags, "--out", str(tmp_path / "out")]))
    assert {"iteration_0.pt", "leak/mine.txt"} <= set(content_of(tmp_path / "out"))


def test_resume_without_latest_pt_starts_anew_or_is_refused_but_loses_no_policy(
        whole, tmp_path, capsys):
    refused(capsys, [*whole[0], "--out", str(tmp_path / "otu"), "--resume"], "otu")
    assert not (tmp_path / "otu").exists(), "a misspelt name leaves a folder"
    flags, out = copy(whole, tmp_path)
    (out / "latest.pt").unlink()
    before = content_of(out)
    refused(capsys, flags, "holds a run already", "--overwrite")
    refused(capsys, [*flags, "--resume"], "latest.pt", "--overwrite")
    assert content_of(out) == before, "the policies of a finished run are gone"


# ---- Torn and forged files ----------------------------------------------------------------------

class Code:
    """A pickle that makes a folder as it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damage(path, how):
    """Replace a file of torch.save by something else."""
    data, content = path.read_bytes(), load(path)
    plain = {"truncated": data[:len(data) // 2], "empty": b"", "text": b"{}\n",
             "garbage": random.Random(0).randbytes(5000)}
    if how in plain:
        path.write_bytes(plain[how])
    elif how == "code":
        key = "learner" if "learner" in content else "model"
        save(path, content | {key: Code(str(path.parent / "ran"))})
    elif how == "other shapes":
        weights = content["learner"][0] if "learner" in content else content["model"]
        weights["wte.weight"] = torch.zeros(512, 8)
        save(path, content)
    else:
        save(path, {"other": 1})


DAMAGES = ("truncated", "empty", "text", "garbage", "code", "other shapes", "other keys")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_file_is_refused_in_one_line_and_runs_no_code(whole, half, tmp_path, capsys, how):
    flags, out = copy(whole, tmp_path, half)
    policy, latest = out / "iteration_0.pt", out / "latest.pt"
    right = latest.read_bytes()
    damage(latest, how)
    refused(capsys, [*flags, "--resume"], "latest.pt")
    latest.write_bytes(right)
    damage(policy, how)
    refused(capsys, ["--out", str(out), "--samples", "2"], "iteration_0.pt", name="sample.py")
    refused(capsys, [*flags, "--resume"], "iteration_0.pt")
    assert not (out / "ran").exists(), "it ran code"
