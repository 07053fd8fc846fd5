"""Scripts in processes that can be killed: train.py and sample.py as from a shell, without the
seconds that importing torch takes, for each process is a fork of one that has imported it.

Not a test file. A hook is a function of this file that changes something in the child first.
"""
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

import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = str(ROOT)
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train", "sample", "torch._dynamo"])  # an optimiser wants the last
NUMBERS = itertools.count()  # of logs
SMALL = ("--iters 2 --sft-steps 12 --steps 10 --n-layer 1 --n-head 2 --n-embd 16 --negatives 4 "
         "--batch-size 8 --sft-samples 8 --block-size 32 --reports 2 --warmup 3").split()


def write_world(folder, name="six.jsonl") -> str:
    """Six prompts, one of them held out; 5 train prompts and 2 a step, so that passes overlap."""
    rows = [{"family": "f", "prompt": f"Flip a coin with {p}% heads.", "responses": {
        "heads": p / 100, "tails": 1 - p / 100}} for p in (10, 30, 50, 70, 90)]
    rows.append({"family": "g", "prompt": "Name a pet.", "responses": {"dog": 0.75, "a cat": 0.25}})
    rows[2]["split"] = "heldout"
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


# ---- Hooks --------------------------------------------------------------------------------------

def plain():
    """Nothing is changed: figures too are drawn."""


def quick():
    """No figures: they take longer than all else in so small a run."""
    import data.gif
    import data.plot
    data.plot.draw_convergence = lambda out: data.plot.write(Path(out) / "convergence.png", b"png")
    data.gif.draw_gif = lambda out: data.plot.write(Path(out) / "convergence.gif", b"gif")


def careful(seconds=0.0, figures=False):
    """Save after every step, and take `seconds` to write each file."""
    import data.rescue
    if not figures:
        quick()
    data.rescue.EVERY = -1
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(seconds), fsync(file))


def die_at(name, count, when, figures=False):
    """SIGKILL itself at the count-th time that file `name` is to be replaced."""
    careful(figures=figures)
    replace, seen = os.replace, []

    def replace_or_die(part, path):
        seen.append(Path(path).name)
        dies = seen.count(name) == count and seen[-1] == name
        if dies and when == "half":
            os.truncate(part, os.path.getsize(part) // 2)
        if dies and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die


def die_in(module, name, count):
    """SIGKILL itself in the count-th call of a function; a row of metrics is torn first."""
    careful()
    owner, calls = sys.modules[module], []
    plain = getattr(owner, name)

    def call_or_die(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            if name == "append":
                plain(args[0], args[1][:len(args[1]) // 3])
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(owner, name, call_or_die)


def small_files(limit):
    """Let no file grow beyond `limit` bytes, as on a full disk."""
    import resource
    careful()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


# ---- Processes ----------------------------------------------------------------------------------

def child(script, args, log, hook, env):
    """What the forked process does: its output goes to log.out and log.err."""
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    os.environ |= env
    torch.set_num_threads(1)
    name, *more = hook
    globals()[name](*more)
    sys.argv = [script, *args]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Script:
    """`python script args`, started; `wait()` gives (exit status, stdout, stderr)."""
    def __init__(self, folder, args, script="train.py", hook=("quick",), env={}):
        self.log = str(folder / f"log{next(NUMBERS)}")
        self.process = FORK.Process(target=child, args=(script, args, self.log, hook, env))
        self.process.start()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def read(self, suffix):
        path = Path(self.log + suffix)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, timeout=60):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hangs after {timeout} s: {self.read('.out')}{self.read('.err')}")
        return self.process.exitcode, self.read(".out"), self.read(".err")


def script(*args, **how):
    return Script(*args, **how).wait()


def together(folder, args, processes=2, **how):
    """As torchrun would start them, in one machine. Returns the started scripts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Script(folder, args, env={
        "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, **how) for r in range(processes)]


# ---- What a run left ----------------------------------------------------------------------------

def rows_of(out) -> list[dict]:
    """metrics.jsonl without `seconds`; a torn row would not parse."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


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
    assert not list(Path(out).glob("*tmp*")), "a half-written file was left"
