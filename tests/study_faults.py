"""Mistakes of published code, as patches of train.py: what does each cost?

Each function changes functions of the module `train` in its own process, so that the tutorial needs
no switch for what nobody should do. A prompt that is scored along with its answer is not among
them: log p(x) is the same for y and y', so it cancels in SPIN's margin (in SFT it does not).
"""
from dataclasses import replace
from functools import partial

import train
from data.responses import Responses


def counts_only(config):
    """Shares are counts of draws, as everyone else has it: no fault, but the basis of some."""
    Responses.know_shares = lambda table: None


def greedy(config):
    """y' is the likeliest answer, not a sample of p_t."""
    counts_only(config)
    train.generate = partial(train.generate, temperature=0)


def cut_short(config, longest=3):
    """Answers stop after `longest` tokens and are left open: what is drawn is still a sample."""
    counts_only(config)
    generate = train.generate
    train.generate = lambda *args, max_new_tokens, **kwargs: generate(
        *args, max_new_tokens=longest, **kwargs)


def cut_and_closed(config, longest=3):
    """… and END is put behind them, as if the model had finished there."""
    cut_short(config, longest)
    generate = train.generate
    train.generate = lambda *args, end_token, **kwargs: [
        y if y[-1] == end_token else [*y, end_token]
        for y in generate(*args, end_token=end_token, **kwargs)]


def wrong_opponent(config):
    """y' comes from p_t, its log-probs from the SFT model: a reference that is never renewed."""
    counts_only(config)
    logps = train.all_logps
    train.all_logps = lambda opponent, responses, impl: logps(
        train.load_player(config, 0, "cpu"), responses, impl)


def rescored(play, change):
    """`self_play`, with the log-probs under the opponent changed after the shares are known."""
    def wrapped(world, config, t):
        table = play(world, config, t)
        table.opponent_N = change(table, train.frozen_opponent(config, t, world.device))
        return table
    return wrapped


def mean_of_tokens(config):
    """log p is divided by the number of tokens, in the loss; the anchor still sees sums."""
    logps, anchor, length = train.answer_logps, train.mass_anchor, {}

    def answer_logps(model, batch, impl):
        length["N"] = batch.length_N
        return logps(model, batch, impl) / batch.length_N
    train.answer_logps = answer_logps
    train.mass_anchor = lambda player_N, opponent_N, *rest: anchor(
        player_N * length["N"], opponent_N * length["N"], *rest)
    train.self_play = rescored(train.self_play, lambda table, _: table.opponent_N / table.length_N)


def no_end(config):
    """END is not scored, so nothing teaches the model when to stop."""
    logps = train.answer_logps
    train.answer_logps = lambda model, batch, impl: logps(
        model, replace(batch, length_N=batch.length_N - 1), impl)
    train.self_play = rescored(train.self_play, lambda table, opponent: train.all_logps(
        opponent, replace(table, length_N=table.length_N - 1), "eager"))


FAULTS = {f.__name__: f for f in (counts_only, greedy, cut_short, cut_and_closed, wrong_opponent,
                                  mean_of_tokens, no_end)}
