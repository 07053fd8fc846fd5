"""A dataclass as a command line: each field is a flag with its default, its reason and its limits.

Reading order: `option` → `check` → `parse_args`.
"""
import argparse
import difflib
import math
from dataclasses import field, fields

import torch

from data.reader import InputError

TINY = 1e-12  # as a limit: "more than 0"


def option(default, why, low=None, high=None, choices=None):
    """A field of Config that is also a flag: its help, its limits (low ≤ value ≤ high)."""
    return field(default=default, metadata=dict(why=why, low=low, high=high, choices=choices))


def nearest(word, known) -> str:
    """"; did you mean …?" for a misspelt word, or nothing."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def check(config):
    """Raise InputError for the first value that is out of range, before anything is done."""
    for f in fields(config):
        value, limits, flag = getattr(config, f.name), f.metadata, flag_of(f.name)
        low, high, choices = limits["low"], limits["high"], limits["choices"]
        if choices and value not in choices:
            raise InputError(f"{flag} {value}: use one of {', '.join(map(str, choices))}"
                             f"{nearest(value, choices)}")
        if f.type is float and not math.isfinite(value):
            raise InputError(f"{flag} {value}: must be a finite number")
        if low is not None and value < low:
            least = "more than 0" if low == TINY else f"at least {low}"
            raise InputError(f"{flag} {value}: must be {least}")
        if high is not None and value > high:
            raise InputError(f"{flag} {value}: must be at most {high:g}")
    if config.n_embd % config.n_head:
        raise InputError(f"--n-embd {config.n_embd}: must be a multiple of --n-head "
                         f"{config.n_head}, so that every head gets an equal share")
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite: a run goes on or is replaced; give one")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device auto or cpu")


def flag_of(name: str) -> str:
    """anchor_weight -> --anchor-weight"""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, with one line on an error instead of the whole usage."""
    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        hint = nearest(unknown, self._option_string_actions) if unknown.startswith("--") else ""
        raise InputError(f"{message}{hint} (--help lists every flag)")


def parse_args(kind, description, argv=None):
    """Read the command line into a `kind`, a dataclass of options. Raises InputError."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(kind):
        if f.type is bool:
            how = dict(action="store_true")
        else:
            how = dict(type=f.type, default=f.default)
        if f.metadata["choices"]:
            how["metavar"] = "{" + ",".join(map(str, f.metadata["choices"])) + "}"
        parser.add_argument(flag_of(f.name), help=f.metadata["why"].replace("%", "%%"), **how)
    return kind(**vars(parser.parse_args(argv)))
