"""A dataclass as a command line: each field is a flag with its default, its reason and its limits.

Reading order: `option` → `check_limits` → `parse_args` → `command`.
"""
import argparse
import math
import os
import sys
from dataclasses import field, fields

import torch

from data.errors import InputError, nearest
from data.run.parallel import leave

TINY = 1e-12  # as a limit: "more than 0"


def option(default, why, low=None, high=None, choices=None):
    """A field that is also a flag: its help text and its limits, low ≤ value ≤ high."""
    return field(default=default, metadata=dict(why=why, low=low, high=high, choices=choices))


def flag_of(name: str) -> str:
    """anchor_weight -> --anchor-weight"""
    return "--" + name.replace("_", "-")


def check_limits(config):
    """Raise InputError for the first value that is out of range."""
    for f in fields(config):
        value, flag = getattr(config, f.name), flag_of(f.name)
        low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
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
    """Run a script's work. Exit with 2 and one line on an InputError, with 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(errors="replace")  # a terminal without λ shows ?
    status = 0
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        print(f"{name}: stopped{stop}", file=sys.stderr)  # a run adds how to go on
        status = 130
    except (InputError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
                "allocate memory" not in str(error)):
            raise
        print(f"{name}: not enough memory: lower --batch-size, --negatives or the model's size",
              file=sys.stderr)
        status = 2
    except SystemExit as stop:  # after --help, or where process 0 has said what is wrong
        status = stop.code or 0
    leave(status)
