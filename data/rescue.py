"""What an interruption must not cost: saved every 10 s, on Ctrl-C, and when numbers overflow.

Reading order: `record` → `restore` → `Rescue`.
"""
import json
import os
import signal
import threading
import time
from pathlib import Path

from data.files import save_latest
from data.parallel import by_the_first, largest, rank
from data.reader import InputError

EVERY = 10  # seconds between saves


def record(config, event, t, step, found, seconds):
    """Append one row a split to metrics.jsonl."""
    rows = [{"event": event, "method": config.method, "iteration": t, "step": step,
             "split": split, **numbers, "seconds": round(seconds, 2)}
            for split, numbers in found.items()]
    path = Path(config.out) / "metrics.jsonl"
    by_the_first(lambda: append(path, "".join(json.dumps(row) + "\n" for row in rows)))


def append(path, text):
    """Text at the end of a file. A torn line is no harm: `save_latest` has not counted it."""
    try:
        with open(path, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, then "
                         f"--resume") from None


def restore(parts, state, config):
    """Give player, averaged weights and optimiser their saved states, if `state` has them."""
    try:
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])
        for p, kept in parts["optimizer"].state.items():  # load_state_dict does not look at these
            if {kept["exp_avg"].shape, kept["exp_avg_sq"].shape} != {p.shape}:
                raise ValueError("the optimiser's averages are of other shapes")
    except Exception as error:  # a forged file can fail anywhere
        reason = str(error).split("\n")[0]
        raise InputError(f"{config.out}/latest.pt: does not fit this model ({reason}); start "
                         f"afresh with --overwrite") from None


class Rescue:
    """Says when to save: every 10 s, and on Ctrl-C or kill, which wait until the step is done.

    Several processes agree first, so that all of them stop after the same step.
    """
    def __enter__(self):
        self.last, self.signal, self.before, self.unsaved = time.monotonic(), 0, {}, None
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.interrupt)
                           for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def interrupt(self, number, _):
        if self.signal:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt(number)
        self.signal = number
        if not rank():  # print() must not be called while it may be at work
            os.write(2, b"train.py: stopping after this step (once more: at once)\n")

    def save(self, config, world, state, began, now=False):
        """save_latest, if it is time; then pass the Ctrl-C on."""
        self.unsaved = config, world, state | {"seconds": time.time() - began}
        due = largest(self.signal or int(now or time.monotonic() - self.last > EVERY))
        if due:
            self.save_now()
        if due > 1:  # the number of a signal
            raise KeyboardInterrupt(due)

    def save_now(self):
        by_the_first(lambda: save_latest(*self.unsaved))
        self.last, self.unsaved = time.monotonic(), None

    def __exit__(self, kind, error, _):
        for number, before in self.before.items():
            signal.signal(number, before)
        if kind is FloatingPointError:
            if self.unsaved:  # the step failed before it changed anything
                self.save_now()
            raise InputError(f"{error} (what was saved is whole)") from None
        if kind is None and self.signal:
            raise KeyboardInterrupt(self.signal)
