"""One function in a text of Python: where it stands, whether it is empty, the text without it.

Names are those of exercises.toml: "model.Attention.forward" is `forward` of class `Attention` in
model.py, and "data.responses.grow" is `grow` in data/responses.py. Nothing here knows a line of
the code: functions are found by parsing. This file needs no torch.
"""
import ast
import re
import tokenize
import tomllib
from io import BytesIO
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TEXTS = tomllib.loads((TESTS / "classroom" / "exercises.toml").read_text("utf-8"))["exercise"]


def split_name(name) -> tuple[str, list[str]]:
    """"model.Attention.forward" -> ("model.py", ["Attention", "forward"])"""
    parts = name.split(".")
    folders = 2 if parts[0] == "data" else 1
    return "/".join(parts[:folders]) + ".py", parts[folders:]


def decode(data: bytes) -> tuple[str, str]:
    """(text, encoding) of a source file, whatever an editor has made of it; line ends stay."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
                           (b"\xef\xbb\xbf", "utf-8-sig")):
        if data.startswith(mark):
            return data.decode(encoding, "replace"), encoding
    try:
        encoding = tokenize.detect_encoding(BytesIO(data).readline)[0]
        return data.decode(encoding), encoding
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return data.decode("cp1252", "replace"), "cp1252"


def lines_of(text) -> list[str]:
    """The lines of a text as Python counts them, without their ends."""
    return re.split(r"\r\n|\r|\n", text)


def find(tree, names):
    """The node of a function or method, or None. The last definition of a name counts."""
    node = tree
    for name in names:
        node = next((child for child in reversed(node.body)
                     if getattr(child, "name", None) == name), None)
        if node is None:
            return None
    return node if isinstance(node, ast.FunctionDef) else None


def written_part(node, part=None):
    """The statements that an exercise asks for: all after the docstring, or a loop's body."""
    if part == "for":
        node = next((child for child in ast.walk(node) if isinstance(child, ast.For)), None)
        return node.body if node else []
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def is_empty(node, part=None) -> bool:
    """Whether nothing has been written yet: only `raise NotImplementedError`, `pass` or `...`."""
    def says_nothing(statement):
        if isinstance(statement, ast.Raise):
            return "NotImplementedError" in ast.unparse(statement)
        return isinstance(statement, ast.Pass) or (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    written = written_part(node, part)
    if part and not written:  # the loop itself is gone
        return all(map(says_nothing, written_part(node)))
    return all(map(says_nothing, written))


def span(node) -> tuple[int, int]:
    """(first line, line after the last), counted from 0; decorators belong to a function."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return first - 1, node.end_lineno


def room(text, names) -> tuple[int, int]:
    """`span`, and all lines up to the statements before and after the function."""
    lines, parent = lines_of(text), find_parent(ast.parse(text), names)
    siblings = parent.body
    at = siblings.index(find(parent, names[-1:]))
    first, end = span(siblings[at])
    if at > 0:
        before = siblings[at - 1].end_lineno
    else:
        before = parent.lineno if isinstance(parent, ast.ClassDef) else 0
    later = [span(s)[0] for s in siblings[at + 1:at + 2]]
    if not later and isinstance(parent, ast.ClassDef):
        later = [span(s)[0] for s in ast.parse(text).body if s.lineno > parent.end_lineno][:1]
    return min(before, first), max(end, later[0] if later else len(lines))


def find_parent(tree, names):
    for name in names[:-1]:
        tree = next(child for child in tree.body if getattr(child, "name", None) == name)
    return tree


def emptied(text, names, why, part=None) -> list[str]:
    """The lines of the function with `raise NotImplementedError(why)` for what is to be written.

    Signature, decorators and docstring stay; comments between them and the code go with the code.
    """
    lines, node = lines_of(text), find(ast.parse(text), names)
    (first, end), written = span(node), written_part(node, part)
    a, b = written[0].lineno - 1, written[-1].end_lineno
    indent = lines[a][:len(lines[a]) - len(lines[a].lstrip())]
    while a > first and lines[a - 1].lstrip().startswith("#"):
        a -= 1
    message = why.replace("\\", "").replace('"', "'")
    return [*lines[first:a], f'{indent}raise NotImplementedError("{message}")', *lines[b:end]]


def empty_all(text, path, texts=TEXTS) -> str:
    """A file's text without any of the exercises' functions that stand in it."""
    for exercise in texts:
        here, names = split_name(exercise["function"])
        node = find(ast.parse(text), names) if here == path else None
        if node is not None and not is_empty(node, exercise.get("part")):
            lines, (first, end) = lines_of(text), span(node)
            lines[first:end] = emptied(text, names, why(exercise), exercise.get("part"))
            text = "\n".join(lines)
    return text


def prose_without_code(text, reference, exercises) -> str:
    """A text such as README.md without the lines that hold a whole statement of a solution."""
    shown = set()
    for exercise in exercises:
        file, names = split_name(exercise["function"])
        written = written_part(find(ast.parse(reference[file]), names), exercise.get("part"))
        shown |= {ast.unparse(node) for statement in written for node in ast.walk(statement)
                  if isinstance(node, (ast.Assign, ast.Return))
                  and sum(1 for _ in ast.walk(node)) >= 12}
    shows = lambda line: any(code in " ".join(line.split()) for code in shown)
    return "\n".join("(a line of code is left out of the hand-out)" if shows(line) else line
                     for line in text.split("\n"))


def why(exercise) -> str:
    """What an emptied function says when it is called."""
    return f"exercise {TEXTS.index(exercise) + 1}: {exercise['title']}"


def product_files(root) -> list[str]:
    """The Python files of the product, as paths with slashes."""
    found = [*Path(root).glob("*.py"), *Path(root).glob("data/**/*.py")]
    return sorted(path.relative_to(root).as_posix() for path in found)
