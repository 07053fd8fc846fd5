"""GPT-2's weights and tokenizer: read as GPT-2's own code reads them, or refused in one line.

The oracles are files written by hand, byte by byte, and the model as plain functions
(`gpt2_by_hand`); where transformers is installed, also its own GPT-2.

`python tests/test_gpt2.py FOLDER` writes what data/GPT2.md measures with: 200 invented pairs, and
a model of GPT-2's vocabulary with random weights, two layers and width 128.
"""
import hashlib
import json
import random
import struct
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

from conftest import gpt2_by_hand, tiny_gpt
from data.errors import InputError
from data.gpt2 import CONV1D, load_gpt2
from data.tokenizer import PATTERNS, PROBE, dump_ranks, load_encoding, train_bpe
from model import KVCache
from processes import here, refused, rows_of
from sample import RoomyCache, generate

V, T, L, H, D = 300, 32, 2, 2, 12  # of the files in these tests; V counts <|endoftext|>
ROOT = Path(__file__).resolve().parents[1]


# ---- Files, written by hand ---------------------------------------------------------------------

def published(prefix="", seed=0, n_embd=D) -> dict[str, torch.Tensor]:
    """A GPT-2 of random weights as it is published: matrices transposed, masks beside them."""
    weights = tiny_gpt(V, T, L, H, n_embd, seed).state_dict()
    tensors = {prefix + name: w.T.contiguous() if name.endswith(CONV1D) else w
               for name, w in weights.items()}
    for i in range(L):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, T, T).tril()
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
         torch.uint8: "U8", torch.bool: "BOOL"}


def entries_of(tensors):
    """The header of a safetensors file, and the bytes after it."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, w in tensors.items():
        raw = w.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[w.dtype], "shape": list(w.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return header, body


def write(path, header, body=b"", heads=H):
    """A safetensors file, and config.json beside it where `heads` is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    if heads:
        path.with_name("config.json").write_text(json.dumps({"n_head": heads}), "utf-8")
    return path


def save(path, tensors, heads=H):
    return write(path, *entries_of(tensors), heads=heads)


def seen(model, seed=0):
    """Some tokens, and the logits of the tokens that GPT-2 knows, <|endoftext|> last."""
    tokens_BT = torch.randint(0, V - 1, (3, T), generator=torch.Generator().manual_seed(seed))
    logits_BTV = model(tokens_BT)
    return tokens_BT, torch.cat([logits_BTV[..., :V - 1], logits_BTV[..., V:]], dim=-1)


# ---- What is read -------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_published_file_gives_the_same_logits(tmp_path, kind, prefix):
    tensors, path = published(prefix), tmp_path / kind
    save(path, tensors)  # also config.json
    if path.suffix == ".bin":
        tied = tensors | {"lm_head.weight": tensors[f"{prefix}wte.weight"]}
        torch.save(tied, path, _use_new_zipfile_serialization=kind != "legacy.bin")
    tokens_BT, logits_BTV = seen(load_gpt2(path, V + 1))
    want_BTV = gpt2_by_hand(tiny_gpt(V, T, L, H, D), tokens_BT)
    assert torch.allclose(logits_BTV, want_BTV, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_formats_become_float32(tmp_path, dtype):
    rounded = {name: w.to(dtype) for name, w in published().items()}
    model = load_gpt2(save(tmp_path / "a.safetensors", rounded), V + 1)
    want = rounded["h.1.mlp.c_fc.weight"].T.float()
    assert torch.equal(model.h[1].mlp.c_fc.weight, want)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_masks_of_any_format_are_ignored(tmp_path):
    tensors = published() | {"h.0.attn.bias": torch.ones(1, 1, T, T, dtype=torch.bool)}
    load_gpt2(save(tmp_path / "a.safetensors", tensors), V + 1)


def test_odd_header_length_is_read_too(tmp_path):
    """Then no number stands at an address that a float32 could be read from in place."""
    header, body = entries_of(published())
    text = json.dumps(header).encode()
    for blanks in range(4):
        model = load_gpt2(write(tmp_path / "a.safetensors", text + b" " * blanks, body), V + 1)
        assert torch.equal(model.wpe.weight, published()["wpe.weight"])


def test_endoftext_becomes_end_and_answer_is_the_mean_row(tmp_path):
    wte_VD = published()["wte.weight"]
    head = load_gpt2(save(tmp_path / "a.safetensors", published()), V + 1).head_weight
    assert torch.equal(head[:V - 1], wte_VD[:-1]) and torch.equal(head[V], wte_VD[-1])
    assert torch.allclose(head[V - 1], wte_VD.mean(0), atol=1e-6)


def test_heads_are_64_wide_unless_config_json_says_otherwise(tmp_path):
    path = save(tmp_path / "a.safetensors", published(n_embd=128), heads=None)
    assert load_gpt2(path, V + 1).config.n_head == 2
    save(path, published(n_embd=128), heads=4)
    assert load_gpt2(path, V + 1).config.n_head == 4


def test_weights_are_the_model_s_own_and_not_the_file_s(tmp_path):
    path = save(tmp_path / "a.safetensors", published())
    before, model = path.read_bytes(), load_gpt2(path, V + 1)
    with torch.no_grad():
        for p in model.parameters():
            assert p.is_contiguous() and p.requires_grad
            p.zero_()
    assert path.read_bytes() == before
    path.write_bytes(b"")
    assert all(bool((p == 0).all()) for p in model.parameters())


# ---- What is refused ----------------------------------------------------------------------------

def changed(**entries):
    """A header with some entries changed or (None) left out, and its body."""
    header, body = entries_of(published())
    for name, change in entries.items():
        name = name.replace("__", ".")
        header[name] = header.get(name, {}) | change if change else header.pop(name) and None
    return {name: entry for name, entry in header.items() if entry}, body


def bytes_of(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


WHOLE = bytes_of(*entries_of(published()))
END = len(entries_of(published())[1])
HOSTILE = {
    "empty": (b"", "not GPT-2's weights"),
    "a few bytes": (b"abc", "header would end"),
    "header beyond the file": (bytes_of(b"{}", length=3), "header would end at byte 11 of 10"),
    "header of 2^64 bytes": (bytes_of(b"{}", length=2**64 - 1), "may be cut"),
    "cut in the header": (WHOLE[:500], "may be cut"),
    "cut in the numbers": (WHOLE[:-100], "h.1.attn.bias", "ends after byte"),
    "no JSON": (bytes_of(b"{]"), "JSON"),
    "JSON too deep": (bytes_of(b"[" * 100_000), "RecursionError"),
    "a list": (bytes_of([1, 2]), "not GPT-2's weights"),
    "nothing in it": (bytes_of({}), "wte.weight"),
    "no entry": (bytes_of({"wte.weight": 3}), "not GPT-2's weights"),
    "offset before the numbers": (changed(wpe__weight={"data_offsets": [-8, 0]}), "wpe.weight"),
    "offset beyond the file": (changed(wpe__weight={"data_offsets": [END, END + T * D * 4]}),
                               "wpe.weight", "ends after byte"),
    "offsets turned round": (changed(wpe__weight={"data_offsets": [100, 0]}), "wpe.weight"),
    "offsets are no numbers": (changed(wpe__weight={"data_offsets": ["a", "b"]}), "TypeError"),
    "offsets are fractions": (changed(wpe__weight={"data_offsets": [0.5, 8.5]}), "not GPT-2's"),
    "offsets of 100 digits": (changed(wpe__weight={"data_offsets": [0, 10**99]}), "wpe.weight"),
    "overlap": (changed(wpe__weight={"data_offsets": [0, T * D * 4]}), "overlaps"),
    "unknown dtype": (changed(wpe__weight={"dtype": "F8_E4M3"}), "wpe.weight", "not floats"),
    "another dtype": (changed(wpe__weight={"dtype": "F64"}), "wpe.weight"),
    "shape too large": (changed(wpe__weight={"shape": [T, D + 1]}), "wpe.weight"),
    "shape overflows": (changed(wpe__weight={"shape": [2**62, 2**62]}), "not GPT-2's"),
    "shape turned round": (changed(wpe__weight={"shape": [D, T]}), "size mismatch"),
    "shape with a joker": (changed(wpe__weight={"shape": [-1, -D]}), "not GPT-2's"),
    "a name is missing": (changed(h__1__ln_2__bias=None), "h.1.ln_2.bias"),
    "a block is missing": (changed(**{f"h__0__{n.replace('.', '__')}": None for n in (
        "ln_1.weight", "ln_1.bias")}), "h.0.ln_1.weight"),
    "a name too many": (changed(h__0__crossattention__bias={
        "dtype": "F32", "shape": [0], "data_offsets": [END, END]}), "h.0.crossattention.bias"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_gets_one_line(tmp_path, name):
    content, *words = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    save(path, published())
    path.write_bytes(content if isinstance(content, bytes) else bytes_of(*content))
    assert all(word in refusal(path) for word in words), refusal(path)


def refusal(path, n_vocab=V + 1) -> str:
    with pytest.raises(InputError) as error:
        load_gpt2(path, n_vocab)
    line = str(error.value)
    assert "\n" not in line and line.startswith(f"--init {path}: not GPT-2's weights")
    return line


def test_random_changes_of_a_file_are_refused_or_read(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    save(path, published())
    for _ in range(150):
        content = bytearray(WHOLE)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(2600)] = rng.randrange(256)
        path.write_bytes(content[:rng.choice([len(content), rng.randrange(len(content))])])
        try:
            load_gpt2(path, V + 1)
        except InputError:
            pass


class Attack:
    """What a pickle would run if it were trusted."""
    def __reduce__(self):
        return print, ("attacked",)


def test_hostile_state_dict_gets_one_line(tmp_path, capsys):
    path = tmp_path / "a.bin"
    save(path, published())  # for config.json
    for content in (published() | {"wte.weight": Attack()}, Attack(), [1], 3, {},
                    published() | {"wte.weight": 3}, {"model": published()},
                    published() | {"wte.weight": torch.zeros(1).expand(V, 10**12)},
                    published() | {"wte.weight": torch.zeros(V, D).to_sparse()},
                    published() | {"lm_head.weight": torch.zeros(V, D)}):
        torch.save(content, path)
        refusal(path)
    torch.save(published(), path)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:len(whole) // 2], b"\x80\x02", b"GGUF" + whole):
        path.write_bytes(content)
        refusal(path)
    assert "attacked" not in capsys.readouterr().out


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    for bad in (float("nan"), float("inf")):
        tensors = published()
        tensors["h.1.mlp.c_proj.weight"][3, 4] = bad
        assert "not finite" in refusal(save(tmp_path / "a.safetensors", tensors))


def test_config_json_must_be_gpt2_s(tmp_path):
    path, beside = save(tmp_path / "a.safetensors", published()), tmp_path / "config.json"
    for text in ("{", "[]", '{"n_head": 5}', '{"n_head": "2"}', '{"n_head": 0}', '{"n_head": -2}',
                 "{}", '{"n_head": 2, "activation_function": "relu"}'):
        beside.write_text(text, "utf-8")
        refusal(path)


def test_missing_file_a_folder_and_the_wrong_tokenizer_are_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "Is a directory" in refusal(tmp_path)
    path = save(tmp_path / "a.safetensors", published())
    assert "it has 300 tokens, --encoding makes 511; GPT-2's is gpt2" in refusal(path, 512)


# ---- The tokenizer ------------------------------------------------------------------------------

PAGE = (ROOT / "README.md").read_text("utf-8") + PROBE


def test_rank_file_with_gpt2_s_pattern_cuts_as_gpt2_does(tmp_path):
    merges = [b"12", b"re", b"'re", b"  ", b"\n\n", b" t", b"he", b" the", b"\n        "]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    (tmp_path / "ranks").write_text(dump_ranks(ranks), "utf-8")
    by_hand = tiktoken.Encoding("by hand", mergeable_ranks=ranks, special_tokens={}, pat_str=(
        # as OpenAI published it with the weights; tiktoken's form is a faster one
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"))
    got = load_encoding(str(tmp_path / "ranks"), "gpt2")
    for text in (PAGE, "we're 12345  x\n\n  it's", "  ", "\t\tdef f():\n        return 1\n   \n"):
        assert got.encode_ordinary(text) == by_hand.encode_ordinary(text)
    assert got.encode_ordinary(PAGE) != load_encoding(str(tmp_path / "ranks")).encode_ordinary(PAGE)


def test_gpt2_pattern_is_the_one_in_tiktoken():
    from tiktoken_ext.openai_public import r50k_pat_str
    assert PATTERNS["gpt2"] == r50k_pat_str


def without_network(monkeypatch, cache):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # tiktoken's own memory

    def no_network(*_, **__):
        raise ConnectionError("no network\nin this test")
    monkeypatch.setattr("requests.get", no_network)


def test_named_encoding_comes_from_the_cache_without_network(tmp_path, monkeypatch):
    """An encoding of 260 tokens stands for r50k_base: same place in the cache, other digest."""
    import tiktoken_ext.openai_public as public
    ranks = train_bpe([PAGE[:500]], 260)
    content = dump_ranks(ranks).encode()
    address, = (word for word in public.r50k_base.__code__.co_consts if "://" in str(word))
    (tmp_path / hashlib.sha1(address.encode()).hexdigest()).write_bytes(content)
    load = public.load_tiktoken_bpe
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda url, expected_hash: load(
        url, hashlib.sha256(content).hexdigest()))
    base = public.r50k_base
    monkeypatch.setattr("tiktoken.registry.ENCODING_CONSTRUCTORS", {
        "r50k_base": lambda: base() | {"explicit_n_vocab": None}})
    without_network(monkeypatch, tmp_path)
    encoding = load_encoding("r50k_base")
    assert encoding._mergeable_ranks == ranks and encoding._pat_str == PATTERNS["gpt2"]


def test_missing_cache_says_how_to_fill_it(tmp_path, monkeypatch, capsys):
    without_network(monkeypatch, tmp_path / "cache")
    line = refused(capsys, ["--encoding", "gpt2", "--out", str(tmp_path / "out")], "gpt2",
                   "no network", "TIKTOKEN_CACHE_DIR=ranks python -c", "get_encoding('gpt2')")
    assert "\n" not in line.strip()


# ---- A run from a file --------------------------------------------------------------------------

def start(tmp_path, *more, out="out"):
    """The flags of a short run on pairs, from a file that fits data/toy.tiktoken."""
    weights = tiny_gpt(511, 64, 1, 2, 16).state_dict()
    for name in weights:
        if "wte" in name or "wpe" in name:
            weights[name] *= 0.1
    save(tmp_path / "model.safetensors", {name: w.T.contiguous() if name.endswith(CONV1D) else w
                                          for name, w in weights.items()})
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {w}.", "response": f"{w}, {w}"}) + "\n"
                            for w in ("one", "two", "three", "four", "five", "six")), "utf-8")
    return ["--init", str(tmp_path / "model.safetensors"), "--data", str(data), "--out",
            str(tmp_path / out), "--iters", "2", "--sft-steps", "4", "--steps", "4", "--reports",
            "2", "--negatives", "2", "--batch-size", "8", "--heldout", "0.3", *more]


def test_run_starts_from_the_file_and_takes_its_sizes(tmp_path, capsys):
    status, out, err = here(capsys, start(tmp_path, "--sft-lr", "1e-12", "--n-layer", "7"))
    assert status == 0, err
    assert ("its sizes replace those of the flags: --n-layer 1, --n-head 2, --n-embd 16, "
            "--block-size 64") in out
    p_0 = torch.load(tmp_path / "out" / "iteration_0.pt", weights_only=True)["model"]
    want = load_gpt2(tmp_path / "model.safetensors", 512).state_dict()
    assert all(torch.allclose(p_0[name], want[name], atol=1e-6) for name in want)
    settings = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert settings["n_layer"] == 1 and settings["block_size"] == 64
    assert here(capsys, ["--out", str(tmp_path / "out"), "--samples", "3"], "sample.py")[0] == 0


def test_resuming_needs_the_same_file(tmp_path, capsys):
    flags = start(tmp_path)
    assert here(capsys, [*flags, "--iters", "1"])[0] == 0
    assert here(capsys, [*flags, "--resume"])[0] == 0
    refused(capsys, flags[2:] + ["--resume"], "--n-layer", "resume with the same")
    other = tiny_gpt(511, 64, 1, 2, 16, seed=1).state_dict()
    save(tmp_path / "model.safetensors", {name: w.T.contiguous() if name.endswith(CONV1D) else w
                                          for name, w in other.items()})
    refused(capsys, [*flags, "--resume"], "--init", "other content")


def test_bad_file_is_refused_before_the_old_run_is_touched(tmp_path, capsys):
    flags = start(tmp_path)
    assert here(capsys, [*flags, "--iters", "0"])[0] == 0
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(capsys, [*flags, "--overwrite"], "--init", "not GPT-2's weights")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


# ---- Sampling long responses --------------------------------------------------------------------

def test_cache_with_room_holds_the_same_keys_as_the_plain_one():
    """`generate` takes it for long responses: rows leave, and the room is used up and made anew."""
    model, plain, roomy = tiny_gpt(block_size=90), KVCache(), RoomyCache()
    rng = torch.Generator().manual_seed(0)
    for step in range(60):
        B = 4 if step < 30 else 2
        tokens_BT = torch.randint(0, 4, (B, 3 if step == 0 else 1), generator=rng)
        with torch.no_grad():
            assert torch.equal(model(tokens_BT, plain), model(tokens_BT, roomy)), step
        if step == 29:
            keep = torch.tensor([3, 1])
            plain, roomy = plain.rows(keep), roomy.rows(keep)
            assert type(roomy) is RoomyCache
    assert roomy.layers[0][0].shape[2] < roomy.width + 17


def test_long_responses_are_the_same_with_and_without_room(monkeypatch):
    def sampled():
        return generate(tiny_gpt(50, 128), [[0, 1], [2], [0, 1, 2]] * 4, max_new_tokens=100,
                        end_token=3, generator=torch.Generator().manual_seed(0))
    with_room = sampled()
    monkeypatch.setattr("sample.RoomyCache", KVCache)
    assert with_room == sampled() and max(map(len, with_room)) > 50 > min(map(len, with_room))


# ---- Against Hugging Face's own GPT-2 -----------------------------------------------------------

def test_logits_equal_those_of_transformers_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50257, n_layer=2, n_embd=128, n_head=4)).eval()
    for name, p in theirs.named_parameters():
        p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    tokens_BT = torch.randint(0, 50257, (2, 40))
    want_BTV = theirs(tokens_BT).logits
    known = torch.tensor([*range(50256), 50257])
    for name in ("model.safetensors", "pytorch_model.bin"):
        ours = load_gpt2(tmp_path / name, 50258)
        got_BTV = ours(torch.where(tokens_BT == 50256, 50257, tokens_BT))[..., known]
        assert torch.allclose(got_BTV, want_BTV, atol=1e-4)


# ---- What data/GPT2.md measures with ------------------------------------------------------------

CITIES = "Porto Ghent Turin Graz Lyon Cork Malmö Basel Gdansk Bergen".split()
DISHES = {"a lentil soup": "lentils, two carrots, an onion and a bay leaf",
          "flat bread": "flour, warm water, salt and a spoon of oil",
          "a potato salad": "small potatoes, mustard, vinegar and chives",
          "rice pudding": "round rice, milk, sugar and a stick of cinnamon"}
THINGS = {
    "bicycle chain": "wipe it with a dry rag, put one drop of oil on each link and turn the pedals "
                     "backwards until the noise is gone",
    "kitchen knife": "hold the blade at twenty degrees, draw it over a wet stone ten times on each "
                     "side and rinse it in warm water",
    "garden hose": "cut out the cracked part, warm both ends in hot water and join them with a "
                   "brass coupling and two clips",
    "desk lamp": "pull the plug, let the bulb cool down, and replace the switch if the wire behind "
                 "it looks brown"}
PEOPLE = "Nadia Omar Lucia Tomas Ines Pavel Greta Hugo Amira Felix".split()


def pair(rng) -> dict:
    """One invented instruction and its response, of 20 to 120 tokens together."""
    a, b, n, m = rng.choice(PEOPLE), rng.choice(CITIES), rng.randint(3, 40), rng.randint(2, 9)
    dish, thing = rng.choice(list(DISHES)), rng.choice(list(THINGS))
    least = next(d for d in range(2, n + 1) if n % d == 0)  # n's least divisor but 1
    day = rng.choice("Monday Tuesday Wednesday Thursday Friday".split())
    prompt, response = rng.choice([
        (f"{a} buys {m} boxes of {n} pencils and gives {n - 2} away. How many are left?",
         f"{m} boxes of {n} pencils are {m * n} pencils. Without the {n - 2} that {a} gives away, "
         f"{m * n - n + 2} are left."),
        (f"How do I cook {dish} for {m} people?",
         f"You need {DISHES[dish]}, enough for {m}. Wash and cut everything, put it into a pot and "
         f"let it simmer for {n + 20} minutes. Stir now and then, taste it, and serve it while it "
         f"is warm."),
        (f"Write a short message to {a}: the meeting in {b} moves to {day} at {m} o'clock.",
         f"Dear {a},\n\nour meeting in {b} has to move. Could you come on {day} at {m} o'clock "
         f"instead? If that does not suit you, please call me by noon.\n\nBest wishes"),
        (f"My {thing} needs care. What should I do?",
         f"With a {thing}, {THINGS[thing]}. It takes about {n} minutes, and you should do it again "
         f"after {m} months."),
        (f"Name three things to see in {b} within {m} hours.",
         f"1. The old town of {b}, on foot.\n2. The market hall, where you can have lunch.\n3. The "
         f"view from the hill, best after {m} in the afternoon."),
        (f"Is {n} a prime number? Explain.",
         f"Yes. No number from 2 to {n - 1} divides {n} without a remainder, so {n} has no divisor "
         f"but 1 and itself." if least == n else
         f"No. A prime number has no divisor but 1 and itself, and {n} is {least} times "
         f"{n // least}.")])
    return {"prompt": prompt, "response": response}


def invented_pairs(count=200, seed=0) -> list[dict]:
    """Pairs with prompts that all differ; some ask for two things."""
    rng, pairs = random.Random(seed), {}
    while len(pairs) < count:
        row, other = pair(rng), pair(rng)
        two = {key: f"{row[key]}{gap}{other[key]}" for key, gap in
               (("prompt", " And then: "), ("response", "\n\n"))}
        if rng.random() < 0.4 and len(two["prompt"] + two["response"]) < 480:
            row = two
        pairs.setdefault(row["prompt"], row)
    return list(pairs.values())


def random_model() -> dict[str, torch.Tensor]:
    """Weights of GPT-2's own initialisation, as published: V = 50257, two layers, width 128."""
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    return {name: w.T.contiguous() if name.endswith(CONV1D) else w
            for name, w in GPT(GPTConfig(50257, 1024, 2, 2, 128)).state_dict().items()}


def test_invented_pairs_are_what_the_page_says():
    pairs = invented_pairs()
    assert len(pairs) == 200 == len({row["prompt"] for row in pairs})
    assert pairs == invented_pairs() and len({row["response"] for row in pairs}) > 150
    assert all(60 < len(row["prompt"] + row["response"]) < 700 for row in pairs)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n"
                                                for row in invented_pairs()), "utf-8")
    save(folder / "model.safetensors", random_model())
