"""The house: which file may import which, what lies where, how a line looks; the doctests run."""
import ast
import doctest
import importlib
import re
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VISIBLE = {"README.md", "model.py", "sample.py", "spin_loss.py", "train.py", "data", "tests",
           "requirements.txt"}
PRODUCT = sorted(chain(ROOT.glob("*.py"), ROOT.glob("data/**/*.py")))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
TEXTS = sorted(path for path in chain(
    PRODUCT, TESTS, *(ROOT.glob(pattern) for pattern in (
        "*.md", "*.txt", ".*", "data/*.md", "tests/**/*.md", "tests/**/*.toml", ".ci/*",
        ".github/workflows/*"))) if path.is_file())


def name(path):
    return path.relative_to(ROOT).as_posix()


def parsed(path):
    return ast.parse(path.read_text("utf-8"), str(path))


def imported(path) -> set[str]:
    """The modules that a file imports, wherever in it: "data.world", and "data.world.World" too."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def rooms_of(names) -> set[str]:
    """The files of the project among some modules; a package is its __init__.py."""
    places = [place for module in names for place in (
        ROOT / Path(*module.split(".")).with_suffix(".py"),
        ROOT / Path(*module.split(".")) / "__init__.py")]
    return {name(place) for place in places if place.is_file()}


GRAPH = {name(path): rooms_of(imported(path)) - {name(path)} for path in PRODUCT}
GROUND = {"model.py", "spin_loss.py", "data/__init__.py"}  # these import no file of the project
DATA = {room for room in GRAPH if room.startswith("data/") and room.count("/") == 1}
RUN = {room for room in GRAPH if room.startswith("data/run/")}


def may_import(room) -> set[str]:
    """The files that a file may import: those below it, and its neighbours."""
    if room in GROUND:
        return set()
    if room == "data/theory.py":
        return GROUND - {"model.py"}
    if room in DATA:
        return GROUND | DATA - {"data/theory.py"}
    if room in RUN | {"sample.py"}:
        return GROUND | DATA | RUN - {"data/theory.py"}
    return GRAPH.keys() - {"data/theory.py"}  # train.py


# ---- Files --------------------------------------------------------------------------------------

def test_top_level_holds_what_it_promises():
    written = {"out", "__pycache__"}  # by a run, by Python
    seen = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - written
    assert seen == VISIBLE, f"too much: {seen - VISIBLE}; missing: {VISIBLE - seen}"


def test_data_is_a_package_of_one_floor_and_the_rooms_of_a_run():
    assert (ROOT / "data" / "__init__.py").is_file(), "or another package of that name is imported"
    assert {path.parent.relative_to(ROOT).as_posix() for path in PRODUCT} == {
        ".", "data", "data/run"}
    assert len(GRAPH) <= 19 and sum(map(len, GRAPH.values())) <= 65, "files, and imports"


def test_every_import_points_down():
    assert {"model.py", "data/metrics.py"} <= GRAPH["data/run/folder.py"] | GRAPH["train.py"]
    assert "data/__init__.py" in GRAPH["data/world.py"], "imports are not found"
    for room, below in GRAPH.items():
        upward = below - may_import(room)
        assert not upward, f"{room} imports {', '.join(sorted(upward))}, which stands above it"


def reached(room) -> set[str]:
    """All that a file imports, and what that imports."""
    return {room}.union(*map(reached, GRAPH[room]))


def test_sampling_imports_no_matplotlib():
    drawing = {name(path) for path in PRODUCT if any(
        module.split(".")[0] == "matplotlib" for module in imported(path))}
    assert drawing == {"data/run/figures.py", "data/theory.py"}
    assert not reached("sample.py") & drawing


def test_four_packages_are_enough_and_each_version_is_pinned():
    modules = set().union(*map(imported, PRODUCT))
    packages = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert packages - {"data", *(path.stem for path in ROOT.glob("*.py"))} == {
        "torch", "tiktoken", "numpy", "matplotlib"}
    pinned = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert all(re.fullmatch(r"[\w-]+==\d[\w.]*", line) for line in pinned), pinned
    assert {line.split("=")[0] for line in pinned} >= {"torch", "tiktoken", "numpy", "matplotlib",
                                                      "pytest"}


# ---- Lines --------------------------------------------------------------------------------------

def test_no_line_of_code_is_longer_than_a_hundred_columns():
    long = [f"{name(path)}:{number} has {len(line)}" for path in PRODUCT + TESTS
            for number, line in enumerate(path.read_text("utf-8").split("\n"), 1)
            if len(line) > 100]
    assert not long, "\n".join(long)


def test_no_file_names_this_machine_or_a_registry():
    words = [rf"{re.escape(str(folder))}\b" for folder in (ROOT, Path.home(), Path(sys.prefix))
             if len(folder.parts) > 1]
    pattern = re.compile("|".join([*(rf"(?<![\w.]){word}" for word in words),
                                   "index-" + "url", "PIP_" + "INDEX"]))
    found = [f"{name(path)}: {hit[0]}" for path in TEXTS
             if (hit := pattern.search(path.read_text("utf-8")))]
    assert not found, found


def opens_text(node) -> bool:
    """Whether a call opens a file as text without naming an encoding."""
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if any(word.arg in ("encoding", None) for word in node.keywords):
        return False
    if called in ("read_text", "write_text"):
        return len(node.args) < (1 if called == "read_text" else 2)
    if called == "open" and ast.unparse(node.func) in ("open", "io.open"):
        mode = next((word.value for word in node.keywords if word.arg == "mode"),
                    node.args[1] if len(node.args) > 1 else None)
        return not (isinstance(mode, ast.Constant) and "b" in mode.value)
    return False


def test_text_files_are_opened_as_utf_8():
    """A locale without UTF-8 must not decide how a file is read."""
    wrong = [f"{name(path)}:{node.lineno}: {ast.unparse(node)[:70]}" for path in PRODUCT + TESTS
             for node in ast.walk(parsed(path)) if isinstance(node, ast.Call) and opens_text(node)]
    assert not wrong, "no encoding is named in\n" + "\n".join(wrong)


def test_nothing_that_only_linux_has_is_imported_at_once():
    for path in PRODUCT + TESTS:
        at_once = {ast.unparse(node) for node in parsed(path).body
                   if isinstance(node, (ast.Import, ast.ImportFrom))}
        assert not [line for line in at_once if re.search(
            r"\b(fcntl|msvcrt|resource|pwd|grp|termios|pty)\b", line)], path


# ---- Examples in docstrings ---------------------------------------------------------------------

@pytest.mark.parametrize("path", [path for path in PRODUCT if ">>> " in path.read_text("utf-8")],
                         ids=name)
def test_examples_in_docstrings_give_what_they_say(path):
    module = importlib.import_module(name(path).removesuffix(".py").replace("/", "."))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
