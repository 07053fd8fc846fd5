"""Nothing let in: bad input ends with exit 2 and one line that says what, where and how to mend.

Here is what the command line refuses. What is wrong inside a file of data or of tokens is in
test_world.py, and of GPT-2's weights in test_gpt2.py.
"""
import json
import os
from dataclasses import fields

import pytest
import torch

import processes
from data import InputError
from data.run.files import load
from data.run.options import check_limits, parse_args
from processes import ROOT, SMALL, script, without_figures, write_world
from sample import SampleConfig
from train import Config, main

PAIR = {"prompt": "x", "response": "a"}


def lines(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n"
                    for row in rows)


# what is in data.jsonl, None if it is not given → flags → what the line says
TRAIN = {
    "loss misspelt": (None, ["--loss", "logistc"], "--loss logistc: use one of logistic, hinge"),
    "half a step": (None, ["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
    "flag misspelt": (None, ["--iter", "3"], "unrecognized arguments: --iter", "--help"),
    "one dash": (None, ["-lam", "3"], "unrecognized arguments: -lam", "--help"),
    "heads do not divide": (None, ["--n-embd", "30"], "--n-embd 30", "multiple of --n-head 4"),
    "resume and overwrite": (None, ["--resume", "--overwrite"], "give one"),
    "encoding misspelt": (None, ["--encoding", "gpt22"], "--encoding gpt22", "gpt2, "),
    "init missing": (None, ["--init", "/none/model.safetensors"], "/none/model.safetensors"),
    "out a file": (None, ["--out", str(ROOT / "train.py")], "--out", "train.py"),
    "out under a file": (None, ["--out", str(ROOT / "train.py" / "out")], "--out", "train.py"),
    "data missing": (None, ["--data", "/none.jsonl"], "--data /none.jsonl: cannot be read"),
    "malformed row": (lines(PAIR, b'{"prompt": '), [], "data.jsonl:2: not JSON"),
    "row too long": (lines(PAIR, {"prompt": "x" * 500, "response": "y"}), [],
                     "data.jsonl", "line 2", "503 tokens", "--block-size is 128"),
    "one prompt, none to hold out": (lines(PAIR), ["--heldout", "0.5"], "data.jsonl", "only one"),
}
if os.path.isdir("/proc/self"):  # Linux: there not even root can make a folder
    TRAIN["out not writable"] = (None, ["--out", "/proc/out"], "--out /proc/out")
if not torch.cuda.is_available():
    TRAIN["no GPU"] = (None, ["--device", "cuda"], "--device cuda: torch sees no GPU")


@pytest.mark.parametrize("name", TRAIN)
def test_train_refuses(name, capsys, tmp_path):
    """In one line, before anything is trained and before a folder is made."""
    content, flags, *words = TRAIN[name]
    if content is not None:
        (tmp_path / "data.jsonl").write_bytes(content)
        flags = ["--data", str(tmp_path / "data.jsonl"), *flags]
    processes.refused(capsys, ["--out", str(tmp_path / "out"), *flags], *words)
    assert not (tmp_path / "out").exists(), "it began before all was checked"


@pytest.mark.parametrize("kind", [Config, SampleConfig])
def test_every_value_is_held_to_its_limits_and_choices(kind):
    for f in fields(kind):
        low, high = f.metadata["low"], f.metadata["high"]
        flag, values = "--" + f.name.replace("_", "-"), []
        if low is not None:
            values += [low - 1, *([0] if 0 < low < 1 else [])]
        if high is not None:
            values.append(high * 10 + 1)
        if f.type is float:
            values += [float("nan"), float("inf"), -float("inf")]
        if f.metadata["choices"]:
            values.append("misspelt")
        for value in values:
            with pytest.raises(InputError, match=f"^{flag} "):
                check_limits(kind(**{f.name: f.type(value)}))
        if f.type in (int, float):
            assert low is not None, f"{flag} has no limit"
            with pytest.raises(InputError, match=f"^{flag} "):
                check_limits(kind(**{f.name: "1"}))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """--out of a run of SFT alone, and a user's own file in it."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        main(parse_args(Config, "", [*SMALL, "--iters", "0", "--data", write_world(folder),
                                     "--out", str(folder / "run")]))
    (folder / "run" / "iteration_best.pt").write_text("a user's own file", encoding="utf-8")
    return folder / "run"


SAMPLE = {
    "no samples": (["--samples", "0"], "--samples 0: must be at least 2"),
    "long prompt": (["--prompt", "x " * 50], "101 tokens", "reads 32", "shorten"),
    "no run": (["--out", str(ROOT / "tests")], "no iteration_*.pt there", "train.py"),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_refuses(name, out, capsys):
    flags, *words = SAMPLE[name]
    processes.refused(capsys, ["--out", str(out), *flags], *words, name="sample.py")


def test_a_process_ends_with_status_2_and_one_line(tmp_path):
    status, text, err = script(tmp_path, ["--data", "/none", "--out", str(tmp_path / "out")])
    assert (status, text, err.count("\n")) == (2, "", 1)
    assert err.startswith("train.py: --data /none: cannot be read")
    assert not (tmp_path / "out").exists()


def test_overflow_stops_the_run_with_iteration_step_and_advice(tmp_path, capsys, monkeypatch):
    """And leaves the last report, with finite weights; a resumed run fails at the same step."""
    without_figures(monkeypatch)
    flags = [*SMALL, "--data", write_world(tmp_path), "--out", str(tmp_path / "out"),
             "--loss", "exponential", "--lam", "1e6", "--lr", "10", "--reports", "10"]
    line = processes.refused(capsys, flags, "iteration 1, step ", "lower --lr")
    step = int(line.split("step ")[1].split(":")[0])
    latest = load(tmp_path / "out" / "latest.pt")
    assert (latest["stage"], latest["step"]) == (1, step - 1), "each of the 10 steps is a report"
    assert all(p.isfinite().all() for p in latest["learner"][0].values())
    assert processes.refused(capsys, [*flags, "--resume"]) == line


def test_odd_but_right_text_trains(tmp_path, capfd):
    """Special tokens, dollars, NUL, escapes and a BOM in texts; figures and console included."""
    texts = ("<|end|>", "<|answer|>x", "$\\frac$ $", "\0\x1b[31m", "{}%", "\n", "😀", "a'\"b")
    rows = [{"prompt": f"{x}?", "responses": {x: 0.5, x + "y": 0.5}} for x in texts if x.strip()]
    (tmp_path / "odd").write_bytes(b"\xef\xbb\xbf" + lines(*rows))
    main(parse_args(Config, "", [*SMALL, "--iters", "1", "--reports", "1", "--data",
                                 str(tmp_path / "odd"), "--out", str(tmp_path / "out")]))
    text, err = capfd.readouterr()
    assert "\x1b" not in text and "\0" not in text and err == ""
