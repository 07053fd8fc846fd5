"""What a run leaves in --out, and how an interrupted one goes on: at most 10 s of work are lost.

Reading order: `open_run` → `load_latest`, `save_latest` → `record` → `Rescue`.
"""
import hashlib
import json
import platform
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch

from data.checkpoint import load, save, write
from data.options import flag_of
from data.parallel import rank
from data.reader import InputError

# What may differ between a run and its resumption.
FREE = ("out", "resume", "overwrite", "iters", "device")


def settings(config, world) -> dict:
    """What a resumed run must share with the one that was interrupted, the data included."""
    rows = json.dumps(world.rows).encode()
    return {name: value for name, value in asdict(config).items() if name not in FREE} | {
        "data": hashlib.sha256(rows).hexdigest()}


def open_run(config, world) -> dict:
    """Prepare --out; returns the state to go on from, {"iteration": 0, "seconds": 0} if new."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another "
                         f"folder") from None
    state, rows = {"iteration": 0, "seconds": 0.0}, []
    if config.resume:
        state = load_latest(out, config, world)
        rows = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:state["rows"]]
    elif (out / "metrics.jsonl").exists() and not config.overwrite:
        raise InputError(f"--out {out}: holds a run already; --resume it, --overwrite it, or "
                         f"name another folder")
    else:
        for old in [*out.glob("iteration_*.pt"), out / "latest.pt", out / "previous.pt"]:
            old.unlink(missing_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "tiktoken": tiktoken.__version__}
    about = {"shown": [world.rows[p] for p in world.shown], "counting_kl": world.counting_kl}
    whole = asdict(config) | {"versions": versions, "world": about}
    write(out / "config.json", json.dumps(whole, indent=2, ensure_ascii=False).encode())
    write(out / "metrics.jsonl", b"".join(rows))
    return state


def load_latest(out, config, world) -> dict:
    """latest.pt, if it belongs to a run with these settings on this world."""
    path, again = out / "latest.pt", out / "previous.pt"
    if not path.exists():
        raise InputError(f"--resume: there is no latest.pt in {out}; start without --resume")
    try:
        state = load(path, world.device)
    except InputError as error:
        offer = f"; to go on from the save before, mv {again} {path}" if again.exists() else ""
        raise InputError(f"{error}{offer}") from None
    was, now = state.get("settings"), settings(config, world)
    if not isinstance(was, dict) or set(was) != set(now):
        raise InputError(f"{path}: written by another version of train.py; start afresh in "
                         f"another --out")
    for name, value in now.items():
        if was[name] != value:
            what = f" {value}" if name != "data" else ": other rows"
            raise InputError(f"{flag_of(name)}{what}: the run in {out} was started with "
                             f"{was[name] if name != 'data' else 'different ones'}; resume with "
                             f"the same, or name another --out")
    return state


def save_latest(config, world, state: dict):
    """What --resume needs besides iteration_{t−1}.pt, from which y' is drawn again, alike."""
    if rank():
        return
    out = Path(config.out)
    if (out / "latest.pt").exists():
        write(out / "previous.pt", (out / "latest.pt").read_bytes())
    rows = (out / "metrics.jsonl").read_bytes().count(b"\n")
    save(out / "latest.pt", state | {"settings": settings(config, world), "rows": rows})


def record(config, event, t, step, found, seconds):
    """Append one row a split to metrics.jsonl."""
    if rank():
        return
    rows = [{"event": event, "method": config.method, "iteration": t, "step": step,
             "split": split, **numbers, "seconds": round(seconds, 2)}
            for split, numbers in found.items()]
    try:
        with open(Path(config.out) / "metrics.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise InputError(f"{config.out}/metrics.jsonl: cannot be written ({error.strerror}); make "
                         f"room, then --resume") from None


class Rescue:
    """Says when to save: every 10 s, and on Ctrl-C, which waits until the step is done."""
    def __enter__(self):
        self.last, self.interrupted, self.before = time.monotonic(), False, None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def interrupt(self, *_):
        if self.interrupted:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.interrupted = True

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def save(self, config, world, state, began, now=False):
        """save_latest, if it is time; then pass the Ctrl-C on."""
        if now or self.interrupted or time.monotonic() - self.last > 10:
            save_latest(config, world, state | {"seconds": time.time() - began})
            self.last = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt
