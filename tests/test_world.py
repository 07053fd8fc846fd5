"""The world and its tokenizer: p_data is as the prompts say, texts survive, bad files are refused.

The oracles parse the prompts anew, count, enumerate, and compare bytes written by hand.
"""
import base64
import gzip
import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
import tiktoken
import tiktoken_ext.openai_public

from data import InputError
from data.instructions import WORLD
from data.tokenizer import (ANSWER, END, RANK_FILE, VOCAB_SIZE, build_encoding, dump_ranks, frame,
                            load_encoding, parse_ranks, train_bpe)
from data.world import World, hold_out, read_world, sample_sft

ROWS, ENCODING = read_world(), load_encoding()
SPECIALS = {name: ENCODING.encode_single_token(name) for name in (ANSWER, END)}
BYTES = {bytes([i]): i for i in range(256)}
PAIR = {"prompt": "Say a.", "response": "a"}


def lines(*rows) -> bytes:
    """Rows as JSON lines; bytes go in as they are."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n"
                    for row in rows)


def written(path, *rows):
    path.write_bytes(lines(*rows))
    return path


def refusal(work, *args) -> str:
    """The one line with which `work` refuses. It holds no control character."""
    with pytest.raises(InputError) as error:
        work(*args)
    assert str(error.value).isprintable(), str(error.value)
    return str(error.value)


# ---- The committed world ------------------------------------------------------------------------

def test_scripts_write_the_committed_files_byte_for_byte(tmp_path):
    """In a copy, under the C locale."""
    (tmp_path / "data").mkdir()
    for name in ("__init__.py", "instructions.py", "tokenizer.py"):
        (tmp_path / "data" / name).write_bytes((WORLD.parent / name).read_bytes())
    for command in (["data/instructions.py"], ["-m", "data.tokenizer"]):
        subprocess.run([sys.executable, "-X", "utf8=0", *command], cwd=tmp_path, check=True,
                       env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    for path in (WORLD, RANK_FILE):
        assert (tmp_path / "data" / path.name).read_bytes() == path.read_bytes()


def test_world_is_read_in_order_with_line_numbers_and_sums_of_one():
    committed = [json.loads(line) for line in WORLD.read_text("utf-8").splitlines()]
    for number, (got, line) in enumerate(zip(ROWS, committed, strict=True), 1):
        assert [got[key] for key in ("prompt", "split", "family", "line")] == [
            line["prompt"], line["split"], line["family"], number]
        assert got["responses"] == pytest.approx(line["responses"], abs=1e-6)
        assert abs(math.fsum(got["responses"].values()) - 1) < 1e-12


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
    """A tenth of all characters that Unicode has are among them."""
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    every = random.Random(0).sample(every, len(every) // 10)
    texts = ["", "\0\0a\0", "😀👩‍👩‍👧🏳️‍🌈", " \t\n\r\n  x", "e\u0301 ﬁ ß", "में १२३।", "".join(every)]
    for text in texts + [row["prompt"] for row in ROWS]:
        assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text, repr(text[:99])


def test_vocabulary_has_512_tokens_the_last_two_special():
    assert ENCODING.n_vocab == VOCAB_SIZE + 2 == 512 and SPECIALS == {ANSWER: 510, END: 511}


def test_training_and_encoding_cut_a_text_into_the_same_chunks():
    """Merged to the end, each chunk of the training text is one token; an ASCII text, as ours."""
    text = "Roll 12 dice, snake_case, 35% it's (a\tb)\r\n  x."
    chunks = ["Roll", " 1", "2", " dice", ",", " snake", "_", "case", ",", " 3", "5", "%", " it",
              "'", "s", " (", "a", "\t", "b", ")", "\r", "\n", " ", " x", "."]
    encoding = build_encoding(train_bpe([text], 10_000))
    assert [encoding.decode([k]) for k in encoding.encode_ordinary(text)] == chunks


def test_text_that_looks_like_a_special_token_is_plain_text():
    for text in ("<|end|>", "a<|answer|>b<|end|><|end|>"):
        prompt, response = frame(ENCODING, text, text)
        assert prompt[-1] == SPECIALS[ANSWER] and response[-1] == SPECIALS[END]
        assert not set(prompt[:-1] + response[:-1]) & set(SPECIALS.values()), text
        assert ENCODING.decode(prompt[:-1]) == ENCODING.decode(response[:-1]) == text


def rank_file(*merges, hole=0) -> str:
    """256 bytes and some merges, whose ranks are `hole` higher than they need be."""
    ranks = BYTES | {token: 256 + i + hole for i, token in enumerate(merges)}
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


RANKS = rank_file(b"ab", b"abc")
READ_ALIKE = {"as it is": RANKS.encode(), "byte-order mark": b"\xef\xbb\xbf" + RANKS.encode(),
              "CRLF": RANKS.replace("\n", "\r\n").encode(), "no last line end": RANKS[:-1].encode(),
              "blank last lines": (RANKS + "\n \n").encode(),
              "a hole, as in p50k_base": rank_file(b"ab", b"abc", hole=9).encode()}


@pytest.mark.parametrize("name", READ_ALIKE)
def test_rank_file_as_editors_write_it_gives_the_same_tokens(name, tmp_path):
    (tmp_path / "ranks").write_bytes(READ_ALIKE[name])
    encoding = load_encoding(str(tmp_path / "ranks"))
    assert encoding.encode_ordinary("abcxab") == [257, ord("x"), 256] and encoding.n_vocab == 260
    assert encoding._mergeable_ranks == BYTES | {b"ab": 256, b"abc": 257}
    again = build_encoding(parse_ranks(dump_ranks(encoding._mergeable_ranks), ""),
                           encoding._pat_str)  # as a policy carries it
    assert again.encode_ordinary("abcxab") == [257, ord("x"), 256]


def test_changed_rank_file_gives_new_tokens(tmp_path):
    """tiktoken's own loader remembers a local file by its path alone."""
    for merge in (b"ab", b"bc"):
        (tmp_path / "ranks").write_text(rank_file(merge), "utf-8")
        assert load_encoding(str(tmp_path / "ranks")).encode_ordinary(merge.decode()) == [256]


BAD_RANKS = {  # what is in the file → what the line says
    "no rank": (RANKS.replace("YWI= 256", "YWI="), ":257: expected a base64 token and a rank"),
    "no base64": (RANKS.replace("YWI= 256", "Y!I= 256"), ":257: expected a base64"),
    "rank a word": (RANKS.replace("YWI= 256", "YWI= two"), ":257: expected a base64"),
    "rank twice": (RANKS.replace(" 257", " 256"), ":258:", "on an earlier line"),
    "token twice": (RANKS + "YWI= 900\n", ":259:", "on an earlier line"),
    "a byte is missing": (RANKS.replace("YQ== 97\n", ""), "not all 256 single bytes"),
    "empty": ("", "not all 256 single bytes"),
    "JSON, as Hugging Face has": ('{"a": 0, "b": 1}', ":1:", "expected a base64"),
    "UTF-16": (RANKS.encode("utf-16"), "UTF-16"), "gzip": (gzip.compress(RANKS.encode()), "gzip"),
}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_bad_rank_file_is_refused_with_file_and_line(name, tmp_path):
    content, *words = BAD_RANKS[name]
    (tmp_path / "r").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(load_encoding, str(tmp_path / "r"))
    assert message.startswith(f"--encoding {tmp_path / 'r'}:"), message
    assert all(word in message for word in words), message


def test_encoding_that_does_not_exist_is_refused(tmp_path):
    for source in ("no-such-thing", str(tmp_path), "x" * 5000):
        assert "neither a rank file nor" in refusal(load_encoding, source)


def test_tiktoken_s_encodings_work_by_name_and_their_patterns_pass(monkeypatch):
    """With few ranks in place of the hundred thousand that tiktoken would download."""
    for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, name, lambda *_, **__: BYTES | {b"ab": 300})
    for name in tiktoken.list_encoding_names():
        settings = tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
        settings |= {"explicit_n_vocab": None, "special_tokens": {}}
        monkeypatch.setattr(tiktoken, "get_encoding", lambda _: tiktoken.Encoding(**settings))
        encoding = load_encoding(name)
        assert encoding._pat_str == settings["pat_str"] and encoding.n_vocab == 259
        assert encoding.encode_ordinary("ab") == [256]


def test_encoding_that_cannot_be_fetched_is_refused_with_the_way_to_fetch_it(monkeypatch):
    def no_network(name):
        raise OSError("no network\n\x1b[31m")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    message = refusal(load_encoding, "gpt2")
    assert message.startswith("--encoding gpt2: ") and "TIKTOKEN_CACHE_DIR" in message


# ---- Files that are read ------------------------------------------------------------------------

OWN = [{"prompt": "Grüße\nÁnna.", "response": "héllo\u2028\x85\x1b[31m"},
       PAIR | {"split": "heldout", "family": "f"}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OWN)
TURNS = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
MORE = {"split": "heldout", "family": "f"}
AS_OTHERS_WRITE = {
    "byte-order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "CRLF": TEXT.replace("\n", "\r\n").encode(), "CR": TEXT.replace("\n", "\r").encode(),
    "no last line end": TEXT[:-1].encode(), "blank lines": TEXT.replace("\n", " \n\n \n").encode(),
    "an array": json.dumps(OWN).encode(), "an array over lines": json.dumps(OWN, indent=2).encode(),
    "rows over lines": "\n".join(json.dumps(row, indent=2) for row in OWN).encode(),
    "Alpaca": lines(OWN[0], {"instruction": "Say a.", "input": "", "output": "a"} | MORE),
    "Alpaca without input": lines(OWN[0], {"instruction": "Say a.", "output": "a"} | MORE),
    "Alpaca with input": lines(
        {"instruction": "Grüße", "input": "Ánna.", "output": OWN[0]["response"]}, OWN[1]),
    "messages": lines(OWN[0], {"messages": TURNS} | MORE),
    "messages beside the prompt": lines(OWN[0], {"prompt": "Say a.", "messages": TURNS} | MORE),
}


@pytest.mark.parametrize("name", AS_OTHERS_WRITE)
def test_file_as_others_write_it_gives_the_same_rows(name, tmp_path, capsys):
    (tmp_path / "x").write_bytes(AS_OTHERS_WRITE[name])
    got = [[row[key] for key in ("prompt", "responses", "counts", "split", "family")]
           for row in read_world(tmp_path / "x")]
    y = OWN[0]["response"]
    assert got == [[OWN[0]["prompt"], {y: 1.0}, {y: 1}, "train", "all"],
                   ["Say a.", {"a": 1.0}, {"a": 1}, "heldout", "f"]]
    assert capsys.readouterr().out == "", "nothing is ignored, so there is nothing to say"


def test_plain_pairs_give_the_empirical_distribution(tmp_path):
    pairs = [("x", "a"), ("z", "c"), ("x", "b"), ("x", "a"), ("x", "a")]
    world = read_world(written(tmp_path / "x", *({"prompt": x, "response": y} for x, y in pairs)))
    assert [(r["prompt"], r["responses"], r["line"]) for r in world] == [
        ("x", {"a": 0.75, "b": 0.25}, 1), ("z", {"c": 1.0}, 2)]
    assert sample_sft(world, n=99, seed=0) == [{"a": 3, "b": 1}, {"c": 1}], "the set is the file"
    assert World(world, ENCODING, 4, 0, 32).empirical
    assert not World(ROWS, ENCODING, 4, 0, 32).empirical


# what is in a file → what is printed once
NOTICES = {
    "unknown keys": ([PAIR | {"id": 7, "facility": "\x1b[31m"}, PAIR | {"prompt": "b", "id": 8}],
                     r"these keys are ignored: 'id' (line 1), 'facility' (line 1)"),
    "a key with escapes": ([PAIR | {"\x1b[31m": 1}], r"ignored: '\x1b[31m' (line 1)"),
    "copies": ([PAIR] * 50 + [PAIR | {"response": "b"}], "49 rows repeat a prompt with its"),
    **{marker: ([PAIR | {"prompt": f"p{i}", "response": f"y{i}{marker}\n"} for i in range(3)],
                f"3 responses end with '{marker}'; take it off")
       for marker in ("<|endoftext|>", "<|im_end|>", "</s>", "<|eot_id|>")},
}


@pytest.mark.parametrize("name", NOTICES)
def test_what_a_file_says_in_vain_is_named_in_one_line(name, tmp_path, capsys):
    rows, words = NOTICES[name]
    read_world(written(tmp_path / "x", *rows))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out[:-1].isprintable() and words in out, out


# ---- Files that are refused ---------------------------------------------------------------------

GOOD = {"family": "f", "prompt": "first", "responses": {"a": 0.5, "b": 0.5}}


def bad(**change):
    """A second row with one thing wrong; None takes a key away."""
    row = GOOD | {"prompt": "x"} | change
    return lines(GOOD, {key: value for key, value in row.items() if value is not None})


REFUSED = {  # what is in a file → what the line says besides the file
    "empty": (b" \n", "no row of split train"),
    "held out only": (lines(GOOD | {"split": "heldout"}), "no row of split train"),
    "UTF-16": (TEXT.encode("utf-16"), "UTF-16", "save it as UTF-8"),
    "UTF-16 without a mark": (lines(PAIR).decode().encode("utf-16-le"), "UTF-16"),
    "gzip": (gzip.compress(TEXT.encode()), "gzip", "gunzip"),
    "cp1252": (lines(PAIR) + "Grüße – “x”".encode("cp1252"), ":2:", "not UTF-8", "cp1252"),
    "a table": (b"prompt,response\nx,y\n", ":1: not JSON", '{"prompt": "'),
    "malformed": (lines(GOOD, b'{"prompt": "x", ', PAIR), ":2: not JSON", '{"prompt": "'),
    "array cut short": (json.dumps([PAIR, PAIR], indent=0).encode()[:-5], ":6: not JSON"),
    "deeply nested": (lines(GOOD, b"[" * 100_000), ":2:"),
    "after blank lines": (lines(GOOD, b"", b" ", GOOD | {"prompt": " \n"}), ":4: the prompt or"),
    "a list": (lines(GOOD, ["x", "y"]), ":2: expected a row such as", 'not ["x", "y"]'),
    "a number": (lines(GOOD, 3), ":2: expected a row such as"),
    "no prompt": (bad(prompt=None), ":2: expected a row"),
    "prompt a number": (bad(prompt=3), ":2:", "not a text: 3"),
    "wrong split": (bad(split="test"), ":2: split is 'test'"),
    "split a list": (bad(split=["train"]), ":2: split is"),
    "split misspelt": (bad(spilt="heldout"), ":2: unknown key 'spilt'", '"split"'),
    "Split": (bad(Split="heldout"), ":2: unknown key 'Split'", '"split"'),
    "response misspelt": (lines(GOOD, {"prompt": "x", "reponse": "y"}), ":2: ", '"reponse": "y"'),
    "no response": (bad(responses=None), ":2: expected a row"),
    "both keys": (bad(response="a"), ":2: expected a row"),
    "no responses": (bad(responses={}), ":2:", "sum to 0, not to 1"),
    "responses a list": (bad(responses=["a"]), ":2: expected a row", '["a"]'),
    "empty response": (bad(responses={" ": 0.5, "b": 0.5}), ":2:", 'response is empty', '" "'),
    "pair with a list": (lines(GOOD, {"prompt": "x", "response": ["a"]}), ":2:", 'text: ["a"]'),
    **{f"probability {p!r:.9}": (bad(responses={"a": p, "b": 1}), ":2: the probability of 'a' is")
       for p in (-0.5, 0, 1.5, math.nan, math.inf, True, "1.0", 10**400)},
    "sum too small": (bad(responses={"a": 0.5, "b": 0.4}), ":2:", "sum to 0.9"),
    "sum off by 1e-5": (bad(responses={"a": 0.5, "b": 0.50001}), ":2:", "sum to 1.00001"),
    "duplicate prompt": (lines(GOOD, GOOD), ":2: prompt 'first' is on line 1 already"),
    "rows of two kinds": (lines(GOOD, PAIR), ":2: ", 'line 1 has "responses"; give rows of one'),
    "pair for a known prompt": (lines(GOOD, {"prompt": "first", "response": "a"}), ":2: prompt"),
    "duplicate name": (lines(GOOD, b'{"prompt": "x", "responses": {"a": 0.5, "a": 1.0}}'),
                       ":2: 'a' is given twice"),
    "half a surrogate pair": (lines(GOOD, b'{"prompt": "\\ud800", "response": "a"}'),
                              ":2:", "surrogates not allowed"),
    "escapes": (lines({"prompt": "\x1b[31m\x9b", "response": "a"},
                      {"prompt": "\x1b[31m\x9b", "responses": {"a": 1}}), r"'\x1b[31m\x9b'"),
    "Alpaca, output a list": (lines(PAIR, {"instruction": "x", "output": ["y"]}), ":2: expected a"),
    "a conversation": (lines(PAIR, {"messages": TURNS * 2}), ":2: expected a row",
                       "one turn of the user"),
    "assistant first": (lines(PAIR, {"messages": TURNS[::-1]}), ":2: expected a row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_file_is_refused_with_file_line_and_reason(name, tmp_path):
    content, *words = REFUSED[name]
    (tmp_path / "x").write_bytes(content)
    message = refusal(read_world, tmp_path / "x")
    assert message.startswith(f"{tmp_path / 'x'}:") and len(message) < 300, message
    assert all(word in message for word in words), message


def test_missing_file_or_folder_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        assert refusal(read_world, path).startswith(f"{path}: cannot be read")


ALIKE = ["What  is café?", " What is café?\n", "What\tis\u00a0café?", "What is cafe\u0301?",
         "What is\u3000café?", "What is caf\u200bé?", "\ufeffWhat is café?", "What is café?"]


@pytest.mark.parametrize("x", ALIKE)
def test_prompt_in_both_splits_is_refused_in_whatever_form(x, tmp_path):
    for first, second in (("train", "heldout"), ("heldout", "train")):
        message = refusal(read_world, written(
            tmp_path / "x", PAIR, {"prompt": "What is café?", "response": "a", "split": first},
            {"prompt": x, "response": "b", "split": second}))
        assert message.startswith(f"{tmp_path / 'x'}:3: ") and "line 2" in message, message
        assert "both splits" in message
        assert ("white space or Unicode form" in message) == (x != "What is café?"), message


def test_prompts_that_differ_in_more_than_form_may_be_in_both_splits(tmp_path):
    different = ["Join 1 23.", "Join 12 3.", "Join 1² 3.", "join 1 23.", "Join 1 23"]
    rows = read_world(written(tmp_path / "x", *(PAIR | {
        "prompt": x, "split": ("train", "heldout")[i % 2]} for i, x in enumerate(different))))
    assert [row["prompt"] for row in rows] == different
    alike = [{"prompt": x, "response": "y"} for x in ALIKE]  # in one split they are no leak
    assert len(read_world(written(tmp_path / "x", *alike))) == len(set(ALIKE))


def test_reading_takes_time_in_proportion_to_the_rows(tmp_path):
    """20,000 prompts take about a second; a quadratic step would take minutes."""
    rows = [{"prompt": f"Prompt {i}?", "response": "word " * 20, "id": 3} for i in range(20_000)]
    (tmp_path / "x").write_text(json.dumps(rows), "utf-8")
    began = time.process_time()
    held_out = hold_out(read_world(tmp_path / "x"), 0.1, seed=0)
    world = World(held_out, ENCODING, sft_samples=1, seed=0, block_size=99)
    assert time.process_time() - began < 15 and len(world.splits["train"]) == 18_000


# ---- Held-out rows, the SFT set -----------------------------------------------------------------

def pairs(n):
    return [{"prompt": f"p{i}", "response": "y", "split": "train"} for i in range(n)]


def held(rows) -> set:
    return {row["prompt"] for row in rows if row["split"] == "heldout"}


@pytest.mark.parametrize("n, share, expected", [(100, 0.1, 10), (7, 0.1, 1), (2, 0.01, 1),
                                                (2, 1.0, 1), (10, 1.0, 9)])
def test_share_of_the_prompts_is_held_out_and_one_stays(n, share, expected):
    rows = pairs(n)
    got = hold_out(rows, share, seed=0)
    assert len(held(got)) == expected and held(rows) == set(), "the rows given stay as they were"
    assert [row | {"split": "train"} for row in got] == rows


def test_held_out_prompts_depend_on_seed_and_prompts_and_not_on_their_order():
    rows = pairs(50)
    assert held(hold_out(rows, 0.2, seed=0)) == held(hold_out(rows[::-1], 0.2, seed=0))
    times = Counter(x for seed in range(200) for x in held(hold_out(rows, 0.2, seed)))
    assert len(times) == 50 and 12 < min(times.values()) and max(times.values()) < 68, (
        f"40 times each are expected, with σ = 5.7: {times}")


def test_held_out_rows_of_the_file_stay_held_out_and_look_alikes_stay_together():
    rows = [row | {"split": "heldout"} for row in pairs(3)]
    rows += [{"prompt": f"q{i}{blank}", "split": "train"} for i in range(10) for blank in ("", " ")]
    for seed in range(20):
        got = held(hold_out(rows, 0.3, seed))
        assert {"p0", "p1", "p2"} <= got and len(got) == 3 + 3 * 2
        assert all((f"q{i}" in got) == (f"q{i} " in got) for i in range(10))


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
    for real, counts in zip(world.real, sample_sft(rows, 5, seed=0)):
        assert {ENCODING.decode(y[:-1]): share for y, share in real.items()} == pytest.approx(
            {y: n / 5 for y, n in counts.items()}), "the shares of the SFT set"


def test_generation_may_go_two_tokens_beyond_the_longest_response():
    """Only so can a response that is too long be told from the longest right one."""
    longest = max(len(ENCODING.encode_ordinary(y)) for y in ("a", "g h"))
    assert three_prompts()[1].max_new_tokens == longest + 1 + 2  # END is one of its tokens


def test_rows_that_are_too_long_are_counted_and_the_longest_named(tmp_path):
    """A prompt of n letters x and ANSWER, "y" and END: n + 3 tokens with single bytes."""
    rows = read_world(written(tmp_path / "x", *(PAIR | {"prompt": chr(97 + i) * n} for i, n in
                                                enumerate([5, 40, 17, 60, 18, 60]))))
    encoding = build_encoding(BYTES)
    message = refusal(World, rows, encoding, 1, 0, 20)
    for words in ("line 4: ", "63 tokens", "--block-size is 20", "4 of 6", "--block-size 63"):
        assert words in message, message
    assert "63 tokens" in refusal(World, rows, encoding, 1, 0, 62)
    World(rows, encoding, 1, 0, 63)


def test_one_response_far_longer_than_the_rest_is_named_before_it_slows_down_sampling(
        tmp_path, capsys):
    rows = [PAIR | {"prompt": f"p{i}"} for i in range(100)]
    rows[41]["response"] = "b" * 899
    read = read_world(written(tmp_path / "x", *rows))
    World(read, build_encoding(BYTES), 1, 0, 1024)
    out = capsys.readouterr().out
    assert out.startswith("line 42: a response of 900 tokens") and "longer than 2." in out, out
    World(read[:41], build_encoding(BYTES), 1, 0, 1024)
    World(ROWS, ENCODING, 1, 0, 1024)
    assert capsys.readouterr().out == ""
