"""GPT-2's published weights as the start of a run: --init model.safetensors (see data/GPT2.md).

What changes between GPT-2's file and model.py:

    c_attn.weight [D, 3D]  →  [3D, D]: GPT-2 multiplies x @ W ("Conv1D"), nn.Linear x @ Wᵀ
    wte.weight's last row  →  END's row: GPT-2 knows <|endoftext|> as the end of a text
    (no such token)        →  ANSWER's row, before END's: the mean of all rows

Reading order: `read_safetensors` → `read_file` → `our_layout` → `config_of` → `load_gpt2`.
Dimensions: V tokens in the file, D width.
"""
import json
import pickle
import re
from pathlib import Path

import torch

from data import InputError
from model import GPT, GPTConfig

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool}  # the last two occur in masks
CONV1D = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # what is causal; model.py makes its own
WRAPPERS = re.compile(r"\b(_orig_mod|module|model|transformer)\.")  # what others put before names

COMPUTES = {  # field of config.json: its values for which model.py computes the same function
    "model_type": ["gpt2"],
    "architectures": [["GPT2LMHeadModel"], ["GPT2Model"], None],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast",
                            "gelu_accurate"],  # five names of one function
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True]}

OTHERS = {  # part of a name in a file: what such a file is, and what to do
    "model_args": "a checkpoint of nanoGPT, whose GELU is another; give Hugging Face's GPT-2",
    "config": "an iteration that train.py saved; sample.py reads it, --resume goes on with its run",
    "lora_": "a LoRA adapter alone; merge it into its model (merge_and_unload) and save that",
    "score.": "a classifier; give the language model that it was made from",
    "weight_map": "the list of a model's parts; save it with a larger max_shard_size, in one file"}


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """Eight bytes give the header's length; the header is JSON; then come the numbers."""
    size, tensors = path.stat().st_size, {}
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise EOFError("the header is cut")
        header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        # The format allows no gaps and no overlaps, so the file is read from front to end.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            if file.tell() != start + first or start + last > size:
                raise EOFError("the numbers are cut")
            numbers = bytearray(file.read(last - first))
            tensors[name] = torch.frombuffer(numbers, dtype=DTYPES[entry["dtype"]]).view(
                entry["shape"])
    return tensors


def read_file(path) -> dict[str, torch.Tensor]:
    """Tensors by name; no code in the file runs. InputError says what another kind of file is."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors, whatever its name is
        found = read_safetensors(path)
    elif path.suffix == ".json":
        found = json.loads(path.read_text("utf-8"))
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    names = [WRAPPERS.sub("", str(name)) for name in found]
    for part, kind in OTHERS.items():
        if any(part in name for name in names):
            raise InputError(f"this is {kind}")
    for needed in ("wte.weight", "wpe.weight"):
        if needed not in names:
            raise InputError(f"this is not a whole GPT-2: {needed} is missing; give its state "
                             f"dict, model.safetensors (this has {str(names)[:80]})")
    if sum(w.nbytes for w in found.values()) > 2 * path.stat().st_size:  # 2: a head, stored once
        raise EOFError("the tensors claim more than the file holds")
    return found


def our_layout(found) -> dict[str, torch.Tensor]:
    """The weights as model.py names and lays them out, in float32; the tokens are still GPT-2's."""
    weights = {WRAPPERS.sub("", name): (w.T if name.endswith(CONV1D) else w).float().contiguous()
               for name, w in found.items() if not name.endswith(MASKS)}
    for name, w in weights.items():
        if not w.isfinite().all():
            raise InputError(f"{name!r} is not finite everywhere; give an earlier checkpoint")
    if not weights.pop("lm_head.weight", weights["wte.weight"]).equal(weights["wte.weight"]):
        raise InputError("its head, lm_head.weight, is not its embedding, wte.weight, as it is in "
                         "GPT-2; model.py has one matrix for both")
    return weights


def config_of(weights, beside) -> GPTConfig:
    """Sizes from the shapes. Heads: config.json's, else one for 64 numbers."""
    (V, D), block_size = weights["wte.weight"].shape, len(weights["wpe.weight"])
    n_layer = sum(name.endswith("ln_1.bias") for name in weights)
    says = dict(json.loads(beside.read_text("utf-8"))) if beside.is_file() else {}
    sizes = {"vocab_size": [V], "n_positions": [block_size], "n_layer": [n_layer], "n_embd": [D],
             "n_inner": [4 * D, None]}
    for field, values in (COMPUTES | sizes).items():
        if says.get(field, values[0]) not in values:
            raise InputError(f"config.json beside it: {field} is {repr(says[field])[:60]}; start "
                             f"from a model in which it is {values[0]!r}")
    n_head = says.get("n_head", D // 64)
    if n_head not in range(1, D + 1) or D % n_head:
        raise InputError(f"{repr(n_head)[:20]} heads cannot share {D} numbers; n_head in a "
                         f"config.json beside it says how many it has")
    return GPTConfig(V + 1, block_size, n_layer, int(n_head), D)


def load_gpt2(path, n_vocab) -> GPT:
    """A float32 GPT with a file's weights, for an encoding of n_vocab tokens, ANSWER and END too.

    Raises InputError.
    """
    path = Path(path)
    try:
        weights = our_layout(read_file(path))
        wte_VD = weights["wte.weight"]
        if len(wte_VD) + 1 != n_vocab:
            raise InputError(f"it has {len(wte_VD)} tokens, --encoding makes {n_vocab - 1} with "
                             f"END; GPT-2's 50257 are --encoding gpt2; a vocabulary that was "
                             f"enlarged or padded cannot be used")
        with torch.device("meta"):  # shapes without memory, for the weights are the file's
            model = GPT(config_of(weights, path.with_name("config.json")))
        weights["wte.weight"] = torch.cat([wte_VD[:-1], wte_VD.mean(0, keepdim=True), wte_VD[-1:]])
        ours, theirs = ({name: tuple(w.shape) for name, w in tensors.items()}
                        for tensors in (model.state_dict(), weights))
        if ours != theirs:
            name, _ = min(ours.items() ^ theirs.items())
            raise InputError(f"{name!r} is {theirs.get(name, 'missing')} in the file (or is it one "
                             f"part of several?), {ours.get(name, 'unknown')} in GPT-2")
        model.load_state_dict(weights, assign=True)
        return model
    except InputError as error:
        problem = error
    except (FileNotFoundError, IsADirectoryError):
        problem = "no such file, or a folder; give a file such as gpt2/model.safetensors"
    except pickle.UnpicklingError:  # its message advises to let the file run its code
        problem = ("this holds Python objects, which could run code, or is not PyTorch's; give "
                   "model.safetensors, or what torch.save(model.state_dict(), …) writes")
    except Exception as error:  # a file that is cut may raise anything
        problem = (f"it or config.json beside it cannot be read ({type(error).__name__}): fetch "
                   f"them anew; what came may be cut, another format, a web page or a Git LFS "
                   f"pointer")
    raise InputError(f"--init {path}: {problem}")
