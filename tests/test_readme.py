"""README.md speaks of what exists: its commands run, its files, flags and functions are there.

Each command is run as it stands, in its order, in a copy of the repository, with flags behind it
that make it small; `python -m pytest` and `pip install` are what .ci/run calls.
"""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import model
import spin_loss
import train
from copies import copy_with_a_history
from data.options import check, parse_args

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
CODE = [c for block, inline in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", TEXT, re.S)
        for c in (block.split("\n") if block else [inline])]
COMMANDS = list(dict.fromkeys(c.split("  #")[0].strip() for c in CODE if re.match(
    r"(python|torchrun|mkdir) ", c) and "…" not in c))
TRAIN = sorted(c for c in COMMANDS if re.match(r"(python|torchrun .*?) train\.py\b", c))
SMALL = {  # what stands behind a command to make it small, by the script that it calls
    "train.py": "--iters 1 --steps 2 --sft-steps 2 --reports 1 --n-layer 1 --n-head 2 --n-embd 16 "
                "--negatives 2 --batch-size 8 --sft-samples 2 --overwrite",
    "sample.py": "--samples 10", "tests/bench_logps.py": "--diagram",
    "tests/study.py": "--quick --parts switches",
    "tests/bench_train.py": "--quick --parts rates", "spin_loss.py": "",
    "tests/exercises.py": "", "tests/other_worlds.py": ""}
BY_CI = ("python -m pytest",)


@pytest.mark.parametrize("command", TRAIN)
def test_every_training_command_is_accepted(command):
    words = shlex.split(command)
    words = words[words.index("train.py") + 1:]
    if "--help" not in words:
        check(parse_args(train.Config, "", words))


def test_readme_names_training_commands_at_all():
    assert len(TRAIN) >= 5, TRAIN


def test_every_command_runs_in_the_order_of_the_readme(tmp_path):
    folder = copy_with_a_history(tmp_path / "copy")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in COMMANDS:
        script = re.search(r"[\w/]+\.py\b", command)
        if command in BY_CI or "--help" in command:
            continue
        command = command.replace(" --peer trl", "")  # which the requirements do not have
        small = SMALL[script[0]] if script else ""
        done = subprocess.run(f"{command} {small}", shell=True, cwd=folder, text=True,
                              capture_output=True, timeout=300,
                              env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{command} {small}\n{done.stderr}"


def test_every_flag_exists():
    """Of train.py, or in the text of another script that the README calls."""
    others = "".join(path.read_text("utf-8") for path in [
        ROOT / "sample.py", *(ROOT / "tests").glob("*.py"), *(ROOT / "data").glob("*.py")])
    for flag in {f for c in CODE for f in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", c)}:
        field = flag[2:].replace("-", "_")
        known = field in train.Config.__dataclass_fields__ or f'"{flag}"' in others
        assert known or field in ("nproc_per_node", "help") or f"    {field}: " in others, flag


def test_every_file_exists():
    names = {n for c in CODE for n in re.findall(r"[\w./]+\.(?:py|jsonl|tiktoken|txt)\b", c)}
    names |= set(re.findall(r"\]\((\.github/[^)]+)\)", TEXT))
    for name in names:
        found = [ROOT / name, ROOT / "tests" / name, ROOT / "data" / name]
        assert name.startswith(("out/", "FILE")) or any(path.exists() for path in found), name


def test_every_function_exists():
    names = {c for c in CODE if re.fullmatch(r"[a-z]+_[a-z_0-9]+|FusedLogps|main|fit", c)}
    assert len(names) >= 6
    for name in names:
        assert any(hasattr(module, name) for module in (model, spin_loss, train)), name


def test_every_experiment_has_an_answer_with_its_command_and_figures():
    section = TEXT.split("## Experiments to try")[1].split("\n## ")[0]
    experiments = re.split(r"^(\d+)\. ", section, flags=re.M)[1:]
    answers = re.split(r"^## (\d+)\. ", (ROOT / "tests/ANSWERS.md").read_text("utf-8"), flags=re.M)
    answers = dict(zip(answers[1::2], answers[2::2]))
    assert 6 <= len(experiments) // 2 == len(answers) <= 10
    for number, text in zip(experiments[::2], experiments[1::2]):
        for command in re.findall(r"`(python [^`]+)`", text):
            assert command in answers[number], f"{number}: {command}"
        assert len(re.findall(r"\d\.\d\d", answers[number])) >= 3, f"{number}: figures"
