"""Self-play in train.py: who generates, who is frozen, what is learned from, and how it is weighed.

The oracles are the saved weights read with `logp_by_hand`, the exact probability of every response
that a tiny model can give, every outcome of a few draws, and sums in plain Python.
"""
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import sample
import train
from conftest import exact_probabilities, gpt2_by_hand, known_mistake, logp_by_hand, tiny_gpt
from data.responses import sft_responses
from data.run.checkpoint import load_policy, save_policy
from data.tokenizer import ANSWER, load_encoding
from data.world import World
from train import Config

ROWS = [{"family": "f", "prompt": "Flip it.", "split": "train", "line": 1,
         "responses": {"heads": 0.25, "tails": 0.75}},
        {"family": "f", "prompt": "Hold this one out.", "split": "heldout", "line": 2,
         "responses": {"heads": 0.5, "tea": 0.5}},
        {"family": "f", "prompt": "Name one of three, please.", "split": "train", "line": 3,
         "responses": {"tea": 0.5, "gold tin": 0.4, "pine": 0.1}}]
TRAIN = [0, 2]
SPECIAL = load_encoding()._special_tokens
NEGATIVES = 24


def framed(text):
    """A prompt as the model must see it, always: its tokens, then ANSWER."""
    return [*load_encoding().encode_ordinary(text), SPECIAL[ANSWER]]


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """A world of three prompts, and three saved policies that respond unlike each other."""
    out = tmp_path_factory.mktemp("play")
    world = World(ROWS, load_encoding(), 8, 0, 32)
    likely = sorted({token for data in world.data for y in data for token in y})
    models = []
    for t in range(3):
        model = tiny_gpt(vocab_size=512, block_size=32, seed=t)
        with torch.no_grad():  # the tokens of right responses come often, others now and then
            model.ln_f.bias += 0.8
            model.wte.weight[likely] += 0.8
        save_policy(out / f"iteration_{t}.pt", model, world)
        models.append(model)
    return world, Config(out=str(out), negatives=NEGATIVES, anchor="none"), models


def changed(config, **change) -> Config:
    return Config(**vars(config) | change)


def self_play(play, t, **change):
    """The table of responses that the opponent p_t gives."""
    world, config, models = play
    run = SimpleNamespace(world=world, policy=lambda k: models[k])
    return train.self_play(models[t], changed(config, **change), t, run)


def table_of(responses):
    """{(prompt number, response): row number}."""
    keys = [(p, y) for p, some in enumerate(responses.trees.responses) for y in some]
    assert [p for p, _ in keys] == responses.prompt_N.tolist()
    return {key: row for row, key in enumerate(keys)}


def logps_by_hand(model, responses):
    """log p(y|x) of every row of a table, one token at a time."""
    return np.array([logp_by_hand(model, framed(ROWS[p]["prompt"]), y)
                     for p, y in table_of(responses)])


def whose(values_N, models, responses) -> str:
    """": these are p_k's", if they are."""
    return known_mistake(values_N, {f"these are the log-probs of p_{k}":
                                    logps_by_hand(model, responses)
                                    for k, model in enumerate(models)}, tolerance=1e-3)


# ---- Generating with the frozen opponent --------------------------------------------------------

SHORT = [list(y) for n in (1, 2, 3) for y in itertools.product(range(4), repeat=n)]


@pytest.mark.parametrize("vocab_size, longest, prompts, n", [
    (4, 3, [[2, 0], [1]], 20_000), (300, 1, [[7, 9]], 30_000), (4, 1, SHORT, 400)],
    ids=["whole responses", "a wide vocabulary", "many prompts"])
def test_negatives_are_samples_of_p_t_itself(vocab_size, longest, prompts, n):
    """At temperature 1, nothing cut off, or the theorems do not apply. (A chi-square test.)"""
    model, end = tiny_gpt(vocab_size=vocab_size, seed=3), 3
    world = SimpleNamespace(prompts=prompts, max_new_tokens=longest, end_token=end)
    drawn = train.sample_responses(model, world, Config(negatives=n), t=0)
    assert [counts.total() for counts in drawn] == [n] * len(prompts), "`negatives` for each prompt"
    exact = [exact_probabilities(model, x, longest, end) for x in prompts]
    assert [c.keys() - p.keys() for c, p in zip(drawn, exact)] == [set()] * len(prompts), (
        "responses that p_t cannot give: is END stuck to one that was cut short?")
    got = torch.tensor([counts[y] / n for counts, p in zip(drawn, exact) for y in p])
    right = torch.tensor([p[y] for p in exact for y in p])
    tempered = {f"this is temperature {heat}; p_t itself is temperature 1": torch.tensor(
        [share for x in prompts for share in exact_probabilities(
            model, x, longest, end, heat).values()]) for heat in (0.5, 0.7, 0.8, 1.2)}
    hint = known_mistake(got, tempered, tolerance=0.01)
    if all(len(counts) == 1 for counts in drawn):
        hint = ": always the same response is greedy decoding, not a sample"
    elif bool(((got == 0) & (n * right > 30)).any()):
        hint = ": rare tokens never come; is the distribution truncated (top-k, top-p)?"
    seen = n * right >= 5
    chi2 = (n * (got - right) ** 2 / right)[seen].sum().item()
    cells = int(seen.sum()) - len(prompts)
    assert chi2 - cells < 5 * math.sqrt(2 * cells), f"chi-square {chi2:.0f} on {cells} cells{hint}"


def test_truncated_responses_carry_no_end(play):
    """A generation cut short is no finished response: END there would be scored, and learned."""
    world, config, models = play
    drawn = train.sample_responses(models[0], world, config, 0)
    cut = [y for counts in drawn for y in counts if len(y) == world.max_new_tokens]
    assert sum(y[-1] != world.end_token for y in cut) > 10, (
        "this model rambles on, yet its longest responses all end with END: did you add it?")
    for counts in drawn:
        for y in counts:
            assert world.end_token not in y[:-1] and len(y) <= world.max_new_tokens, y
            assert y[-1] == world.end_token or len(y) == world.max_new_tokens, (
                f"{y} was finished by END, or ends before its time")


def test_samples_depend_on_seed_and_iteration_alone(play):
    world, config, models = play
    once = train.sample_responses(models[0], world, config, 1)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert train.sample_responses(models[0], world, config, 1) == once, (
        "a resumed run must draw the same again")
    assert torch.equal(before, torch.random.get_rng_state()), "use a generator of its own"
    assert train.sample_responses(models[0], world, config, 2) != once, "each iteration draws anew"
    assert train.sample_responses(models[0], world, changed(config, seed=1), 1) != once


def test_prompts_are_framed_alike_for_training_generation_and_sampling(play, monkeypatch):
    """Tokens of x, then ANSWER. Framed otherwise, the model is asked what it never learned."""
    world, config, models = play
    asked = []

    def spy(model, prompts, **settings):
        asked.extend(tuple(x) for x in prompts)
        return [[world.end_token]] * len(prompts)

    def read_by_training(responses):
        batches = [responses.batch([p]).trees for p in range(len(ROWS))]
        return {tuple(trees.token_M[:trees.scored_U[0] + 1].tolist()) for trees in batches}
    right = {tuple(framed(row["prompt"])) for row in ROWS}
    for responses in (sft_responses(world), self_play(play, 0)):
        learned = read_by_training(responses)
        assert learned == right, f"training reads {learned - right}, expected {right}"
    monkeypatch.setattr(train, "generate", spy)
    monkeypatch.setattr(sample, "generate", spy)
    train.sample_responses(models[0], world, config, 0)
    assert set(asked) == right, f"self-play asks {set(asked) - right}, training learns {right}"
    asked.clear()
    sample.main(sample.SampleConfig(out=config.out, samples=1, prompt=["Flip it."], show=1))
    assert set(asked) == {tuple(framed("Flip it."))}, f"sample.py asks {set(asked)}"


@pytest.mark.parametrize("t", [0, 1, 2])
def test_opponent_scores_what_it_generated(play, t):
    """One and the same frozen model draws y' and gives log p_t, of every response, once."""
    world, config, models = play
    responses = self_play(play, t)
    drawn = train.sample_responses(models[t], world, config, t)
    rows = table_of(responses)
    got = {key for key, row in rows.items()
           if responses.generated_N[row] > 0 and responses.real_N[row] == 0}
    right = {(p, y) for p, counts in enumerate(drawn) for y in counts if not world.real[p].get(y)}
    assert got == right, f"iteration {t}: negatives that its opponent did not draw"
    assert np.abs(responses.opponent_N - logps_by_hand(models[t], responses)).max() < 1e-4, (
        f"iteration {t}: log p_t is not that of the model that generated"
        + whose(responses.opponent_N, models, responses))


# ---- The opponent: frozen within an iteration, renewed between ----------------------------------

def run_of(folder, **change):
    """A run of train.main, spied on: its saved policies, its opponents, what each step compared."""
    opponents, steps, patch = [], [], pytest.MonkeyPatch()
    exact_loss, exact_play = train.spin_loss, train.self_play

    def spin_loss(policy_real_B, policy_generated_B, opponent_real_B, opponent_generated_B, *rest):
        steps.append({"player, real": policy_real_B.detach(), "opponent, real": opponent_real_B,
                      "player, generated": policy_generated_B.detach(),
                      "opponent, generated": opponent_generated_B})
        return exact_loss(policy_real_B, policy_generated_B, opponent_real_B, opponent_generated_B,
                          *rest)

    def self_play(opponent, config, t, run):
        opponents.append(opponent)
        return exact_play(opponent, config, t, run)
    patch.setattr(train, "spin_loss", spin_loss)
    patch.setattr(train, "self_play", self_play)
    patch.setattr("data.run.checkpoint.draw_convergence", lambda *args: b"")
    patch.setattr("data.run.checkpoint.draw_gif", lambda *args: b"")
    path = folder / "world.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "line"}) + "\n"
                            for row in ROWS), encoding="utf-8")
    config = Config(**{**dict(
        iters=3, sft_steps=4, steps=4, reports=1, n_layer=1, n_head=1, n_embd=16, negatives=8,
        batch_size=64, lr=0.05, block_size=32, device="cpu", sft_samples=8, data=str(path),
        out=str(folder / "out")), **change})
    train.main(config)
    patch.undo()
    saved = [load_policy(Path(config.out) / f"iteration_{t}.pt")[0] for t in range(4)]
    return SimpleNamespace(saved=saved, opponents=opponents, steps=steps)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run_against_sft(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("sft"), opponent="sft")


def same_weights(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("name, right", [("run", [0, 1, 2]), ("run_against_sft", [0, 0, 0])])
def test_opponent_is_a_frozen_copy_of_p_t(name, right, request):
    """Even after the iteration. --opponent sft keeps p_0 for ever: DPO with its own negatives."""
    run = request.getfixturevalue(name)
    for t, (opponent, k) in enumerate(zip(run.opponents, right, strict=True)):
        same = [same_weights(opponent, saved) for saved in run.saved]
        assert same[k] and sum(same) == 1, (
            f"iteration {t}: the opponent must be a frozen copy of p_{k}; yours is now "
            + (f"p_{same.index(True)}" if any(same) else "none that was saved")
            + (": it learned with the player" if any(same[k + 1:]) or not any(same) else ""))


def test_opponent_is_frozen_within_an_iteration(run):
    """Its log-probs are the same numbers at every step, while the player's move."""
    assert len(run.steps) == 12
    for first in (0, 4, 8):
        start = run.steps[first]
        for step in run.steps[first + 1:first + 4]:
            for kind in ("real", "generated"):
                one, two = start[f"opponent, {kind}"], step[f"opponent, {kind}"]
                assert one.shape == two.shape and torch.equal(one.sort()[0], two.sort()[0]), (
                    f"log p_t of {kind} responses changes within an iteration: drawn from, or "
                    f"scored by, the live player?")
            assert not torch.equal(step["player, real"].sort()[0], start["player, real"].sort()[0])


def real_logps(model):
    """log p of each response of the SFT set, sorted."""
    real = World(ROWS, load_encoding(), 8, 0, 32).real
    return sorted(logp_by_hand(model, framed(ROWS[p]["prompt"]), y) for p in TRAIN for y in real[p])


@pytest.mark.parametrize("name, right", [("run", [0, 1, 2]), ("run_against_sft", [0, 0, 0])])
def test_opponent_is_renewed_between_iterations(name, right, request):
    run = request.getfixturevalue(name)
    for t, k in enumerate(right):
        got = sorted(set(run.steps[4 * t]["opponent, real"].tolist()))
        hint = known_mistake(got, {f"these are p_{i}'s": real_logps(model)
                                   for i, model in enumerate(run.saved)}, tolerance=1e-3)
        assert got == pytest.approx(real_logps(run.saved[k]), abs=1e-4), (
            f"iteration {t} must be scored by p_{k}{hint}")


def test_player_starts_each_iteration_as_its_own_opponent(run):
    """θ starts at θ_t, so that all margins are 0 and the first loss is log 2."""
    for start in run.steps[::4]:
        for kind in ("real", "generated"):
            assert_close(start[f"player, {kind}"], start[f"opponent, {kind}"], atol=1e-4, rtol=0,
                         msg=lambda text: f"the player does not start as p_t: {text}")


def test_player_goes_on_from_p_t_against_the_sft_model_too(run_against_sft):
    """--opponent sft changes whom the player meets, not where it starts."""
    for t in range(3):
        got = sorted(set(run_against_sft.steps[4 * t]["player, real"].tolist()))
        assert got == pytest.approx(real_logps(run_against_sft.saved[t]), abs=1e-4)


def test_no_gradient_reaches_the_opponent(run):
    assert not any(step[f"opponent, {kind}"].requires_grad
                   for step in run.steps for kind in ("real", "generated"))
    assert all(p.grad is None for opponent in run.opponents for p in opponent.parameters()), (
        "the opponent was trained")


# ---- What is learned from: known shares, history ------------------------------------------------

def test_self_play_weighs_known_responses_by_p_t_and_the_others_by_their_samples(play):
    world, config, models = play
    responses = self_play(play, 1)
    drawn, rows = train.sample_responses(models[1], world, config, 1), table_of(responses)
    logp_N = logps_by_hand(models[1], responses).tolist()
    for p, counts in enumerate(drawn):
        of_prompt = {y: row for (q, y), row in rows.items() if q == p}
        known = {y: math.exp(logp_N[row]) for y, row in of_prompt.items() if world.real[p].get(y)}
        others = {y: c for y, c in counts.items() if y not in known}
        total, n = sum(known.values()), counts.total()
        part = (1 - total) / (1 - total ** n) if others else 0  # of those not in the SFT set
        share = {y: (1 - part) * p / total for y, p in known.items()}
        share |= {y: part * c / sum(others.values()) for y, c in others.items()}
        for y, row in of_prompt.items():
            assert responses.generated_N[row] == pytest.approx(share.get(y, 0), abs=1e-5), y
            own = known.get(y, counts[y] / n)
            assert np.exp(responses.log_share_N[row]) == pytest.approx(own, abs=1e-5), y


def test_history_mixes_in_the_samples_of_the_iteration_before(play):
    """Half the negatives are p_{t−1}'s samples, the same as then; all are scored by p_t."""
    world, config, models = play
    responses = self_play(play, 1, history=1)
    rows, older = table_of(responses), train.sample_responses(models[0], world, config, 0)
    own = self_play(play, 1)
    own_rows = table_of(own)
    for (p, y), row in rows.items():
        now = own.generated_N[own_rows[p, y]] if (p, y) in own_rows else 0
        assert responses.generated_N[row] == pytest.approx(
            (now + older[p][y] / NEGATIVES) / 2, abs=1e-6)
    assert {(p, y) for p, counts in enumerate(older) for y in counts} <= set(rows)
    for key, row in rows.items():
        was = np.exp(own.log_share_N[own_rows[key]]) if key in own_rows else 0
        assert np.exp(responses.log_share_N[row]) == pytest.approx(was, abs=1e-6), (
            "the anchor needs p_t's alone")
    assert np.abs(responses.opponent_N - logps_by_hand(models[1], responses)).max() < 1e-4, (
        "older samples are scored by the current opponent, like the rest"
        + whose(responses.opponent_N, models, responses))
    first = self_play(play, 0, history=1)
    plain = self_play(play, 0)
    assert (first.generated_N == plain.generated_N).all(), "p_0 has no opponent before it"


# ---- The objectives -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def batch(play):
    """The batch of the train prompts, and all about its rows in plain Python, log p by hand."""
    table, player = self_play(play, 0), play[2][2]
    batch = table.batch(TRAIN)
    keys = [key for key in table_of(table) if key[0] in TRAIN]
    by_hand = SimpleNamespace(
        y=[y for _, y in keys],
        player=[logp_by_hand(player, framed(ROWS[p]["prompt"]), y) for p, y in keys],
        rows=[[n for n, key in enumerate(keys) if key[0] == p] for p in TRAIN],
        **{name: getattr(batch, f"{name}_N").tolist() for name in ("real", "data", "log_share",
                                                                   "opponent")})
    by_hand.generated = batch.host["generated"].tolist()
    by_hand.ratio = [a - b for a, b in zip(by_hand.player, by_hand.opponent)]
    return batch, by_hand


def test_sft_objective_is_minus_the_mean_log_probability_of_the_sft_set(play, batch):
    batch, by_hand = batch
    total = train.sft_objective(play[2][2], batch, play[1])
    mean = lambda weight: -sum(weight[n] * by_hand.player[n]
                               for rows in by_hand.rows for n in rows) / len(TRAIN)
    real, length = by_hand.real, [len(y) for y in by_hand.y]
    right = mean(real)
    assert total.item() == pytest.approx(right, abs=1e-4), f"{total.item()}, expected {right}" + (
        known_mistake(total.item(), {
            "minus is missing": -right, "you summed over the prompts; take their mean": 2 * right,
            "weigh by the SFT set (real_N), not by p_data, which training may not know":
                mean(by_hand.data),
            "all rows are counted alike; weigh them by real_N": mean([1.0] * len(real)),
            "the mask is inverted: what is not in the SFT set is learned":
                mean([float(share == 0) for share in real]),
            "you averaged over tokens; a log-probability is a sum":
                mean([share / n for share, n in zip(real, length)]),
            "the mean is over prompts, not over rows": right * 2 / len(real)}))
    assert total.requires_grad and total.shape == ()


MU = 1.5
FORMULAS = {  # the loss of one pair of log-ratios; the factor that gives it SFT's first gradient
    "logistic": (lambda r, s, lam: math.log1p(math.exp(-lam * (r - s))), lambda lam: 2 / lam),
    "hinge": (lambda r, s, lam: max(0.0, 1 - lam * (r - s)), lambda lam: 1 / lam),
    "exponential": (lambda r, s, lam: math.exp(-lam * (r - s)), lambda lam: 1 / lam),
    "correlation": (lambda r, s, lam: 1 - lam * (r - s), lambda lam: 1 / lam),
    "space": (lambda r, s, lam: math.log(1 + MU * math.exp(-r)) + MU * math.log(
        1 + math.exp(s) / MU), lambda lam: (1 + MU) / MU),
    "squared": (lambda r, s, lam: (lam * (r - s) - 1) ** 2, lambda lam: 1 / (2 * lam)),
    "kliep": (lambda r, s, lam: math.exp(s) - r, lambda lam: 1),
    "ddo": (lambda r, s, lam: math.log1p(math.exp(-lam * r)) + math.log1p(math.exp(lam * s)),
            lambda lam: 2 / lam),
    "sppo": (lambda r, s, lam: (lam * r - 0.5) ** 2 + (lam * s + 0.5) ** 2, lambda lam: 1 / lam),
}


def spin_by_hand(by_hand, loss, lam, both_real=False, sign=1):
    """Eq. 4.7 over all pairs of each prompt, mean over the prompts."""
    total = 0.0
    for rows in by_hand.rows:
        for i, j in itertools.product(rows, rows):
            r, s = sign * by_hand.ratio[i], sign * by_hand.ratio[i if both_real else j]
            total += by_hand.real[i] * by_hand.generated[j] * FORMULAS[loss][0](r, s, lam)
    return total / len(TRAIN)


def test_every_loss_has_its_formula_here():
    assert FORMULAS.keys() == train.LOSSES.keys()


@pytest.mark.parametrize("loss, lam", [("logistic", 0.5), *((loss, 2.0) for loss in FORMULAS)])
def test_spin_objective_compares_every_real_with_every_generated_response(play, batch, loss, lam):
    batch, by_hand = batch
    config = changed(play[1], lam=lam, loss=loss, mu=MU)
    total = train.spin_objective(play[2][2], batch, config)
    scale = FORMULAS[loss][1](lam)
    plain, right = total.item() / scale, spin_by_hand(by_hand, loss, lam)
    hint = known_mistake(plain, {
        "real and generated responses share one log-ratio: the same labels for both?":
            spin_by_hand(by_hand, loss, lam, both_real=True),
        "the sign of the margin is flipped": spin_by_hand(by_hand, loss, lam, sign=-1),
        "you summed over the prompts": 2 * right,
        "the loss is not scaled to SFT's first gradient": right / scale})
    assert plain == pytest.approx(right, rel=1e-4), f"{plain}, expected {right}{hint}"
    assert total.requires_grad and total.shape == ()


def dpo_by_hand(by_hand, lam):
    """Pairs of the opponent's own responses, the one that p_data prefers first.

    A mean over the pairs that it ranks, then over the prompts.
    """
    means = []
    for rows in by_hand.rows:
        total = weights = 0.0
        for i, j in itertools.product(rows, rows):
            if by_hand.data[i] > by_hand.data[j]:
                weight = by_hand.generated[i] * by_hand.generated[j]
                weights += weight
                total += weight * FORMULAS["logistic"][0](by_hand.ratio[i], by_hand.ratio[j], lam)
        means.append(total / max(weights, 1e-3))
    return sum(means) / len(means)


def test_dpo_objective_ranks_the_opponents_own_responses(play, batch):
    batch, by_hand = batch
    total = train.dpo_objective(play[2][2], batch, changed(play[1], lam=0.5))
    assert total.item() == pytest.approx(2 / 0.5 * dpo_by_hand(by_hand, 0.5), rel=1e-4)
    assert total.requires_grad and total.shape == ()


@pytest.mark.parametrize("method", ["spin", "dpo"])
def test_anchor_is_added_to_the_scaled_loss(play, batch, method):
    batch, by_hand = batch
    objective = train.OBJECTIVES[method]
    value = lambda **change: objective(play[2][2], batch, changed(play[1], lam=0.5,
                                                                 **change)).item()
    plain = value(anchor="none")
    sft = -sum(w * logp for w, logp in zip(by_hand.real, by_hand.player)) / len(TRAIN)
    assert value(anchor="sft", anchor_weight=3.0) - plain == pytest.approx(3 * sft, rel=1e-4)
    leak = 0.0
    for rows in by_hand.rows:
        m = min(1.0, sum(math.exp(by_hand.log_share[n] + by_hand.ratio[n]) for n in rows))
        leak += (1 - m) * math.log(1 / m) / len(TRAIN)
    assert leak > 1e-3, "this player must have leaked, or the test shows nothing"
    assert value(anchor="mass", anchor_weight=3.0) - plain == pytest.approx(3 * leak, rel=1e-3)


@pytest.mark.parametrize("loss", FORMULAS)
def test_first_step_follows_sft_minus_what_the_opponent_says(play, batch, loss):
    """At θ = θ_t, for every loss: the scaled ∇L = −∇(Σ real log p − Σ generated log p).

    Against a live opponent it would be 0.
    """
    (batch, by_hand), player = batch, play[2][0]
    total = train.spin_objective(player, batch, changed(play[1], loss=loss, mu=MU))
    got = torch.autograd.grad(total, list(player.parameters()))
    summed = 0.0
    for p, rows in zip(TRAIN, by_hand.rows):
        x = framed(ROWS[p]["prompt"])
        for n in rows:
            y_S = torch.tensor(by_hand.y[n])
            logits_TV = gpt2_by_hand(player, torch.tensor([[*x, *by_hand.y[n]]]))[0]
            logp_SV = logits_TV[len(x) - 1:-1].log_softmax(1)
            weight = (by_hand.real[n] - by_hand.generated[n]) / len(TRAIN)
            summed = summed - weight * logp_SV.gather(1, y_S[:, None]).sum()
    right = torch.autograd.grad(summed, list(player.parameters()))
    for (name, _), a, b in zip(player.named_parameters(), got, right):
        assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda text: f"gradient of {name}: {text}")
