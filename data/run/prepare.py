"""Everything that can be wrong, checked before anything is trained.

Reading order: `prepare` → `check_flags` → `take_sizes` → `check_memory` → `load_world` →
`print_idle_flags`; and `check_ranking`, before each iteration of DPO.
"""
import math
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from data.errors import InputError
from data.gpt2 import load_gpt2
from data.run.options import check_limits, flag_of
from data.run.parallel import ranks, start
from data.tokenizer import load_encoding
from data.world import World, hold_out, read_world
from spin_loss import LOSSES


def prepare(config):
    """Check everything that can be wrong before anything is trained. Returns (World, device)."""
    check_flags(config)
    torch.set_num_threads(config.threads)
    device = start(config.device)
    encoding = load_encoding(config.encoding, config.pattern)
    if config.init:
        take_sizes(config, load_gpt2(Path(config.init), encoding.n_vocab))
    check_memory(config, encoding.n_vocab)
    world = load_world(config, encoding)
    prompts = min(config.prompts_a_step(), len(world.splits["train"]))
    if prompts < ranks():
        raise InputError(f"torchrun started {ranks()} processes, and a step has {prompts} prompts "
                         f"to share; start fewer, or raise --batch-size")
    print_idle_flags(config, world)
    return world, device


def check_flags(config):
    """Raise InputError for flags that are out of range or contradict each other."""
    check_limits(config)
    if config.n_embd % config.n_head:
        raise InputError(f"--n-embd {config.n_embd}: must be a multiple of --n-head "
                         f"{config.n_head}, so that every head gets an equal share")
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite: a run goes on or is replaced; give one")


def check_memory(config, n_vocab):
    """InputError if a model of these sizes cannot be trained here."""
    parameters = config.n_embd * (12 * config.n_layer * config.n_embd + config.block_size + n_vocab)
    # Weights, gradients, Adam's two averages, the mean of the weights, the opponent.
    needed = 6 * 4 * parameters
    if needed > memory_of_this_machine():
        raise InputError(f"--n-embd {config.n_embd}: {parameters:.1e} parameters need "
                         f"{needed / 2**30:,.0f} GiB to train, more than this machine has")


def memory_of_this_machine() -> float:
    """Bytes, or ∞ where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def take_sizes(config, player):
    """Let the sizes be those of the model in --init, and say so; the defaults are for the toy."""
    sizes = {name: getattr(player.config, name) for name in
             ("n_layer", "n_head", "n_embd", "block_size")}
    told = ", ".join(f"{flag_of(name)} {size}" for name, size in sizes.items())
    if sizes != {name: getattr(config, name) for name in sizes}:
        print(f"--init {config.init}: its sizes replace those of the flags: {told}")
    vars(config).update(sizes)


def load_world(config, encoding) -> World:
    """Read --data, hold some prompts out if asked to, tokenize it and draw the SFT set."""
    try:
        rows = read_world(config.data)
    except InputError as error:  # it names the file and the line
        raise InputError(f"--data {error}") from None
    try:
        if config.heldout:
            rows = hold_out(rows, config.heldout, config.seed)
        return World(rows, encoding, config.sft_samples, config.seed, config.block_size)
    except InputError as error:
        raise InputError(f"--data {config.data}: {error}") from None


def print_idle_flags(config, world):
    """Name the flags that have no effect in this combination, so that nobody waits for one."""
    idle = {}
    if config.method == "sft":
        names = ("lam", "loss", "mu", "anchor", "anchor_weight", "opponent", "history")
        idle |= dict.fromkeys(names, "--method sft")
    else:
        r, s = torch.tensor([-0.3, 0.2], dtype=torch.float64)  # where no loss is flat
        loss = LOSSES[config.loss]
        for name, lam, mu in (("lam", 2.0, 1.0), ("mu", 1.0, 2.0)):
            if loss(r, s, lam, mu) == loss(r, s, 1.0, 1.0):
                idle[name] = f"--loss {config.loss}"
        if config.anchor == "none":
            idle["anchor_weight"] = "--anchor none"
    if world.empirical:
        idle["sft_samples"] = "plain pairs, which are the SFT set"
    if not Path(config.encoding).is_file():
        idle["pattern"] = "an encoding given by name"
    for field in fields(config):
        if field.name in idle and getattr(config, field.name) != field.default:
            print(f"{flag_of(field.name)} has no effect with {idle[field.name]}")
    if "heldout" not in world.splits:
        print("no prompts are held out; --heldout 0.1 would hold out a tenth of them")


def check_ranking(responses, train, t):
    """Say how many train prompts give DPO's oracle nothing to rank; InputError if all of them."""
    idle, first_response = 0, responses.trees.first_response
    for p in train:
        rows = slice(first_response[p], first_response[p + 1])
        likely_N = responses.generated_N[rows] > 1e-3
        idle += len(np.unique(responses.data_N[rows][likely_N])) < 2
    if idle == len(train):
        raise InputError(f"--method dpo: p_{t}'s responses to each prompt are all alike to the "
                         f"oracle, so nothing can be ranked; raise --sft-steps or --negatives")
    if idle:
        print(f"iteration {t + 1}  {idle} of {len(train)} prompts have nothing to rank", flush=True)
