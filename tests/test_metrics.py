"""data/metrics.py: exact figures, recomputed in plain Python from log-probs read one at a time.

The other oracles are L-BFGS on a table of five responses, for the λ of Theorem 5.4 that a loss
amounts to, and counts of the numbers that are held at once.
"""
import math
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import exact_probabilities, known_mistake, lbfgs, logp_by_hand, tiny_gpt
from data.metrics import evaluate, pair_loss, theorem_lam, theory
from data.responses import (PrefixTrees, Responses, all_logps, prompt_of_each,
                            self_play_responses, sft_responses)
from data.tokenizer import load_encoding
from data.world import World
from spin_loss import LOSSES, optimal_next_policy
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
    """(world, table, player, [{response: its log-probs by hand and shares} for each prompt])."""
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
    table = self_play_responses(world, samples, None, lambda trees: all_logps(opponent, trees))
    rows = [{y: {"player": logp_by_hand(player, world.prompts[p], y),
                 "opponent": logp_by_hand(opponent, world.prompts[p], y)} for y in some}
            for p, some in enumerate(table.trees.responses)]
    for p, some in enumerate(rows):
        first = table.trees.first_response[p]
        for n, shares in enumerate(some.values()):
            shares |= {name: float(getattr(table, f"{name}_N")[first + n])
                       for name in ("data", "generated")}
    return world, table, player, rows


def mean_over(split, of_prompt, rows):
    return sum(of_prompt(rows[p]) for p in SPLITS[split]) / len(SPLITS[split])


def kl_by_hand(some):
    return sum(y["data"] * (math.log(y["data"]) - y["player"])
               for y in some.values() if y["data"])


def off_by_hand(some):
    return 1 - sum(math.exp(y["player"]) for y in some.values() if y["data"])


def tv_by_hand(some):
    apart = sum(abs(y["data"] - math.exp(y["player"])) for y in some.values() if y["data"])
    return (apart + off_by_hand(some)) / 2


def logp_real_by_hand(some):
    return sum(y["data"] * y["player"] for y in some.values())


@pytest.mark.parametrize("split", SPLITS)
def test_exact_figures_are_their_definitions_written_out(play, split):
    world, table, player, rows = play
    found = evaluate(player, table, world, Config(), 1)[split]
    for name, by_hand in (("kl", kl_by_hand), ("tv", tv_by_hand), ("off_support", off_by_hand),
                          ("logp_real", logp_real_by_hand)):
        right = mean_over(split, by_hand, rows)
        assert found[name] == pytest.approx(right, abs=2e-5), f"{name} of {split}" + known_mistake(
            found[name], {"this is half of it": right / 2, "this is twice as much": right * 2,
                          "you summed over the prompts; take their mean":
                              right * len(SPLITS[split])})
    families = {}
    for p in SPLITS[split]:
        families.setdefault(ROWS[p]["family"], []).append(kl_by_hand(rows[p]))
    assert found["families"] == pytest.approx(
        {name: sum(kls) / len(kls) for name, kls in families.items()}, abs=2e-5)


def test_total_variation_counts_every_response_that_a_policy_can_give():
    """Against the sum over all of them: 1 + 3 + 9 tokens and 27 that were cut short."""
    model, end = tiny_gpt(vocab_size=4, seed=2), 3
    data = {(0, end): 0.6, (1, 2, end): 0.4}
    trees = PrefixTrees([[2, 0]], [data])
    none_N = np.zeros(2)
    data_N = np.array([data[y] for y in trees.responses[0]])
    table = Responses(trees, np.zeros(2, dtype=int), data_N, none_N, none_N, none_N, none_N)
    world = World.__new__(World)
    world.rows, world.data = [{"family": "f", "responses": {"a": 0.6, "b": 0.4}}], [data]
    world.splits, world.empirical = {"train": [0]}, False
    world.shown = lambda: []
    found = evaluate(model, table, world, Config(), 0)["train"]
    exact = exact_probabilities(model, [2, 0], 3, end)
    assert found["tv"] == pytest.approx(
        sum(abs(p - data.get(y, 0)) for y, p in exact.items()) / 2, abs=1e-5)
    assert found["off_support"] == pytest.approx(
        sum(p for y, p in exact.items() if y not in data), abs=1e-5)


def test_shown_are_the_probabilities_of_the_responses_in_the_files_order(play):
    world, table, player, rows = play
    found = evaluate(player, table, world, Config(), 1)["train"]["shown"]
    assert len(found) == len(world.shown())
    for p, shown in zip(world.shown(), found):
        assert shown == pytest.approx([math.exp(rows[p][y]["player"]) for y in world.data[p]],
                                      rel=1e-4)


# ---- The loss and what the theory says of it ----------------------------------------------------

def pair_loss_by_hand(some, loss, lam, mu):
    """The mean over y ~ p_data and the opponent's y', in plain sums."""
    total = 0.0
    for y in some.values():
        for z in some.values():
            ratios = (torch.tensor(w["player"] - w["opponent"]).double() for w in (y, z))
            total += y["data"] * z["generated"] * LOSSES[loss](*ratios, lam, mu).item()
    return total


def predicted_by_hand(some, lam):
    """Theorem 5.4 on the responses of p_data: {response: p_{t+1}}."""
    power = {y: math.exp(row["opponent"]) * (row["data"] / math.exp(row["opponent"])) ** (1 / lam)
             for y, row in some.items() if row["data"]}
    return {y: p / sum(power.values()) for y, p in power.items()}


def floor_by_hand(some):
    """Σ p₊ log(1 + p₋/p₊) over the pairs that p_data gives."""
    d = {y: row["data"] for y, row in some.items() if row["data"]}
    p = {y: math.exp(some[y]["opponent"]) for y in d}
    return sum(d[y] * p[z] * math.log1p(p[y] * d[z] / (d[y] * p[z])) for y in d for z in d)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss, lam, mu, theorem", [
    ("logistic", 2.0, 1.0, 2.0), ("logistic", 0.7, 1.0, 0.7), ("exponential", 1.5, 1.0, 3.0),
    ("space", 5.0, 2.0, 1.0), ("hinge", 1.0, 1.0, None), ("correlation", 1.0, 1.0, None)])
def test_loss_floor_and_prediction_are_written_out(play, split, loss, lam, mu, theorem):
    world, table, player, rows = play
    found = evaluate(player, table, world, Config(loss=loss, lam=lam, mu=mu), 1)[split]
    assert found["loss"] == pytest.approx(mean_over(
        split, lambda some: pair_loss_by_hand(some, loss, lam, mu), rows), rel=1e-5, abs=1e-5)
    if loss == "logistic":
        assert found["loss_floor"] == pytest.approx(mean_over(split, floor_by_hand, rows), abs=1e-5)
    else:
        assert found.get("loss_floor") is None, "Lemma C.2 is about the logistic loss"
    if theorem is None:
        assert found.get("predicted_kl") is None and found.get("predicted_tv") is None
        return

    def kl_of_predicted(some):
        p = predicted_by_hand(some, theorem)
        return sum(some[y]["data"] * math.log(some[y]["data"] / q) for y, q in p.items())

    def tv_to_player(some):
        p = predicted_by_hand(some, theorem)
        apart = sum(abs(q - math.exp(some[y]["player"])) for y, q in p.items())
        return (apart + off_by_hand(some)) / 2
    assert found["predicted_kl"] == pytest.approx(
        mean_over(split, kl_of_predicted, rows), rel=1e-4, abs=1e-5)
    assert found["predicted_tv"] == pytest.approx(
        mean_over(split, tv_to_player, rows), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_margin_is_lambda_times_the_difference_of_the_log_ratios(play, split):
    world, table, player, rows = play
    found = evaluate(player, table, world, Config(lam=3.0), 1)[split]
    ratio = lambda y: y["player"] - y["opponent"]
    right = mean_over(split, lambda some: 3 * sum(
        (y["data"] - y["generated"]) * ratio(y) for y in some.values()), rows)
    assert found["margin"] == pytest.approx(right, rel=1e-5), known_mistake(
        found["margin"], {"the sign is flipped": -right, "λ is missing": right / 3})
    assert found["logp_generated"] == pytest.approx(mean_over(split, lambda some: sum(
        y["generated"] * y["player"] for y in some.values()), rows), rel=1e-5)


def test_a_player_that_is_its_own_opponent_has_loss_log_2_and_margin_0(play):
    world, table, player, _ = play
    table = replace(table, opponent_N=all_logps(player, table.trees))
    for split, found in evaluate(player, table, world, Config(), 1).items():
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-9), split
        assert found["margin"] == pytest.approx(0, abs=1e-9), split


def test_dpo_averages_over_the_pairs_that_the_oracle_ranks(play):
    world, table, player, rows = play
    found = evaluate(player, table, world, Config(method="dpo", lam=2.0), 1)

    def by_hand(some):
        total = weight = 0.0
        for y in some.values():
            for z in some.values():
                if y["data"] > z["data"]:
                    u = 2 * (y["player"] - y["opponent"] - z["player"] + z["opponent"])
                    total += y["generated"] * z["generated"] * math.log1p(math.exp(-u))
                    weight += y["generated"] * z["generated"]
        return total / max(weight, 1e-3)
    right = mean_over("train", by_hand, rows)
    assert right > 0 and found["train"]["loss"] == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("t, method", [(0, "spin"), (1, "sft")])
def test_sfts_loss_is_minus_log_p_and_its_floor_the_entropy(play, t, method):
    world, table, player, rows = play
    if t == 0:
        table = sft_responses(world)
    found = evaluate(player, table, world, Config(method=method), t)
    for split in SPLITS:
        assert found[split]["loss"] == pytest.approx(
            -mean_over(split, logp_real_by_hand, rows), rel=1e-5)
        assert found[split]["loss_floor"] == pytest.approx(mean_over(split, lambda some: -sum(
            y["data"] * math.log(y["data"]) for y in some.values() if y["data"]), rows), abs=1e-6)
        assert found[split]["predicted_kl"] is None


# ---- Theorem 5.4's λ for every loss -------------------------------------------------------------

DATA = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64).log()
WEAK = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64).log()


def best_response(loss, lam, mu):
    """The policy of least expected loss against WEAK, by L-BFGS. [5]"""
    weight_KK = (DATA[:, None] + WEAK[None, :]).exp()

    def expected_loss(logits_K):
        ratio_K = logits_K.log_softmax(0) - WEAK
        return (weight_KK * LOSSES[loss](ratio_K[:, None], ratio_K[None, :], lam, mu)).sum()
    return lbfgs(expected_loss, WEAK)[0]


@pytest.mark.parametrize("loss, lam, mu, right", [
    ("logistic", 0.6, 1.0, 0.6), ("logistic", 3.0, 1.0, 3.0), ("exponential", 0.5, 1.0, 1.0),
    ("exponential", 2.0, 1.0, 4.0), ("space", 5.0, 0.3, 1.0), ("space", 0.2, 3.0, 1.0),
    ("kliep", 5.0, 1.0, 1.0), ("ddo", 1.0, 1.0, 1.0), ("ddo", 2.0, 1.0, None),
    ("ddo", 0.7, 1.0, None), ("squared", 1.0, 1.0, None), ("sppo", 1.0, 1.0, None),
    ("hinge", 1.0, 1.0, None), ("hinge", 5.0, 1.0, None), ("correlation", 1.0, 1.0, None)])
def test_theorem_lam_is_found_where_the_optimum_has_theorem_5_4s_form(loss, lam, mu, right):
    assert theorem_lam(loss, lam, mu) == right
    if loss in ("hinge", "correlation"):
        return  # the one has many optima, the other none
    best_K = best_response(loss, lam, mu)
    if right is not None:
        assert (best_K - optimal_next_policy(DATA, WEAK, right)).abs().max() < 1e-5
        return
    for other in np.exp(np.linspace(-2, 3, 200)):  # no λ gives this optimum
        apart = (best_K - optimal_next_policy(DATA, WEAK, float(other))).abs().max()
        assert apart > 5e-3, f"λ = {other:.3g} comes within {apart:.1e}"


# ---- Memory -------------------------------------------------------------------------------------

def synthetic(sizes) -> tuple[Responses, np.ndarray]:
    """(a table of len(sizes) prompts with sizes[p] responses each, the player's log-probs)."""
    trees = PrefixTrees([[1]] * len(sizes), [[(2, y) for y in range(n)] for n in sizes])
    rng = np.random.default_rng(0)
    prompt_N = prompt_of_each(trees)
    share_N = rng.random(len(prompt_N)) + 0.1
    share_N /= np.bincount(prompt_N, weights=share_N)[prompt_N]
    player_N, opponent_N = (np.log(share_N) + 0.1 * rng.standard_normal(len(share_N))
                            for _ in range(2))
    return Responses(trees, prompt_N, share_N, share_N, share_N, share_N, opponent_N), player_N


class LargestTensor(TorchDispatchMode):
    """The most elements that one tensor has had."""
    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


def peak_bytes(work) -> int:
    """The most bytes that Python and numpy hold at once meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_the_losses_grows_with_the_prompts_and_no_faster():
    """8 responses to each of 500 and of 4,000 prompts: 10⁹ pairs if prompts were mixed."""
    config = Config()
    peaks, tensors = [], []
    for prompts in (500, 4000):
        table, player_N = synthetic([8] * prompts)
        with LargestTensor() as largest:
            peaks.append(peak_bytes(lambda: (pair_loss(player_N - table.opponent_N, table, config,
                                                       "data_N"),
                                             theory(player_N, table, config))))
        tensors.append(largest.most)
    assert peaks[1] < 9 * peaks[0] and peaks[1] < 1000 * 8 * 4000, peaks
    assert max(tensors) <= 4000 * 8 * 8, f"tensors of {tensors} elements: prompts are mixed"


def test_one_prompt_with_many_responses_does_not_make_the_others_cost_as_much():
    """600 beside 300 prompts of 3: a floor padded to the longest takes 10⁸ numbers."""
    table, player_N = synthetic([3] * 150 + [600] + [3] * 150)
    with LargestTensor() as largest:
        peak = peak_bytes(lambda: (pair_loss(player_N - table.opponent_N, table, Config(),
                                             "data_N"),
                                   theory(player_N, table, Config())))
    assert largest.most <= 600 * 600 + 300 * 9 and peak < 100 * 600 * 600, (largest.most, peak)


@pytest.mark.parametrize("most", [1, 50, 1 << 20])
def test_pairs_are_added_up_alike_however_few_prompts_are_taken_at_a_time(most):
    table, player_N = synthetic([3, 1, 7, 2, 2, 5])
    config = Config(lam=1.3)
    got_P = pair_loss(player_N - table.opponent_N, table, config, "data_N", most=most)
    right = [0.0] * 6
    for i, p in enumerate(table.prompt_N):
        for j, q in enumerate(table.prompt_N):
            if p == q:
                u = 1.3 * (player_N[i] - table.opponent_N[i] - player_N[j] + table.opponent_N[j])
                right[p] += table.data_N[i] * table.generated_N[j] * math.log1p(math.exp(-u))
    assert got_P.tolist() == pytest.approx(right, rel=1e-12)
