"""model.py and sample.py together: GPT-2's architecture, the cache, and drawing exactly from p_θ.

The oracles are GPT-2 written once more as plain functions, generation that recomputes everything
for every token, and the exact probability of every response a tiny model can give. A test takes
the module that it tests as an argument, so that test_mistakes.py can give it a wrong one.
"""
import math
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

import model
import sample
from conftest import exact_probabilities, gpt2_by_hand, tiny_gpt

END = 3
RAGGED = [[1], [0, 2, 1, 1, 0], [2, 0], [1], [2, 2, 2]]  # two are equal, on purpose


# --- the architecture ----------------------------------------------------------------------------

@pytest.mark.parametrize("heads", [1, 4])
def test_model_is_gpt2_written_out(heads):
    """Values, and the gradient of every weight."""
    gpt = tiny_gpt(vocab_size=11, n_layer=3, n_head=heads, n_embd=16).double()
    tokens_BT = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    logits_BTV, expected_BTV = gpt(tokens_BT), gpt2_by_hand(gpt, tokens_BT)
    assert_close(logits_BTV, expected_BTV, atol=1e-10, rtol=0)
    weight_BTV = torch.randn_like(logits_BTV)
    ours, theirs = (torch.autograd.grad((weight_BTV * z).sum(), list(gpt.parameters()))
                    for z in (logits_BTV, expected_BTV))
    for (name, _), a, b in zip(gpt.named_parameters(), ours, theirs):
        assert_close(a, b, atol=1e-8, rtol=1e-8, msg=lambda text: f"gradient of {name}: {text}")


def test_fresh_model_is_nearly_uniform():
    """GPT-2's small initial weights: the first loss is log V, and biases start at 0."""
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(512, 32, 4, 4, 64))
    logp_BTV = gpt(torch.arange(32)[None]).log_softmax(2)
    assert logp_BTV.mean().item() == pytest.approx(-math.log(512), abs=0.02)
    assert all(not p.any() for name, p in gpt.named_parameters() if name.endswith("bias"))
    fc, proj = gpt.h[0].mlp.c_fc.weight.std(), gpt.h[0].mlp.c_proj.weight.std()
    assert fc.item() == pytest.approx(0.02, rel=0.05)
    assert proj.item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05)


def test_more_tokens_than_block_size_are_refused():
    gpt, cache = tiny_gpt(block_size=8), model.KVCache()
    with pytest.raises(ValueError, match="9 tokens .* block_size of 8"):
        gpt(torch.zeros(1, 9, dtype=torch.long))
    gpt(torch.zeros(1, 8, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="9 tokens"):
        gpt(torch.zeros(1, 1, dtype=torch.long), cache)


# --- the cache -----------------------------------------------------------------------------------

def test_reading_in_pieces_equals_reading_at_once(m=model):
    """Rows may be repeated and reordered in between."""
    gpt = tiny_gpt().double()
    tokens_BT = torch.randint(4, (3, 8), generator=torch.Generator().manual_seed(2))
    for pieces in ([1] * 8, [3, 5], [1, 6, 1]):
        cache = m.KVCache()
        logits = [gpt(part, cache) for part in tokens_BT.split(pieces, dim=1)]
        assert_close(torch.cat(logits, 1), gpt2_by_hand(gpt, tokens_BT), atol=1e-10, rtol=0,
                     msg=lambda text: f"the cache does not hold all that was read: {text}")
    cache, order = m.KVCache(), torch.tensor([2, 0, 2, 1])
    gpt(tokens_BT[:, :5], cache)
    cache.keep(order)
    assert len(cache) == 5
    assert_close(gpt(tokens_BT[order, 5:], cache), gpt2_by_hand(gpt, tokens_BT)[order, 5:],
                 atol=1e-10, rtol=0)


# --- generation ----------------------------------------------------------------------------------

@torch.no_grad()
def naive_generate(m, gpt, prompts, max_new_tokens, seed, **how):
    """Step by step, each prefix anew; rows are drawn together, as `generate` draws them.

    A response ends with END, or is cut short and has none.
    """
    rng, responses = torch.Generator().manual_seed(seed), [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = [gpt2_by_hand(gpt, torch.tensor([prompts[b] + responses[b]]))[0, -1]
                  for b in alive]
        for b, token in zip(alive, m.next_tokens(torch.stack(logits), generator=rng, **how)):
            responses[b].append(int(token))
        alive = [b for b in alive if responses[b][-1] != END
                 and len(prompts[b]) + len(responses[b]) <= gpt.config.block_size]
        if not alive:
            break
    return responses


def test_cached_and_naive_generation_agree(m=sample):
    for seed in range(5):
        gpt = tiny_gpt(block_size=12, seed=seed)
        for how in ({"temperature": 0.0}, {}, {"top_k": 2}, {"temperature": 2.0, "top_k": 3}):
            for most in (4, 20):  # tokens; some responses fill the block
                got = m.generate(gpt, RAGGED, max_new_tokens=most, end_token=END, **how,
                                 generator=torch.Generator().manual_seed(seed))
                right = naive_generate(m, gpt, RAGGED, most, seed, **how)
                assert got == right, f"cached and naive generation differ: {got}, not {right}"


def test_sampled_frequencies_match_exact_probabilities(m=sample):
    """Each response within 5 standard deviations, and all together by chi-square."""
    gpt, prompt, n = tiny_gpt(seed=3), [2, 0], 20_000
    for how in ({}, {"temperature": 0.6}, {"temperature": 0.7, "top_k": 3}):
        exact = exact_probabilities(gpt, prompt, 3, END, **how)
        assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
        draws = m.generate(gpt, [prompt] * n, max_new_tokens=3, end_token=END, **how,
                           generator=torch.Generator().manual_seed(0))
        counts, chi2, cells = Counter(map(tuple, draws)), 0.0, -1
        assert set(counts) <= {y for y, p in exact.items() if p > 0}, "an impossible response"
        for y, p in exact.items():
            assert abs(counts[y] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1, (
                f"{y}: drawn {counts[y]} times, expected {n * p:.1f}: greedy, truncated or "
                f"tempered?")
            if n * p >= 5:
                chi2, cells = chi2 + (counts[y] - n * p) ** 2 / (n * p), cells + 1
        assert abs(chi2 - cells) < 5 * math.sqrt(2 * cells), f"chi-square {chi2:.1f} on {cells}"


@pytest.mark.parametrize("prompts, settings", [
    ([[]], {}), ([[1], []], {}), ([[1] * 9], {}), ([[1]], {"temperature": -1.0}),
    ([[1]], {"temperature": math.nan}), ([[1]], {"top_k": 0})], ids=str)
def test_generate_refuses_what_it_cannot_do(prompts, settings):
    with pytest.raises(ValueError, match="prompt needs|must be"):
        sample.generate(tiny_gpt(), prompts, max_new_tokens=2, end_token=END, **settings)
