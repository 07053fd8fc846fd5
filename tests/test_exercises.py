"""tests/exercises.py: what each claim says, what is emptied and given back, hand-outs and grades.

Commands run in copies of the working tree, most without git. The attempts, right and wrong, stand
in classroom/attempts.toml.
"""
import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import exercises as tool
from classroom import checks, judge
from classroom.functions import (TEXTS, empty_all, find, is_empty, product_files,
                                 prose_without_code, split_name, written_part)
from classroom.grading import handed_files, numbers
from classroom.judge import CLAIMS, CleanCopy
from classroom.rules import broken_rules
from classroom.runner import Unfit, splice, try_claims
from classroom.workspace import Refusal, Workspace

ROOT = Path(__file__).resolve().parents[1]
ATTEMPTS = tomllib.loads((ROOT / "tests/classroom/attempts.toml").read_text("utf-8"))
REFERENCE = judge.texts_of(ROOT)
EMPTY = {path: empty_all(text, path) for path, text in REFERENCE.items()}
NUMBERS = range(1, len(TEXTS) + 1)
NAMES = [text["function"].split(".", 1)[1] for text in TEXTS]
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


# --- helpers -------------------------------------------------------------------------------------

def number_of(function) -> int:
    return 1 + NAMES.index(function)


def filled(text, n, body) -> str:
    """A file's text with `body` in the place of exercise n's `raise`."""
    stub, = re.findall(rf"^( *)(raise NotImplementedError\(\"exercise {n}: .*)$", text, re.M)
    lines = "\n".join(stub[0] + line if line else line for line in body.strip("\n").split("\n"))
    return text.replace("".join(stub), lines)


def fill(folder, n, body):
    """Write the body of exercise n into a folder in which it is empty."""
    path = Path(folder, split_name(TEXTS[n - 1]["function"])[0])
    path.write_text(filled(path.read_text("utf-8"), n, body), "utf-8", newline="\n")


def edit(path, old, new):
    """Replace a piece of a file, which must be there."""
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8", newline="\n")


def tried(n, text) -> list[dict]:
    """What the claims of exercise n say of an attempt, the text of its file; in this process."""
    exercise, said = TEXTS[n - 1], []
    path = split_name(exercise["function"])[0]
    tree, given = splice(EMPTY[path], text, exercise["function"], exercise.get("part"),
                         exercise.get("given", []))
    claims = checks.claims_of(exercise["function"])
    try_claims(claims, tree, path, checks.stand_ins(given), lambda **claim: said.append(claim))
    return said


def tried_body(n, body) -> list[str]:
    """The diagnoses of an attempt's body beside empty neighbours; none if every claim holds."""
    path = split_name(TEXTS[n - 1]["function"])[0]
    try:
        return [c["said"] for c in tried(n, filled(EMPTY[path], n, body)) if not c["held"]]
    except Unfit as error:
        return [str(error)]


def right(n) -> str:
    return ATTEMPTS[TEXTS[n - 1]["function"]]["right"]


def wrong(n):
    """(words that must be said, body) of each wrong attempt."""
    for attempt in ATTEMPTS[TEXTS[n - 1]["function"]]["wrong"]:
        body = right(n)
        for old, new in ((attempt["old"], attempt["new"]), attempt.get("also", ("", ""))):
            assert old in body, f"attempts.toml, {TEXTS[n - 1]['function']}: {attempt}"
            body = body.replace(old, new) if old else body
        yield attempt["says"], body


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A copy of what the exercises need, without git."""
    folder = tmp_path_factory.mktemp("base") / "repository"
    for path in handed_files(ROOT):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@pytest.fixture
def copy(base, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return shutil.copytree(base, tmp_path / "copy")


@pytest.fixture(scope="module")
def handed(base, tmp_path_factory):
    """A hand-out of all exercises."""
    folder = tmp_path_factory.mktemp("handed") / "handout"
    status, out, error = run(base, "handout", folder)
    assert status == 0 and "exercises 1, 2" in out, error
    return folder


def run(folder, *args, env=None, cwd=None):
    """(exit status, standard output, standard error) of the tool in a folder."""
    done = subprocess.run([sys.executable, Path(folder, "tests", "exercises.py"), *map(str, args)],
                          cwd=cwd or folder, capture_output=True, env=os.environ | (env or {}))
    read = lambda data: data.decode("utf-8", "replace").replace("\r\n", "\n")
    return done.returncode, read(done.stdout), read(done.stderr)


def git(folder, *args):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    return subprocess.run(["git", "-C", folder, *settings, *args], capture_output=True, text=True,
                          check=True).stdout


def files_of(folder) -> dict[str, bytes]:
    return {path: Path(folder, path).read_bytes() for path in product_files(folder)}


def refused(folder, *args, words):
    """The tool says no: status 2, one line, and no product file changes."""
    before = files_of(folder)
    status, out, error = run(folder, *args)
    assert status == 2 and not out, (status, out, error)
    assert error.startswith("exercises.py: ") and error.count("\n") == 1 and words in error, error
    assert files_of(folder) == before


# --- the claims ----------------------------------------------------------------------------------

def test_there_is_an_exercise_for_each_step_in_teaching_order():
    assert NAMES == [
        "causal_mask", "Attention.forward", "KVCache.extend", "token_logps", "sequence_logps",
        "sft_loss", "next_tokens", "spin_loss", "sample_responses", "main",
        "optimal_next_policy", "loss_floor", "responses.grow", "responses.response_logps",
        "mass_anchor", "FusedLogps.backward"]
    for text in TEXTS:
        assert all(text[key] for key in ("title", "minutes", "learn", "equation", "task", "hints"))
        assert 3 <= len(CLAIMS[text["function"]]) <= 6
        assert list(checks.claims_of(text["function"])) == CLAIMS[text["function"]]


@pytest.mark.parametrize("n", NUMBERS)
def test_original_holds_every_claim(n):
    assert all(c["held"] for c in tried(n, REFERENCE[split_name(TEXTS[n - 1]["function"])[0]]))


@pytest.mark.parametrize("n", NUMBERS)
def test_right_function_beside_empty_neighbours_gets_full_marks(n):
    assert tried_body(n, right(n)) == []


@pytest.mark.parametrize("n", NUMBERS)
def test_random_inputs_change_no_verdict(n, monkeypatch):
    for seed in range(2):
        monkeypatch.setattr(checks, "SEED", f"grading {seed}")
        assert tried_body(n, right(n)) == []
        assert all(tried_body(n, body) for _, body in list(wrong(n))[:3])


@pytest.mark.parametrize("n", NUMBERS)
def test_the_likeliest_mistakes_are_named(n):
    mistakes = list(wrong(n))
    assert len(mistakes) >= 8
    for words, body in mistakes:
        said = tried_body(n, body)
        assert any(words in line for line in said), f"{words!r} is not among {said}"
        assert all(line and "\n" not in line and len(line) < 400 for line in said), said


@pytest.mark.parametrize("n", NUMBERS)
def test_empty_function_is_not_solved(n):
    path = split_name(TEXTS[n - 1]["function"])[0]
    for body in ("raise NotImplementedError('exercise')", "pass", "..."):
        assert tried_body(n, body) == ["the function is still empty"]
    assert is_empty(find(ast.parse(EMPTY[path]), split_name(TEXTS[n - 1]["function"])[1]),
                    TEXTS[n - 1].get("part"))


@pytest.mark.parametrize("trick", [
    "raise SystemExit(0)", "raise KeyboardInterrupt", "raise AssertionError", "return None",
    "raise GeneratorExit", "return object()", "return True", "raise ValueError('focal, quick')",
    "return torch.zeros(())", "return torch.zeros(3)"])
def test_a_body_that_skips_or_ends_holds_no_claim(trick):
    for n in NUMBERS:
        said = tried_body(n, trick)
        assert len(said) == len(CLAIMS[TEXTS[n - 1]["function"]]), (n, said)


def test_helpers_that_a_student_adds_come_along():
    """A new function, constant and import of the module, and a new method of the class."""
    n = number_of("Attention.forward")
    text = filled(EMPTY["model.py"], n, right(n).replace("qkv.chunk(3, dim=-1)", "self._parts(qkv)")
                  .replace("* K ** -0.5", "* root(K)"))
    text = text.replace("class Attention(nn.Module):", "from torch import chunk\nHALF = -0.5\n"
                        "def root(K):\n    return K ** HALF\n\nclass Attention(nn.Module):", 1)
    start = text.index("    def forward(self, x_BTD, cache: KVCache")
    method = "    def _parts(self, x):\n        return chunk(x, 3, -1)\n\n"
    text = text[:start] + method + text[start:]
    assert all(c["held"] for c in tried(n, text))


def test_what_a_student_breaks_elsewhere_does_not_count_here():
    n = number_of("Attention.forward")
    text = filled(EMPTY["model.py"], n, right(n)).replace("3 * config.n_embd", "5 * config.n_embd")
    assert all(c["held"] for c in tried(n, text))


def test_a_neighbour_that_breaks_the_rules_costs_nothing_here():
    n = number_of("Attention.forward")
    text = filled(filled(EMPTY["model.py"], 1, "import sys\nsys.exit(0)"), n, right(n))
    assert all(c["held"] for c in tried(n, text))


def test_a_neighbour_may_be_used_where_it_is_written():
    n = number_of("Attention.forward")
    body = right(n).replace("cache.visible_BTC", "(cache.visible_BTC & causal_mask(x, x))")
    body = body.replace("K = q.shape[-1]", "K = q.shape[-1]\nx = torch.zeros(1, 1)")
    text = filled(filled(EMPTY["model.py"], 1, right(1)), n, body)
    assert all(c["held"] for c in tried(n, text))


def test_function_of_another_exercise_is_named_where_it_is_empty():
    n = number_of("Attention.forward")
    said = tried_body(n, "causal_mask(x_BTD, x_BTD)\n" + right(n).strip())
    assert "needs causal_mask, which is empty here: exercise 1" in said[0]


def test_an_error_tells_its_line():
    n = number_of("next_tokens")
    said, = set(tried_body(n, "x = 1\nreturn x.nothing"))
    lines = filled(EMPTY["sample.py"], n, "x = 1\nreturn x.nothing").split("\n")
    assert said == ("AttributeError: 'int' object has no attribute 'nothing' (sample.py, line "
                    f"{1 + lines.index('    return x.nothing')})")


@pytest.mark.parametrize("code", [
    "import subprocess", "import os", "from pathlib import Path", "from os import path",
    "import torch.utils.cpp_extension", "from . import x", "from torch import os",
    "import numpy.f2py", "open('spin_loss.py')", "exec('1')", "eval('1')", "__import__('os')",
    "getattr(torch, 'o' + 's')",
    "torch.os.system('ls')", "np.load('x')", "torch.load('x')", "os._exit(0)", "os.listdir()",
    "torch.from_file('x', size=9)", "x.__class__.__subclasses__()", "x.__globals__",
    "torch.allclose = lambda *a: True", "torch.Tensor.tolist = None", "math.exp = abs",
    "setattr(torch, 'equal', 1)", "global LOSSES", "vars(torch)", "error.__traceback__.tb_frame",
    "torch.sys.modules", "from spin_loss import *", "torch._C", "del torch.equal",
    "x = torch; x.equal = 1", "self = torch; self.equal = 1", "self.t.equal = 1"])
def test_what_no_exercise_needs_is_not_run(code):
    wrong = broken_rules(ast.parse(f"def f(x, error):\n    {code}").body)
    assert wrong and all(line.startswith("line 2 ") for line in wrong)


@pytest.mark.parametrize("n", NUMBERS)
def test_rules_allow_every_original_and_attempt(n):
    path, names = split_name(TEXTS[n - 1]["function"])
    for text in (REFERENCE[path], filled(EMPTY[path], n, right(n))):
        assert broken_rules([find(ast.parse(text), names)]) == []


# --- check, as a process -------------------------------------------------------------------------

def test_check_diagnoses_then_says_solved(copy, tmp_path):
    n = number_of("sequence_logps")
    assert run(copy, "start", n, cwd=tmp_path)[0] == 0
    status, out, _ = run(copy, "check", n)
    assert status == 1 and "still empty" in out and f"0 of 6 claims hold; `hint {n}` helps" in out
    run(copy, "start", number_of("token_logps"))
    fill(copy, n, right(n).replace("logp.sum()", "logp.mean()"))
    status, out, _ = run(copy, "check", n, cwd=tmp_path)
    assert status == 1
    assert "✗ it is the sum over the response not a mean\n      this is the mean" in out
    path = copy / "spin_loss.py"
    edit(path, "logp.mean()", "print('seen') or logp.sum()")
    status, out, error = run(copy, "check", n)
    assert status == 0 and "6 of 6 claims hold: solved" in out and "✗" not in out, out
    assert "seen" in error, "what the attempt prints is shown"
    assert [line.endswith("✓ solved") for line in run(copy, "list")[1].splitlines()] == [
        m == n for m in NUMBERS]


def test_check_of_a_file_that_python_cannot_read_says_so(copy):
    run(copy, "start", 1)
    path = copy / "model.py"
    edit(path, "raise NotImplementedError(", "return ((")
    status, out, _ = run(copy, "check", 1)
    assert status == 1 and "✗ model.py, line" in out and "SyntaxError" in out, out
    edit(path, "def causal_mask", "def other")
    edit(path, "return ((", "return (0, ")
    assert "there is no causal_mask in model.py" in run(copy, "check", 1)[1]
    assert run(copy, "restore", 1)[0] == 0


@pytest.fixture
def clean():
    with CleanCopy(REFERENCE) as clean:
        yield clean


def unruly(clean, n, body, hook, seconds=20):
    """Judge an attempt where rules.py forbids nothing, or (hook) forbids at run time alone."""
    rules = Path(clean.folder, "tests", "classroom", "rules.py")
    text = rules.read_text("utf-8") + "\n\ndef broken_rules(nodes):\n    return []\n"
    if not hook:
        text += "\n\ndef forbid_the_rest_of_the_machine(tree):\n    pass\n"
    rules.write_text(text, "utf-8")
    path = split_name(TEXTS[n - 1]["function"])[0]
    result = clean.judge(TEXTS[n - 1], filled(EMPTY[path], n, body), seconds)
    return result, sum(claim["held"] for claim in result["claims"])


def test_process_that_ends_itself_proves_nothing(clean):
    body = "import os\nos.write(1, b'{\"claim\": 1}\\n' * 3)\nos._exit(0)"
    result, held = unruly(clean, 1, body, False)
    assert held == 0 and "the process ended in the middle (status 0)" in result["said"]


def test_loop_without_end_is_ended(clean):
    result, held = unruly(clean, 1, "while True:\n    try:\n        while True: pass\n"
                          "    except BaseException: pass", False, seconds=1)
    assert held == 0 and "no end after 1 seconds" in result["said"]
    assert result["seconds"] < 10


def test_attempt_reaches_no_original_while_it_runs(clean):
    """Even where reading it would not show: no file outside the clean copy, no process."""
    outside = str(ROOT / "model.py")
    result, held = unruly(clean, 1, f"""
import subprocess
found = []
for work in (lambda: open({outside!r}).read(), lambda: subprocess.run(['git', 'log']),
             lambda: open('out.txt', 'w')):
    try:
        work()
        found.append('done')
    except PermissionError as error:
        found.append(str(error))
raise ValueError(' '.join(found) + open('model.py').read()[-1:])""", True)
    said = result["claims"][0]["said"]
    assert held == 0 and "may not open model.py" in said and "may not use subprocess" in said, said
    assert "may not open out.txt" in said and "done" not in said, said
    assert "key_BC[:, None" not in Path(clean.folder, "model.py").read_text("utf-8")


# --- start and restore: nothing is lost ----------------------------------------------------------

def test_start_and_restore_give_back_every_file_byte_for_byte(copy):
    before, workspace = files_of(copy), Workspace(copy)
    for text in TEXTS:
        part = workspace.part(text)
        assert part.is_original() and not part.is_empty()
        workspace.keep()
        part.empty()
        path, names = split_name(text["function"])
        now, old = (find(ast.parse(source.decode()), names)
                    for source in ((copy / path).read_bytes(), before[path]))
        assert ast.dump(now.args) == ast.dump(old.args)
        assert ast.get_docstring(now) == ast.get_docstring(old)
        assert workspace.part(text).is_empty()
    assert files_of(copy) == {path: empty_all(data.decode(), path).encode()
                              for path, data in before.items()}
    for text in reversed(TEXTS):
        part = workspace.part(text)
        assert part.original_lines() and "exercise" in part.attempt()
        part.restore()
    assert files_of(copy) == before
    workspace.forget()
    assert not workspace.shipped.exists()


@pytest.mark.parametrize("n", NUMBERS)
def test_restore_undoes_all_that_was_written_for_it(copy, n):
    """Decorator, comments, helper beside and far from it, import; the attempt holds all of them."""
    before, other = files_of(copy), 1 + n % len(TEXTS)
    run_in_process(copy, "start", n)
    run_in_process(copy, "start", other)
    fill(copy, n, "# my idea\nx = my_helper() + FAR_AWAY + my_module.pi  # done")
    path, names = split_name(TEXTS[n - 1]["function"])
    text = (copy / path).read_text("utf-8")
    lines, node = text.split("\n"), find(ast.parse(text), names)
    indent = " " * node.col_offset
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    lines[node.end_lineno:node.end_lineno] = [f"{indent}    # a comment after it"]
    lines[first:first] = [f"{indent}def my_helper():", f"{indent}    return 1", "",
                          f"{indent}@my_helper"]
    last_import = max(s.end_lineno for s in ast.parse(text).body
                      if isinstance(s, (ast.Import, ast.ImportFrom)))
    lines[last_import:last_import] = ["import math as my_module"]
    (copy / path).write_text("\n".join(lines) + "\n\nFAR_AWAY = 3\n", "utf-8", newline="\n")
    assert "is the original again" in run_in_process(copy, "restore", n)
    attempt = (copy / "out" / "attempts" / f"{n:02d}_{names[-1]}_1.py").read_text("utf-8")
    for words in ("FAR_AWAY = 3", "my_module", "a comment after it", "@my_helper", "return 1"):
        assert words in attempt, attempt
    run_in_process(copy, "restore", other)
    assert files_of(copy) == before


def run_in_process(folder, *args):
    """The tool's standard output, without a process; raises what ends it."""
    out, old = io.StringIO(), (tool.ROOT, tool.NOTES)
    tool.ROOT, tool.NOTES = Path(folder), Path(folder, "out", "exercises.json")
    try:
        with contextlib.redirect_stdout(out):
            tool.main(list(map(str, args)))
    finally:
        tool.ROOT, tool.NOTES = old
    return out.getvalue()


@pytest.mark.parametrize("change", [
    lambda data: data.replace(b"\n", b"\r\n"), lambda data: b"\xef\xbb\xbf" + data,
    lambda data: data.decode().encode("utf-16"), lambda data: data.rstrip(b"\n")],
    ids=["windows line ends", "byte order mark", "utf-16", "no last line end"])
def test_restore_is_byte_for_byte_whatever_the_editor_saved(copy, change):
    before = files_of(copy)
    run_in_process(copy, "start", 2)
    path = copy / "model.py"
    path.write_bytes(change(path.read_bytes()))
    run_in_process(copy, "restore", 2)
    assert path.read_bytes() == before["model.py"]


def test_windows_line_ends_survive(copy):
    path = copy / "model.py"
    windows = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(windows)
    run_in_process(copy, "start", 2)
    emptied = path.read_bytes()
    assert emptied != windows and emptied.count(b"\n") == emptied.count(b"\r\n")
    run_in_process(copy, "restore", 2)
    assert path.read_bytes() == windows


def test_file_that_cannot_be_parsed_is_restored(copy):
    before = files_of(copy)
    run_in_process(copy, "start", number_of("loss_floor"))
    edit(copy / "spin_loss.py", "raise NotImpl", "return (\n   [raise NotImpl")
    run_in_process(copy, "restore", number_of("loss_floor"))
    assert files_of(copy) == before


def test_attempts_are_kept_beside_each_other(copy):
    n = number_of("loss_floor")
    for answer in ("0.5", "'twice'"):
        run_in_process(copy, "start", n)
        fill(copy, n, f"return {answer}")
        run_in_process(copy, "restore", n)
    kept = sorted((copy / "out" / "attempts").iterdir())
    assert [path.read_text("utf-8").splitlines()[-1] for path in kept] == [
        "    return 0.5", "    return 'twice'"]


def test_a_change_of_the_students_own_stays(copy):
    run_in_process(copy, "start", 1)
    path = copy / "model.py"
    edit(path, "class MLP(nn.Module):", "class MLP(nn.Module):  # mine")
    run_in_process(copy, "restore", 1)
    assert "# mine" in path.read_text("utf-8")
    assert run_in_process(copy, "list") and Workspace(copy).part(TEXTS[0]).is_original()


def test_what_is_started_or_changed_is_not_emptied(copy):
    run(copy, "start", 1)
    refused(copy, "start", 1, words="started already")
    fill(copy, 1, "return 1")
    refused(copy, "start", 1, words="differs from what shipped")
    run(copy, "restore", 1)
    refused(copy, "restore", 1, words="nothing to restore")


@needs_git
def test_git_history_locks_nobody_out(copy):
    """The original stays the original after `start` or a solution is committed; in a clone too."""
    git(copy, "init", "-q"), git(copy, "add", "-A"), git(copy, "commit", "-qm", "all")
    before, n = files_of(copy), number_of("causal_mask")
    run_in_process(copy, "start", n)
    assert git(copy, "status", "--porcelain") == " M model.py\n", "one file, nothing else"
    git(copy, "commit", "-qam", "started")
    assert "key_BC[:, None" in run_in_process(copy, "show", n)
    fill(copy, n, "return 'mine'")
    git(copy, "commit", "-qam", "solved")
    clone = copy.parent / "clone"
    git(copy.parent, "clone", "-q", str(copy), str(clone))
    for folder in (copy, clone):
        assert "key_BC[:, None" in run_in_process(folder, "show", n)
        run_in_process(folder, "restore", n)
        assert files_of(folder) == before


@needs_git
def test_uncommitted_work_is_not_taken_for_the_original(copy):
    git(copy, "init", "-q"), git(copy, "add", "-A"), git(copy, "commit", "-qm", "all")
    path = copy / "spin_loss.py"
    names = split_name(TEXTS[number_of("loss_floor") - 1]["function"])[1]
    line = written_part(find(ast.parse(path.read_text("utf-8")), names))[0].lineno - 1
    lines = path.read_text("utf-8").split("\n")
    lines[line:line] = ["    print('mine')"]
    path.write_text("\n".join(lines), "utf-8", newline="\n")
    refused(copy, "start", number_of("loss_floor"), words="differs from what shipped")
    assert run(copy, "start", number_of("token_logps"))[0] == 0, "another function is free"
    assert run(copy, "restore", number_of("token_logps"))[0] == 0
    assert "print('mine')" in path.read_text("utf-8")


# --- words, on any terminal ----------------------------------------------------------------------

def test_hints_come_one_at_a_time(copy):
    hints = TEXTS[3]["hints"]
    for shown in (1, 2, 3, 3):
        out = run_in_process(copy, "hint", 4)
        assert [hint in out for hint in hints] == [i < shown for i in range(len(hints))]
    assert "the last" in out and "Hint 2" not in run_in_process(copy, "hint", 5)


def test_show_prints_the_original_while_it_is_empty(copy):
    text = (copy / "spin_loss.py").read_text("utf-8")
    n = number_of("optimal_next_policy")
    original = ast.get_source_segment(text, find(ast.parse(text), ["optimal_next_policy"]))
    run_in_process(copy, "start", n)
    assert run_in_process(copy, "show", n).strip() == original


def test_list_names_every_exercise_and_tells_one_task(copy):
    out = run_in_process(copy, "list")
    assert all(text["function"] in line and text["title"] in line
               for text, line in zip(TEXTS, out.splitlines(), strict=True))
    assert " ".join(TEXTS[9]["task"].split()) in " ".join(run_in_process(copy, "list", 10).split())


@pytest.mark.parametrize("args", [("start",), ("check", 0), ("hint", 18), ("show", "four"),
                                  ("list", "1.5"), ("restore", 1, 2), ("dance", 1)], ids=str)
def test_what_does_not_exist_is_refused(copy, args, capsys):
    with pytest.raises(SystemExit) as stop:
        run_in_process(copy, *args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("exercises.py: ") and error.count("\n") == 1


def test_terminal_without_greek_letters_breaks_no_command(copy):
    narrow = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    for args in (["list"], ["list", 2], ["list", 12], ["start", 5], ["hint", 5], ["show", 5],
                 ["--help"], ["check", 5], ["restore", 5]):
        status, out, error = run(copy, *args, env=narrow)
        assert status == (args[0] == "check") and out and not error, (args, out, error)
    assert "lambda" in run(copy, "list", 12, env=narrow)[1] or "log 2 - JSD" in run(
        copy, "list", 12, env=narrow)[1]


def test_output_of_a_notebook_breaks_no_command(copy):
    """It has neither `reconfigure` nor, sometimes, an encoding."""
    class Stream:
        def __init__(self):
            self.said = ""

        def write(self, text):
            self.said += text

        def flush(self):
            pass
    stream = Stream()
    with contextlib.redirect_stdout(stream):
        run_in_process_to(copy, "list", 2)
    assert "√K" in stream.said


def run_in_process_to(folder, *args):
    old = tool.ROOT
    tool.ROOT = Path(folder)
    try:
        tool.main(list(map(str, args)))
    finally:
        tool.ROOT = old


@pytest.mark.parametrize("content", ["{half", '{"1": 3}', "[]", "\ufeff"])
def test_broken_notes_get_one_line(copy, content):
    (copy / "out").mkdir()
    (copy / "out" / "exercises.json").write_text(content, "utf-8")
    status, out, error = run(copy, "hint", 2)
    assert status == 0 and "Hint 1" in out and error.count("\n") == 1, error
    assert "could not be read" in error and (copy / "out" / "exercises.broken").exists()
    assert run(copy, "list")[2] == ""


def test_missing_file_gets_one_line(copy):
    (copy / "sample.py").unlink()
    refused(copy, "start", number_of("next_tokens"), words="sample.py is missing")


# --- hand-out ------------------------------------------------------------------------------------

def size(node) -> int:
    return sum(1 for _ in ast.walk(node))


def code_in(tree, kinds, least=8) -> set[str]:
    """The statements or expressions of some kinds, written out; short ones left aside."""
    return {ast.unparse(node) for node in ast.walk(tree)
            if isinstance(node, kinds) and size(node) >= least}


def test_hand_out_holds_no_solution(handed):
    """No result's expression, and no more than a few statements that other functions share."""
    files = [path for path in handed.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".pyc" or ".git" in path.parts]
    names = {path.name for path in files}
    assert "EXPERIMENTS.md" in names, "the questions, without their answers"
    assert not names & {"ANSWERS.md", "attempts.toml"} and not any(
        name.startswith("test_") for name in names)
    statements, kinds = set(), (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)
    calls, prose = set(), ""
    for path in files:
        if path.suffix == ".py":
            tree = ast.parse(path.read_text("utf-8"))
            statements |= code_in(tree, kinds)
            calls |= code_in(tree, ast.Call)
        elif path.suffix in (".md", ".json", ".yml", ".txt"):
            prose += path.read_text("utf-8")
    for n in NUMBERS:
        path, function = split_name(TEXTS[n - 1]["function"])
        node = find(ast.parse(REFERENCE[path]), function)
        solution = ast.Module(written_part(node, TEXTS[n - 1].get("part")), [])
        own = code_in(solution, kinds)
        assert len(own & statements) <= len(own) / 2, (function, own & statements)
        assert not code_in(solution.body[-1], kinds) & statements, function
        assert not code_in(solution.body[-1], ast.Call) & calls, function
        assert not [code for code in own if code in prose], function
    for n in NUMBERS:
        path, function = split_name(TEXTS[n - 1]["function"])
        for file in (handed / path, handed / "tests" / "classroom" / "shipped" / path):
            node = find(ast.parse(file.read_text("utf-8")), function)
            assert is_empty(node, TEXTS[n - 1].get("part"))


def test_prose_loses_its_code_in_a_hand_out():
    path, names = split_name("train.main")
    loop = written_part(find(ast.parse(REFERENCE[path]), names), "for")
    line = "    " + ast.unparse(loop[-1]).replace(" = ", "  =  ")
    text = f"Algorithm 1:\n{line}   # p_{{t+1}}\nThat is all."
    assert prose_without_code(text, REFERENCE, TEXTS).split("\n") == [
        "Algorithm 1:", "(a line of code is left out of the hand-out)", "That is all."]


def test_check_works_in_a_hand_out(handed, tmp_path):
    folder, n = shutil.copytree(handed, tmp_path / "mine"), number_of("sft_loss")
    refused(folder, "show", n, words="your instructor has the original")
    refused(folder, "start", n, words="started already")
    fill(folder, n, right(n))
    status, out, error = run(folder, "check", n)
    assert status == 0 and "3 of 3 claims hold: solved" in out, out + error
    assert run(folder, "restore", n)[0] == 0
    assert files_of(folder) == files_of(handed)


def test_part_of_the_exercises_can_be_handed_out(base, tmp_path):
    assert run(base, "handout", tmp_path / "part", "--exercises", "1-2,8")[0] == 0
    assert [line.split()[0] for line in run(tmp_path / "part", "list")[1].splitlines()] == [
        "1", "2", "8"]
    found = {n for n in NUMBERS for path, names in [split_name(TEXTS[n - 1]["function"])]
             if is_empty(find(ast.parse((tmp_path / "part" / path).read_text("utf-8")), names),
                         TEXTS[n - 1].get("part"))}
    assert found == {1, 2, 8}
    refused(base, "handout", tmp_path / "part", words="is there already")
    refused(base, "handout", tmp_path / "new", "--exercises", "3-99", words="exercises 1 to 16")
    refused(base, "handout", tmp_path / "new", "--exercises", "x", words="numbers and ranges")
    assert numbers("3, 1-2") == [1, 2, 3]


# --- grading -------------------------------------------------------------------------------------

COPIER = {
    1: "import spin_loss\nfrom model import causal_mask as original\n"
       "return original(query_BT, key_BC)",
    4: "text = open('{root}/spin_loss.py').read()\nexec(text, globals())",
    5: "import subprocess\nreturn subprocess.run(['git', 'show', 'HEAD:spin_loss.py'])",
    8: "import inspect\nreturn inspect.getsource(spin_loss)"}


@pytest.fixture(scope="module")
def graded(base, handed, tmp_path_factory):
    """Six invented submissions, graded in one command: (status, output, error, the JSON)."""
    folder = tmp_path_factory.mktemp("class")
    for name in ("a right", "b empty", "c loop", "d exit", "e tests", "f copies"):
        shutil.copytree(handed, folder / name)
    for n in (1, 4, 5, 8):
        fill(folder / "a right", n, right(n))
        fill(folder / "f copies", n, COPIER[n].replace("{root}", ROOT.as_posix()))
    fill(folder / "c loop", 1, right(1))
    fill(folder / "c loop", 5, "while True:\n    pass")
    for n, body in ((1, "import sys\nsys.exit(0)"), (4, "raise SystemExit(0)"),
                    (5, "import pytest\npytest.skip('later')"), (8, "import os\nos._exit(0)")):
        fill(folder / "d exit", n, body)
    fill(folder / "e tests", 1, "torch.equal = lambda *a, **k: True\nreturn query_BT")
    fill(folder / "e tests", 4, right(4))
    fill(folder / "e tests", 8, "return 0")
    for name in ("checks.py", "checks_loss.py", "checks_model.py", "runner.py", "judge.py"):
        path = folder / "e tests" / "tests" / "classroom" / name
        path.write_text("raise SystemExit(0)\n", "utf-8")
    (folder / "e tests" / "conftest.py").write_text("import os\nos._exit(0)\n", "utf-8")
    path = folder / "e tests" / "spin_loss.py"
    path.write_text("import no_such_module\n" + path.read_text("utf-8"), "utf-8", newline="\n")
    done = run(base, "grade", folder, "--exercises", "1,4,5,8", "--json", folder / "grades.json",
               "--minutes", "0.4", "--jobs", "2")
    return *done, json.loads((folder / "grades.json").read_text("utf-8"))


def test_a_class_is_graded_in_one_command(graded):
    status, out, error, found = graded
    assert status == 0 and not error, error
    points = {s["name"]: [e["points"] for e in s["exercises"]] for s in found["submissions"]}
    assert points == {
        "a right": [4, 6, 6, 6], "b empty": [0, 0, 0, 0], "c loop": [4, 0, 0, 0],
        "d exit": [0, 0, 0, 0], "e tests": [0, 6, 0, 0], "f copies": [0, 0, 0, 0]}, out
    assert [s["points"] for s in found["submissions"]] == [22, 0, 4, 0, 6, 0]
    rows = {line[:8].strip(): line.split()[2:] for line in out.splitlines()[1:7]}
    assert rows["a right"] == ["4/4", "6/6", "6/6", "6/6", "22"]


def test_grades_say_why(graded):
    out = graded[1]
    for words in ("b empty, exercise 1, 4, 5, 8: the function is still empty",
                  "c loop, exercise 5: no end after 3 seconds",
                  "d exit, exercise 1: line", "imports sys, which no exercise", "imports pytest",
                  "d exit, exercise 4: SystemExit: 0", "e tests, exercise 1: line",
                  "changes torch.equal, which is not its own", "f copies, exercise 1:",
                  "uses open, which no exercise needs", "imports subprocess", "imports inspect"):
        assert words in out, f"{words!r} is not in\n{out}"
    claims = graded[3]["submissions"][0]["exercises"][0]["claims"]
    assert [c["claim"] for c in claims] == CLAIMS["model.causal_mask"]
    assert all(c["held"] for c in claims)


def test_originals_and_links_are_reported(base, handed, tmp_path):
    folder = shutil.copytree(handed, tmp_path / "linked")
    shutil.copy(ROOT / "model.py", folder / "model.py")
    try:
        (folder / "spin_loss.py").unlink()
        (folder / "spin_loss.py").symlink_to(ROOT / "spin_loss.py")
    except OSError:
        pytest.skip("links are not allowed here")
    (folder / "train.py").unlink()
    status, out, error = run(base, "grade", folder, "--exercises", "1,4,6", "--minutes", "1")
    assert status == 0, error
    assert "linked, exercise 4: spin_loss.py is a link that leads out of the submission" in out
    assert "linked, exercise 6: train.py is missing" in out
    assert "linked, exercise 1: the code is the original's" in out
    refused(base, "grade", words="needs the folders")
    refused(base, "grade", tmp_path / "nobody", words="is no folder")


def test_submission_that_cannot_be_parsed_stops_nobody(tmp_path, handed, clean):
    for text in ("def f(:\n", "x = " + "(" * 5000, "\0\0", "-" * 100_000 + "1"):
        result = clean.judge(TEXTS[0], text, 5)
        assert result["said"] and not any(c["held"] for c in result["claims"]), text[:9]


def test_workflow_calls_the_same_command():
    text = (ROOT / ".github" / "workflows" / "exercises.yml").read_text("utf-8")
    assert "tests/exercises.py grade" in text
    assert all(system in text for system in ("ubuntu-latest", "macos-latest", "windows-latest"))
    assert "\t" not in text


def test_refusals_are_no_crashes(tmp_path):
    with pytest.raises(Refusal, match="is missing"):
        Workspace(tmp_path).part(TEXTS[0])
