"""tests/exercises.py: right attempts are solved, idle ones are not; nothing of a student's is lost.

Commands run in copies of the working tree, as functions where a process is not what is tested. What
is said of wrong attempts is shown by test_mistakes.py.
"""
import ast
import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest

import exercises as tool
from classroom import checks, claims_loss, claims_model, claims_training  # noqa: F401 (register)
from classroom.grading import handed_files, numbers
from classroom.judge import CleanCopy, module_with, try_claims
from classroom.workspace import (TEXTS, Workspace, catalogue, empty_all, find, is_empty, source_of,
                                 written_part)

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Workspace(ROOT).reference()
EMPTY = {file: empty_all(text, file) for file, text in REFERENCE.items()}
NUMBERS = {text["function"]: n for n, text in enumerate(TEXTS, 1)}
RIGHT = [catalogue()[f"{text['file']} {text['function']}"]["right"].strip("\n") for text in TEXTS]
each = pytest.mark.parametrize("n", NUMBERS.values(), ids=list(NUMBERS))


def filled(text, n, body) -> str:
    """A file's text with `body` in the place of exercise n's `raise`."""
    (stub, indent), = re.findall(rf'^(( *)raise NotImplementedError\("exercise {n}: .*)$', text,
                                 re.M)
    lines = [indent + line if line else line for line in body.split("\n")]
    return text.replace(stub, "\n".join(lines))


def tried(n, text) -> list[str]:
    """What the claims of exercise n say of an attempt, the text of its file, in this process."""
    exercise, reports = TEXTS[n - 1], []
    make = lambda: module_with(text, exercise, EMPTY[exercise["file"]])
    try_claims(checks.CLAIMS[exercise["file"], exercise["function"]], make,
               lambda **report: reports.append(report))
    return [report["said"] for report in reports if not report["held"]]


def tried_body(n, body):
    return tried(n, filled(EMPTY[TEXTS[n - 1]["file"]], n, body))


# --- what is solved ------------------------------------------------------------------------------

@each
def test_original_and_another_right_function_hold_beside_empty_neighbours(n, monkeypatch):
    assert tried(n, REFERENCE[TEXTS[n - 1]["file"]]) == []
    for seed in ("0", "another"):
        monkeypatch.setattr(checks, "SEED", [seed])
        assert tried_body(n, RIGHT[n - 1]) == []


@each
def test_what_is_empty_or_skips_holds_no_claim(n):
    for body in ("pass", "...", "raise NotImplementedError"):
        assert set(tried_body(n, body)) == {"Unfit: the function is still empty"}
    count = len(checks.CLAIMS[TEXTS[n - 1]["file"], TEXTS[n - 1]["function"]])
    for trick in ("raise SystemExit(0)", "raise KeyboardInterrupt", "import pytest\n"
                  "pytest.skip('later')", "return None", "return object()", "return True"):
        assert len(tried_body(n, trick)) == count, trick


def test_helpers_that_a_student_adds_come_along():
    """A new function, constant and import of the module, and a new method of the class."""
    n = NUMBERS["Attention.forward"]
    body = RIGHT[n - 1].replace("self.c_attn(x_BTD).chunk(3, dim=-1)", "self._parts(x_BTD)")
    text = filled(EMPTY["model.py"], n, body.replace("q.shape[-1] ** -0.5", "root(q.shape[-1])"))
    text = text.replace("class Attention(nn.Module):", "from torch import chunk\nHALF = -0.5\n"
                        "import no_such_module\n\ndef root(K):\n    return K ** HALF\n\n"
                        "class Attention(nn.Module):\n    def _parts(self, x):\n"
                        "        return chunk(self.c_attn(x), 3, -1)\n", 1)
    assert tried(n, text.replace("3 * config.n_embd", "5 * config.n_embd")) == [], (
        "what a student breaks elsewhere does not count here")


def test_function_of_another_exercise_and_a_line_that_fails_are_named():
    n = NUMBERS["Attention.forward"]
    said = tried_body(n, f"causal_mask(x_BTD, x_BTD)\n{RIGHT[n - 1]}")
    assert "needs causal_mask, which is empty here: exercise 1" in said[0]
    n = NUMBERS["next_tokens"]
    said, = set(tried_body(n, "x = 1\nreturn x.nothing"))
    lines = filled(EMPTY["sample.py"], n, "x = 1\nreturn x.nothing").split("\n")
    assert said == ("AttributeError: 'int' object has no attribute 'nothing' (sample.py, line "
                    f"{1 + lines.index('    return x.nothing')})")
    said, *_ = tried_body(NUMBERS["causal_mask"], "return key_BC @ query_BT")
    assert said.endswith(": key_BC [1, 4], query_BT [1, 4])"), "the shapes of its tensors"


# --- in a process --------------------------------------------------------------------------------

def judged(n, body, seconds=20):
    with CleanCopy(REFERENCE) as clean:
        text = filled(EMPTY[TEXTS[n - 1]["file"]], n, body)
        result = clean.judge(TEXTS[n - 1], text, seconds, quiet=True)
    return result, sum(claim["held"] for claim in result["claims"])


def test_variants_need_no_other_exercise():
    """In the process spin_loss is empty too, which sampled_pair_loss calls."""
    n = NUMBERS["sampled_pair_loss"]
    result, held = judged(n, RIGHT[n - 1])
    assert held == 2, result


def test_process_that_ends_itself_proves_nothing():
    body = """import os, json
for fd in (1, 3, 4, 5, 6):
    try:
        os.write(fd, b'0 {"claim": "positions_decide_not_indices", "held": true, "said": ""}\\n')
    except OSError:
        pass
os._exit(0)"""
    result, held = judged(1, body)
    assert held == 0 and "the process ended in the middle (status 0)" in result["said"]


def test_loop_without_end_is_ended():
    result, held = judged(1, "while True:\n    try:\n        while True: pass\n"
                          "    except BaseException: pass", seconds=1)
    assert held == 0 and "no end after 1 seconds" in result["said"] and result["seconds"] < 10


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's memory")
def test_memory_is_limited():
    result, held = judged(1, "return torch.ones(1 << 31, dtype=torch.float64)")
    assert held == 0 and "memory" in result["claims"][0]["said"], result


# --- the commands --------------------------------------------------------------------------------

@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    for path in handed_files(ROOT):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def run(folder, *args):
    """What the tool exits with, in a folder, and what it prints."""
    out, status = io.StringIO(), 0
    with mock.patch.object(tool, "ROOT", Path(folder)), contextlib.redirect_stdout(out):
        try:
            tool.main(list(map(str, args)))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue()


def said(folder, *args) -> str:
    status, out = run(folder, *args)
    assert status == 0, (status, out)
    return out


def refused(folder, *args, words):
    """The tool says no, in one line, and no file changes."""
    before = files_of(folder)
    status, out = run(folder, *args)
    assert not out and str(status).startswith("exercises.py: ") and words in status, (status, out)
    assert files_of(folder) == before


def files_of(folder) -> dict[str, bytes]:
    return {file: Path(folder, file).read_bytes() for file in Workspace(folder).files()}


def fill(folder, n, body):
    path = Path(folder, TEXTS[n - 1]["file"])
    path.write_text(filled(path.read_text("utf-8"), n, body), "utf-8")


def test_check_diagnoses_then_says_solved(copy):
    n = NUMBERS["sequence_logps"]
    run(copy, "start", n), run(copy, "start", NUMBERS["token_logps"])
    status, out = run(copy, "check", n)
    assert status == 1 and "still empty" in out and f"0 of 5 claims hold; `hint {n}` helps" in out
    fill(copy, n, RIGHT[n - 1].replace("logp.sum()", "logp.mean()"))
    status, out = run(copy, "check", n)
    assert status == 1 and ("✗ logprob is a sum over response tokens not a mean\n      you averaged"
                            in out), out
    path = copy / "spin_loss.py"
    path.write_text(path.read_text("utf-8").replace("logp.mean()", "logp.sum()"), "utf-8")
    out = said(copy, "check", n)
    assert "5 of 5 claims hold: solved" in out and "✗" not in out, out
    assert [line.endswith("✓ solved") for line in said(copy, "list").splitlines()] == [
        m == n for m in NUMBERS.values()]


def test_start_and_restore_give_back_every_file_byte_for_byte(copy):
    """In any order; each attempt is kept."""
    before = files_of(copy)
    for n, text in enumerate(TEXTS, 1):
        said(copy, "start", n)
        now, old = (find(ast.parse(source), text["function"]) for source in (
            (copy / text["file"]).read_bytes().decode(), before[text["file"]].decode()))
        assert ast.dump(now.args) == ast.dump(old.args), "the signature stays"
        assert ast.get_docstring(now) == ast.get_docstring(old)
    assert files_of(copy) == {
        file: empty_all(data.decode(), file).encode() for file, data in before.items()}
    for n in reversed(NUMBERS.values()):
        assert "is the original again" in said(copy, "restore", n)
    assert files_of(copy) == before
    for answer in ("0.5", "'twice'"):
        said(copy, "start", 1), fill(copy, 1, f"return {answer}"), said(copy, "restore", 1)
    kept = [path.read_text("utf-8") for path in sorted((copy / "out" / "attempts").glob("01_*"))]
    assert [text.rstrip().split()[-1] for text in kept[1:]] == ["0.5", "'twice'"]


def test_a_students_own_changes_are_neither_emptied_nor_lost(copy):
    run(copy, "start", 1)
    refused(copy, "start", 1, words="started already")
    fill(copy, 1, "return 1")
    refused(copy, "start", 1, words="differs from what shipped")
    path = copy / "model.py"
    path.write_text(path.read_text("utf-8") + "# mine\n", "utf-8")
    said(copy, "restore", 1)
    assert path.read_text("utf-8").endswith("# mine\n")
    refused(copy, "restore", 1, words="nothing to restore")
    path.write_text("def broken(:\n", "utf-8")
    refused(copy, "start", 2, words="cannot be read as Python")
    status, out = run(copy, "check", 1)
    assert status == 1 and "model.py, line 1: SyntaxError" in out
    assert "all of model.py: Python could not read it" in said(copy, "restore", 1)
    assert path.read_bytes() == (copy / "tests/classroom/shipped/model.py").read_bytes()
    path.unlink()
    refused(copy, "start", 1, words="model.py is missing")


def test_words(copy):
    """Hints come one at a time; `list` tells a task, `show` the original."""
    hints, n = TEXTS[3]["hints"], NUMBERS["optimal_next_policy"]
    for shown in (1, 2, 3, 3):
        out = said(copy, "hint", 4)
        assert [hint in out for hint in hints] == [i < shown for i in range(len(hints))]
    assert "the last" in out
    said(copy, "start", n)
    original = source_of((ROOT / "spin_loss.py").read_text("utf-8"), TEXTS[n - 1])
    assert said(copy, "show", n).strip() == original.strip()
    assert " ".join(TEXTS[9]["task"].split()) in " ".join(said(copy, "list", 10).split())
    for args in (("start",), ("check", 0), ("hint", 99), ("show", "four")):
        refused(copy, *args, words="needs a number from 1 to")


# --- hand-out and grading ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """A hand-out of all exercises."""
    folder = tmp_path_factory.mktemp("handed") / "handout"
    assert "exercises 1, 2" in said(ROOT, "handout", folder)
    return folder


def test_hand_out_holds_no_solution(handed):
    files = [path for path in handed.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert "EXPERIMENTS.md" in names, "the questions, without their answers"
    assert not names & {"ANSWERS.md", "mistakes.toml"} and not any(
        name.startswith("test_") or name.endswith(".pyc") for name in names)
    text = {path: " ".join(path.read_text("utf-8").split()) for path in files
            if path.suffix == ".py"}
    for exercise in TEXTS:
        node = find(ast.parse(REFERENCE[exercise["file"]]), exercise["function"])
        if exercise["function"] == "self_play_with_history":
            continue  # its last line is that of self_play, which it goes beyond
        last = ast.unparse(written_part(node, exercise)[-1])
        assert len(last) < 20 or not [path for path in text if " ".join(last.split()) in text[path]]
        for place in (handed, handed / "tests" / "classroom" / "shipped"):
            source = (place / exercise["file"]).read_text("utf-8")
            assert is_empty(find(ast.parse(source), exercise["function"]), exercise)


def test_exercises_are_done_in_a_hand_out(handed, tmp_path):
    folder, n = shutil.copytree(handed, tmp_path / "mine"), NUMBERS["mass_anchor"]
    refused(folder, "show", n, words="your instructor has the original")
    refused(folder, "start", n, words="started already")
    fill(folder, n, RIGHT[n - 1])
    assert "3 of 3 claims hold: solved" in said(folder, "check", n)
    said(folder, "restore", n)
    assert files_of(folder) == files_of(handed)
    said(ROOT, "handout", tmp_path / "part", "--exercises", "1-2,8")
    assert [line.split()[0] for line in said(tmp_path / "part", "list").splitlines()] == [
        "1", "2", "8"]
    for where, which, words in (("part", "1", "is there already"), ("new", "x", "numbers and"),
                                ("new", "3-99", "exercises 1 to")):
        refused(ROOT, "handout", tmp_path / where, "--exercises", which, words=words)
    assert numbers("3, 1-2") == [1, 2, 3]


def test_a_class_is_graded_in_one_command(handed, tmp_path):
    """Whatever a submission does, it earns nothing by it, and the others are graded."""
    folder, n = tmp_path / "class", NUMBERS["spin_loss"]
    for name in ("a right", "b empty", "c loop", "d tests", "e copies", "f zipped/inner"):
        shutil.copytree(handed, folder / name)
    for litter in ("__MACOSX", "f zipped/__MACOSX"):
        (folder / litter).mkdir()
    for litter in (".DS_Store", "notes.txt"):
        (folder / litter).write_bytes(b"x")
    for name in ("a right", "f zipped/inner"):
        fill(folder / name, n, RIGHT[n - 1])
    fill(folder / "c loop", n, "while True:\n    pass")
    fill(folder / "c loop", 1, RIGHT[0])
    fill(folder / "d tests", n, "return 0")
    for path in (folder / "d tests" / "tests" / "classroom").glob("*.py"):
        path.write_text("raise SystemExit(0)\n", "utf-8")
    (folder / "d tests" / "conftest.py").write_text("import os\nos._exit(0)\n", "utf-8")
    shutil.copy(ROOT / "spin_loss.py", folder / "e copies")
    (folder / "e copies" / "model.py").unlink()
    out = said(ROOT, "grade", folder, "--exercises", f"1,{n}", "--json", tmp_path / "g.json",
               "--minutes", "0.3", "--jobs", "2")
    grades = json.loads((tmp_path / "g.json").read_text("utf-8"))["submissions"]
    points = {one["name"]: [e["points"] for e in one["exercises"]] for one in grades}
    assert points == {"a right": [0, 4], "b empty": [0, 0], "c loop": [3, 0], "d tests": [0, 0],
                      "e copies": [0, 4], "inner": [0, 4]}, out
    for words in (f"b empty, exercise 1, {n}: the function is still empty",
                  f"c loop, exercise {n}: no end after 2 seconds",
                  f"e copies, exercise {n}: the code is the original's",
                  "e copies, exercise 1: model.py is missing"):
        assert words in out, f"{words!r} is not in\n{out}"
    refused(ROOT, "grade", words="needs the folders")
    refused(ROOT, "grade", tmp_path / "nobody", words="is no folder")
