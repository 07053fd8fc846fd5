"""Claims about model.py and sample.py: the mask, attention, the cache, the sampling of a token."""
import math

import torch

from classroom.checks import (TOLIST, Broken, claim, dice, expect, flat, plain, require,
                              require_gradient, table, tensor)

# --- causal_mask ---------------------------------------------------------------------------------

MASK = "model.causal_mask"


def seen(query_BT, key_BC, rule):
    """What a rule on (position of the query, position of the key) makes visible."""
    return [[[rule(q, k) for k in keys] for q in queries]
            for queries, keys in zip(query_BT, key_BC)]


def check_mask(m, query_BT, key_BC, **more):
    got = m.causal_mask(torch.tensor(query_BT), torch.tensor(key_BC))
    B, T, C = len(query_BT), len(query_BT[0]), len(key_BC[0])
    values, shape = plain(got)
    if shape == [B, C, T] and T != C:
        raise Broken(f"the last two axes are exchanged: {shape} is [B, C, T], expected [B, T, C]")
    if got.dtype != torch.bool and -math.inf in flat(values):
        raise Broken("this is a mask to be added, with −inf in it; True and False are expected")
    require(got.dtype == torch.bool, f"the mask holds {got.dtype}; torch.bool is expected")
    right = seen(query_BT, key_BC, lambda q, k: not k > q)
    expect(values, right, {
        "a token does not see itself: a key at the query's own position is visible too":
            seen(query_BT, key_BC, lambda q, k: k < q),
        "True and False are exchanged: True means visible": seen(
            query_BT, key_BC, lambda q, k: k > q),
        "each query sees what comes after it: query and key are exchanged": seen(
            query_BT, key_BC, lambda q, k: k >= q),
        "you compare indices; the arguments are positions, and query 0 may stand at position 4":
            [[[c <= t for c in range(C)] for t in range(T)]] * B,
        "you compare indices, counted from the end; the arguments are positions":
            [[[c <= t + C - T for c in range(C)] for t in range(T)]] * B,
        "every query sees every key": seen(query_BT, key_BC, lambda q, k: True),
        "all rows get the mask of the first row": right[:1] * B} | more, "the mask")


@claim(MASK)
def a_query_sees_its_own_position_and_those_before(m):
    check_mask(m, [[0, 1, 2, 3]], [[0, 1, 2, 3]])


@claim(MASK)
def the_mask_has_a_row_for_each_query_and_a_column_for_each_key(m):
    check_mask(m, [[3, 4]], [[0, 1, 2, 3, 4]])


@claim(MASK)
def positions_decide_not_indices(m):
    """With a cache a query stands far right; padding stands at a position that no query reaches."""
    check_mask(m, [[4, 5, 6]], [[0, 16, 1, 4, 5]])


@claim(MASK)
def each_row_of_the_batch_has_its_own_mask(m):
    rng = dice("rows")
    query_BT = [[2, 5, 7], [0, 1, 2]]
    check_mask(m, query_BT, [rng.sample(range(8), 4), rng.sample(range(8), 4)])
    check_mask(m, query_BT, [[0, 1, 2, 7], [0, 5, 6, 7]])


# --- Attention.forward ---------------------------------------------------------------------------

ATTENTION = "model.Attention.forward"


class PlainCache:
    """Stands for a KVCache: `extend` puts some old keys and values before the new ones."""
    def __init__(self, visible_BTC, old_k_BHCK=None, old_v_BHCK=None, turned=False):
        self.visible_BTC, self.old, self.calls = visible_BTC, (old_k_BHCK, old_v_BHCK), []
        self.turned = turned

    def extend(self, layer, k_BHTK, v_BHTK):
        self.calls.append((layer, k_BHTK, v_BHTK))
        if self.old[0] is None:
            return k_BHTK, v_BHTK
        return tuple(torch.cat(pair, 2) for pair in zip(self.old, (k_BHTK, v_BHTK)))

    def in_rows(self, x_BTD):
        self.calls.append("in_rows")
        return x_BTD.flip(1) if self.turned else x_BTD

    def as_given(self, y_BTD):
        self.calls.append("as_given")
        return y_BTD.flip(1) if self.turned else y_BTD


def attention(m, D=8, H=2, seed="weights"):
    """The attempt's Attention with large random weights, biases too."""
    config = m.GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=H, n_embd=D)
    module, rng = m.Attention(config), dice(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(tensor(table(rng, *p.shape)))
    return module


def attend(module, x_BTD, visible, old=None, H=2, root=None, order="qkv", hidden_weight=0.0,
           over_queries=False, mix=False, project=True, blind=math.nan):
    """Attention by loops over plain numbers; the arguments after H make the known mistakes."""
    w, b = TOLIST(module.c_attn.weight.detach()), TOLIST(module.c_attn.bias.detach())
    pw, pb = TOLIST(module.c_proj.weight.detach()), TOLIST(module.c_proj.bias.detach())
    D = len(x_BTD[0][0])
    K = D // H
    line = lambda row, x, bias: sum(p * q for p, q in zip(row, x)) + bias
    out = []
    for n, x_TD in enumerate(x_BTD):
        every = [[line(row, x, bias) for row, bias in zip(w, b)] for x in x_TD]
        thirds = {name: [e[i * D:(i + 1) * D] for e in every] for i, name in enumerate(order)}
        heads = []
        for h in range(H):
            q, k, v = ([t[h * K:(h + 1) * K] for t in thirds[name]] for name in "qkv")
            if old:
                k, v = old[0][n][h] + k, old[1][n][h] + v
            score = [[line(a, c, 0) / (root or math.sqrt(K)) for c in k] for a in q]
            may = visible[n]
            power = [[math.exp(s) if ok else hidden_weight for s, ok in zip(row, oks)]
                     for row, oks in zip(score, may)]
            if hidden_weight == "after":  # masked after the softmax: what is left sums to less
                power = [[math.exp(s) for s in row] for row in score]
            sums = [[sum(column) for column in zip(*power)] if over_queries else [sum(row)] * len(k)
                    for row in power]
            weight = [[p / s if s else blind for p, s in zip(*pair)] for pair in zip(power, sums)]
            if hidden_weight == "after":
                weight = [[x * ok for x, ok in zip(*pair)] for pair in zip(weight, may)]
            heads.append([[sum(a * c[d] for a, c in zip(row, v)) for d in range(K)]
                          for row in weight])
        y = [[number for head in heads for number in head[t]] for t in range(len(x_TD))]
        if mix:  # [H, T, K] read as [T, D] without transposing
            numbers = flat(heads)
            y = [numbers[t * D:(t + 1) * D] for t in range(len(x_TD))]
        out.append([[line(row, t, bias) for row, bias in zip(pw, pb)] for t in y] if project else y)
    return out


def check_attention(m, visible, old=None, turned=False, seed="x"):
    module, T = attention(m), len(visible[0])
    x_BTD = table(dice(seed), len(visible), T, 8)
    old_tensors = [tensor(part) for part in old] if old else [None, None]
    cache = PlainCache(torch.tensor(visible), *old_tensors, turned=turned)
    got = module(tensor(x_BTD), cache, 3)
    turn = lambda x: [row[::-1] for row in x] if turned else x
    by_hand = lambda **how: turn(attend(module, turn(x_BTD), how.pop("may", visible), old, **how))
    hidden = [[[not ok for ok in row] for row in rows] for rows in visible]
    everything = [[[True for ok in row] for row in rows] for rows in visible]
    expect(got, by_hand(), [
        ("the scores are not divided by √K", by_hand(root=1.0)),
        ("the scores are divided by √D; a head has K = D/H numbers: √K", by_hand(root=8 ** 0.5)),
        ("the scores are divided by K, not by √K", by_hand(root=4.0)),
        ("nothing is masked: where visible is False the score is −inf", by_hand(may=everything)),
        ("the mask is inverted: True in visible_BTC means that a token may be seen",
         by_hand(may=hidden)),
        ("the mask is inverted: True in visible_BTC means that a token may be seen",
         by_hand(may=hidden, blind=1 / len(visible[0][0]))),
        ("the mask must come before the softmax: your weights no longer sum to 1",
         by_hand(hidden_weight="after")),
        ("a hidden score of 0 still gets a weight, e^0: use −inf", by_hand(hidden_weight=1.0)),
        ("the softmax runs over the queries; it belongs over the keys, dim=3",
         by_hand(over_queries=True)),
        ("the heads are mixed up: transpose back to [B, T, H, K] before the reshape",
         by_hand(mix=True)),
        ("c_proj is missing at the end", by_hand(project=False)),
        *((f"the three parts of c_attn(x) are q, k, v in this order; you took them as "
           f"{', '.join(order)}", by_hand(order=order)) for order in ("kqv", "vkq", "qvk", "kvq")),
        ("the keys and values that cache.extend returns are not used", turn(attend(
            module, turn(x_BTD), [[row[-T:] for row in rows] for rows in visible]))),
    ], "the output")


def staircase(T, C):
    return [[c <= t + C - T for c in range(C)] for t in range(T)]


@claim(ATTENTION)
def output_is_the_mean_of_values_weighted_by_softmax_of_q_k_over_root_k(m):
    check_attention(m, [staircase(3, 3)] * 2)


@claim(ATTENTION)
def what_is_not_visible_has_no_weight(m):
    rng = dice("visible")
    visible = [[[c == t or (c != 3 - t and rng.random() < 0.5) for c in range(4)] for t in range(4)]
               for _ in "ab"]
    check_attention(m, visible, seed="other x")


@claim(ATTENTION)
def keys_and_values_read_before_count_too(m):
    """`extend` is told the layer, and what it returns is used."""
    rng = dice("old")
    old = table(rng, 1, 2, 3, 4), table(rng, 1, 2, 3, 4)
    check_attention(m, [staircase(2, 5)], old)


@claim(ATTENTION)
def the_cache_is_given_new_keys_and_values_head_by_head(m):
    module, x_BTD = attention(m), tensor(table(dice("x"), 2, 3, 8))
    cache = PlainCache(torch.tensor([staircase(3, 3)] * 2))
    module(x_BTD, cache, 3)
    calls = [call for call in cache.calls if isinstance(call, tuple)]
    require(len(calls) == 1, f"cache.extend is called {len(calls)} times, expected once")
    layer, k, v = calls[0]
    require(layer == 3, f"cache.extend is given layer {layer!r}, expected 3, the one passed in")
    for part, name in ((k, "k"), (v, "v")):
        shape = plain(part, name)[1]
        require(shape == [2, 2, 3, 4], f"cache.extend is given {name} of shape {shape}, expected "
                f"[B, H, T, K] = [2, 2, 3, 4]: split into heads, and transpose time behind heads")


@claim(ATTENTION)
def the_cache_arranges_what_is_mixed(m):
    """in_rows is applied to c_attn(x), as_given to what c_proj reads; here both turn time round."""
    module = attention(m)
    cache = PlainCache(torch.tensor([staircase(3, 3)]))
    module(tensor(table(dice("x"), 1, 3, 8)), cache, 0)
    for name in ("in_rows", "as_given"):
        require(name in cache.calls, f"cache.{name} is not called: a cache may arrange tokens in "
                f"rows of its own")
    check_attention(m, [staircase(3, 3)], turned=True)


@claim(ATTENTION)
def a_gradient_reaches_the_weights(m):
    module = attention(m)
    out = module(tensor(table(dice("x"), 1, 3, 8)), PlainCache(torch.tensor([staircase(3, 3)])), 0)
    require_gradient(out.square(), module.c_attn.weight, module.c_proj.weight)


# --- KVCache.extend ------------------------------------------------------------------------------

EXTEND = "model.KVCache.extend"


def parts(rng, *times):
    """Keys and values [B=2, H=3, T, K=2] for each number of tokens in `times`."""
    return [(table(rng, 2, 3, T, 2), table(rng, 2, 3, T, 2)) for T in times]


def joined(pieces):
    """[B, H, C, K] from pieces [B, H, T, K], one after another in time."""
    return [[sum((piece[b][h] for piece in pieces), []) for h in range(3)] for b in range(2)]


def check_extend(m, calls):
    """Each call is (layer, k, v); after it, all of its layer so far are expected."""
    cache, before = m.KVCache(), {}
    for layer, k, v in calls:
        got = cache.extend(layer, tensor(k), tensor(v))
        require(type(got) is tuple and len(got) == 2,
                "extend returns the pair (all keys, all values)")
        pairs = before.setdefault(layer, [])
        pairs.append((k, v))
        ks, vs = ([pair[i] for pair in pairs] for i in (0, 1))
        others = [pair for pairs in before.values() for pair in pairs]
        for part, right, other, name, i in ((got[0], ks, vs, "k", 0), (got[1], vs, ks, "v", 1)):
            expect(part, joined(right), [
                ("only the new ones come back: join them with those kept", right[-1]),
                ("the new ones come before the old ones", joined([right[-1], *right[:-1]])),
                ("the new ones come before the old ones", joined(right[::-1])),
                ("keys and values are exchanged", joined(other)),
                ("what an earlier call joined was not kept: self.layers[layer] must hold the "
                 "joined pair", joined(right[-2:])),
                ("only the first call is kept: self.layers[layer] must hold the joined pair",
                 joined([right[0], right[-1]])),
                ("the layers share one memory: keep a pair for each layer",
                 joined([pair[i] for pair in others])),
                ("the layers share one memory: keep a pair for each layer",
                 joined([pair[i] for pair in others[-2:]])),
                ("they are joined along the heads; time is axis 2",
                 [sum((piece[b] for piece in right), []) for b in range(2)]),
                ("they are joined along the batch; time is axis 2", sum(right, [])),
                ("they are joined within the head; time is axis 2",
                 [[[sum(rows, []) for rows in zip(*(piece[b][h] for piece in right))]
                   for h in range(3)] for b in range(2)]),
            ], f"the returned {name}")


@claim(EXTEND)
def the_first_keys_and_values_come_back_as_they_are(m):
    (k, v), = parts(dice("first"), 2)
    check_extend(m, [(0, k, v)])


@claim(EXTEND)
def new_ones_follow_the_old_ones_in_time(m):
    rng = dice("second")
    check_extend(m, [(0, *pair) for pair in parts(rng, 2, 2)])
    check_extend(m, [(0, *pair) for pair in parts(rng, 3, 1)])


@claim(EXTEND)
def what_was_joined_is_kept_for_the_next_call(m):
    check_extend(m, [(0, *pair) for pair in parts(dice("third"), 2, 1, 1, 2)])


@claim(EXTEND)
def each_layer_has_its_own_keys_and_values(m):
    a, b, c, d = parts(dice("layers"), 2, 2, 1, 1)
    check_extend(m, [(0, *a), (1, *b), (0, *c), (1, *d)])


@claim(EXTEND)
def self_layers_holds_the_joined_pair(m):
    """`rows`, which repeats or drops rows of a cache, reads it there."""
    one, two = parts(dice("kept"), 2, 1)
    cache = m.KVCache()
    for k, v in (one, two):
        cache.extend(5, tensor(k), tensor(v))
    require(isinstance(cache.layers, dict) and list(cache.layers) == [5],
            "self.layers should map the layer, here 5, to its pair (k, v)")
    kept = cache.layers[5]
    require(isinstance(kept, (tuple, list)) and len(kept) == 2,
            "self.layers[layer] should be the pair (all keys, all values)")
    expect(kept[0], joined([one[0], two[0]]), what="the kept k")
    expect(kept[1], joined([one[1], two[1]]), what="the kept v")


# --- next_tokens ---------------------------------------------------------------------------------

NEXT = "sample.next_tokens"
LOGITS = (1.5, 0.0, -1.0, 0.7, -0.4)
DRAWS = 20_000


def softmax(logits, temperature=1.0):
    powers = [math.exp(z / temperature) for z in logits]
    return [p / sum(powers) for p in powers]


def draw(m, logits=LOGITS, n=DRAWS, seed=1, **how):
    """n tokens drawn from equal rows, as numbers."""
    rng = torch.Generator().manual_seed(seed + dice("draws").randrange(10**6))
    got = m.next_tokens(tensor([list(logits)] * n), generator=rng, **how)
    tokens, shape = plain(got)
    require(shape == [n], f"one token for each row is expected, shape [{n}]; yours is {shape}")
    require(got.dtype in (torch.int64, torch.int32), f"tokens are whole numbers (torch.int64), not "
            f"{got.dtype}")
    return tokens


def check_frequencies(m, right, mistakes, **how):
    """The frequencies must be `right` within the noise of DRAWS samples."""
    tokens = draw(m, **how)
    share = [tokens.count(v) / DRAWS for v in range(len(right))]
    apart = lambda p: sum(abs(a - b) for a, b in zip(share, p)) / 2
    if apart(right) < 0.02:
        return
    near = [words for words, p in mistakes.items() if apart(p) < 0.02 < sum(
        abs(a - b) for a, b in zip(p, right))]
    raise Broken((near[0] if near else "the frequencies of the tokens are not right") + ": "
                 + ", ".join(f"{s:.2f}" for s in share) + ", expected "
                 + ", ".join(f"{p:.2f}" for p in right))


def one_hot(k):
    return [float(k == v) for v in range(len(LOGITS))]


ALWAYS = {"this is always the likeliest token: greedy, not a sample": one_hot(0),
          "all tokens are equally likely: the logits are ignored": [0.2] * 5,
          "always the same token, the last": one_hot(4)}


@claim(NEXT)
def tokens_come_as_often_as_the_softmax_says(m):
    p = softmax(LOGITS)
    check_frequencies(m, p, ALWAYS | {
        "softmax was applied twice": softmax(p),
        "the unlikely tokens come most often: the sign is wrong": softmax([-z for z in LOGITS])})


@claim(NEXT)
def temperature_divides_the_logits(m):
    for temperature in (2.0, 0.5):
        check_frequencies(m, softmax(LOGITS, temperature), ALWAYS | {
            "the temperature multiplies the logits; divide": softmax(LOGITS, 1 / temperature),
            "the temperature changes nothing: divide the logits, before the softmax":
                softmax(LOGITS),
            "softmax was applied twice": softmax(softmax(LOGITS, temperature)),
            "the temperature divides probabilities, not logits":
                softmax([p / temperature for p in softmax(LOGITS)]),
        }, temperature=temperature)


@claim(NEXT)
def temperature_zero_takes_the_likeliest(m):
    rows = table(dice("greedy"), 6, 5)
    try:
        got = m.next_tokens(tensor(rows), temperature=0)
    except (ZeroDivisionError, RuntimeError) as error:
        raise Broken(f"temperature 0 ends in {type(error).__name__}: {error}; do not divide by "
                     f"it, take the likeliest token") from None
    expect(got, [row.index(max(row)) for row in rows], {
        "temperature 0 takes the unlikeliest token": [row.index(min(row)) for row in rows],
        "temperature 0 always gives token 0: logits divided by 0 are infinite": [0] * 6,
    }, "the tokens at temperature 0")


@claim(NEXT)
def top_k_keeps_the_k_likeliest(m):
    p = softmax(LOGITS)
    keep = lambda kept: [x * (v in kept) / sum(p[u] for u in kept) for v, x in enumerate(p)]
    check_frequencies(m, keep((0, 3)), ALWAYS | {
        "top_k changes nothing": p, "top_k keeps the unlikeliest tokens": keep((2, 4)),
        "top_k keeps one token too many": keep((0, 1, 3)),
        "top_k keeps the first k of the vocabulary": keep((0, 1)),
        "tokens beyond the k likeliest keep a logit of 0; it must be −inf":
            softmax([1.5, 0, 0, 0.7, 0])}, top_k=2)
    require(set(draw(m, n=400, top_k=1)) == {0}, "top_k=1 must always take the likeliest token")
    try:
        draw(m, n=20, top_k=9)
    except (RuntimeError, IndexError) as error:
        raise Broken(f"a top_k larger than the vocabulary keeps all of it; yours ends in "
                     f"{type(error).__name__}: {error}") from None


@claim(NEXT)
def a_token_of_probability_zero_never_comes(m):
    logits = (-math.inf, 0.3, -math.inf, 0.2, -math.inf)
    come = set(draw(m, logits))
    require(come <= {1, 3}, f"token {min(come - {1, 3}, default=0)} came, although its logit "
            f"is −inf")


@claim(NEXT)
def rows_are_drawn_independently_and_from_the_generator(m):
    one, again, other = draw(m, n=200), draw(m, n=200), draw(m, n=200, seed=2)
    require(len(set(one)) > 1, "all rows get the same token: draw one number for each row, not "
            "one for all")
    require(one == again, "two calls with equally seeded generators differ: pass `generator` on")
    require(one != other, "another seed gives the same tokens: the seed must come from `generator`")
    rows = [[9.0 * (v == t) for v in range(5)] for t in (3, 1, 4)]
    got = plain(m.next_tokens(tensor(rows), generator=torch.Generator().manual_seed(1)))[0]
    expect(got, [3, 1, 4], what="with one near-certain token a row, what comes")
    torch.manual_seed(5)
    draw(m, n=5)
    mine = torch.rand(1).item()
    torch.manual_seed(5)
    require(mine == torch.rand(1).item(), "torch's global generator was used, or seeded: draw "
            "from `generator` alone")
