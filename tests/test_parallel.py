"""Several processes, one run: the same numbers, one writer, and no process that waits for ever."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.errors import InputError
from data.run.options import command
from data.run.parallel import gather, on_process_0, rank, ranks
from processes import (ROOT, SMALL, assert_same_run, rows_of, script, together, weights_of,
                       write_world)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(flags, --out) of a run of one process, with 3 of 5 prompts a step: an odd batch."""
    folder = tmp_path_factory.mktemp("alone")
    flags = [*SMALL, "--batch-size", "12", "--data", write_world(folder)]
    status, _, err = script(folder, [*flags, "--out", str(folder / "out")])
    assert (status, err) == (0, "")
    return flags, folder / "out"


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
    flags = [*alone[0], "--iters", "1", "--out", str(tmp_path / "out")]
    assert script(tmp_path, [*flags[:-1], str(tmp_path / "one")])[0] == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", str(ROOT / "train.py"), *flags], timeout=120,
                          capture_output=True, text=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters in float32") == 1, "one process prints"
    assert_close(tmp_path / "out", tmp_path / "one")
    assert (tmp_path / "out" / "convergence.gif").read_bytes().startswith(b"GIF8")


def test_two_processes_share_an_odd_batch_and_go_on_after_a_kill(alone, tmp_path):
    """Uninterrupted, two equal one; killed and resumed, they equal themselves bit by bit."""
    flags = [*alone[0], "--out", str(tmp_path / "two")]
    for running in together(tmp_path, flags):
        status, _, err = running.wait()
        assert (status, err) == (0, "")
    assert_close(tmp_path / "two", alone[1])
    flags[-1] = str(tmp_path / "cut")
    first, second = together(tmp_path, flags, hook=("die_at", "latest.pt", 5, "half"))
    assert first.wait()[0] == -signal.SIGKILL
    second.process.kill()  # as torchrun would
    second.wait()
    for running in together(tmp_path, [*flags, "--resume"]):
        assert running.wait()[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "two")


def refused(pair, *words, begun=False):
    """Every process ends with 2, in one line at most; the first one says why, before it begins."""
    (status, out, why), (second, silent, err) = (running.wait(20) for running in pair)
    assert (status, second, silent) == (2, 2, "") and (begun or out == ""), (status, out, why)
    assert why.count("\n") == 1 and err.count("\n") <= 1, (why, err)
    assert all(word in why for word in ("train.py: ", *words)), why


def test_more_processes_than_prompts_in_a_step_are_refused(alone, tmp_path):
    flags = [*alone[0], "--batch-size", "4", "--out", str(tmp_path / "out")]
    refused(together(tmp_path, flags), "2 processes, and a step has 1 prompts")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("old, new", [("0.75", "0.7500001"), ("a cat", "a cut"), ("pet", "bird")])
def test_ranks_that_read_different_data_are_refused(alone, tmp_path, old, new):
    path = Path(write_world(tmp_path, "other.jsonl"))
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    flags = [*alone[0], "--out", str(tmp_path / "out")]
    refused(together(tmp_path, flags, hook=("other_flag", "--data", str(path))), "differ", "data")
    assert not (tmp_path / "out").exists()


def test_ranks_with_different_flags_are_refused(alone, tmp_path):
    flags = [*alone[0], "--seed", "0", "--out", str(tmp_path / "out")]
    refused(together(tmp_path, flags, hook=("other_flag", "--seed", "1")), "differ", "flags")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", ["nothing", "a run"])
def test_ranks_that_do_not_share_out_are_refused(alone, tmp_path, there):
    """As on two machines, each with a folder of its own; the second may hold an earlier run."""
    other = alone[1] if there == "a run" else tmp_path / "elsewhere"
    flags = [*alone[0], "--out", str(tmp_path / "out")]
    refused(together(tmp_path, flags, hook=("other_flag", "--out", str(other))),
            "not the same folder")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("flags", [["--lam", "nan"], ["--data", "/none"],
                                   ["--out", str(ROOT / "train.py" / "x")],
                                   []], ids=["lam", "data", "out", "a run is there"])
def test_bad_input_ends_every_process(alone, tmp_path, flags):
    """Also what only process 0 sees: a folder that is not writable, or holds a run already."""
    refused(together(tmp_path, [*alone[0], "--out", str(alone[1]), *flags]))


def test_full_disk_ends_every_process(alone, tmp_path):
    size = (alone[1] / "iteration_0.pt").stat().st_size + 10_000  # a learner is larger
    flags = [*alone[0], "--out", str(tmp_path / "out")]
    refused(together(tmp_path, flags, hook=("small_files", size)), "make room",
            begun=True)


def test_metrics_that_are_gone_end_every_process(alone, tmp_path):
    """An error of the operating system, not one of ours, which only process 0 meets."""
    flags = [*alone[0], "--iters", "0", "--out", str(tmp_path / "out")]
    assert script(tmp_path, flags)[0] == 0
    (tmp_path / "out" / "metrics.jsonl").unlink()
    refused(together(tmp_path, [*flags, "--resume"]), "metrics.jsonl")


@pytest.mark.parametrize("end, status", [
    (InputError("no"), 2), (OSError("no"), 2), (KeyboardInterrupt(), 130), (SystemExit(2), 2),
    (SystemExit(0), 0), (None, 0)], ids=repr)
def test_every_end_leaves_by_the_door_that_gloo_cannot_abort(monkeypatch, capsys, end, status):
    """Also that of a process which ends because process 0 said so, with SystemExit."""
    left = []
    monkeypatch.setattr("data.run.options.leave", left.append)

    def work():
        if end:
            raise end
    command("train.py", work)
    assert left == [status]


def test_without_torchrun_there_is_one_process():
    assert "RANK" not in os.environ
    assert (rank(), ranks(), on_process_0(lambda: 3), gather({1: 2})) == (0, 1, 3, [{1: 2}])
