"""README.md speaks of what exists: its commands parse, its files, flags and functions are there."""
import re
import shlex
from pathlib import Path

import pytest

import model
import spin_loss
import train
from data.options import check, parse_args

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
CODE = [c for block, inline in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", TEXT, re.S)
        for c in (block.split("\n") if block else [inline])]
TRAIN = sorted({c.split("#")[0] for c in CODE if re.match(r"(python|torchrun .*?) train\.py\b", c)
                and "SWITCH" not in c})


@pytest.mark.parametrize("command", TRAIN)
def test_every_training_command_is_accepted(command):
    words = shlex.split(command)
    words = words[words.index("train.py") + 1:]
    if "--help" not in words:
        check(parse_args(train.Config, "", words))


def test_readme_names_training_commands_at_all():
    assert len(TRAIN) >= 5, TRAIN


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
