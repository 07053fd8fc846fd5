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

from data.errors import InputError
from data.instructions import WORLD, build_world
from data.tokenizer import (ANSWER, END, RANK_FILE, VOCAB_SIZE, dump_ranks, frame, load_encoding,
                            train_bpe)
from data.world import World, read_world, sample_sft

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
    for line in WORLD.read_text("utf-8").splitlines():
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


def test_responses_of_the_other_families_are_right():
    for row in ROWS:
        x, responses = row["prompt"], row["responses"]
        if row["family"] == "sums":
            a, b = map(int, re.findall(r"\d+", x))
            assert all(re.findall(r"\d+", y)[-1] == str(a + b) for y in responses), x
        elif row["family"] == "swaps":
            a, b = re.fullmatch(r"Swap (\w+) and (\w+)\.", x).groups()
            assert all(re.findall(r"\w+", y.replace(" and ", " ")) == [b, a] for y in responses), x
        elif row["family"] == "greetings":
            name = re.match(r"Greet (\w+)", x)[1]
            assert all(name in y for y in responses), x


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
    path.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()),
                    encoding="utf-8")
    return path


def test_changed_rank_file_gives_new_tokens(tmp_path):
    """The cache trap: tiktoken's own loader remembers a local file by its path alone."""
    old = load_encoding(str(merge_file(tmp_path, b"ab")))
    new = load_encoding(str(merge_file(tmp_path, b"bc", b"bcd")))
    assert old.encode_ordinary("abcd") == [256, ord("c"), ord("d")]
    assert new.encode_ordinary("abcd") == [ord("a"), 257] and new.n_vocab == 260


def test_only_the_order_of_ranks_matters_so_they_may_have_holes(tmp_path):
    """As those of p50k_base have. The tokens are numbered without holes."""
    path = merge_file(tmp_path, b"ab", b"abc")
    whole = load_encoding(str(path))
    text = path.read_text("utf-8").replace(" 256", " 300").replace(" 257", " 999")
    path.write_text(text, encoding="utf-8")
    holed = load_encoding(str(path))
    assert holed.n_vocab == whole.n_vocab == 260
    for text in ("abcab", "xaby", "ab", "b"):
        assert holed.encode_ordinary(text) == whole.encode_ordinary(text)
        assert holed.decode(holed.encode_ordinary(text)) == text


@pytest.mark.parametrize("change, reason", [
    (lambda text: text.replace("YWI= 256", "YWI="), ":257: expected a base64"),
    (lambda text: text.replace("YWI= 256", "Y!I= 256"), ":257: expected a base64"),
    (lambda text: text.replace("YWI= 256", "YWI= two"), ":257: expected a base64"),
    (lambda text: text.replace(" 256", " 255"), "ranks must be 0, 1, 2"),
    (lambda text: text.replace("AA== 0", "YWJj 0"), "not all 256 single bytes"),
    (lambda text: "", "not all 256 single bytes"),
])
def test_bad_rank_file_is_refused(tmp_path, change, reason):
    path = merge_file(tmp_path, b"ab")
    path.write_text(change(path.read_text("utf-8")), encoding="utf-8")
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
    "no response": (row(responses=None), 'give "response": a text'),
    "both keys": (row(response="a"), 'give "response": a text'),
    "no responses": (row(responses={}), "at least one response"),
    "responses a list": (row(responses=["a"]), "at least one response"),
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
    committed = [json.loads(line) for line in WORLD.read_text("utf-8").splitlines()]
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


# ---- Tokens -------------------------------------------------------------------------------------

def three_prompts():
    rows = [{"prompt": f"p{i}", "split": "heldout" if i == 1 else "train", "line": i + 1,
             "family": "letters", "responses": responses} for i, responses in enumerate([
                 {"a": 0.5, "b": 0.5}, {"c": 0.9, "d": 0.1}, {"e": 0.2, "f": 0.3, "g h": 0.5}])]
    return rows, World(rows, ENCODING, sft_samples=5, seed=0, block_size=32)


def test_world_frames_prompt_and_response_with_one_answer_and_one_end():
    rows, world = three_prompts()
    for row, prompt, data in zip(rows, world.prompts, world.data, strict=True):
        assert prompt[-1] == SPECIALS[ANSWER] and prompt.count(SPECIALS[ANSWER]) == 1
        assert ENCODING.decode(prompt[:-1]) == row["prompt"]
        for y in data:
            count = y.count(SPECIALS[END])
            assert count == 1 and y[-1] == SPECIALS[END], f"{y} has END {count} times, not once"
        assert {ENCODING.decode(y[:-1]): p for y, p in data.items()} == row["responses"]
    assert world.splits == {"train": [0, 2], "heldout": [1]}
    assert world.end_token == SPECIALS[END]


def test_shares_of_the_sft_set_are_its_counts_over_their_sum():
    rows, world = three_prompts()
    for data, real, counts in zip(world.data, world.real, sample_sft(rows, 5, seed=0)):
        text = {ENCODING.decode(y[:-1]): share for y, share in real.items()}
        assert text == pytest.approx({y: n / 5 for y, n in counts.items()})
        assert set(real) <= set(data)


def test_row_longer_than_the_block_is_refused_with_its_line():
    rows = [{"prompt": "q " * 40, "split": "train", "line": 17, "family": "q",
             "responses": {"a": 1.0}}]
    with pytest.raises(InputError, match=r"line 17: .* 83 tokens.*block-size is 82"):
        World(rows, ENCODING, sft_samples=1, seed=0, block_size=82)
    World(rows, ENCODING, sft_samples=1, seed=0, block_size=83)


def test_generation_may_go_two_tokens_beyond_the_longest_response():
    """Only so can a response that is too long be told from the longest right one."""
    _, world = three_prompts()
    longest = max(len(ENCODING.encode_ordinary(y)) for y in ("a", "g h"))
    assert world.max_new_tokens == longest + 1 + 2  # END is a token of the response too
