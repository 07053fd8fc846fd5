"""train.py from end to end, on a world of six prompts: what it promises, what it writes.

The oracle recomputes each figure from the saved weights with `logp_by_hand`, one token at a time.
"""
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from conftest import logp_by_hand
from data.exact import evaluate
from data.reader import InputError
from data.responses import all_logps
from data.tokenizer import frame
from sample import load_checkpoint
from train import Config, load_player, main, parse_args, prepare, prompt_order, self_play

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "heldout")
KEYS = ["event", "method", "iteration", "step", "split", "kl", "tv", "off_support", "predicted_kl",
        "loss", "loss_floor", "logp_real", "logp_generated", "margin", "seconds"]
SMALL = dict(n_layer=1, n_head=2, n_embd=32, negatives=16, batch_size=96, reports=2, warmup=10)


def write_world(folder) -> str:
    """Six prompts, one of them held out: the odds stand in the prompt."""
    rows = [{"family": "f", "prompt": f"Flip a coin with {p}% heads.", "split": "train",
             "responses": {"heads": p / 100, "tails": 1 - p / 100}} for p in (10, 30, 70, 90)]
    rows += [{"family": "f", "prompt": "Flip a coin with 50% heads.", "split": "heldout",
              "responses": {"heads": 0.5, "tails": 0.5}},
             {"family": "g", "prompt": "Name a pet.", "split": "train",
              "responses": {"dog": 0.5, "cat": 0.25, "a fish": 0.25}}]
    path = folder / "six.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two iterations: (its config, its rows of metrics.jsonl)."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(**SMALL, iters=2, sft_steps=45, steps=80, sft_lr=4e-3,
                    data=write_world(folder), out=str(folder / "out"))
    main(config)
    return config, rows_of(config)


def rows_of(config):
    return [json.loads(line) for line in open(Path(config.out) / "metrics.jsonl")]


def saved(config, t):
    return load_checkpoint(Path(config.out) / f"iteration_{t}.pt")


def by_hand(config, t, prompt):
    """{response: log p_t(response|prompt)} over the support, in nats."""
    model, encoding, world = saved(config, t)
    return {y: logp_by_hand(model, *frame(encoding, prompt, y)) for y in world[prompt]}


def split_of(config) -> dict:
    return {row["prompt"]: row["split"] for row in map(json.loads, open(config.data))}


# ---- The promise -------------------------------------------------------------------------------

def test_kl_falls_at_every_iteration(run):
    _, rows = run
    kl = [r["kl"] for r in rows if r["event"] == "iteration" and r["split"] == "train"]
    assert kl[0] > 0.5, f"SFT should leave something to do, KL {kl[0]}"
    assert kl[0] > kl[1] > kl[2] and kl[2] < 0.2 * kl[0], kl


def test_metrics_hold_one_row_for_each_iteration_and_split(run):
    config, rows = run
    iterations = [(r["iteration"], r["split"]) for r in rows if r["event"] == "iteration"]
    assert iterations == [(t, split) for t in range(3) for split in SPLITS]
    for row in rows:
        assert set(KEYS) <= set(row) and row["event"] in ("iteration", "step"), row
        assert (row["predicted_kl"] is None) == (row["iteration"] == 0)
    steps = Counter((r["iteration"], r["split"]) for r in rows if r["event"] == "step")
    assert set(steps.values()) == {config.reports}, steps


def test_exact_figures_agree_with_a_recount_from_the_saved_weights(run):
    """KL, total variation, off-support mass and Theorem 5.4's prediction, for both splits."""
    config, rows = run
    for row in (r for r in rows if r["event"] == "iteration"):
        prompts = [x for x, split in split_of(config).items() if split == row["split"]]
        kl = tv = off = predicted = 0.0
        for x in prompts:
            data, p = saved(config, 0)[2][x], by_hand(config, row["iteration"], x)
            kl += sum(d * (math.log(d) - p[y]) for y, d in data.items())
            rest = 1 - sum(map(math.exp, p.values()))
            off += rest
            tv += (sum(abs(d - math.exp(p[y])) for y, d in data.items()) + rest) / 2
            if row["iteration"]:
                before = by_hand(config, row["iteration"] - 1, x)
                odds = {y: math.exp(before[y]) * (d / math.exp(before[y])) ** (1 / config.lam)
                        for y, d in data.items()}
                predicted += sum(d * math.log(d * sum(odds.values()) / odds[y])
                                 for y, d in data.items())
        n = len(prompts)
        assert row["kl"] == pytest.approx(kl / n, abs=1e-4), row
        assert row["tv"] == pytest.approx(tv / n, abs=1e-4)
        assert row["off_support"] == pytest.approx(off / n, abs=1e-4)
        if row["iteration"]:
            assert row["predicted_kl"] == pytest.approx(predicted / n, abs=1e-4)


def test_loss_starts_at_log_2_and_stays_above_its_floor(run):
    """A player that is its own opponent is measured at log 2, margin 0, whatever was drawn."""
    config, rows = run
    resumed = Config(**vars(config) | {"resume": True})
    world, _ = prepare(resumed)
    responses = self_play(world, config, 1)
    found = evaluate(load_player(config, 0, "cpu"), responses, world, config, 1)
    for split in SPLITS:
        assert found[split]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert found[split]["margin"] == pytest.approx(0, abs=1e-5)
    last = [r for r in rows
            if (r["event"], r["split"]) == ("iteration", "train") and r["iteration"]]
    for row in last:
        assert row["loss_floor"] < row["loss"] < math.log(2), "the draws differ little from p_t"


# ---- The files ----------------------------------------------------------------------------------

def test_in_bfloat16_too_the_player_starts_as_its_opponent(run):
    world, _ = prepare(replace(run[0], resume=True))
    config = replace(run[0], precision="bfloat16")
    table, plain = self_play(world, config, 1), self_play(world, run[0], 1)
    player = load_player(config, 0, world.device)
    assert torch.equal(all_logps(player, table, "eager"), table.opponent_N)
    known = plain.data_N > 0  # both tables begin alike, with p_data's responses of each prompt
    assert not torch.equal(table.opponent_N[table.data_N > 0], plain.opponent_N[known])


def test_config_json_holds_the_whole_configuration_and_versions(run):
    config, _ = run
    whole = json.loads((Path(config.out) / "config.json").read_text())
    assert {f.name for f in fields(Config)} <= set(whole) and whole["lam"] == config.lam
    assert whole["versions"]["torch"] == torch.__version__ and set(whole["versions"]) == {
        "python", "torch", "tiktoken"}


def test_checkpoints_load_with_weights_only_and_need_nothing_else(run):
    config, _ = run
    for t in range(3):
        content = torch.load(Path(config.out) / f"iteration_{t}.pt", weights_only=True)
        assert {"model", "config", "ranks", "pattern", "world"} <= set(content)
        assert content["config"]["n_embd"] == config.n_embd


def test_figures_are_drawn(run):
    out = Path(run[0].out)
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "convergence.gif").read_bytes().startswith(b"GIF8")
    assert not list(out.glob("*tmp*")), "a half-written file was left"


def test_sample_shows_every_iteration_beside_p_data(run):
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--out", run[0].out, "--prompt",
                           "Name a pet.", "--samples", "400"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.strip().split("\n")[1:]
    assert header.split() == ["p_data", "p_0", "p_1", "p_2", "response"]
    shown = {line.split("'")[1]: list(map(float, line.split()[:4])) for line in lines}
    assert shown["dog"][0] == 0.5 and {"dog", "cat", "a fish"} <= set(shown)
    for t in range(3):  # 400 draws: five standard deviations are 0.125
        exact = math.exp(by_hand(run[0], t, "Name a pet.")["dog"])
        assert abs(shown["dog"][1 + t] - exact) < 0.125, (t, exact, shown)


# ---- The switches -------------------------------------------------------------------------------

QUICK = dict(SMALL, sft_steps=4, steps=3, negatives=4, reports=1, warmup=2)


@pytest.mark.parametrize("change", [
    {"loss": "hinge"}, {"loss": "exponential"}, {"loss": "correlation"}, {"loss": "space"},
    {"anchor": "none"}, {"anchor": "sft"}, {"method": "sft"}, {"method": "dpo"},
    {"opponent": "sft"}, {"history": 1}, {"logprob": "fused"}, {"average": 0.0},
    {"precision": "bfloat16"}], ids=str)
def test_every_switch_runs_and_changes_the_result(tmp_path, change, monkeypatch):
    monkeypatch.setattr("train.draw_gif", lambda out: None)
    monkeypatch.setattr("train.draw_convergence", lambda out: None)
    weights = []
    for name, more in (("plain", {}), ("changed", change)):
        config = Config(**QUICK | {"iters": 2, "data": write_world(tmp_path)} | more,
                        out=str(tmp_path / name))
        main(config)
        assert all(math.isfinite(r["kl"]) for r in rows_of(config))
        weights.append(torch.cat([p.flatten() for p in load_player(config, 2, "cpu").parameters()]))
    difference = (weights[0] - weights[1]).abs().max().item()
    if change == {"logprob": "fused"}:
        assert difference < 1e-3, "the same numbers in another way"
    else:
        assert difference > 1e-5, "the switch does nothing"


def test_plain_pairs_train_to_their_empirical_distribution(tmp_path, monkeypatch):
    monkeypatch.setattr("train.draw_gif", lambda out: None)
    pairs = [{"prompt": "a", "response": y} for y in "xxxz"] + [{"prompt": "b", "response": "z"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = Config(**SMALL | {"iters": 1, "sft_steps": 80, "steps": 100}, data=str(path),
                    out=str(tmp_path / "out"))
    main(config)
    last = [r for r in rows_of(config) if r["event"] == "iteration"][-1]
    assert last["split"] == "train" and last["kl"] < 0.1, last
    p = by_hand(config, 1, "a")
    assert math.exp(p["x"]) == pytest.approx(0.75, abs=0.15)


def test_every_field_is_a_flag_with_help_and_default():
    text = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True,
                          text=True).stdout
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text and f.metadata["why"]
    assert parse_args(Config, "", []) == Config()


def test_no_step_takes_a_prompt_twice_and_all_come_equally_often():
    config = Config(batch_size=32, negatives=8)
    order = prompt_order(10, steps=4000, config=config, t=1)
    assert order.shape == (4000, 4) and all(len(set(step)) == 4 for step in order.tolist())
    counts = torch.bincount(order.flatten())  # 1600 each; σ = 1600 · ¼ / 2000 passes: about 18
    assert len(counts) == 10 and (counts - 1600).abs().max() < 90, counts
    assert set(prompt_order(12, 3, config, 1).flatten().tolist()) == set(range(12))
    assert not torch.equal(order, prompt_order(10, 4000, config, t=2))


def test_bad_input_is_one_line_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match="--lam -1.0: must be more than 0"):
        main(Config(lam=-1.0, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
