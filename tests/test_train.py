"""train.py from end to end, on a world of six prompts: what it promises, what it writes.

The oracle recomputes each figure from the saved weights with `logp_by_hand`, one token at a time.
"""
import copy
import itertools
import json
import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import logp_by_hand
from data.errors import InputError
from data.responses import all_logps
from data.run.checkpoint import load_policy
from data.run.options import parse_args
from data.tokenizer import frame
from processes import here
from spin_loss import LOSSES
from train import Config, main, new_player, prepare, prompt_batches, self_play

SPLITS = ("train", "heldout")
KEYS = {"event", "method", "iteration", "step", "split", "kl", "tv", "off_support", "predicted_kl",
        "predicted_tv", "loss", "loss_floor", "logp_real", "logp_generated", "margin", "families",
        "seconds"}
SMALL = dict(n_layer=1, n_head=2, n_embd=32, negatives=16, batch_size=96, reports=2, warmup=10,
             block_size=32, device="cpu")


def write_world(folder) -> str:
    """Six prompts, one of them held out: the odds stand in the prompt."""
    rows = [{"family": "f", "prompt": f"Flip a coin with {p}% heads.", "split": "train",
             "responses": {"heads": p / 100, "tails": 1 - p / 100}} for p in (10, 30, 70, 90)]
    rows += [{"family": "f", "prompt": "Flip a coin with 50% heads.", "split": "heldout",
              "responses": {"heads": 0.5, "tails": 0.5}},
             {"family": "g", "prompt": "Name a pet.", "split": "train",
              "responses": {"dog": 0.5, "cat": 0.25, "a fish": 0.25}}]
    path = folder / "six.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two iterations: (its config, its rows of metrics.jsonl)."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(**SMALL, iters=2, sft_steps=45, steps=80, sft_lr=4e-3,
                    data=write_world(folder), out=str(folder / "out"))
    main(config)
    return config, rows_of(config)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("data.run.checkpoint.draw_convergence", lambda *args: b"")
    monkeypatch.setattr("data.run.checkpoint.draw_gif", lambda *args: b"")


def rows_of(config):
    text = (Path(config.out) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def iteration_rows(rows):
    return [row for row in rows if row["event"] == "iteration"]


def saved(config, t):
    return load_policy(Path(config.out) / f"iteration_{t}.pt")


def by_hand(config, t, prompt):
    """{response: log p_t(response|prompt)} over the support, in nats."""
    model, encoding, world = saved(config, t)
    return {y: logp_by_hand(model, *frame(encoding, prompt, y)) for y in world[prompt]}


def prompts_of(config, split) -> list:
    lines = Path(config.data).read_text(encoding="utf-8").splitlines()
    return [row["prompt"] for row in map(json.loads, lines) if row["split"] == split]


# ---- The promise -------------------------------------------------------------------------------

def test_kl_falls_at_every_iteration(run):
    kl = [row["kl"] for row in iteration_rows(run[1]) if row["split"] == "train"]
    assert kl[0] > 0.5, f"SFT should leave something to do, KL {kl[0]}"
    assert kl[0] > kl[1] > kl[2] and kl[2] < 0.2 * kl[0], kl


def test_metrics_hold_one_row_for_each_iteration_and_split(run):
    config, rows = run
    assert [(r["iteration"], r["split"]) for r in iteration_rows(rows)] == [
        (t, split) for t in range(3) for split in SPLITS]
    for row in rows:
        assert KEYS <= row.keys() and row["event"] in ("iteration", "step"), row
        assert row["method"] == "spin" and set(row["families"]) <= {"f", "g"}
        for name in ("predicted_kl", "predicted_tv", "logp_generated", "margin"):
            assert (row[name] is None) == (row["iteration"] == 0), name
    steps = Counter((r["iteration"], r["split"]) for r in rows if r["event"] == "step")
    assert set(steps.values()) == {config.reports}, steps
    assert [r["step"] for r in rows if r["event"] == "step" and r["split"] == "train"] == [
        23, 45, 40, 80, 40, 80]


def test_exact_figures_agree_with_a_recount_from_the_saved_weights(run):
    """KL, total variation, off-support mass and Theorem 5.4's prediction, for both splits."""
    config, rows = run
    for row in iteration_rows(rows):
        prompts = prompts_of(config, row["split"])
        total, families = Counter(), {}
        for x in prompts:
            data, p = saved(config, 0)[2][x], by_hand(config, row["iteration"], x)
            kl = sum(d * (math.log(d) - p[y]) for y, d in data.items())
            rest = 1 - sum(map(math.exp, p.values()))
            families.setdefault("g" if "pet" in x else "f", []).append(kl)
            total["kl"] += kl
            total["off_support"] += rest
            total["tv"] += (sum(abs(d - math.exp(p[y])) for y, d in data.items()) + rest) / 2
            total["logp_real"] += sum(d * p[y] for y, d in data.items())
            if row["iteration"]:
                before = by_hand(config, row["iteration"] - 1, x)
                odds = {y: math.exp(before[y]) * (d / math.exp(before[y])) ** (1 / config.lam)
                        for y, d in data.items()}
                predicted = {y: odd / sum(odds.values()) for y, odd in odds.items()}
                total["predicted_kl"] += sum(d * math.log(d / predicted[y])
                                             for y, d in data.items())
                total["predicted_tv"] += (rest + sum(abs(q - math.exp(p[y]))
                                                     for y, q in predicted.items())) / 2
        for name, value in total.items():
            assert row[name] == pytest.approx(value / len(prompts), abs=1e-4), name
        for name, kls in families.items():
            assert row["families"][name] == pytest.approx(sum(kls) / len(kls), abs=1e-4)


def test_loss_lies_between_its_floor_and_log_2(run):
    for row in iteration_rows(run[1]):
        if row["iteration"] and row["split"] == "train":
            assert row["loss_floor"] < row["loss"] < math.log(2), "training must have helped"


# ---- Training one policy ------------------------------------------------------------------------

def test_policy_is_the_average_of_the_later_weights(tmp_path, no_figures, monkeypatch):
    """Of 8 steps, --average 0.5: the mean of the weights after steps 5, 6, 7 and 8."""
    before, clip = [], train.clip_gradients

    def spy(player, *rest):
        before.append(player)
        before.append(copy.deepcopy(player.state_dict()))
        return clip(player, *rest)
    monkeypatch.setattr(train, "clip_gradients", spy)
    config = Config(**SMALL | {"warmup": 2, "average": 0.5}, iters=0, sft_steps=8,
                    data=write_world(tmp_path), out=str(tmp_path / "out"))
    main(config)
    player, after = before[0], [*before[1::2][1:], before[0].state_dict()]
    assert len(after) == 8
    for name, p in saved(config, 0)[0].state_dict().items():
        right = torch.stack([weights[name].double() for weights in after[4:]]).mean(0)
        torch.testing.assert_close(p.double(), right, atol=1e-6, rtol=1e-5)
        assert not torch.equal(p, player.state_dict()[name]), f"{name} is the last step's"


def test_no_step_takes_a_prompt_twice_and_all_come_equally_often():
    config = Config(batch_size=32, negatives=8)
    train_prompts = [3 * p for p in range(10)]
    batches = prompt_batches(train_prompts, 4000, config, stage=1)
    assert len(batches) == 4000 and all(len(set(step)) == len(step) == 4 for step in batches)
    counts = Counter(itertools.chain(*batches))  # 1600 each; σ = 1600 · ¼ / 2000 passes: about 18
    assert sorted(counts) == train_prompts and max(abs(n - 1600) for n in counts.values()) < 90
    assert set(itertools.chain(*prompt_batches(list(range(12)), 3, config, 1))) == set(range(12))
    assert batches != prompt_batches(train_prompts, 4000, config, stage=2)
    assert batches == prompt_batches(train_prompts, 4000, config, stage=1)


def test_in_bfloat16_too_the_player_starts_as_its_opponent(run):
    world, _ = prepare(run[0])
    logps = {}
    for precision in ("bfloat16", "float32"):
        config = replace(run[0], precision=precision)
        player = new_player(world, config)
        table = self_play(copy.deepcopy(player), config, 0, SimpleNamespace(world=world))
        assert (all_logps(player, table.trees, "eager") == table.opponent_N).all()
        logps[precision] = table.opponent_N[table.data_N > 0]
    assert 0 < abs(logps["bfloat16"] - logps["float32"]).max() < 0.5, "--precision has no effect"


# ---- The files ----------------------------------------------------------------------------------

def test_config_json_holds_the_whole_configuration_and_versions(run):
    config, _ = run
    whole = json.loads((Path(config.out) / "config.json").read_text(encoding="utf-8"))
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


def test_sample_shows_every_iteration_beside_p_data(run, capsys):
    status, text, err = here(capsys, ["--out", run[0].out, "--prompt", "Name a pet.",
                                      "--samples", "400"], "sample.py")
    assert status == 0, err
    lines = text.strip().split("\n")
    at = next(i for i, line in enumerate(lines) if "p_data" in line)
    assert lines[at].split() == ["p_data", "p_0", "p_1", "p_2", "response"]
    shown = {line.split("'")[1]: list(map(float, line.split()[:4]))
             for line in lines[at + 1:] if line.count("'") >= 2}
    assert shown["dog"][0] == 0.5 and {"dog", "cat", "a fish"} <= set(shown)
    for t in range(3):  # 400 samples: five standard deviations are 0.125
        exact = math.exp(by_hand(run[0], t, "Name a pet.")["dog"])
        assert abs(shown["dog"][1 + t] - exact) < 0.125, (t, exact, shown)


# ---- The switches -------------------------------------------------------------------------------

QUICK = dict(SMALL, sft_steps=4, steps=3, negatives=4, reports=1, warmup=2, iters=2)


def weights_after(folder, **change):
    """The weights of p_2 after a very short run."""
    config = Config(**QUICK | {"data": write_world(folder), "out": str(folder / "out")} | change)
    main(config)
    assert all(math.isfinite(row["kl"]) for row in rows_of(config))
    return torch.cat([p.detach().flatten() for p in saved(config, 2)[0].parameters()])


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.run.checkpoint.draw_convergence", lambda *args: b"")
        patch.setattr("data.run.checkpoint.draw_gif", lambda *args: b"")
        return weights_after(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("change", [
    *({"loss": loss} for loss in LOSSES if loss != "logistic"), {"lam": 1.0},
    {"anchor": "none"}, {"anchor": "sft"}, {"anchor_weight": 1.0}, {"method": "sft"},
    {"opponent": "sft"}, {"history": 1}, {"average": 1.0},
    {"loss": "space", "mu": 2.0}, {"precision": "bfloat16"}, {"seed": 1}], ids=str)
def test_every_switch_runs_and_changes_the_result(tmp_path, change, plain_weights, no_figures):
    difference = (weights_after(tmp_path, **change) - plain_weights).abs().max().item()
    assert difference > 1e-5, "the switch does nothing"


def test_dpo_trains_where_an_oracle_can_rank_and_is_refused_where_it_cannot(tmp_path, no_figures):
    more = {"sft_steps": 45, "sft_lr": 4e-3, "negatives": 16}
    one, two = (weights_after(tmp_path, **more, method=method, out=str(tmp_path / method))
                for method in ("dpo", "spin"))
    assert (one - two).abs().max() > 1e-5, "the switch does nothing"
    with pytest.raises(InputError, match="--method dpo"):  # no response is right after 4 steps
        weights_after(tmp_path, method="dpo")


def test_plain_pairs_train_to_their_empirical_distribution(tmp_path, no_figures):
    pairs = [{"prompt": "a", "response": y} for y in "xxxz"] + [{"prompt": "b", "response": "z"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    config = Config(**SMALL, iters=1, sft_steps=80, steps=100, data=str(path),
                    out=str(tmp_path / "out"))
    main(config)
    assert {row["split"] for row in rows_of(config)} == {"train"}
    p = by_hand(config, 1, "a")
    assert math.exp(p["x"]) == pytest.approx(0.75, abs=0.15)
    assert math.exp(p["z"]) == pytest.approx(0.25, abs=0.15)


def test_every_field_is_a_flag_with_help_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Config, "Help.", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text and f.metadata["why"]
    assert parse_args(Config, "", []) == Config()


def test_bad_input_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match="--lam -1.0: must be more than 0"):
        main(Config(lam=-1.0, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
