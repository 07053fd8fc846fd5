"""data/responses.py: rows that give `sequence_logps` faster, parts of bounded size, and weights.

The oracle is the definition. Rows, and the weights of a train prompt, are among the claims.
"""
import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data.responses
import spin_loss
from conftest import tiny_gpt
from data.responses import (Responses, known_shares, response_logps, self_play_responses,
                            sft_responses)
from data.tokenizer import load_encoding
from data.world import World
from spin_loss import sequence_logps
from train import Config

END = 9
BLOCK = 60
PROMPTS = [[1, 2, 3], [4], [5, 5], [7], [6, 1]]
RESPONSES = [
    {(1, 2, END), (1, END), (3, END), (1, 2, 4, END)},
    {(8, END), (8, END, END), (8,), (END,), (0,)},  # cut short, and each the beginning of another
    {(2,) * 10, (2,) * 9 + (END,), (6, END)},
    {(END,)},  # nothing is read but the prompt
    {(v, *[u] * 25, END) for v in range(3) for u in range(2)}  # 84 places: rows of 34 or fewer
    | {(2,) * (BLOCK - 1)}]  # fills the block, and is wider than a row should be


def random_responses(count, seed):
    """Prompts, and responses of 1 to 5 tokens, of three kinds, so that they share many prefixes."""
    rng = random.Random(seed)
    some = lambda most: tuple(rng.choices(range(3), k=rng.randint(1, most)))
    return ([list(some(3)) for _ in range(count)],
            [{some(5) for _ in range(rng.randint(1, 12))} for _ in range(count)])


CASES = {"by hand": (PROMPTS, RESPONSES), "random": random_responses(30, seed=0)}


def table_of(prompts, responses) -> Responses:
    """The Responses of a world that is nothing but tokens, all with the same weight."""
    data_P = [{y: 1 / len(some) for y in some} for some in responses]
    return Responses(SimpleNamespace(prompts=prompts, data=data_P, real=data_P))


def logps_of(model, table, prompts, impl="eager") -> dict:
    """{(prompt's number, response): log p_θ}, by `response_logps`, part after part."""
    found = {}
    for part in table.parts(prompts):
        for p, logp_N in zip(part.prompts, response_logps(model, part, impl)):
            found |= {(p, y): logp for y, logp in zip(table.tables[p].responses, logp_N)}
    return found


def definition(model, prompts, responses) -> dict:
    """The same by `sequence_logps`: each response in a row of its own, padded."""
    keys = [(p, y) for p, some in enumerate(responses) for y in sorted(some)]
    texts = [(len(prompts[p]), prompts[p] + list(y)) for p, y in keys]
    T = max(len(text) for _, text in texts)
    tokens_NT = torch.tensor([text + [0] * (T - len(text)) for _, text in texts])
    response_NT = torch.tensor([[n <= i < len(text) for i in range(T)] for n, text in texts])
    return dict(zip(keys, sequence_logps(model, tokens_NT, response_NT)))


@pytest.fixture
def limits(monkeypatch):
    """Sets how many places and pairs are read at a time."""
    def set_to(places, pairs=1 << 20):
        monkeypatch.setattr(data.responses, "PLACES", {"cpu": places})
        monkeypatch.setattr(data.responses, "PAIRS", pairs)
    return set_to


# ---- The same numbers as the definition ---------------------------------------------------------

@pytest.mark.parametrize("places", [1 << 10, 64, 1])
@pytest.mark.parametrize("impl", ["eager", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_response_logps_equal_sequence_logps_in_value_and_gradient(case, impl, places, limits,
                                                                   monkeypatch):
    """To 12 digits, whatever is read at a time; the gradient is that of a random weighted sum."""
    monkeypatch.setattr(spin_loss, "compiled", lambda body, device: body)  # that takes seconds
    limits(places)
    prompts, responses = CASES[case]
    model = tiny_gpt(vocab_size=10, block_size=BLOCK, n_layer=1).double()
    slow = definition(model, prompts, responses)
    fast = logps_of(model, table_of(prompts, responses), range(len(prompts)), impl)
    assert fast.keys() == slow.keys()
    weight_N = torch.randn(len(slow), generator=torch.Generator().manual_seed(0)).double()
    found = []
    for logps in (slow, fast):
        logp_N = torch.stack([logps[key] for key in slow])
        gradients = torch.autograd.grad((weight_N * logp_N).sum(), list(model.parameters()))
        found.append([logp_N.detach(), *gradients])
    for name, right, got in zip(["log p", *dict(model.named_parameters())], *found):
        assert_close(got, right, atol=1e-12 * right.abs().max().item(), rtol=0,
                     msg=lambda text: f"{name}: {text}")


# ---- Parts --------------------------------------------------------------------------------------

@pytest.mark.parametrize("places, pairs", [(1024, 1 << 20), (64, 1 << 20), (1024, 50), (1, 1)])
def test_parts_hold_each_prompt_once_and_respect_the_limits(places, pairs, limits):
    limits(places, pairs)
    prompts, responses = random_responses(50, seed=3)
    table, wanted = table_of(prompts, responses), list(range(1, 50, 2))
    parts = list(table.parts(wanted))
    assert sorted(p for part in parts for p in part.prompts) == wanted
    for part in parts:
        P, N = part.data_PN.shape
        read = [rows.token_RT.numel() for rows in part.pieces]
        assert P == 1 or (len(read) == 1 and read[0] <= places and P * N * N <= pairs)
        for rows in part.pieces:
            assert rows.token_RT.numel() <= places or len(rows.token_RT) == 1, "more than one row"
            T = rows.token_RT.shape[1]
            assert (rows.end_RT > torch.arange(T)).all(), "padding sees nothing: its softmax is NaN"
        for later in parts[parts.index(part) + 1:]:
            assert max(table.tables[p].width for p in part.prompts) <= min(
                table.tables[p].width for p in later.prompts), "prompts of like width go together"


def kept_for_backward(prompts, responses) -> int:
    """How many numbers a prompt's log-probs keep until their gradient is asked for."""
    model, kept = tiny_gpt(vocab_size=10, block_size=BLOCK), {}
    part, = table_of(prompts, responses).parts([0])
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        response_logps(model, part)
    return sum(kept.values())


def test_memory_of_one_large_prompt_is_bounded(limits):
    """Read in pieces of 100 places, 40 and 160 responses of 26 tokens keep hardly anything; read
    at once, they keep what each place needs."""
    many = lambda n: ([[1, 2]], [{(a, b, c, *[a] * 23) for a, b, c in itertools.islice(
        itertools.product(range(6), repeat=3), n)}])
    limits(1 << 20)
    whole = [kept_for_backward(*many(n)) for n in (40, 160)]
    limits(100)
    pieces = [kept_for_backward(*many(n)) for n in (40, 160)]
    assert whole[1] > 3 * whole[0], "the test shows nothing"
    assert pieces[1] < whole[1] / 20, (pieces, whole)


# ---- The responses and their weights ------------------------------------------------------------

def small_world():
    rows = [{"prompt": "Flip a coin with 5% heads.", "split": "train", "line": 1, "family": "f",
             "responses": {"heads": 0.05, "tails": 0.95}},
            {"prompt": "Hi", "split": "heldout", "line": 2, "family": "f",
             "responses": {"y": 0.5, "no no": 0.5}}]
    return World(rows, load_encoding(), sft_samples=4, seed=0, block_size=40)


def weights(responses) -> dict:
    """{(prompt's number, response): {name of a table of a Part: value}}; each is listed once."""
    names, found = ("data", "real", "generated", "log_share"), {}
    for part in responses.parts(range(len(responses.tables))):
        for i, p in enumerate(part.prompts):
            some = responses.tables[p].responses
            for n, y in enumerate(some):
                assert (p, y) not in found, "a response is listed twice"
                found[p, y] = {name: getattr(part, f"{name}_PN")[i, n].item() for name in names}
            for name, padding in zip(names, (0, 0, 0, -math.inf)):
                assert (getattr(part, f"{name}_PN")[i, len(some):] == padding).all(), name
    return found


def test_sft_learns_from_the_sft_set_alone_and_metrics_from_p_data():
    world = small_world()
    found = weights(sft_responses(world))
    assert set(found) == {(p, y) for p, data in enumerate(world.data) for y in data}
    for (p, y), weight in found.items():
        assert weight["data"] == pytest.approx(world.data[p][y], rel=1e-6)
        assert weight["real"] == pytest.approx(world.real[p].get(y, 0))
    assert len(world.real[0]) == 1 and not world.real[1], "tails alone was drawn; held out: none"


def test_of_a_held_out_prompt_no_response_is_real_so_all_are_weighed_by_their_counts():
    """And of a train prompt those are weighed by p_t that are in the SFT set."""
    world, model = small_world(), tiny_gpt(vocab_size=512, block_size=40)
    right = [next(iter(data)) for data in world.data]  # "heads", which is not in the SFT set
    samples = [Counter({right[0]: 2, (65, 66): 1, (67,): 1}),
               Counter({right[1]: 1, (70, 71): 3})]
    found = weights(self_play_responses(world, samples, model, Config()))
    assert set(found) == {(p, y) for of in (world.data, samples) for p in (0, 1) for y in of[p]}
    for p, y, share in ((0, right[0], .5), (0, (65, 66), .25), (0, (67,), .25),
                        (1, right[1], .25), (1, (70, 71), .75)):
        assert found[p, y]["generated"] == pytest.approx(share, abs=1e-3)
        assert found[p, y]["log_share"] == pytest.approx(math.log(share))


@pytest.mark.parametrize("real, p, right", [
    ([1, 0, 0], [1 + 1e-7, 1e-9, 1e-9], [.75, .25, 0]),  # ¼ is the limit of part
    ([1, 0, 0], [math.exp(-900), .3, .2], [0, .5, .5])], ids=["rounds to over 1", "underflows"])
def test_known_shares_sum_to_one_at_the_edges_of_a_float(real, p, right):
    sampled_N = np.array([.5, .5, 0]) if right[0] else np.array([0, .5, .5])
    with np.errstate(divide="ignore"):  # log 0
        got_N = known_shares(np.array(real), sampled_N, np.log(p), 4)
    assert got_N.tolist() == pytest.approx(right, abs=1e-6) and got_N.sum() == pytest.approx(1)


def test_the_anchors_share_of_a_long_response_does_not_underflow():
    """p_t(y) = e^−900 is 0 in every float; its logarithm is not."""
    world = SimpleNamespace(prompts=[[1]], data=[{(1, END): 1.0}], real=[{(1, END): 1.0}])
    responses = Responses(world, [{(2, END): 0.5, (3, END): 0.5}])
    responses.tables[0].weigh(np.array([-900.0, -1, -2]), 2, "known")
    part, = responses.parts([0])
    assert part.log_share_PN[0].tolist() == pytest.approx([-900, math.log(0.5), math.log(0.5)])
