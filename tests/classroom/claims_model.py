"""Claims about model.py and sample.py: the mask, attention, the sampling of a token."""
import itertools
import math

import torch
import torch.nn.functional as F

from classroom.checks import (Broken, alike, claim, dice, expect, gradients, require,
                              require_gradient, require_tensor, table)

# --- causal_mask ---------------------------------------------------------------------------------


def check_mask(m, query_BT, key_BC):
    got = m.causal_mask(torch.tensor(query_BT), torch.tensor(key_BC))
    require_tensor(got)
    B, T, C = len(query_BT), len(query_BT[0]), len(key_BC[0])
    require(not (list(got.shape) == [B, C, T] and T != C), f"the last two axes are exchanged: "
            f"{list(got.shape)} is [B, C, T], expected [B, T, C]")
    require(not bool((got == -math.inf).any()), "this is a mask to be added, with −inf in it; True "
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


def split(qkv_BTE, order="qkv"):
    """c_attn's output as q, k, v, [B, H, T, K] each; another order is a mistake."""
    parts = dict(zip(order, qkv_BTE.split(8, dim=2)))
    return [parts[name].unflatten(2, (2, 4)).transpose(1, 2) for name in "qkv"]


def weigh(score, visible_B1TC, hidden=-math.inf, axis=3):
    return score.masked_fill(~visible_B1TC, hidden).softmax(axis)


def join(y_BHTK):
    return y_BHTK.transpose(1, 2).flatten(2)


def attend(module, x_BTD, visible_BTC, old=None, split=split, root=2.0, weigh=weigh, join=join):
    """Attention step by step; other steps than those above make the known mistakes."""
    q, k, v = split(F.linear(x_BTD, module.c_attn.weight, module.c_attn.bias))
    if old:
        k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
    weight = weigh(q @ k.transpose(2, 3) / root, visible_BTC[:, None])
    return F.linear(join(weight @ v), module.c_proj.weight, module.c_proj.bias)


PARTS = "the three parts of c_attn(x) are q, k, v in this order, D numbers each; you took"
CUT = "the heads are cut out of time: view(B, T, H, K) first, then transpose(1, 2)"
WOVEN = "head h has the numbers h·K to (h+1)·K: view D as [H, K], not as [K, H]"
ONE = "there is one head only: split D into H heads of K"
MIXED = "the heads are mixed up: transpose(1, 2) back to [B, T, H, K] before the reshape"
cut = lambda qkv: [part.reshape(2, 2, -1, 4) for part in qkv.split(8, 2)]
woven = lambda qkv: [part.unflatten(2, (4, 2)).permute(0, 3, 1, 2) for part in qkv.split(8, 2)]
single = lambda qkv: [part[:, None] for part in qkv.split(8, 2)]
WEIGHTS = {
    "visible_BTC is ignored, so every token sees all": lambda score, seen: score.softmax(3),
    "visible_BTC is ignored, and a causal mask taken instead":
        lambda score, seen: weigh(score, torch.ones_like(seen).tril()),
    "the mask is inverted: True means visible":
        lambda score, seen: weigh(score, ~seen).nan_to_num(0.0),
    "the mask is inverted, so that some rows see nothing": lambda score, seen: weigh(score, ~seen),
    "each head gets the mask of a row: scores are [B, H, T, C], so write visible_BTC[:, None]":
        lambda score, seen: weigh(score, seen.transpose(0, 1)),
    "all rows get the mask of the first row": lambda score, seen: weigh(score, seen[:1]),
    "a True added to a score hides nothing: put −inf where visible_BTC is False":
        lambda score, seen: (score + seen).softmax(3),
    "0 · (−∞) is NaN: put −inf there with masked_fill": lambda score, seen: score * math.nan,
    "the mask must come before the softmax: your weights no longer sum to 1":
        lambda score, seen: score.softmax(3) * seen,
    "the softmax is missing": lambda score, seen: score.masked_fill(~seen, -math.inf),
    "the softmax runs over the heads; it belongs over the keys, dim=3":
        lambda score, seen: weigh(score, seen, axis=1),
    "the softmax runs over the queries; it belongs over the keys, dim=3":
        lambda score, seen: weigh(score, seen, axis=2)}
WEIGHTS |= {f"a hidden score of {hidden} still gets a weight, e^{hidden}: use −inf":
            lambda score, seen, hidden=hidden: weigh(score, seen, hidden)
            for hidden in (0, -1, math.inf)}
MISTAKES = {f"{PARTS} them as {', '.join(order)}": dict(
    split=lambda qkv, order=order: split(qkv, order)) for order in itertools.permutations("qkv")}
MISTAKES |= {
    f"{PARTS} q, k, v head by head": dict(
        split=lambda qkv: qkv.unflatten(2, (2, 12)).transpose(1, 2).split(4, 3)),
    f"{PARTS} every third number": dict(
        split=lambda qkv: split(qkv.unflatten(2, (8, 3)).transpose(2, 3).flatten(2))),
    ONE: dict(split=single), f"{ONE}; and √K": dict(split=single, root=8 ** 0.5),
    CUT: dict(split=cut), WOVEN: dict(split=woven),
    f"{CUT}; likewise back": dict(split=cut, join=lambda y: y.reshape(2, -1, 8)),
    f"{WOVEN}, nor back": dict(split=woven, join=lambda y: y.permute(0, 2, 3, 1).flatten(2)),
    MIXED: dict(join=lambda y: y.reshape(2, -1, 8)),
    f"{MIXED}, not (2, 3)": dict(join=lambda y: y.transpose(2, 3).reshape(2, -1, 8))}
MISTAKES |= {words: dict(weigh=rule) for words, rule in WEIGHTS.items()}
MISTAKES |= {f"the scores are {words}; divide by √K, K = D/H": dict(root=root) for words, root in (
    ("not divided by √K", 1), ("divided by K, not by √K", 4), ("multiplied by √K", 0.5),
    ("divided by √D", 8 ** 0.5), ("divided by √H", 2 ** 0.5))}


def check_attention(m, visible_BTC):
    module, x_BTD = attention(m), table(dice("x"), 2, visible_BTC.shape[1], 8)
    by_hand = lambda **how: attend(module, x_BTD, visible_BTC, **how)
    right, (weight, bias) = by_hand(), (module.c_proj.weight, module.c_proj.bias)
    expect(module(x_BTD, visible_BTC), right, {
        "c_proj is missing at the end": torch.linalg.solve(weight, (right - bias).mT).mT,
        "x is added; that is done in Block": right + x_BTD,
        **{words: by_hand(**how) for words, how in MISTAKES.items()}}, "the output")


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
    visible_BTC[0, 3, 1], visible_BTC[1, 3, 1] = False, True  # nor one for all rows
    check_attention(m, visible_BTC)


class PlainCache:
    """Stands for a KVCache that holds three tokens, and checks what `extend` is given."""
    def __init__(self, k_BHTK, v_BHTK):
        self.new, self.layers = (k_BHTK, v_BHTK), []
        self.old = table(dice("k"), 2, 2, 3, 4), table(dice("v"), 2, 2, 3, 4)

    def __len__(self):
        return 0  # as a KVCache has that is given for the first time: `if cache:` is false

    def extend(self, layer, k_BHTK, v_BHTK):
        self.layers.append(layer)
        for got, right, other, name in ((k_BHTK, *self.new, "k"), (v_BHTK, *self.new[::-1], "v")):
            expect(got, right, {"cache.extend is given k and v in the wrong order": other},
                   f"the {name} that cache.extend is given, [B, H, T, K],")
        return tuple(torch.cat([old, new], 2) for old, new in zip(self.old, (k_BHTK, v_BHTK)))


@claim("model.py", "Attention.forward")
def keys_and_values_read_before_count_too(m):
    module, x_BTD, visible_BTC = attention(m), table(dice("x"), 2, 2, 8), staircase(2, 5)
    cache = PlainCache(*split(module.c_attn(x_BTD))[1:])
    try:
        got = module(x_BTD, visible_BTC, cache, 3)
    except RuntimeError as error:
        require(cache.layers or "size" not in str(error), "cache.extend is never called, so the "
                "old keys and values are missing (an empty cache is false: write `is not None`)")
        raise
    expect(got, attend(module, x_BTD, visible_BTC, cache.old), {
        "the keys and values that cache.extend returns are not used":
            attend(module, x_BTD, visible_BTC[:, :, 3:])}, "with a cache the output")
    require(cache.layers == [3], f"cache.extend is called with the layers {cache.layers}, expected "
            f"one call, with the layer passed in, 3")


@claim("model.py", "Attention.forward")
def a_gradient_reaches_both_linear_maps(m):
    module, x_BTD, visible_BTC = attention(m), table(dice("x"), 2, 3, 8), staircase(3, 3)
    both = module.c_attn.weight, module.c_proj.weight
    got, right = module(x_BTD, visible_BTC), attend(module, x_BTD, visible_BTC)
    found = require_gradient(got.square() if torch.is_tensor(got) else got, *both)
    if alike(got, right):
        expect(found[0], gradients(right.square(), *both)[0], what="a part of the way was detached "
               "(the softmax, say): the gradient of c_attn")


# --- next_tokens ---------------------------------------------------------------------------------

LOGITS = [1.5, 0.0, -1.0, 0.7, -0.4]
DRAWS = 20_000


def next_tokens(m, logits_BV, **how):
    try:
        tokens = m.next_tokens(logits_BV, **how)
    except RuntimeError as error:
        require("probability tensor" not in str(error), "torch.multinomial was given numbers that "
                "are no probabilities: the softmax comes first, along each row (dim=1)")
        raise
    require_tensor(tokens)
    shape = [len(logits_BV)]
    require(list(tokens.shape) == shape,
            f"one token for each row is expected, shape {shape}; yours is {list(tokens.shape)}")
    require(not tokens.is_floating_point(), f"tokens are whole numbers; yours are {tokens.dtype}")
    return tokens.tolist()


def draw(m, n=DRAWS, seed=1, logits=LOGITS, **how):
    """n tokens drawn from equal rows, as numbers."""
    rng = torch.Generator().manual_seed(seed + dice("draws").randrange(10**6))
    return next_tokens(m, torch.tensor([logits]).repeat(n, 1), generator=rng, **how)


def check_frequencies(m, right, mistakes=(), **how):
    """The frequencies must be `right` within the noise of DRAWS samples."""
    tokens = draw(m, **how)
    share = [tokens.count(v) / DRAWS for v in range(len(right))]
    apart = lambda p: sum(abs(a - b) for a, b in zip(share, p)) / 2
    mistakes = dict(mistakes) | {
        "this is always the likeliest token: greedy, or one number drawn for all rows":
            [1.0, 0, 0, 0, 0],
        "all tokens are equally likely: the logits are ignored, or the softmax runs over the rows":
            [0.2] * 5,
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
        got = next_tokens(m, rows, temperature=0)
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
        "top_k keeps one token too few": keep((0,)),
        "these are places among the k likeliest; the tokens themselves are asked for":
            [*sorted(softmax([1.5, 0.7]))[::-1], 0, 0, 0],
        "tokens beyond the k likeliest keep a logit of 0; it must be −inf":
            softmax([1.5, 0, 0, 0.7, 0])}, top_k=2)
    try:
        draw(m, n=20, top_k=9)
    except (RuntimeError, IndexError) as error:
        raise Broken(f"a top_k larger than the vocabulary keeps all of it; yours ends in "
                     f"{type(error).__name__}") from None
    rows = table(dice("rows of top_k"), 6, 5)
    expect(next_tokens(m, rows, top_k=1), rows.argmax(1), what="each row has its own k likeliest: "
           "with top_k=1 the token")


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
    expect(next_tokens(m, torch.eye(5)[[3, 1, 4]] * 90), [3, 1, 4], {
        "all rows are drawn from the first one's logits": [3] * 3}, "a near-certain token")
    draw(m, n=1)
