"""Several processes, one run: the same numbers, one writer, and no process that waits for ever."""
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from data.run.options import prepare
from data.run.parallel import add_gradients, gather, rank, ranks, start
from processes import (ROOT, SMALL, assert_same_run, rows_of, script, together, weights_of,
                       write_world)
from train import Config, fit, new_policy, sample_responses

FLAGS = [*SMALL, "--batch-size", "12"]  # 3 of 5 prompts a step: an odd batch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(flags, --out, stdout) of a run of two processes, by the real launcher, with figures."""
    folder = tmp_path_factory.mktemp("two")
    flags = [*FLAGS, "--data", write_world(folder)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", str(ROOT / "train.py"), *flags,
                           "--out", str(folder / "out")], timeout=120, capture_output=True,
                          text=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    return flags, folder / "out", done.stdout


def test_two_processes_equal_one_up_to_rounding_and_one_of_them_prints(two, tmp_path):
    flags, out, text = two
    status, alone, err = script(tmp_path, [*flags, "--out", str(tmp_path / "one")])
    assert (status, err) == (0, "")
    assert text.count("parameters in float32") == alone.count("parameters in float32") == 1
    one, other = weights_of(tmp_path / "one"), weights_of(out)
    assert one.keys() == other.keys() == {0, 1, 2}
    for t in one:
        for name in one[t]:
            torch.testing.assert_close(other[t][name], one[t][name], atol=2e-4, rtol=1e-3)
    for row, like in zip(rows_of(out), rows_of(tmp_path / "one"), strict=True):
        assert row["split"] == like["split"] and row["kl"] == pytest.approx(like["kl"], abs=1e-3)
    assert (out / "convergence.gif").read_bytes().startswith(b"GIF8")


def test_two_processes_go_on_after_a_kill_bit_by_bit(two, tmp_path):
    flags = [*two[0], "--out", str(tmp_path / "out")]
    first, second = together(tmp_path, flags, hook=("die_at", "latest.pt", 3))
    assert first.wait()[0] == -signal.SIGKILL
    assert second.wait(20)[0] != 0, "it must not go on alone"
    for running in together(tmp_path, [*flags, "--resume"]):
        assert running.wait()[0] == 0
    assert_same_run(tmp_path / "out", two[1])


@pytest.mark.parametrize("more, words", [
    (["--lam", "nan"], "--lam nan"), (["--batch-size", "4"], "2 processes"),
    ([], "holds a run already")], ids=["both see it", "too many", "process 0 alone sees it"])
def test_bad_input_ends_every_process(two, tmp_path, more, words):
    flags = [*two[0], "--out", str(two[1]), *more]
    (status, out, err), (other, silent, _) = (
        running.wait(20) for running in together(tmp_path, flags))
    assert status == 2 and other != 0 and out == silent == "", (status, other, err)
    assert err.count("\n") == 1 and err.startswith("train.py: ") and words in err


def test_processes_share_the_prompts_of_a_step_and_the_responses_to_sample(tmp_path, monkeypatch):
    """What each of two does, one after the other, is together what one process does alone."""
    config = Config(negatives=3, batch_size=9, n_layer=1, n_head=2, n_embd=8, steps=4,
                    block_size=32, data=write_world(tmp_path), device="cpu")
    world, _ = prepare(config)
    policy, read, sampled = new_policy(world, config), [], []
    for name, stub in (("rows_that_fit", lambda model, tokens: 5), ("gather", lambda mine: [mine]),
                       ("show_responses", lambda *rest: None),
                       ("clip_gradients", lambda *rest: None)):
        monkeypatch.setattr(f"train.{name}", stub)

    def parts(prompts, device):
        read[-1].append(prompts)
        return []
    run = SimpleNamespace(config=config, world=world, restore=lambda learner: 0, device="cpu",
                          report=lambda *rest: None)
    for r, n in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr("train.rank", lambda: r)
        monkeypatch.setattr("train.ranks", lambda: n)
        read.append([])
        fit(policy, None, SimpleNamespace(parts=parts), 1, run)
        sampled.append(sample_responses(policy, world, config, 0))
    for whole, first, second in zip(*read, strict=True):
        assert len(whole) == 3 and sorted(first + second) == sorted(whole)
        assert len(first) == 2 and len(second) == 1
    for whole, first, second in zip(*sampled, strict=True):
        assert first + second == whole and whole.total() == 3


def test_without_torchrun_there_is_one_process(monkeypatch):
    """Also where a cluster sets the variable RANK for purposes of its own."""
    monkeypatch.setenv("RANK", "1")
    assert start("cpu") == "cpu"
    assert (rank(), ranks(), gather({1: 2})) == (0, 1, [{1: 2}])
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    add_gradients(model)
    assert model.weight.grad.tolist() == [[1, 1]]
