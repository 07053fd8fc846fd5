"""Files that are whole or not there, and that run no code: any file of a run, and a saved policy.

Reading order: `write` → `save`, `load` → `save_policy`, `load_policy`.
"""
import io
import json
import os
from pathlib import Path

import torch

from data import InputError
from data.tokenizer import build_encoding, dump_ranks, parse_ranks
from model import GPT, GPTConfig


def write(path, data: bytes):
    """Replace a file whole or not at all. Whoever is killed meanwhile leaves the old one."""
    part = Path(path).with_name(f"tmp.{Path(path).name}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); what was saved "
                         f"before is whole: make room, or end the other train.py that writes "
                         f"there; then --resume") from None


def save(path, content: dict):
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def load(path) -> dict:
    """Read what `save` wrote, onto the CPU. Runs no code that the file may hold.

    Raises InputError if the file is missing, damaged or something else.
    """
    try:
        return dict(torch.load(path, weights_only=True, map_location="cpu"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch raises whatever the damage leads to
        raise InputError(f"{path}: damaged, or not written by train.py "
                         f"({type(error).__name__})") from None


def save_policy(path, model: GPT, world):
    """Weights, sizes, tokenizer and p_data in one file, so that sample.py needs nothing else."""
    rows = {row["prompt"]: {"responses": row["responses"], "split": row["split"],
                            "empirical": world.empirical} for row in world.rows}
    save(path, {"model": model.state_dict(), "config": vars(model.config),
                "ranks": dump_ranks(world.encoding._mergeable_ranks),
                "pattern": world.encoding._pat_str, "world": json.dumps(rows)})


def load_policy(path):
    """Returns (model, tiktoken.Encoding, {prompt: its row of the world}).

    Raises InputError for a file that save_policy did not write.
    """
    saved = load(path)
    try:
        model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(saved["model"])  # all names and shapes must agree
        encoding = build_encoding(parse_ranks(saved["ranks"], path), saved["pattern"])
        if encoding.n_vocab != model.config.vocab_size:
            raise ValueError("its tokenizer and its weights disagree")
        return model, encoding, json.loads(saved["world"])
    except InputError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(f"{path}: not a policy that train.py wrote "
                         f"({type(error).__name__}: {reason})") from None
