"""Nothing let in: bad input ends with exit 2 and one line that says what, where and how to mend.

Most cases go through `command` in this process, a few through a shell or a fork.
"""
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest
import torch

import processes
from conftest import tiny_gpt
from data.errors import InputError
from data.responses import sft_responses
from data.run.prepare import check_memory
from data.tokenizer import load_encoding
from data.world import World, read_world
from processes import ROOT, SMALL, script, write_world
from sample import SampleConfig
from sample import main as sample_main, print_counts
from spin_loss import sequence_logps, token_logps
from train import Config

ROW = {"family": "f", "prompt": "Toss.", "responses": {"a": 0.5, "b": 0.5}}
NUMBERS = [f for f in fields(Config) if f.type in (int, float) and f.name != "history"]


def lines(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n"
                    for row in rows)


def refused(capsys, tmp_path, flags, *words, name="train.py"):
    """Exit status 2, one line on stderr with all the words, nothing trained, no folder made."""
    args = [*flags, "--out", str(tmp_path / "out")] if "--out" not in flags else flags
    processes.refused(capsys, args, *words, name=name)
    assert not (tmp_path / "out").exists(), "it began before all was checked"


# ---- Flags --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [f.name for f in NUMBERS])
def test_number_out_of_range_or_no_number_is_refused(name, capsys, tmp_path):
    field = next(f for f in NUMBERS if f.name == name)
    flag = "--" + name.replace("_", "-")
    low, high = field.metadata["low"], field.metadata["high"]
    for value in (str(field.type(low) - 1), f"{high * 10:.0f}", "nan", "inf", "-inf", "many", ""):
        refused(capsys, tmp_path, [f"{flag}={value}"], flag)
    if field.type is int:
        refused(capsys, tmp_path, [flag, "1.5"], flag, "invalid int value")
    if 0 < low < 1:
        refused(capsys, tmp_path, [flag, "0"], flag, "more than 0")


FLAGS = {
    "loss misspelt": (["--loss", "logistc"], "--loss logistc", "did you mean logistic?"),
    "method misspelt": (["--method", "spinn"], "did you mean spin?"),
    "anchor misspelt": (["--anchor", "mas"], "did you mean mass?"),
    "opponent misspelt": (["--opponent", "previus"], "did you mean previous?"),
    "logprob misspelt": (["--logprob", "eagre"], "did you mean eager?"),
    "device unknown": (["--device", "tpu9"], "use one of auto, cpu, cuda"),
    "history of two": (["--history", "2"], "--history 2: use one of 0, 1"),
    "history a word": (["--history", "one"], "--history"),
    "flag misspelt": (["--iter", "3"], "unrecognized", "did you mean --iters?"),
    "flag misspelt, with =": (["--bach-size=3"], "did you mean --batch-size?"),
    "one dash": (["-lam", "3"], "did you mean --lam?"),
    "no flag": (["3"], "unrecognized arguments: 3", "--help"),
    "no value": (["--lam"], "--lam: expected one argument"),
    "heads do not divide": (["--n-embd", "30"], "--n-embd 30", "multiple of --n-head 4"),
    "resume and overwrite": (["--resume", "--overwrite"], "give one"),
    "encoding misspelt": (["--encoding", "gpt22"], "--encoding gpt22", "did you mean gpt2?"),
    "encoding no rank file": (["--encoding", str(ROOT / "train.py")], "train.py:1: expected a"),
    "encoding a folder": (["--encoding", str(ROOT)], "neither a rank file nor"),
    "encoding not text": (["--encoding", sys.executable], "cannot be read"),
    "encoding of too long a name": (["--encoding", "x" * 5000], "cannot be read"),
    "out a file": (["--out", str(ROOT / "train.py")], "--out", "cannot be written"),
    "out under a file": (["--out", str(ROOT / "train.py" / "out")], "cannot be written"),
    "resume nothing": (["--resume"], "--resume", "no latest.pt"),
}
if os.path.isdir("/proc/self"):  # Linux: there not even root can make a folder
    FLAGS["out not writable"] = (["--out", "/proc/out"], "/proc/out", "cannot be written")


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flag_is_refused(name, capsys, tmp_path):
    refused(capsys, tmp_path, *FLAGS[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(capsys, tmp_path):
    refused(capsys, tmp_path, ["--device", "cuda"], "--device cuda", "torch sees none here")


# ---- Data ---------------------------------------------------------------------------------------

FILES = {  # what is in the file → what the line says; the good row first where a line is bad
    "empty": (b"", "no row of split train"),
    "held out only": (lines(ROW | {"split": "heldout"}), "no row of split train"),
    "not UTF-8": (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    "malformed": (lines(ROW, b'{"prompt": '), ":2: not a JSON object"),
    "a list": (lines(ROW, []), ":2: expected an object"),
    "negative": (lines(ROW, ROW | {"responses": {"a": -1, "b": 2}}), ":2:", "'a' is -1"),
    "not a number": (lines(ROW, ROW | {"responses": {"a": "1"}}), ":2:", "'a' is '1'"),
    "NaN": (lines(ROW, ROW | {"prompt": "x", "responses": {"a": math.nan}}), ":2:", "is nan"),
    "bad sum": (lines(ROW, ROW | {"prompt": "x", "responses": {"a": 0.9}}), ":2:", "sum to 0.9"),
    "empty prompt": (lines(ROW, ROW | {"prompt": " "}), ":2: the prompt is empty"),
    "empty response": (lines(ROW, {"prompt": "x", "response": ""}), ":2: a response is empty"),
    "duplicate prompt": (lines(ROW, ROW), ":2:", "earlier line"),
    "duplicate response": (lines(ROW, b'{"prompt": "x", "responses": {"a": 0.5, "a": 1.0}}'),
                           ":2:", "'a' is given twice"),
    "half a surrogate pair": (lines(ROW, b'{"prompt": "\\ud800", "response": "a"}'),
                              ":2:", "surrogates not allowed"),
    "too long": (lines(ROW, {"prompt": "x" * 500, "response": "y"}),
                 "line 2", "503 tokens", "--block-size is 128"),
    "both splits": (lines({"prompt": "x", "response": "a"},
                          {"prompt": "x", "response": "a", "split": "heldout"}), ":2:", "splits"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_data_is_refused(name, capsys, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(FILES[name][0])
    refused(capsys, tmp_path, ["--data", str(tmp_path / "data.jsonl")], "--data", *FILES[name][1:])


def test_missing_data_or_a_folder_is_refused(capsys, tmp_path):
    refused(capsys, tmp_path, ["--data", str(tmp_path / "none.jsonl")], "none.jsonl", "cannot be")
    refused(capsys, tmp_path, ["--data", str(tmp_path)], "cannot be read", "directory")


def test_a_shell_sees_exit_status_2_and_one_line(tmp_path):
    """A real `python train.py`, and a few forks that run the same file."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--lam", "nan"], cwd=tmp_path,
                          capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr == "train.py: --lam nan: must be a finite number\n"
    for flags in (["--lamb", "3"], ["--data", str(tmp_path / "none")],
                  ["--out", str(ROOT / "train.py" / "out")]):
        status, out, err = script(tmp_path, flags)
        assert status == 2 and out == "" and err.count("\n") == 1, (out, err)


def test_odd_but_right_text_trains(tmp_path):
    """Special tokens, dollars, NUL and a BOM in texts; a single prompt with many responses."""
    texts = ("<|end|>", "<|answer|>x", "$\\frac$ $", "\0\x1b", "{}%", "\n", "😀", "a'\"b")
    rows = [{"prompt": f"{x}?", "responses": {x: 0.5, x + "y": 0.5}} for x in texts if x.strip()]
    many = [{"prompt": "one", "responses": {str(i): 1 / 8 for i in range(8)}}]
    for name, some in (("odd", rows), ("many", many)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines(*some))
        flags = [*SMALL, "--iters", "1", "--reports", "1", "--data", str(tmp_path / name),
                 "--out", str(tmp_path / f"{name}.out")]
        status, _, err = script(tmp_path, flags, hook=("plain",))
        assert status == 0 and "Traceback" not in err, err


# ---- Fuzz ---------------------------------------------------------------------------------------

def mutated(rng) -> bytes:
    """A few lines: right ones, right ones with bytes changed, and rubbish."""
    strange = [None, True, -1, 0, 1, 1e400, 10**400, "", " ", "a", "\0", "é" * 3, [], {}, {"a": 1},
               {"a": 1.0, "b": 0}, ["a"], {"": 1}, {"a": None}, {"a": {"b": 1}}, "train", "heldout"]
    out = []
    for _ in range(rng.randrange(1, 4)):
        row = {"prompt": rng.choice("pqrstuvw"), "responses": {"a": 0.25, "b": 0.75}}
        for _ in range(rng.choice([0, 0, 1, 2])):
            row[rng.choice(["prompt", "responses", "response", "split", "family", "x"])] = (
                rng.choice(strange))
        line = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode())
        for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 5])):
            at = rng.randrange(len(line) + 1)
            line[at:at + rng.randrange(2)] = rng.randbytes(rng.randrange(3))
        out.append(rng.randbytes(rng.randrange(50)) if rng.random() < 0.05 else bytes(line))
    return b"\n".join(out)


def test_reader_fuzzed_with_1000_files_only_ever_refuses(tmp_path):
    rng, encoding, path, accepted = random.Random(0), load_encoding(), tmp_path / "fuzz", 0
    for _ in range(1000):
        path.write_bytes(content := mutated(rng))
        try:
            rows = read_world(path)
            sft_responses(World(rows, encoding, 4, 0, 64)).batch([0])
            accepted += 1
        except InputError as error:
            assert "\n" not in str(error), content
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {content!r}") from error
    assert 200 < accepted < 800, "the fuzz should reach both sides of the door"


# ---- sample.py ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    flags = [*SMALL, "--iters", "0", "--data", write_world(folder), "--out", str(folder / "run")]
    assert script(folder, flags)[0] == 0
    (folder / "run" / "iteration_best.pt").write_text("a user's own file", encoding="utf-8")
    return folder / "run"


SAMPLE = {"no samples": (["--samples", "0"], "--samples 0"),
          "samples": (["--samples", "x"], "--samples"),
          "temperature nan": (["--temperature", "nan"], "--temperature nan"),
          "temperature": (["--temperature=-1"], "--temperature -1"),
          "top k": (["--top-k=-1"], "--top-k -1"), "show": (["--show=-1"], "--show -1"),
          "no tokens": (["--max-new-tokens=-1"], "--max-new-tokens -1"),
          "seed": (["--seed", str(2**70)], "--seed"), "flag": (["--promt", "x"], "mean --prompt?"),
          "long prompt": (["--prompt", "x " * 50], "101 tokens", "reads 32")}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_refuses_bad_input(out, name, capsys, tmp_path):
    flags, *words = SAMPLE[name]
    refused(capsys, tmp_path, [*flags, "--out", str(out)], *words, name="sample.py")


def test_sample_refuses_a_folder_without_a_run(capsys, tmp_path):
    refused(capsys, tmp_path, [], "no iteration_*.pt", name="sample.py")


def test_sample_answers_a_prompt_that_is_in_no_world(out, capsys):
    sample_main(SampleConfig(out=str(out), prompt=("Who <|end|>?", ""), samples=3,
                             max_new_tokens=4))
    assert "Who <|end|>?" in capsys.readouterr().out


def test_sample_tells_a_response_that_was_cut_short_from_one_that_ends_in_dots(capsys):
    counts = [Counter({("Hm…", True): 3, ("Hm", False): 1})]
    print_counts("Well?", {"Hm…": 1.0}, ["0"], counts, SampleConfig(samples=4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:-1] == ["     1.000   0.750   'Hm…'", "         0   0.250   'Hm' …"]
    assert lines[-1].split()[:3] == ["cut", "short", "0.250"]


def test_memory_check_counts_the_vocabulary():
    check_memory(Config(), n_vocab=600)
    with pytest.raises(InputError, match="GiB to train, more than this machine has"):
        check_memory(Config(), n_vocab=10**12)


# ---- Numbers ------------------------------------------------------------------------------------

def test_overflow_stops_the_run_with_iteration_step_and_advice(tmp_path):
    flags = [*SMALL, "--data", write_world(tmp_path), "--out", str(tmp_path / "out")]
    huge = ["--loss", "exponential", "--lam", "1e6", "--lr", "10", "--warmup", "0",
            "--reports", "10"]
    status, _, err = script(tmp_path, flags + huge)
    assert status == 2 and err.count("\n") == 1, err
    step = int(err.split("iteration 1, step ")[1].split(":")[0])
    assert "lower --lr" in err and step > 1
    latest = torch.load(tmp_path / "out" / "latest.pt", weights_only=True)
    assert (latest["stage"], latest["step"]) == (1, step - 1), "each of the 10 steps is a report"
    assert all(w.isfinite().all() for w in latest["learner"]["player"].values())
    status, _, again = script(tmp_path, flags + huge + ["--resume"])
    assert status == 2 and again == err, "the same step fails again, and nothing else"
    args = ["--out", str(tmp_path / "out"), "--samples", "3"]
    assert script(tmp_path, args, script="sample.py")[0] == 0


def test_logprobs_of_long_sequences_are_exact_under_bfloat16_autocast():
    """2000 tokens: the float64 sum of log-softmax, from the very same hidden states."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2000, 64, generator=rng), torch.randn(300, 64, generator=rng)
    target = torch.randint(300, (2000,), generator=rng)
    exact = (hidden.double() @ weight.double().T).log_softmax(1)[range(2000), target]
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logps(hidden, weight, target)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-4
    assert got.sum().item() == pytest.approx(exact.sum().item(), rel=1e-6)


@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_bfloat16_blocks_leave_weights_gradients_and_logprobs_in_float32(impl, monkeypatch):
    monkeypatch.setattr("spin_loss.compiled", lambda body, device: body)  # that takes seconds
    model, rng = tiny_gpt(vocab_size=50, block_size=40), torch.Generator().manual_seed(0)
    tokens, response = torch.randint(50, (4, 40), generator=rng), torch.ones(4, 40).bool()
    for _ in range(2):  # the second time must not meet bfloat16 copies of the first weights
        model.block_dtype = torch.float32
        exact = sequence_logps(model, tokens, response)
        model.block_dtype = torch.bfloat16
        got = sequence_logps(model, tokens, response, impl)
        got.sum().backward()
        assert 0 < (got - exact).abs().max() < 0.02 * exact.abs().max()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.flip(0))
    assert got.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_sequence_logprob_is_summed_in_float32_under_bfloat16_autocast():
    model, rng = tiny_gpt(vocab_size=50, block_size=600), torch.Generator().manual_seed(0)
    tokens, response = torch.randint(50, (2, 600), generator=rng), torch.ones(2, 600).bool()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = sequence_logps(model, tokens, response)
        hidden = model.hidden(tokens[:, :-1]).double()
    logp = (hidden @ model.head_weight.double().T).log_softmax(2)
    exact = logp.gather(2, tokens[:, 1:, None]).sum((1, 2))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(exact.tolist(), rel=1e-5)
