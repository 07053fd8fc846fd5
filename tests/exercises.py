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
import json
import os
import secrets
import sys
import textwrap
from pathlib import Path

from classroom.functions import TEXTS, split_name
from classroom.workspace import Refusal, Workspace

ROOT = Path(__file__).resolve().parents[1]
NOTES = ROOT / "out" / "exercises.json"
SECONDS = 30  # for a `check`, beyond the start of torch
PLAIN = str.maketrans({"✓": "+", "✗": "x", "−": "-", "≤": "<=", "≥": ">=", "λ": "lambda", "μ": "mu",
                       "θ": "theta", "Σ": "Sum", "√": "sqrt", "…": "...", "₊": "+", "₋": "-",
                       "←": "<-", "∝": "~", "ℓ": "l", "½": "1/2", "’": "'", "→": "->"})


def say(text="", end="\n", file=None):
    """Print, on any terminal: what it cannot show is written in plain letters."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(PLAIN).encode(encoding, "replace").decode(encoding)
    except LookupError:
        pass
    print(text, end=end, file=file, flush=True)


def refuse(why):
    """One line on standard error and exit status 2."""
    say(f"exercises.py: {' '.join(str(why).split())}", file=sys.stderr)
    sys.exit(2)


def notes(n, **change):
    """What out/exercises.json remembers of exercise n, after a change to it."""
    try:
        known = json.loads(NOTES.read_text("utf-8")) if NOTES.exists() else {}
        if not all(isinstance(entry, dict) for entry in known.values()):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        broken = NOTES.with_suffix(".broken")
        os.replace(NOTES, broken)
        say(f"exercises.py: out/exercises.json could not be read and is {broken.name} now; hints "
            f"and solved exercises are counted anew", file=sys.stderr)
        known = {}
    if change:
        known[str(n)] = known.get(str(n), {}) | change
        NOTES.parent.mkdir(exist_ok=True)
        NOTES.write_text(json.dumps(known, indent=1), "utf-8")
    return known.get(str(n), {})


# --- one exercise --------------------------------------------------------------------------------

def list_(n, args):
    if n is None:
        handed = Workspace(ROOT).handed_out()
        for n, text in enumerate(TEXTS, 1):
            if handed is None or n in handed:
                solved = "  ✓ solved" * bool(notes(n).get("solved", False))
                say(f"{n:>2} {text['minutes']:>3} min  {text['function']:<33} "
                    f"{text['title']}{solved}")
        return
    text = TEXTS[n - 1]
    say(f"Exercise {n}, {text['function']}: {text['title']} ({text['minutes']} minutes)\n")
    for part in (text["learn"], text["equation"], text["task"]):
        say(textwrap.indent(textwrap.fill(part, 92), "    ") + "\n")
    say(f"Then: python tests/exercises.py check {n} (or hint {n}, show {n}, restore {n})")


def start(n, args):
    workspace = Workspace(ROOT)
    part = workspace.part(TEXTS[n - 1])
    if part.is_empty():
        refuse(f"exercise {n} is started already; `list {n}` is its task, `restore {n}` ends it")
    if not part.is_original():
        refuse(f"{part.names[-1]} in {part.path} differs from what shipped; `restore {n}` keeps "
               f"your version aside and puts the original back")
    workspace.keep()
    part.empty()
    list_(n, args)


def hint(n, args):
    hints, taken = TEXTS[n - 1]["hints"], notes(n).get("hints", 0) + 1
    for i, text in enumerate(hints[:taken], 1):
        say(f"Hint {i} of {len(hints)}: {text}")
    if taken > len(hints):
        say(f"That was the last; `show {n}` prints the original.")
    notes(n, hints=min(taken, len(hints)))


def check(n, args):
    from classroom.judge import CleanCopy  # here, as nothing else needs it
    workspace, exercise = Workspace(ROOT), TEXTS[n - 1]
    part = workspace.part(exercise)
    with CleanCopy(workspace.reference()) as clean:
        result = clean.judge(exercise, part.text, SECONDS, saying=say_claim)
    claims = result["claims"]
    held = sum(claim["held"] for claim in claims)
    if result["said"]:
        say(f"  ✗ {result['said']}")
    elif part.encoding not in ("utf-8", "utf-8-sig", "ascii"):
        say(f"    {part.path} is not saved as UTF-8: Python itself may not read it")
    theirs = [change for e in TEXTS if split_name(e["function"])[0] == part.path
              for change in workspace.part(e).mine]
    others = [change for change in part.changes if change not in theirs]
    if held < len(claims):
        if others:
            line = others[0][2] + 1
            say(f"    {part.path} differs from what shipped elsewhere too, at line {line}: the "
                f"check does not use that")
        say(f"{held} of {len(claims)} claims hold; `hint {n}` helps")
        sys.exit(1)
    if part.is_original():
        return say(f"{held} of {held} claims hold, of the original; `start {n}` empties it")
    notes(n, solved=True)
    say(f"{held} of {held} claims hold: solved. Compare with `show {n}`; `restore {n}` "
        f"keeps yours too")


def say_claim(claim):
    say(f"  {'✓' if claim['held'] else '✗'} {claim['claim'].replace('_', ' ')}"
        + (f"\n      {claim['said']}" if claim["said"] else ""))


def show(n, args):
    workspace = Workspace(ROOT)
    if n in (workspace.handed_out() or []):
        refuse(f"exercise {n} was handed out empty: your instructor has the original")
    say("\n".join(workspace.part(TEXTS[n - 1]).original_lines()))


def restore(n, args):
    workspace = Workspace(ROOT)
    part, folder = workspace.part(TEXTS[n - 1]), ROOT / "out" / "attempts"
    if part.is_original():
        refuse(f"{TEXTS[n - 1]['function']} is the original; there is nothing to restore")
    folder.mkdir(parents=True, exist_ok=True)
    count = len(list(folder.glob(f"{n:02d}_*"))) + 1
    attempt = folder / f"{n:02d}_{part.names[-1]}_{count}.py"
    attempt.write_text(part.attempt(), "utf-8", newline="\n")
    part.restore()
    workspace.forget()
    say(f"{TEXTS[n - 1]['function']} is the original again; your attempt is in "
        f"{attempt.relative_to(ROOT).as_posix()}")


# --- a class -------------------------------------------------------------------------------------

def chosen_numbers(args, workspace) -> list[int]:
    from classroom.grading import numbers
    if args.exercises:
        return numbers(args.exercises)
    return workspace.handed_out() or list(range(1, len(TEXTS) + 1))


def handout(n, args):
    from classroom.grading import hand_out
    workspace = Workspace(ROOT)
    if len(args.what) != 1:
        refuse("handout needs one folder to write to")
    chosen = chosen_numbers(args, workspace)
    files = hand_out(ROOT, args.what[0], chosen, workspace.reference())
    say(f"{files} files in {args.what[0]}: exercises {', '.join(map(str, chosen))} are empty "
        f"there. Students run: python tests/exercises.py list")


def grade(n, args):
    from classroom import grading
    workspace = Workspace(ROOT)
    if not args.what:
        refuse("grade needs the folders of the submissions, or a folder that holds them")
    chosen, seed = chosen_numbers(args, workspace), args.seed or secrets.token_hex(8)
    if not 0 < args.minutes < 1e4 or args.jobs < 1:
        refuse("--minutes and --jobs must be more than 0")
    width = max([12, *(len(f.resolve().name) for f in grading.submissions(args.what))]) + 2
    say(grading.table_row(["exercise", *chosen, "points"], width))

    def saying(result):
        points = [f"{e['points']}/{e['of']}" for e in result["exercises"]]
        say(grading.table_row([result["name"], *points, f"{result['points']}"], width))
    results = grading.grade(args.what, chosen, workspace.reference(), args.minutes, args.jobs, seed,
                            saying)
    for result in results:
        for line in grading.remarks(result):
            say(f"{result['name']}, exercise {line}")
    if args.json:
        grading.write_json(args.json, results, seed)


class Parser(argparse.ArgumentParser):
    """argparse, with one line on an error and a help that any terminal can show."""
    def error(self, message):
        refuse(message)

    def print_help(self, file=None):
        say(self.format_help(), file=file)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    if args.command not in ("handout", "grade") and (args.what or args.command != "list"):
        n = int(args.what[0]) if len(args.what) == 1 and args.what[0].isdecimal() else 0
        if not 1 <= n <= len(TEXTS):
            refuse(f"{args.command} needs a number from 1 to {len(TEXTS)}; `list` shows them")
    try:
        commands[args.command](n, args)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say("exercises.py: stopped", file=sys.stderr)
        sys.exit(130)
    except (Refusal, OSError) as error:
        refuse(error)
    except SyntaxError as error:
        refuse(f"a file of the product cannot be read as Python: {error}")


if __name__ == "__main__":
    main()
