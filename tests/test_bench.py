"""The benchmarks compare equal work, and still run. Nothing about speed is asserted."""
import argparse
import copy
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from bench import baseline, growth, logps, peers
from bench import train as bench_train
from bench.measure import in_turns
from bench.steps import TINY, Stage, fit_before, fit_now, step_operations
from data.responses import sft_responses
from data.run.prepare import load_world
from data.tokenizer import load_encoding


@pytest.fixture(scope="module")
def stages():
    """(SFT, iteration 1) with a fresh opponent, and a player that differs from it."""
    config = train.Config(device="cpu", **TINY)
    world = load_world(config, load_encoding(config.encoding, config.pattern))
    opponent = train.new_player(world, config)
    sft = Stage(0, config, world, opponent, sft_responses(world))
    spin = Stage(1, config, world, opponent, train.self_play(opponent, config, 0, sft.run(1)))
    player, rng = copy.deepcopy(opponent), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in player.parameters():
            p += 0.05 * torch.randn(p.shape, generator=rng)
    return [replace(stage, player=player) for stage in (sft, spin)]


# --- the step of commit c002988 ------------------------------------------------------------------

@pytest.mark.parametrize("t", [0, 1])
def test_the_baseline_has_todays_loss_and_gradient(stages, t):
    stage = stages[t]
    prompts = stage.world.splits["train"][3:40:4]
    old = (baseline.spin_objective if t else baseline.sft_objective)(
        stage.player, stage.table.select(torch.tensor(prompts)), stage.config)
    new = train.OBJECTIVES["spin" if t else "sft"](
        stage.player, stage.responses.batch(prompts), stage.config)
    torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(loss, list(stage.player.parameters()))
                      for loss in (old, new))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("t", [0, 1])
def test_the_baseline_trains_as_train_does(stages, t):
    """On the same prompts in the same order, at the same rate."""
    stage, learned = stages[t], []
    for fit in (fit_before, fit_now):
        player = fit(stage, 4, lambda: None)
        with torch.no_grad():
            loss = train.OBJECTIVES["spin" if t else "sft"](
                player, stage.responses.batch(stage.world.splits["train"]), stage.config)
        learned.append(loss.item())
    assert learned[0] == pytest.approx(learned[1], abs=2e-3)


@pytest.mark.parametrize("t", [0, 1])
def test_the_baseline_has_the_operations_that_it_is_there_for(stages, t):
    operations, waits = step_operations(fit_before, stages[t])
    assert operations > 3 * step_operations(fit_now, stages[t])[0]
    assert waits > 20


# --- other people's code -------------------------------------------------------------------------

def test_the_careful_loop_has_our_log_probs(stages):
    """Where transformers is not installed its GPT-2 is replaced by ours, with its interface."""
    world, player, responses = stages[1].world, stages[1].player, stages[1].responses
    theirs = SimpleNamespace(
        transformer=lambda tokens, use_cache: SimpleNamespace(
            last_hidden_state=player.hidden(tokens)),
        lm_head=SimpleNamespace(weight=player.head_weight))
    rows = [(world.prompts[p], list(y)) for p in (0, 9, 77) for y in responses.trees.responses[p]]
    with torch.no_grad():
        logp_N = peers.hf_logps(theirs, rows)
        ours_N = train.response_logps(player, responses.trees.batch([0, 9, 77]))
    torch.testing.assert_close(logp_N, ours_N, rtol=1e-4, atol=1e-4)


def test_pairs_take_as_many_responses_as_were_drawn(stages):
    world, config = stages[1].world, stages[1].config
    examples = peers.examples_of(world, config)
    assert {len(some) for some in examples} == {config.sft_samples}
    samples = [Counter({(7, 8): 3, (9,): config.negatives - 3}) for _ in world.prompts]
    for (p, some), first in zip(zip(world.splits["train"], peers.pairs_of(
            world, examples, samples)), examples):
        assert Counter(tuple(other) for _, _, other in some) == samples[p]
        assert [(x, y) for x, y, _ in some] == first[:config.negatives]


def test_without_repeats_a_prompt_has_one_pair(stages):
    stage, end = stages[1], stages[1].world.end_token
    prompts = stage.world.splits["train"][:3]
    rows = [(stage.world.prompts[p], [5, end], [6, end]) for p in prompts]
    alone = peers.without_repeats(stage, rows)
    assert alone.world.splits == {"train": prompts}
    batch = alone.responses.batch(prompts)
    i_B, j_B, weight_B = batch.pairs("real", "generated")
    kept = [(alone.responses.trees.responses[prompts[0]][k % 2]) for k in (i_B[0], j_B[0])]
    assert kept[0] == (5, end) and set(kept) <= {(5, end), (6, end)}
    assert batch.trees.N == 6 and weight_B.sum().item() == pytest.approx(1)


# --- log-probabilities ---------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["logsumexp", "linear_ce"])
def test_ways_to_log_probs_agree_in_value_and_gradient(way):
    """(The compiled ways take too long to compile here; test_fused.py has the fused one.)"""
    found = []
    for name in ("eager", way):
        torch.manual_seed(0)
        h_ND, W_VD = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
        logp_N = logps.WAYS[name][1](h_ND, W_VD, torch.arange(7))
        logp_N.backward(torch.arange(7.0))
        found.append((logp_N.detach(), h_ND.grad, W_VD.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- the commands --------------------------------------------------------------------------------

def test_a_median_is_taken_without_the_first_round(capsys):
    values = iter([100.0, 1.0, 3.0, 2.0])
    assert in_turns({"one": lambda: next(values)}, 3) == {"one": 2.0}


def test_time_belongs_to_the_function_that_runs_not_to_its_caller():
    clock = bench_train.Clock()
    inner = clock.timed("inner", lambda: time.sleep(0.05))
    clock.timed("outer", inner)()
    clock.note()
    assert clock.wall["inner"] >= 0.05 > clock.wall["outer"] + clock.wall["the rest"]


def test_the_quick_benchmark_prints_whole_tables(tmp_path, capsys):
    bench_train.main(argparse.Namespace(parts=["steps", "shares"], quick=True, out=tmp_path))
    lines = [[cell.strip() for cell in line.strip("| ").split("|")]
             for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {cells[0]: cells[1:] for cells in lines}
    assert {"SFT", "iteration 1", "iteration 2", "iteration 3", "all", "evaluation"} <= rows.keys()
    assert {len(cells) for cells in lines} == {8, 4, 3}
    assert float(rows["all"][0]) > 0


def test_growth_measures_more_prefixes_for_more_responses(tmp_path, capsys):
    found = {"responses": [(n, growth.measure("responses", n, 2)) for n in (2, 6)]}
    (_, few), (_, many) = found["responses"]
    assert few["prefixes"] < many["prefixes"]
    assert all(one["seconds"][name] > 0 for one in (few, many) for name in growth.CURVES)
    growth.draw(found, tmp_path)
    assert (tmp_path / "bench_growth.png").read_bytes().startswith(b"\x89PNG")


def test_numbered_prompts_are_distinct(tmp_path):
    lines = open(growth.numbered_world(600, tmp_path), encoding="utf-8").readlines()
    assert len({line.split('"prompt"')[1] for line in lines}) == 600
