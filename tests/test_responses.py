"""data/responses.py: prefix trees that give `sequence_logps` faster, pairs, and shares.

The oracles are the definition (`sequence_logps`, `logp_by_hand`), sets of prefixes written out in
plain Python, loops over all pairs, and every outcome of a few samples.
"""
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data.responses as responses_module
import spin_loss
from conftest import logp_by_hand, tiny_gpt
from data.responses import (PrefixTrees, TreeCache, all_logps, grow, known_shares, pack, pairs,
                            response_logps, runs, self_play_responses, sft_responses,
                            subtree_ends)
from data.tokenizer import load_encoding
from data.world import World
from spin_loss import sequence_logps

END = 9
BLOCK = 12
PROMPTS = [[1, 2, 3], [4], [5, 5], [7]]  # two of them a single token
RESPONSES = [
    {(1, 2, END), (1, END), (3, END), (1, 2, 4, END)},
    {(8, END), (8, END, END), (8,), (END,), (0,)},  # cut short, and each the beginning of another
    {(2,) * 10, (2,) * 9 + (END,), (6, END)},  # fills the block with its prompt
    {(END,)}]  # one edge and no node but the prompt's


def full_sequences(trees, prompts):
    """(tokens_NT, response_NT): each response behind its own copy of its prompt, padded."""
    texts = [(x, list(y)) for x, some in zip(prompts, trees.responses) for y in some]
    T = max(len(x) + len(y) for x, y in texts)
    fill = lambda x, y: T - len(x) - len(y)
    return (torch.tensor([x + y + [0] * fill(x, y) for x, y in texts]),
            torch.tensor([[False] * len(x) + [True] * len(y) + [False] * fill(x, y)
                          for x, y in texts]), texts)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(spin_loss, "compiled", lambda body, device: body)


# ---- The same numbers as the definition ---------------------------------------------------------

@pytest.mark.parametrize("impl, large", [("eager", 128), ("fused", 128), ("eager", 1),
                                         ("fused", 5)])
def test_response_logps_equal_sequence_logps(impl, large, uncompiled, monkeypatch):
    """In value and in the gradient of a random weighted sum, by far the stricter test.

    Whether a prompt has one tree, or several because one would be large.
    """
    monkeypatch.setattr(responses_module, "LARGE_TREE", large)
    model, trees = tiny_gpt(vocab_size=10, block_size=BLOCK), PrefixTrees(PROMPTS, RESPONSES)
    assert (len(trees.columns["size"]) > len(PROMPTS)) == (large < 128)
    tokens_NT, response_NT, texts = full_sequences(trees, PROMPTS)
    assert len(texts) == 13
    weight_N = torch.randn(len(texts), generator=torch.Generator().manual_seed(0))
    logps, gradients = [], []
    for logp_N in (sequence_logps(model, tokens_NT, response_NT),
                   response_logps(model, trees.batch(range(len(PROMPTS))), impl)):
        logps.append(logp_N.detach())
        gradients.append(torch.autograd.grad((weight_N * logp_N).sum(), list(model.parameters())))
    assert_close(logps[1], logps[0], atol=2e-5, rtol=0)
    by_hand_N = torch.tensor([logp_by_hand(model, x, y) for x, y in texts])
    assert_close(logps[1], by_hand_N, atol=2e-5, rtol=0)
    for (name, _), slow, fast in zip(model.named_parameters(), *gradients):
        assert_close(fast, slow, atol=2e-5 * slow.abs().max().item(), rtol=0,
                     msg=lambda text: f"gradient of {name}: {text}")


def random_tries(count, seed):
    """`count` sets of responses over three tokens, so that they share many prefixes."""
    rng = random.Random(seed)
    for _ in range(count):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 3))]
        yield prompt, {tuple(rng.choices(range(3), k=rng.randint(1, 5)))
                       for _ in range(rng.randint(1, 12))}


@pytest.mark.parametrize("large", [1, 4, 8, 128])
def test_random_trees_give_the_definitions_numbers(large, monkeypatch):
    monkeypatch.setattr(responses_module, "LARGE_TREE", large)
    model = tiny_gpt(vocab_size=3, block_size=BLOCK, seed=1)
    prompts, responses = zip(*random_tries(30, seed=0))
    trees = PrefixTrees(prompts, responses)
    tokens_NT, response_NT, _ = full_sequences(trees, prompts)
    with torch.no_grad():
        got_N = response_logps(model, trees.batch(range(30)))
        assert_close(got_N, sequence_logps(model, tokens_NT, response_NT), atol=2e-5, rtol=0)


@pytest.mark.parametrize("prompts", [[3, 1, 0, 2], [2], [1, 3], [0, 2, 1]], ids=str)
def test_a_prompts_logps_do_not_depend_on_the_batch(prompts):
    """Alone, beside others or in another order; its rows are those of the whole, in their order."""
    model, trees = tiny_gpt(vocab_size=10, block_size=BLOCK), PrefixTrees(PROMPTS, RESPONSES)
    with torch.no_grad():
        got = response_logps(model, trees.batch(prompts)).tolist()
    right = [logp_by_hand(model, PROMPTS[p], list(y))
             for p in prompts for y in sorted(RESPONSES[p])]
    assert got == pytest.approx(right, abs=2e-5)


def test_all_logps_are_those_of_batches_and_bound_the_memory(monkeypatch):
    """2¹⁸ tokens: a logit for each fills 16 MB at 16 nodes, so few prompts are read at a time."""
    model = tiny_gpt(vocab_size=1 << 18, block_size=BLOCK, n_layer=1)
    trees, sizes = PrefixTrees(PROMPTS * 3, RESPONSES * 3), []

    def watched(model, batch, impl):
        sizes.append(len(batch.token_M))
        return response_logps(model, batch, impl)
    monkeypatch.setattr(responses_module, "response_logps", watched)
    got_N = all_logps(model, trees)
    assert got_N.dtype == np.float64 and len(sizes) > 3
    assert sum(sizes) == trees.first_node[-1], "each prompt is read once"
    assert all(size <= 16 or size in np.diff(trees.first_node) for size in sizes), sizes
    with torch.no_grad():
        right = [response_logps(model, trees.batch([p])) for p in range(12)]
    assert got_N.tolist() == pytest.approx(torch.cat(right).tolist(), abs=1e-5)


def test_a_response_may_fill_the_block_and_no_more():
    """Its last token is scored, not read, so one token more than block_size still has a place."""
    model = tiny_gpt(vocab_size=10, block_size=BLOCK)
    for length in (BLOCK, BLOCK + 1):
        y = tuple([2] * (length - 3))
        with torch.no_grad():
            got_N = response_logps(model, PrefixTrees([[1, 2, 3]], [{y, (4, END)}]).batch([0]))
        assert got_N[0].item() == pytest.approx(logp_by_hand(model, [1, 2, 3], list(y)), abs=2e-5)
    too_long = PrefixTrees([[1, 2, 3], [4]], [{(2,) * (BLOCK - 1)}, {(END,)}])
    with pytest.raises(ValueError, match="13 tokens do not fit the model's block_size of 12"):
        response_logps(model, too_long.batch([0, 1]))
    response_logps(model, too_long.batch([1]))


# ---- One tree -----------------------------------------------------------------------------------

def test_each_prefix_is_one_node_and_each_step_one_edge():
    """Every column of `grow` against the sets of prefixes, written out."""
    for prompt, responses in random_tries(100, seed=2):
        responses = sorted(responses)
        tree = grow(prompt, responses)
        depth, end, M, n = tree["depth"], tree["end"], len(tree["token"]), len(prompt)
        ancestors = [[j for j in range(M) if j <= i < end[j]] for i in range(M)]
        read = [tuple(tree["token"][j] for j in ancestors[i]) for i in range(M)]  # by each node
        assert read[:n] == [tuple(prompt[:i + 1]) for i in range(n)], "first the prompt's own nodes"
        proper = {y[:k] for y in responses for k in range(1, len(y))}
        assert sorted(text[n:] for text in read[n:]) == sorted(proper), "each proper prefix, once"
        assert depth == [len(text) - 1 for text in read], "a position counts the ancestors"
        assert end == [1 + max(i for i in range(M) if read[i][:len(text)] == text) for text in read]

        edges = [read[parent][n:] + (target,) for parent, target in
                 zip(tree["parent"], tree["target"], strict=True)]
        assert all(parent >= n - 1 for parent in tree["parent"]), "the prompt itself is not scored"
        assert sorted(edges) == sorted({y[:k] for y in responses for k in range(1, len(y) + 1)})
        steps = list(zip(tree["response"], tree["edge"], strict=True))
        assert [(row, edges[edge]) for row, edge in steps] == [
            (row, y[:k]) for row, y in enumerate(responses) for k in range(1, len(y) + 1)]


def test_a_large_tree_is_cut_into_runs_that_are_not():
    """Every response is in one run, in order, and no run could take the next response in."""
    for prompt, responses in random_tries(60, seed=4):
        responses = sorted(responses)
        for most in (len(prompt) + 5, len(prompt) + 8, 128):
            found = list(runs(prompt, responses, most))
            assert [y for run in found for y in run] == responses
            for run, later in itertools.zip_longest(found, found[1:], fillvalue=[]):
                assert run and len(grow(prompt, run)["token"]) <= most
                steps = {y[:k] for y in run + later[:1] for k in range(1, len(y) + 1)}
                assert not later or len(prompt) + len(steps) > most, "cut without need"


def test_subtree_ends_by_looking_at_every_later_node():
    rng = random.Random(0)
    for _ in range(100):
        depth = [0]
        while len(depth) < 12:
            depth.append(rng.randint(1, depth[-1] + 1))
        right = [next((i for i in range(j + 1, 12) if depth[i] <= depth[j]), 12)
                 for j in range(12)]
        assert subtree_ends(depth) == right, depth


# ---- Trees side by side -------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_packed_trees_never_overlap(seed):
    size_P = np.random.default_rng(seed).integers(1, 12, size=60)
    row_P, column_P, (R, T) = pack(size_P)
    places = [(row, column + k) for row, column, size in zip(row_P, column_P, size_P)
              for k in range(size)]
    assert len(set(places)) == len(places) == size_P.sum(), "two trees in one place"
    assert all(0 <= row < R and 0 <= column < T for row, column in places)
    assert T == size_P.max() and {row for row, _ in places} == set(range(R)), "an empty row"
    assert R * T < 2 * size_P.sum() + T, "two rows half empty could be one"


def test_a_node_sees_itself_and_its_ancestors_and_nothing_else():
    """In rows that several trees share, an empty place sees at least itself."""
    prompts, responses = zip(*random_tries(12, seed=3))
    trees = PrefixTrees(prompts, responses)
    batch, text = trees.batch(range(12)), []
    for p, (prompt, some) in enumerate(zip(prompts, responses)):
        tree = grow(prompt, sorted(some))
        for i in range(len(tree["token"])):
            path = [j for j in range(i + 1) if i < tree["end"][j]]
            text.append((p, tuple(tree["token"][j] for j in path)))
    cache = TreeCache(batch)
    position_M = cache.place(batch.token_M, BLOCK)
    assert position_M.tolist() == [len(read) - 1 for _, read in text]
    R, T = batch.end_RT.shape
    assert R < 12, "no row holds two trees: the test shows nothing"
    row_M, column_M = batch.slot_M // T, batch.slot_M % T
    for a, (p, read) in enumerate(text):
        for b, (q, before) in enumerate(text):
            sees = bool(row_M[a] == row_M[b]
                        and cache.visible_BTC[row_M[a], column_M[a], column_M[b]])
            assert sees == (p == q and read[:len(before)] == before), (
                f"node {text[a]} sees {text[b]}" if sees else f"{text[a]} misses {text[b]}")
    assert cache.visible_BTC.any(2).all(), "a softmax over nothing is NaN"


def test_no_tree_sees_another():
    """Change every token of one prompt and its responses: the others' log-probs stay."""
    model = tiny_gpt(vocab_size=10, block_size=BLOCK)
    shifted = lambda y: tuple((v + 1) % 9 if v < 9 else v for v in y)
    changed = [{shifted(y) for y in RESPONSES[0]}, *RESPONSES[1:]]
    with torch.no_grad():
        before_N, after_N = (response_logps(model, PrefixTrees(prompts, some).batch(range(4)))
                             for prompts, some in ((PROMPTS, RESPONSES),
                                                   ([list(shifted(PROMPTS[0])), *PROMPTS[1:]],
                                                    changed)))
    n = len(RESPONSES[0])
    assert (before_N[:n] - after_N[:n]).abs().min() > 1e-3, "this tree did change"
    assert_close(after_N[n:], before_N[n:], atol=1e-6, rtol=0)


# ---- The table: responses and their shares ------------------------------------------------------

def small_world():
    rows = [{"prompt": "Flip a coin with 5% heads.", "split": "train", "line": 1, "family": "f",
             "responses": {"heads": 0.05, "tails": 0.95}},
            {"prompt": "Hi", "split": "heldout", "line": 2, "family": "f",
             "responses": {"y": 0.5, "no no": 0.5}},
            {"prompt": "Greet Tom warmly.", "split": "train", "line": 3, "family": "f",
             "responses": {"Hey Tom!": 0.6, "Hi, Tom!": 0.3, "Welcome, Tom!": 0.1}}]
    return World(rows, load_encoding(), sft_samples=8, seed=0, block_size=40)


def samples_for(world) -> list[Counter]:
    """Responses of an opponent: right ones, wrong ones, and one cut short before END."""
    right, end = [next(iter(data)) for data in world.data], world.end_token
    return [Counter({right[0]: 2, (65, 66, 67): 1, (end,): 1}), Counter({(70, end): 4}),
            Counter({right[2]: 1, (80, 81, 82, 83, 84, 85, 86, end): 3})]


def rows_by_hand(table):
    """{(prompt number, response): row number}."""
    keys = [(p, y) for p, some in enumerate(table.trees.responses) for y in some]
    assert len(set(keys)) == len(keys), "a response is listed twice"
    assert [p for p, _ in keys] == table.prompt_N.tolist()
    assert [len(y) for _, y in keys] == table.trees.length_N.tolist()
    return {key: row for row, key in enumerate(keys)}


def test_sft_learns_from_the_responses_of_p_data_alone():
    world = small_world()
    table = sft_responses(world)
    rows = rows_by_hand(table)
    assert set(rows) == {(p, y) for p, data in enumerate(world.data) for y in data}
    for (p, y), row in rows.items():
        assert table.data_N[row] == pytest.approx(world.data[p][y], rel=1e-12)
        assert table.real_N[row] == pytest.approx(world.real[p].get(y, 0))
    for p, total in enumerate(np.bincount(table.prompt_N, weights=table.real_N)):
        assert total == pytest.approx(1 if p in world.splits["train"] else 0), p


@pytest.mark.parametrize("history", [False, True])
def test_table_lists_every_response_once_with_its_shares(history):
    world, end = small_world(), small_world().end_token
    samples = samples_for(world)
    older = [Counter({(end,): 4}), Counter({(71, 72): 1, (70, end): 3}),
             Counter({next(iter(world.data[2])): 4})] if history else None
    asked = []

    def opponent_logps(trees):
        asked.append(trees)
        return np.array([-float(len(y)) for some in trees.responses for y in some])
    table = self_play_responses(world, samples, older, opponent_logps)
    assert asked == [table.trees], "log p_t of all of them, once"
    rows = rows_by_hand(table)
    everything = [world.data, samples] + ([older] if history else [])
    assert set(rows) == {(p, y) for counts in everything for p in range(3) for y in counts[p]}
    for p in range(3):
        known = {y: math.exp(-len(y)) for y, share in world.real[p].items() if share}
        others = {y: c for y, c in samples[p].items() if y not in known}
        total, n = sum(known.values()), samples[p].total()
        part = (1 - total) / (1 - total ** n)  # of the others, some of which were sampled
        own = {y: (1 - part) * q / total for y, q in known.items()}
        own |= {y: part * c / sum(others.values()) for y, c in others.items()}
        for (q, y), row in rows.items():
            if q == p:
                assert table.opponent_N[row] == -len(y)
                assert table.data_N[row] == pytest.approx(world.data[p].get(y, 0), rel=1e-12)
                assert table.real_N[row] == pytest.approx(world.real[p].get(y, 0))
                assert np.exp(table.log_share_N[row]) == pytest.approx(
                    known.get(y, samples[p][y] / n), abs=1e-12)
                right = (own.get(y, 0) + older[p][y] / 4) / 2 if history else own.get(y, 0)
                assert table.generated_N[row] == pytest.approx(right, abs=1e-12)


def test_a_prompt_without_samples_leaves_the_others_as_they_are():
    """The benchmark beside TRL has such prompts, and the first one may be among them."""
    world, samples = small_world(), samples_for(small_world())
    logps = lambda trees: np.array([-float(len(y)) for some in trees.responses for y in some])
    whole, part = (self_play_responses(world, some, None, logps)
                   for some in (samples, [Counter(), *samples[1:]]))
    rest = [table.generated_N[table.prompt_N > 0] for table in (whole, part)]
    assert rest[0].tolist() == rest[1].tolist() and np.isfinite(part.generated_N).all()


def test_the_anchors_share_of_a_long_response_does_not_underflow():
    """p_t(y) = e^−900 is 0 in every float; its logarithm is not."""
    world = small_world()
    table = self_play_responses(world, samples_for(world), None,
                                lambda trees: np.full(trees.first_response[-1], -900.0))
    batch = table.batch([0, 1, 2])
    assert (batch.log_share_N[batch.real_N > 0] == -900).all()


@pytest.mark.parametrize("prompts", [[0, 1, 2], [2], [1, 2], [2, 0]], ids=str)
def test_a_batch_holds_the_rows_of_its_prompts(prompts):
    """Prompt q of the batch is prompt prompts[q] of the table, with the same rows and shares."""
    world = small_world()
    logps = lambda trees: np.linspace(-3, -1, trees.first_response[-1])
    table = self_play_responses(world, samples_for(world), None, logps)
    batch = table.batch(prompts)
    assert batch.P == len(prompts)
    assert batch.trees.N == len(batch.prompt_N) == sum(
        int((table.prompt_N == p).sum()) for p in prompts)
    for q, p in enumerate(prompts):
        here, there = batch.prompt_N == q, table.prompt_N == p
        for name in ("data_N", "real_N", "log_share_N", "opponent_N"):
            assert getattr(batch, name)[here].tolist() == pytest.approx(
                getattr(table, name)[there].tolist(), rel=1e-6), name


def test_pairs_are_all_pairs_of_one_prompt_with_product_weights():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prompt_N = np.sort(rng.integers(0, 5, size=18))
        first_N, second_N = (rng.random(18) * (rng.random(18) < 0.6) for _ in range(2))
        i_B, j_B, weight_B = pairs(prompt_N, first_N, second_N)
        right = {(i, j): first_N[i] * second_N[j] for i in range(18) for j in range(18)
                 if prompt_N[i] == prompt_N[j] and first_N[i] * second_N[j] > 0}
        assert len(i_B) == len(right), "a pair comes twice, or not at all"
        assert dict(zip(zip(i_B.tolist(), j_B.tolist()), weight_B)) == pytest.approx(right)
    for none in (np.zeros(3), np.ones(3)):
        i_B, j_B, weight_B = pairs(np.array([0, 0, 1]), none, np.zeros(3))
        assert len(i_B) == len(j_B) == len(weight_B) == 0


def test_a_batch_averages_its_pairs_over_its_prompts():
    """Equal weight for each prompt, however many pairs it has: together they weigh 1."""
    world = small_world()
    logps = lambda trees: np.full(trees.first_response[-1], -2.0)
    table = self_play_responses(world, samples_for(world), None, logps)
    for prompts in ([0, 2], [2]):
        batch = table.batch(prompts)
        i_B, j_B, weight_B = batch.pairs("real", "generated")
        assert torch.equal(batch.prompt_N[i_B], batch.prompt_N[j_B])
        for q in range(len(prompts)):
            total = weight_B[batch.prompt_N[i_B] == q].sum().item()
            assert total == pytest.approx(1 / len(prompts), abs=1e-6)
        generated_N = np.concatenate([table.generated_N[table.prompt_N == p] for p in prompts])
        for j, share in enumerate(generated_N.tolist()):  # whichever y stands beside it
            assert weight_B[j_B == j].sum().item() == pytest.approx(share / len(prompts), abs=1e-6)


# ---- Known shares -------------------------------------------------------------------------------

def test_known_shares_keep_the_expectation():
    """Over all outcomes of 3 samples of 4 responses, the mean share of each is p_t, exactly.

    Outcomes in which no unknown response was sampled count too: to spread the mass that they miss
    over the known ones would make wrong responses too light, most of all where they are rare.
    """
    p, n, known = [0.1, 0.2, 0.3, 0.4], 3, 2
    real_N = np.array([1 / known] * known + [0.0] * (4 - known))
    mean, second = [0.0] * 4, [0.0] * 4
    for outcome in itertools.product(range(4), repeat=n):
        counted_N = np.array([outcome.count(y) / n for y in range(4)])
        weight = math.prod(p[y] for y in outcome)
        for y, share in enumerate(known_shares(
                np.zeros(4, dtype=int), real_N, counted_N, np.log(p), n).tolist()):
            mean[y] += weight * share
            second[y] += weight * share**2
    assert mean == pytest.approx(p, rel=1e-9), f"{mean}, expected {p}"
    noise = sum(second) - sum(q * q for q in p)
    assert noise < sum(q * (1 - q) / n for q in p), "counting has less variance in all"


def test_known_shares_sum_to_one_for_each_prompt():
    """None but known ones sampled; p_t of them rounds to over 1; held out; some of each kind."""
    prompt_N = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3])
    real_N = np.array([0.5, 0.5, 1.0, 0, 0, 0, 0, 1, 0])
    sampled_N = np.array([0.25, 0.75, 0.5, 0.5, 0, 0.25, 0.75, 0.5, 0.5])
    opponent_N = np.log([0.1, 0.3, 1 + 1e-7, 1e-9, 1e-9, 0.9, 0.1, 0.6, 0.1])
    got = known_shares(prompt_N, real_N, sampled_N, opponent_N, 4).tolist()
    part = 0.4 / (1 - 0.6 ** 4)  # of the other response of prompt 3, which was sampled
    assert got == pytest.approx([0.25, 0.75, 0.75, 0.25, 0, 0.25, 0.75, 1 - part, part], abs=1e-6)
