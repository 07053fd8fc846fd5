"""Own data: files as users and editors write them are read alike, or refused with the way to mend.

The oracles are bytes written by hand, the JSON rows one by one, and Unicode's own tables.
"""
import base64
import doctest
import gzip
import io
import json
import random
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter

import pytest
import tiktoken

import data.foreign
import data.tokenizer
import data.world
from conftest import tiny_gpt
from data.errors import InputError
from data.foreign import read_text
from data.run.checkpoint import load_policy, save_policy
from data.tokenizer import (ANSWER, END, PATTERN, build_encoding, class_of, dump_ranks, frame,
                            load_encoding, parse_ranks, pieces, train_bpe)
from data.world import World, hold_out, read_world

BYTES = {bytes([i]): i for i in range(256)}
PAIR = {"prompt": "Say a.", "response": "a"}


def write(path, *rows):
    """A file of rows as JSON lines."""
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path


def refusal(work, *args) -> str:
    """The one line with which `work` refuses."""
    with pytest.raises(InputError) as error:
        work(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("module", [data.foreign, data.tokenizer, data.world])
def test_docstrings_tell_the_truth(module):
    assert doctest.testmod(module).failed == 0


# ---- Rank files ---------------------------------------------------------------------------------

def rank_file(*merges, step=1, hole=0) -> str:
    """256 bytes and some merges, `step` apart, the merges `hole` higher."""
    ranks = [(token, i * step) for token, i in BYTES.items()]
    ranks += [(token, (256 + i) * step + hole) for i, token in enumerate(merges)]
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)


HOLES = {"one hole, as p50k_base": dict(hole=1), "a wide hole": dict(hole=10**9),
         "beyond 32 bits": dict(hole=10**12), "every other rank": dict(step=2)}


@pytest.mark.parametrize("name", HOLES)
def test_ranks_with_holes_encode_as_ranks_without(name, tmp_path):
    merges = (b"ab", b"abc", b"ca", b" \xc3")
    (tmp_path / "whole").write_text(rank_file(*merges), "utf-8")
    (tmp_path / "holes").write_text(rank_file(*merges, **HOLES[name]), "utf-8")
    whole, holes = (load_encoding(str(tmp_path / x)) for x in ("whole", "holes"))
    assert holes.n_vocab == 256 + len(merges) + 2 and holes._special_tokens == {
        ANSWER: 260, END: 261}
    for text in ("abcabcab", "ca ab", " é", "xyz"):
        assert holes.encode_ordinary(text) == whole.encode_ordinary(text)
    for token in range(holes.n_vocab):
        holes.decode([token])  # a sampled token must be one that can be decoded


def test_policy_trained_on_ranks_with_holes_is_loaded_again(tmp_path):
    (tmp_path / "ranks").write_text(rank_file(b"ab", b"abc", hole=7), "utf-8")
    encoding = load_encoding(str(tmp_path / "ranks"))
    rows = read_world(write(tmp_path / "rows", PAIR | {"prompt": "abcab", "response": "abc"}))
    world = World(rows, encoding, sft_samples=1, seed=0, block_size=16)
    save_policy(tmp_path / "iteration_0.pt", tiny_gpt(encoding.n_vocab, 16), world)
    _, again, p_data = load_policy(tmp_path / "iteration_0.pt")
    assert again._mergeable_ranks == encoding._mergeable_ranks and again.n_vocab == 260
    assert again.encode_ordinary("abcab") == encoding.encode_ordinary("abcab") == [257, 256]
    assert p_data == {"abcab": {"abc": 1.0}}


def test_ranks_without_holes_keep_their_ids():
    ranks = {token: 255 - i for token, i in BYTES.items()} | {b"ab": 256}  # GPT-2's bytes: permuted
    encoding = build_encoding(ranks)
    assert encoding._mergeable_ranks == ranks
    assert parse_ranks(dump_ranks(ranks), "name") == ranks


LINES = rank_file(b"ab", b"abc")
AS_EDITORS_WRITE = {
    "byte-order mark": b"\xef\xbb\xbf" + LINES.encode(),
    "CRLF": LINES.replace("\n", "\r\n").encode(),
    "CR": LINES.replace("\n", "\r").encode(),
    "no last line end": LINES[:-1].encode(),
    "trailing blanks": LINES.replace("\n", " \t\n").encode(),
    "leading blanks": LINES.replace("\n", "\n  ").encode(),
    "blank lines": ("\n\n" + LINES.replace("\n", "\n \n")).encode(),
    "tabs": LINES.replace(" ", "\t").encode(),
    "two files in one, each with a mark": b"".join(
        b"\xef\xbb\xbf" + line for line in LINES.encode().splitlines(keepends=True)),
}


@pytest.mark.parametrize("name", AS_EDITORS_WRITE)
def test_rank_file_as_editors_write_it_gives_the_same_tokens(name, tmp_path):
    (tmp_path / "ranks").write_bytes(AS_EDITORS_WRITE[name])
    got = load_encoding(str(tmp_path / "ranks"))
    assert got._mergeable_ranks == BYTES | {b"ab": 256, b"abc": 257}


BAD_RANKS = {
    "rank twice": (LINES.replace(" 257", " 256"), ":258:", "rank 256 is on line 257 already"),
    "token twice": (LINES + "YWI= 900\n", ":259:", "the token b'ab' is on line 257 already"),
    "same line twice": (LINES + "YWI= 256\n", ":259:", "on line 257 already"),
    "negative": (LINES.replace(" 257", " -1"), ":258:", "expected a base64 token and a rank"),
    "fraction": (LINES.replace(" 257", " 1.5"), ":258:", "expected a base64"),
    "underscore": (LINES.replace(" 257", " 2_57"), ":258:", "expected a base64"),
    "Arabic digits": (LINES.replace(" 257", " ٢٥٧"), ":258:", "expected a base64"),
    "empty token": (LINES + "= 900\n", ":259:", "expected a base64"),
    "three columns": (LINES + "YWI= 900 x\n", ":259:", "expected a base64"),
    "JSON, as Hugging Face has": ('{"a": 0, "b": 1}', ":1:", "expected a base64"),
    "a byte is missing": (LINES.replace("YQ== 97\n", ""), "not all 256 single bytes"),
    "END is a token": (rank_file(b"<|end|>"), "<|end|> is among the tokens already"),
    "UTF-16": (LINES.encode("utf-16"), "it is UTF-16", "iconv -f UTF-16"),
    "UTF-16 without a mark": (LINES.encode("utf-16-le"), "NUL bytes, as UTF-16"),
    "gzip": (gzip.compress(LINES.encode()), "compressed by gzip", "gunzip"),
}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_bad_rank_file_is_refused_without_a_panic(name, tmp_path, capfd):
    content, *words = BAD_RANKS[name]
    (tmp_path / "r").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(load_encoding, str(tmp_path / "r"))
    assert message.startswith(f"--encoding {tmp_path / 'r'}"), message
    assert all(word in message for word in words), message
    assert capfd.readouterr().err == "", "tiktoken panicked: its Rust code prints a trace"


@pytest.mark.parametrize("pattern", [
    "", "x*", r"\w*", r"\w+", r"\p{L}+|\s", ".", "(a", "[", r"\p{Nonsense}", "(?=a)"])
def test_pattern_that_loses_text_or_is_none_is_refused_without_a_panic(pattern, capfd):
    with pytest.raises(ValueError):
        build_encoding(BYTES, pattern)
    assert capfd.readouterr().err == ""


GPT2 = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


@pytest.mark.parametrize("pattern", [PATTERN, r" ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s", *GPT2])
def test_patterns_in_use_are_accepted(pattern):
    assert build_encoding(BYTES, pattern).n_vocab == 258


def test_text_on_which_tiktoken_panics_is_refused():
    encoding = build_encoding(BYTES, GPT2[1])
    message = refusal(frame, encoding, " " * 10**6, "a")
    assert message.startswith("tiktoken cannot split a text of 1000000 characters")


# ---- The tokenizer's pattern --------------------------------------------------------------------

TEXTS = {
    "Devanagari": "हिन्दी में लिखें, क्‍ष १२३।", "Thai": "ภาษาไทยมีวรรณยุกต์ ๑๒",
    "Arabic with marks": "بِسْمِ ٱللَّهِ ١٢٣؟", "Hebrew with points": "שָׁלוֹם עוֹלָם",
    "emoji": "hi👩‍👩‍👧🏳️‍🌈 👍🏽!❤️x", "decomposed": "Cafe\u0301 n\u0303_a\u0308",
    "numbers": "½ ²x Ⅷ ③ 3rd ٣٤ 35%", "CJK": "你好，世界。カ゛ 한국어",
    "controls": "a\x1cb\x1f \x85c\u2028d\xa0e\u3000f\0", "blanks": "  two \t\r\n three   "}


@pytest.mark.parametrize("name", TEXTS)
def test_tiktoken_cuts_a_text_into_the_pieces_that_training_saw(name):
    """Each expected piece is a token: tiktoken gives them all only if its pieces are the same."""
    expected = pieces(TEXTS[name])
    assert "".join(expected) == TEXTS[name], "a piece is lost"
    ranks = BYTES | {piece.encode(): 256 + i for i, piece in enumerate(
        {piece for piece in expected if len(piece.encode()) > 1})}
    encoding = build_encoding(ranks)
    got = [encoding.decode_single_token_bytes(k).decode()
           for k in encoding.encode_ordinary(TEXTS[name])]
    assert got == expected


def test_combining_marks_stay_with_their_word():
    assert pieces("हिन्दी में") == ["हिन्दी", " में"]
    assert pieces("Cafe\u0301 12") == ["Cafe\u0301", " 1", "2"]


@pytest.mark.parametrize("kind, name", [(r"[\p{L}\p{M}]", "L"), (r"\p{N}", "N"), (r"\s", " S"),
                                        (r"[^\s\p{L}\p{M}\p{N}]", "P")])
def test_tiktoken_puts_every_character_into_the_same_class(kind, name):
    """Of those that Python's own tables know: newer ones may differ by the age of a library."""
    known = "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in (
        "Cn", "Cs"))
    one_kind = tiktoken.Encoding("one kind", pat_str=kind, mergeable_ranks=BYTES,
                                 special_tokens={})  # what a pattern does not match is dropped
    assert one_kind.decode(one_kind.encode_ordinary(known)) == "".join(
        c for c in known if class_of(c) in name)


def test_training_learns_whole_words_of_marked_scripts():
    text = "हिन्दी में हिन्दी में"
    encoding = build_encoding(train_bpe([text], 400))
    assert len(encoding.encode_ordinary(text)) == 4


# ---- Data files as editors write them -----------------------------------------------------------

ROWS = [{"prompt": "Grüße Ánna.", "response": "héllo\u2028\x85\x1b[31m"},
        PAIR | {"split": "heldout"}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + TEXT.encode(), TEXT.replace("\n", "\r\n").encode(),
    TEXT.replace("\n", "\r").encode(), TEXT.replace("\n", " \t \n").encode(), TEXT[:-1].encode(),
    ("\n \n" + TEXT.replace("\n", "\n\n\n")).encode(),
    b"".join(b"\xef\xbb\xbf" + line.encode() + b"\n" for line in TEXT.split("\n")),
], ids=["mark", "CRLF", "CR", "trailing blanks", "no last line end", "blank lines", "marks"])
def test_data_file_as_editors_write_it_gives_the_same_rows(content, tmp_path):
    (tmp_path / "x").write_bytes(TEXT.encode())
    expected = read_world(tmp_path / "x")
    (tmp_path / "x").write_bytes(content)
    without_line = lambda rows: [{k: v for k, v in row.items() if k != "line"} for row in rows]
    assert without_line(read_world(tmp_path / "x")) == without_line(expected)
    assert [row["prompt"] for row in expected] == [row["prompt"] for row in ROWS]


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x.jsonl", TEXT)
    return buffer.getvalue()


NO_TEXT = {
    "UTF-16": (TEXT.encode("utf-16"), "it is UTF-16", "iconv -f UTF-16 -t UTF-8"),
    "UTF-16, big-endian": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "it is UTF-16"),
    "UTF-16 without a mark": (json.dumps(PAIR).encode("utf-16-le"), "NUL bytes, as UTF-16"),
    "UTF-32": (TEXT.encode("utf-32"), "UTF-32"),
    "Latin-1": ("\n{}\n".format(TEXT).encode("latin-1", "replace"), ":2:", "0xfc",
                "save the file as UTF-8"),
    "gzip": (gzip.compress(TEXT.encode()), "compressed by gzip", "gunzip -c"),
    "zip": (archive(), "zip archive", "unpack it"),
    "xz": (b"\xfd7zXZ\0" + b"x" * 40, "compressed by xz", "unxz"),
    "Parquet": (b"PAR1\x15\x04" + b"x" * 40, "Parquet", "read_parquet", "lines=True"),
    "a program": (open(sys.executable, "rb").read(2000), "cannot be read as UTF-8"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_file_that_is_no_utf_8_text_is_refused_with_what_it_is(name, tmp_path):
    content, *words = NO_TEXT[name]
    (tmp_path / "x.jsonl").write_bytes(content)
    message = refusal(read_world, tmp_path / "x.jsonl")
    assert message.startswith(str(tmp_path / "x.jsonl")) and "cannot be read as UTF-8" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["it's", "a b", "ä"])
@pytest.mark.parametrize("kind", ["list", "list over lines", "table", "gzip", "UTF-16"])
def test_advice_to_convert_a_file_works_as_it_is_printed(kind, name, tmp_path):
    """The command of the message, run by a shell in the user's folder, gives a file that reads."""
    rows = [{"prompt": "Grüße, Ánna", "response": "a"}, {"prompt": "b", "response": 'c "d"'}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path = tmp_path / (name + (".csv" if kind == "table" else ".json"))
    path.write_bytes({"list": json.dumps(rows).encode(), "gzip": gzip.compress(lines),
                      "list over lines": json.dumps(rows, indent=2).encode(),
                      "UTF-16": lines.decode().encode("utf-16"),
                      "table": ('prompt,response\r\n"Grüße, Ánna",a\r\nb,"c ""d"""\r\n').encode(
                          "utf-8-sig")}[kind])
    command = re.search(r"(convert|unpack) it: (.*)", refusal(read_world, path))[2]
    command = command.replace("python ", f"{sys.executable} ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert [(row["prompt"], row["responses"]) for row in read_world(
        tmp_path / "converted.jsonl")] == [(r["prompt"], {r["response"]: 1.0}) for r in rows]


def test_file_whose_rows_are_no_json_lines_is_refused_with_an_example(tmp_path):
    for content, words in (
            (json.dumps(PAIR, indent=2) * 2, ("spread over several lines", "jq -c .")),
            ("prompt: Say a.\nresponse: a\n", (":1: not a JSON object", '"response": "…"}')),
            ("3\n", (":1: not a JSON object (it is 3)",)), ('"text"', ("not a JSON object",)),
            ("{'prompt': 'x', 'response': 'y'}", ("not a JSON object", '{"prompt": "…"'))):
        (tmp_path / "x").write_text(content, "utf-8")
        message = refusal(read_world, tmp_path / "x")
        assert all(word in message for word in words), message


# ---- Rows of other shapes -----------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
SHAPES = {
    "Alpaca": {"instruction": "Say a.", "input": "", "output": "a"},
    "Alpaca without input": {"instruction": "Say a.", "output": "a"},
    "Dolly": {"instruction": "Say a.", "context": "", "response": "a"},
    "messages": {"messages": TURNS},
    "messages beside a prompt": {"prompt": "Say a.", "messages": TURNS},
    "the SPIN authors'": {"real": TURNS, "generated": TURNS[:1] + [{"role": "assistant",
                                                                      "content": "b"}]},
}


@pytest.mark.parametrize("name", SHAPES)
def test_known_shape_is_read_as_the_pair_that_it_is(name, tmp_path):
    more = {"prompt": "b", "response": "c"}
    for extra in ({}, {"family": "f"}):
        got = read_world(write(tmp_path / "x", SHAPES[name] | extra, more))
        assert got == read_world(write(tmp_path / "x", PAIR | extra, more))
    got = read_world(write(tmp_path / "x", SHAPES[name] | {"split": "heldout"}, more))
    assert [row["split"] for row in got] == ["heldout", "train"]


def test_input_and_context_belong_to_the_prompt(tmp_path):
    rows = read_world(write(tmp_path / "x", {"instruction": "Add.", "input": "1 2", "output": "3"},
                            {"instruction": "Say it.", "context": "a", "response": "b"}))
    assert [row["prompt"] for row in rows] == ["Add.\n1 2", "Say it.\na"]


NO_SHAPE = {  # a second row → what the line says besides file and line
    "Alpaca, output a list": ({"instruction": "x", "output": ["y"]}, "needs a text 'output'"),
    "instruction alone": ({"instruction": "x"}, "needs a text 'response'"),
    "a conversation": ({"messages": TURNS * 2}, "['user', 'assistant', 'user'", "two messages"),
    "a system message": ({"messages": [{"role": "system", "content": "s"}, *TURNS]}, "'system'"),
    "assistant first": ({"messages": TURNS[::-1]}, "'messages' has the roles ['assistant'"),
    "no message": ({"messages": []}, "has the roles []"), "null": ({"real": None}, "roles []"),
    "messages of texts": ({"messages": ["a", "b"]}, "has the roles ['a', 'b']"),
    "content of parts": ({"real": [TURNS[0], {"role": "assistant", "content": [{"text": "a"}]}]},
                         "the content of a message in 'real' is not a text"),
    "ShareGPT": ({"conversations": []}, "the keys here are 'conversations'", '{"prompt": "…"'),
    "question and answer": ({"question": "x", "answer": "y"}, "'question', 'answer'",
                            '{"prompt": "…"'),
    "completion": ({"prompt": "x", "completion": "y"}, 'give "response": a text', "'completion'"),
    "response a number": ({"prompt": "x", "response": 3}, "not a text but 3"),
    "response null": ({"prompt": "x", "response": None}, "not a text but null"),
    "response a list": ({"prompt": "x", "response": ["a", "b"]}, 'not a text but ["a", "b"]'),
    "a list": (["x", "y"], "expected an object, not [", '{"prompt": "…"'),
    "no keys": ({}, "the keys here are none"),
}


@pytest.mark.parametrize("name", NO_SHAPE)
def test_row_of_unknown_shape_is_refused_with_what_was_found(name, tmp_path):
    row, *words = NO_SHAPE[name]
    message = refusal(read_world, write(tmp_path / "x", PAIR, row))
    assert message.startswith(f"{tmp_path / 'x'}:2: ") and len(message) < 400, message
    assert all(word in message for word in words), message


MISSPELT = [("spilt", "split"), ("Split", "split"), ("SPLIT", "split"), (" split", "split"),
            ("splits", "split"), ("respones", "response"), ("Response", "response"),
            ("reponses", "responses"), ("response s", "responses"), ("Prompt", "prompt"),
            ("promt", "prompt"),
            ("famliy", "family"), ("Family", "family")]


@pytest.mark.parametrize("wrong, right", MISSPELT)
def test_misspelt_key_is_refused_with_the_right_one(wrong, right, tmp_path):
    row = {"prompt": "x", "response": "y"} | {right: "heldout"}
    if right == "responses":
        row = {"prompt": "x", "responses": {"y": 1.0}}
    row = {wrong if key == right else key: value for key, value in row.items()}
    message = refusal(read_world, write(tmp_path / "x", PAIR, row))
    assert message == f"{tmp_path / 'x'}:2: unknown key {wrong!r}; did you mean {right!r}?"


def test_other_keys_are_named_once_as_ignored(tmp_path, capsys):
    rows = [PAIR | {"id": 7, "prompt_id": "a", "source": "\x1b"}, {"prompt": "b", "id": 8,
            "response": "c", "response_id": 1, "category": "d"}]
    path = write(tmp_path / "x", *rows)
    assert len(read_world(path)) == 2
    assert capsys.readouterr().out == (
        f"{path}: these keys are ignored: 'id' (first on line 1), 'prompt_id' (first on line 1), "
        f"'source' (first on line 1), 'response_id' (first on line 2), 'category' (first on line "
        f"2)\n")
    read_world(write(path, {"prompt": "b", "responses": {"c": 1.0}, "response_id": 1}))
    assert capsys.readouterr().out == (
        f"{path}: these keys are ignored: 'response_id' (first on line 1)\n")
    read_world(write(path, PAIR, {"instruction": "b", "input": "", "output": "c"}))
    read_world(data.world.WORLD)
    assert capsys.readouterr().out == "", "nothing to say where nothing is ignored"


def test_rows_of_any_shape_only_ever_are_read_or_refused(tmp_path):
    """1000 rows: known shapes with keys taken away, renamed, and given strange values."""
    rng, read, encoding = random.Random(0), 0, load_encoding()
    strange = [None, True, 0, 1e400, "", " ", "a", [], {}, [{}], ["a"], {"a": 1}, {"role": "user"},
               TURNS, [TURNS], [{"role": [], "content": {}}] * 2, "\0", "é" * 3]
    keys = [*{key for row in SHAPES.values() for key in row}, "responses", "split", "spilt", "x"]
    for _ in range(1000):
        row = dict(rng.choice([*SHAPES.values(), PAIR]))
        for _ in range(rng.randrange(4)):
            row[rng.choice(keys)] = rng.choice(strange)
            row.pop(rng.choice(keys), None)
        try:
            rows = read_world(write(tmp_path / "x", row))
            World(rows, encoding, sft_samples=1, seed=0, block_size=99)
            read += 1
        except InputError as error:
            assert str(error).startswith(f"{tmp_path / 'x'}:") and "\n" not in str(error), row
    assert 100 < read < 900, "the rows should reach both sides of the door"


# ---- Both splits, and held-out rows -------------------------------------------------------------

ALIKE = ["What  is café?", " What is café?", "What is café?\n", "What\tis\u00a0café?",
         "What is cafe\u0301?", "What is\u3000café?", "What is caf\u200bé?", "\ufeffWhat is café?",
         "What is café?"]


@pytest.mark.parametrize("x", ALIKE)
@pytest.mark.parametrize("kind", ["pairs", "worlds"])
def test_prompt_in_both_splits_is_refused_in_whatever_form(x, kind, tmp_path):
    responses = {"response": "a"} if kind == "pairs" else {"responses": {"a": 1.0}}
    for first, second in (("train", "heldout"), ("heldout", "train")):
        path = write(tmp_path / "x", PAIR, {"prompt": "What is café?", "split": first} | responses,
                     {"prompt": x, "split": second} | responses)
        message = refusal(read_world, path)
        assert message.startswith(f"{path}:3: ") and "line 2" in message, message
        assert "both splits" in message or x == "What is café?" and kind == "worlds", message
        assert ("white space or Unicode form" in message) == (x != "What is café?"), message


def test_prompts_that_differ_in_more_than_form_may_be_in_both_splits(tmp_path):
    different = ["Join 1 23.", "Join 12 3.", "Join 1² 3.", "join 1 23.", "Join 1 23"]
    rows = read_world(write(tmp_path / "x", *(
        {"prompt": x, "response": "y", "split": ("train", "heldout")[i % 2]}
        for i, x in enumerate(different))))
    assert [row["prompt"] for row in rows] == different
    alike = [{"prompt": x, "response": "y"} for x in ALIKE]  # in one split they are no leak
    assert len(read_world(write(tmp_path / "x", *alike))) == len(set(ALIKE))


def pairs(n):
    return [{"prompt": f"p{i}", "response": "y", "split": "train"} for i in range(n)]


def held(rows) -> set:
    return {row["prompt"] for row in rows if row["split"] == "heldout"}


@pytest.mark.parametrize("n, share, expected", [
    (100, 0.1, 10), (100, 0.25, 25), (7, 0.1, 1), (2, 0.01, 1), (2, 1.0, 1), (10, 1.0, 9)])
def test_share_of_the_prompts_is_held_out_and_one_stays(n, share, expected):
    rows = pairs(n)
    got = hold_out(rows, share, seed=0)
    assert len(held(got)) == expected and held(rows) == set(), "the rows given stay as they were"
    assert [row["prompt"] for row in got] == [row["prompt"] for row in rows]
    assert [row | {"split": "train"} for row in got] == rows


def test_held_out_prompts_depend_on_seed_and_prompts_and_not_on_their_order():
    rows = pairs(50)
    shuffled = random.Random(0).sample(rows, len(rows))
    first = held(hold_out(rows, 0.2, seed=0))
    assert first == held(hold_out(shuffled, 0.2, seed=0)) == held(hold_out(rows, 0.2, seed=0))
    assert first != held(hold_out(rows, 0.2, seed=1))
    times = Counter(x for seed in range(200) for x in held(hold_out(rows, 0.2, seed)))
    assert len(times) == 50 and 12 < min(times.values()) and max(times.values()) < 68, (
        f"40 times each are expected, with σ = 5.7: {times}")


def test_held_out_rows_of_the_file_stay_held_out_and_look_alikes_stay_together():
    rows = [row | {"split": "heldout"} for row in pairs(3)]
    rows += [{"prompt": f"q{i}{blank}", "response": "y", "split": "train"}
             for i in range(10) for blank in ("", " ", "\u200b")]
    for seed in range(20):
        got = held(hold_out(rows, 0.3, seed))
        assert {"p0", "p1", "p2"} <= got and len(got) == 3 + 3 * 3
        assert all((f"q{i}" in got) == (f"q{i} " in got) == (f"q{i}\u200b" in got)
                   for i in range(10))


def test_one_prompt_cannot_be_held_out():
    assert "only one train prompt" in refusal(hold_out, pairs(1), 0.5, 0)


# ---- Tokens -------------------------------------------------------------------------------------

def test_rows_that_are_too_long_are_counted_and_the_longest_named(tmp_path):
    """A prompt of n letters x and ANSWER, "y" and END: n + 3 tokens with single bytes."""
    lengths = [5, 40, 17, 60, 18, 60]
    path = write(tmp_path / "x", *({"prompt": chr(97 + i) * n, "response": "y"}
                                   for i, n in enumerate(lengths)))
    rows, encoding = read_world(path), build_encoding(BYTES)
    message = refusal(World, rows, encoding, 1, 0, 20)
    assert message.startswith("4 of 6 rows exceed 20 tokens; longest 63, line 4: --block-size 63")
    assert "longest 63" in refusal(World, rows, encoding, 1, 0, 62)
    World(rows, encoding, 1, 0, 63)


def test_world_says_whether_p_data_is_known_only_by_its_samples(tmp_path):
    encoding = load_encoding()
    for rows, empirical in (([PAIR], True), ([{"prompt": "x", "responses": {"a": 1.0}}], False),
                            ([{"prompt": "x", "responses": {"a": 1.0}}, PAIR], True),
                            ([SHAPES["Alpaca"]], True)):
        world = World(read_world(write(tmp_path / "x", *rows)), encoding, 4, 0, 32)
        assert world.empirical is empirical


def test_every_file_is_read_as_utf_8_whatever_the_locale(tmp_path):
    """In a folder with an accent, under the C locale without Python's UTF-8 mode."""
    folder = tmp_path / "Üser Ánna"
    folder.mkdir()
    write(folder / "x", *ROWS).write_text(TEXT, "utf-8")
    (folder / "ranks").write_text(LINES, "utf-8")
    code = (f"import sys; sys.path[:0] = {sys.path!r}\n"
            "from data.world import read_world; from data.tokenizer import load_encoding\n"
            "print(ascii(read_world(sys.argv[1])[0]['prompt'])); load_encoding(sys.argv[2])")
    (tmp_path / "code.py").write_text(code, "utf-8")
    done = subprocess.run([sys.executable, "-X", "utf8=0", str(tmp_path / "code.py"),
                           str(folder / "x"), str(folder / "ranks")], text=True,
                          capture_output=True, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
                                                    "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, ascii(ROWS[0]["prompt"]) + "\n"), done.stderr


def test_scripts_write_their_files_byte_for_byte(tmp_path):
    """Both scripts, run in a copy, under the C locale: the committed bytes come out."""
    source = data.world.WORLD.parent
    for name in ("errors.py", "foreign.py", "instructions.py", "tokenizer.py"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    for name in ("instructions.py", "tokenizer.py"):
        subprocess.run([sys.executable, "-X", "utf8=0", name], cwd=tmp_path, check=True,
                       env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    for name in ("world.jsonl", "toy.tiktoken"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()


def test_read_text_calls_the_file_by_the_name_it_is_given(tmp_path):
    assert refusal(read_text, tmp_path / "none", "--data x").startswith("--data x: cannot be read")
