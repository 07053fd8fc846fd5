"""Runs the claims of one exercise on one attempt; in a process of its own, except in tests.

The attempt's function is taken out of its file, with the helpers that it needs, and put among the
definitions that it needs of the reference file, in which the exercises' functions are empty.
Nothing else of the attempt is run. A claim is a function of checks_*.py: it takes that module and
raises `Broken` with a diagnosis. Functions that belong to other exercises are replaced by stand-ins
of the claims, so that each exercise is judged alone.

As a process (see judge.py) it reads one line of JSON, the job, and reports on its standard output;
each report begins with the job's token, so that nothing else can report. What the attempt prints
goes to standard error.
"""
import ast
import json
import os
import sys
import time
import traceback
import types
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[up]) for up in (2, 1)]

from classroom.functions import find, find_parent, is_empty, split_name
from classroom.rules import broken_rules, forbid_the_rest_of_the_machine

FOREIGN = 1_000_000  # added to the line numbers of the reference: a smaller one is the attempt's
MEMORY = 2 << 30  # bytes beyond what torch itself takes, where the platform can limit it


class Unfit(Exception):
    """The attempt cannot be tried; the message says why, in one line."""


# --- the attempt's function among what it needs --------------------------------------------------

def definitions(tree) -> dict[str, list[ast.stmt]]:
    """{name: the statements of a module that define it}"""
    found = {}
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names = [statement.name]
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names = [a.asname or a.name.split(".")[0] for a in statement.names]
        else:
            names = [n.id for n in ast.walk(statement)
                     if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        for name in names:
            found.setdefault(name, []).append(statement)
    return found


def names_in(node) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def narrowed(statement, wanted):
    """An import of the wanted names alone; other statements as they are."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        statement.names = [a for a in statement.names
                           if (a.asname or a.name.split(".")[0]) in wanted]
    return statement


def read(text, file):
    try:
        tree = ast.parse(text)
        ast.dump(tree)  # a tree too deep to be walked fails here
        return tree
    except SyntaxError as error:
        raise Unfit(f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise Unfit(f"{file} cannot be read as Python: {type(error).__name__}: {error}") from None


def splice(reference, attempt, function, part=None, given=()):
    """The module to try, as a syntax tree, and the names that the claims must give it.

    Raises Unfit for an attempt that cannot be tried. Names in `given` come from the claims. What
    the reference defines, the attempt cannot redefine, unless it is the attempt's version of
    another exercise, which is empty in the reference.
    """
    file, names = split_name(function)
    mine = read(attempt, file)
    written = find(mine, names)
    if written is None:
        raise Unfit(f"there is no {'.'.join(names)} in {file}")
    if is_empty(written, part):
        raise Unfit("the function is still empty")
    ours = read(reference, file)
    given = all_given(ours, find(ours, names), given)
    ast.increment_lineno(ours, FOREIGN)
    place = find_parent(ours, names)
    own = [written]
    if isinstance(place, ast.ClassDef):  # new methods and attributes of the class come along
        theirs = find_parent(mine, names)
        known = {n for s in place.body for n in definitions(ast.Module([s], [])) or [None]}
        new = [s for n, found in definitions(theirs).items() if n not in known for s in found]
        own += [s for s in new if s is not written]
        at = place.body.index(find(ours, names))
        place.body[at:at + 1] = [*own[1:], written]
    else:
        ours.body[ours.body.index(find(ours, names))] = written

    ours_by_name, mine_by_name = definitions(ours), definitions(mine)
    needed, extra, seen = [], [], {(name, by) for name in given for by in (False, True)}
    queue = [(names[0], False)] + [(name, True) for node in own for name in names_in(node)]
    while queue:  # a name, and whether it is the attempt's code that uses it
        name, used_by_attempt = queue.pop()
        if (name, used_by_attempt) in seen:
            continue
        seen.add((name, used_by_attempt))
        found = ours_by_name.get(name, [])
        empty = any(isinstance(s, ast.FunctionDef) and s is not written and is_empty(s)
                    for s in found)
        from_attempt = used_by_attempt and (not found or empty) and name in mine_by_name
        found, into = (mine_by_name[name], extra) if from_attempt else (found, needed)
        for statement in found:
            if statement not in into:
                into.append(statement)
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                queue += [(inner, from_attempt) for inner in names_in(statement)]
    replaced = definitions(ast.Module(extra, []))
    needed = [s for s in needed if getattr(s, "name", None) not in replaced]
    seen = {name for name, _ in seen}
    if wrong := broken_rules([*own, *extra]):
        raise Unfit("; ".join(wrong[:3]))
    body = []
    for statement in ours.body:
        if getattr(statement, "name", None) == names[0]:
            body += [narrowed(s, seen) for s in mine.body if s in extra]
        if statement in needed:
            body.append(narrowed(statement, seen))
    return ast.Module(body, []), given


def all_given(tree, node, given) -> list[str]:
    """`given`, with "*" replaced by every name of the module that the emptied function uses."""
    if "*" not in given:
        return list(given)
    own = {name for name, found in definitions(tree).items()
           if not isinstance(found[0], ast.Import)}
    return sorted((names_in(node) & own | set(given)) - {"*"})


# --- the claims ----------------------------------------------------------------------------------

def try_claims(claims, tree, file, given, tell):
    """Try each claim on a fresh module; tell(claim=…, held=…, said=…, seconds=…) after each."""
    code = compile(ast.fix_missing_locations(tree), file, "exec")
    for name, claim in claims.items():
        began = time.monotonic()
        try:
            module = types.ModuleType("exercise")
            sys.modules["exercise"] = module  # dataclasses look there
            vars(module).update(given)
            exec(code, vars(module))
            claim(module)
            held, said = True, ""
        except BaseException as error:  # SystemExit and whatever skips a test included
            held, said = False, describe(error, file)
        finally:
            sys.modules.pop("exercise", None)
        tell(claim=name, held=held, said=said, seconds=round(time.monotonic() - began, 2))


def describe(error, file) -> str:
    """One line: the claim's own diagnosis, or where the attempt failed and with what."""
    message = " ".join(str(error).split())
    if type(error).__name__ == "Broken":
        return message
    frames = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if f.filename == file and f.lineno < FOREIGN]
    where = f" ({file}, line {own[-1]})" if own else ""
    last = frames[-1] if frames else None
    if isinstance(error, NotImplementedError) and message.startswith("exercise "):
        return f"your function needs {last.name}, which is empty here: {message}{where}"
    if last and own and last.filename == file and last.lineno >= FOREIGN:
        where = f" (in {last.name}, which line {own[-1]} of {file} calls)"
    if isinstance(error, MemoryError) or "allocate memory" in message:
        return f"it ran out of memory{where}"
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return (said[:240] + " …" if len(said) > 240 else said) + where


# --- as a process --------------------------------------------------------------------------------

def limit_memory():
    """Linux alone enforces a limit on a process's memory that suits torch."""
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass


def main():
    job = json.loads(sys.stdin.buffer.readline())
    token, channel = job.pop("token"), os.dup(1)
    os.dup2(2, 1)  # what the attempt prints, even from C, is not a report
    sys.stdout = sys.stderr

    def tell(**report):
        os.write(channel, f"{token} {json.dumps(report)}\n".encode())
    try:
        tree, given = splice(job["reference"], job["attempt"], job["function"], job["part"],
                             job["given"])
        from classroom.checks import claims_of, stand_ins, warm_up
        warm_up(job["seed"])
        claims, given = claims_of(job["function"]), stand_ins(given)
        file = split_name(job["function"])[0]
    except Unfit as error:
        return tell(unfit=str(error))
    limit_memory()
    forbid_the_rest_of_the_machine(os.getcwd())
    tell(ready=True)
    try_claims(claims, tree, file, given, tell)


if __name__ == "__main__":
    main()
