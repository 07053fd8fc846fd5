"""What a run leaves in --out, and how an interrupted one goes on: at most 20 s of work are lost.

Reading order: `settings` → `open_run` → `save_latest` → `load_latest`. (`rescue.py` says when.)
"""
import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch

from data.checkpoint import digest, load, save, write
from data.options import flag_of
from data.reader import InputError
from data.tokenizer import dump_ranks

# What may differ between a run and its resumption.
FREE = ("out", "resume", "overwrite", "iters", "device")


def sha256(data) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


def settings(config, world) -> dict:
    """What a resumed run must share with the one that was interrupted: flags and files."""
    return {name: value for name, value in asdict(config).items() if name not in FREE} | {
        "data": sha256(json.dumps(world.rows)),
        "encoding": sha256(world.encoding._pat_str + dump_ranks(world.encoding._mergeable_ranks))}


def open_run(config, world) -> dict:
    """Prepare --out; returns the state to go on from, {"iteration": 0, "seconds": 0} if new."""
    out, rows = Path(config.out), []
    state = load_latest(out, config, world) if config.resume else {"iteration": 0, "seconds": 0.0}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tmp.writable").touch()
        (out / "tmp.writable").unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another "
                         f"folder") from None
    if config.resume:
        rows = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:state["rows"]]
    elif not config.overwrite and any(f.is_file() and f.stat().st_size for f in (
            out / "metrics.jsonl", out / "latest.pt")):
        raise InputError(f"--out {out}: holds a run already; --resume it, --overwrite it, or "
                         f"name another folder")
    else:
        for name in ("latest.pt", "previous.pt", "convergence.png", "convergence.gif"):
            (out / name).unlink(missing_ok=True)
    for old in [*out.glob("tmp.*"), *out.glob("iteration_*.pt")]:  # of what was cut short
        if old.name not in written(state["iteration"]):
            old.unlink()
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "tiktoken": tiktoken.__version__}
    about = {"shown": [world.rows[p] for p in world.shown], "counting_kl": world.counting_kl}
    whole = asdict(config) | {"versions": versions, "world": about}
    write(out / "config.json", json.dumps(whole, indent=2, ensure_ascii=False).encode(
        errors="backslashreplace"))
    write(out / "metrics.jsonl", b"".join(rows))
    if not config.resume:
        save_latest(config, world, state)  # from now on --resume goes on
    return state


def written(iteration) -> list[str]:
    """The checkpoints that there are when an iteration begins."""
    return [f"iteration_{t}.pt" for t in range(iteration)]


def save_latest(config, world, state: dict):
    """What --resume needs besides iteration_{t−1}.pt, from which y' is drawn again, alike."""
    out = Path(config.out)
    if (out / "latest.pt").exists():
        write(out / "previous.pt", (out / "latest.pt").read_bytes())
    rows = (out / "metrics.jsonl").read_bytes()
    save(out / "latest.pt", state | {
        "settings": settings(config, world), "rows": rows.count(b"\n"), "metrics": sha256(rows),
        "written": [digest(out / name) for name in written(state["iteration"])]})


def load_latest(out, config, world) -> dict:
    """latest.pt, if it is whole and belongs to a run with these settings on this world."""
    path, again = out / "latest.pt", out / "previous.pt"
    if not path.exists():
        raise InputError(f"--resume: there is no latest.pt in {out}; start without --resume")
    try:
        state = load(path, world.device)
    except InputError as error:
        offer = f"; to go on from the save before, mv {again} {path}" if again.exists() else ""
        raise InputError(f"{error}{offer}") from None
    was, now = state.get("settings"), settings(config, world)
    if not complete(state) or was.keys() != now.keys():
        raise InputError(f"{path}: written by another version of train.py, or by something else; "
                         f"start afresh in another --out")
    for name, value in now.items():
        if was[name] != value:
            files = name in ("data", "encoding")
            raise InputError(f"{flag_of(name)} {getattr(config, name)}: the run in {out} was "
                             f"started with {'other content' if files else was[name]}; resume "
                             f"with the same, or name another --out")
    for name, kept in zip(written(state["iteration"]), state["written"]):
        if digest(out / name) != kept:
            raise InputError(f"{out / name}: missing, or not the one that this run wrote; put it "
                             f"back, or start afresh with --overwrite")
    metrics = out / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else []
    if sha256(b"".join(lines[:state["rows"]])) != state["metrics"]:
        raise InputError(f"{metrics}: not as this run wrote it; put it back, or start afresh with "
                         f"--overwrite")
    return state


def complete(state) -> bool:
    """Whether a dict from a file is a state as `save_latest` writes it."""
    kinds = {"iteration": int, "rows": int, "seconds": float, "settings": dict, "metrics": str,
             "written": list}
    if state.keys() & {"step", "player", "averaged", "optimizer"}:  # all of them, then
        kinds |= {"step": int, "player": dict, "averaged": dict, "optimizer": dict}
    return (all(isinstance(state.get(name), kind) for name, kind in kinds.items())
            and min(state["iteration"], state["rows"], state.get("step", 0)) >= 0
            and len(state["written"]) == state["iteration"])
