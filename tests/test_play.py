"""Self-play in train.py: who generates, who is frozen, what is learned from, and how it is weighed.

The oracles are the saved weights read with `logp_by_hand`, the exact probability of every answer a
tiny model can give, every outcome of a few draws, and sums in plain Python.
"""
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import sample
import train
from conftest import exact_probabilities, gpt2_by_hand, known_mistake, logp_by_hand, tiny_gpt
from data.tokenizer import ANSWER, load_encoding
from data.world import World
from sample import load_checkpoint, save_checkpoint
from train import Config

ROWS = [{"family": "f", "prompt": "Flip it.", "split": "train", "line": 1,
         "responses": {"heads": 0.25, "tails": 0.75}},
        {"family": "f", "prompt": "Hold this one out.", "split": "heldout", "line": 2,
         "responses": {"heads": 0.5, "tea": 0.5}},
        {"family": "f", "prompt": "Name one of three, please.", "split": "train", "line": 3,
         "responses": {"tea": 0.5, "gold tin": 0.4, "pine": 0.1}}]
SPECIAL = load_encoding()._special_tokens
NEGATIVES = 24


def framed(text):
    """A prompt as the model must see it, always: its tokens, then ANSWER."""
    return [*load_encoding().encode_ordinary(text), SPECIAL[ANSWER]]


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """A world of three prompts, and three saved iterations that answer unlike each other."""
    out = tmp_path_factory.mktemp("play")
    world = World(ROWS, load_encoding(), samples=8, seed=0, block_size=32)
    likely = sorted({token for data in world.data for y in data for token in y})
    models = []
    for t in range(3):
        model = tiny_gpt(vocab_size=512, block_size=32, seed=t)
        with torch.no_grad():  # the tokens of right answers come often, others now and then
            model.ln_f.bias += 0.8
            model.wte.weight[likely] += 0.8
        save_checkpoint(out / f"iteration_{t}.pt", model, world)
        models.append(model)
    return world, Config(out=str(out), negatives=NEGATIVES, anchor="none"), models


def table_of(responses):
    """{(prompt number, response): row number}."""
    return {(p, tuple(y[:n])): row for row, (p, y, n) in enumerate(zip(
        *(x.tolist() for x in (responses.prompt_N, responses.tokens_NS, responses.length_N))))}


def logps_by_hand(model, world, responses):
    """log p(y|x) of every row of a table, one token at a time."""
    return torch.tensor([logp_by_hand(model, framed(world.rows[p]["prompt"]), y)
                         for p, y in table_of(responses)])


def whose(values_N, models, world, responses) -> str:
    """": these are iteration k's", if they are."""
    return known_mistake(values_N, {f"these are the log-probs of iteration {k}'s model":
                                    logps_by_hand(model, world, responses)
                                    for k, model in enumerate(models)}, tolerance=1e-3)


# ---- Generating with the frozen opponent --------------------------------------------------------

SHORT = [list(y) for n in (1, 2, 3) for y in itertools.product(range(4), repeat=n)]


@pytest.mark.parametrize("vocab_size, longest, prompts, n", [
    (4, 3, [[2, 0], [1]], 20_000), (300, 1, [[7, 9]], 30_000), (4, 1, SHORT, 400)],
    ids=["whole answers", "a wide vocabulary", "many prompts"])
def test_negatives_are_samples_of_p_t_itself(vocab_size, longest, prompts, n):
    """At temperature 1, nothing cut off, or the theorems do not apply. Chi-square over answers."""
    model, end = tiny_gpt(vocab_size=vocab_size, seed=3), 3
    world = SimpleNamespace(prompts=prompts, max_new_tokens=longest, end_token=end, device="cpu")
    drawn = train.draw(model, world, Config(negatives=n), t=1)
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
        hint = ": always the same answer is greedy decoding, not a sample"
    elif bool(((got == 0) & (n * right > 30)).any()):
        hint = ": rare tokens never come; is the distribution truncated (top-k, top-p)?"
    seen = n * right >= 5
    chi2 = (n * (got - right) ** 2 / right)[seen].sum().item()
    cells = int(seen.sum()) - len(prompts)
    assert chi2 - cells < 5 * math.sqrt(2 * cells), f"chi-square {chi2:.0f} on {cells} cells{hint}"


def test_truncated_answers_carry_no_end(play):
    """A generation cut short is no finished answer: END there would be scored, and learned."""
    world, config, models = play
    drawn = train.draw(models[0], world, config, 1)
    cut = [y for counts in drawn for y in counts if len(y) == world.max_new_tokens]
    assert sum(y[-1] != world.end_token for y in cut) > 10, (
        "this model rambles on, yet its longest answers all end with END: did you add it?")
    for counts in drawn:
        for y in counts:
            assert world.end_token not in y[:-1] and len(y) <= world.max_new_tokens, y
            assert y[-1] == world.end_token or len(y) == world.max_new_tokens, (
                f"{y} was finished by END, or ends before its time")


def test_draws_depend_on_seed_and_iteration_alone(play):
    world, config, models = play
    once = train.draw(models[0], world, config, 1)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert train.draw(models[0], world, config, 1) == once, "a resumed run must draw the same again"
    assert torch.equal(before, torch.random.get_rng_state()), "use a generator of its own"
    assert train.draw(models[0], world, config, 2) != once, "each iteration draws anew"
    assert train.draw(models[0], world, Config(**vars(config) | {"seed": 1}), 1) != once


def test_prompts_are_framed_alike_for_training_generation_and_talk(play, monkeypatch, capsys):
    """Tokens of x, then ANSWER. Framed otherwise, the model is asked what it never learned."""
    world, config, models = play
    asked = []

    def spy(model, prompts, **settings):
        asked.extend(tuple(x) for x in prompts)
        return [[world.end_token]] * len(prompts)
    monkeypatch.setattr(train, "generate", spy)
    monkeypatch.setattr(sample, "generate", spy)
    right = {tuple(framed(row["prompt"])) for row in ROWS}
    train.draw(models[0], world, config, 1)
    assert set(asked) == right, f"self-play asks {set(asked) - right}, training learns {right}"
    table = world.tabulate()
    learned = {tuple(x[:n].tolist()) for x, n in zip(table.prompt_PT, table.prompt_length_P)}
    assert learned == right, f"training reads {learned - right}, expected {right}"
    asked.clear()
    sample.main(sample.Talk(out=config.out, samples=1, prompt=["Flip it."], show=1))
    assert set(asked) == {tuple(framed("Flip it."))}, f"sample.py asks {set(asked)}"


# ---- The opponent: frozen within an iteration, renewed between ----------------------------------

@pytest.mark.parametrize("opponent, right", [("previous", [0, 1, 2]), ("sft", [0, 0, 0])])
def test_opponent_is_what_the_iteration_before_saved(play, opponent, right):
    """--opponent sft keeps iteration 0 for ever: DPO with self-generated negatives."""
    _, config, models = play
    for t, k in enumerate(right, 1):
        model = train.frozen_opponent(Config(**vars(config) | {"opponent": opponent}), t, "cpu")
        same = [all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters()))
                for saved in models]
        assert same[k] and sum(same) == 1, (
            f"--opponent {opponent}, iteration {t}: expected the model of iteration {k}, you took "
            f"that of {same.index(True) if any(same) else 'none that was saved'}")


@pytest.mark.parametrize("t, opponent", [(1, "previous"), (2, "previous"), (3, "previous"),
                                         (3, "sft")])
def test_opponent_scores_what_it_generated(play, t, opponent):
    """One and the same frozen model draws y' and gives log p_t, of every response, once."""
    world, config, models = play
    config = Config(**vars(config) | {"opponent": opponent})
    model = models[0 if opponent == "sft" else t - 1]
    responses = train.self_play(world, config, t)
    drawn = train.draw(model, world, config, t)
    got = {key for key, row in table_of(responses).items()
           if responses.generated_N[row] > 0 and responses.real_N[row] == 0}
    right = {(p, y) for p, counts in enumerate(drawn) for y in counts
             if not world.real[p].get(y)}
    assert got == right, f"iteration {t}: negatives that its opponent did not draw"
    right_N = logps_by_hand(model, world, responses)
    assert (responses.opponent_N - right_N).abs().max() < 1e-4, (
        f"iteration {t}: log p_t is not that of the model that generated"
        + whose(responses.opponent_N, models, world, responses))
    assert not responses.opponent_N.requires_grad, "the opponent must not learn"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two iterations of train.main: what each step gave to spin_loss, and the saved models."""
    folder, steps, patch = tmp_path_factory.mktemp("run"), [], pytest.MonkeyPatch()
    path, exact = folder / "world.jsonl", train.spin_loss
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "line"}) + "\n"
                            for row in ROWS))

    def spy(policy_real_B, policy_generated_B, opponent_real_B, opponent_generated_B, *rest):
        steps.append((policy_real_B.detach(), opponent_real_B, policy_generated_B.detach(),
                      opponent_generated_B))
        return exact(policy_real_B, policy_generated_B, opponent_real_B, opponent_generated_B,
                     *rest)
    patch.setattr(train, "spin_loss", spy)
    for name in ("draw_convergence", "draw_gif"):
        patch.setattr(train, name, lambda out: None)
    config = Config(iters=2, sft_steps=4, steps=4, reports=1, n_layer=1, n_head=1, n_embd=16,
                    negatives=8, batch_size=64, lr=0.05, block_size=32, device="cpu", sft_samples=8,
                    data=str(path), out=str(folder / "out"))
    train.main(config)
    patch.undo()
    saved = [load_checkpoint(Path(config.out) / f"iteration_{t}.pt")[0] for t in range(3)]
    return World(ROWS, load_encoding(), 8, 0, 32), steps, saved


def real_logps(world, model) -> list[float]:
    """log p of each response of the SFT set, train prompts only, sorted."""
    return sorted(logp_by_hand(model, framed(ROWS[p]["prompt"]), y)
                  for p in (0, 2) for y, share in world.real[p].items() if share)


def test_opponent_is_frozen_within_an_iteration(run):
    """Its log-probs are the same tensor of numbers at every step, while the player's move."""
    _, steps, _ = run
    assert len(steps) == 8
    for first in (0, 4):
        start = steps[first]
        for step in steps[first + 1:first + 4]:
            for k, name in ((1, "real"), (3, "generated")):
                assert step[k].shape == start[k].shape and torch.equal(step[k], start[k]), (
                    f"log p_t of {name} responses changes within an iteration: drawn from, or "
                    f"scored by, the live player?")
            assert not torch.equal(step[0], start[0]), "the player did not move"


def test_opponent_is_renewed_between_iterations(run):
    world, steps, saved = run
    for t, step in ((1, steps[0]), (2, steps[4])):
        got = sorted(set(step[1].tolist()))
        hint = known_mistake(got, {f"these are iteration {k}'s": real_logps(world, model)
                                   for k, model in enumerate(saved)}, tolerance=1e-3)
        assert got == pytest.approx(real_logps(world, saved[t - 1]), abs=1e-4), (
            f"iteration {t} must be scored against what iteration {t - 1} saved{hint}")


def test_player_starts_each_iteration_as_its_own_opponent(run):
    """θ starts at θ_t, so that all margins are 0 and the first loss is log 2."""
    for start in (run[1][0], run[1][4]):
        assert_close(start[0], start[1], atol=1e-4, rtol=0)
        assert_close(start[2], start[3], atol=1e-4, rtol=0)


def test_no_gradient_reaches_the_opponent(run):
    assert not any(step[1].requires_grad or step[3].requires_grad for step in run[1])


# ---- What is learned from: known shares, history ------------------------------------------------

def test_self_play_weighs_known_responses_by_p_t_and_the_others_by_their_draws(play):
    world, config, models = play
    responses = train.self_play(world, config, 2)
    drawn, rows = train.draw(models[1], world, config, 2), table_of(responses)
    logp_N = logps_by_hand(models[1], world, responses).tolist()
    for p, counts in enumerate(drawn):
        mine = {y: row for (q, y), row in rows.items() if q == p}
        known = {y: math.exp(logp_N[row]) for y, row in mine.items() if world.real[p].get(y)}
        others = {y: c for y, c in counts.items() if y not in known}
        share = known | {y: (1 - sum(known.values())) * c / sum(others.values())
                         for y, c in others.items()}
        for y, row in mine.items():
            assert responses.generated_N[row].item() == pytest.approx(share.get(y, 0), abs=1e-5), y
    assert torch.equal(responses.negative_N, responses.generated_N), "no history: one and the same"


def test_known_shares_keep_the_expectation():
    """Over all outcomes of 3 draws among 4 responses, the mean share of each is p_t, exactly."""
    p, n, known = [0.1, 0.2, 0.3, 0.4], 3, 2
    mean, second, chance = [0.0] * 4, [0.0] * 4, 0.0
    for outcome in itertools.product(range(4), repeat=n):
        if max(outcome) < known:
            continue  # no other response was drawn, so none can stand for the rest
        table = one_prompt([outcome.count(y) / n for y in range(4)], p, known)
        table.know_shares()
        weight = math.prod(p[y] for y in outcome)
        chance += weight
        for y, share in enumerate(table.generated_N.tolist()):
            mean[y] += weight * share
            second[y] += weight * share**2
    right = [q * chance for q in p]
    assert mean == pytest.approx(right, rel=1e-6), f"{mean}, expected {right}"
    for y in range(4):  # the variance of the share, against that of counting, p(1 − p)/n
        noise = second[y] / chance - p[y]**2
        assert noise < 1e-6 if y < known else noise < p[y] * (1 - p[y]) / n


def one_prompt(generated, p, known):
    """A table of one prompt; p_t is known of the first `known` responses, those of the SFT set."""
    one = World([ROWS[0]], load_encoding(), 8, 0, 32).tabulate()
    one.prompt_N = torch.zeros(len(p), dtype=torch.long)
    one.real_N = torch.tensor([1 / known] * known + [0.0] * (len(p) - known), dtype=torch.float64)
    one.generated_N = torch.tensor(generated, dtype=torch.float64)
    one.opponent_N = torch.tensor(p, dtype=torch.float64).log()
    return one


def test_history_mixes_in_the_draws_of_the_iteration_before(play):
    """Half the negatives are p_{t−1}'s draws, the same as then; all are scored by p_t."""
    world, config, models = play
    config = Config(**vars(config) | {"history": 1})
    responses = train.self_play(world, config, 2)
    rows, older = table_of(responses), train.draw(models[0], world, config, 1)
    for (p, y), row in rows.items():
        share = older[p][y] / NEGATIVES
        assert responses.older_N[row].item() == pytest.approx(share, abs=1e-6)
        assert responses.negative_N[row].item() == pytest.approx(
            (responses.generated_N[row].item() + share) / 2, abs=1e-6)
    assert {(p, y) for p, counts in enumerate(older) for y in counts} <= set(rows)
    right_N = logps_by_hand(models[1], world, responses)
    assert (responses.opponent_N - right_N).abs().max() < 1e-4, (
        "older draws are scored by the current opponent, like the rest"
        + whose(responses.opponent_N, models, world, responses))
    first = train.self_play(world, config, 1)
    assert not first.older_N.any() and torch.equal(first.negative_N, first.generated_N), (
        "before the first iteration there is no older opponent")


# ---- The objectives -----------------------------------------------------------------------------

def batch_of(play):
    """(batch of the train prompts, player, log-probs by hand, {prompt: its rows})."""
    world, config, models = play
    whole = train.self_play(world, config, 1)
    batch = whole.select(world.splits["train"])
    logp_N = logps_by_hand(models[2], world, whole)[torch.isin(whole.prompt_N,
                                                               world.splits["train"])].tolist()
    mine = {p: (batch.prompt_N == p).nonzero()[:, 0].tolist() for p in range(2)}
    return batch, models[2], logp_N, mine


def test_sft_loss_is_minus_the_mean_log_probability_of_the_sft_set(play):
    batch, player, logp_N, mine = batch_of(play)
    total, loss = train.sft_objective(player, batch, play[1])
    real, data, length = (x.tolist() for x in (batch.real_N, batch.data_N, batch.length_N))
    mean = lambda weight: -sum(weight[n] * logp_N[n] for rows in mine.values() for n in rows) / 2
    right = mean(real)
    assert loss.item() == pytest.approx(right, abs=1e-4), f"{loss.item()}, expected {right}" + (
        known_mistake(loss.item(), {
            "minus is missing": -right, "you summed over the prompts; take their mean": 2 * right,
            "weigh by the SFT set (real_N), not by p_data, which training may not know": mean(data),
            "all rows are counted alike; weigh them by real_N": mean([1.0] * len(real)),
            "the mask is inverted: what is not in the SFT set is learned":
                mean([float(share == 0) for share in real]),
            "you averaged over tokens; a log-probability is a sum":
                mean([share / n for share, n in zip(real, length)]),
            "the mean is over prompts, not over rows": right * 2 / len(real)}))
    assert total.item() == loss.item() and total.requires_grad


def spin_by_hand(batch, logp_N, mine, lam, both_real=False, sign=1):
    """Eq. 4.7 over all pairs of each prompt, mean over the prompts."""
    total = 0.0
    opponent, real, negative = (x.tolist() for x in (batch.opponent_N, batch.real_N,
                                                     batch.negative_N))
    ratio = [a - b for a, b in zip(logp_N, opponent)]
    for rows in mine.values():
        for i, j in itertools.product(rows, rows):
            u = sign * lam * (ratio[i] - ratio[i if both_real else j])
            total += real[i] * negative[j] * math.log1p(math.exp(-u)) / len(mine)
    return total


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_spin_objective_compares_every_real_with_every_generated_response(play, lam):
    batch, player, logp_N, mine = batch_of(play)
    config = Config(**vars(play[1]) | {"lam": lam})
    total, loss = train.spin_objective(player, batch, config)
    right = spin_by_hand(batch, logp_N, mine, lam)
    assert loss.item() == pytest.approx(right, abs=1e-4), f"{loss.item()}, expected {right}" + (
        known_mistake(loss.item(), {
            "real and generated responses share one log-ratio: the same labels for both?":
                spin_by_hand(batch, logp_N, mine, lam, both_real=True),
            "the sign of the margin is flipped": spin_by_hand(batch, logp_N, mine, lam, sign=-1),
            "you summed over the prompts": 2 * right}))
    assert total.item() == pytest.approx(2 / lam * right, abs=1e-4), "minimised: L · 2/λ"


def test_first_step_follows_sft_minus_what_the_opponent_says(play):
    """At θ = θ_t: ∇L·2/λ = −∇(Σ real log p − Σ generated log p). From a live opponent: 0."""
    world, config, models = play
    batch, player = batch_of(play)[0], models[0]
    total, _ = train.spin_objective(player, batch, config)
    got = torch.autograd.grad(total, list(player.parameters()))
    by_hand = 0.0
    for x_T, m, p, y_S, n, w in zip(*(batch.prompt_PT[batch.prompt_N],
                                      batch.prompt_length_P[batch.prompt_N], batch.prompt_N,
                                      batch.tokens_NS, batch.length_N,
                                      batch.real_N - batch.negative_N)):
        tokens_1T = torch.cat([x_T[:m], y_S[:n]])[None]
        logp_TV = gpt2_by_hand(player, tokens_1T)[0, m - 1:-1].log_softmax(1)
        by_hand = by_hand - w / 2 * logp_TV.gather(1, y_S[:n, None]).sum()
    right = torch.autograd.grad(by_hand, list(player.parameters()))
    for (name, _), a, b in zip(player.named_parameters(), got, right):
        assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda text: f"gradient of {name}: {text}")
