"""Self-play fine-tuning (SPIN) from nothing: SFT, then a GPT against its own previous self.

    for t = 0, 1, …:   p_t ← p_θ, frozen;   y' ~ p_t(·|x);   p_{t+1} ← argmin_θ L(θ; p_t)

Reading order: `Config` → the objectives → `fit`, the training loop → `self_play` → `main`, the
paper's Algorithm 1. Beside it, in data/: `exact.py` measures, `files.py` keeps a run from harm.

Departures from the paper (arXiv 2401.01335), each with its reason where it stands:
 1. every pair (y, y') of a prompt is compared, not one y' for each y      data/responses.py
 2. where p_t(y') is known it is used instead of a count of draws          data/responses.py
 3. the mass anchor; --anchor none is the paper's loss alone               spin_loss.py
 4. p_{t+1} is the average of an iteration's later weights                 `fit`
 5. λ = 2, constant through the run (theirs: 0.1, and 5 in the last iteration)

Dimensions: P prompts, N responses, B pairs. Log-probs and losses are in nats.
"""
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from data.exact import evaluate
from data.files import open_run
from data.gif import draw_gif
from data.options import TINY, check, command, option, parse_args
from data.parallel import add_gradients, by_the_first, gather, rank, ranks, start
from data.plot import draw_convergence
from data.reader import WORLD, InputError, read_world
from data.report import Progress, closing_table, greet, show_answers
from data.rescue import Rescue, record, restore
from data.responses import all_logps, answer_logps
from data.tokenizer import RANK_FILE, load_encoding
from data.world import World
from model import GPT, GPTConfig
from sample import generate, load_checkpoint, save_checkpoint
from spin_loss import LOSSES, mass_anchor, spin_loss


@dataclass
class Config:
    """Every number of a run, once, with its reason; each field is a flag (lr → --lr)."""
    iters: int = option(3, "SPIN iterations after SFT; 0 stops at SFT", 0, 10_000)
    method: str = option("spin", "what follows SFT: self-play, more SFT, or DPO on own samples "
                         "ranked by an oracle", choices=("spin", "sft", "dpo"))
    lam: float = option(2.0, "λ: an iteration moves log p by (1/λ) log p_data/p_t, so λ = 2 is a "
                        "careful step; exact self-play diverges below ½", TINY, 1e6)
    loss: str = option("logistic", "ℓ; space is the NCE loss that needs no λ", choices=LOSSES)
    mu: float = option(1.0, "μ, SPACE's ratio of generated to real", TINY, 1e6)
    anchor: str = option("mass", "what holds the direction that the loss cannot see: nothing, "
                         "E[p_θ/p_t] ≥ 1, or the SFT loss", choices=("none", "mass", "sft"))
    anchor_weight: float = option(2.0, "γ: anything from 2 to 10 holds the mass anchor; 0.2 is "
                                  "plenty for the SFT anchor", 0, 1e6)
    opponent: str = option("previous", "renew the opponent each iteration, or keep the SFT model "
                           "for ever (then it is no self-play)", choices=("previous", "sft"))
    history: int = option(0, "1: also the previous iteration's generated responses, as in the "
                          "authors' code", choices=(0, 1))
    steps: int = option(300, "optimiser steps in an iteration; most of the gain is made by then",
                        1, 10**9)
    batch_size: int = option(1024, "generated responses compared in a step, in whole prompts: "
                             "1024 / 32 negatives = 32 prompts", 1, 10**9)
    negatives: int = option(32, "responses the opponent gives to each prompt", 1, 10**6)
    lr: float = option(4e-3, "high for a model this small: it generalises better to held-out "
                       "prompts than 2e-3 does, and averaging tames it", TINY, 10)
    warmup: int = option(50, "steps to full rate: Adam knows nothing yet, and its first steps "
                         "are the ones that leak", 0, 10**9)
    average: float = option(0.5, "share of the steps whose weights are averaged; keeps the "
                            "drift, removes the noise", 0, 1)
    clip: float = option(1.0, "gradient norm", TINY, 1e9)
    sft_steps: int = option(240, "few: self-play should start from a weak model", 1, 10**9)
    sft_lr: float = option(2e-3, "learning rate of SFT", TINY, 10)
    sft_samples: int = option(128, "responses a training prompt in the SFT set", 1, 10**6)
    n_layer: int = option(2, "one learns this world too, only later", 1, 1000)
    n_head: int = option(4, "heads; 4 generalise a little better than 2", 1, 1000)
    n_embd: int = option(64, "width", 1, 10**5)
    block_size: int = option(128, "longest prompt and response together, tokens", 2, 10**6)
    seed: int = option(0, "one seed for weights, SFT set, sampling and order", 0, 2**31)
    reports: int = option(8, "evaluations in a stage", 1, 10**6)
    data: str = option(str(WORLD), "a world, or plain prompt/response pairs, as JSON lines")
    encoding: str = option(str(RANK_FILE), "a rank file, or the name of a tiktoken encoding")
    out: str = option("out", "folder for metrics, checkpoints and figures")
    device: str = option("auto", "auto takes a GPU where there is one",
                         choices=("auto", "cpu", "cuda"))
    logprob: str = option("eager", "how log p is computed", choices=("eager", "fused"))
    precision: str = option("float32", "of the blocks; log-probs and their sums stay float32. "
                            "bfloat16 is for a GPU", choices=("float32", "bfloat16"))
    resume: bool = option(False, "go on with the run in --out")
    overwrite: bool = option(False, "replace the run in --out")


# --- the objectives: pure functions of log-probs, averaged over the prompts of a batch -----------

def sft_objective(model, batch, config):
    """−E log p_θ(y|x), y from the SFT set. Returns (to minimise, the loss itself)."""
    loss = -(batch.real_N * answer_logps(model, batch, config.logprob)).sum()
    loss = loss / len(batch.prompt_length_P)
    return loss, loss


def spin_objective(model, batch, config):
    """Eq. 4.7 over all pairs of the batch, and the anchor. Returns (to minimise, L)."""
    player_N, opponent_N = answer_logps(model, batch, config.logprob), batch.opponent_N
    real_B, generated_B, weight_B = batch.pairs(batch.real_N, batch.negative_N)
    if config.method == "dpo":  # both are generated; the oracle prefers what p_data prefers
        real_B, generated_B, weight_B = batch.pairs(batch.negative_N, batch.negative_N)
        weight_B = weight_B * (batch.data_N[real_B] > batch.data_N[generated_B])
        weight_B = weight_B / weight_B.sum().clamp(min=1e-9)  # a mean over the pairs that it ranks
    loss = (weight_B * spin_loss(player_N[real_B], player_N[generated_B], opponent_N[real_B],
                                 opponent_N[generated_B], config.lam, config.loss, config.mu)).sum()
    # At θ = θ_t the gradient of L is λ/2 times that of SFT; undo it, so that the learning rate
    # and the weight of an anchor mean the same for every λ.
    total = loss * (2 if config.loss == "space" else 2 / config.lam)
    if config.anchor == "mass":
        total = total + config.anchor_weight * mass_anchor(player_N, opponent_N,
                                                           batch.generated_N, batch.prompt_N)
    if config.anchor == "sft":
        sft = -(batch.real_N * player_N).sum() / len(batch.prompt_length_P)
        total = total + config.anchor_weight * sft
    return total, loss


# --- one stage of training -----------------------------------------------------------------------

def fit(player, responses, prompts, config, t, state):
    """Train `player` on some prompts: SFT for t = 0, else iteration t of self-play.

    Yields (step, loss, parts) after each step. `parts` are what learns: player, averaged weights
    and optimiser; their saved states in `state`, if any, are where training goes on, exactly.
    """
    steps, lr = (config.steps, config.lr) if t else (config.sft_steps, config.sft_lr)
    objective = spin_objective if t and config.method != "sft" else sft_objective
    optimizer = torch.optim.AdamW(player.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    parts = {"player": player, "averaged": AveragedModel(player), "optimizer": optimizer}
    restore(parts, state, config)
    order = prompt_order(len(prompts), steps, config, t)
    for step in range(state.get("step", 0), steps):
        mine = prompts[order[step][rank()::ranks()]]  # with one process: all of the batch
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, min(config.warmup, steps // 2)))
        total, loss = objective(player, responses.select(mine), config)
        optimizer.zero_grad()
        (total * len(mine) / len(order[step])).backward()
        add_gradients(player)
        norm = torch.nn.utils.clip_grad_norm_(player.parameters(), config.clip)
        if not math.isfinite(norm):
            raise FloatingPointError(f"iteration {t}, step {step + 1}: loss {loss.item():g}, "
                                     f"gradient norm {norm:g}; start again with a lower "
                                     f"--{'lr' if t else 'sft-lr'}")
        optimizer.step()
        if step + 1 > steps * (1 - config.average):
            parts["averaged"].update_parameters(player)  # Polyak: the noise of y' averages out
        yield step + 1, loss.item(), parts


def averaged(parts):
    """The model to keep: the average of the weights, once there is one."""
    return parts["averaged"].module if parts["averaged"].n_averaged else parts["player"]


def stream(seed, *purpose) -> int:
    """A seed for one purpose in one iteration, so that no draw disturbs another, nor a resume."""
    return int(np.random.SeedSequence((seed, *purpose)).generate_state(1)[0])


def prompts_a_step(config) -> int:
    """Whole prompts, as many as give batch_size generated responses."""
    return max(1, config.batch_size // config.negatives)


def prompt_order(P, steps, config, t):
    """Which prompts each step takes, [steps, prompts a step]: shuffled passes over all of them.

    What does not fill a whole step at the end of a pass is left out of that pass, so that no step
    takes a prompt twice.
    """
    rng = torch.Generator().manual_seed(stream(config.seed, t, 0))
    size = min(P, prompts_a_step(config))
    passes = [torch.randperm(P, generator=rng)[:P // size * size].view(-1, size)
              for _ in range(math.ceil(steps / (P // size)))]
    return torch.cat(passes)[:steps]


# --- self-play -----------------------------------------------------------------------------------

def self_play(world, config, t):
    """y' ~ p_t(·|x) at temperature 1, nothing cut off; then log p_t of every response, once.

    Returns the table of responses that the whole iteration learns from.
    """
    opponent, older = frozen_opponent(config, t, world.device), None
    if config.history and t > 1:
        older = draw(frozen_opponent(config, t - 1, world.device), world, config, t - 1)
    responses = world.tabulate(draw(opponent, world, config, t), older)
    responses.opponent_N = all_logps(opponent, responses, config.logprob)
    responses.know_shares()
    responses.negative_N = responses.generated_N
    if older:  # scored, like the rest, by the current opponent
        responses.negative_N = (responses.generated_N + responses.older_N) / 2
    return responses


def draw(model, world, config, t, chunk=64):
    """`negatives` responses to each prompt, as {response: count}.

    A chunk of prompts has a generator of its own: who draws it makes no difference.
    """
    drawn = {}
    for first in range(chunk * rank(), len(world.prompts), chunk * ranks()):
        rng = torch.Generator(world.device).manual_seed(stream(config.seed, t, 1, first))
        prompts = [x for x in world.prompts[first:first + chunk] for _ in range(config.negatives)]
        answers = generate(model, prompts, max_new_tokens=world.max_new_tokens,
                           end_token=world.end_token, generator=rng)
        for i in range(0, len(answers), config.negatives):
            drawn[first + i // config.negatives] = Counter(
                map(tuple, answers[i:i + config.negatives]))
    drawn = gather(drawn)
    return [drawn[p] for p in range(len(world.prompts))]


def frozen_opponent(config, t, device):
    """The opponent of iteration t: what iteration t−1 saved, so that nothing can change it."""
    return load_player(config, 0 if config.opponent == "sft" else t - 1, device)


def load_player(config, t, device):
    """The model as it was saved after iteration t."""
    player = load_checkpoint(Path(config.out) / f"iteration_{t}.pt", device)[0]
    player.bfloat16 = config.precision == "bfloat16"
    return player


# --- the run -------------------------------------------------------------------------------------

def prepare(config):
    """Check everything that can be wrong before anything is trained: InputError says what is."""
    check(config)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    gpu = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    device = start("cuda" if gpu else "cpu")
    encoding = load_encoding(config.encoding)
    try:
        world = World(read_world(config.data), encoding, config.sft_samples, config.seed,
                      config.block_size, device)
    except InputError as error:
        raise InputError(f"--data {error}") from None
    if (prompts := min(prompts_a_step(config), len(world.splits["train"]))) < ranks():
        raise InputError(f"torchrun started {ranks()} processes, and a step has {prompts} prompts "
                         f"to share; start fewer, or raise --batch-size")
    return world, by_the_first(lambda: open_run(config, world))


def main(config: Config) -> None:
    """Algorithm 1 of the paper, after SFT (t = 0). Raises InputError before anything is trained."""
    began = time.time()
    world, state = prepare(config)
    began -= state["seconds"]  # of the run that is resumed
    torch.manual_seed(config.seed)
    player = GPT(GPTConfig(world.encoding.n_vocab, config.block_size, config.n_layer,
                           config.n_head, config.n_embd)).to(world.device)
    player.bfloat16 = config.precision == "bfloat16"
    greet(player, world, config, state)
    with Rescue() as rescue:
        for t in range(state["iteration"], config.iters + 1):
            if t == 0:
                responses = world.tabulate()
            else:
                responses = self_play(world, config, t)  # y' ~ p_t, frozen
                player = load_player(config, t - 1, world.device)  # θ starts at θ_t
            progress, train = Progress(config, t, state), world.splits["train"]
            for step, loss, parts in fit(player, responses, train, config, t, state):
                if progress.due(step, loss):
                    found = evaluate(averaged(parts), responses, world, config, t)
                    progress.show(step, found)
                    record(config, "step", t, step, found, time.time() - began)
                if step < progress.steps:
                    rescue.save(config, world, {"iteration": t, "step": step} | {
                        name: part.state_dict() for name, part in parts.items()}, began)
            player = averaged(parts)  # p_{t+1}
            path = Path(config.out) / f"iteration_{t}.pt"
            by_the_first(lambda: save_checkpoint(path, player, world))
            record(config, "iteration", t, step, found, time.time() - began)
            by_the_first(lambda: draw_convergence(config.out))
            state = {"iteration": t + 1}
            rescue.save(config, world, state, began, now=True)
            show_answers(player, world, config)
    by_the_first(lambda: draw_gif(config.out))
    by_the_first(lambda: closing_table(config, time.time() - began))


if __name__ == "__main__":
    command("train.py", lambda: main(parse_args(
        Config, "Fine-tune a small GPT by SFT, then by self-play (SPIN), and watch KL(p_data‖p_θ) "
                "fall beside what the theory predicts.")))
