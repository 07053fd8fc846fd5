"""Nothing lost: killed anywhere, a run goes on to the very bits of one that nobody disturbed."""
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from data.checkpoint import load, save
from processes import SMALL, Script, assert_same_run, rows_of, script, write_world


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, flags, --out) of a run of two iterations that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*SMALL, "--data", write_world(folder)]
    status, _, err = script(folder, [*flags, "--out", str(folder / "out")])
    assert status == 0, err
    return folder, flags, folder / "out"


def copy(whole, tmp_path):
    """The finished run, in a folder of its own: (flags with --out, --out)."""
    shutil.copytree(whole[2], tmp_path / "out")
    return [*whole[1], "--out", str(tmp_path / "out")], tmp_path / "out"


def wait_for(condition, running, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and running.process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


def cut_short(tmp_path, flags, number=signal.SIGKILL):
    """Start a run that saves after every step and end it in iteration 1. Returns its end."""
    running = Script(tmp_path, flags, hook=("careful", 0.005))
    wait_for(lambda: "iteration 1" in running.read(".out"), running)
    running.signal(number)
    return running.wait()


# ---- Kill it anywhere ---------------------------------------------------------------------------

def test_run_killed_at_eight_random_moments_equals_the_undisturbed_run(whole, tmp_path):
    rng, kills, out = random.Random(0), 0, tmp_path / "out"
    flags = [*whole[1], "--out", str(out)]
    while True:
        running = Script(tmp_path, [*flags, "--resume"] if (out / "latest.pt").exists() else flags,
                         hook=("careful", 0.03))
        if kills == 8:
            break
        wait_for((out / "config.json").exists, running)
        time.sleep(rng.uniform(0.05, 0.3))
        running.signal(signal.SIGKILL)
        status, _, err = running.wait()
        assert status == -signal.SIGKILL, f"it ended before it was killed: {status} {err}"
        kills += 1
    status, _, err = running.wait()
    assert status == 0, err
    assert_same_run(out, whole[2])


@pytest.mark.parametrize("hook", [
    ("die_at", "config.json", 1, "half"), ("die_at", "latest.pt", 1, "before"),
    ("die_at", "latest.pt", 6, "half"), ("die_at", "iteration_0.pt", 1, "half"),
    ("die_at", "iteration_1.pt", 1, "after"), ("die_at", "convergence.png", 2, "half"),
    ("die_in", "data.rescue", "append", 6), ("die_in", "sample", "generate", 2),
    ("die_in", "data.exact", "evaluate", 5)], ids=lambda hook: "-".join(map(str, hook)))
def test_run_killed_at_its_weakest_moments_equals_the_undisturbed_run(whole, tmp_path, hook):
    flags = [*whole[1], "--out", str(tmp_path / "out")]
    assert script(tmp_path, flags, hook=hook)[0] == -signal.SIGKILL
    begun = (tmp_path / "out" / "latest.pt").exists()
    status, _, err = script(tmp_path, [*flags, "--resume"] if begun else flags)
    assert status == 0, err
    assert_same_run(tmp_path / "out", whole[2])
    assert (tmp_path / "out" / "convergence.png").read_bytes() == b"png"


def test_real_figures_cut_short_are_drawn_again(whole, tmp_path):
    flags, out = copy(whole, tmp_path)
    hook = ("die_at", "convergence.gif", 1, "half", True)
    assert script(tmp_path, [*flags, "--resume"], hook=hook)[0] == -signal.SIGKILL
    assert list(out.glob("tmp.*")) and (out / "convergence.gif").read_bytes() == b"gif"
    assert script(tmp_path, [*flags, "--resume"], hook=("careful", 0, True))[0] == 0
    assert (out / "convergence.gif").read_bytes().startswith(b"GIF8")
    assert not list(out.glob("tmp.*")), "what was cut short stays for ever"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_kill_save_and_say_how_to_go_on(whole, tmp_path, number, status):
    flags = [*whole[1], "--out", str(tmp_path / "out")]
    ended, _, err = cut_short(tmp_path, flags, number)
    assert ended == status and "same flags and --resume" in err and "Traceback" not in err
    assert load(tmp_path / "out" / "latest.pt")["iteration"] >= 1
    status, text, err = script(tmp_path, [*flags, "--resume"])
    assert status == 0 and "Going on in iteration" in text, err
    assert_same_run(tmp_path / "out", whole[2])


def test_ctrl_c_before_the_run_begins_promises_nothing(tmp_path, capsys):
    from data.options import command
    with pytest.raises(SystemExit) as stop:
        command("train.py", lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1))
    assert stop.value.code == 130 and capsys.readouterr().err == "train.py: stopped\n"


def test_a_state_is_saved_at_once_and_then_every_ten_seconds(monkeypatch):
    from data import rescue
    clock, saves = [0.0], []
    monkeypatch.setattr(rescue.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rescue, "save_latest", lambda *state: saves.append(clock[0]))
    with rescue.Rescue() as guard:
        for clock[0] in range(60):
            guard.save(None, None, {}, 0.0, now=clock[0] == 0)
    assert saves[0] == 0 and len(saves) >= 5
    assert max(b - a for a, b in zip(saves, saves[1:])) <= 11, "and a step more"


# ---- Resume is safe -----------------------------------------------------------------------------

def refused(tmp_path, flags, *words, script_name="train.py"):
    """The command exits with 2 and one line that says all the words. Returns the line."""
    status, _, err = script(tmp_path, flags, script=script_name)
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, (status, err)
    assert all(word in err for word in words), err
    return err


@pytest.mark.parametrize("flag, value", [("--lam", "3"), ("--seed", "1"), ("--anchor", "none"),
                                         ("--steps", "11"), ("--n-embd", "32")])
def test_changed_flag_is_refused_by_name(whole, tmp_path, flag, value):
    flags, _ = copy(whole, tmp_path)
    refused(tmp_path, [*flags, flag, value, "--resume"], flag, value, "was started with")


def test_changed_data_or_tokens_are_refused(whole, tmp_path):
    from data.tokenizer import RANK_FILE
    flags, _ = copy(whole, tmp_path)
    path = Path(write_world(tmp_path, "other.jsonl"))
    refused(tmp_path, [*flags, "--iters", "3", "--data", str(path), "--resume", "--lam", "2.5"],
            "--lam")  # the same rows elsewhere are no change
    path.write_text(path.read_text().replace("0.75", "0.7").replace("0.25", "0.3"))
    refused(tmp_path, [*flags, "--data", str(path), "--resume"], "--data", "other content")
    lines = RANK_FILE.read_text().splitlines()
    (tmp_path / "my.tiktoken").write_text("\n".join(lines[:-1]))
    refused(tmp_path, [*flags, "--encoding", str(tmp_path / "my.tiktoken"), "--resume"],
            "--encoding", "other content")


def test_more_iterations_extend_a_run_as_if_it_had_been_longer(whole, tmp_path):
    flags, out = copy(whole, tmp_path)
    assert script(tmp_path, [*flags, "--iters", "3", "--resume"])[0] == 0
    longer = [*whole[1], "--iters", "3", "--out", str(tmp_path / "longer")]
    assert script(tmp_path, longer)[0] == 0
    assert_same_run(out, tmp_path / "longer")


def test_complete_run_says_so(whole, tmp_path):
    flags, out = copy(whole, tmp_path)
    status, text, _ = script(tmp_path, [*flags, "--resume"])
    assert status == 0 and "is complete" in text
    assert_same_run(out, whole[2])


def test_existing_run_is_refused_and_overwrite_replaces_it(whole, tmp_path):
    flags, out = copy(whole, tmp_path)
    refused(tmp_path, flags, "holds a run already", "--resume", "--overwrite")
    assert_same_run(out, whole[2])
    refused(tmp_path, [*flags, "--resume", "--overwrite"], "give one")
    assert script(tmp_path, [*flags, "--iters", "1", "--overwrite"])[0] == 0
    assert max(row["iteration"] for row in rows_of(out)) == 1
    assert not (out / "iteration_2.pt").exists(), "a checkpoint of the run that was replaced"


def test_resume_without_a_run_is_refused_and_leaves_no_folder(whole, tmp_path):
    refused(tmp_path, [*whole[1], "--out", str(tmp_path / "otu"), "--resume"], "no latest.pt")
    assert not (tmp_path / "otu").exists()


# ---- Untrusted files ----------------------------------------------------------------------------

class Code:
    """A pickle that makes a folder as it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def change(path, how):
    """Damage a checkpoint, or replace it by another file with a right digest."""
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit-flipped":
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 4]) + data[1001:])
    elif how == "garbage":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif how == "plain torch.save":
        torch.save({"iteration": 1}, path)
    elif how == "code":
        save(path, {"iteration": 1, "player": Code(str(path) + ".ran")})
    elif how == "other keys":
        save(path, {"iteration": 1})
    else:
        content = load(path)
        weights = content.get("model", content.get("player"))
        weights["wte.weight"] = weights["wte.weight"][:, :8]
        save(path, content)


HOWS = ("truncated", "empty", "bit-flipped", "garbage", "plain torch.save", "code", "other keys",
        "other shapes")


def test_damaged_or_forged_latest_is_refused_and_the_one_before_is_offered(whole, tmp_path):
    flags = [*whole[1], "--out", str(tmp_path / "out")]
    cut_short(tmp_path, flags)
    latest, good = tmp_path / "out" / "latest.pt", (tmp_path / "out" / "latest.pt").read_bytes()
    for how in HOWS:
        latest.write_bytes(good)
        change(latest, how)
        line = refused(tmp_path, [*flags, "--resume"], "latest.pt")
        assert not Path(str(latest) + ".ran").exists(), "it ran code"
        if how in ("truncated", "bit-flipped"):
            assert "damaged" in line and "mv " in line
            move = line.split("mv ")[1].split()
    shutil.move(*move)  # the advice is good
    assert script(tmp_path, [*flags, "--resume"])[0] == 0
    assert_same_run(tmp_path / "out", whole[2])


def test_damaged_or_forged_iteration_is_refused(whole, tmp_path):
    flags, out = copy(whole, tmp_path)
    path, good = out / "iteration_1.pt", (out / "iteration_1.pt").read_bytes()
    for how in HOWS:
        path.write_bytes(good)
        change(path, how)
        refused(tmp_path, ["--out", str(out)], "iteration_1.pt", script_name="sample.py")
        assert not Path(str(path) + ".ran").exists(), "it ran code"
    refused(tmp_path, [*flags, "--iters", "3", "--resume"], "iteration_1.pt", "--overwrite")
    path.unlink()
    refused(tmp_path, [*flags, "--iters", "3", "--resume"], "iteration_1.pt", "missing")


def test_metrics_that_someone_changed_are_refused(whole, tmp_path):
    flags, out = copy(whole, tmp_path)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    for changed in (lines[:-1], lines[1:], [line.replace("0.", "1.") for line in lines]):
        (out / "metrics.jsonl").write_text("".join(changed))
        refused(tmp_path, [*flags, "--iters", "3", "--resume"], "metrics.jsonl")


def test_full_disk_leaves_the_checkpoint_before(whole, tmp_path):
    """The limit lets SFT's checkpoints through; an optimiser with averages is larger."""
    flags, out = [*whole[1], "--out", str(tmp_path / "out")], tmp_path / "out"
    size = (whole[2] / "latest.pt").stat().st_size
    limit = max(size, (whole[2] / "iteration_0.pt").stat().st_size) + 10_000
    status, _, err = script(tmp_path, flags, hook=("small_files", limit))
    assert status == 2 and err.count("\n") == 1 and "make room, then --resume" in err, err
    assert load(out / "latest.pt")["iteration"] == 0
    assert script(tmp_path, [*flags, "--resume"])[0] == 0
    assert_same_run(out, whole[2])
