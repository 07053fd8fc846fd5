"""The benches compare equal work, and still run. Nothing about speed is asserted."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data.responses as tables
import train
from baselines import generate_uncached, one_by_one, padded_logps
from bench_train import GENERATORS, TINY, WAYS, ask, prepare, requests

BENCH = Path(__file__).with_name("bench_train.py")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("bench"), quick=True)


@pytest.mark.parametrize("way", [padded_logps, one_by_one])
def test_a_plain_baseline_has_the_shipped_loss_and_gradient(material, monkeypatch, way):
    m = material
    for t, objective, table in ((0, train.sft_objective, m.sft), (1, train.spin_objective, m.spin)):
        batch, found = table.select(m.world.splits["train"][:9]), []
        for scored_by in (tables.answer_logps, way):
            monkeypatch.setattr(train, "answer_logps", scored_by)
            total, loss = objective(m.player, batch, m.config)
            grads = torch.autograd.grad(total, list(m.player.parameters()))
            found.append((total, loss, torch.cat([g.flatten() for g in grads])))
        for shipped, plain in zip(*found):
            torch.testing.assert_close(plain, shipped, rtol=1e-4, atol=1e-4)


def test_a_row_for_every_draw_is_the_same_mean(material):
    """SFT on unmerged draws has the merged loss: counts as weights change nothing."""
    m, train_prompts = material, material.world.splits["train"]
    merged, _ = train.sft_objective(m.player, m.sft.select(train_prompts), m.config)
    every, _ = train.sft_objective(m.player, m.sft_draws.select(train_prompts), m.config)
    assert len(m.sft_draws.prompt_N) == m.config.sft_samples * len(train_prompts)
    torch.testing.assert_close(every, merged, rtol=1e-4, atol=1e-4)


def test_uncached_generation_draws_the_same_answers(material):
    for prompts in requests(material).values():
        cached, uncached = (ask(material, name, prompts) for name in ("shipped", "uncached"))
        same = sum(a == b for a, b in zip(cached, uncached))
        # Rounding may tip a draw near a boundary; then that answer ends otherwise, and the
        # uniforms of those that go on after it are other rows' ones.
        assert same > 0.9 * len(prompts)
    assert GENERATORS["uncached"] is generate_uncached


def test_the_quick_bench_prints_whole_tables():
    done = subprocess.run([sys.executable, BENCH, "--quick", "--parts", "rates"], timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in done.stdout.splitlines() if line.startswith("|") and "---" not in line]
    named = {(cells[0], cells[1]): cells[2:] for cells in rows}
    expected = {(work, way) for work in ("SFT", "SPIN") for way in WAYS}
    expected |= {(asked, way) for asked in ("256 prompts", f"64 × {TINY['negatives']}")
                 for way in GENERATORS}
    assert expected <= named.keys()
    for key in expected:
        numbers = [float(re.match(r"[\d.e+-]+", cell.replace(",", "")).group())
                   for cell in named[key]]
        assert len(numbers) == 6 and all(0 < x < float("inf") for x in numbers), named[key]
