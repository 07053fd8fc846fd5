"""Tries one attempt at one exercise in a process of its own: see runner.py for what happens there.

A claim counts only if that process reports, with a token that the attempt cannot know, that the
claim was tried and held. What ends the process early, hides its output or never ends gains nothing.
This file needs no torch.
"""
import ast
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from classroom.functions import TESTS, TEXTS, decode, empty_all, product_files, split_name

STARTING = 120  # seconds that a busy machine may need to import torch; then the clock starts
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "USERPROFILE",
        "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONUTF8")


def claims_by_function() -> dict[str, list[str]]:
    """{function: names of its claims}, read from the source of the checks."""
    found = {}
    for path in sorted((TESTS / "classroom").glob("checks_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        constants = {s.targets[0].id: s.value.value for s in tree.body if isinstance(s, ast.Assign)
                     and isinstance(s.targets[0], ast.Name) and isinstance(s.value, ast.Constant)}
        for node in tree.body:
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and decorator.func.id == "claim":
                    found.setdefault(constants[decorator.args[0].id], []).append(node.name)
    return found


CLAIMS = claims_by_function()


class CleanCopy:
    """`with CleanCopy(texts_of_files) as copy`: a folder with the product, solutions taken out.

    Attempts are tried there. It holds no history, no original and no trace of where those are.
    """
    def __init__(self, reference):
        self.reference = {path: empty_all(text, path) for path, text in reference.items()}

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="exercise-")
        for path, text in self.reference.items():
            file = Path(self.folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8", newline="\n")
        here = TESTS / "classroom"
        to = Path(self.folder, "tests", "classroom")
        to.mkdir(parents=True)
        for path in [*here.glob("*.py"), here / "exercises.toml"]:
            shutil.copy(path, to)
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder, ignore_errors=True)

    def judge(self, exercise, attempt: str, seconds, seed="0", quiet=False, saying=None) -> dict:
        """Try an attempt, the text of its file. Returns {"claims": […], "said": …, "seconds": …}.

        claims has one entry for each claim, tried or not. saying(claim) is called after each. The
        seconds, those allowed and those taken, do not count the start of Python and torch.
        """
        claims = {name: {"claim": name, "held": False, "said": "not tried"}
                  for name in CLAIMS[exercise["function"]]}
        result = {"claims": list(claims.values()), "said": "", "seconds": 0.0}
        token = secrets.token_hex(16)
        job = {"token": token, "function": exercise["function"], "part": exercise.get("part"),
               "given": exercise.get("given", []), "attempt": attempt, "seed": seed,
               "reference": self.reference[split_name(exercise["function"])[0]]}
        process = self.start(quiet)
        clock = Clock(process, STARTING)
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.close()
            for line in process.stdout:
                if not line.startswith(token.encode() + b" "):
                    continue  # not ours: the attempt wrote it
                report = json.loads(line.split(b" ", 1)[1])
                if "ready" in report:
                    clock.restart(seconds)
                elif "unfit" in report:
                    result["said"] = report["unfit"]
                else:
                    claims[report["claim"]].update(report)
                    if saying:
                        saying(claims[report["claim"]])
            process.wait()
        except OSError as error:
            result["said"] = f"the process could not be used: {error}"
        finally:
            result["seconds"] = round(clock.stop(), 1)
            end(process)
        tried = [c for c in claims.values() if c["said"] != "not tried"]
        if clock.late:
            result["said"] = (
                f"no end after {seconds:.0f} seconds: a loop without end?" if clock.ready else
                "Python and torch did not start in time: the machine is too busy")
        elif len(tried) < len(claims) and not result["said"]:
            result["said"] = (f"the process ended in the middle (status {process.returncode}): "
                              f"what ends it proves nothing")
        return result

    def start(self, quiet):
        env = {name: os.environ[name] for name in KEPT if name in os.environ}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
        session = {"start_new_session": True} if os.name == "posix" else {}
        runner = Path(self.folder, "tests", "classroom", "runner.py")
        return subprocess.Popen(
            [sys.executable, "-B", "-W", "ignore", str(runner)], cwd=self.folder, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None, **session)


class Clock:
    """Ends a process after some seconds; `late` tells that it did."""
    def __init__(self, process, seconds):
        self.process, self.late, self.ready, self.began = process, False, False, time.monotonic()
        self.timer = self.start(seconds)

    def start(self, seconds):
        timer = threading.Timer(seconds, self.ring)
        timer.daemon = True
        timer.start()
        return timer

    def restart(self, seconds):
        self.timer.cancel()
        self.ready, self.began, self.timer = True, time.monotonic(), self.start(seconds)

    def ring(self):
        self.late = True
        end(self.process)

    def stop(self):
        self.timer.cancel()
        return time.monotonic() - self.began


def end(process):
    """End a process, and those that it started, where the platform knows which."""
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    elif process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()


def texts_of(root) -> dict[str, str]:
    """{path: text} of the product's files in a folder."""
    return {path: decode(Path(root, path).read_bytes())[0] for path in product_files(root)}


def number_of(exercise) -> int:
    return TEXTS.index(exercise) + 1
