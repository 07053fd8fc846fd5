"""Runs of train.py and sample.py: in this process, or in one that can be killed.

A process is a fork of one that has imported torch already, which saves seconds. A hook is a
function of this file that changes something in the child first. Where there is no fork server
(Windows), whatever starts a process is skipped. Not a test file.
"""
import functools
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = itertools.count()  # of logs
SMALL = ("--iters 2 --sft-steps 12 --steps 10 --n-layer 1 --n-head 2 --n-embd 16 --negatives 4 "
         "--batch-size 8 --sft-samples 8 --block-size 32 --reports 2 --device cpu").split()


def write_world(folder, name="six.jsonl") -> str:
    """Six prompts, one of them held out; 5 train prompts and 2 a step, so that one is left over."""
    rows = [{"family": "f", "prompt": f"Flip a coin with {p}% heads.", "responses": {
        "heads": p / 100, "tails": 1 - p / 100}} for p in (10, 30, 50, 70, 90)]
    rows.append({"family": "g", "prompt": "Name a pet.", "responses": {"dog": 0.75, "a cat": 0.25}})
    rows[2]["split"] = "heldout"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return str(folder / name)


def without_figures(patch):
    """No pictures: they take longer than all else in so small a run."""
    patch.setattr("data.run.folder.draw_convergence", lambda *args: b"png")
    patch.setattr("data.run.folder.draw_gif", lambda *args: b"gif")


# ---- Hooks --------------------------------------------------------------------------------------

def quick(seconds=0.0):
    """No figures, and each file takes `seconds`."""
    without_figures(pytest.MonkeyPatch())
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(seconds), fsync(file))


def die_at(name, count):
    """SIGKILL itself when half of file `name` is written for the count-th time."""
    quick()
    replace, seen = os.replace, []

    def replace_or_die(part, path):
        seen.append(Path(path).name)
        if seen.count(name) == count:
            os.truncate(part, os.path.getsize(part) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)
    os.replace = replace_or_die


def small_files(limit):
    """Let no file grow beyond `limit` bytes, as on a full disk."""
    import resource
    quick()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


# ---- Processes ----------------------------------------------------------------------------------

@functools.cache
def fork_server():
    """The context that forks a process with torch imported; skips the test where there is none."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork server on this system, so no cheap processes to kill")
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "train", "sample", "torch._dynamo"])  # for Adam
    return context


def child(script, args, log, hook, env):
    """What the forked process does: its output goes to log.out and log.err."""
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    os.environ |= env
    torch.set_num_threads(1)
    sys.argv = [script, *args]
    name, *more = hook
    globals()[name](*more)
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Script:
    """`python script args`, started; `wait()` gives (exit status, stdout, stderr)."""
    def __init__(self, folder, args, script="train.py", hook=("quick",), env={}):
        self.log = str(folder / f"log{next(NUMBERS)}")
        self.process = fork_server().Process(target=child, args=(script, args, self.log, hook, env))
        self.process.start()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def read(self, suffix):
        path = Path(self.log + suffix)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for(self, words, seconds=30):
        """Wait until it has printed the words; it must not end before."""
        end = time.monotonic() + seconds
        while words not in self.read(".out"):
            assert self.process.is_alive(), f"too early an end: {self.read('.err')}"
            assert time.monotonic() < end, f"nothing after {seconds} s: {self.read('.out')}"
            time.sleep(0.002)

    def wait(self, timeout=60):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hangs after {timeout} s: {self.read('.out')}{self.read('.err')}")
        return self.process.exitcode, self.read(".out"), self.read(".err")


def script(*args, **how):
    return Script(*args, **how).wait()


def here(capsys, args, name="train.py"):
    """The same in this process, where it is not to be killed: (exit status, stdout, stderr)."""
    from data.run.options import command, parse_args
    import sample
    import train
    work, kind = {"train.py": (train.main, train.Config),
                  "sample.py": (sample.main, sample.SampleConfig)}[name]
    capsys.readouterr()
    status = 0
    try:
        command(name, lambda: work(parse_args(kind, "", args)))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def refused(capsys, args, *words, name="train.py"):
    """The command exits with 2 and one line that says all the words. Returns the line."""
    status, _, err = here(capsys, args, name)
    assert status == 2 and err.count("\n") == 1 and err.startswith(f"{name}: "), (status, err)
    assert all(word in err for word in words), err
    return err


def together(folder, args, processes=2, **how):
    """As torchrun would start them, in one machine. Returns the started scripts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Script(folder, args, env={
        "TORCHELASTIC_RUN_ID": "test", "RANK": str(r), "LOCAL_RANK": str(r),
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, **how)
            for r in range(processes)]


# ---- What a run left ----------------------------------------------------------------------------

def rows_of(out) -> list[dict]:
    """metrics.jsonl without `seconds`; a torn row would not parse."""
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in lines]


def weights_of(out) -> dict:
    """{iteration: {name: tensor}} from every iteration_t.pt."""
    return {int(path.stem[10:]): torch.load(path, weights_only=True)["model"]
            for path in Path(out).glob("iteration_*.pt")}


def assert_same_run(out, other):
    """Bit-identical weights, the same rows in the same order, nothing left over."""
    one, two = weights_of(out), weights_of(other)
    assert one.keys() == two.keys() and len(one)
    for t in one:
        for name in one[t]:
            assert torch.equal(one[t][name], two[t][name]), f"iteration {t}: {name} differs"
    assert rows_of(out) == rows_of(other)
    names = [{path.name for path in Path(folder).iterdir()} for folder in (out, other)]
    assert names[0] == names[1], "a file was left over, or is missing"
