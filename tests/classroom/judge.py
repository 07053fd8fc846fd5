"""Tries one attempt at one exercise, in a process of its own, and believes only its reports.

The process works in a temporary copy of the repository in which every exercise is empty. There the
student's function is put into the module that it belongs to, with the helpers that it uses, and the
claims are tried on that module. Each report begins with a random token; what the attempt prints is
none, and what ends the process early, or never ends, proves nothing.

Reading order: `module_with`, `try_claims` and `main` run in the process; `CleanCopy` starts it.
"""
import ast
import contextlib
import faulthandler
import json
import linecache
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[up]) for up in (2, 1)]

from classroom.workspace import HERE, empty_all, find, is_empty

STARTING = 120  # seconds that a busy machine may need to import torch, before the clock starts
DEFINITIONS = ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign
MEMORY = 2 << 30  # bytes beyond what torch takes, where the system can limit it (Linux)


class Unfit(Exception):
    """The attempt cannot be tried; the message says why, in one line."""


# --- in the process ------------------------------------------------------------------------------

def check_written(attempt, exercise):
    """Raise Unfit unless an attempt's file holds its function, with something in it."""
    try:
        node = find(ast.parse(attempt), exercise["function"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise Unfit(f"{exercise['file']}{line}: {type(error).__name__}: {error}") from None
    if node is None:
        raise Unfit(f"there is no {exercise['function']} in {exercise['file']}")
    if is_empty(node, exercise):
        raise Unfit("the function is still empty")


def module_with(attempt, exercise, reference):
    """The module of a file whose exercises are empty, with an attempt's function put in it.

    First the attempt's definitions are made, then those of the reference take their place: what is
    left of the attempt are names that the file did not have, its helpers. Its function comes back
    last, with new methods of its class. Raises Unfit for an attempt that cannot be tried.
    """
    from classroom.checks import load
    check_written(attempt, exercise)
    name = f"your {exercise['file']}"
    linecache.cache[name] = len(attempt), None, attempt.splitlines(True), name  # for `describe`
    module = load(exercise["file"], "")
    for statement in ast.parse(attempt).body:
        if isinstance(statement, DEFINITIONS):
            with contextlib.suppress(Exception):  # whoever needs it will miss it
                exec(compile(ast.Module([statement], []), name, "exec"), vars(module))
    *place, function = exercise["function"].split(".")
    made = dict(vars(getattr(module, *place) if place else module))
    exec(compile(reference, exercise["file"], "exec"), vars(module))
    home = getattr(module, *place) if place else module
    for own, value in made.items():
        if own == function or not hasattr(home, own):
            setattr(home, own, value)
    return module


def try_claims(claims, make, tell):
    """Try each claim on a fresh module; tell(claim=…, held=…, said=…) after each."""
    for claim in claims:
        try:
            claim(make())
            held, said = True, ""
        except BaseException as error:  # SystemExit and whatever skips a test included
            held, said = False, describe(error)
        tell(claim=claim.__name__, held=held, said=said)


def describe(error) -> str:
    """One line: the claim's own diagnosis, or where the attempt failed and with what."""
    message = re.sub(r"\S*<locals>\.", "", " ".join(str(error).split()))[:240]
    if type(error).__name__ == "Broken":
        return message
    frames, where = list(traceback.walk_tb(error.__traceback__)), ""
    for frame, number in frames:
        if (name := frame.f_code.co_filename).startswith("your "):  # the last one counts
            where = f" ({name[5:]}, line {number}{shapes(frame, linecache.getline(name, number))})"
    if isinstance(error, NotImplementedError) and message.startswith("exercise "):
        needed = frames[-1][0].f_code.co_name
        return f"your function needs {needed}, which is empty here: {message}{where}"
    return f"{type(error).__name__}{': ' * bool(message)}{message}{where}"


def shapes(frame, line) -> str:
    """": q [2, 3], k [3, 2]" for the tensors that a line names, else nothing."""
    values = {name: frame.f_locals.get(name) for name in re.findall(r"\w+", line)}
    found = [f"{name} {list(value.shape)}" for name, value in values.items()
             if type(value).__name__ in ("Tensor", "ndarray")]
    return f": {', '.join(found)}" if found else ""


def limit_memory():
    """Where the system can: Linux alone has a limit that suits torch."""
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass


def main():
    job = json.loads(sys.stdin.buffer.read())
    token, channel = job.pop("token"), os.dup(1)
    os.dup2(2, 1)  # what the attempt prints, even from C, is no report
    sys.stdout = sys.stderr

    def tell(**report):
        os.write(channel, f"{token} {json.dumps(report)}\n".encode())
    from classroom import checks, claims_loss, claims_model, claims_training  # noqa: F401
    checks.SEED[0], exercise = job["seed"], job["exercise"]
    reference = Path(exercise["file"]).read_text("utf-8")
    make = lambda: module_with(job["attempt"], exercise, reference)
    checks.load(exercise["file"])  # imports what it needs, before the clock starts
    limit_memory()
    faulthandler.dump_traceback_later(job["seconds"], exit=True)  # whatever then runs is shown
    tell(began=time.time())
    try_claims(checks.CLAIMS[exercise["file"], exercise["function"]], make, tell)


# --- who starts it -------------------------------------------------------------------------------

def claims_by_function() -> dict:
    """{(file, function): names of its claims}, read from the source, which needs no torch."""
    found = {}
    for path in HERE.glob("claims_*.py"):
        for file, function, name in re.findall(r'^@claim\("(.*)", "(.*)"\)\ndef (\w+)',
                                               path.read_text("utf-8"), re.M):
            found.setdefault((file, function), []).append(name)
    return found


class CleanCopy:
    """`with CleanCopy({file: text}) as copy`: a folder with the product, its exercises empty."""
    def __init__(self, reference):
        self.reference = {file: empty_all(text, file) for file, text in reference.items()}
        self.claims = claims_by_function()

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="exercise-"))
        (self.folder / "tests" / "classroom").mkdir(parents=True)
        for path in [*HERE.glob("*.py"), HERE / "exercises.toml"]:
            shutil.copy(path, self.folder / "tests" / "classroom")
        for file, text in self.reference.items():
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text(text, "utf-8")
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder, ignore_errors=True)

    def untried(self, exercise) -> dict:
        """What `judge` returns of an attempt of which nothing is known."""
        names = self.claims[exercise["file"], exercise["function"]]
        return {"claims": [{"claim": name, "held": False, "said": "not tried"} for name in names],
                "said": "", "seconds": 0.0}

    def judge(self, exercise, attempt, seconds, seed="0", quiet=False) -> dict:
        """Try an attempt, the text of its file. Returns {"claims": […], "said": …, "seconds": …}.

        claims has one entry for each claim, tried or not. The seconds, those allowed and those
        taken, do not count the start of Python and torch.
        """
        untried = self.untried(exercise)
        claims = {claim["claim"]: claim for claim in untried["claims"]}
        try:
            check_written(attempt, exercise)
        except Unfit as error:
            return untried | {"said": str(error)}
        token = secrets.token_hex(16)
        job = {"token": token, "exercise": exercise, "attempt": attempt, "seed": seed,
               "seconds": seconds}
        with tempfile.TemporaryFile() as reports:
            process = subprocess.Popen(
                [sys.executable, "-B", "-W", "ignore", "tests/classroom/judge.py"],
                cwd=self.folder, stdin=subprocess.PIPE, stdout=reports, start_new_session=True,
                stderr=subprocess.DEVNULL if quiet else None, env=os.environ | {
                    "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(job).encode(), STARTING + seconds)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                else:
                    process.kill()
            process.wait()
            ended, began = time.time(), 0.0
            reports.seek(0)
            for line in reports:
                mine, _, text = line.partition(b" ")
                if mine == token.encode():  # else the attempt wrote it
                    report = json.loads(text)
                    began = report.get("began", began)
                    if "claim" in report:
                        claims[report["claim"]].update(report)
        taken, said = ended - began if began else 0.0, ""
        if any(claim["said"] == "not tried" for claim in claims.values()):
            said = (f"the process ended in the middle (status {process.returncode}): what ends it "
                    f"proves nothing")
            if taken > seconds:
                said = f"no end after {seconds:.0f} seconds: a loop without end?"
            if not began:
                said = "torch did not start in time: a busy machine?"
        return {"claims": list(claims.values()), "said": said, "seconds": round(taken, 1)}


if __name__ == "__main__":
    main()
