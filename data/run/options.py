"""A dataclass as a command line: each field is a flag with its default, its reason and its limits.

Reading order: `option` → `make_plain`, `check_limits` → `parse_args` → `command` → `prepare`, which
reads the files that the flags name.
"""
import argparse
import json
import math
import os
import sys
from dataclasses import field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import InputError
from data.gpt2 import load_gpt2
from data.run.parallel import ranks, start
from data.tokenizer import load_encoding
from data.world import World, hold_out, read_world

TINY = 1e-12  # as a limit: "more than 0"


def option(default, why, low=None, high=None, choices=None):
    """A field that is also a flag: its help text and its limits, low ≤ value ≤ high."""
    return field(default=default, metadata=dict(why=why, low=low, high=high, choices=choices))


def flag_of(name: str) -> str:
    """anchor_weight -> --anchor-weight"""
    return "--" + name.replace("_", "-")


def make_plain(config):
    """Let values of numpy's and pathlib's types be Python's own; ~ is the home folder."""
    for f in fields(config):
        value = getattr(config, f.name)
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, Path) or (f.type is str and str(value).startswith("~")):
            value = str(Path(value).expanduser())
        if f.type is float and type(value) is int:
            value = float(value)
        setattr(config, f.name, value)


def check_limits(config):
    """Raise InputError for the first value that is out of range."""
    for f in fields(config):
        value, flag = getattr(config, f.name), flag_of(f.name)
        low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
        if type(value) is not f.type and f.type is not tuple:
            raise InputError(f"{flag} {value!r}: must be of type {f.type.__name__}")
        if choices and value not in choices:
            raise InputError(f"{flag} {value}: use one of {', '.join(map(str, choices))}")
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
        raise InputError(f"{message} (--help lists every flag)")


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
    flags = vars(parser.parse_args(argv))
    if flags.get("resume"):  # a flag that is not given again is as it was
        parser.set_defaults(**flags_of_the_run(flags["out"], flags))
        flags = vars(parser.parse_args(argv))
    return kind(**flags)


def flags_of_the_run(out, flags) -> dict:
    """Those of `flags` with which the run in a folder was started; {} if there is no run."""
    try:
        saved = dict(json.loads((Path(out).expanduser() / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    anew = ("out", "resume", "overwrite", "show")
    return {name: value for name, value in saved.items() if name in flags and name not in anew}


def command(name, work):
    """Run a script's work. Exit with 2 and one line on an InputError, with 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(errors="replace")  # a terminal without λ shows ?
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        go_on = "; go on with --resume and the same --out" if name == "train.py" else ""
        print(f"{name}: stopped{go_on}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, NotImplementedError) as error:  # the last: an empty exercise
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
                "allocate memory" not in str(error)):
            raise
        print(f"{name}: not enough memory; a smaller model, or fewer or shorter responses to a "
              f"prompt, need less", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(config):
    """Check everything that can be wrong before anything is trained. Returns (World, device)."""
    check_limits(config)
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite: a run goes on or is replaced; give one")
    torch.set_num_threads(config.threads)
    device = start(config.device)
    encoding = load_encoding(config.encoding)
    if config.init:  # the sizes are the file's
        sizes = vars(load_gpt2(config.init, encoding.n_vocab).config)
        vars(config).update({name: sizes[name] for name in sizes if name != "vocab_size"})
    if config.n_embd % config.n_head:
        raise InputError(f"--n-embd {config.n_embd}: must be a multiple of --n-head "
                         f"{config.n_head}, so that every head gets an equal share")
    try:
        rows = read_world(config.data)
    except InputError as error:  # it names the file and the line
        raise InputError(f"--data {error}") from None
    try:
        if config.heldout:
            rows = hold_out(rows, config.heldout, config.seed)
        world = World(rows, encoding, config.sft_samples, config.seed, config.block_size)
    except InputError as error:
        raise InputError(f"--data {config.data}: {error}") from None
    if min(config.prompts_a_step(), len(world.splits["train"])) < ranks():
        raise InputError(f"torchrun started {ranks()} processes, more than a step has prompts to "
                         f"share; start fewer, or raise --batch-size")
    return world, device
