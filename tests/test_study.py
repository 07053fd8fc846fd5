"""The study: its choice of settings is fair, its runs are the commands that it prints, and each
mistake is the one that it says. The oracle of log-probs is `logp_by_hand`, one token at a time.
"""
import argparse
import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data.responses
import train
from conftest import logp_by_hand
from data.run import checkpoint
from data.run.checkpoint import load_policy
from study import mistakes, report, study
from test_train import SMALL, write_world

PATCHED = ("generate", "response_logps", "mass_anchor", "self_play", "all_logps")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Put back after each test what a mistake or a run of the study changes."""
    for name in PATCHED:
        monkeypatch.setattr(train, name, getattr(train, name))
    for name in ("known_shares", "response_logps"):
        monkeypatch.setattr(data.responses, name, getattr(data.responses, name))
    monkeypatch.setattr(checkpoint, "draw_gif", lambda *_: b"")
    monkeypatch.setattr(checkpoint, "draw_convergence", lambda *_: b"")


# --- the choice of settings ----------------------------------------------------------------------

def test_values_are_widened_until_the_best_lies_inside(monkeypatch):
    """Methods whose best rates are 0.016 and 0.0005, from 0.001, 0.002 and 0.004."""
    best, runs = {"fast": 0.016, "slow": 0.0005}, []
    monkeypatch.setattr(study, "run_all", lambda jobs, args, what: runs.extend(jobs))
    monkeypatch.setattr(study, "best_stop", lambda args, settings: (
        abs(math.log(settings["lr"] / best[settings["method"]])), 1))
    args = argparse.Namespace(out="out", seeds={"tune": (10, 11, 12)})
    tried = study.widen(args, "rates", {name: {"method": name} for name in best}, "lr",
                        study.RATES, 2, study.RATE_LIMITS)
    for name, scores in tried.items():
        chosen = min(scores, key=scores.get)
        assert chosen == pytest.approx(best[name])
        assert min(scores) < chosen < max(scores)
    assert len(runs) == 3 * sum(map(len, tried.values())), "each value once for each seed"


def test_values_end_at_their_limits():
    assert study.beyond_the_edge({1.0: 0.2, 2.0: 0.1}, 2, (0.5, 3.9)) is None
    assert study.beyond_the_edge({1.0: 0.1, 2.0: 0.2}, 2, (0.5, 3.9)) == 0.5


def test_the_stop_is_chosen_by_the_mean_over_tuning_seeds(monkeypatch):
    """Each seed alone would stop elsewhere, and the seeds of the results are not looked at."""
    kls = {10: [1.0, 2.0, 9.0], 11: [9.0, 2.0, 1.0]}
    monkeypatch.setattr(study, "kls", lambda out, settings: kls[settings["seed"]])
    args = argparse.Namespace(out="out", seeds={"tune": (10, 11), "methods": (0, 1)})
    assert study.best_stop(args, {}) == (2.0, 2)


def test_no_seed_both_chooses_and_reports():
    for seeds in (study.SEEDS, study.QUICK_SEEDS):
        assert not set(seeds["tune"]) & {*seeds["methods"], *seeds["switches"], *seeds["mistakes"]}


def test_every_method_with_an_opponent_runs_with_and_without_anchor():
    settings = list(study.METHODS.values())
    for some in settings:
        if some.get("method") != "sft":
            other = {k: v for k, v in some.items() if k != "anchor"}
            assert (other | {"anchor": "none"} in settings) and other in settings


# --- its runs ------------------------------------------------------------------------------------

def test_the_study_runs_and_writes_its_page_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "METHODS", {"SPIN": {}, "more SFT": {"method": "sft"}})
    monkeypatch.setattr(study, "SECOND", {"lam": ["SPIN"]})
    monkeypatch.setattr(study, "DATA", {"ample": {}})
    monkeypatch.setattr(study, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(study, "RATE_LIMITS", (1e-3, 2e-3))
    monkeypatch.setattr(study, "SECONDS", {"lam": (2.0, 8.0)})
    monkeypatch.setattr(study, "SECOND_LIMITS", (2.0, 8.0))
    monkeypatch.setattr(study, "SWITCHES", [{}, {"loss": "hinge"}])
    monkeypatch.setattr(study, "MISTAKES", {"greedy": mistakes.MISTAKES["greedy"]})
    args = argparse.Namespace(parts=",".join(study.PARTS), quick=True, out=str(tmp_path),
                              workers=2)
    study.main(args)
    page = (tmp_path / "STUDY.md").read_text(encoding="utf-8")
    assert page.count("**") == 2 * 3, "a best rate for each method, and a best λ"
    for words in ("--loss hinge", mistakes.MISTAKES["greedy"][1], "| more SFT | `python train.py"):
        assert words in page
    assert "nan" not in page and "stopped |" not in page
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    study.main(args)  # everything is complete, so nothing runs again
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}


def test_a_run_of_the_study_equals_the_command_that_it_prints(tmp_path):
    settings = {"data": write_world(tmp_path), "lam": 3.0} | study.QUICK
    for some in (study.start_of(settings), settings):
        assert study.work((tmp_path, some, None))[1] == ""
    assert "--lam 3" in report.command(settings) and "--steps 4" in report.command(settings)
    train.main(train.Config(**settings, out=str(tmp_path / "plain"), device="cpu"))
    a, b = (load_policy(Path(out) / "iteration_2.pt")[0].state_dict()
            for out in (study.folder(tmp_path, settings), tmp_path / "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_table_says_how_many_runs_came_to_the_end(tmp_path):
    for name, kls in (("whole", (0.5, 0.2)), ("stopped", (0.7,))):
        (tmp_path / name).mkdir()
        rows = [{"event": "iteration", "split": "train", "kl": kl} for kl in kls]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)),
                                                       encoding="utf-8")
    paths = [tmp_path / "whole", tmp_path / "stopped"]
    cells = [report.cell(paths, "kl", "train", t) for t in range(3)]
    assert cells == ["0.600 (0.500–0.700)", "0.200 (0.200–0.200), 1 of 2 seeds", "stopped"]


# --- the mistakes --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of one iteration; p_0 and p_1 differ. (config, world)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "draw_gif", lambda *_: b"")
        patch.setattr(checkpoint, "draw_convergence", lambda *_: b"")
        folder = tmp_path_factory.mktemp("study")
        config = train.Config(**SMALL, iters=1, sft_steps=45, steps=40, sft_lr=4e-3,
                              data=write_world(folder), out=str(folder / "out"))
        train.main(config)
        return config, train.prepare(config)[0]


def policy(run, t):
    return load_policy(Path(run[0].out) / f"iteration_{t}.pt")[0]


def play(run, t):
    """The responses of p_t, as iteration t learns from them."""
    config, world = run
    return train.self_play(policy(run, t), config, t, SimpleNamespace(config=config, world=world))


def test_greedy_gives_one_response_to_each_prompt(run):
    mistakes.greedy(run[0])
    drawn = train.sample_responses(policy(run, 0), run[1], run[0], 0)
    assert all(len(counts) == 1 for counts in drawn)


def test_counts_only_leaves_the_shares_of_the_samples(run):
    mistakes.counts_only(run[0])
    counts_N = torch.tensor(play(run, 1).generated_N * run[0].negatives)
    assert torch.allclose(counts_N, counts_N.round(), atol=1e-4) and counts_N.max() > 1


@pytest.mark.parametrize("closed", [False, True])
def test_responses_are_cut_and_closed_only_where_said(run, closed):
    (mistakes.cut_and_closed if closed else mistakes.cut_short)(run[0], 2)
    drawn = train.sample_responses(policy(run, 0), run[1], run[0], 0)
    responses = [y for counts in drawn for y in counts]
    assert max(map(len, responses)) == 2 + closed
    assert all(y[-1] == run[1].end_token for y in responses) == closed


def scored(mistake, run):
    """(log p of p_0 as player, of the opponent p_1, …) that the loss gets, and the responses."""
    mistake(run[0])
    responses = play(run, 1)
    batch = responses.batch(range(len(run[1].prompts)))
    with torch.no_grad():
        player_N = train.response_logps(policy(run, 0), batch.trees)
    return player_N, responses.opponent_N, [
        (p, list(y)) for p, some in enumerate(responses.trees.responses) for y in some]


def by_hand(run, t, p, response):
    return logp_by_hand(policy(run, t), run[1].prompts[p], response)


def test_wrong_opponent_is_the_sft_model_although_p_1_was_sampled(run):
    _, opponent_N, responses = scored(mistakes.wrong_opponent, run)
    for n in range(0, len(responses), 7):
        assert opponent_N[n] == pytest.approx(by_hand(run, 0, *responses[n]), abs=1e-3)
        assert abs(opponent_N[n] - by_hand(run, 1, *responses[n])) > 1e-3


def test_mean_of_tokens_divides_by_the_length_on_both_sides(run):
    player_N, opponent_N, responses = scored(mistakes.mean_of_tokens, run)
    for n in range(0, len(responses), 7):
        for value, t in ((player_N[n].item(), 0), (opponent_N[n], 1)):
            mean = by_hand(run, t, *responses[n]) / len(responses[n][1])
            assert value == pytest.approx(mean, abs=1e-3)


def test_mean_of_tokens_leaves_the_anchor_its_sums(run, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "mass_anchor", lambda *args: seen.append(args[:2]))
    player_N, opponent_N, responses = scored(mistakes.mean_of_tokens, run)
    train.mass_anchor(player_N, torch.tensor(opponent_N), None, None)
    for values, t in zip(seen[0], (0, 1)):
        assert values[5].item() == pytest.approx(by_hand(run, t, *responses[5]), abs=1e-3)


def test_no_end_leaves_out_the_last_token_on_both_sides(run):
    player_N, opponent_N, responses = scored(mistakes.no_end, run)
    for n in range(0, len(responses), 7):
        p, response = responses[n]
        assert player_N[n].item() == pytest.approx(by_hand(run, 0, p, response[:-1]), abs=1e-3)
        assert opponent_N[n] == pytest.approx(by_hand(run, 1, p, response[:-1]), abs=1e-3)
