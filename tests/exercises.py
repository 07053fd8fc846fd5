"""Exercises that grade themselves: empty one function of this repository and write it again.

    python tests/exercises.py list                all of them, in teaching order; `list 4`: the task
    python tests/exercises.py start 4             empties one function in your working copy
    python tests/exercises.py check 4             runs the tests of that exercise alone
    python tests/exercises.py hint 4              one hint more each time
    python tests/exercises.py show 4              the original
    python tests/exercises.py restore 4           puts the original back and keeps your attempt

The original is the function in git's HEAD. Nothing else is touched, and a function that differs
from HEAD is not emptied, so no work is lost. Attempts are kept in out/attempts/, hints taken and
exercises solved in out/exercises.json (both ignored by git). The texts stand in exercises.toml.
"""
import argparse
import json
import sys
import textwrap
import tomllib
from pathlib import Path

from blank import Function, refuse

ROOT = Path(__file__).resolve().parents[1]
NOTES = ROOT / "out" / "exercises.json"
EXERCISES = tomllib.loads((ROOT / "tests" / "exercises.toml").read_text("utf-8"))["exercise"]


def function(n) -> Function:
    """The function that exercise n is about."""
    text = EXERCISES[n - 1]
    return Function(ROOT, text["function"], f"exercise {n}: {text['title']}")


def notes(n, **change):
    """What out/exercises.json remembers of exercise n, after a change to it."""
    known = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    if change:
        known[str(n)] = known.get(str(n), {}) | change
        NOTES.parent.mkdir(exist_ok=True)
        NOTES.write_text(json.dumps(known, indent=1))
    return known.get(str(n), {})


def list_(n):
    if n is None:
        for n, text in enumerate(EXERCISES, 1):
            print(f"{n:>2} {text['minutes']:>3} min  {text['function']:<29} {text['title']}"
                  + "  ✓ solved" * notes(n).get("solved", False))
        return
    text = EXERCISES[n - 1]
    print(f"Exercise {n}, {text['function']}: {text['title']} ({text['minutes']} minutes)\n")
    for part in (text["learn"], text["equation"], text["task"]):
        print(textwrap.indent(textwrap.fill(part, 92), "    "), end="\n\n")
    print(f"Then: python tests/exercises.py check {n} (or hint {n}, show {n}, restore {n})")


def start(n):
    it = function(n)
    if it.now() == it.stub:
        refuse(f"exercise {n} is started already; `list {n}` is its task, `restore {n}` ends it")
    if it.now() != it.original:
        refuse(f"{it.name} differs from git's HEAD; `restore {n}` keeps it aside and puts the "
               f"original back")
    it.put(it.stub)
    list_(n)


def hint(n):
    hints, taken = EXERCISES[n - 1]["hints"], notes(n).get("hints", 0) + 1
    for i, text in enumerate(hints[:taken], 1):
        print(f"Hint {i} of {len(hints)}: {text}")
    if taken > len(hints):
        print(f"That was the last; `show {n}` prints the original.")
    notes(n, hints=min(taken, len(hints)))


def check(n):
    from teller import tell  # here, as nothing else needs pytest
    it = function(n)
    try:
        compile(b"".join(it.here), it.path.name, "exec")
    except SyntaxError as error:
        sys.exit(print(f"  ✗ {it.path.name}, line {error.lineno}: SyntaxError: {error.msg}") or 1)
    held, broken = tell(ROOT, EXERCISES[n - 1]["tests"])
    if broken:
        print(f"{broken} of {held + broken} claims do not hold yet; `hint {n}` helps")
        sys.exit(1)
    if it.now() == it.original:
        return print(f"{held} of {held} claims hold, of the original; `start {n}` empties it")
    notes(n, solved=True)
    print(f"{held} of {held} claims hold: solved. Compare with `show {n}`; `restore {n}` "
          f"keeps yours too")


def show(n):
    print(b"".join(function(n).original).decode(), end="")


def restore(n):
    it, folder = function(n), ROOT / "out" / "attempts"
    if it.now() == it.original:
        refuse(f"{it.name} is the original; there is nothing to restore")
    folder.mkdir(parents=True, exist_ok=True)
    count = len(list(folder.glob(f"{n:02d}_*"))) + 1
    attempt = folder / f"{n:02d}_{it.names[-1]}_{count}.py"
    attempt.write_bytes(b"".join(it.now()))
    it.put(it.original)
    print(f"{it.name} is the original again; your attempt is in {attempt}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = dict(list=list_, start=start, hint=hint, check=check, show=show, restore=restore)
    parser.add_argument("command", choices=commands)
    parser.add_argument("number", nargs="?", help=f"of the exercise, 1 to {len(EXERCISES)}")
    args, n = parser.parse_args(), None
    if args.number is not None or args.command != "list":
        n = int(args.number) if str(args.number).isdecimal() else 0
        if not 1 <= n <= len(EXERCISES):
            refuse(f"{args.command} needs a number from 1 to {len(EXERCISES)}; `list` shows them")
    commands[args.command](n)
