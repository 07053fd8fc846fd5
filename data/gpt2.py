"""GPT-2's published weights as the start of a run: --init model.safetensors (see data/GPT2.md).

GPT-2 stores its matrices transposed (as "Conv1D"). Its last token, <|endoftext|>, becomes END:
GPT-2 knows already that a text is over there. ANSWER is new; its row is the mean of all rows.
"""
import json

import torch

from data.errors import InputError
from model import GPT, GPTConfig

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool}  # these two for masks
MASKS = (".attn.bias", ".attn.masked_bias")  # what is causal; the model makes its own
CONV1D = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """Eight bytes give the header's length; the header is JSON; then come the numbers, mapped."""
    size = path.stat().st_size
    file, tensors = torch.from_file(str(path), size=size, dtype=torch.uint8), {}
    end = start = 8 + int.from_bytes(file[:8].tolist(), "little")
    if start > size:
        raise ValueError(f"its header would end at byte {start} of {size}; it may be cut")
    header = json.loads(bytes(file[8:start].numpy()))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, count = DTYPES.get(entry["dtype"]), torch.Size(entry["shape"]).numel()
        first, last = (start + offset for offset in entry["data_offsets"])
        if not (dtype and end <= first <= last <= size and last - first == count * dtype.itemsize):
            raise ValueError(f"{name} {entry} ends after byte {size}, overlaps, or is not floats")
        tensors[name], end = file[first:last].clone().view(dtype).view(entry["shape"]), last
    return tensors


def config_of(weights, beside, n_vocab) -> GPTConfig:
    """Sizes from the shapes; n_head from config.json beside the file, else 64 numbers a head."""
    (V, D), T = weights["wte.weight"].shape, len(weights["wpe.weight"])
    says = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    n_head, gelu = says.get("n_head", 0 if D % 64 else D // 64), says.get("activation_function")
    if n_head not in range(1, D + 1) or D % n_head or gelu not in (None, "gelu_new"):
        raise ValueError(f"config.json: {n_head} heads cannot share {D} numbers, or {gelu!r}")
    if V != n_vocab:
        raise ValueError(f"it has {V - 1} tokens, --encoding makes {n_vocab - 1}; GPT-2's is gpt2")
    return GPTConfig(V, T, sum(name.endswith("ln_1.bias") for name in weights), int(n_head), D)


def load_gpt2(path, n_vocab) -> GPT:
    """A float32 GPT with a file's weights, for an encoding of n_vocab tokens; or InputError."""
    try:
        found = read_safetensors(path) if path.suffix == ".safetensors" else (
            torch.load(path, map_location="cpu", weights_only=True))
        if sum(w.nbytes for w in found.values()) > 2 * path.stat().st_size:  # 2: a tied head
            raise ValueError("its tensors claim more than it holds")
        weights = {name.removeprefix("transformer."): (w.T if name.endswith(CONV1D) else w)
                   .float().contiguous() for name, w in found.items() if not name.endswith(MASKS)}
        wte_VD = weights["wte.weight"]
        if not weights.pop("lm_head.weight", wte_VD).equal(wte_VD):
            raise ValueError("its head is not its embedding, as GPT-2's is")
        weights["wte.weight"] = torch.cat([wte_VD[:-1], wte_VD.mean(0, keepdim=True), wte_VD[-1:]])
        with torch.device("meta"):  # shapes alone: a forged size costs no memory
            player = GPT(config_of(weights, path.with_name("config.json"), n_vocab))
        player.load_state_dict(weights, assign=True)  # all names and shapes must agree
        if not all(p.isfinite().all() for p in player.parameters()):
            raise ValueError("a weight is not finite")
        return player
    except Exception as error:  # a forged file may raise anything
        raise InputError(f"--init {path}: not GPT-2's weights ({type(error).__name__}: "
                         f"{str(error)[:250]})") from None
