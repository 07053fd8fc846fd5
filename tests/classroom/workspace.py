"""A student's working copy: emptying a function, putting it back, and what shipped.

The first `start` keeps the product's files as they are in tests/classroom/shipped/: those are the
originals from then on, whatever is committed later, with git or without. A hand-out has that folder
from the beginning, with the functions empty. Differences from what shipped are found line by line,
so that everything a student wrote for an exercise goes with it: a decorator, a comment, a helper.
"""
import ast
import difflib
import json
import re
import shutil
import subprocess
from pathlib import Path

from classroom.functions import (TEXTS, decode, emptied, find, is_empty, lines_of, product_files,
                                 room, span, split_name, why)


class Refusal(Exception):
    """A command cannot be carried out; the message says why, in one line."""


class Workspace:
    def __init__(self, root):
        self.root = Path(root)
        self.shipped = self.root / "tests" / "classroom" / "shipped"
        self.handout = self.shipped / "handout.json"

    def handed_out(self) -> list[int] | None:
        """The numbers of the exercises of a hand-out; None in a whole repository."""
        if not self.handout.exists():
            return None
        return json.loads(self.handout.read_text("utf-8"))["exercises"]

    def original(self, path) -> bytes:
        """A file as it shipped: kept by `start`, else from git, else as it is now."""
        if (self.shipped / path).exists():
            return (self.shipped / path).read_bytes()
        now, kept = (self.root / path).read_bytes(), self.from_git(path)
        if kept is None or bare(kept) == bare(now):
            return now
        return kept.replace(b"\n", b"\r\n") if b"\r\n" in now and b"\r\n" not in kept else kept

    def from_git(self, path) -> bytes | None:
        """The file in HEAD; if a commit emptied an exercise in it, the file before that commit."""
        git = lambda *args: subprocess.run(["git", "-C", str(self.root), *args],
                                           capture_output=True, timeout=60)
        try:
            emptied_in = git("log", "--format=%H", '-SNotImplementedError("exercise ', "--", path)
            oldest = emptied_in.stdout.split()[-1:]
            commit = oldest[0].decode() + "~" if oldest else "HEAD"
            shown = git("show", f"{commit}:./{path}")
        except (OSError, subprocess.SubprocessError):
            return None
        return shown.stdout if shown.returncode == 0 else None

    def keep(self):
        """Keep the product's files as they shipped, once."""
        if not self.shipped.exists():
            ours = {split_name(exercise["function"])[0] for exercise in TEXTS}
            originals = {path: self.original(path) if path in ours else
                         (self.root / path).read_bytes() for path in product_files(self.root)}
            for path, data in originals.items():
                (self.shipped / path).parent.mkdir(parents=True, exist_ok=True)
                (self.shipped / path).write_bytes(data)
            (self.shipped / ".gitignore").write_text("*\n", "utf-8")

    def reference(self) -> dict[str, str]:
        """{path: text} of the product as it shipped, if `start` kept it; else as it is now."""
        kept = {path: self.shipped / path for path in product_files(self.root)}
        return {path: decode((file if file.exists() else self.root / path).read_bytes())[0]
                for path, file in kept.items()}

    def part(self, exercise) -> "Part":
        return Part(self, exercise)

    def forget(self):
        """Drop what `start` kept, once every exercise is as it shipped."""
        if not self.handout.exists() and all(self.part(e).is_original() for e in TEXTS):
            shutil.rmtree(self.shipped, ignore_errors=True)


def bare(data) -> list[str]:
    return lines_of(decode(data)[0])


class Part:
    """What belongs to one exercise in its file: the function, and what was written around it."""
    def __init__(self, workspace, exercise):
        self.exercise, (self.path, self.names) = exercise, split_name(exercise["function"])
        self.file = workspace.root / self.path
        if not self.file.exists():
            raise Refusal(f"{self.path} is missing")
        self.shipped_bytes = workspace.original(self.path)
        self.shipped_text = decode(self.shipped_bytes)[0]
        self.data = self.file.read_bytes()
        self.text, self.encoding = decode(self.data)
        self.old, self.new = lines_of(self.shipped_text), lines_of(self.text)
        self.node = find(ast.parse(self.shipped_text), self.names)
        if self.node is None:
            raise Refusal(f"{exercise['function']} is not in {self.path} as it shipped")
        self.span, self.room = span(self.node), room(self.shipped_text, self.names)
        matcher = difflib.SequenceMatcher(None, self.old, self.new, autojunk=False)
        self.changes = [change[1:] for change in matcher.get_opcodes() if change[0] != "equal"]
        self.mine = [change for change in self.changes if self.belongs(change)]

    def within(self, change) -> bool:
        """Whether a change touches the function or the lines up to its neighbours."""
        i1, i2, _, _ = change
        first, end = self.room
        return first <= i1 <= end if i1 == i2 else i1 < end and i2 > first

    def belongs(self, change) -> bool:
        """A change at the function, or lines added elsewhere that only this exercise uses."""
        i1, i2, j1, j2 = change
        touches = i1 < self.span[1] and i2 > self.span[0] if i1 < i2 else (
            self.span[0] < i1 < self.span[1])
        if touches:
            return True
        text = "\n".join(self.new[j1:j2])
        names = re.findall(r"^\s*(?:def|class)\s+(\w+)|^(\w+)\s*=", text, re.M)
        imports = re.findall(r"^(?:from\s+\S+\s+)?import\s+(.+)$", text, re.M)
        added = {name for pair in names for name in pair if name}
        added |= {word for line in imports for word in re.findall(r"\w+", line)}
        uses = lambda changes: any(re.search(rf"\b{name}\b", "\n".join(self.new[c[2]:c[3]]))
                                   for c in changes for name in added)
        others = [c for c in self.changes if c != change]
        here = [c for c in others if self.within(c)]
        far = [c for c in others if not self.within(c)]
        if self.within(change):
            return not (added and uses(far) and not uses(here))
        return i1 == i2 and bool(added) and uses(here) and not uses(far)

    def is_original(self) -> bool:
        return not self.mine

    def is_empty(self) -> bool:
        try:
            node = find(ast.parse(self.text), self.names)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        return node is not None and is_empty(node, self.exercise.get("part"))

    def original_lines(self) -> list[str]:
        return self.old[self.span[0]:self.span[1]]

    def empty(self):
        """Empty the function, which must be the original."""
        stub = emptied(self.shipped_text, self.names, why(self.exercise), self.exercise.get("part"))
        shift = sum((j2 - j1) - (i2 - i1) for i1, i2, j1, j2 in self.changes if i2 <= self.span[0])
        first, end = (i + shift for i in self.span)
        self.write(self.new[:first] + stub + self.new[end:])

    def attempt(self) -> str:
        """All that was written for the exercise, in the order of the file."""
        index = {}  # new line number for each line of the shipped file
        for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(
                None, self.old, self.new, autojunk=False).get_opcodes():
            if tag == "equal":
                index |= dict(zip(range(i1, i2), range(j1, j2)))
        chosen = {j for _, _, j1, j2 in self.mine for j in range(j1, j2)}
        chosen |= {index[i] for i in range(*self.span) if i in index}
        return "\n".join(self.new[j] for j in sorted(chosen)) + "\n"

    def restore(self):
        """Undo this exercise's changes; with none left, the file is what shipped, exactly."""
        lines = list(self.new)
        for i1, i2, j1, j2 in reversed(self.mine):
            lines[j1:j2] = self.old[i1:i2]
        if "\n".join(lines).rstrip() == "\n".join(self.old).rstrip():
            self.file.write_bytes(self.shipped_bytes)
        else:
            self.encoding = "utf-8"
            self.write(lines)

    def write(self, lines):
        """Write lines with the file's own line end."""
        end = "\r\n" if "\r\n" in self.text else "\n"
        self.file.write_bytes(end.join(lines).encode(self.encoding))
