"""Exercises that grade themselves: empty one function of this repository and write it again.

    python tests/exercises.py list                all of them, in teaching order; `list 4`: the task
    python tests/exercises.py start 4             empties one function in your working copy
    python tests/exercises.py check 4             tries its claims, on that function alone
    python tests/exercises.py hint 4              one hint more each time
    python tests/exercises.py show 4              the original
    python tests/exercises.py restore 4           puts the original back and keeps your attempt

For instructors (tests/classroom/README.md says more):

    python tests/exercises.py handout FOLDER [--exercises 1-8,12]
    python tests/exercises.py grade FOLDER... [--exercises 1-8,12] [--json out.json] [--minutes 2]

Attempts are kept in out/attempts/, hints taken and exercises solved in out/exercises.json.
"""
import argparse
import ast
import json
import os
import secrets
import sys
import textwrap
from pathlib import Path

from classroom import grading
from classroom.judge import CleanCopy
from classroom.workspace import (TEXTS, Refusal, Workspace, emptied, find, is_empty, replaced,
                                 source_of)

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 30  # for a `check`, beyond the start of torch


def notes(n, **change):
    """What out/exercises.json remembers of exercise n, after a change to it."""
    path = ROOT / "out" / "exercises.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if change:
        known[str(n)] = known.get(str(n), {}) | change
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(known, indent=1), "utf-8")
    return known.get(str(n), {})


# --- one exercise --------------------------------------------------------------------------------

def list_(n, args):
    if n is None:
        handed = Workspace(ROOT).handed_out()
        for n, text in enumerate(TEXTS, 1):
            if n in handed or not handed:
                print(f"{n:>2} {text['minutes']:>3} min  {text['function']:<24} {text['title']}"
                      + "  ✓ solved" * bool(notes(n).get("solved")))
        return
    text = TEXTS[n - 1]
    print(f"Exercise {n}, {text['function']} in {text['file']}: {text['title']} "
          f"({text['minutes']} minutes)\n")
    for part in (text["learn"], text["equation"], text["task"]):
        print(textwrap.indent(textwrap.fill(part, 92), "    ") + "\n")
    print(f"Then: python tests/exercises.py check {n} (or hint {n}, show {n}, restore {n})")


def start(n, args):
    workspace, exercise = Workspace(ROOT), TEXTS[n - 1]
    text = workspace.text(exercise)
    if is_empty(find(ast.parse(text), exercise["function"]), exercise):
        raise Refusal(f"exercise {n} is started already; `list {n}` is its task, `restore {n}` "
                      f"ends it")
    if source_of(text, exercise) != workspace.original(exercise):
        raise Refusal(f"{exercise['function']} differs from what shipped; `restore {n}` keeps your "
                      f"version aside and puts the original back")
    workspace.keep()
    workspace.write(exercise, emptied(text, exercise))
    list_(n, args)


def hint(n, args):
    hints, taken = TEXTS[n - 1]["hints"], notes(n).get("hints", 0) + 1
    for i, text in enumerate(hints[:taken], 1):
        print(f"Hint {i} of {len(hints)}: {text}")
    if taken > len(hints):
        print(f"That was the last; `show {n}` prints the original.")
    notes(n, hints=min(taken, len(hints)))


def check(n, args):
    workspace, exercise = Workspace(ROOT), TEXTS[n - 1]
    with CleanCopy(workspace.reference()) as clean:
        result = clean.judge(exercise, workspace.text(exercise), SECONDS)
    for claim in result["claims"]:
        print(f"  {'✓' if claim['held'] else '✗'} {claim['claim'].replace('_', ' ')}")
        if claim["said"] not in ("", "not tried"):
            print(f"      {claim['said']}")
    if result["said"]:
        print(f"  ✗ {result['said']}")
    held, count = sum(claim["held"] for claim in result["claims"]), len(result["claims"])
    if held < count:
        print(f"{held} of {count} claims hold; `hint {n}` helps")
        sys.exit(1)
    if source_of(workspace.text(exercise), exercise) == workspace.original(exercise):
        return print(f"All {count} claims hold, of the original; `start {n}` empties it")
    notes(n, solved=True)
    print(f"{held} of {count} claims hold: solved. Compare with `show {n}`; `restore {n}` keeps "
          f"yours too")


def show(n, args):
    if n in Workspace(ROOT).handed_out():
        raise Refusal(f"exercise {n} was handed out empty: your instructor has the original")
    print(Workspace(ROOT).original(TEXTS[n - 1]))


def restore(n, args):
    workspace, exercise, folder = Workspace(ROOT), TEXTS[n - 1], ROOT / "out" / "attempts"
    text, original = workspace.text(exercise), workspace.original(exercise)
    try:
        mine = source_of(text, exercise)
        whole = replaced(text, exercise, original)
    except (SyntaxError, Refusal):  # no function is to be found: the whole file is the attempt
        mine, whole = text, workspace.reference()[exercise["file"]]
    if mine == original:
        raise Refusal(f"{exercise['function']} is the original; there is nothing to restore")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{n:02d}_{exercise['function'].split('.')[-1]}"
    kept = folder / f"{name}_{len(list(folder.glob(f'{name}_*'))) + 1}.py"
    kept.write_text(mine, "utf-8")
    workspace.write(exercise, whole)
    print(f"{exercise['function']} is the original again; your attempt is in "
          f"{kept.relative_to(ROOT).as_posix()}" + (
              "" if mine != text else f", all of {exercise['file']}: Python could not read it"))


# --- a class -------------------------------------------------------------------------------------

def chosen(args) -> list[int]:
    if args.exercises:
        return grading.numbers(args.exercises)
    return Workspace(ROOT).handed_out() or list(range(1, len(TEXTS) + 1))


def handout(n, args):
    if len(args.what) != 1:
        raise Refusal("handout needs one folder to write to")
    files = grading.hand_out(ROOT, args.what[0], chosen(args), Workspace(ROOT).reference())
    print(f"{files} files in {args.what[0]}: exercises {', '.join(map(str, chosen(args)))} are "
          f"empty there. Students run: python tests/exercises.py list")


def grade(n, args):
    if not args.what or not 0 < args.minutes < 1e4 or args.jobs < 1:
        raise Refusal("grade needs the folders of the submissions, or a folder that holds them; "
                      "--minutes and --jobs must be more than 0")
    found = grading.submissions(args.what)
    row = lambda name, *cells: print(f"{name:<24}" + "".join(f"{c:>7}" for c in cells), flush=True)
    row("exercise", *chosen(args), "points")

    def saying(result):
        row(result["name"], *(f"{e['points']}/{e['of']}" for e in result["exercises"]),
            result["points"])
        return result
    seed = args.seed or secrets.token_hex(8)
    results = grading.grade(found, chosen(args), Workspace(ROOT).reference(), args.minutes,
                            args.jobs, seed, saying)
    for result in results:
        for line in grading.remarks(result):
            print(f"{result['name']}, exercise {line}")
    if args.json:
        text = json.dumps({"seed": seed, "submissions": results}, indent=1, ensure_ascii=False)
        Path(args.json).write_text(text + "\n", "utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = dict(list=list_, start=start, hint=hint, check=check, show=show, restore=restore,
                    handout=handout, grade=grade)
    parser.add_argument("command", choices=commands)
    parser.add_argument("what", nargs="*", help=f"an exercise, 1 to {len(TEXTS)}; for handout and "
                        f"grade, folders")
    parser.add_argument("--exercises", help="which ones: 1-8,12")
    parser.add_argument("--json", help="also write the grades to this file")
    parser.add_argument("--minutes", type=float, default=2.0,
                        help="how long one submission's functions may run, all together")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                        help="submissions graded at a time")
    parser.add_argument("--seed", help="of the claims' random inputs; the default is a new one")
    args, n = parser.parse_args(argv), None
    try:
        if args.command not in ("handout", "grade") and (args.what or args.command != "list"):
            n = int(args.what[0]) if len(args.what) == 1 and args.what[0].isdecimal() else 0
            if not 1 <= n <= len(TEXTS):
                raise Refusal(f"{args.command} needs a number from 1 to {len(TEXTS)}; `list` shows "
                              f"them")
        commands[args.command](n, args)
        sys.stdout.flush()
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except SyntaxError as error:
        sys.exit(f"exercises.py: a file cannot be read as Python: {error}")
    except (Refusal, OSError) as error:
        sys.exit(f"exercises.py: {error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without λ shows ?
    main()
