"""data/metrics.py: the printed metrics, recomputed in plain Python from log-probs read singly."""
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from conftest import logp_by_hand, tiny_gpt
from data.metrics import evaluate, likeliest
from data.responses import self_play_responses, sft_responses
from data.tokenizer import load_encoding
from data.world import World
from spin_loss import LOSSES
from train import Config

ROWS = [{"family": "f", "prompt": "Flip it.", "split": "train", "line": 1,
         "responses": {"heads": 0.25, "tails": 0.75}},
        {"family": "g", "prompt": "Hold this one out.", "split": "heldout", "line": 2,
         "responses": {"heads": 0.5, "tea": 0.4, "a gold tin": 0.1}},
        {"family": "g", "prompt": "Name one of three, please.", "split": "train", "line": 3,
         "responses": {"tea": 0.5, "gold tin": 0.4, "pine": 0.1}},
        {"family": "g", "prompt": "Say oak.", "split": "train", "line": 4,
         "responses": {"oak": 1.0}}]
SPLITS = {"train": [0, 2, 3], "heldout": [1]}


@pytest.fixture(scope="module")
def play():
    """(world, responses, player, [{response: its log-probs by hand and its weights} a prompt])."""
    world = World(ROWS, load_encoding(), sft_samples=8, seed=0, block_size=32)
    opponent, player = (tiny_gpt(vocab_size=512, block_size=32, seed=seed) for seed in (0, 1))
    with torch.no_grad():  # right responses become likelier, or nothing would be on the support
        likely = sorted({token for data in world.data for y in data for token in y})
        for model in (opponent, player):
            model.ln_f.bias += 0.8
            model.wte.weight[likely] += 0.8
    end = world.end_token
    right = [next(iter(data)) for data in world.data]
    samples = [Counter({right[0]: 2, (65, 66, 67): 1, (end,): 1}), Counter({(70, end): 4}),
               Counter({right[2]: 1, (80, 81, 82, 83): 3}), Counter({(71, 72, end): 4})]
    responses = self_play_responses(world, samples, opponent, Config())
    rows = [{y: {"player": logp_by_hand(player, world.prompts[p], y),
                 "opponent": logp_by_hand(opponent, world.prompts[p], y)} for y in table.responses}
            for p, table in enumerate(responses.tables)]
    for part in responses.parts(range(4)):
        for i, p in enumerate(part.prompts):
            for n, y in enumerate(rows[p].values()):
                y["data"] = part.data_PN[i, n].item()
                y["generated"] = part.generated_PN[i, n].item()
    return world, responses, player, rows


def mean_over(split, of_prompt, rows):
    return sum(of_prompt(rows[p]) for p in SPLITS[split]) / len(SPLITS[split])


# ---- What is known exactly: definitions, written out for one prompt -----------------------------

def kl(some):
    return sum(y["data"] * (math.log(y["data"]) - y["player"])
               for y in some.values() if y["data"])


def off_support(some):
    return 1 - sum(math.exp(y["player"]) for y in some.values() if y["data"])


def sampled_wrong(some):
    return sum(math.exp(y["player"]) for y in some.values() if not y["data"])


def tv(some):
    apart = sum(abs(y["data"] - math.exp(y["player"])) for y in some.values() if y["data"])
    return (apart + off_support(some)) / 2


def logp_real(some):
    return sum(y["data"] * y["player"] for y in some.values())


def nll(some):
    return -logp_real(some)


def length(some):
    return sum(y["data"] * len(tokens) for tokens, y in some.items())


@pytest.mark.parametrize("split", SPLITS)
def test_exact_metrics_are_their_definitions_written_out(play, split):
    world, responses, player, rows = play
    found = evaluate(player, responses, world, Config(), 1)[split]
    for of_prompt in (kl, tv, off_support, sampled_wrong, logp_real, nll):
        name, right = of_prompt.__name__, mean_over(split, of_prompt, rows)
        assert found[name] == pytest.approx(right, abs=2e-5), f"{name} of {split}"
    assert found["nll_per_token"] == pytest.approx(
        mean_over(split, nll, rows) / mean_over(split, length, rows), abs=2e-5)
    families = {}
    for p in SPLITS[split]:
        families.setdefault(ROWS[p]["family"], []).append(kl(rows[p]))
    assert found["families"] == pytest.approx(
        {name: sum(kls) / len(kls) for name, kls in families.items()}, abs=2e-5)


def test_shown_are_probabilities_in_the_order_of_the_file_and_the_prediction_beside(play):
    world, responses, player, rows = play
    found = evaluate(player, responses, world, Config(lam=2.0), 1)["train"]
    for p, shown, after in zip(world.shown(), found["shown"], found["shown_predicted"],
                               strict=True):
        assert shown == pytest.approx([math.exp(rows[p][y]["player"]) for y in world.data[p]],
                                      rel=1e-4)
        assert after == pytest.approx([predicted(rows[p], 2.0)[y] for y in world.data[p]], rel=1e-4)
    sft = evaluate(player, responses, world, Config(), 0)
    assert sft["train"]["shown_predicted"] == [None] * len(world.shown())
    assert "shown" not in sft["heldout"]
    many = dict(zip("abcdefghij", (0.05, 0.2, 0.05, 0.3, 0.1, 0.1, 0.08, 0.03, 0.05, 0.04)))
    assert list(likeliest(many)) == list("abcdefgi")


# ---- The loss and what the theory says of it ----------------------------------------------------

def expected_loss(some, loss, lam):
    """Over y ~ p_data and the opponent's y', in plain sums."""
    u = lambda y: torch.tensor(y["player"] - y["opponent"]).double()
    return sum(y["data"] * z["generated"] * LOSSES[loss](u(y), u(z), lam).item()
               for y in some.values() for z in some.values())


def predicted(some, lam) -> dict:
    """Theorem 5.4 on the responses of p_data: {response: p_{t+1}}."""
    power = {y: math.exp(row["opponent"]) * (row["data"] / math.exp(row["opponent"])) ** (1 / lam)
             for y, row in some.items() if row["data"]}
    return {y: p / sum(power.values()) for y, p in power.items()}


def floor(some):
    """Lemma C.2, Σ p₊ log(1 + p₋/p₊), with y' weighted as in training."""
    pairs = [(y["data"] * z["generated"], z["data"] * y["generated"])
             for y in some.values() for z in some.values()]
    return sum(plus * math.log1p(minus / plus) for plus, minus in pairs if plus)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss, lam, theorem", [
    ("logistic", 2.0, 2.0), ("logistic", 0.7, 0.7), ("exponential", 1.5, 3.0), ("space", 5.0, 1.0),
    ("hinge", 1.0, None), ("correlation", 1.0, None)])
def test_loss_floor_and_prediction_are_written_out(play, split, loss, lam, theorem):
    world, responses, player, rows = play
    found = evaluate(player, responses, world, Config(loss=loss, lam=lam), 1)[split]
    assert found["loss"] == pytest.approx(mean_over(
        split, lambda some: expected_loss(some, loss, lam), rows), rel=1e-5, abs=1e-5)
    if loss == "logistic":
        assert found["loss_floor"] == pytest.approx(mean_over(split, floor, rows), abs=1e-5)
    else:
        assert found["loss_floor"] is None, "Lemma C.2 is about the logistic loss"
    if theorem is None:
        assert found["predicted_kl"] is None and found["predicted_tv"] is None
        return

    def kl_of_predicted(some):
        p = predicted(some, theorem)
        return sum(some[y]["data"] * math.log(some[y]["data"] / q) for y, q in p.items())

    def tv_to_predicted(some):
        p = predicted(some, theorem)
        apart = sum(abs(q - math.exp(some[y]["player"])) for y, q in p.items())
        return (apart + off_support(some)) / 2
    for name, of_prompt in (("predicted_kl", kl_of_predicted), ("predicted_tv", tv_to_predicted)):
        assert found[name] == pytest.approx(mean_over(split, of_prompt, rows), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_margin_is_lambda_times_the_difference_of_the_log_ratios(play, split):
    world, responses, player, rows = play
    found = evaluate(player, responses, world, Config(lam=3.0), 1)[split]
    ratio = lambda y: y["player"] - y["opponent"]
    right = mean_over(split, lambda some: 3 * sum(
        (y["data"] - y["generated"]) * ratio(y) for y in some.values()), rows)
    assert found["margin"] == pytest.approx(right, rel=1e-4)
    assert found["logp_generated"] == pytest.approx(mean_over(split, lambda some: sum(
        y["generated"] * y["player"] for y in some.values()), rows), rel=1e-5)


@pytest.mark.parametrize("t, method", [(0, "spin"), (1, "sft")])
def test_sfts_loss_is_minus_log_p_and_its_floor_the_entropy(play, t, method):
    world, responses, player, rows = play
    responses = responses if t else sft_responses(world)
    found = evaluate(player, responses, world, Config(method=method), t)
    for split in SPLITS:
        assert found[split]["loss"] == pytest.approx(mean_over(split, nll, rows), rel=1e-5)
        assert found[split]["loss_floor"] == pytest.approx(mean_over(split, lambda some: -sum(
            y["data"] * math.log(y["data"]) for y in some.values() if y["data"]), rows), abs=1e-6)
        assert found[split]["predicted_kl"] is None and found[split]["predicted_tv"] is None


def test_what_is_known_by_its_samples_alone_has_neither_floor_nor_prediction(play):
    world, responses, player, _ = play
    own = SimpleNamespace(**vars(world) | {"empirical": True, "shown": world.shown})
    for t in (0, 1):
        found = evaluate(player, responses, own, Config(), t)["train"]
        assert found["loss_floor"] is None and found["predicted_kl"] is None
