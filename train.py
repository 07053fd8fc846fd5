"""Self-play fine-tuning (SPIN) from nothing: SFT, then a GPT against its own previous self.

    for t = 0, 1, …:   p_t ← p_θ, frozen;   y' ~ p_t(·|x);   p_{t+1} ← argmin_θ L(θ; p_t)

Reading order: `Config` → the objectives → `fit`, which trains one policy → `self_play`, the
opponent's responses → `main`, the paper's Algorithm 1.

Departures from the paper (arXiv 2401.01335):
 1. every pair (y, y') of a prompt is compared, not one y' for each y        `pair_loss`
 2. as y', responses of the SFT set are weighed by p_t(y') itself            `known_shares`
 3. the mass anchor; --anchor none is the paper's loss alone                 `mass_anchor`
 4. Adam, whose rate falls to 0; λ = 2 throughout; no y' of the iteration before

Dimensions: P prompts with a table of N responses each. Log-probs and losses are in nats.
"""
import copy
from collections import Counter
from dataclasses import dataclass

from data import InputError  # first: it sets sys.excepthook, which names a missing package

import numpy as np
import torch

from data.gpt2 import load_gpt2
from data.responses import response_logps, self_play_responses, sft_responses
from data.run.console import Countdown, print_responses
from data.run.folder import Run
from data.run.options import TINY, command, make_plain, option, parse_args, prepare
from data.run.parallel import add_gradients, gather, rank, ranks
from data.tokenizer import RANK_FILE
from data.world import WORLD
from model import GPT, GPTConfig
from sample import generate, rows_that_fit
from spin_loss import LOSSES, mass_anchor, pair_loss


@dataclass
class Config:
    """Every setting of a run, once; each field is a flag (lr → --lr): option(default, why, least,
    most)."""
    iters: int = option(3, "SPIN iterations after SFT; 0 stops at SFT", 0, 10_000)
    method: str = option("spin", "what follows SFT: self-play, or more SFT",
                         choices=("spin", "sft"))
    lam: float = option(2.0, "λ: an iteration moves log p by (1/λ) log p_data/p_t, so λ = 2 is a "
                        "careful step; exact self-play diverges below ½", TINY, 1e6)
    loss: str = option("logistic", "ℓ: one line of spin_loss.py each", choices=LOSSES)
    anchor: str = option("mass", "what stops the leak of probability: nothing, the mass of the "
                         "responses seen, or the SFT loss",
                         choices=("none", "mass", "sft"))
    anchor_weight: float = option(2.0, "1 to 5 holds the mass anchor; 0.2 is plenty for the SFT "
                                  "anchor", 0, 1e6)
    shares: str = option("known", "how y' are weighted: real ones in proportion to p_t, or all by "
                         "how often they were sampled, as in the paper",
                         choices=("known", "sampled"))
    opponent: str = option("previous", "renew the opponent each iteration, or keep the SFT model "
                           "for ever (then it is no self-play)", choices=("previous", "sft"))
    steps: int = option(250, "optimiser steps in an iteration; most of the gain is made by then",
                        1, 10**9)
    negatives: int = option(16, "responses the opponent gives to each prompt", 1, 10**6)
    batch_size: int = option(1024, "generated responses in a step, in whole prompts: 1024 with 16 "
                             "negatives are 64 prompts a step, and in SFT as many", 1, 10**9)
    lr: float = option(4e-3, "high, because 250 steps are few, and so small a model allows it; "
                       "level for half an iteration, then falling to 0, which removes noise",
                       TINY, 10)
    sft_steps: int = option(212, "few: self-play should start from a weak model", 1, 10**9)
    sft_lr: float = option(2e-3, "learning rate of SFT", TINY, 10)
    sft_samples: int = option(2048, "responses of each train prompt in the SFT set; equal ones are "
                              "scored once, so more cost nothing", 1, 10**6)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to this norm", TINY, 1e9)
    n_layer: int = option(2, "layers; one learns this world too, but more slowly", 1, 1000)
    n_head: int = option(4, "heads; 4 generalise a little better than 2", 1, 1000)
    n_embd: int = option(64, "width", 1, 10**5)
    block_size: int = option(128, "tokens of the longest prompt and response together, ANSWER and "
                             "END among them", 2, 10**6)
    seed: int = option(0, "one seed for weights, SFT set, sampling and order", 0, 2**31)
    reports: int = option(8, "evaluations in a stage", 1, 10**6)
    data: str = option(str(WORLD), "a world, or plain prompt/response pairs, as JSON lines")
    heldout: float = option(0.0, "share of the train prompts to hold out, beside the file's own",
                            0, 0.9)
    encoding: str = option(str(RANK_FILE), "a rank file, or the name of a tiktoken encoding")
    init: str = option("", "start from GPT-2's weights: model.safetensors, or a state dict that "
                       "torch.save wrote; sizes come from the file (data/GPT2.md)")
    out: str = option("out", "folder for metrics, checkpoints and figures")
    threads: int = option(1, "CPU threads: the tensors are so small that two threads mostly wait "
                          "for each other, and on a busy machine steps take many times longer",
                          1, 1024)
    device: str = option("auto", "auto takes a CUDA GPU where there is one",
                         choices=("auto", "cpu", "cuda"))
    logprob: str = option("eager", "how log p is computed", choices=("eager", "fused"))
    show: bool = option(False, "open a window that follows the run")
    resume: bool = option(False, "go on with the run in --out, with its flags")
    overwrite: bool = option(False, "replace the run in --out")

    def __post_init__(self):
        make_plain(self)

    def prompts_a_step(self) -> int:
        """Whole prompts, as many as give batch_size generated responses."""
        return max(1, self.batch_size // self.negatives)


# --- the objectives: what a step minimises, for each prompt, [P] ---------------------------------
# A Part (data/responses.py) has tables of the responses to some prompts: what each weighs as a real
# response (real_PN) and as a generated one (generated_PN), log p_t (opponent_PN), and its share in
# the anchor (log_share_PN): log p_t of a real response, else the log of its fraction.

def sft_objective(player, part, config):
    """−E log p_θ(y|x), y from the SFT set: maximum likelihood."""
    return sft_loss(response_logps(player, part, config.logprob), part)


def sft_loss(player_PN, part):
    """−Σ_y share(y|x) log p_θ(y|x), over the SFT set's responses to each prompt."""
    return -(part.real_PN * player_PN).sum(dim=1)


def spin_objective(player, part, config):
    """Eq. 4.7 over all pairs (y, y') of each prompt, y from the SFT set and y' from p_t."""
    player_PN = response_logps(player, part, config.logprob)
    loss_P = pair_loss(player_PN, part.opponent_PN, part.real_PN, part.generated_PN, config.lam,
                       config.loss)
    if config.anchor == "mass":
        anchor_P = mass_anchor(player_PN, part.opponent_PN, part.log_share_PN)
    elif config.anchor == "sft":
        anchor_P = sft_loss(player_PN, part)
    else:
        return loss_P
    return loss_P + config.anchor_weight * anchor_P


# With more SFT the opponent is sampled too, but for the metrics alone.
OBJECTIVES = {"spin": spin_objective, "sft": sft_objective}


# --- training one policy -------------------------------------------------------------------------

def fit(policy, objective, responses, stage, run):
    """Train a copy of the policy and return it; the policy itself stays as it is.

    Stage 0 is SFT and makes p_0; stage t + 1 makes p_{t+1}. objective(player, part, config) gives
    the loss of each prompt in a Part of the responses. It must not draw random numbers: a resumed
    run does not restore their state.
    """
    config, train = run.config, run.world.splits["train"]
    steps, lr = (config.steps, config.lr) if stage else (config.sft_steps, config.sft_lr)
    player = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(player.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    # The rate is level for half of the steps, then falls to 0; otherwise the noise of the batches
    # would keep the policy off its optimum.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    learner = player, optimizer, schedule  # what a resumed run needs
    batches = prompt_batches(train, steps, config, stage)
    begin = run.restore(learner)  # 0, or after --resume the steps that were done
    for step in range(begin, steps):
        optimizer.zero_grad()
        # With several processes each takes some of the prompts; parts are what memory holds.
        for part in responses.parts(batches[step][rank()::ranks()], run.device):
            (objective(player, part, config).sum() / len(batches[step])).backward()
        add_gradients(player)
        clip_gradients(player, config.max_grad_norm, stage, step)
        optimizer.step()
        schedule.step()
        run.report(stage, step + 1, steps, responses, learner)
    show_responses(player, stage, run)
    return player


def clip_gradients(player, most, stage, step):
    """Scale the gradient down to a norm of at most `most`; InputError if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(player.parameters(), most)
    if not norm.isfinite():
        raise InputError(f"iteration {stage}, step {step + 1}: the gradient is not finite; start "
                         f"again with a lower --{'lr' if stage else 'sft-lr'}")


def prompt_batches(train, steps, config, stage) -> list[list[int]]:
    """Which prompts each step takes: shuffled passes over all of them, by whole batches.

    The incomplete batch at the end of a pass is dropped, so that no step takes a prompt twice.
    """
    rng = torch.Generator().manual_seed(seed_for(config.seed, stage, 0))
    size = min(len(train), config.prompts_a_step())
    batches = []
    while len(batches) < steps:
        order = torch.randperm(len(train), generator=rng).tolist()
        batches += [[train[i] for i in order[first:first + size]]
                    for first in range(0, len(train) - size + 1, size)]
    return batches[:steps]


def seed_for(seed, *purpose) -> int:
    """A seed for one purpose, so that no use of random numbers disturbs another, nor a resume.

    The purpose is a stage and 0 for the order of prompts, 1 for the samples, 2 for what is shown.
    """
    return int(np.random.SeedSequence((seed, *purpose)).generate_state(1)[0])


# --- the opponent's responses --------------------------------------------------------------------

def self_play(opponent, t, run):
    """y' ~ p_t(·|x) at temperature 1, without top-k; then log p_t of every response, once."""
    samples = sample_responses(opponent, run.world, run.config, t)
    return self_play_responses(run.world, samples, opponent, run.config)


def sample_responses(model, world, config, t) -> list[Counter]:
    """`negatives` responses of p_t to each prompt, as {response: count}.

    Held-out prompts get theirs for the metrics alone. A chunk of responses has a generator of its
    own: which process samples it makes no difference.
    """
    prompt_of = [p for p in range(len(world.prompts)) for _ in range(config.negatives)]
    longest = max(map(len, world.prompts)) + world.max_new_tokens
    chunk, mine = rows_that_fit(model, longest), []
    countdown = Countdown(f"iteration {t + 1}, sampled", len(prompt_of))
    for first in range(chunk * rank(), len(prompt_of), chunk * ranks()):
        some = prompt_of[first:first + chunk]
        rng = torch.Generator(model.head_weight.device)
        rng.manual_seed(seed_for(config.seed, t + 1, 1, first))
        sampled = generate(model, [world.prompts[p] for p in some], end_token=world.end_token,
                           max_new_tokens=world.max_new_tokens, generator=rng)
        mine += [(p, tuple(y)) for p, y in zip(some, sampled)]
        countdown.say(first + len(some))
    counts = [Counter() for _ in world.prompts]
    for found in gather(mine):
        for p, y in found:
            counts[p][y] += 1
    return counts


def show_responses(policy, stage, run, count=5):
    """Print a few fresh responses to the prompts shown in the figures."""
    world, prompts = run.world, run.world.shown()
    rng = torch.Generator(policy.head_weight.device).manual_seed(
        seed_for(run.config.seed, stage, 2))
    drawn = generate(policy, [world.prompts[p] for p in prompts for _ in range(count)],
                     max_new_tokens=world.max_new_tokens, end_token=world.end_token, generator=rng)
    texts = [world.encoding.decode([k for k in y if k != world.end_token]) for y in drawn]
    print_responses([world.rows[p]["prompt"] for p in prompts],
                    [texts[i:i + count] for i in range(0, len(texts), count)])


# --- the run -------------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Algorithm 1 of the paper, after SFT. Raises InputError before anything is trained."""
    world, device = prepare(config)
    run = Run(config, world, device)
    # run.stage is the first one to do: 0, or after --resume that which was interrupted.
    policy = run.policy(run.stage - 1) if run.stage else new_policy(world, config).to(device)
    run.print_start(policy)

    if run.stage == 0:
        policy = fit(policy, sft_objective, sft_responses(world), 0, run)       # p_0
    for t in run.unfinished(range(config.iters)):
        opponent = policy if config.opponent == "previous" else run.policy(0)   # p_t, frozen
        responses = self_play(opponent, t, run)                                 # y' ~ p_t
        policy = fit(policy, OBJECTIVES[config.method], responses, t + 1, run)  # p_{t+1}
    run.close()


def new_policy(world, config) -> GPT:
    """A GPT with fresh weights, or with those of --init."""
    torch.manual_seed(config.seed)
    n_vocab = world.encoding.n_vocab
    if config.init:
        return load_gpt2(config.init, n_vocab)
    return GPT(GPTConfig(n_vocab, config.block_size, config.n_layer, config.n_head,
                         config.n_embd))


if __name__ == "__main__":
    command("train.py", lambda: main(parse_args(
        Config, "Fine-tune a small GPT by SFT, then by self-play (SPIN), and watch KL(p_data‖p_θ) "
                "fall beside what the theory predicts.")))
