"""What a run leaves in --out, and how an interrupted one goes on: bit for bit, on a CPU.

    config.json      the settings
    metrics.jsonl    a row for each report and split, and for each finished iteration and split
    latest.pt        all that --resume needs: the learner as it was, and the rows until then
    iteration_t.pt   the policy p_t: weights, sizes, tokenizer and p_data; sample.py reads it
    convergence.png, convergence.gif

latest.pt is written at each report, and every 30 seconds in between; each file is replaced whole or
not at all. So a run may be killed at any moment: --resume goes on from there, and repeats what came
after it.

Reading order: `Run`: it opens the folder, restores the learner, takes a report.
"""
import hashlib
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch

from data import InputError
from data.metrics import evaluate, likeliest
from data.run.console import print_closing_table, print_progress, print_start, print_step
from data.run.figures import Window, draw_convergence, draw_gif
from data.run.files import load, load_policy, save, save_policy, write
from data.run.options import flag_of, flags_of_the_run
from data.run.parallel import gather, rank
from data.tokenizer import dump_ranks
from spin_loss import LOSSES

# Flags that do not change the numbers of a run: they may differ when it is resumed.
FREE = ("out", "resume", "overwrite", "iters", "device", "threads", "show", "reports", "data",
        "encoding", "init")  # of the last three, the content counts


class Run:
    """One run's folder. Stage 0 is SFT, and stage t makes p_t; run.stage is the first one to do.

    Raises InputError if --out cannot be used, or if the run in it cannot be resumed.
    """
    def __init__(self, config, world, device):
        self.config, self.world, self.out, self.device = config, world, Path(config.out), device
        self.shown = [world.rows[p] | {"responses": likeliest(world.rows[p]["responses"])}
                      for p in world.shown()]
        self.settings = settings(config, world)
        # Process 0 alone reads and prepares the folder; the others get what it found.
        self.state = gather(self.open() if rank() == 0 else None)[0]
        self.stage, self.rows = self.state["stage"], self.state["rows"]
        self.saved = time.monotonic()
        self.began = self.saved - self.state["seconds"]
        # The loss at the start of an iteration, where p_θ = p_t; if the opponent is always p_0, or
        # with more SFT, an iteration begins elsewhere.
        zero = torch.zeros(())
        self.loss_at_start = LOSSES[config.loss](zero, zero, config.lam).item() if (
            config.method == "spin" and config.opponent == "previous") else None
        self.window = Window() if config.show and rank() == 0 else None

    # --- opening the folder ---

    def open(self) -> dict:
        """Check --out and prepare it. Returns where to begin: the state in latest.pt, or a new one.

        --out is new, has no files, or holds a run, which is resumed or replaced if a flag says so.
        Only files of a run are ever removed or written.
        """
        config, out = self.config, self.out
        try:
            if not config.resume:
                out.mkdir(parents=True, exist_ok=True)
            paths = out.iterdir() if out.exists() else ()
            names = {path.name for path in paths if not path.is_dir()}
            names -= {"tmp.config.json"}
        except OSError as error:
            raise InputError(f"--out {out}: cannot be used ({error.strerror}); name another "
                             f"folder") from None
        if names and "sft_steps" not in flags_of_the_run(out, asdict(config)):
            raise InputError(f"--out {out}: holds files, and none is a run's config.json; name a "
                             f"new folder")
        if config.resume and not names:
            raise InputError(f"--resume: there is no run in {out}; name its folder as --out")
        if names and not (config.resume or config.overwrite):
            raise InputError(f"--out {out}: holds a run already; --resume it, --overwrite it, or "
                             f"name another folder")
        if config.resume and names & {"latest.pt", "iteration_0.pt"}:
            state = self.resumable()
        else:  # also --resume of a run that was stopped before its first report
            for name in filter(is_file_of_a_run, names - {"config.json"}):  # replaced below
                (out / name).unlink()
            state = {"stage": 0, "step": 0, "seconds": 0.0, "rows": []}
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "tiktoken": tiktoken.__version__}
        about = asdict(config) | {"versions": versions, "shown": self.shown,
                                  "empirical": self.world.empirical}
        write(out / "config.json", json.dumps(about, indent=2).encode())
        write(out / "metrics.jsonl", as_lines(state["rows"]))
        return state

    def resumable(self) -> dict:
        """The state in latest.pt, or InputError if it does not belong to a run like this one."""
        path = self.out / "latest.pt"
        if not path.is_file():
            raise InputError(f"{path}: missing, so the run cannot go on; --overwrite replaces it")
        state = load(path)
        if not {"stage", "step", "seconds", "rows", "settings"} <= state.keys():
            raise InputError(f"{path}: not written by this train.py; start afresh in another --out")
        for name, value in self.settings.items():
            was = state["settings"].get(name)
            if was != value:
                name = name.removesuffix(" content")
                was = "other content" if name in FREE else was
                raise InputError(f"{flag_of(name)} {getattr(self.config, name)}: the run in "
                                 f"{self.out} was started with {was}, and this changes its "
                                 f"numbers; nothing is lost: resume with what it was, or name "
                                 f"another --out")
        return state

    # --- the stages ---

    def unfinished(self, iterations):
        """Those t = 0, 1, … for which p_{t+1} is not saved yet."""
        return [t for t in iterations if t + 1 >= self.stage]

    def policy(self, t):
        """The policy p_t, as iteration_t.pt holds it, on the run's device."""
        return load_policy(self.out / f"iteration_{t}.pt")[0].to(self.device)

    def print_start(self, policy):
        """Say what will run, on what, and from where."""
        print_start(policy, self.config, self.world, self.stage, self.state["step"])

    def restore(self, learner) -> int:
        """Give player, optimizer and schedule their saved state, if there is one. Returns how many
        steps of the stage are done."""
        state, self.state = self.state, {"step": 0}  # the stages after this one start afresh
        self.stage_began, self.first_step = time.monotonic(), state["step"]
        if state["step"]:
            try:
                for part, saved in zip(learner, state["learner"], strict=True):
                    part.load_state_dict(saved)
            except Exception as error:
                raise InputError(f"{self.out}/latest.pt: damaged ({type(error).__name__}); start "
                                 f"afresh with --overwrite") from None
        return state["step"]

    def report(self, stage, step, steps, responses, learner):
        """At some steps, evenly spaced, and the last one: evaluate, print and save."""
        pace = (time.monotonic() - self.stage_began) / (step - self.first_step)
        if not is_due(step, steps, self.config.reports):
            if time.monotonic() - self.saved > 30 and rank() == 0:  # a slow run: long texts, say
                print_step(stage, step, steps, pace * (steps - step))
                self.save_latest(stage, step, learner)
            return
        player, finished = learner[0], step == steps
        found = evaluate(player, responses, self.world, self.config, stage)
        seconds = time.monotonic() - self.began
        rows = [{"event": event, "method": self.config.method, "iteration": stage, "step": step,
                 "split": split, **numbers, "seconds": round(seconds, 2)}
                for event in (["step", "iteration"] if finished else ["step"])
                for split, numbers in found.items()]
        self.rows += rows
        print_progress(stage, step, steps, found, pace * (steps - step), self.world.empirical)
        if rank() == 0:
            self.save(stage, rows, step, player, learner, finished)
        gather(None)  # the others wait until the policy is there

    def save(self, stage, rows, step, player, learner, finished):
        """Write what a report brings. latest.pt comes last: it makes the rest valid."""
        with open(self.out / "metrics.jsonl", "ab") as file:
            file.write(as_lines(rows))
        if finished:
            save_policy(self.out / f"iteration_{stage}.pt", player, self.world)
            write(self.out / "convergence.png",
                  draw_convergence(self.rows, self.shown, self.world.empirical,
                                   self.loss_at_start))
        if self.window:
            self.window.redraw(self.rows, self.shown, self.world.empirical, self.loss_at_start)
        if finished:
            stage, step, learner = stage + 1, 0, []
        self.save_latest(stage, step, learner)

    def save_latest(self, stage, step, learner):
        """latest.pt: a stage's learner after some steps; no learner where it has yet to begin."""
        save(self.out / "latest.pt", {
            "stage": stage, "step": step, "learner": [part.state_dict() for part in learner],
            "settings": self.settings, "rows": self.rows,
            "seconds": time.monotonic() - self.began})
        self.saved = time.monotonic()

    def close(self):
        """Draw the moving picture and print the closing table."""
        if rank() == 0:
            write(self.out / "convergence.gif",
                  draw_gif(self.rows, self.shown, self.world.empirical))
        counts = {split: len(prompts) for split, prompts in self.world.splits.items()}
        print_closing_table(self.rows, self.out, time.monotonic() - self.began,
                            self.world.empirical, counts)


def settings(config, world) -> dict:
    """What a resumed run must share with the one that was interrupted: flags and files."""
    digest = lambda data: hashlib.sha256(data).hexdigest()
    tokens = world.encoding._pat_str + dump_ranks(world.encoding._mergeable_ranks)
    return {name: value for name, value in asdict(config).items() if name not in FREE} | {
        "data content": digest(json.dumps(world.rows).encode()),
        "encoding content": digest(tokens.encode()),
        "init content": digest(Path(config.init).read_bytes()) if config.init else ""}


def is_due(step, steps, reports) -> bool:
    """True at `reports` evenly spaced steps, the last step among them."""
    return step * reports // steps > (step - 1) * reports // steps


def is_file_of_a_run(name) -> bool:
    """Whether a run writes files of this name."""
    name = name.removeprefix("tmp.")
    return name in ("config.json", "metrics.jsonl", "latest.pt", "convergence.png",
                    "convergence.gif") or (name.startswith("iteration_") and name.endswith(".pt")
                                           and name[10:-3].isdecimal())


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
