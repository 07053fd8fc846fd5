"""Mistakes that published code really made, each as a change of train.py: what does it cost?

Each function changes the module `train` in its own process, so that the tutorial needs no switch
for what nobody should do. The first one is no mistake, but the basis of others: where p_t(y) is
known exactly for the responses of the SFT set, as the tutorial has it, some mistakes would hide.

To score the prompt along with its response is not among them: log p(x) is the same for y and y',
so it cancels in SPIN's margin. (In SFT it does not.)

Reading order: what is sampled → what is scored → `MISTAKES`.
"""
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data.responses
import train
from data.run.checkpoint import load_policy


# --- what is sampled -----------------------------------------------------------------------------

def counts_only(config):
    """A response's share under p_t is how often it was sampled, as in everyone else's code."""
    data.responses.known_shares = lambda prompt_N, real_N, sampled_N, opponent_N, n: sampled_N


def greedy(config):
    """y' is the likeliest response, not a sample of p_t."""
    counts_only(config)
    train.generate = partial(train.generate, temperature=0)


def cut_short(config, longest=3):
    """Generation stops after `longest` tokens, without END: what is drawn is still a sample."""
    counts_only(config)
    generate = train.generate
    train.generate = lambda *args, max_new_tokens, **kwargs: generate(
        *args, max_new_tokens=longest, **kwargs)


def cut_and_closed(config, longest=3):
    """… and END is put behind it, as if the model had finished there."""
    cut_short(config, longest)
    generate = train.generate
    train.generate = lambda *args, end_token, **kwargs: [
        y if y[-1] == end_token else [*y, end_token]
        for y in generate(*args, end_token=end_token, **kwargs)]


# --- what is scored ------------------------------------------------------------------------------

def wrong_opponent(config):
    """y' comes from p_t, but its log-probs come from the SFT model: a reference never renewed."""
    counts_only(config)
    logps = train.all_logps
    train.all_logps = lambda opponent, trees, impl: logps(
        load_policy(Path(config.out) / "iteration_0.pt")[0], trees, impl)


def rescored(change):
    """Let `self_play` end with other log-probs of the opponent: change(opponent, responses)."""
    play = train.self_play

    def wrapped(opponent, config, t, run):
        responses = play(opponent, config, t, run)
        return replace(responses, opponent_N=change(opponent, responses))
    train.self_play = wrapped


def mean_of_tokens(config):
    """The loss sees log p divided by the number of tokens; the anchor still sees sums."""
    logps, anchor, lengths = train.response_logps, train.mass_anchor, {}

    def response_logps(model, batch, impl="eager"):
        lengths["N"] = torch.bincount(batch.response_L, minlength=batch.N)
        return logps(model, batch, impl) / lengths["N"]
    train.response_logps = response_logps
    train.mass_anchor = lambda player_N, opponent_N, *rest: anchor(
        player_N * lengths["N"], opponent_N * lengths["N"], *rest)
    rescored(lambda _, responses: responses.opponent_N / responses.trees.length_N)


def no_end(config):
    """END is not scored, so nothing teaches the model when to stop."""
    logps = data.responses.response_logps

    def response_logps(model, batch, impl="eager"):
        goes_on_L = torch.ones_like(batch.response_L, dtype=torch.bool)
        goes_on_L[:-1] = batch.response_L[1:] == batch.response_L[:-1]
        goes_on_L[-1] = False  # the last step of a path, like the last of each other one
        return logps(model, replace(batch, edge_L=batch.edge_L[goes_on_L],
                                    response_L=batch.response_L[goes_on_L]), impl)

    def opponent_logps(opponent, responses):
        data.responses.response_logps = response_logps
        try:
            return train.all_logps(opponent, responses.trees, config.logprob)
        finally:
            data.responses.response_logps = logps
    train.response_logps = response_logps
    rescored(opponent_logps)


MISTAKES = {
    counts_only: "a share is a count of samples (no mistake)",
    greedy: "the likeliest response instead of a sample",
    cut_short: "cut after 3 tokens, left open (no mistake)",
    cut_and_closed: "cut after 3 tokens, taken as finished",
    wrong_opponent: "y' from p_t, log p_t(y) from the SFT model",
    mean_of_tokens: "mean over tokens instead of sum",
    no_end: "END not scored"}
MISTAKES = {change.__name__: (change, text) for change, text in MISTAKES.items()}
