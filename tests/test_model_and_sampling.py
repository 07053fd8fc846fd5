"""model.py and sample.py: GPT-2's architecture, the cache, and drawing exactly from p_θ.

The oracles are GPT-2 written once more as plain functions, generation that recomputes everything
for every token, and the exact probability of every response a tiny model can give.
"""
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import exact_probabilities, gpt2_by_hand, known_mistake, logp_by_hand, tiny_gpt
from model import GPT, GPTConfig, KVCache, causal_mask
from sample import generate, next_tokens

END = 3
RAGGED = [[1], [0, 2, 1, 1, 0], [2, 0], [1], [2, 2, 2]]  # two are equal, on purpose


# ---- The architecture ---------------------------------------------------------------------------

@pytest.mark.parametrize("heads", [1, 2, 4])
def test_model_is_gpt2_written_out(heads):
    model = tiny_gpt(vocab_size=11, n_layer=3, n_head=heads, n_embd=16).double()
    tokens_BT = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    logits_BTV, expected_BTV = model(tokens_BT), gpt2_by_hand(model, tokens_BT)
    assert_close(logits_BTV, expected_BTV, atol=1e-10, rtol=0)
    parameters = list(model.parameters())
    weight_BTV = torch.randn_like(logits_BTV)
    ours, theirs = (torch.autograd.grad((weight_BTV * z).sum(), parameters)
                    for z in (logits_BTV, expected_BTV))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs):
        assert_close(a, b, atol=1e-8, rtol=1e-8, msg=lambda text: f"gradient of {name}: {text}")


def test_a_query_sees_its_own_position_and_those_before():
    query_BT, key_BC = torch.tensor([[0, 1, 2], [4, 5, 9]]), torch.tensor([[0, 1, 2], [3, 5, 9]])
    by_hand = lambda sees: [[[sees(q, k) for k in keys] for q in queries]
                            for queries, keys in zip(query_BT.tolist(), key_BC.tolist())]
    got = causal_mask(query_BT, key_BC)
    assert got.tolist() == by_hand(lambda q, k: k <= q), f"{got.int().tolist()}" + known_mistake(
        got, {"you hide a token from itself": by_hand(lambda q, k: k < q),
              "each token sees the future, not the past": by_hand(lambda q, k: k >= q),
              "True should mean visible, not hidden": by_hand(lambda q, k: k > q),
              "every token sees all": by_hand(lambda q, k: True),
              "queries and keys have changed places":
                  torch.tensor(by_hand(lambda q, k: k <= q)).transpose(1, 2)})


def test_attention_is_a_mean_of_values_weighted_by_softmax_of_q_k_over_root_k():
    """Head by head, query by query, in plain sums."""
    T, H, D = 4, 2, 6
    model = tiny_gpt(n_head=H, n_embd=D).double()
    attn, x_TD = model.h[0].attn, torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    qkv_T3D = F.linear(x_TD.double(), attn.c_attn.weight, attn.c_attn.bias)

    def by_hand(scale=1 / math.sqrt(D // H), causal=True, over_keys=True):
        y_TD = torch.zeros(T, D, dtype=torch.float64)
        for h in range(H):
            q, k, v = (qkv_T3D[:, a * D + h * D // H:][:, :D // H] for a in range(3))
            weight = [[math.exp(scale * (q[i] @ k[j]).item()) if j <= i or not causal else 0.0
                       for j in range(T)] for i in range(T)]
            for i in range(T):
                total = sum(weight[i]) if over_keys else None
                for j in range(T):
                    share = weight[i][j] / (total or sum(row[j] for row in weight))
                    y_TD[i, h * D // H:(h + 1) * D // H] += share * v[j]
        return F.linear(y_TD, attn.c_proj.weight, attn.c_proj.bias)
    cache = KVCache()
    cache.visible_BTC = torch.ones(1, T, T, dtype=torch.bool).tril()
    with torch.no_grad():
        got_TD, right_TD = attn(x_TD[None].double(), cache, 0)[0], by_hand()
        hint = known_mistake(got_TD, {
            "the scores lack 1/√K": by_hand(scale=1),
            "you divided by √D; a head has K = D/H numbers": by_hand(scale=1 / math.sqrt(D)),
            "you divided by K, not by its root": by_hand(scale=H / D),
            "the mask is not applied": by_hand(causal=False),
            "the softmax runs over queries; it belongs over keys": by_hand(over_keys=False)})
    error = (got_TD - right_TD).abs().max().item()
    assert error < 1e-10, f"your values are off by up to {error:.2g}{hint}"


def test_parameter_names_are_gpt2s():
    expected = {"wte.weight", "wpe.weight"}
    for module in ["ln_f"] + [f"h.{i}.{name}" for i in range(2) for name in (
            "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]:
        expected |= {f"{module}.weight", f"{module}.bias"}
    model = tiny_gpt(n_layer=2)
    assert set(model.state_dict()) == expected
    shape = {name.removeprefix("h.1."): tuple(p.shape) for name, p in model.named_parameters()}
    D = 8  # weights stand as nn.Linear's [out, in]
    assert shape["attn.c_attn.weight"] == (3 * D, D) and shape["mlp.c_fc.weight"] == (4 * D, D)
    assert shape["mlp.c_proj.weight"] == (D, 4 * D)


def test_parameter_count_is_gpt2s():
    """V·D + T·D + L (12 D² + 13 D) + 2 D; GPT-2 small has 124,439,808."""
    for V, T, L, H, D in ((50257, 1024, 12, 12, 768), (512, 64, 3, 2, 10)):
        with torch.device("meta"):
            count = sum(p.numel() for p in GPT(GPTConfig(V, T, L, H, D)).parameters())
        assert count == V * D + T * D + L * (12 * D * D + 13 * D) + 2 * D
        assert V != 50257 or count == 124_439_808


def test_head_is_the_embedding_itself():
    model = tiny_gpt()
    assert model.head_weight is model.wte.weight
    tokens_BT = torch.tensor([[0, 1, 2]])
    expected_BTV = model.hidden(tokens_BT) @ model.wte.weight.T
    assert_close(model(tokens_BT), expected_BTV, atol=1e-6, rtol=0)


def test_fresh_model_is_nearly_uniform():
    """GPT-2's small initial weights: the first loss is log V, and biases start at 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(512, 32, 4, 4, 64))
    logp_BTV = model(torch.arange(32)[None]).log_softmax(2)
    assert logp_BTV.mean().item() == pytest.approx(-math.log(512), abs=0.02)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    fc, proj = (model.h[0].mlp.c_fc.weight.std(), model.h[0].mlp.c_proj.weight.std())
    assert fc.item() == pytest.approx(0.02, rel=0.05)
    assert proj.item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05)


def test_no_token_sees_a_later_one():
    """The gradient of the logits at position i with respect to token j is 0 exactly where j > i."""
    model, T = tiny_gpt(), 6
    tokens_BT = torch.tensor([[0, 1, 2, 3, 2, 1]])
    seen = {}
    model.wte.register_forward_hook(lambda module, args, out: seen.update(x=out))
    hidden_BTD = model.hidden(tokens_BT)
    for i in range(T):
        grad_TD = torch.autograd.grad(hidden_BTD[0, i, 0], seen["x"], retain_graph=True)[0][0]
        touched = [bool(row.any()) for row in grad_TD]
        assert touched == [j <= i for j in range(T)], f"position {i} sees {touched}"


def test_more_tokens_than_block_size_are_refused():
    model = tiny_gpt(block_size=8)
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="9 tokens .* block_size of 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = KVCache()
    model(torch.zeros(1, 8, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="9 tokens"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    # What counts is text: a padded row may be wider than the block.
    wide_BT = torch.tensor([[1] * 5 + [-1] * 5, [-1] * 7 + [2] * 3])
    assert_close(model(wide_BT)[1, 7:], model(torch.tensor([[2] * 3]))[0], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="9 tokens"):
        model(torch.tensor([[1] * 9 + [-1], [1] * 2 + [-1] * 8]))


# ---- The cache ----------------------------------------------------------------------------------

def test_new_keys_and_values_come_after_the_old_ones_in_time():
    old, new = torch.arange(12.0).view(1, 2, 3, 2), 100 + torch.arange(8.0).view(1, 2, 2, 2)
    cache = KVCache()
    assert cache.extend(0, old, -old)[0].shape == (1, 2, 3, 2), "the first call has nothing to join"
    cache.extend(1, 50 + old, old)
    k_BHTK, v_BHTK = cache.extend(0, new, -new)
    right = [[[*o, *n] for o, n in zip(old[0].tolist(), new[0].tolist())]]
    assert k_BHTK.tolist() == right, f"keys of shape {tuple(k_BHTK.shape)}" + known_mistake(
        k_BHTK, {"the old ones are lost": new, "the new ones stand first": torch.cat(
            [new, old], dim=2), "layer 1 got into layer 0": torch.cat([50 + old, new], dim=2)})
    assert torch.equal(v_BHTK, -k_BHTK), "values are joined like keys, and kept apart from them"
    assert cache.extend(0, new[:, :, :0], new[:, :, :0])[0].shape[2] == 5, (
        "what extend returns must also be kept, for the next call to join")


@pytest.mark.parametrize("pieces", [[1] * 8, [3, 5], [1, 6, 1], [8]])
def test_reading_in_pieces_equals_reading_at_once(pieces):
    model, cache = tiny_gpt().double(), KVCache()
    tokens_BT = torch.randint(4, (3, 8), generator=torch.Generator().manual_seed(2))
    logits = [model(part, cache) for part in tokens_BT.split(pieces, dim=1)]
    assert_close(torch.cat(logits, dim=1), gpt2_by_hand(model, tokens_BT), atol=1e-10, rtol=0)


@pytest.mark.parametrize("place", ["right", "left", "between"])
def test_padding_in_the_cache_is_never_seen(place):
    """Nor counted: the token after it stands where it would stand without it."""
    model, rows, T = tiny_gpt().double(), [[1], [0, 1, 2, 2], [2, 2], []], 5
    padded = {"right": lambda row: row + [-1] * (T - len(row)),
              "left": lambda row: [-1] * (T - len(row)) + row,
              "between": lambda row: row[:1] + [-1] * (T - len(row)) + row[1:]}[place]
    cache = KVCache()
    model.hidden(torch.tensor([padded(row) for row in rows]), cache)
    order = [2, 0, 1, 3, 0]  # rows may be repeated and reordered
    next_BT = torch.tensor([[1, 2], [0, 0], [2, 1], [1, 0], [3, 2]])
    got_BTV = model(next_BT, cache.rows(torch.tensor(order)))
    for b, row in enumerate(order):
        alone = rows[row] + next_BT[b].tolist()
        expected_TV = gpt2_by_hand(model, torch.tensor([alone]))[0, -2:]
        assert_close(got_BTV[b], expected_TV, atol=1e-10, rtol=0)


# ---- Generation ---------------------------------------------------------------------------------

@torch.no_grad()
def naive_generate(model, prompts, max_new_tokens, pick):
    """Step by step, each prefix anew. (One response after another would draw in another order.)"""
    responses, alive = [[] for _ in prompts], list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = [gpt2_by_hand(model, torch.tensor([prompts[b] + responses[b]]))[0, -1]
                  for b in alive]
        for b, token in zip(alive, pick(logits)):
            responses[b].append(token)
        alive = [b for b in alive if responses[b][-1] != END
                 and len(prompts[b]) + len(responses[b]) <= model.config.block_size]
        if not alive:
            break
    return responses


def picker(seed, temperature=1.0, top_k=None):
    """Walk along the probabilities until their sum passes u, one uniform u a response and step."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits):
        tokens = []
        for z, u in zip(logits, torch.rand(len(logits), 1, generator=generator)[:, 0].tolist()):
            allowed = sorted(range(len(z)), key=lambda v: -z[v])[:top_k]
            weight = [math.exp(z[v] / temperature) if v in allowed else 0.0 for v in range(len(z))]
            total, token = weight[0], 0
            while total <= u * sum(weight):
                token += 1
                total += weight[token]
            tokens.append(token)
        return tokens
    return pick


def test_cached_and_naive_generation_agree():
    for seed in range(5):
        model = tiny_gpt(block_size=12, seed=seed)
        greedy = lambda logits: [int(z.argmax()) for z in logits]
        got = generate(model, RAGGED, max_new_tokens=6, end_token=END, temperature=0)
        assert got == naive_generate(model, RAGGED, 6, greedy)
        for settings in ({}, {"temperature": 0.5}, {"top_k": 2}, {"temperature": 2.0, "top_k": 3}):
            got = generate(model, RAGGED, max_new_tokens=6, end_token=END, **settings,
                           generator=torch.Generator().manual_seed(seed))
            assert got == naive_generate(model, RAGGED, 6, picker(seed, **settings)), settings


def test_each_prompt_gets_the_response_that_it_gets_alone():
    model = tiny_gpt(block_size=12)
    settings = {"max_new_tokens": 5, "end_token": END, "temperature": 0}
    together = generate(model, RAGGED, **settings)
    assert together == [generate(model, [prompt], **settings)[0] for prompt in RAGGED]
    assert together[0] == together[3], "equal prompts, greedy: equal responses"


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"temperature": 1.5}, {"top_k": 2},
                                      {"temperature": 0.7, "top_k": 3}], ids=str)
def test_sampled_frequencies_match_exact_probabilities(settings):
    """Each response within 5 standard deviations, and all together by chi-square."""
    model, prompt, n = tiny_gpt(seed=3), [2, 0], 20_000
    exact = exact_probabilities(model, prompt, 3, END, **settings)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
    draws = generate(model, [prompt] * n, max_new_tokens=3, end_token=END, **settings,
                     generator=torch.Generator().manual_seed(0))
    counts, chi2, cells = Counter(map(tuple, draws)), 0.0, -1
    assert set(counts) <= {y for y, p in exact.items() if p > 0}, "an impossible response was drawn"
    for y, p in exact.items():
        assert abs(counts[y] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1, (
            f"{y}: drawn {counts[y]} times, expected {n * p:.1f}: greedy, truncated or tempered?")
        if n * p >= 5:
            chi2, cells = chi2 + (counts[y] - n * p) ** 2 / (n * p), cells + 1
    assert abs(chi2 - cells) < 5 * math.sqrt(2 * cells), f"chi-square {chi2:.1f} on {cells} cells"


def test_default_sampling_is_at_temperature_one_and_untruncated():
    """Only then is a response a sample of p_t, as every theorem supposes: rare tokens do come."""
    logits_BV = torch.tensor([[0.9, 0.09, 0.009, 0.001]]).log().repeat(100_000, 1)
    tokens_B = next_tokens(logits_BV, generator=torch.Generator().manual_seed(0))
    for v, p in enumerate((0.9, 0.09, 0.009, 0.001)):
        drawn = int((tokens_B == v).sum())
        assert abs(drawn - 1e5 * p) < 5 * math.sqrt(1e5 * p * (1 - p)), (
            f"token {v}: drawn {drawn} times in 100,000, expected {1e5 * p:.0f}" + (
                ": you take the likeliest; that is greedy, not a sample"
                if len(tokens_B.unique()) == 1 else ": rare tokens are cut off" * (drawn == 0)))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    """p ∝ p_θ^(1/temperature): below 1 sharper, above 1 flatter."""
    p_V, n = torch.tensor([0.6, 0.3, 0.1]), 50_000
    tempered = lambda power: p_V**power / (p_V**power).sum()
    tokens_B = next_tokens(p_V.log().repeat(n, 1), temperature,
                           generator=torch.Generator().manual_seed(0))
    got_V, right_V = tokens_B.bincount(minlength=3) / n, tempered(1 / temperature)
    assert (got_V - right_V).abs().max() < 5 * 0.5 / math.sqrt(n), (
        f"drawn {got_V.tolist()}, expected {right_V.tolist()}" + known_mistake(got_V, {
            "you multiplied by the temperature": tempered(temperature),
            "the temperature has no effect": p_V, "you take the likeliest": [1, 0, 0],
            "all tokens are equally likely": [1 / 3] * 3}, tolerance=0.02))


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    logits_BV = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().repeat(50_000, 1)
    tokens_B = next_tokens(logits_BV, top_k=2, generator=torch.Generator().manual_seed(0))
    shares_V = (tokens_B.bincount(minlength=4) / 50_000).tolist()
    assert shares_V == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.012), shares_V
    assert next_tokens(logits_BV[:1], temperature=0).tolist() == [1], "temperature 0 is greedy"


@pytest.mark.parametrize("u, token", [(0.0, 1), (1.0, 2)])
def test_token_of_probability_zero_is_never_drawn(monkeypatch, u, token):
    """Not even at the two ends of the uniform draw, where rounding could let it in."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.full(size, u))
    no = float("-inf")
    assert next_tokens(torch.tensor([[no, 0.0, 0.0, no]])).tolist() == [token]


def test_no_impossible_token_is_drawn_among_very_many():
    """A cumulative sum of 50,000 float32 numbers rounds; steps of width 0 must stay so."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(50_000, generator=generator)
    logits_V[::2] = float("-inf")
    tokens_B = next_tokens(logits_V.expand(500, -1), generator=generator)
    assert (tokens_B % 2 == 1).all() and len(tokens_B.unique()) > 400


def test_response_ends_at_end_and_includes_it():
    model = tiny_gpt(block_size=12)
    draws = generate(model, RAGGED * 200, max_new_tokens=4, end_token=END,
                     generator=torch.Generator().manual_seed(0))
    assert {len(y) for y in draws} == {1, 2, 3, 4}
    for y in draws:
        assert END not in y[:-1], f"{y} goes on after END"
        assert y[-1] == END or len(y) == 4, f"{y} is short, but END is not on it"


def test_truncated_response_carries_no_end():
    """An unfinished response is not a finished one: it must not be scored as if it ended there."""
    model = tiny_gpt()
    never = next(v for v in range(4) if v not in generate(
        model, [[1]], max_new_tokens=5, end_token=-1, temperature=0)[0])
    response, = generate(model, [[1]], max_new_tokens=5, end_token=never, temperature=0)
    assert len(response) == 5 and never not in response
    assert generate(model, [[1]], max_new_tokens=0, end_token=END) == [[]]


def test_block_size_cuts_a_response_short_where_its_last_token_can_still_be_scored():
    model = tiny_gpt(block_size=8)
    prompts = [[1] * 8, [1] * 6, [1]]
    responses = generate(model, prompts, max_new_tokens=20, end_token=-1, temperature=0)
    assert [len(x) + len(y) for x, y in zip(prompts, responses)] == [9, 9, 9]
    assert all(math.isfinite(logp_by_hand(model, x, y)) for x, y in zip(prompts, responses))


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    model, settings = tiny_gpt(), {"max_new_tokens": 5, "end_token": END}
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    a, b, c = (generate(model, RAGGED * 20, **settings, generator=torch.Generator().manual_seed(s))
               for s in (1, 1, 2))
    assert a == b and a != c
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("prompts, settings", [
    ([[]], {}), ([[1], []], {}), ([[1] * 9], {}), ([[1]], {"temperature": -1.0}),
    ([[1]], {"temperature": float("nan")}), ([[1]], {"temperature": float("inf")}),
    ([[1]], {"top_k": 0})], ids=str)
def test_generate_refuses_what_it_cannot_do(prompts, settings):
    with pytest.raises(ValueError, match="prompt needs|must be"):
        generate(tiny_gpt(), prompts, max_new_tokens=2, end_token=END, **settings)
    assert generate(tiny_gpt(), [], max_new_tokens=2, end_token=END) == []
