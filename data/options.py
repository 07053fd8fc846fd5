"""A dataclass as a command line: each field is a flag with its default, its reason and its limits.

Reading order: `option` → `check` → `parse_args` → `command`.
"""
import argparse
import math
import sys
from dataclasses import field, fields

import torch

from data.parallel import leave
from data.reader import InputError, nearest

TINY = 1e-12  # as a limit: "more than 0"


def option(default, why, low=None, high=None, choices=None):
    """A field of Config that is also a flag: its help, its limits (low ≤ value ≤ high)."""
    return field(default=default, metadata=dict(why=why, low=low, high=high, choices=choices))


def check_limits(config):
    """Raise InputError for the first value that is out of range."""
    for f in fields(config):
        value, limits, flag = getattr(config, f.name), f.metadata, flag_of(f.name)
        low, high, choices = limits["low"], limits["high"], limits["choices"]
        if choices and value not in choices:
            raise InputError(f"{flag} {value}: use one of {', '.join(map(str, choices))}"
                             f"{nearest(value, choices)}")
        if f.type in (int, float) and (value is True or not isinstance(value, (int, f.type))):
            raise InputError(f"{flag} {value!r}: must be a number")
        if f.type is float and not math.isfinite(value):
            raise InputError(f"{flag} {value}: must be a finite number")
        if low is not None and value < low:
            least = "more than 0" if low == TINY else f"at least {low}"
            raise InputError(f"{flag} {value}: must be {least}")
        if high is not None and value > high:
            raise InputError(f"{flag} {value}: must be at most {high:g}")


def check(config):
    """check_limits, and what two flags of train.py must not be together."""
    check_limits(config)
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
        word = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        flag = f"--{word.lstrip('-')}"
        hint = nearest(flag, self._option_string_actions) if word.startswith("-") else ""
        raise InputError(f"{message}{hint} (--help lists every flag)")


def parse_args(kind, description, argv=None):
    """Read the command line into a `kind`, a dataclass of options. Raises InputError."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(kind):
        if f.type is bool:
            how = dict(action="store_true")
        elif f.type is tuple:  # of texts: the flag may be repeated
            how = dict(action="append", default=[])
        else:
            how = dict(type=f.type, default=f.default)
        if f.metadata["choices"]:
            how["metavar"] = "{" + ",".join(map(str, f.metadata["choices"])) + "}"
        parser.add_argument(flag_of(f.name), help=f.metadata["why"].replace("%", "%%"), **how)
    return kind(**vars(parser.parse_args(argv)))


def command(name, work):
    """Do what a script is for; say in one line why that could not be, and exit with 2 (or 130)."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without λ shows ?
    status = 0
    try:
        work()
    except (InputError, OSError) as error:
        status = print(f"{name}: {error}", file=sys.stderr) or 2
    except KeyboardInterrupt as stop:  # `Rescue` has saved if it gives the signal's number
        more = "; go on with the same flags and --resume" if stop.args else ""
        print(f"{name}: stopped{more}", file=sys.stderr)
        status = 128 + (stop.args or (2,))[0]
    leave(status)
