"""GPT-2's weights: read as Hugging Face's GPT-2 reads them, or refused in one line.

The oracles are files written by hand, byte by byte, and `their_logits`: Hugging Face's GPT-2 as
plain functions of what the file holds.
"""
import json
import math
import struct

import pytest
import torch

from conftest import gpt2_logits
import train
from data import InputError
from data.gpt2 import load_gpt2

V, T, L, H, D = 300, 32, 2, 2, 12  # of the files in these tests; V counts <|endoftext|>


# ---- Files, and what they compute ---------------------------------------------------------------

def published(n_vocab=V, block_size=T, n_layer=L, n_embd=D, scale=0.4) -> dict[str, torch.Tensor]:
    """A GPT-2 of random weights as it is published: matrices [in, out], masks beside them."""
    tensors, rng = {}, torch.Generator().manual_seed(0)

    def add(name, *shape):
        tensors[name] = scale * torch.randn(shape, generator=rng)
    add("wte.weight", n_vocab, n_embd)
    add("wpe.weight", block_size, n_embd)
    norms = ["ln_f"]
    for i in range(n_layer):
        for name, n_in, n_out in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1),
                                  ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
            add(f"h.{i}.{name}.weight", n_in * n_embd, n_out * n_embd)
            add(f"h.{i}.{name}.bias", n_out * n_embd)
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, block_size, block_size).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor([-1e4])
    for name in norms:
        add(f"{name}.weight", n_embd)
        tensors[f"{name}.weight"] += 1
        add(f"{name}.bias", n_embd)
    return tensors


def their_logits(w, tokens_BT, n_head=H):
    """Hugging Face's GPT-2, from a file's tensors as they are: its "Conv1D" is x @ W + b."""
    return gpt2_logits(w, L, n_head, tokens_BT,
                       lambda x, name: x @ w[f"{name}.weight"] + w[f"{name}.bias"])


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
         torch.uint8: "U8", torch.bool: "BOOL"}


def save(path, tensors, blanks=0, **config):
    """A safetensors file; config.json beside it, which says that there are H heads."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, w in tensors.items():
        raw = w.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[w.dtype], "shape": list(w.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode() + b" " * blanks
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    path.with_name("config.json").write_text(json.dumps({"n_head": H} | config), "utf-8")
    return path


def assert_same_logits(model, tensors, n_head=H):
    tokens_BT = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    ours_BTV = model(torch.where(tokens_BT == V - 1, V, tokens_BT))  # <|endoftext|> is END
    known_V = [*range(V - 1), V]  # all but ANSWER
    theirs_BTV = their_logits({name: w.float() for name, w in tensors.items()}, tokens_BT, n_head)
    assert torch.allclose(ours_BTV[..., known_V], theirs_BTV, atol=1e-4)


# ---- What is read -------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "transformer.", "_orig_mod.transformer.", "module."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_published_file_gives_hugging_faces_logits(tmp_path, name, prefix):
    tensors, path = published(), tmp_path / name
    named = {prefix + key: w for key, w in tensors.items()}
    save(path, named)
    if path.suffix == ".bin":  # its head is the embedding, stored once
        head = {prefix.removesuffix("transformer.") + "lm_head.weight": tensors["wte.weight"]}
        torch.save(named | head, path, _use_new_zipfile_serialization=name != "legacy.bin")
    assert_same_logits(load_gpt2(path, V + 1), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_formats_become_float32(tmp_path, dtype):
    rounded = {name: w.to(dtype) for name, w in published().items()}
    model = load_gpt2(save(tmp_path / "a.safetensors", rounded), V + 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_logits(model, rounded)


@pytest.mark.parametrize("blanks", range(4))
def test_numbers_are_read_wherever_the_header_ends(tmp_path, blanks):
    tensors = published() | {"h.0.attn.bias": torch.ones(1, 1, 3, 3, dtype=torch.bool)}
    assert_same_logits(load_gpt2(save(tmp_path / "a.safetensors", tensors, blanks), V + 1), tensors)


def test_endoftext_becomes_end_and_answer_is_the_mean_row(tmp_path):
    wte_VD = published()["wte.weight"]
    head = load_gpt2(save(tmp_path / "a.safetensors", published()), V + 1).head_weight
    assert torch.equal(head[:V - 1], wte_VD[:-1]) and torch.equal(head[V], wte_VD[-1])
    assert torch.allclose(head[V - 1], wte_VD.mean(0), atol=1e-6)


def test_heads_are_those_of_config_json_else_64_wide(tmp_path):
    tensors = published(n_embd=128)
    path = save(tmp_path / "a.safetensors", tensors, n_head=4)
    assert_same_logits(load_gpt2(path, V + 1), tensors, n_head=4)
    (tmp_path / "config.json").unlink()
    assert_same_logits(load_gpt2(path, V + 1), tensors, n_head=2)


def test_weights_can_be_trained_and_the_file_stays_as_it_is(tmp_path):
    path = save(tmp_path / "a.safetensors", published())
    before, model = path.read_bytes(), load_gpt2(path, V + 1)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None and p.is_contiguous()
            p.zero_()
    assert path.read_bytes() == before


# ---- What is refused ----------------------------------------------------------------------------

def refusal(path, *words, n_vocab=V + 1):
    """The one line with which a file is refused; it must say all the words."""
    with pytest.raises(InputError) as error:
        load_gpt2(path, n_vocab)
    line = str(error.value)
    assert line.startswith(f"--init {path}: ") and line.isprintable(), line
    assert "weights_only" not in line and all(word in line for word in words), line


CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": L, "n_embd": D,
          "n_positions": T, "n_ctx": T, "vocab_size": V, "n_inner": None, "resid_pdrop": 0.1,
          "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
          "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
          "reorder_and_upcast_attn": False, "add_cross_attention": False,
          "tie_word_embeddings": True, "eos_token_id": 50256}


@pytest.mark.parametrize("field, value", [
    ("activation_function", "gelu_pytorch_tanh"), ("activation_function", "gelu_fast"),
    ("reorder_and_upcast_attn", True), ("n_inner", 4 * D), ("architectures", ["GPT2Model"])])
def test_config_json_of_the_same_function_is_read(tmp_path, field, value):
    tensors = published()
    path = save(tmp_path / "a.safetensors", tensors, **CONFIG | {field: value})
    assert_same_logits(load_gpt2(path, V + 1), tensors)


@pytest.mark.parametrize("field, value", [
    ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("n_inner", 5 * D),
    ("activation_function", "gelu"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6),
    ("add_cross_attention", True), ("tie_word_embeddings", False), ("model_type", "gpt_neo"),
    ("architectures", ["LlamaForCausalLM"]), ("n_layer", 1), ("vocab_size", V + 1)])
def test_config_json_of_another_function_is_refused_by_the_field_s_name(tmp_path, field, value):
    path = save(tmp_path / "a.safetensors", published(), **CONFIG | {field: value})
    refusal(path, "config.json", f"{field} is {value!r}")


@pytest.mark.parametrize("n_head", [5, 0, -2, "2", None])
def test_heads_that_do_not_fit_are_refused(tmp_path, n_head):
    refusal(save(tmp_path / "a.safetensors", published(), n_head=n_head), "heads", "config.json")


def state(change) -> dict:
    """A published state dict after a change that a function makes."""
    tensors = published()
    change(tensors)
    return tensors


MODULE = torch.nn.Linear(2, 2)
BROUGHT = {  # what people bring as a file of torch.save, and words that the line must have
    "nanoGPT's checkpoint": ({"model": published(), "model_args": {}, "config": {}}, "nanoGPT"),
    "our own iteration": ({"model": published(), "config": {}}, "train.py", "sample.py"),
    "a LoRA adapter": ({"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight":
                        torch.zeros(2, 2)}, "LoRA", "merge_and_unload"),
    "a classifier": (published() | {"score.weight": torch.zeros(2, 8)}, "classifier"),
    "a pickled module": (MODULE, "Python objects", "model.state_dict()"),
    "a training checkpoint": ({"model_state_dict": published(), "epoch": 3}, "model_state_dict"),
    "another architecture": (MODULE.state_dict(), "wte.weight is missing", "bias"),
    "no tensors": ({"wte.weight": 3, "wpe.weight": 3}, "cannot be read"),
    "a list": ([1, 2], "wte.weight"), "a number": (3, "cannot be read"),
    "a part of the model": (state(lambda w: w.pop("h.1.ln_2.bias")), "h.1.ln_2.bias", "missing"),
    "a name too many": (state(lambda w: w.update({"more\x1b[2J": w["ln_f.bias"]})), "more"),
    "another shape": (state(lambda w: w.update({"wpe.weight": w["wpe.weight"].T})), "wpe.weight"),
    "a head of its own": (state(lambda w: w.update({"lm_head.weight": w["wte.weight"] + 1})),
                          "lm_head.weight", "wte.weight"),
    "not a number": (state(lambda w: w["h.1.mlp.c_proj.weight"][3].fill_(math.nan)), "not finite"),
    "a huge claim": (state(lambda w: w.update({"wte.weight": torch.zeros(1).expand(V, 10**5)})),
                     "cannot be read")}


@pytest.mark.parametrize("kind", BROUGHT)
def test_other_file_of_torch_is_named_for_what_it_is(tmp_path, kind):
    content, *words = BROUGHT[kind]
    torch.save(content, tmp_path / "a.pt")
    (tmp_path / "config.json").write_text(json.dumps({"n_head": H}), "utf-8")
    refusal(tmp_path / "a.pt", *words)


class Attack:
    """What a pickle would run if it were trusted."""
    def __reduce__(self):
        return print, ("attacked",)


def test_no_code_in_a_file_runs(tmp_path, capsys):
    torch.save(published() | {"wte.weight": Attack()}, tmp_path / "a.bin")
    refusal(tmp_path / "a.bin", "could run code")
    assert "attacked" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_file_that_is_cut_or_of_another_kind_is_refused(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", published())
    if suffix == "bin":
        torch.save(published(), path)
    whole = path.read_bytes()
    pointer, page = b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html><html>"
    for content in (b"", b"abc", pointer, page, whole[:500], whole[:-4], b"GGUF" + whole):
        path.write_bytes(content)
        refusal(path)


def test_safetensors_header_that_claims_too_much_is_refused(tmp_path):
    path = save(tmp_path / "a.safetensors", published())
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for offsets in ([0, 10**15], [0, T * D * 4], [T * D * 4, 0], [-8, T * D * 4 - 8], ["a", "b"]):
        header = json.loads(whole[8:8 + length])
        header["wpe.weight"]["data_offsets"] = offsets
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length:])
        refusal(path, "cannot be read")


def test_missing_file_a_list_of_parts_and_the_wrong_tokenizer_are_named(tmp_path):
    refusal(tmp_path / "none.safetensors", "no such file")
    refusal(tmp_path, "no such file", "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}', "utf-8")
    refusal(tmp_path / "model.safetensors.index.json", "max_shard_size")
    path = save(tmp_path / "a.safetensors", published())
    refusal(path, "300 tokens", "511", "--encoding gpt2", n_vocab=512)
    (tmp_path / "config.json").write_text("{", "utf-8")
    refusal(path, "config.json")


# ---- A run from a file --------------------------------------------------------------------------

def config_for(folder, **more):
    """A short run from a file that fits data/toy.tiktoken, on six pairs."""
    save(folder / "model.safetensors", published(511, 64, 1, 16, scale=0.1))
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"Say {w}.", "response": f"{w}, {w}"}) + "\n"
        for w in ("one", "two", "three", "four", "five", "six")), "utf-8")
    return train.Config(**dict(
        init=str(folder / "model.safetensors"), data=str(folder / "pairs.jsonl"),
        out=str(folder / "out"), iters=0, sft_steps=2, reports=1, heldout=0.3) | more)


def test_run_starts_from_the_file_and_takes_its_sizes(tmp_path):
    train.main(config_for(tmp_path, sft_lr=1e-12, n_layer=7))
    saved = torch.load(tmp_path / "out" / "iteration_0.pt", weights_only=True)
    want = load_gpt2(tmp_path / "model.safetensors", 512)
    assert saved["config"] == vars(want.config)
    for name, w in want.state_dict().items():
        assert torch.allclose(saved["model"][name], w, atol=1e-6)
    refusal(tmp_path / "out" / "iteration_0.pt", "train.py", "--resume")


def test_bad_file_is_refused_before_the_old_run_is_touched(tmp_path):
    train.main(config_for(tmp_path))
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    config = config_for(tmp_path, overwrite=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="--init .* cannot be read"):
        train.main(config)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
