"""What a run leaves in --out, and how an interrupted one goes on: bit for bit, on a CPU.

Everything is saved at each report, seconds apart, and each file is replaced whole or not at all.
So a run may be killed at any moment: `--resume` finds the last report, drops the rows of
metrics.jsonl that were written after it, and repeats what came after it, alike.

    config.json      the settings, and the names of the files that belong to this run
    metrics.jsonl    two rows (train, heldout) for each report and for each finished iteration
    latest.pt        the learner as it was at the last report: this is what --resume reads
    iteration_t.pt   the policy p_t: weights, sizes, tokenizer and p_data; sample.py reads it

Reading order: `save_policy`, `load_policy` → `Run`: it opens the folder, restores the learner,
and takes a report → `owned_files`.
"""
import hashlib
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch

from data.errors import InputError
from data.metrics import likeliest
from data.run.figures import draw_convergence, draw_gif, open_window
from data.run.files import append, guarded, load, lock, save, write
from data.run.options import flag_of
from data.run.parallel import gather, on_process_0
from data.run.report import print_closing_table, print_progress
from data.tokenizer import build_encoding, dump_ranks, parse_ranks
from model import GPT, GPTConfig

# Flags that may differ between a run and its resumption.
FREE = ("out", "resume", "overwrite", "iters", "device", "threads", "show")


# --- one policy ----------------------------------------------------------------------------------

def save_policy(path, model: GPT, world):
    """Weights, sizes, tokenizer and p_data in one file, so that sample.py needs nothing else."""
    encoding = world.encoding
    save(path, {"model": model.state_dict(), "config": vars(model.config),
                "ranks": dump_ranks(encoding._mergeable_ranks), "pattern": encoding._pat_str,
                "world": json.dumps({row["prompt"]: row["responses"] for row in world.rows})})


def load_policy(path):
    """Returns (model, tiktoken.Encoding, {prompt: {response: p_data}}), or raises InputError."""
    saved = load(path)
    with guarded(path):
        weights = saved["model"]
        config = GPTConfig(**saved["config"])
        if not all(type(size) is int and size > 0 for size in vars(config).values()):
            raise ValueError("its sizes are not numbers")
        if (config.vocab_size, config.n_embd) != tuple(weights["wte.weight"].shape) or (
                config.block_size != len(weights["wpe.weight"]) or config.n_layer > len(weights)
                or config.n_embd % config.n_head):
            raise ValueError("its sizes and its weights disagree")  # forged, they fill memory
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            raise ValueError("its weights are not finite")
        encoding = build_encoding(parse_ranks(saved["ranks"], str(path)), saved["pattern"])
        if encoding.n_vocab != config.vocab_size:
            raise ValueError("its tokenizer and its weights disagree")
        model = GPT(config)
        model.load_state_dict(weights)
        world = {x: {y: float(p) for y, p in responses.items()}
                 for x, responses in json.loads(saved["world"]).items()}
        encoding.encode_ordinary("".join(world))  # a forged pattern panics here, or never
        return model, encoding, world


# --- one run -------------------------------------------------------------------------------------

def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def settings(config, world) -> dict:
    """What a resumed run must share with the one that was interrupted: flags and files."""
    rows = [{key: value for key, value in row.items() if key != "line"} for row in world.rows]
    tokens = world.encoding._pat_str + dump_ranks(world.encoding._mergeable_ranks)
    weights = digest(Path(config.init).read_bytes()) if config.init else ""
    return {name: value for name, value in asdict(config).items() if name not in FREE} | {
        "data": digest(json.dumps(rows).encode()), "encoding": digest(tokens.encode()),
        "init": weights}


class Run:
    """The folder --out, open for one run: `with Run(config, world) as run`.

    run.stage is the index t of the policy p_t that is being made: 0 during SFT.
    """
    def __init__(self, config, world, device="cpu"):
        self.config, self.world, self.out, self.device = config, world, Path(config.out), device
        self.latest, self.metrics = self.out / "latest.pt", self.out / "metrics.jsonl"
        self.settings, self.lock, self.began = settings(config, world), None, time.time()
        self.shown = [world.rows[p] | {"responses": likeliest(world.rows[p]["responses"])}
                      for p in world.shown()]

    def __enter__(self):
        try:
            self.begin()
        except BaseException:  # a notebook keeps the traceback, which would keep the lock
            self.__exit__(None)
            raise
        return self

    def begin(self):
        """Open the folder, or raise InputError; then all processes read the same state."""
        if len(set(map(json.dumps, gather(self.settings)))) > 1:
            raise InputError("the processes that torchrun started differ in flags or data: give "
                             "all of them the same")
        opened = on_process_0(self.open)
        shared = self.latest.is_file() and digest(self.latest.read_bytes()) == opened
        if not all(gather(shared)):
            raise InputError(f"--out {self.out}: not the same folder for all processes that "
                             f"torchrun started; name one that all of them share")
        self.state = load(self.latest)
        with guarded(self.metrics):
            self.rows = [json.loads(line) for line in self.metrics.read_text("utf-8").splitlines()]
        self.stage, self.began = self.state["stage"], self.began - self.state["seconds"]
        if self.config.show:
            on_process_0(lambda: open_window(self.out))

    def __exit__(self, kind, *_):
        if self.lock:
            self.lock.close()
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt("; go on with the same flags and --resume") from None

    def open(self) -> str:
        """Process 0 checks the folder and prepares it. Returns the digest of latest.pt."""
        self.check_folder()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / "lock", "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot be written ({error.strerror}); name "
                             f"another folder") from None
        if not lock(self.lock):
            raise InputError(f"--out {self.out}: another run is writing to it; wait for it, or "
                             f"name another folder")
        self.check_folder()  # once more: a run may have begun and ended since
        if self.config.resume:
            state = self.check_resumable()
            self.write_config([*files_of(self.config.iters), *owned_files(self.out)])
            rows = self.metrics.read_bytes().splitlines(keepends=True)[:state["rows"]]
        else:
            for name in set(owned_files(self.out)) - {"config.json", "lock"}:
                (self.out / name).unlink(missing_ok=True)
            self.write_config(files_of(self.config.iters))
            state, rows = {"stage": 0, "step": 0, "seconds": 0.0}, []
        write(self.metrics, b"".join(rows))
        save(self.latest, state | {"settings": self.settings, "rows": len(rows)})
        return digest(self.latest.read_bytes())

    def check_folder(self):
        """Raise InputError if --out holds what this run must not touch."""
        old, resume = owned_files(self.out), self.config.resume
        if resume and not self.latest.is_file():
            how = "with --overwrite" if "config.json" in old else "without --resume"
            raise InputError(f"--resume: there is no latest.pt in {self.out}; start {how}")
        if not resume and not self.config.overwrite and "config.json" in old:
            raise InputError(f"--out {self.out}: holds a run already; --resume it, --overwrite "
                             f"it, or name another folder")
        for name in files_of(self.config.iters):
            if name not in old and os.path.lexists(self.out / name):
                raise InputError(f"--out {self.out}: {name} is there already, and no run of "
                                 f"train.py wrote it; name another folder")
        if self.out.resolve() == Path(self.config.data).resolve().parent:
            raise InputError(f"--out {self.out}: holds the data file; name a folder of its own")

    def write_config(self, files):
        """config.json: the settings, versions, what the figures show, and the run's own files."""
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "tiktoken": tiktoken.__version__}
        whole = asdict(self.config) | {"versions": versions, "shown": self.shown, "files": files,
                                       "empirical": self.world.empirical}
        write(self.out / "config.json", json.dumps(whole, indent=2).encode())

    def check_resumable(self) -> dict:
        """The state in latest.pt, if it belongs to a run with these settings on this world."""
        state = load(self.latest)
        was = state.get("settings")
        if type(was) is not dict or was.keys() != self.settings.keys():
            raise InputError(f"{self.latest}: written by another version of train.py, or by "
                             f"something else; start afresh in another --out")
        for name, value in self.settings.items():
            if was[name] != value:
                of_file = "other content" if name in ("data", "encoding", "init") else was[name]
                raise InputError(f"{flag_of(name)} {getattr(self.config, name)}: the run in "
                                 f"{self.out} was started with {of_file}; resume with the same, "
                                 f"or name another --out")
        with guarded(self.latest):
            for name, kind in {"stage": int, "step": int, "rows": int, "seconds": float}.items():
                if type(state[name]) is not kind or state[name] < 0:
                    raise ValueError(f"{name} is {state[name]!r}")
        if not self.metrics.is_file() or self.metrics.read_bytes().count(b"\n") < state["rows"]:
            raise InputError(f"{self.metrics}: rows are missing; put it back, or start afresh "
                             f"with --overwrite")
        return state

    def unfinished(self, iterations):
        """Those t = 0, 1, … for which p_{t+1} is not saved yet."""
        return [t for t in iterations if t + 1 >= self.stage]

    def policy(self, t):
        """The policy p_t, as iteration_t.pt holds it; on the run's device, in its precision."""
        path, config = self.out / f"iteration_{t}.pt", self.config
        policy = load_policy(path)[0].to(self.device)
        if policy.config != GPTConfig(self.world.encoding.n_vocab, config.block_size,
                                      config.n_layer, config.n_head, config.n_embd):
            raise InputError(f"{path}: its sizes are not this run's; put the right file back, or "
                             f"start afresh with --overwrite")
        policy.block_dtype = getattr(torch, self.config.precision)
        return policy

    def restore(self, learner, steps) -> int:
        """Give the learner its saved state, if there is one. Returns how many steps are done."""
        step, saved = self.state.get("step", 0), self.state.get("learner")
        self.state = {}  # the stages after this one start afresh
        self.stage_began, self.first_step = time.time(), step
        if saved or step:
            with guarded(self.latest):
                if not 0 < step < steps:
                    raise ValueError(f"step {step} of {steps}")
                for name, part in learner.items():
                    part.load_state_dict(saved[name])
                for name in ("player", "averaged"):
                    if not all(bool(p.isfinite().all()) for p in learner[name].parameters()):
                        raise ValueError("its weights are not finite")
        return step

    def report(self, step, steps, found, learner, policy, weights):
        """Append rows, print and save. The last report of a stage also saves the policy."""
        finished = step == steps
        rows = [{"event": event, "method": self.config.method, "iteration": self.stage,
                 "step": step, "split": split, **numbers,
                 "seconds": round(time.time() - self.began, 2)}
                for event in (["step", "iteration"] if finished else ["step"])
                for split, numbers in found.items()]
        self.rows += rows
        pace = (time.time() - self.stage_began) / (step - self.first_step)
        print_progress(self.stage, step, steps, found, weights, pace * (steps - step),
                       self.world.empirical)
        if finished:
            state = {"stage": self.stage + 1, "step": 0}
        else:
            parts = {name: part.state_dict() for name, part in learner.items()}
            state = {"stage": self.stage, "step": step, "learner": parts}
        on_process_0(lambda: self.save(rows, state, policy if finished else None))
        self.stage = state["stage"]

    def save(self, rows, state, policy=None):
        """Process 0 writes what a report brings. latest.pt comes last: it makes the rest valid."""
        append(self.metrics, rows)
        if policy is not None:
            save_policy(self.out / f"iteration_{self.stage}.pt", policy, self.world)
            picture = draw_convergence(self.rows, self.shown, self.world.empirical)
            write(self.out / "convergence.png", picture)
        save(self.latest, state | {"settings": self.settings, "rows": len(self.rows),
                                   "seconds": time.time() - self.began})

    def close(self):
        """Draw the moving picture and print the closing table."""
        on_process_0(lambda: write(self.out / "convergence.gif", draw_gif(
            self.rows, self.shown, self.world.empirical)))
        print_closing_table(self.rows, self.out, time.time() - self.began, self.world.empirical)


def files_of(iters) -> list[str]:
    """Every name that a run of so many iterations writes in --out."""
    names = ["config.json", "metrics.jsonl", "latest.pt", "convergence.png", "convergence.gif",
             *(f"iteration_{t}.pt" for t in range(iters + 1))]
    return ["lock", *names, *(f"tmp.{name}" for name in names)]


def owned_files(out) -> list[str]:
    """The names that an earlier run says are its own, in config.json; none if there is no run."""
    try:
        names = json.loads((out / "config.json").read_text("utf-8"))["files"]
        return sorted(set(names).intersection(files_of(10_000)))
    except (OSError, ValueError, KeyError, TypeError):
        began = (out / "lock").is_file() and not (out / "lock").stat().st_size
        return ["lock", "tmp.config.json"] if began else []  # killed before config.json was whole
