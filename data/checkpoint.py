"""A checkpoint that cannot be half there, cannot be damaged unnoticed and cannot run code.

A file is replaced whole or not at all, and ends with the SHA-256 of what precedes it.
Reading order: `replacing` → `write` → `save` → `load`.
"""
import hashlib
import io
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from data.reader import InputError


@contextmanager
def replacing(path):
    """Yield a name to write to; then it replaces `path`. Whoever dies meanwhile leaves the old."""
    part = Path(path).with_name(f"tmp.{Path(path).name}")  # the same suffix: it tells the format
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); what was saved "
                         f"before is whole: make room, then --resume") from None


def write(path, data: bytes):
    """Replace a file whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(data)


def save(path, content: dict):
    """torch.save, then the digest. torch.load ignores what stands behind its archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def digest(path) -> bytes | None:
    """What `save` put at the end of a file; None if there is no such file."""
    return Path(path).read_bytes()[-32:] if Path(path).is_file() else None


def load(path, device="cpu") -> dict:
    """Read what `save` wrote; InputError if it is damaged or something else. Runs no code in it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InputError(f"{path}: damaged, or not written by train.py: its digest does not match")
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location=device)
        if type(content) is not dict:
            raise TypeError("not a dict")
    except Exception as error:  # a digest is easily forged, and a forged file can fail anywhere
        reason = str(error).split("\n")[0][:120]
        raise InputError(f"{path}: not a checkpoint that train.py wrote ({reason})") from None
    return content
