"""The house: which file may import which, what lies where, and how a line looks.

Everything is read from the source, with `ast`; no file is imported.
"""
import ast
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VISIBLE = {"README.md", "model.py", "sample.py", "spin_loss.py", "train.py", "data", "tests",
           "requirements.txt"}
PRODUCT = sorted(chain(ROOT.glob("*.py"), ROOT.glob("data/**/*.py")))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
ROOMS = {path.relative_to(ROOT).as_posix() for path in PRODUCT}  # a room is a file
GROUND = {"model.py", "spin_loss.py", "data/errors.py"}  # these import no file of the project
DATA = {room for room in ROOMS if room.startswith("data/") and room.count("/") == 1}
RUN = {room for room in ROOMS if room.startswith("data/run/")}
THEORY = {room for room in ROOMS if room.startswith("data/theory/")}


def name(path):
    return path.relative_to(ROOT).as_posix()


def parsed(path):
    return ast.parse(path.read_text("utf-8"), str(path))


def may_import(room) -> set[str]:
    """The rooms that a file may import: those below it, and its neighbours."""
    if room in GROUND:
        return set()
    if room in THEORY:
        return {"spin_loss.py", "data/errors.py"} | THEORY
    if room in RUN:
        return GROUND | DATA | RUN
    if room in DATA:
        return GROUND | DATA
    if room == "sample.py":
        return GROUND | DATA | RUN
    return ROOMS  # train.py


def imports(path) -> set[str]:
    """The files of the project that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = set()
    for name in names:
        file = Path(*name.split(".")).with_suffix(".py")
        # A file that is also a script finds its neighbours by their bare names.
        for candidate in (ROOT / file, path.parent / file):
            if candidate.is_file() and candidate != path:
                found.add(candidate.relative_to(ROOT).as_posix())
    return found


GRAPH = {name(path): imports(path) for path in PRODUCT}


def test_imports_are_found():
    """Or the tests below would find nothing wrong with anything."""
    assert {"model.py", "spin_loss.py", "sample.py", "data/metrics.py"} <= GRAPH["train.py"]
    assert {"data/tokenizer.py", "data/errors.py"} <= GRAPH["data/world.py"]
    assert "data/instructions.py" in GRAPH["data/tokenizer.py"], "imported as a script"


def test_every_import_points_down():
    for room, below in GRAPH.items():
        upward = below - may_import(room)
        assert not upward, f"{room} imports {', '.join(sorted(upward))}, which stands above it"
    for room, below in GRAPH.items():
        assert "train.py" not in below, f"{room} imports train.py"
        assert "sample.py" not in below or room == "train.py", f"{room} imports sample.py"


def test_no_imports_go_round_in_a_circle():
    finished = set()

    def visit(room, path):
        assert room not in path, " → ".join([*path[path.index(room):], room])
        if room not in finished:
            for below in sorted(GRAPH[room]):
                visit(below, [*path, room])
            finished.add(room)
    for room in GRAPH:
        visit(room, [])


def test_the_house_has_three_folders_and_few_doors():
    assert {path.parent.relative_to(ROOT).as_posix() for path in PRODUCT} == {
        ".", "data", "data/run", "data/theory"}
    doors = sum(map(len, GRAPH.values()))
    assert len(ROOMS) <= 22 and doors <= 60, f"{len(ROOMS)} files, {doors} imports between them"


def test_top_level_holds_what_it_promises():
    written = {"out", "__pycache__"}  # by a run, by Python
    seen = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - written
    assert seen == VISIBLE, f"too much: {seen - VISIBLE}; missing: {VISIBLE - seen}"


def test_no_line_is_longer_than_a_hundred_columns():
    long = [f"{name(path)}:{number} has {len(line)}" for path in PRODUCT + TESTS
            for number, line in enumerate(path.read_text("utf-8").split("\n"), 1)
            if len(line) > 100]
    assert not long, "\n".join(long)


# ---- Algorithm 1 on one screen ------------------------------------------------------------------

def test_main_shows_algorithm_1_in_a_dozen_lines():
    """From SFT's `fit` to the loop's: a visible frozen copy, its responses, training against it."""
    source = (ROOT / "train.py").read_text("utf-8")
    main, = (node for node in ast.parse(source).body if getattr(node, "name", "") == "main")
    calls = [node for node in ast.walk(main) if isinstance(node, ast.Call)]
    lines_of = lambda name: sorted(node.lineno for node in calls
                                   if ast.unparse(node.func) == name)
    sft, self_play = lines_of("fit")
    copied, = lines_of("copy.deepcopy")
    sampled, = lines_of("self_play")
    assert sft < copied < sampled < self_play, (
        "SFT; then a frozen copy, its responses, training against it")
    lines = source.split("\n")[sft - 1:self_play]
    assert len(lines) <= 12 and all(line.strip() for line in lines), "\n".join(lines)
    # Nothing else stands between them: no saving, no timing, no drawing.
    between = {ast.unparse(node.func) for node in calls if sft <= node.lineno <= self_play}
    assert between <= {"fit", "sft_responses", "copy.deepcopy", "self_play", "range",
                       "run.unfinished", "run.policy"}, between


# ---- Everywhere ---------------------------------------------------------------------------------

def opens_text(node) -> bool:
    """Whether a call opens a file as text without naming an encoding."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if any(word.arg in ("encoding", None) for word in node.keywords):
        return False
    if name == "read_text":
        return not node.args
    if name == "write_text":
        return len(node.args) < 2
    if name == "open" and ast.unparse(node.func) in ("open", "io.open"):
        mode = next((word.value for word in node.keywords if word.arg == "mode"),
                    node.args[1] if len(node.args) > 1 else None)
        return not (isinstance(mode, ast.Constant) and "b" in mode.value)
    return False


def test_text_files_are_opened_as_utf_8():
    """A locale without UTF-8 must not decide how a file is read."""
    wrong = [f"{name(path)}:{node.lineno}: {ast.unparse(node)[:70]}" for path in PRODUCT + TESTS
             for node in ast.walk(parsed(path)) if isinstance(node, ast.Call) and opens_text(node)]
    assert not wrong, "no encoding is named in\n" + "\n".join(wrong)


def executed_at_import(node):
    """The nodes of a module that Python evaluates when it is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and child in (
                node.body if isinstance(node.body, list) else [node.body]):
            continue
        yield child
        yield from executed_at_import(child)


def test_nothing_that_only_linux_has_is_needed_at_import():
    modules = {"fcntl", "msvcrt", "resource", "pwd", "grp", "termios", "pty"}
    attributes = {"signal.SIGKILL", "os.fork", "os.killpg", "os.setsid"}
    wrong = []
    for path in PRODUCT + TESTS:
        for node in executed_at_import(parsed(path)):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names} & modules
            elif isinstance(node, ast.ImportFrom):
                names = {node.module} & modules
            elif isinstance(node, ast.Attribute):
                names = {ast.unparse(node)} & attributes
            elif isinstance(node, ast.Constant):
                names = {"forkserver"} if node.value == "forkserver" else set()
            else:
                names = set()
            wrong += [f"{name(path)}:{node.lineno}: {found}" for found in names]
    assert not wrong, "not everywhere:\n" + "\n".join(wrong)
