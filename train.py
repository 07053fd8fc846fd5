"""Self-play fine-tuning (SPIN) from nothing: SFT, then a GPT against its own previous self.

    for t = 0, 1, …:   p_t ← p_θ, frozen;   y' ~ p_t(·|x);   p_{t+1} ← argmin_θ L(θ; p_t)

Reading order: `Config` → the objectives → `fit`, the training loop → `self_play` → `evaluate`,
exact because p_data is known → checkpoints → `main`, the paper's Algorithm 1.

Departures from the paper (arXiv 2401.01335), each with its reason where it stands:
 1. every pair (y, y') of a prompt is compared, not one y' for each y      data/responses.py
 2. the mass anchor; --anchor none is the paper's loss alone               spin_loss.py
 3. p_{t+1} is the average of an iteration's later weights                 `fit`
 4. λ = 2, constant through the run (theirs: 0.1, and 5 in the last iteration)

Dimensions: P prompts, N responses, K responses that p_data gives a prompt, B pairs. Nats.
"""
import argparse
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tiktoken
import torch
from torch.optim.swa_utils import AveragedModel

from data.exact import all_logps, evaluate
from data.plot import draw_convergence, draw_gif
from data.reader import WORLD, InputError, read_world
from data.report import closing_table, greet, report, show_answers
from data.responses import World
from data.tokenizer import RANK_FILE, load_encoding
from model import GPT, GPTConfig
from sample import generate, load_checkpoint, save_checkpoint
from spin_loss import LOSSES, answer_logps, mass_anchor, spin_loss


def option(default, why, low=None, high=None, choices=None):
    """A field of Config that is also a flag: its help, its limits (low ≤ value ≤ high)."""
    return field(default=default, metadata=dict(why=why, low=low, high=high, choices=choices))


TINY = 1e-12  # "more than 0"


@dataclass
class Config:
    """Every number of a run, once, with its reason; each field is a flag (lr → --lr)."""
    iters: int = option(3, "SPIN iterations after SFT; 0 stops at SFT", 0)
    method: str = option("spin", "what follows SFT: self-play, more SFT, or DPO on own samples "
                         "ranked by an oracle", choices=("spin", "sft", "dpo"))
    lam: float = option(2.0, "λ: an iteration moves log p by (1/λ) log p_data/p_t, so λ ≥ 2 is "
                        "a careful step; exact self-play diverges below ½", TINY, 1e6)
    loss: str = option("logistic", "ℓ; space is the NCE loss that needs no λ", choices=LOSSES)
    mu: float = option(1.0, "μ, SPACE's ratio of generated to real", TINY, 1e6)
    anchor: str = option("mass", "what holds the direction that the loss cannot see: nothing, "
                         "E[p_θ/p_t] = 1, or the SFT loss", choices=("none", "mass", "sft"))
    anchor_weight: float = option(2.0, "γ: 1 leaves a leak of 10 %, 4 is slow to start", 0, 1e6)
    opponent: str = option("previous", "renew the opponent each iteration, or keep the SFT model "
                           "for ever (then it is no self-play)", choices=("previous", "sft"))
    history: int = option(0, "1: also the previous iteration's generated responses, as in the "
                          "authors' code", choices=(0, 1))
    steps: int = option(250, "optimiser steps in an iteration; most of the gain is made by then",
                        1)
    batch_size: int = option(1024, "generated responses compared in a step, in whole prompts: "
                             "1024 / 32 negatives = 32 prompts", 1)
    negatives: int = option(32, "responses the opponent gives to each prompt", 1)
    lr: float = option(2e-3, "high for a model this small, tamed by averaging", TINY, 10)
    warmup: int = option(100, "steps: Adam knows nothing yet, and the first steps at full rate "
                         "are the ones that leak", 0)
    average: float = option(0.5, "share of the steps whose weights are averaged; keeps the "
                            "drift, removes the noise", 0, 1)
    clip: float = option(1.0, "gradient norm", TINY)
    sft_steps: int = option(180, "few: self-play should start from a weak model", 1)
    sft_lr: float = option(2e-3, "learning rate of SFT", TINY, 10)
    sft_samples: int = option(128, "responses a training prompt in the SFT set", 1)
    n_layer: int = option(2, "the fewest that can copy a word", 1)
    n_head: int = option(2, "heads", 1)
    n_embd: int = option(64, "width", 1)
    block_size: int = option(128, "longest prompt and response together, tokens", 2)
    seed: int = option(0, "one seed for weights, SFT set, sampling and order", 0, 2**31)
    reports: int = option(8, "evaluations (and rescue points) in a stage", 1)
    data: str = option(str(WORLD), "a world, or plain prompt/response pairs, as JSON lines")
    encoding: str = option(str(RANK_FILE), "a rank file, or the name of a tiktoken encoding")
    out: str = option("out", "folder for metrics, checkpoints and figures")
    device: str = option("auto", "auto takes a GPU where there is one",
                         choices=("auto", "cpu", "cuda"))
    logprob: str = option("eager", "how log p is computed", choices=("eager", "fused"))
    resume: bool = option(False, "go on with the run in --out")
    overwrite: bool = option(False, "replace the run in --out")

    def check(self):
        """Raise InputError for the first value that is out of range."""
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            flag = "--" + f.name.replace("_", "-")
            if limits["choices"] and value not in limits["choices"]:
                raise InputError(f"{flag} {value}: use one of {', '.join(map(str, limits['choices']))}")
            low, high = limits["low"], limits["high"]
            if low is not None and not low <= value < math.inf:
                least = "more than 0" if low == TINY else f"at least {low}"
                raise InputError(f"{flag} {value}: must be {least}, and finite")
            if high is not None and value > high:
                raise InputError(f"{flag} {value}: must be at most {high:g}")
        if self.n_embd % self.n_head:
            raise InputError(f"--n-embd {self.n_embd} must be a multiple of --n-head {self.n_head}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU here; use --device auto or cpu")


# --- the objectives: pure functions of log-probs, averaged over the prompts of a batch -----------

def sft_objective(model, batch, config):
    """−E log p_θ(y|x), y from the SFT set. Returns (to minimise, the loss itself)."""
    loss = -(batch.real_N * answer_logps(model, batch, config.logprob)).sum()
    loss = loss / len(batch.prompt_length_P)
    return loss, loss


def spin_objective(model, batch, config):
    """Eq. 4.7 over all pairs of the batch, and the anchor. Returns (to minimise, L)."""
    player_N, opponent_N = answer_logps(model, batch, config.logprob), batch.opponent_N
    real_B, generated_B, weight_B = batch.pairs(batch.real_N, batch.generated_N)
    if config.method == "dpo":  # both are generated; the oracle prefers what p_data prefers
        real_B, generated_B, weight_B = batch.pairs(batch.generated_N, batch.generated_N)
        weight_B = weight_B * (batch.data_N[real_B] > batch.data_N[generated_B])
    loss = (weight_B * spin_loss(player_N[real_B], player_N[generated_B], opponent_N[real_B],
                                 opponent_N[generated_B], config.lam, config.loss, config.mu)).sum()
    # At θ = θ_t the gradient of L is λ/2 times that of SFT; undo it, so that the learning rate
    # and the weight of an anchor mean the same for every λ.
    total = loss * (2 if config.loss == "space" else 2 / config.lam)
    P = len(batch.prompt_length_P)
    if config.anchor == "mass":
        total = total + config.anchor_weight * mass_anchor(player_N, opponent_N,
                                                           batch.generated_N / P)
    if config.anchor == "sft":
        total = total - config.anchor_weight * (batch.real_N * player_N).sum() / P
    return total, loss


# --- one stage of training -----------------------------------------------------------------------

def fit(player, responses, prompts, config, t, state=None):
    """Train `player` on some prompts: SFT for t = 0, else iteration t of self-play.

    Yields (step, model to evaluate, mean loss since the last, state) `reports` times; the state
    resumes training exactly there. The last model yielded is the result, p_{t+1}.
    """
    steps, lr = (config.steps, config.lr) if t else (config.sft_steps, config.sft_lr)
    objective = spin_objective if t and config.method != "sft" else sft_objective
    optimizer = torch.optim.AdamW(player.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    averaged, start, losses = AveragedModel(player), 0, []
    if state:
        player.load_state_dict(state["player"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    order = prompt_order(len(prompts), steps, config, t)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, min(config.warmup, steps // 2)))
        total, loss = objective(player, responses.select(prompts[order[step]]), config)
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(player.parameters(), config.clip)
        if not math.isfinite(norm):
            raise InputError(f"iteration {t}, step {step + 1}: the gradient is not finite; lower "
                             f"--lr or raise --lam (what was saved last stays in --out)")
        optimizer.step()
        losses.append(loss.item())
        if step + 1 > steps * (1 - config.average):
            averaged.update_parameters(player)  # Polyak: the noise of y' averages out
        if (step + 1) * config.reports // steps > step * config.reports // steps:
            state = {"step": step + 1, "player": player.state_dict(),
                     "averaged": averaged.state_dict(), "optimizer": optimizer.state_dict()}
            best = averaged.module if averaged.n_averaged else player
            yield step + 1, best, sum(losses) / len(losses), state
            losses = []


def stream(seed, t, purpose):
    """The seed of one purpose in one iteration, so that no draw disturbs another, nor a resume."""
    return (seed * 1_000_003 + t) * 2 + purpose


def prompt_order(P, steps, config, t):
    """Which prompts each step takes, [steps, prompts a step]: shuffled passes over all of them."""
    rng = torch.Generator().manual_seed(stream(config.seed, t, 0))
    size = min(P, max(1, config.batch_size // config.negatives))
    passes = [torch.randperm(P, generator=rng) for _ in range(steps * size // P + 1)]
    return torch.cat(passes)[:steps * size].view(steps, size)


def self_play(opponent, world, config, t):
    """y' ~ p_t(·|x) at temperature 1, nothing cut off; then log p_t of every response, once."""
    drawn = draw(opponent, world, config, t)
    if config.history and t > 1:  # scored, like the rest, by the current opponent
        before = load_player(config, t - 2, world.device)
        drawn = [a + b for a, b in zip(drawn, draw(before, world, config, t - 1))]
    responses = world.tabulate(drawn)
    responses.opponent_N = all_logps(opponent, responses, config.logprob)
    return responses


def draw(model, world, config, t):
    """`negatives` responses to each prompt, as {response: count}; iteration t's own random draws."""
    rng = torch.Generator(world.device).manual_seed(stream(config.seed, t, 1))
    prompts = [x for x in world.prompts for _ in range(config.negatives)]
    drawn = generate(model, prompts, max_new_tokens=world.max_new_tokens,
                     end_token=world.end_token, generator=rng)
    return [Counter(map(tuple, drawn[i:i + config.negatives]))
            for i in range(0, len(drawn), config.negatives)]


# --- files: metrics, checkpoints, resume ----------------------------------------------------------

def settings(config) -> dict:
    """What a resumed run must share with the one that was interrupted."""
    free = ("out", "resume", "overwrite", "iters", "device")
    return {name: value for name, value in asdict(config).items() if name not in free}


def open_run(config, world) -> tuple[dict | None, int]:
    """Prepare --out. Returns the state to resume from (or None) and the iteration to start at."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    rows = [{"event": "world", "shown": [world.rows[p] for p in world.shown],
             "counting_kl": world.counting_kl, "logistic": config.loss == "logistic"}]
    state = None
    if config.resume and not (out / "latest.pt").exists():
        raise InputError(f"--resume: there is no latest.pt in {out}; start without --resume")
    if config.resume:
        state = torch.load(out / "latest.pt", weights_only=True, map_location=world.device)
        for name, value in settings(config).items():
            if state["settings"].get(name) != value:
                raise InputError(f"--{name.replace('_', '-')} {value}: the run in {out} was started "
                                 f"with {state['settings'].get(name)}; resume with the same")
        rows = [json.loads(line) for line in open(out / "metrics.jsonl")][:state["rows"]]
    elif (out / "metrics.jsonl").exists() and not config.overwrite:
        raise InputError(f"--out {out}: holds a run already; --resume it, --overwrite it, or "
                         f"name another folder")
    elif config.overwrite:
        for old in [*out.glob("iteration_*.pt"), out / "latest.pt"]:
            old.unlink(missing_ok=True)
    write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "tiktoken": tiktoken.__version__}
    write(out / "config.json", json.dumps(asdict(config) | {"versions": versions}, indent=2).encode())
    return state, state["iteration"] if state else 0


def write(path, data: bytes):
    """Replace a file whole or not at all: a kill leaves the old one."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def record(config, event, t, step, found, seconds):
    """Append one row a split to metrics.jsonl."""
    with open(Path(config.out) / "metrics.jsonl", "a") as file:
        for split, numbers in found.items():
            row = {"event": event, "method": config.method, "iteration": t, "step": step,
                   "split": split, **numbers, "seconds": round(seconds, 2)}
            file.write(json.dumps(row) + "\n")


def save_latest(config, t, state):
    """What --resume needs; model p_{t−1} is in iteration_{t−1}.pt, and y' is drawn again from it."""
    out = Path(config.out)
    torch.save({"iteration": t, "settings": settings(config), **state,
                "rows": len((out / "metrics.jsonl").read_text().splitlines())}, out / "latest.tmp")
    os.replace(out / "latest.tmp", out / "latest.pt")


# --- the run --------------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Algorithm 1 of the paper, after SFT (t = 0). Raises InputError before anything is trained."""
    config.check()
    began = time.time()
    device = config.device if config.device != "auto" else (
        "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    encoding = load_encoding(config.encoding)
    try:
        world = World(read_world(config.data), encoding, config.sft_samples, config.seed,
                      config.block_size, device)
    except InputError as error:
        raise InputError(f"--data {error}") from None
    state, first = open_run(config, world)
    torch.manual_seed(config.seed)
    player = GPT(GPTConfig(encoding.n_vocab, config.block_size, config.n_layer, config.n_head,
                           config.n_embd)).to(device)
    greet(player, world, config, device)
    for t in range(first, config.iters + 1):
        if t == 0:
            responses = world.tabulate()
        else:
            opponent = load_player(config, 0 if config.opponent == "sft" else t - 1, device)  # p_t
            responses = self_play(opponent, world, config, t)  # y' ~ p_t, and log p_t, once
            player = load_player(config, t - 1, device)
        stage = time.time()
        for step, model, loss, state in fit(player, responses, world.splits["train"], config, t,
                                            state if t == first else None):
            found = evaluate(model, responses, world, config, t)
            report(config, t, step, loss, found, time.time() - stage)
            record(config, "step", t, step, found, time.time() - began)
            save_latest(config, t, state)
        save_checkpoint(Path(config.out) / f"iteration_{t}.pt", model, world)  # p_{t+1}
        record(config, "iteration", t, step, found, time.time() - began)
        save_latest(config, t + 1, {})
        show_answers(model, world, config)
        draw_convergence(config.out)
    draw_gif(config.out)
    closing_table(config)
    print(f"{config.out}/convergence.png and .gif drawn; {time.time() - began:.0f} s in all")


def load_player(config, t, device):
    """Model p_t as saved: the frozen opponent, and the player's start."""
    return load_checkpoint(Path(config.out) / f"iteration_{t}.pt", device)[0]


class Parser(argparse.ArgumentParser):
    """argparse, with one line on an error instead of the whole usage."""
    def error(self, message):
        raise InputError(f"{message} (python train.py --help lists every flag)")


def parse_args(argv=None) -> Config:
    """One flag for each field of Config."""
    parser = Parser(description="Fine-tune a small GPT by SFT, then by self-play (SPIN), and watch "
                    "KL(p_data‖p_θ) fall beside what the theory predicts.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), dict(type=f.type, default=f.default)
        if f.type is bool:
            kind = dict(action="store_true")
        elif f.metadata["choices"]:
            kind["metavar"] = "{" + ",".join(map(str, f.metadata["choices"])) + "}"
        parser.add_argument(flag, help=f.metadata["why"].replace("%", "%%"), **kind)
    return Config(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("train.py: stopped; go on with the same flags and --resume",
                       file=sys.stderr) or 130)
