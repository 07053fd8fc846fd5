"""tests/exercises.py: what it empties, what it gives back, and when it refuses.

Everything happens in copies of the working tree with a git history of one commit.
"""
import ast
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest

from copies import ROOT, Servers, copy_of_the_repository, copy_with_a_history, git

TEXTS = tomllib.loads((ROOT / "tests" / "exercises.toml").read_text("utf-8"))["exercise"]
NUMBERS = range(1, len(TEXTS) + 1)
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="the originals come from git")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return copy_with_a_history(tmp_path_factory.mktemp("base") / "repository")


@pytest.fixture
def clone(base, tmp_path):
    return shutil.copytree(base, tmp_path / "clone")


def run(clone, *args, cwd=None):
    """(exit status, standard output, standard error) of the tool in a clone."""
    done = subprocess.run([sys.executable, clone / "tests" / "exercises.py", *map(str, args)],
                          cwd=cwd or clone, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def refused(clone, *args, words):
    """The tool says no: status 2, one line, and no tracked file changes."""
    before = git(clone, "diff")
    status, out, error = run(clone, *args)
    assert status == 2 and not out, (status, out, error)
    assert error.startswith("exercises.py: ") and error.count("\n") == 1 and words in error, error
    assert git(clone, "diff") == before


def file_and_node(folder, n):
    """The file that holds exercise n's function, and the function, parsed."""
    module, *names = TEXTS[n - 1]["function"].split(".")
    path = folder / f"{module}.py"
    node = ast.parse(path.read_text("utf-8"))
    for name in names:
        node, = (child for child in node.body if getattr(child, "name", None) == name)
    return path, node


def test_there_is_an_exercise_for_each_step_in_teaching_order():
    functions = [text["function"].split(".", 1)[1] for text in TEXTS]
    assert functions == [
        "causal_mask", "Attention.forward", "token_logps", "sequence_logps", "sft_objective",
        "next_tokens", "KVCache.extend", "spin_loss", "draw", "frozen_opponent", "self_play",
        "optimal_next_policy", "loss_floor", "FusedLogps.backward", "space_loss", "mass_anchor"]
    for text in TEXTS:
        assert all(text[key] for key in ("title", "minutes", "learn", "equation", "task", "hints",
                                         "tests")), text["title"]


# ---- Red, then green again ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def emptied(request, base, tmp_path_factory):
    """{n: a future of (its clone, outcome of its tests while its function is empty)}."""
    wanted = [item.callspec.params["n"] for item in request.session.items
              if item.path == request.node.path and "emptied" in item.fixturenames]
    folder = tmp_path_factory.mktemp("emptied")

    def attempt(n):
        clone = shutil.copytree(base, folder / str(n))
        started = run(clone, "start", n)
        return clone, started, servers.run(clone, TEXTS[n - 1]["tests"])
    with Servers(2) as servers, ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(attempt, n) for n in wanted}


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
@pytest.mark.parametrize("n", NUMBERS)
def test_emptied_function_turns_all_its_tests_red_and_comes_back_byte_for_byte(base, emptied, n):
    clone, (status, out, error), (red, output) = emptied[n].result()
    path, node = file_and_node(clone, n)
    _, original = file_and_node(base, n)
    assert status == 0 and TEXTS[n - 1]["title"] in out, error
    assert git(clone, "status", "--porcelain") == f" M {path.name}\n", "one file, nothing else"
    assert ast.dump(node.args) == ast.dump(original.args), "the signature stays"
    assert ast.get_docstring(node) == ast.get_docstring(original) is not None, "the docstring stays"
    assert f"exercise {n}: " in ast.unparse(node.body[-1]) and len(node.body) == 2
    assert red == 1 and not re.search(r"\d passed", output), f"this proves nothing:\n{output}"
    for test in TEXTS[n - 1]["tests"]:
        assert re.search(rf"^(FAILED|ERROR) tests/{re.escape(test)}", output, re.M), output
    assert run(clone, "restore", n)[0] == 0
    assert path.read_bytes() == (base / path.name).read_bytes()
    assert git(clone, "status", "--porcelain") == ""
    attempt, = (clone / "out" / "attempts").iterdir()
    assert f"exercise {n}: " in attempt.read_text("utf-8")


def test_check_diagnoses_an_attempt_then_says_that_it_is_solved(clone, tmp_path):
    """From another folder; the original itself is no solution."""
    status, out, _ = run(clone, "check", 4, cwd=tmp_path)
    assert status == 0 and "of the original" in out and "✗" not in out
    run(clone, "start", 4, cwd=tmp_path)
    path, original = clone / "spin_loss.py", (ROOT / "spin_loss.py").read_text("utf-8")
    last = "    return logp_N.new_zeros(len(tokens_BT)).index_add(0, row_N, logp_N)\n"
    assert original.count(last) == 1
    path.write_text(original.replace(last, last[:-1] + " / scored_BS.sum(1)\n"), "utf-8")
    status, out, _ = run(clone, "check", 4, cwd=tmp_path)
    assert status == 1 and "you averaged" in out and "✗ logprob is a sum over response" in out, out
    path.write_text(original.replace(last, last.replace("return ", "return 0 + ")), "utf-8")
    status, out, _ = run(clone, "check", 4, cwd=tmp_path)
    assert status == 0 and "solved" in out and "✗" not in out, out
    assert [line.endswith("✓ solved") for line in run(clone, "list")[1].splitlines()] == [
        n == 4 for n in NUMBERS]


def test_check_of_a_file_that_python_cannot_read_says_so(clone):
    run(clone, "start", 1)
    path = clone / "model.py"
    broken = path.read_text("utf-8").replace("raise NotImplementedError(", "return ((")
    path.write_text(broken, "utf-8")
    status, out, _ = run(clone, "check", 1)
    assert status == 1 and "SyntaxError" in out and "model.py" in out, out
    assert run(clone, "restore", 1)[0] == 0 and git(clone, "status", "--porcelain") == ""


# ---- Nothing is lost ----------------------------------------------------------------------------

def test_function_that_differs_from_head_is_not_emptied(clone):
    path = clone / "spin_loss.py"
    changed = path.read_text("utf-8").replace("margin_B = lam", "margin_B = 1.0 * lam")
    path.write_text(changed, "utf-8")
    refused(clone, "start", 8, words="differs from git's HEAD")
    assert run(clone, "start", 4)[0] == 0, "another function of the same file is free"
    assert run(clone, "restore", 4)[0] == 0
    assert "1.0 * lam" in path.read_text("utf-8"), "and leaves the rest alone"


def test_two_exercises_in_one_file_do_not_meet(clone):
    for n in (3, 13, 4):
        assert run(clone, "start", n)[0] == 0
    refused(clone, "start", 13, words="started already")
    for n in (4, 3, 13):
        assert run(clone, "restore", n)[0] == 0
    assert git(clone, "status", "--porcelain") == ""
    refused(clone, "restore", 3, words="nothing to restore")


def test_attempts_are_kept_beside_each_other(clone):
    for answer in ("0.5", "'twice'"):
        run(clone, "start", 13)
        path = clone / "spin_loss.py"
        path.write_text(re.sub(r"raise Not\w+\(\"exercise 13.*", f"return {answer}",
                               path.read_text("utf-8")), "utf-8")
        run(clone, "restore", 13)
    kept = sorted((clone / "out" / "attempts").iterdir())
    assert [path.read_text("utf-8").splitlines()[-1] for path in kept] == [
        "    return 0.5", "    return 'twice'"]


def test_windows_line_ends_survive(clone):
    path = clone / "model.py"
    windows = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(windows)
    assert run(clone, "start", 2)[0] == 0
    emptied = path.read_bytes()
    assert emptied != windows and emptied.count(b"\n") == emptied.count(b"\r\n")
    assert run(clone, "restore", 2)[0] == 0 and path.read_bytes() == windows


# ---- Words --------------------------------------------------------------------------------------

def test_hints_come_one_at_a_time(clone):
    hints = TEXTS[3]["hints"]
    for shown in (1, 2, 3, 3):
        out = run(clone, "hint", 4)[1]
        assert [hint in out for hint in hints] == [i < shown for i in range(len(hints))]
    assert "the last" in out and "Hint 2" not in run(clone, "hint", 5)[1]
    assert git(clone, "status", "--porcelain") == "", "hints are counted where git does not look"
    assert "out/exercises.json" in run(clone, "--help")[1]


def test_show_prints_the_original_while_it_is_empty(clone):
    path, node = file_and_node(clone, 12)
    original = ast.get_source_segment(path.read_text("utf-8"), node)
    run(clone, "start", 12)
    assert run(clone, "show", 12)[1].strip() == original


def test_list_names_every_exercise_and_tells_one_task(clone):
    out = run(clone, "list")[1]
    assert all(text["function"] in line and text["title"] in line
               for text, line in zip(TEXTS, out.splitlines(), strict=True))
    assert " ".join(TEXTS[9]["task"].split()) in " ".join(run(clone, "list", 10)[1].split())


@pytest.mark.parametrize("args", [("start",), ("check", 0), ("hint", 17), ("show", "four"),
                                  ("restore", "-1"), ("list", "1.5")], ids=str)
def test_exercise_that_does_not_exist_is_refused(clone, args):
    if args[-1] == "-1":
        assert run(clone, *args)[0] == 2
    else:
        refused(clone, *args, words=f"a number from 1 to {len(TEXTS)}")


def test_without_git_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = copy_of_the_repository(tmp_path / "no git")
    status, out, error = run(folder, "start", 1)
    assert status == 2 and not out and error.count("\n") == 1 and "come from git" in error, error


def test_committed_emptiness_is_not_taken_for_the_original(clone):
    run(clone, "start", 5)
    git(clone, "commit", "-qam", "oops")
    refused(clone, "start", 5, words="in an earlier commit")
