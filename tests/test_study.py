"""The study's driver runs from end to end, and each mistake in study_faults.py is the one it says.

The oracle of log-probs is `logp_by_hand`, one token at a time.
"""
import argparse
import copy
import math

import pytest
import torch

import study
import study_faults
import train
from conftest import logp_by_hand
from data.responses import Responses
from test_train import SMALL, write_world

PATCHED = ("generate", "answer_logps", "mass_anchor", "self_play", "all_logps", "sft_objective",
           "draw_gif", "draw_convergence")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What a fault changes is put back after the test."""
    for name in PATCHED:
        monkeypatch.setattr(train, name, getattr(train, name))
    monkeypatch.setattr(Responses, "know_shares", Responses.know_shares)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of one iteration, and its world: SFT's model and p_1 differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_gif", lambda out: None)
        patch.setattr(train, "draw_convergence", lambda out: None)
        folder = tmp_path_factory.mktemp("study")
        config = train.Config(**SMALL, iters=1, sft_steps=45, steps=40, sft_lr=4e-3,
                              data=write_world(folder), out=str(folder / "out"))
        train.main(config)
        return config, train.prepare(train.Config(**vars(config) | {"resume": True}))[0]


def test_study_runs_and_writes_its_tables_and_figure(tmp_path, monkeypatch):
    kept = ("SPIN", "more SFT", "DPO")
    monkeypatch.setattr(study, "METHODS", {k: study.METHODS[k] for k in kept})
    monkeypatch.setattr(study, "RATES", (2e-3, 4e-3))
    monkeypatch.setattr(study, "SCARCE_RATES", (4e-3,))
    monkeypatch.setattr(study, "ARMS", {"DPO": ({"lam": 8.0},)})
    monkeypatch.setattr(study, "SEEDS", range(1))
    monkeypatch.setattr(study, "SWITCHES", [{}, {"loss": "hinge"}])
    args = argparse.Namespace(parts="grid,methods,scarce,switches", quick=True, out=str(tmp_path),
                              workers=2)
    study.main(args)
    page = (tmp_path / "STUDY.md").read_text()
    assert page.count("**") >= 2 * 2 * 2, "a best rate for each method in each regime"
    assert page.split("rates side by side")[1].count("| more SFT | 0.004 |") == 1
    assert "--loss hinge" in page and "DPO, λ = 8" in page and "nan" not in page
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    study.main(args)  # everything is complete, so nothing runs again
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}


def test_a_run_of_the_study_equals_the_command_that_it_prints(tmp_path, monkeypatch):
    settings = {"data": write_world(tmp_path), "lam": 3.0} | study.QUICK
    for job in ((tmp_path, study.start_of(settings), None), (tmp_path, settings, None)):
        study.work(job)
    train.main(train.Config(**settings, out=str(tmp_path / "plain"), device="cpu"))
    a, b = (train.load_player(train.Config(out=str(out)), 2, "cpu").state_dict()
            for out in (study.folder(tmp_path, settings), tmp_path / "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_sft_on_its_data_alone_is_the_same_objective(run):
    config, world = run
    player, table = train.load_player(config, 1, "cpu"), train.self_play(world, config, 1)
    batch = table.select(world.splits["train"])
    plain, lean = (f(player, batch, config)[1].item() for f in (
        train.sft_objective, study.on_its_data_alone(train.sft_objective)))
    assert lean == pytest.approx(plain, abs=1e-5)


def test_greedy_negatives_are_one_answer_a_prompt(run):
    config, world = run
    study_faults.greedy(config)
    drawn = train.draw(train.load_player(config, 1, "cpu"), world, config, 2)
    assert all(len(answers) == 1 for answers in drawn)


def test_counts_only_leaves_the_shares_of_the_draws(run):
    config, world = run
    study_faults.counts_only(config)
    shares_N = train.self_play(world, config, 2).generated_N * config.negatives
    assert torch.allclose(shares_N, shares_N.round(), atol=1e-4) and shares_N.max() > 1


@pytest.mark.parametrize("closed", [False, True])
def test_answers_are_cut_and_closed_only_where_said(run, closed):
    config, world = run
    (study_faults.cut_and_closed if closed else study_faults.cut_short)(config, 2)
    drawn = train.draw(train.load_player(config, 0, "cpu"), world, config, 1)
    answers = [y for counts in drawn for y in counts]
    assert max(map(len, answers)) == 2 + closed
    assert all(y[-1] == world.end_token for y in answers) == closed


def scored(fault, run, t=2):
    """(log p of the player, of the opponent) that the loss of iteration t gets, and the table."""
    config, world = run
    fault(config)
    table = train.self_play(world, config, t)
    player = copy.deepcopy(train.load_player(config, 0, "cpu"))
    with torch.no_grad():
        return train.answer_logps(player, table, "eager"), table.opponent_N, table


def by_hand(run, t, table, n, drop=0):
    """log p_t of the table's n-th answer, without its last `drop` tokens."""
    config, world = run
    prompt = world.prompts[int(table.prompt_N[n])]
    answer = table.tokens_NS[n, :int(table.length_N[n]) - drop].tolist()
    return logp_by_hand(train.load_player(config, t, "cpu"), prompt, answer)


def test_wrong_opponent_is_the_sft_model_although_p_1_drew(run):
    _, opponent_N, table = scored(study_faults.wrong_opponent, run)
    for n in range(0, len(opponent_N), 7):
        assert opponent_N[n].item() == pytest.approx(by_hand(run, 0, table, n), abs=1e-3)
        assert abs(opponent_N[n].item() - by_hand(run, 1, table, n)) > 1e-3


def test_mean_of_tokens_divides_by_the_length_on_both_sides(run):
    player_N, opponent_N, table = scored(study_faults.mean_of_tokens, run)
    for n in range(0, len(opponent_N), 7):
        for value, t in ((player_N[n], 0), (opponent_N[n], 1)):
            mean = by_hand(run, t, table, n) / table.length_N[n].item()
            assert value.item() == pytest.approx(mean, abs=1e-3)
    seen = train.mass_anchor(player_N, opponent_N, table.generated_N, table.prompt_N)
    assert math.isfinite(seen.item()), "the anchor gets sums back"


def test_no_end_leaves_out_the_last_token_on_both_sides(run):
    player_N, opponent_N, table = scored(study_faults.no_end, run)
    for n in range(0, len(opponent_N), 7):
        assert player_N[n].item() == pytest.approx(by_hand(run, 0, table, n, 1), abs=1e-3)
        assert opponent_N[n].item() == pytest.approx(by_hand(run, 1, table, n, 1), abs=1e-3)
