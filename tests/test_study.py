"""The study: its own objectives by hand, its runs are train.py's, its settings are chosen alike."""
import argparse
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import train
from classroom.workspace import catalogue
from conftest import logp_by_hand
from data.metrics import evaluate
from processes import without_figures, write_world
from study import claims, mistakes, nearness, runs, study
from study.runs import Job

SMALL = dict(n_layer=1, n_head=2, n_embd=16, negatives=4, batch_size=16, reports=1, sft_steps=50,
             sft_lr=2e-2, steps=3, iters=2, device="cpu", shares="sampled")


@pytest.fixture
def small(tmp_path):
    """A record of a small run, its first policy, and that policy's responses."""
    record = runs.Record(train.Config(**SMALL, data=write_world(tmp_path)))
    policy = runs.first_policy(record, None)
    return SimpleNamespace(run=record, policy=policy, responses=train.self_play(policy, 0, record))


def test_dpo_compares_the_opponents_pairs_that_p_data_ranks(small):
    config = train.Config(**SMALL, anchor="none")
    player = train.new_policy(small.run.world, train.Config(**SMALL, seed=5))
    for p in small.run.world.splits["train"]:
        x, data = small.run.world.prompts[p], small.run.world.data[p]
        table = small.responses.tables[p]
        share = dict(zip(table.responses, table.sampled_N))
        ratio = {y: logp_by_hand(player, x, y) - logp_by_hand(small.policy, x, y) for y in share}
        pairs = {(y, other): share[y] * share[other] for y in share for other in share
                 if data.get(y, 0) > data.get(other, 0)}
        loss = sum(weight * math.log1p(math.exp(2 * (ratio[other] - ratio[y])))
                   for (y, other), weight in pairs.items()) / max(sum(pairs.values()), 1e-3)
        found = runs.dpo_objective(player, small.responses.part([p], "cpu"), config)
        assert found.item() == pytest.approx(loss, rel=1e-3)


def test_the_parts_of_the_distance_to_p_data_sum_to_kl(small):
    world, config = small.run.world, small.run.config
    policy = train.new_policy(world, train.Config(seed=5, **SMALL))
    found = nearness.parts_of_the_distance(policy, small.responses, world, config)
    metrics = evaluate(policy, small.responses, world, config, 1)["train"]
    kl = found.pop("KL")
    assert sum(found.values()) == pytest.approx(kl) == pytest.approx(metrics["kl"])
    assert found["theorem"] == pytest.approx(metrics["predicted_kl"])
    masses = nearness.where_it_is(policy, small.responses, world, config)
    assert masses["sampled wrong"] == pytest.approx(metrics["sampled_wrong"])
    assert masses["sampled wrong"] + masses["other wrong"] == pytest.approx(metrics["off_support"])
    assert found["leak"] >= -math.log(1 - metrics["off_support"]), "Jensen's inequality"
    by_hand = []  # with λ = 2: p_{t+1} ∝ √(p_t p̂)
    for p in world.splits["train"]:
        x, data = world.prompts[p], world.data[p]
        root = {y: math.sqrt(math.exp(logp_by_hand(small.policy, x, y)) * world.real[p][y])
                for y in data}
        by_hand.append(sum(q * math.log(q * sum(root.values()) / root[y])
                           for y, q in data.items()))
    assert found["theorem"] + found["set"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_each_sampled_response_is_compared_with_one_of_the_sft_set(small, monkeypatch):
    monkeypatch.setattr(runs, "weighted_loss", lambda player, part, weight_PNN, config: weight_PNN)
    objective = runs.one_for_each(small.responses, small.run, 0)
    for p in small.run.world.splits["train"]:
        table, part = small.responses.tables[p], small.responses.part([p], "cpu")
        weight_NN = objective(small.policy, part, small.run.config)[0]
        assert weight_NN.sum(dim=0).tolist() == pytest.approx(list(table.sampled_N))
        assert torch.equal(4 * weight_NN, (4 * weight_NN).round()), "whole pairs"
        assert not weight_NN[table.real_N == 0].any(), "y is a real response"


def test_history_weighs_the_samples_of_both_iterations_alike(small, monkeypatch):
    data = small.run.world.data
    for k, expected in ((0, [1, 0]), (1, [0.5, 0.5])):
        monkeypatch.setattr(train, "sample_responses", lambda *args: [
            Counter({list(some)[k]: 4}) for some in data])
        table = runs.with_history(small.policy, 0, small.run).tables[0]
        assert [table.sampled_N[table.responses.index(y)] for y in data[0]] == expected


def test_lam_is_5_in_the_last_iteration_alone(monkeypatch):
    monkeypatch.setattr(train, "spin_objective", lambda player, part, config: config.lam)
    config = train.Config(iters=3, lam=0.1)
    assert [runs.lam_5_at_last(0, 0, t)(0, 0, config) for t in range(3)] == [0.1, 0.1, 5.0]


def test_kl_is_what_wrong_responses_add_and_the_proportions(small):
    world = small.run.world
    [p] = world.splits["heldout"]
    right = sum(math.exp(logp_by_hand(small.policy, world.prompts[p], y)) for y in world.data[p])
    found = runs.parts_of(small.policy, small.responses, world)["heldout"]
    assert found == {"kl_wrong": pytest.approx(-math.log(right), rel=1e-4), "seen": 0}


def test_a_run_equals_the_command_that_is_printed_for_it(tmp_path, monkeypatch):
    without_figures(monkeypatch)
    job = Job(SMALL | {"data": write_world(tmp_path), "lam": 3.0})
    runs.run_all([job], tmp_path / "runs", "")
    train.main(train.Config(**job.settings, out=str(tmp_path / "out")))
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines())
    kls = [row["kl"] for row in lines if row["event"] == "iteration" and row["split"] == "heldout"]
    assert [row["kl"] for row in runs.rows_of(job, tmp_path / "runs", "heldout")] == kls
    assert "--lam 3" in job.command() and "--steps 3" in job.command()


def test_values_are_widened_until_the_best_lies_inside(monkeypatch):
    optima = {"fast": 0.016, "slow": 0.00025}
    monkeypatch.setattr(study, "run", lambda *args: None)
    monkeypatch.setattr(study, "best", lambda job, args: (
        abs(math.log(job.settings["lr"] / optima[job.variant])), 1))
    tried = study.widen({name: Job(variant=name) for name in optima}, "lr", (1e-3, 4e-3),
                        (6e-5, 1.0), argparse.Namespace(tuning=(10,)))
    for name, scores in tried.items():
        assert min(scores) < min(scores, key=scores.get) == optima[name] < max(scores)
    assert not set(study.TUNING) & {*study.SEEDS, *claims.SEEDS, *claims.SWITCH_SEEDS}


def test_study_and_claims_write_their_pages_and_repeat_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "METHODS", {"SPIN": Job(), "more SFT": Job({"method": "sft"})})
    monkeypatch.setattr(study, "RATE_LIMITS", (1e-3, 4e-3))
    monkeypatch.setattr(study, "LAM_LIMITS", (2.0, 8.0))
    monkeypatch.setattr(claims, "CLAIMS", claims.CLAIMS[2:3])
    monkeypatch.setattr(claims, "SWITCHES", {"the defaults": Job()})
    args = argparse.Namespace(quick=True, switches=False, out=str(tmp_path / "runs"))
    for _ in range(2):
        study.main(args)
        claims.main(args)
        monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("a run is repeated"))
    text = "".join(path.read_text("utf-8") for path in (tmp_path / "runs").glob("*.md"))
    for words in ("| more SFT | `python train.py", "--opponent sft", "| the defaults |"):
        assert words in text
    assert " nan" not in text
    assert (tmp_path / "runs" / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_a_row_for_each_published_mistake_and_a_run_meets_each():
    page = (runs.ROOT / "tests" / "study" / "MISTAKES.md").read_text("utf-8")
    found = [line.split(" | ")[0].removeprefix("| ").split("; it stops")[0]
             for line in page.splitlines() if line.startswith("| ")][2:]
    assert found == [mistakes.title(wrong, flags) for _, wrong, flags in mistakes.rows()]
    published = {wrong["published"] for entry in catalogue().values() for wrong in entry["wrong"]
                 if "published" in wrong}
    assert published == {wrong["published"] for _, wrong in mistakes.mistakes()}


def test_a_mistake_is_made_in_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(mistakes, "FLAGS", SMALL | {"data": write_world(tmp_path), "iters": 1})
    monkeypatch.setattr(mistakes, "PAGE", tmp_path / "page.md")
    same = next(one for one in mistakes.mistakes() if one[1]["says"] == "the same labels for both")
    monkeypatch.setattr(mistakes, "rows", lambda: [(*same, {})])
    for _ in range(2):
        mistakes.main(argparse.Namespace(seeds=[0], out=str(tmp_path / "runs")))
        monkeypatch.setattr(mistakes, "train_with", lambda *args: pytest.fail("it is repeated"))
    *_, made = (tmp_path / "page.md").read_text("utf-8").splitlines()
    name, place, kls, own_kl, _, loss, _ = made.removeprefix("| ").split(" | ")
    assert (name, place, loss[:6]) == (mistakes.title(same[1], {}), "`pair_loss`", "0.6931")
    assert kls.endswith(f" → {own_kl}"), "this mistake leaves the metrics right"
