"""Several processes, one run: the same numbers, one writer, and no process that waits for ever."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from data.parallel import by_the_first, gather, largest
from processes import (ROOT, SMALL, assert_same_run, rows_of, script, together, weights_of,
                       write_world)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, flags, --out) of a run of one process, with 3 of 5 prompts a step: an odd batch."""
    folder = tmp_path_factory.mktemp("alone")
    flags = [*SMALL, "--batch-size", "12", "--data", write_world(folder)]
    status, _, err = script(folder, [*flags, "--out", str(folder / "out")])
    assert status == 0, err
    return folder, flags, folder / "out"


def assert_close(out, other):
    """Equal but for the order in which floats were added."""
    one, two = weights_of(out), weights_of(other)
    assert one.keys() == two.keys()
    for t in one:
        for name in one[t]:
            torch.testing.assert_close(one[t][name], two[t][name], atol=2e-4, rtol=1e-3)
    for row, like in zip(rows_of(out), rows_of(other), strict=True):
        assert row["split"] == like["split"] and row["kl"] == pytest.approx(like["kl"], abs=1e-3)


def test_torchrun_with_two_processes_equals_one(alone, tmp_path):
    """The real launcher, figures included."""
    flags = [*alone[1], "--iters", "1", "--out", str(tmp_path / "out")]
    assert script(tmp_path, [*flags[:-1], str(tmp_path / "one")])[0] == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", str(ROOT / "train.py"), *flags],
                          capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters in float32") == 1, "one process prints"
    assert_close(tmp_path / "out", tmp_path / "one")
    assert (tmp_path / "out" / "convergence.gif").exists()


def test_two_processes_share_an_odd_batch_and_go_on_after_a_kill(alone, tmp_path):
    """Uninterrupted, two equal one; killed and resumed, they equal themselves bit by bit."""
    flags = [*alone[1], "--out", str(tmp_path / "two")]
    for running in together(tmp_path, flags):
        status, _, err = running.wait()
        assert status == 0 and err == "", err
    assert_close(tmp_path / "two", alone[2])
    flags[-1] = str(tmp_path / "cut")
    first, second = together(tmp_path, flags, hook=("die_at", "latest.pt", 20, "half"))
    assert first.wait()[0] == -signal.SIGKILL
    second.process.kill()  # as torchrun would
    for running in together(tmp_path, [*flags, "--resume"]):
        assert running.wait()[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "two")


@pytest.mark.parametrize("who", [(1,), (0, 1)], ids=str)
def test_a_signal_to_any_process_stops_all_after_the_same_step(alone, tmp_path, who):
    flags = [*alone[1], "--steps", "100000", "--out", str(tmp_path / "out")]
    pair = together(tmp_path, flags)
    end = time.monotonic() + 30
    while "Name a pet" not in pair[0].read(".out") and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    for r in who:
        pair[r].signal(signal.SIGINT)
    for running in pair:
        status, _, err = running.wait(20)
        assert status == 130 and "--resume" in err and "Traceback" not in err, err
    latest = torch.load(tmp_path / "out" / "latest.pt", weights_only=True)
    assert latest["iteration"] == 1 and 0 < latest["step"] < 100_000


def test_more_processes_than_prompts_in_a_step_are_refused(alone, tmp_path):
    flags = [*alone[1], "--batch-size", "4", "--out", str(tmp_path / "out")]
    for running in together(tmp_path, flags):
        status, _, err = running.wait(20)
        assert status == 2 and "2 processes, and a step has 1 prompts" in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--lam", "nan"], ["--data", "/none"], ["--out", "/proc/x"], []],
                         ids=str)
def test_bad_input_ends_every_process(alone, tmp_path, flags):
    """Also what only process 0 sees: a folder that is not writable, or holds a run already."""
    errors = ""
    for running in together(tmp_path, [*alone[1], "--out", str(alone[2]), *flags]):
        status, out, err = running.wait(20)
        assert status == 2 and out == "" and "Traceback" not in err, err
        errors += err
    assert "train.py: " in errors


def test_full_disk_ends_every_process(alone, tmp_path):
    size = (alone[2] / "latest.pt").stat().st_size + 20_000  # an optimiser's averages are larger
    flags = [*alone[1], "--out", str(tmp_path / "out")]
    first, second = together(tmp_path, flags, hook=("small_files", size))
    status, _, err = first.wait(20)
    assert status == 2 and "make room" in err and err.count("\n") == 1, err
    assert second.wait(20)[::2] == (2, "")


def test_without_torchrun_nothing_acts():
    assert "RANK" not in os.environ
    assert by_the_first(lambda: 3) == 3 and largest(2) == 2 and gather({1: 2}) == {1: 2}
