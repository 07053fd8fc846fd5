"""Nothing lost: killed anywhere, a run goes on to the very bits of one that nobody disturbed.

And nothing of anybody else's touched: a run writes its own files, in a folder that holds no other.
"""
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from data.run.checkpoint import load, save
from data.tokenizer import RANK_FILE
from processes import (SMALL, Script, assert_same_run, here, refused, rows_of, script, weights_of,
                       write_world)

FLAGS = [*SMALL, "--reports", "4"]
OURS = ["config.json", "metrics.jsonl", "latest.pt", "iteration_0.pt", "iteration_2.pt",
        "convergence.png", "convergence.gif", "tmp.config.json", "tmp.latest.pt",
        "tmp.iteration_1.pt", "lock"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(flags, --out) of a run of two iterations that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*FLAGS, "--data", write_world(folder)]
    status, _, err = script(folder, [*flags, "--out", str(folder / "out")])
    assert (status, err) == (0, "")
    return flags, folder / "out"


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    """--out of the same run, killed in iteration 1 after its second report, of four."""
    folder = tmp_path_factory.mktemp("half")
    flags = [*whole[0], "--out", str(folder / "out")]
    assert script(folder, flags, hook=("die_at", "latest.pt", 7, "after"))[0] == -signal.SIGKILL
    return folder / "out"


@pytest.fixture
def no_figures(monkeypatch):
    """For runs in this process: a picture takes longer than all else in so small a run."""
    monkeypatch.setattr("data.run.checkpoint.draw_convergence", lambda *args: b"png")
    monkeypatch.setattr("data.run.checkpoint.draw_gif", lambda *args: b"gif")


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
    """The flag that goes on with what a killed run left; it may have had no time to save."""
    if (out / "latest.pt").exists():
        return ["--resume"]
    return ["--overwrite"] if (out / "config.json").exists() else []


def test_run_killed_at_six_random_moments_equals_the_undisturbed_run(whole, tmp_path):
    """Its files alone take it 2.3 s, since each takes 0.07 s; so it lives for six times 0.35 s."""
    rng, out = random.Random(0), tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    for _ in range(6):
        running = Script(tmp_path, [*flags, *go_on(out)], hook=("quick", 0.07))
        running.wait_for(lambda: "parameters" in running.read(".out"))
        time.sleep(rng.uniform(0, 0.35))
        running.signal(signal.SIGKILL)
        status, _, err = running.wait()
        assert status == -signal.SIGKILL, f"it ended before it was killed: {status} {err}"
    status, _, err = script(tmp_path, [*flags, *go_on(out)])
    assert (status, err) == (0, "")
    assert_same_run(out, whole[1])


@pytest.mark.parametrize("hook", [
    ("die_at", "config.json", 1, "half"), ("die_at", "metrics.jsonl", 1, "before"),
    ("die_at", "latest.pt", 1, "before"), ("die_at", "latest.pt", 4, "half"),
    ("die_at", "latest.pt", 7, "before"), ("die_at", "latest.pt", 9, "after"),
    ("die_at", "iteration_0.pt", 1, "half"), ("die_at", "iteration_1.pt", 1, "after"),
    ("die_at", "convergence.png", 2, "half"), ("die_at", "convergence.gif", 1, "before"),
    ("die_in", "data.run.checkpoint", "append", 6), ("die_in", "sample", "generate", 2),
    ("die_in", "data.metrics", "evaluate", 5),
    ("die_in", "data.run.checkpoint", "draw_convergence", 2)],
    ids=lambda hook: "-".join(map(str, hook)))
def test_run_killed_at_its_weakest_moments_equals_the_undisturbed_run(whole, tmp_path, hook):
    out = tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    assert script(tmp_path, flags, hook=hook)[0] == -signal.SIGKILL
    status, _, err = script(tmp_path, [*flags, *go_on(out)])
    assert (status, err) == (0, "")
    assert_same_run(out, whole[1])


def test_run_killed_as_it_resumes_loses_nothing(whole, half, tmp_path):
    flags, out = copy(whole, tmp_path, half)
    for name in ("config.json", "metrics.jsonl", "latest.pt"):
        for when in ("half", "after"):
            hook = ("die_at", name, 1, when)
            assert script(tmp_path, [*flags, "--resume"], hook=hook)[0] == -signal.SIGKILL
    assert script(tmp_path, [*flags, "--resume"])[0] == 0
    assert_same_run(out, whole[1])


@pytest.mark.parametrize("hook", [("die_at", "config.json", 1, "half"),
                                  ("die_at", "metrics.jsonl", 1, "before"),
                                  ("die_at", "latest.pt", 1, "half")], ids=lambda hook: hook[1])
def test_run_killed_as_it_overwrites_can_be_started_again(whole, tmp_path, hook):
    flags, out = copy(whole, tmp_path)
    assert script(tmp_path, [*flags, "--overwrite"], hook=hook)[0] == -signal.SIGKILL
    assert script(tmp_path, [*flags, "--overwrite"])[0] == 0
    assert_same_run(out, whole[1])


def test_ctrl_c_says_how_to_go_on(whole, tmp_path):
    out = tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    running = Script(tmp_path, flags, hook=("quick", 0.05))
    running.wait_for(lambda: "iteration 1" in running.read(".out"))
    running.signal(signal.SIGINT)
    status, _, err = running.wait()
    assert (status, err) == (130, "train.py: stopped; go on with the same flags and --resume\n")
    status, text, err = script(tmp_path, [*flags, "--resume"])
    assert (status, err) == (0, "") and "Going on in iteration 1" in text
    assert_same_run(out, whole[1])


def test_ctrl_c_before_the_run_begins_promises_nothing(capsys, monkeypatch):
    def stop(config):
        raise KeyboardInterrupt
    monkeypatch.setattr("train.prepare", stop)
    assert here(capsys, [])[::2] == (130, "train.py: stopped\n")


def test_each_report_saves_all_that_the_next_step_needs(half):
    """Killed after report 2 of 4 in iteration 1, which is step 5 of 10."""
    latest = load(half / "latest.pt")
    assert (latest["stage"], latest["step"], latest["rows"]) == (1, 5, len(rows_of(half)))
    assert set(latest["learner"]) == {"player", "averaged", "optimizer", "schedule"}
    assert weights_of(half).keys() == {0}


# ---- Resume is safe -----------------------------------------------------------------------------

@pytest.mark.parametrize("flag, value", [
    ("--lam", "3.0"), ("--seed", "1"), ("--anchor", "none"), ("--steps", "11"), ("--n-embd", "32"),
    ("--reports", "3"), ("--logprob", "fused"), ("--history", "1")])
def test_changed_flag_is_refused_by_name(whole, tmp_path, capsys, flag, value):
    flags, out = copy(whole, tmp_path)
    before = content_of(out)
    refused(capsys, [*flags, flag, value, "--resume"], f"{flag} {value}", "was started with")
    assert content_of(out) == before


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


def test_the_same_rows_elsewhere_and_blank_lines_are_no_change(whole, tmp_path, capsys, no_figures):
    flags, out = copy(whole, tmp_path)
    path = Path(write_world(tmp_path, "other.jsonl"))
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes().replace(b"\n", b"\r\n  \n") + b"\n\n")
    status, text, _ = here(capsys, [*flags, "--data", str(path), "--resume"])
    assert status == 0 and "is complete" in text
    assert_same_run(out, whole[1])


@pytest.mark.parametrize("more", [
    [], ["--opponent", "sft"], ["--history", "1"], ["--average", "0"],
    ["--precision", "bfloat16"]], ids=" ".join)
def test_more_iterations_extend_a_run_as_if_it_had_been_longer(whole, tmp_path, capsys, no_figures,
                                                              more):
    flags, out = [*whole[0], *more, "--out"], tmp_path / "out"
    assert here(capsys, [*flags, str(out), "--iters", "1"])[0] == 0
    shorter = rows_of(out)
    assert here(capsys, [*flags, str(out), "--iters", "3", "--resume"])[0] == 0
    assert here(capsys, [*flags, str(tmp_path / "longer"), "--iters", "3"])[0] == 0
    assert_same_run(out, tmp_path / "longer")
    assert rows_of(out)[:len(shorter)] == shorter


def test_existing_run_is_refused_and_overwrite_replaces_it(whole, tmp_path, capsys, no_figures):
    flags, out = copy(whole, tmp_path)
    before = content_of(out)
    refused(capsys, flags, "holds a run already", "--resume", "--overwrite")
    refused(capsys, [*flags, "--resume", "--overwrite"], "give one")
    assert content_of(out) == before
    assert here(capsys, [*flags, "--iters", "1", "--seed", "1", "--overwrite"])[0] == 0
    assert max(row["iteration"] for row in rows_of(out)) == 1
    assert weights_of(out).keys() == {0, 1}, "a checkpoint of the run that was replaced"


def test_resume_without_a_run_is_refused_and_leaves_no_folder(whole, tmp_path, capsys):
    refused(capsys, [*whole[0], "--out", str(tmp_path / "otu"), "--resume"], "no latest.pt",
            "start without --resume")
    assert not (tmp_path / "otu").exists()


def test_run_that_saved_nothing_is_not_sent_in_circles(whole, tmp_path, capsys):
    """Killed before its first save, it can be started again, and each refusal says so."""
    flags, out = copy(whole, tmp_path)
    (out / "latest.pt").unlink()
    refused(capsys, flags, "holds a run already", "--overwrite")
    refused(capsys, [*flags, "--resume"], "no latest.pt", "--overwrite")


# ---- Whose files are touched --------------------------------------------------------------------

@pytest.mark.parametrize("name, how", [
    *((name, "file") for name in OURS), ("tmp.iteration_0.pt", "folder"), ("lock", "folder"),
    ("latest.pt", "link to a file"), ("tmp.config.json", "link to nothing"),
    ("lock", "link to nothing"), ("metrics.jsonl", "link to nothing")])
def test_foreign_file_under_a_name_of_ours_is_refused(whole, tmp_path, capsys, name, how):
    if "link" in how and os.name == "nt":
        pytest.skip("links need rights on Windows")
    (tmp_path / "out").mkdir()
    path, target = tmp_path / "out" / name, tmp_path / "mine"
    if how == "file":
        path.write_text("mine", encoding="utf-8")
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)
        if how == "link to a file":
            target.write_text("mine", encoding="utf-8")
    before = content_of(tmp_path)
    for more in ([], ["--overwrite"], ["--resume"]):
        line = refused(capsys, [*whole[0], "--out", str(tmp_path / "out"), *more])
        assert name in line or (more == ["--resume"] and "no latest.pt" in line), line
    assert content_of(tmp_path) == before


def test_files_with_other_names_are_left_alone(whole, tmp_path, capsys, no_figures):
    """Not even names like ours: only those that this run writes are its own."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("tmp.notes.txt", "iteration_best.pt", "iteration_99.pt", "tmp.jsonl", "my.png"):
        (out / name).write_text("mine", encoding="utf-8")
    (out / "tmp.cache").mkdir()
    (out / "tmp.cache" / "metrics.jsonl").write_text("mine", encoding="utf-8")
    mine, flags = content_of(out), [*whole[0], "--out", str(out), "--iters"]
    for more in (["1"], ["2", "--resume"], ["0", "--overwrite"]):
        assert here(capsys, [*flags, *more])[0] == 0
        now = content_of(out)
        assert {name: now.get(name) for name in mine} == mine
    assert (out / "iteration_0.pt").exists() and not (out / "iteration_1.pt").exists()


def test_overwrite_removes_only_what_the_earlier_run_wrote(whole, tmp_path, capsys, no_figures):
    flags, out = copy(whole, tmp_path)
    assert here(capsys, [*flags, "--iters", "0", "--overwrite"])[0] == 0
    assert set(content_of(out)) == {"config.json", "metrics.jsonl", "latest.pt", "iteration_0.pt",
                                    "convergence.png", "convergence.gif", "lock"}
    (out / "iteration_2.pt").write_text("mine", encoding="utf-8")  # the earlier run's is gone
    assert here(capsys, [*flags, "--iters", "0", "--overwrite"])[0] == 0
    assert (out / "iteration_2.pt").read_text(encoding="utf-8") == "mine"
    refused(capsys, [*flags, "--overwrite"], "iteration_2.pt is there already")


@pytest.mark.parametrize("files", [["../mine", "mine", "{path}"], "mine", [["mine"]], [None], {},
                                   3], ids=str)
def test_config_that_claims_other_files_is_not_believed(whole, tmp_path, capsys, no_figures, files):
    flags, out = copy(whole, tmp_path)
    for path in (tmp_path / "mine", out / "mine"):
        path.write_text("mine", encoding="utf-8")
    if files and type(files) is list:
        files = [str(out / "mine") if name == "{path}" else name for name in files]
    content = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(content | {"files": files}), encoding="utf-8")
    status, _, err = here(capsys, [*flags, "--iters", "0", "--overwrite"])
    assert (status == 2 and "there already" in err and err.count("\n") == 1) or status == 0, err
    assert (tmp_path / "mine").exists() and (out / "mine").exists()


@pytest.mark.parametrize("name", ["world.jsonl", "tmp.jsonl", "metrics.jsonl", "latest.pt"])
def test_out_that_holds_the_data_file_is_refused(whole, tmp_path, capsys, monkeypatch, name):
    out = tmp_path / "out"
    out.mkdir()
    write_world(out, name)
    before = content_of(tmp_path)
    monkeypatch.chdir(out)
    for where in (str(out), ".", str(out / ".." / "out")):
        for more in ([], ["--overwrite"]):
            refused(capsys, [*FLAGS, "--data", name, "--out", where, *more], "--out")
    assert content_of(tmp_path) == before


def test_a_second_run_is_refused_while_the_first_lives(whole, tmp_path, capsys, no_figures):
    out = tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    first = Script(tmp_path, flags, hook=("quick", 0.2))
    first.wait_for((out / "latest.pt").exists)
    for more in (["--resume"], ["--overwrite", "--seed", "3"]):
        refused(capsys, [*flags, *more], "another run is writing")
    refused(capsys, flags, "holds a run already")
    assert first.process.is_alive(), "it ended before it could be disturbed"
    first.signal(signal.SIGKILL)
    first.wait()
    assert here(capsys, [*flags, "--resume"])[0] == 0, "the lock must die with its process"
    assert_same_run(out, whole[1])


def test_a_refused_run_lets_go_of_its_folder(whole, half, tmp_path, capsys, no_figures):
    """In a notebook main() may be called again after an InputError, whose traceback lives on."""
    import train
    from data.errors import InputError
    from data.run.options import parse_args
    flags, _ = copy(whole, tmp_path, half)
    with pytest.raises(InputError, match="--lam 3.0") as kept:
        train.main(parse_args(train.Config, "", [*flags, "--lam", "3", "--resume"]))
    train.main(parse_args(train.Config, "", [*flags, "--resume"]))
    assert kept.value


# ---- Untrusted files ----------------------------------------------------------------------------

class Code:
    """A pickle that makes a folder as it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damage(path, how):
    """Replace a checkpoint by what no digest can fit."""
    data = path.read_bytes()
    new = {"truncated": data[:len(data) // 2], "empty": b"", "short": b"x",
           "bit-flipped": data[:1000] + bytes([data[1000] ^ 4]) + data[1001:],
           "garbage": random.Random(0).randbytes(5000)}
    if how in new:
        path.write_bytes(new[how])
    else:
        torch.save({"stage": 1}, path)


DAMAGES = ("truncated", "empty", "short", "bit-flipped", "garbage", "plain torch.save")


def set_to(*keys, value):
    """A change of one entry of nested dictionaries."""
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value
    return change


def nan(*keys):
    """A change of one weight to NaN."""
    def change(content):
        for key in keys:
            content = content[key]
        content["ln_f.bias" if "ln_f.bias" in content else "module.ln_f.bias"][3] = float("nan")
    return change


LATEST = {
    "no learner": set_to("learner", value=None),
    "another learner": set_to("learner", value={"player": {}}),
    "a learner of words": set_to("learner", value="word"),
    "other shapes": set_to("learner", "player", "wte.weight", value=torch.zeros(512, 8)),
    "NaN in the player": nan("learner", "player"),
    "NaN in the average": nan("learner", "averaged"),
    "the last step": set_to("step", value=10), "a step beyond the end": set_to("step", value=11),
    "a negative step": set_to("step", value=-1), "a step that is a word": set_to("step", value="5"),
    "half a step": set_to("step", value=4.5),
    "a stage that is a word": set_to("stage", value="1"),
    "a negative stage": set_to("stage", value=-1), "no stage": set_to("stage", value=None),
    "rows that are a word": set_to("rows", value="8"),
    "negative rows": set_to("rows", value=-1), "no time": set_to("seconds", value="long"),
    "no settings": set_to("settings", value=None),
    "empty settings": set_to("settings", value={}),
}


@pytest.mark.parametrize("how", [*DAMAGES, *LATEST, "code", "a list"])
def test_damaged_or_forged_latest_is_refused_in_one_line(whole, half, tmp_path, capsys, how):
    flags, out = copy(whole, tmp_path, half)
    path = out / "latest.pt"
    if how in DAMAGES:
        damage(path, how)
    elif how == "code":
        save(path, load(path) | {"learner": Code(str(tmp_path / "ran"))})
    elif how == "a list":
        save(path, [1, 2])
    else:
        content = load(path)
        LATEST[how](content)
        save(path, content)
    refused(capsys, [*flags, "--resume"], "latest.pt")
    assert not (tmp_path / "ran").exists(), "it ran code"


ITERATION = {
    "NaN weights": nan("model"), "no weights": set_to("model", value={}),
    "other shapes": set_to("model", "wte.weight", value=torch.zeros(512, 8)),
    "weights that are words": set_to("model", "ln_f.bias", value="zero"),
    "n_head a word": set_to("config", "n_head", value="2"),
    "n_head 0": set_to("config", "n_head", value=0),
    "n_head true": set_to("config", "n_head", value=True),
    "heads that do not divide": set_to("config", "n_head", value=3),
    "a billion layers": set_to("config", "n_layer", value=10**9),
    "a billion positions": set_to("config", "block_size", value=10**9),
    "a billion tokens": set_to("config", "vocab_size", value=10**9),
    "another size": set_to("config", "n_ctx", value=1),
    "no ranks": set_to("ranks", value=""), "ranks that are rubbish": set_to("ranks", value="a b c"),
    "ranks of bytes": set_to("ranks", value=b"abc"),
    "a pattern that is none": set_to("pattern", value="("),
    "a pattern that is no text": set_to("pattern", value=3),
    "a world that is no JSON": set_to("world", value="{"),
    "a world of lists": set_to("world", value="[1]"),
    "a world of words": set_to("world", value='{"x": {"y": "often"}}'),
}


@pytest.mark.parametrize("how", [*DAMAGES, *ITERATION, "code", "other keys"])
def test_damaged_or_forged_iteration_is_refused_in_one_line(whole, tmp_path, capsys, how):
    flags, out = copy(whole, tmp_path)
    path = out / "iteration_2.pt"
    if how in DAMAGES:
        damage(path, how)
    elif how == "code":
        save(path, load(path) | {"model": Code(str(tmp_path / "ran"))})
    elif how == "other keys":
        save(path, {"stage": 1})
    else:
        content = load(path)
        ITERATION[how](content)
        save(path, content)
    refused(capsys, ["--out", str(out), "--samples", "2"], "iteration_2.pt", name="sample.py")
    refused(capsys, [*flags, "--iters", "3", "--resume"], "iteration_2.pt")
    assert not (tmp_path / "ran").exists(), "it ran code"


def test_pattern_that_makes_the_tokenizer_panic_is_refused(whole, tmp_path):
    """It matches nothing at all; Rust prints its own panic first, ours is the last line."""
    _, out = copy(whole, tmp_path)
    save(out / "iteration_1.pt", load(out / "iteration_1.pt") | {"pattern": "(?i)"})
    status, _, err = script(tmp_path, ["--out", str(out), "--samples", "2"], script="sample.py")
    assert status == 2 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("sample.py: ") and "iteration_1.pt" in err


def test_policy_of_other_sizes_is_refused(whole, tmp_path, capsys):
    """Four heads divide the width as two do, and would train on without a word."""
    flags, out = copy(whole, tmp_path)
    content = load(out / "iteration_2.pt")
    content["config"]["n_head"] = 4
    save(out / "iteration_2.pt", content)
    refused(capsys, [*flags, "--iters", "3", "--resume"], "iteration_2.pt", "not this run's")


def test_missing_iteration_is_refused(whole, tmp_path, capsys):
    flags, out = copy(whole, tmp_path)
    (out / "iteration_2.pt").unlink()
    refused(capsys, [*flags, "--iters", "3", "--resume"], "iteration_2.pt", "cannot be read")


@pytest.mark.parametrize("how", ["a row less", "no file", "no JSON", "no text"])
def test_metrics_that_lost_a_row_are_refused(whole, half, tmp_path, capsys, how):
    flags, out = copy(whole, tmp_path, half)
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes({"a row less": b"".join(lines[:-1]), "no file": b"",
                      "no JSON": b"".join([b"{\n", *lines[1:]]),
                      "no text": b"\xff\n" * len(lines)}[how])
    if how == "no file":
        path.unlink()
    refused(capsys, [*flags, "--resume"], "metrics.jsonl")


def test_full_disk_leaves_the_checkpoint_before(whole, tmp_path):
    """The limit lets SFT's policy through; a learner, with its optimiser, is larger."""
    out = tmp_path / "out"
    flags = [*whole[0], "--out", str(out)]
    limit = (whole[1] / "iteration_0.pt").stat().st_size + 10_000
    status, _, err = script(tmp_path, flags, hook=("small_files", limit))
    assert status == 2 and err.count("\n") == 1 and "make room, then --resume" in err, err
    assert load(out / "latest.pt")["stage"] == 0
    assert not list(out.glob("tmp.*"))
    assert script(tmp_path, [*flags, "--resume"])[0] == 0
    assert_same_run(out, whole[1])
