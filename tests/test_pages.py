"""The pages speak of what exists: commands run; links, files, flags and names are there.

Each training command of a page is run in this process, made small by flags behind it. The README's
own block of commands is run as it stands, in its order, in a copy of the repository.
"""
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data.run.checkpoint
import train
from copies import copy_of_the_repository

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({ROOT / "README.md", *(ROOT / "data").rglob("*.md"),
                *(ROOT / "tests").rglob("*.md")})
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8").replace("\\\n", " ")
        for page in PAGES}
SMALL = ("--iters 1 --steps 2 --sft-steps 2 --reports 1 --n-layer 1 --n-head 2 --n-embd 16 "
         "--negatives 2 --batch-size 8 --sft-samples 2 --overwrite")


def code(page) -> list[str]:
    """The lines of code blocks marked sh, and what stands between backticks in the text."""
    found = re.findall(r"```sh\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", TEXT[page], re.S)
    lines = [line for block, inline in found for line in (block.split("\n") if block else [inline])]
    return [line.split("  #")[0].strip() for line in lines]


def commands(page) -> list[str]:
    """Commands that start with python; "…" marks a pattern rather than a command."""
    return list(dict.fromkeys(c for c in code(page) if re.match(r"(\w+=\S+ )*python3? ", c)
                              and "…" not in c))


EVERY = [(page, command) for page in TEXT for command in commands(page)]
TRAINING = sorted({command for _, command in EVERY if " train.py" in command})


@pytest.mark.parametrize("command", TRAINING)
def test_every_training_command_runs(command, tmp_path, monkeypatch, capsys):
    words = shlex.split(command.split("train.py")[1])
    if "--help" in words:
        return
    for name in ("draw_convergence", "draw_gif"):
        monkeypatch.setattr(data.run.checkpoint, name, lambda *whatever: b"")
    own_files = {"--init", "--data", "--encoding"} & {word.split("=")[0] for word in words}
    if own_files:  # the reader's own; the flags must be right
        assert train.parse_args(train.Config, "", words) != train.Config()
        return
    words = [word for word in words if word not in ("--resume", "--show")] + SMALL.split()
    if "dpo" in words:  # its judge needs a right response to rank
        words += ["--sft-steps", "30", "--sft-lr", "1e-2"]
    train.main(train.parse_args(train.Config, "", [*words, "--out", str(tmp_path / "out")]))
    assert (tmp_path / "out" / "iteration_1.pt").exists()


def test_pages_name_many_training_commands():
    assert len(TRAINING) >= 12, TRAINING


def test_the_readmes_commands_run_in_their_order_in_a_copy(tmp_path):
    folder = copy_of_the_repository(tmp_path / "copy")
    block = next(b for b in re.findall(r"```sh\n(.*?)```", TEXT["README.md"], re.S)
                 if "train.py" in b)
    lines = [line.split("  #")[0].strip() for line in block.split("\n")
             if line.startswith("python ")]
    assert len(lines) >= 3 and lines[-1] == "python -m pytest"
    for line in lines[:-1]:  # the last is what .ci/run calls
        small = SMALL if " train.py" in line else "--samples 10"
        done = subprocess.run([sys.executable, *shlex.split(line)[1:], *small.split()], cwd=folder,
                              text=True, capture_output=True, timeout=200, encoding="utf-8",
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{line} {small}\n{done.stderr}"
    assert (folder / "out" / "convergence.gif").exists()


@pytest.mark.parametrize("page, command", [(page, command) for page, command in EVERY
                                           if " train.py" not in command])
def test_every_other_command_has_its_script_and_its_flags(page, command):
    """A flag stands in the text of its script, or is a field of the script's dataclass."""
    words = shlex.split(re.sub(r"^(\w+=\S+ )*", "", command))[1:]
    if words[0] == "-m":
        if words[1] in ("venv", "pytest", "pip"):
            return
        place = ROOT / words[1].replace(".", "/")
        script = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    else:
        script = ROOT / words[0]
    assert script.is_file(), f"{page}: {command}"
    texts = "".join(path.read_text("utf-8") for path in {script, *script.parent.glob("*.py")})
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        field = flag[2:].replace("-", "_")
        assert flag == "--help" or f'"{flag}"' in texts or f"    {field}: " in texts, (
            f"{page}: {command}: {script.name} has no {flag}")


def test_the_students_sheet_asks_what_the_answers_answer():
    """EXPERIMENTS.md is ANSWERS.md without the answers: its questions, and no other command."""
    sheet, answers = (f"tests/classroom/{name}.md" for name in ("EXPERIMENTS", "ANSWERS"))
    questions = [re.findall(r"^## .*", TEXT[page], re.M) for page in (sheet, answers)]
    assert questions[0] == questions[1] and len(questions[0]) == 8
    words = lambda page: " ".join(TEXT[page].split())  # a command may be wrapped
    missing = [command for command in commands(sheet)
               if " --out " in command and command not in words(answers)]
    assert not missing, missing


@pytest.mark.parametrize("page", TEXT)
def test_every_link_leads_somewhere(page):
    """Links to files, from the page's own folder; those to the web are not followed."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXT[page]):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", TEXT)
def test_every_file_and_flag_that_a_page_names_exists(page):
    words = [word for line in code(page) for word in line.split()]
    for name in {w.strip(",.:;()") for w in words if re.fullmatch(
            r"[\w./]+\.(py|jsonl|tiktoken|txt|toml|md)[,.:;)]*", w)}:
        places = [ROOT, ROOT / "data", ROOT / "tests", (ROOT / page).parent, ROOT / "data" / "run"]
        known = name.startswith("out/") or "FILE" in name or name in ("metrics.jsonl",)
        assert known or any((place / name).exists() for place in places), f"{page}: {name}"


def test_every_function_that_the_readme_names_exists():
    modules = [importlib.import_module(name) for name in (
        "model", "spin_loss", "sample", "train", "data.responses", "data.metrics")]
    names = {c for c in code("README.md")
             if re.fullmatch(r"[a-z]+_[a-z_0-9]+|FusedLogps|main|fit", c)}
    assert len(names - {"p_data", "p_t"}) >= 6
    for name in names - {"p_data", "p_t"}:
        assert any(hasattr(module, name) for module in modules), name


def test_every_test_that_the_page_of_symptoms_names_exists():
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TEXT["data/SYMPTOMS.md"])
    assert len(named) >= 8
    for name in named:
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("page", TEXT)
def test_pages_are_written_in_lines_of_at_most_a_hundred_columns(page):
    """But for the rows of a table, which cannot be broken."""
    for number, line in enumerate((ROOT / page).read_text("utf-8").split("\n"), 1):
        assert len(line) <= 100 or line.startswith(("|", "!", "    ")), f"{page}:{number}"
