"""An exercise's function in a text of Python, and a student's working copy. Needs no torch.

The first `start` keeps the product's files as they are in tests/classroom/shipped/, which git
ignores: those are the originals from then on, whatever is committed later. A hand-out has that
folder from the beginning, with the functions empty.

Reading order: functions in a text: `find`, `emptied`, `with_mistake` → `Workspace`.
"""
import ast
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXTS = tomllib.loads((HERE / "exercises.toml").read_text("utf-8"))["exercise"]


class Refusal(Exception):
    """A command cannot be carried out; the message says why, in one line."""


# --- one function in a text ----------------------------------------------------------------------

def find(tree, function):
    """The node of "Attention.forward", or None; the last definition of a name counts."""
    node = tree
    for name in function.split("."):
        node = next((child for child in reversed(node.body)
                     if getattr(child, "name", None) == name), None)
        if node is None:
            return None
    return node if isinstance(node, ast.FunctionDef) else None


def written_part(node, exercise) -> list:
    """The statements that an exercise asks for: all after the docstring, or a loop's body."""
    if exercise.get("loop"):
        loop = next((child for child in ast.walk(node) if isinstance(child, ast.For)), None)
        return loop.body if loop else []
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def is_empty(node, exercise) -> bool:
    """Whether nothing has been written yet: only `raise NotImplementedError`, `pass` or `...`."""
    return all(isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(
        s.value, ast.Constant)) or (isinstance(s, ast.Raise) and "NotImplemented" in ast.unparse(s))
        for s in written_part(node, exercise))


def span(text, exercise) -> tuple[int, int]:
    """The function's first line and the line after it, from 0; decorators belong to it."""
    node = find(ast.parse(text), exercise["function"])
    if node is None:
        raise Refusal(f"there is no {exercise['function']} in {exercise['file']}")
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno


def source_of(text, exercise) -> str:
    first, end = span(text, exercise)
    return "".join(text.splitlines(True)[first:end])


def replaced(text, exercise, source) -> str:
    """A text with other lines for an exercise's function."""
    first, end = span(text, exercise)
    lines = text.splitlines(True)
    return "".join([*lines[:first], source, *lines[end:]])


def emptied(text, exercise) -> str:
    """A text in which the function only raises, with signature, decorators and docstring kept."""
    node = find(ast.parse(text), exercise["function"])
    if node is None or is_empty(node, exercise):
        return text
    written, lines = written_part(node, exercise), text.splitlines(True)
    first, end = written[0].lineno - 1, written[-1].end_lineno
    indent = lines[first][:written[0].col_offset]
    while lines[first - 1].lstrip().startswith("#"):  # comments go with the code
        first -= 1
    n, function = TEXTS.index(exercise) + 1, exercise["function"]
    why = f"exercise {n}: {function} is still to be written"
    return "".join([*lines[:first], f'{indent}raise NotImplementedError("{why}")\n', *lines[end:]])


def empty_all(text, file, exercises=TEXTS) -> str:
    """A file's text without any of the exercises' functions."""
    for exercise in exercises:
        if exercise["file"] == file:
            text = emptied(text, exercise)
    return text


def catalogue() -> dict:
    """{"file function": {"wrong": […], "right": …}}: mistakes.toml, which no hand-out has."""
    return tomllib.loads((HERE / "mistakes.toml").read_text("utf-8"))


def with_mistake(text, function, wrong) -> str:
    """A file's text with one mistake of the catalogue: in a function, or for "" anywhere."""
    exercise = {"file": "the file", "function": function}
    source = source_of(text, exercise) if function else text
    for old, new in ((wrong["old"], wrong["new"]), wrong.get("also", ("", ""))):
        assert source.count(old) == 1 or not old, f"{old!r} is not there once: renew the catalogue"
        source = source.replace(old, new) if old else source
    return replaced(text, exercise, source) if function else source


# --- a working copy ------------------------------------------------------------------------------

def read(path) -> str:
    """A source file; Refusal if it is missing or not UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise Refusal(f"{path.name} is missing, or not saved as UTF-8") from None


class Workspace:
    """A repository or a hand-out in which exercises are done."""
    def __init__(self, root):
        self.root, self.shipped = Path(root), Path(root) / "tests" / "classroom" / "shipped"

    def files(self) -> list[str]:
        """The Python files of the product, and the exercises' own one, as paths with slashes."""
        found = [*self.root.glob("*.py"), *self.root.glob("data/**/*.py"),
                 self.root / "tests" / "classroom" / "variants.py"]
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def keep(self):
        """Keep the files as they shipped, once."""
        if not self.shipped.exists():
            for file in self.files():
                kept = self.shipped / file
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes((self.root / file).read_bytes())
            (self.shipped / ".gitignore").write_text("*\n", "utf-8")

    def reference(self) -> dict[str, str]:
        """{file: text} as it shipped, or as it is now where nothing was started yet."""
        place = self.shipped if self.shipped.exists() else self.root
        return {file: read(place / file) for file in self.files()}

    def original(self, exercise) -> str:
        """The function's lines as it shipped."""
        place = self.shipped if self.shipped.exists() else self.root
        return source_of(read(place / exercise["file"]), exercise)

    def handed_out(self) -> list[int]:
        """The numbers of the exercises that shipped empty: those of a hand-out."""
        reference = self.reference()
        return [n for n, e in enumerate(TEXTS, 1)
                if is_empty(find(ast.parse(reference[e["file"]]), e["function"]), e)]

    def text(self, exercise) -> str:
        """The file as it is now."""
        return read(self.root / exercise["file"])

    def write(self, exercise, text):
        (self.root / exercise["file"]).write_text(text, "utf-8", newline="\n")
