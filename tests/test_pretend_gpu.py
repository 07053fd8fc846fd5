"""`train.py --device cuda` on a pretended GPU: no two devices meet, and Python seldom waits.

The pretence is tests/pretend_gpu.py: it must count every wait, and the rehearsal must fail when
one of the places in the code that name a device is changed.
"""
import copy
import importlib
import json
import re
import sys
import types
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import spin_loss
import train
from bench.step import QUICK, fit, stages
from pretend_gpu import PretendGPU
from processes import without_figures
from sample import SampleConfig, generate
from sample import main as ask

ROOT = Path(__file__).resolve().parents[1]
FEW = QUICK | dict(n_embd=16, steps=3, sft_steps=3, reports=2, device="cuda")


# --- the pretence --------------------------------------------------------------------------------

def test_every_way_to_wait_is_counted():
    mask = torch.tensor([True, False, True])
    for wait in (lambda x, m: x.sum().item(), lambda x, m: bool(x.any()), lambda x, m: int(x[0]),
                 lambda x, m: x[m], lambda x, m: m.nonzero(), lambda x, m: x.tolist(),
                 lambda x, m: torch.where(m), lambda x, m: x.masked_select(m),
                 lambda x, m: x.unique(), lambda x, m: torch.equal(x, x), lambda x, m: x.cpu(),
                 lambda x, m: x.to("cpu"), lambda x, m: torch.ones(2).to("cuda"),
                 lambda x, m: torch.tensor([1], device="cuda"), lambda x, m: f"{x.sum():.1f}",
                 lambda x, m: x.copy_(torch.ones(3))):
        with PretendGPU() as gpu:
            on = torch.ones(3).to("cuda"), mask.to("cuda")
            gpu.waits.clear()
            wait(*on)
        assert gpu.waits.total() == 1
    with PretendGPU() as gpu:
        x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        x[torch.arange(2, device="cuda")].masked_fill(x[:2] > 0, 1.0).sum()
        mask.tolist(), torch.ones(3)[mask]
    assert not gpu.waits


# --- the rehearsal -------------------------------------------------------------------------------

def test_the_main_job_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    """SFT, two iterations, a run that is stopped within the second and resumed, sample.py."""
    without_figures(monkeypatch)  # no tensor reaches them
    config, save = dict(out=str(tmp_path / "out"), **FEW), train.Run.save

    def stopped(run, t, rows, step, player, learner, finished):
        save(run, t, rows, step, player, learner, finished)
        if t == 2:
            raise KeyboardInterrupt
    with PretendGPU():
        monkeypatch.setattr(train.Run, "save", stopped)
        with suppress(KeyboardInterrupt):
            train.main(train.Config(iters=2, **config))
        monkeypatch.setattr(train.Run, "save", save)
        train.main(train.Config(iters=2, resume=True, **config))
        ask(SampleConfig(out=config["out"], samples=5))
    rows = list(map(json.loads, open(tmp_path / "out/metrics.jsonl", encoding="utf-8")))
    assert rows[-1]["event"] == "iteration" and rows[-1]["iteration"] == 2
    assert "p_2" in capsys.readouterr().out


def test_own_pairs_train_there(tmp_path, monkeypatch):
    without_figures(monkeypatch)
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with PretendGPU():
        train.main(train.Config(iters=1, data=str(path), heldout=0.2, out=str(tmp_path / "out"),
                                **FEW))
    assert (tmp_path / "out/iteration_1.pt").is_file()


@pytest.fixture(scope="module")
def stage():
    return stages(1, **FEW | {"device": "cpu"})[1]


SETTINGS = [dict(anchor="none"), dict(anchor="mass"), dict(anchor="sft"), dict(method="sft"),
            dict(logprob="fused"), *(dict(loss=loss) for loss in train.LOSSES)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_waits_at_most_once(stage, settings, monkeypatch):
    """In every method, anchor and loss; the one wait asks whether the gradient is finite."""
    monkeypatch.setattr("spin_loss.compiled", lambda body, device: body)  # it is slow to compile
    for name, value in settings.items():
        monkeypatch.setattr(stage.config, name, value)
    found = []
    with PretendGPU() as gpu:
        fit(stage, 3, lambda: found.append(gpu.waits.copy()), device="cuda")
    for before, after in zip(found, found[1:]):
        assert (after - before).total() <= 1, f"one step waits for {after - before}"


def test_sampling_waits_once_for_each_token(stage):
    model = train.new_policy(stage.world, stage.config)
    with PretendGPU() as gpu:
        model.to("cuda")
        for most in (5, 15):
            gpu.waits.clear()
            generate(model, stage.world.prompts[:8], max_new_tokens=most, end_token=-1,
                     generator=torch.Generator("cuda"))
            assert gpu.waits["nonzero"] == most
            assert gpu.waits.total() - most <= 5, "before the first and after the last token"


# --- a mistake turns it red ----------------------------------------------------------------------

def rehearse(train, spin_loss, stage):
    """What a run does with tensors: samples, the opponent's pass, one step. On a few prompts."""
    world, config = copy.copy(stage.world), stage.config
    world.prompts, world.splits = world.prompts[:4], {"train": [0, 1, 2, 3]}
    with PretendGPU() as gpu:
        model = train.new_policy(stage.world, config).to("cuda")
        responses = train.self_play(model, 0, SimpleNamespace(world=world, config=config))
        gpu.waits.clear()
        for part in responses.parts(range(4), "cuda"):
            train.spin_objective(model, part, config).sum().backward()
        assert not gpu.waits, f"a step waits for {gpu.waits}"
        tokens_BT = torch.ones(2, 5, dtype=torch.long, device="cuda")
        assert spin_loss.sequence_logps(model, tokens_BT, tokens_BT > 0).is_cuda


def test_the_rehearsal_passes(stage):
    rehearse(train, spin_loss, stage)


NAMES_A_DEVICE = re.compile(r"\.to\(device(, non_blocking=True)?\)|, device=[\w.]+")
OF_A_CPU = "return tensor.to(device)", "fast(torch.zeros"  # lines that no rehearsal comes to


def places():
    """(file, where, words) of each place that names a device and that the rehearsal comes to."""
    for path in ("model.py", "spin_loss.py", "sample.py", "data/responses.py"):
        text = (ROOT / path).read_text("utf-8").split("@torch.no_grad()\ndef expectation")[0]
        for match in NAMES_A_DEVICE.finditer(text):
            line = text[text.rindex("\n", 0, match.start()):match.end()]
            if not any(words in line for words in OF_A_CPU):
                yield path, match.start(), match.group()


@pytest.mark.parametrize("path, start, words", list(places()))
def test_without_one_of_the_places_that_name_a_device_it_fails(path, start, words, stage,
                                                               monkeypatch):
    text = (ROOT / path).read_text("utf-8")
    for name, module in list(sys.modules.items()):  # all of the project is imported anew
        file = Path(getattr(module, "__file__", None) or "/")
        if ROOT in file.parents and not {"tests", ".venv"} & {*file.relative_to(ROOT).parts}:
            monkeypatch.delitem(sys.modules, name)
    changed = types.ModuleType(path.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, changed.__name__, changed)
    exec(text[:start] + text[start + len(words):], vars(changed))
    again = [importlib.import_module(name) for name in ("train", "spin_loss")]
    with pytest.raises((RuntimeError, AssertionError, TypeError), match="device|cuda|wait"):
        rehearse(*again, stage)


def test_if_nothing_is_moved_to_the_gpu_it_fails(stage, monkeypatch):
    monkeypatch.setattr("data.responses.to_device", lambda tensor, device: tensor)
    with pytest.raises(RuntimeError, match="same device"):
        rehearse(train, spin_loss, stage)
