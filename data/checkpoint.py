"""A checkpoint that cannot be half there, cannot be damaged unnoticed and cannot run code.

A file is replaced whole or not at all, and ends with the SHA-256 of what precedes it.
Reading order: `write` → `save` → `load`.
"""
import hashlib
import io
import os
import pickle
from pathlib import Path

import torch

from data.parallel import rank
from data.reader import InputError


def write(path, data: bytes):
    """Replace a file whole or not at all: whoever dies meanwhile leaves the old one."""
    if rank():
        return  # process 0 alone writes
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror}); what was saved before is "
                         f"whole: make room, then --resume") from None


def save(path, content: dict):
    """torch.save, then the digest. torch.load ignores what stands behind its archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def load(path, device="cpu") -> dict:
    """Read what `save` wrote; InputError if it is damaged or something else. Runs no code in it."""
    try:
        data = Path(path).read_bytes()
        content = torch.load(io.BytesIO(data), weights_only=True, map_location=device)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(f"{path}: not a checkpoint that train.py wrote ({reason})") from None
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InputError(f"{path}: damaged, its digest does not match its content")
    return content
