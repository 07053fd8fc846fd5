"""Claims about model.py and sample.py: the mask, attention, the sampling of a token."""
import math

import torch
import torch.nn.functional as F

from classroom.checks import (Broken, claim, dice, expect, flat, plain, require, require_gradient,
                              table)

# --- causal_mask ---------------------------------------------------------------------------------


def check_mask(m, query_BT, key_BC):
    got = m.causal_mask(torch.tensor(query_BT), torch.tensor(key_BC))
    B, T, C = len(query_BT), len(query_BT[0]), len(key_BC[0])
    require(not (list(got.shape) == [B, C, T] and T != C), f"the last two axes are exchanged: "
            f"{list(got.shape)} is [B, C, T], expected [B, T, C]")
    require(-math.inf not in flat(plain(got)), "this is a mask to be added, with −inf in it; True "
            "and False are expected")
    require(got.dtype == torch.bool, f"the mask holds {got.dtype}; torch.bool is expected")
    seen = lambda rule: [[[rule(q, k) for k in keys] for q in queries]
                         for queries, keys in zip(query_BT, key_BC)]
    right = seen(lambda q, k: not k > q)
    expect(got, right, {
        "a token does not see itself: a key at the query's own position is visible too":
            seen(lambda q, k: k < q),
        "True and False are exchanged: True means visible": seen(lambda q, k: k > q),
        "each query sees what comes after it: query and key are exchanged":
            seen(lambda q, k: k >= q),
        "you compare indices; the arguments are positions, and query 0 may stand at position 4":
            [[[c <= t for c in range(C)] for t in range(T)]] * B,
        "every query sees every key": seen(lambda q, k: True),
        "all rows get the mask of the first row": right[:1] * B}, "the mask")


@claim("model.py", "causal_mask")
def a_query_sees_its_own_position_and_those_before(m):
    check_mask(m, [[0, 1, 2, 3]], [[0, 1, 2, 3]])
    check_mask(m, [[3, 4]], [[0, 1, 2, 3, 4]])


@claim("model.py", "causal_mask")
def positions_decide_not_indices(m):
    """With a cache a query stands far right, and keys may come in any order."""
    check_mask(m, [[4, 5, 6]], [[0, 16, 1, 4, 5]])


@claim("model.py", "causal_mask")
def each_row_of_the_batch_has_its_own_mask(m):
    rng = dice("rows")
    check_mask(m, [[2, 5, 7], [0, 1, 2]], [rng.sample(range(8), 4), rng.sample(range(8), 4)])
    check_mask(m, [[2, 5, 7], [0, 1, 2]], [[0, 1, 2, 7], [0, 5, 6, 7]])


# --- Attention.forward ---------------------------------------------------------------------------


def attention(m):
    """The implementation's Attention, D = 8 and H = 2, with random weights, biases too."""
    module = m.Attention(m.GPTConfig(5, 8, 1, 2, 8)).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(table(dice("weights"), *p.shape))
    return module


def attend(module, x_BTD, visible_BTC, old=None, root=2.0, hidden=-math.inf, after=None, axis=3,
           blind=math.nan, mix=False, project=True, order="qkv"):
    """Attention step by step; the arguments after `old` make the known mistakes."""
    parts = F.linear(x_BTD, module.c_attn.weight, module.c_attn.bias).split(8, dim=2)
    heads = {name: part.unflatten(2, (2, 4)).transpose(1, 2) for name, part in zip(order, parts)}
    q, k, v = (heads[name] for name in "qkv")
    if old:
        k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
    score = q @ k.transpose(2, 3) / root
    visible = visible_BTC[:, None]
    weight = (score if after else score.masked_fill(~visible, hidden)).softmax(axis)
    weight = weight.nan_to_num(blind)  # where nothing is visible
    y = (weight * visible if after else weight) @ v
    y = y.reshape(len(y), -1, 8) if mix else y.transpose(1, 2).flatten(2)
    return F.linear(y, module.c_proj.weight, module.c_proj.bias) if project else y


class PlainCache:
    """Stands for a KVCache that holds three tokens; remembers what `extend` is given."""
    def __init__(self):
        self.old = table(dice("k"), 2, 2, 3, 4), table(dice("v"), 2, 2, 3, 4)
        self.calls = []

    def __len__(self):
        return 0  # as a KVCache has that is given for the first time: `if cache:` is false

    def extend(self, layer, k_BHTK, v_BHTK):
        self.calls.append((layer, k_BHTK, v_BHTK))
        return torch.cat([self.old[0], k_BHTK], 2), torch.cat([self.old[1], v_BHTK], 2)


def check_attention(m, visible_BTC, cache=None):
    module, x_BTD = attention(m), table(dice("x"), 2, visible_BTC.shape[1], 8)
    try:
        got = module(x_BTD, visible_BTC, cache, 3)
    except RuntimeError:
        require(cache is None or cache.calls, "cache.extend is never called, so the old keys and "
                "values are missing (an empty cache is false: write `is not None`)")
        raise
    T, C = visible_BTC.shape[1:]
    by_hand = lambda mask=visible_BTC, **how: attend(module, x_BTD, mask, **{
        "old": None if cache is None else cache.old, **how})
    mistakes = {
        "visible_BTC is ignored, so every token sees all: where it is False the score is −inf":
            by_hand(torch.ones_like(visible_BTC)),
        "visible_BTC is ignored, and a causal mask taken instead: use the mask that is given":
            by_hand(torch.ones_like(visible_BTC).tril(C - T)),
        "the mask is inverted: True means that a token may be seen":
            by_hand(~visible_BTC, blind=0.0),
        "the mask is inverted (True means visible), so that some rows see nothing":
            by_hand(~visible_BTC),
        "the scores are not divided by √K": by_hand(root=1),
        "the scores are divided by √D; a head has K = D/H numbers: √K": by_hand(root=8 ** 0.5),
        "the scores are divided by K, not by √K": by_hand(root=4),
        "the mask must come before the softmax: your weights no longer sum to 1":
            by_hand(after=True),
        "a hidden score of 0 still gets a weight, e^0: use −inf": by_hand(hidden=0.0),
        "the softmax runs over the queries; it belongs over the keys, dim=3": by_hand(axis=2),
        "the heads are mixed up: transpose back to [B, T, H, K] before the reshape":
            by_hand(mix=True),
        "c_proj is missing at the end": by_hand(project=False)}
    mistakes |= {f"the three parts of c_attn(x) are q, k, v in this order; you took them as "
                 f"{', '.join(order)}": by_hand(order=order) for order in ("kqv", "vkq", "qvk")}
    if cache is not None:
        mistakes["the keys and values that cache.extend returns are not used"] = attend(
            module, x_BTD, visible_BTC[:, :, 3:])
    expect(got, by_hand(), mistakes, "the output")


def staircase(T, C):
    return torch.ones(2, T, C, dtype=torch.bool).tril(C - T)


@claim("model.py", "Attention.forward")
def output_is_the_mean_of_values_weighted_by_softmax_of_q_k_over_root_k(m):
    check_attention(m, staircase(3, 3))


@claim("model.py", "Attention.forward")
def what_is_not_visible_has_no_weight(m):
    """The mask is whatever is given: in a tree a token does not see all those before it."""
    visible_BTC = table(dice("visible"), 2, 4, 4) > 0
    visible_BTC |= torch.eye(4, dtype=torch.bool)
    visible_BTC[:, 2, 0], visible_BTC[:, 0, 2] = False, True  # never just the causal one
    check_attention(m, visible_BTC)


@claim("model.py", "Attention.forward")
def keys_and_values_read_before_count_too(m):
    cache = PlainCache()
    check_attention(m, staircase(2, 5), cache)
    require(len(cache.calls) == 1, f"cache.extend is called {len(cache.calls)} times, not once")
    layer, k, v = cache.calls[0]
    require(layer == 3, f"cache.extend is given layer {layer!r}, expected 3, the one passed in")
    for part, name in ((k, "k"), (v, "v")):
        require(list(part.shape) == [2, 2, 2, 4], f"cache.extend is given {name} of shape "
                f"{list(part.shape)}, expected [B, H, T, K] = [2, 2, 2, 4]")


@claim("model.py", "Attention.forward")
def a_gradient_reaches_both_linear_maps(m):
    module = attention(m)
    out = module(table(dice("x"), 2, 3, 8), staircase(3, 3))
    require_gradient(out.square(), module.c_attn.weight, module.c_proj.weight)


# --- next_tokens ---------------------------------------------------------------------------------

LOGITS = [1.5, 0.0, -1.0, 0.7, -0.4]
DRAWS = 20_000


def draw(m, n=DRAWS, seed=1, logits=LOGITS, **how):
    """n tokens drawn from equal rows, as numbers."""
    rng = torch.Generator().manual_seed(seed + dice("draws").randrange(10**6))
    tokens = m.next_tokens(torch.tensor([logits]).repeat(n, 1), generator=rng, **how)
    plain(tokens)
    require(list(tokens.shape) == [n],
            f"one token for each row is expected, shape [{n}]; yours is {list(tokens.shape)}")
    return tokens.tolist()


def check_frequencies(m, right, mistakes=(), **how):
    """The frequencies must be `right` within the noise of DRAWS samples."""
    tokens = draw(m, **how)
    share = [tokens.count(v) / DRAWS for v in range(len(right))]
    apart = lambda p: sum(abs(a - b) for a, b in zip(share, p)) / 2
    mistakes = dict(mistakes) | {
        "this is always the likeliest token: greedy, not a sample": [1.0, 0, 0, 0, 0],
        "all tokens are equally likely: the logits are ignored": [0.2] * 5,
        "softmax was applied twice": softmax(right)}
    if apart(right) > 0.02:
        rare = any(s == 0 < p for s, p in zip(share, right))
        near = [words for words, p in mistakes.items() if apart(p) < 0.02] + [
            "rare tokens never come: the distribution is cut off (top-k, top-p)"] * rare
        raise Broken((near[0] if near else "the frequencies of the tokens are not right") + ": "
                     + ", ".join(f"{s:.2f}" for s in share) + ", expected "
                     + ", ".join(f"{p:.2f}" for p in right))


def softmax(logits, temperature=1.0):
    powers = [math.exp(z / temperature) for z in logits]
    return [p / sum(powers) for p in powers]


@claim("sample.py", "next_tokens")
def tokens_come_as_often_as_the_softmax_says(m):
    check_frequencies(m, softmax(LOGITS), {
        "the unlikely tokens come most often: the sign is wrong": softmax([-z for z in LOGITS])})


@claim("sample.py", "next_tokens")
def temperature_divides_the_logits_and_zero_is_greedy(m):
    for temperature in (2.0, 0.5):
        check_frequencies(m, softmax(LOGITS, temperature), {
            "the temperature multiplies the logits; divide": softmax(LOGITS, 1 / temperature),
            "the temperature changes nothing: divide the logits, before the softmax":
                softmax(LOGITS)}, temperature=temperature)
    rows = table(dice("greedy"), 6, 5)
    try:
        got = m.next_tokens(rows, temperature=0)
    except (ZeroDivisionError, RuntimeError) as error:
        raise Broken(f"temperature 0 ends in {type(error).__name__}: do not divide by it, take the "
                     f"likeliest token") from None
    expect(got, [row.index(max(row)) for row in rows.tolist()], {
        "temperature 0 always gives token 0: logits divided by 0 are infinite": [0] * 6},
        "at temperature 0 the token")


@claim("sample.py", "next_tokens")
def top_k_keeps_the_k_likeliest(m):
    p = softmax(LOGITS)
    keep = lambda kept: [x * (v in kept) / sum(p[u] for u in kept) for v, x in enumerate(p)]
    check_frequencies(m, keep((0, 3)), {
        "top_k changes nothing": p, "top_k keeps the unlikeliest tokens": keep((2, 4)),
        "top_k keeps one token too many": keep((0, 1, 3)),
        "tokens beyond the k likeliest keep a logit of 0; it must be −inf":
            softmax([1.5, 0, 0, 0.7, 0])}, top_k=2)
    try:
        draw(m, n=20, top_k=9)
    except (RuntimeError, IndexError) as error:
        raise Broken(f"a top_k larger than the vocabulary keeps all of it; yours ends in "
                     f"{type(error).__name__}") from None


@claim("sample.py", "next_tokens")
def impossible_tokens_never_come_and_rows_are_independent(m):
    come = set(draw(m, logits=[-math.inf, 0.3, -math.inf, 0.2, -math.inf]))
    require(come <= {1, 3}, f"token {min(come - {1, 3}, default=0)} came, although its logit is "
            f"−inf")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = draw(m, n=200), draw(m, n=200), draw(m, n=200, seed=2)
    require(len(set(one)) > 1, "all rows get the same token: draw one number for each row")
    require(one == again, "two calls with equally seeded generators differ: pass `generator` on")
    require(one != other, "another seed gives the same tokens: draw from `generator`")
    require(torch.equal(before, torch.random.get_rng_state()),
            "torch's global generator was used: pass `generator` on")
    expect(m.next_tokens(torch.eye(5)[[3, 1, 4]] * 90), [3, 1, 4], what="a near-certain token")
