"""Files that are whole or not there, that cannot be damaged unnoticed and that run no code.

Reading order: `write` → `save`, `load` → `guarded` → `append` → `lock`.
"""
import hashlib
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from data.errors import InputError


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
                         f"before is whole: make room, then --resume") from None


def save(path, content: dict):
    """torch.save, and behind it the SHA-256 of what it wrote, which torch.load does not mind."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def load(path) -> dict:
    """Read what `save` wrote, onto the CPU. Runs no code that the file may hold.

    Raises InputError if the file is missing, damaged or something else.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InputError(f"{path}: damaged, or not written by train.py: its digest does not match")
    with guarded(path):
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        return dict(content)


@contextmanager
def guarded(path):
    """Turn whatever a forged file sets off while it is read into one line.

    The tokenizer's library panics with a BaseException, hence the wide net.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a file that train.py wrote "
                         f"({type(error).__name__}: {reason})") from None


def append(path, rows):
    """Rows at the end of metrics.jsonl. A torn row does no harm: latest.pt does not count it."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, then "
                         f"--resume") from None


def lock(file) -> bool:
    """Hold an open file until this process ends, however it ends. False if another holds it."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
