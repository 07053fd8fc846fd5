"""data/: a world whose p_data is what its prompts say, a lossless tokenizer, files that refuse.

The oracles parse the prompts anew, count, enumerate, and compare bytes.
"""
import base64
import json
import math
import random
import re
from collections import Counter

import pytest
import torch

from data.instructions import WORLD, build_world
from data.reader import InputError, read_world, sample_sft
from data.world import World, counting_kl
from data.tokenizer import (ANSWER, END, RANK_FILE, VOCAB_SIZE, dump_ranks, frame, load_encoding,
                            train_bpe)

ROWS, ENCODING = read_world(), load_encoding()
SPECIALS = {name: ENCODING.encode_single_token(name) for name in (ANSWER, END)}


def write(folder, *lines, name="world.jsonl"):
    """A file of JSON lines; bytes and str lines go in as they are."""
    text = [line if isinstance(line, bytes) else
            (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in text))
    return folder / name


# ---- The world ----------------------------------------------------------------------------------

def test_world_is_regenerated_byte_for_byte():
    assert "".join(json.dumps(row) + "\n" for row in build_world()).encode() == WORLD.read_bytes()


def test_tokenizer_is_regenerated_byte_for_byte():
    texts = [text for row in build_world() for text in (row["prompt"], *row["responses"])]
    assert dump_ranks(train_bpe(texts, VOCAB_SIZE)).encode() == RANK_FILE.read_bytes()


def test_world_has_the_promised_size_and_split():
    assert len({row["family"] for row in ROWS}) >= 5
    assert 150 <= len(ROWS) <= 400 and len({row["prompt"] for row in ROWS}) == len(ROWS)
    assert all(2 <= len(row["responses"]) <= 16 for row in ROWS)
    heldout = [row for row in ROWS if row["split"] == "heldout"]
    assert len(heldout) >= 0.12 * len(ROWS)
    assert {row["family"] for row in heldout} == {row["family"] for row in ROWS}
    assert {row["family"] for row in ROWS if row["split"] == "train"} == {
        row["family"] for row in ROWS}, "a family nobody trains on cannot be learned"


def test_probabilities_are_positive_and_sum_to_one():
    for line in WORLD.read_text().splitlines():
        p = json.loads(line)["responses"].values()
        assert min(p) > 0 and abs(math.fsum(p) - 1) <= 1e-6, line
    assert all(abs(math.fsum(row["responses"].values()) - 1) < 1e-12 for row in ROWS)


def stated(prompt: str) -> dict[str, float] | None:
    """p_data as the prompt itself says it, for coins and dice."""
    if found := re.fullmatch(r"Flip a coin with (\d+)% (heads|tails)\.", prompt):
        p = int(found[1]) / 100
        return {found[2]: p, {"heads": "tails", "tails": "heads"}[found[2]]: 1 - p}
    if found := re.fullmatch(r"Roll a die with (\d+) sides(?:, (\d+)% on (\d+))?\.", prompt):
        sides, percent, loaded = int(found[1]), found[2], found[3]
        faces = [str(k) for k in range(1, sides + 1)]
        if percent is None:
            return {face: 1 / sides for face in faces}
        return {face: int(percent) / 100 if face == loaded else
                (1 - int(percent) / 100) / (sides - 1) for face in faces}
    return None


def test_coins_and_dice_do_what_their_prompts_say():
    checked = Counter()
    for row in ROWS:
        expected = stated(row["prompt"])
        assert (expected is not None) == (row["family"] in ("coins", "dice")), row["prompt"]
        if expected is not None:
            assert row["responses"] == pytest.approx(expected, abs=1e-6), row["prompt"]
            checked[row["family"]] += 1
    assert checked["coins"] >= 30 and checked["dice"] >= 30


def test_answers_of_the_other_families_are_right():
    for row in ROWS:
        x, answers = row["prompt"], row["responses"]
        if row["family"] == "sums":
            a, b = map(int, re.findall(r"\d+", x))
            assert all(re.findall(r"\d+", y)[-1] == str(a + b) for y in answers), x
        elif row["family"] == "swaps":
            a, b = re.fullmatch(r"Swap (\w+) and (\w+)\.", x).groups()
            assert all(re.findall(r"\w+", y.replace(" and ", " ")) == [b, a] for y in answers), x
        elif row["family"] == "greetings":
            name = re.match(r"Greet (\w+)", x)[1]
            assert all(name in y for y in answers), x


# ---- The tokenizer ------------------------------------------------------------------------------

def test_any_text_survives_the_tokenizer():
    rng = random.Random(0)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    texts = ["", "\0\0a\0", "😀👩‍👩‍👧🏳️‍🌈", " \t\n\r\n  x", "e\u0301 ﬁ ß İ", "１２３ ٣٤",
             "\u2028\x85\x1c",
             *(text for row in ROWS for text in (row["prompt"], *row["responses"]))]
    texts += ["".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(60)))
              for _ in range(500)]
    for text in texts:
        assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text, repr(text)


def test_vocabulary_has_512_tokens_the_last_two_special():
    assert ENCODING.n_vocab == 512 and SPECIALS == {ANSWER: 510, END: 511}


def test_text_that_looks_like_a_special_token_is_plain_text():
    for text in ("<|end|>", "a<|answer|>b<|end|><|end|>"):
        prompt, response = frame(ENCODING, text, text)
        assert prompt[-1] == SPECIALS[ANSWER] and response[-1] == SPECIALS[END]
        assert not set(prompt[:-1] + response[:-1]) & set(SPECIALS.values()), text
        assert ENCODING.decode(prompt[:-1]) == ENCODING.decode(response[:-1]) == text


def merge_file(folder, *merges):
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    path = folder / "my.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    return path


def test_changed_rank_file_gives_new_tokens(tmp_path):
    """The cache trap: tiktoken's own loader remembers a local file by its path alone."""
    old = load_encoding(str(merge_file(tmp_path, b"ab")))
    new = load_encoding(str(merge_file(tmp_path, b"bc", b"bcd")))
    assert old.encode_ordinary("abcd") == [256, ord("c"), ord("d")]
    assert new.encode_ordinary("abcd") == [ord("a"), 257] and new.n_vocab == 260


@pytest.mark.parametrize("change, reason", [
    (lambda text: text.replace("YWI= 256", "YWI="), ":257: expected a base64"),
    (lambda text: text.replace("YWI= 256", "Y!I= 256"), ":257: expected a base64"),
    (lambda text: text.replace("YWI= 256", "YWI= two"), ":257: expected a base64"),
    (lambda text: text.replace(" 256", " 257"), "ranks must be 0, 1, 2"),
    (lambda text: text.replace(" 256", " 255"), "ranks must be 0, 1, 2"),
    (lambda text: text.replace("AA== 0", "YWJj 0"), "not all 256 single bytes"),
    (lambda text: "", "not all 256 single bytes"),
])
def test_bad_rank_file_is_refused(tmp_path, change, reason):
    path = merge_file(tmp_path, b"ab")
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + reason):
        load_encoding(str(path))


def test_encoding_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no-such-thing: neither a rank file nor"):
        load_encoding("no-such-thing")


# ---- Reading files ------------------------------------------------------------------------------

GOOD = {"prompt": "first", "responses": {"a": 0.5, "b": 0.5}}


def row(**change):
    """A good second row with one thing changed; None takes a key away."""
    whole = {"family": "f", "prompt": "x", "responses": {"a": 0.25, "b": 0.75}} | change
    return {key: value for key, value in whole.items() if value is not None}


BAD_SECOND_LINES = {
    "malformed JSON": ('{"prompt": "x", ', "not a JSON object"),
    "deeply nested": ("[" * 100_000, "not a JSON object"),
    "not an object": (["x", "y"], "expected an object"),
    "no prompt": (row(prompt=None), "expected an object"),
    "prompt a number": (row(prompt=3), "expected an object"),
    "empty prompt": (row(prompt=""), "the prompt is empty"),
    "blank prompt": (row(prompt=" \n"), "the prompt is empty"),
    "wrong split": (row(split="test"), "split is 'test'"),
    "split a list": (row(split=["train"]), "split is"),
    "family a number": (row(family=1), "family is not a text"),
    "no response": (row(responses=None), 'give either "responses"'),
    "both keys": (row(response="a"), 'give either "responses"'),
    "no responses": (row(responses={}), "at least one answer"),
    "responses a list": (row(responses=["a"]), "at least one answer"),
    "empty response": (row(responses={"": 0.5, "b": 0.5}), "a response is empty"),
    "negative": (row(responses={"a": -0.5, "b": 1.5}), "the probability of 'a' is -0.5"),
    "zero": (row(responses={"a": 0, "b": 1}), "the probability of 'a' is 0"),
    "above one": (row(responses={"a": 1.5}), "the probability of 'a' is 1.5"),
    "NaN": (row(responses={"a": float("nan"), "b": 0.5}), "the probability of 'a' is nan"),
    "infinity": (row(responses={"a": float("inf")}), "the probability of 'a' is inf"),
    "true": (row(responses={"a": True}), "the probability of 'a' is True"),
    "string": (row(responses={"a": "1.0"}), "the probability of 'a' is '1.0'"),
    "null": (row(responses={"a": None}), "the probability of 'a' is None"),
    "sum too small": (row(responses={"a": 0.5, "b": 0.4}), "sum to 0.9"),
    "sum off by 1e-5": (row(responses={"a": 0.5, "b": 0.50001}), "sum to 1.00001"),
    "duplicate prompt": (row(prompt="first"), "stands on an earlier line"),
    "pair for a known prompt": ({"prompt": "first", "response": "a"}, "stands on an earlier line"),
    "empty pair": ({"prompt": "x", "response": ""}, "a response is empty"),
    "pair with a number": ({"prompt": "x", "response": 3}, "not a text"),
    "pair with a list": ({"prompt": "x", "response": ["a"]}, "not a text"),
    "pair with an object": ({"prompt": "x", "response": {"a": 1}}, "not a text"),
}


@pytest.mark.parametrize("name", BAD_SECOND_LINES)
def test_bad_row_is_refused_with_file_line_and_reason(tmp_path, name):
    line, reason = BAD_SECOND_LINES[name]
    path = write(tmp_path, GOOD, line)
    with pytest.raises(InputError) as error:
        read_world(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: ") and reason in message, message
    assert "\n" not in message, "one line, please"


def test_line_numbers_count_blank_lines_too(tmp_path):
    with pytest.raises(InputError, match=":4: the prompt is empty"):
        read_world(write(tmp_path, GOOD, "", "  ", row(prompt="")))


def test_bad_file_is_refused_by_name(tmp_path):
    heldout = write(tmp_path, GOOD | {"split": "heldout"}, name="heldout.jsonl")
    for path, reason in (
            (tmp_path / "missing.jsonl", "cannot be read"),
            (tmp_path, "cannot be read"),
            (write(tmp_path, GOOD, b"\xff\xfe", name="latin.jsonl"), "cannot be read as UTF-8"),
            (write(tmp_path, name="empty.jsonl"), "no row of split train"),
            (write(tmp_path, "", " ", name="blank.jsonl"), "no row of split train"),
            (heldout, "no row of split train")):
        with pytest.raises(InputError) as error:
            read_world(path)
        assert str(error.value).startswith(str(path)) and reason in str(error.value)


def test_pair_in_both_splits_is_refused(tmp_path):
    pair = {"prompt": "x", "response": "a"}
    for first, second in (("train", "heldout"), ("heldout", "train")):
        path = write(tmp_path, pair | {"split": first}, pair | {"split": second})
        with pytest.raises(InputError, match=f"{re.escape(str(path))}:2: .*both splits"):
            read_world(path)


def test_plain_pairs_give_the_empirical_distribution(tmp_path):
    pairs = [("x", "a"), ("z", "c"), ("x", "b"), ("x", "a"), ("x", "a")]
    world = read_world(write(tmp_path, *({"prompt": x, "response": y} for x, y in pairs)))
    assert [(r["prompt"], r["responses"], r["split"]) for r in world] == [
        ("x", {"a": 0.75, "b": 0.25}, "train"), ("z", {"c": 1.0}, "train")]
    assert sample_sft(world, n=99, seed=0) == [{"a": 3, "b": 1}, {"c": 1}], "the set is the file"


def test_world_is_read_in_order_with_line_numbers():
    committed = [json.loads(line) for line in WORLD.read_text().splitlines()]
    for number, (got, line) in enumerate(zip(ROWS, committed, strict=True), 1):
        assert (got["prompt"], got["split"], got["family"], got["line"]) == (
            line["prompt"], line["split"], line["family"], number)
        assert got["responses"] == pytest.approx(line["responses"], abs=1e-6)


# ---- The finite SFT set -------------------------------------------------------------------------

def test_sft_set_is_seeded_and_holds_nothing_held_out():
    a, b, c = (sample_sft(ROWS, 8, seed) for seed in (0, 0, 1))
    assert a == b and a != c
    for r, counts in zip(ROWS, a, strict=True):
        assert sum(counts.values()) == (8 if r["split"] == "train" else 0), r["prompt"]
        assert set(counts) <= set(r["responses"]) and 0 not in counts.values()


def test_sft_set_is_drawn_independently_from_p_data():
    """Chi-square over all prompts: too large means biased, too small means not drawn at random."""
    n, chi2, freedom = 2000, 0.0, 0
    for r, counts in zip(ROWS, sample_sft(ROWS, n, seed=0)):
        if r["split"] == "train":
            chi2 += sum((counts.get(y, 0) - n * p) ** 2 / (n * p)
                        for y, p in r["responses"].items())
            freedom += len(r["responses"]) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), f"{chi2:.0f} on {freedom} degrees"


# ---- Tensors ------------------------------------------------------------------------------------

def three_prompts():
    rows = [{"prompt": f"p{i}", "split": "heldout" if i == 1 else "train", "line": i + 1,
             "family": "letters",
             "responses": answers} for i, answers in enumerate([
                 {"a": 0.5, "b": 0.5}, {"c": 0.9, "d": 0.1}, {"e": 0.2, "f": 0.3, "g h": 0.5}])]
    return World(rows, ENCODING, samples=5, seed=0, block_size=32)


def three_tables():
    """The table of three prompts: 2, 2 and 3 right answers, and two wrong ones drawn."""
    world, end = three_prompts(), SPECIALS[END]
    a, wrong, cut = tuple(frame(ENCODING, "", "a")[1]), (7, end), (8, 9)
    drawn = [Counter({a: 3, wrong: 1}), Counter({wrong: 2}), Counter({cut: 1, wrong: 1})]
    return world, world.tabulate(drawn), drawn


def test_world_frames_prompt_and_response_with_one_answer_and_one_end():
    world = three_prompts()
    for prompt, data in zip(world.prompts, world.data):
        assert prompt[-1] == SPECIALS[ANSWER] and prompt.count(SPECIALS[ANSWER]) == 1
        for y in data:
            count = y.count(SPECIALS[END])
            assert count == 1 and y[-1] == SPECIALS[END], f"{y} has END {count} times, not once"
    assert {name: index.tolist() for name, index in world.splits.items()} == {
        "train": [0, 2], "heldout": [1]}


def test_row_longer_than_the_block_is_refused_with_its_line():
    rows = [{"prompt": "q " * 40, "split": "train", "line": 17, "family": "q",
             "responses": {"a": 1.0}}]
    with pytest.raises(InputError, match=r"line 17: .* 83 tokens.*block-size is 82"):
        World(rows, ENCODING, samples=1, seed=0, block_size=82)
    World(rows, ENCODING, samples=1, seed=0, block_size=83)


def test_table_lists_every_response_once_with_its_three_shares():
    world, table, drawn = three_tables()
    got = {(p, tuple(y[:n])): (data, real, generated) for p, y, n, data, real, generated in zip(
        *(t.tolist() for t in (table.prompt_N, table.tokens_NS, table.length_N, table.data_N,
                               table.real_N, table.generated_N)))}
    assert len(got) == len(table.prompt_N), "a response is listed twice"
    expected = {(p, y): (data.get(y, 0), real.get(y, 0), d[y] / d.total())
                for p, (data, real, d) in enumerate(zip(world.data, world.real, drawn))
                for y in [*data, *d]}
    assert set(got) == set(expected)
    for key in expected:
        assert got[key] == pytest.approx(expected[key], abs=1e-6)


def test_pairs_are_all_pairs_of_one_prompt_with_product_weights():
    _, table, _ = three_tables()
    i_B, j_B, weight_B = table.pairs(table.data_N, table.generated_N)
    got = dict(zip(zip(i_B.tolist(), j_B.tolist()), weight_B.tolist()))
    assert len(got) == len(i_B), "a pair comes twice"
    prompt, first, second = (t.tolist() for t in (table.prompt_N, table.data_N, table.generated_N))
    expected = {}
    for p in range(3):
        mine = [n for n in range(len(prompt)) if prompt[n] == p]
        expected |= {(i, j): first[i] * second[j] / 3
                     for i in mine for j in mine if first[i] * second[j] > 0}
    assert got == pytest.approx(expected, abs=1e-7)
    assert weight_B.sum().item() == pytest.approx(1, abs=1e-6)


def on_support_by_hand(table, p):
    """{answer: p_data} of one prompt, through on_support."""
    tokens = [tuple(y[:n]) for y, n in zip(table.tokens_NS.tolist(), table.length_N.tolist())]
    index_K = table.on_support(torch.arange(len(tokens)), fill=-1)[p].tolist()
    data_K = table.on_support(table.data_N, fill=0.0)[p].tolist()
    return {tokens[n]: share for n, share in zip(index_K, data_K) if n >= 0}


def test_on_support_finds_the_answers_that_p_data_gives():
    world, table, _ = three_tables()
    for p, data in enumerate(world.data):
        assert on_support_by_hand(table, p) == pytest.approx(data, abs=1e-6)


@pytest.mark.parametrize("prompts", [[0, 1, 2], [2], [1, 2], [2, 0]], ids=str)
def test_select_keeps_everything_consistent(prompts):
    """Prompt q of the part is prompt prompts[q] of the whole, with the same rows and shares."""
    world, table, _ = three_tables()
    part = table.select(torch.tensor(prompts))
    names = ("tokens_NS", "length_N", "data_N", "real_N", "generated_N", "opponent_N")
    for q, p in enumerate(prompts):
        assert torch.equal(part.prompt_PT[q], table.prompt_PT[p])
        assert part.prompt_length_P[q] == table.prompt_length_P[p]
        for name in names:
            assert torch.equal(getattr(part, name)[part.prompt_N == q],
                               getattr(table, name)[table.prompt_N == p]), name
    assert len(part.prompt_N) == sum(int((table.prompt_N == p).sum()) for p in prompts)
    for q, p in enumerate(prompts):
        assert on_support_by_hand(part, q) == pytest.approx(world.data[p], abs=1e-6), (
            "support_PK points into the whole table: renumber it with the rows")


def test_mean_is_over_prompts_not_over_answers():
    _, table, _ = three_tables()
    value_N = torch.arange(len(table.prompt_N), dtype=torch.float32)
    for prompts in ([0], [0, 2], [0, 1, 2]):
        by_hand = sum(w * v for p, w, v in zip(*(t.tolist() for t in (
            table.prompt_N, table.data_N, value_N))) if p in prompts) / len(prompts)
        got = table.mean(table.data_N, value_N, torch.tensor(prompts))
        assert got == pytest.approx(by_hand, rel=1e-6)


def test_counting_kl_is_the_expected_error_of_counting():
    """Exactly, by the binomial distribution; counting_kl averages 200 draws of it."""
    p, n = 0.3, 12
    chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    error = [p * math.log(p * (n + 1) / (k + 0.5)) +
             (1 - p) * math.log((1 - p) * (n + 1) / (n - k + 0.5)) for k in range(n + 1)]
    mean = sum(c * e for c, e in zip(chance, error))
    sigma = math.sqrt(sum(c * (e - mean) ** 2 for c, e in zip(chance, error)) / 200)
    assert abs(counting_kl([p, 1 - p], n) - mean) < 5 * sigma
    assert counting_kl([1.0], n) == pytest.approx(0, abs=1e-12)
