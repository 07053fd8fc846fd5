"""All responses to a prompt as rows that the network reads once, and what each response weighs.

Self-play needs log p(y|x) of many responses to one prompt, and they begin alike. A row holds the
prompt and its responses as a tree, so that what they share is there once. Here the numbers are
places in the row, and an arrow points to a token that the place on its left predicts:

    Greet 0 ─ Ana 1 ─ ANSWER 2 ┬→ Hello 3 ┬→ , 4 ─→ Ana 5 ─→ ! 6 ─→ END        Hello, Ana!
                               │          └→ Ana 7 ─→ . 8 ─→ END               Hello Ana.
                               └→ Hi 9 ─→ END                                  Hi

A token sees itself and its ancestors. In this order (a depth-first walk) place i sees place j
exactly if j ≤ i < end_j, where end_j is the first place after j's subtree: end is 9 for place 3,
and 7 for place 4. A plain text is a tree without branches: every end is the end of the text, and
what is left is the causal mask, j ≤ i. A token's position is the number of its ancestors.
log p(y|x) is the sum over the steps of y's path, END's among them, as in `sequence_logps`; a test
binds the two.

Reading order: `grow`, one prompt's rows → `Rows` and `Part`, what the network reads at a time →
`response_logps` → `ResponseTable` and `known_shares`, the weights → `Responses`.
Dimensions: R rows of T places, U places that score something, S steps of all paths, P prompts with
a table of N responses each (padded with weight 0) and X columns, D width. Log-probs in nats.
"""
import functools
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from model import causal_mask
from spin_loss import token_logps

# What is read at a time: places (rows × width), and pairs in the loss's tables. On a CPU so many
# places stay in the cache, which makes several small parts faster than a large one.
PLACES = {"cpu": 1 << 10, "cuda": 1 << 13}
PAIRS = 1 << 20

COLUMNS = ("is_response", "data", "real", "generated", "opponent", "log_share")  # X, of a table


# --- rows ----------------------------------------------------------------------------------------

def grow(prompt, responses):
    """The rows of one prompt: a list of (places, steps). `responses` are sorted.

    places has (token, position, end) for each place of the row. steps has (place, target, response)
    for each token of each response: the place whose logits score it, the token, and the number of
    its response.

    >>> [(places, steps)] = grow([7, 8], [(1, 2, 9), (1, 9), (3,)])
    >>> places.tolist()  # the prompt, then the tokens 1 and 2; nothing follows 9 and 3
    [[7, 0, 4], [8, 1, 4], [1, 2, 4], [2, 3, 4]]
    >>> steps.tolist()  # the first two responses begin with the same step
    [[1, 1, 0], [2, 2, 0], [3, 9, 0], [1, 1, 1], [2, 9, 1], [1, 3, 2]]
    """
    # Attention's cost grows with the square of a row: long responses that share little are cheaper
    # in rows of their own, although their prompt is then read more than once.
    widest = len(prompt) + max(48, len(prompt))
    rows, path, previous = [], [], ()
    for number, response in enumerate(responses):
        # path[k] is the place that has read k tokens of the response; ANSWER's place for k = 0.
        shared = len(os.path.commonprefix([previous, response]))
        del path[shared + 1:]
        # A new row, if the places that path lacks would make the last one too wide:
        if not rows or len(rows[-1][0]) + len(response) - len(path) > widest:
            rows.append(([(token, i) for i, token in enumerate(prompt)], []))
            path = [len(prompt) - 1]
        places, steps = rows[-1]
        for k, target in enumerate(response):
            if k == len(path):  # the first response of this row that goes on from here
                path.append(len(places))
                places.append((response[k - 1], len(prompt) - 1 + k))
            steps.append((path[k], target, number))
        previous = response
    return [(np.array([(*place, end) for place, end in zip(places, subtree_ends(places))]),
             np.array(steps)) for places, steps in rows]


def subtree_ends(places) -> list[int]:
    """For each (token, position) of a depth-first walk, the first place after its subtree.

    >>> subtree_ends([("a", 0), ("b", 1), ("c", 2), ("d", 2), ("e", 1)])
    [5, 4, 3, 4, 5]
    """
    end, path = [len(places)] * len(places), []
    for i, (_, position) in enumerate(places):
        while path and places[path[-1]][1] >= position:
            end[path.pop()] = i
        path.append(i)
    return end


@dataclass
class Rows:
    """Some rows as tensors, padded to the same width, and the steps that they score."""
    token_RT: torch.Tensor
    position_RT: torch.Tensor
    end_RT: torch.Tensor
    place_U: torch.Tensor  # the places that score something, in R·T
    state_S: torch.Tensor  # which of those scores a step, in U
    target_S: torch.Tensor  # the token that is scored
    response_S: torch.Tensor  # whose token it is, in P·N

    @staticmethod
    def join(rows, N, device) -> "Rows":
        """rows has (prompt's place in the table, places, steps) for each row."""
        places_RT3 = pad_sequence([torch.from_numpy(places) for _, places, _ in rows],
                                  batch_first=True)
        token_RT, position_RT, end_RT = places_RT3.unbind(dim=2)
        T = token_RT.shape[1]
        # A padding place sees all of its row, and is seen by no other: its softmax is a number.
        end_RT = end_RT.masked_fill(end_RT == 0, T)
        place_S, target_S, response_S = np.concatenate([
            steps + (row * T, 0, p * N) for row, (p, _, steps) in enumerate(rows)]).T
        place_U, state_S = np.unique(place_S, return_inverse=True)
        return Rows(*(to_device(x, device) for x in (
            token_RT, position_RT, end_RT, *map(torch.from_numpy, (
                place_U, state_S, target_S.copy(), response_S.copy())))))


def to_device(tensor, device):
    """From pinned memory a GPU fetches a tensor without a wait."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class Part:
    """Some prompts: the rows to read, and tables of their responses, padded with weight 0."""
    prompts: list[int]
    pieces: list[Rows]  # one, unless a single prompt needs more places than are read at a time
    is_response_PN: torch.Tensor  # False for padding
    data_PN: torch.Tensor  # p_data(y|x), exact
    real_PN: torch.Tensor  # y's share in the SFT set
    generated_PN: torch.Tensor  # the weight of y as y' ~ p_t: `known_shares`
    opponent_PN: torch.Tensor  # log p_t(y|x), computed once, for the opponent is frozen
    log_share_PN: torch.Tensor  # for the anchor: log p_t(y|x) if y is real, else the log of y's
                                # share of the samples


def response_logps(model, part: Part, impl="eager"):
    """log p_θ(y|x) of every response, [P, N], nats; 0 for padding. `sequence_logps`, but faster."""
    read = step_logps
    if len(part.pieces) > 1:
        # What a piece needs for its gradient is made again in the backward pass instead of kept.
        read = functools.partial(checkpoint, step_logps, use_reentrant=False,
                                 preserve_rng_state=False)
    logp_S = torch.cat([read(model, rows, impl) for rows in part.pieces])
    response_S = torch.cat([rows.response_S for rows in part.pieces])
    P, N = part.opponent_PN.shape
    return logp_S.new_zeros(P * N).index_add(0, response_S, logp_S).view(P, N)


def step_logps(model, rows: Rows, impl):
    """log p_θ of the token at each step of some rows, [S], nats."""
    T = rows.token_RT.shape[1]
    place_1T = torch.arange(T, device=rows.token_RT.device)[None]
    in_subtree_RTT = place_1T[:, :, None] < rows.end_RT[:, None, :]
    visible_RTT = causal_mask(place_1T, place_1T) & in_subtree_RTT
    hidden_RTD = model.hidden(rows.token_RT, rows.position_RT, visible_RTT)
    hidden_UD = hidden_RTD.flatten(0, 1).index_select(0, rows.place_U)
    return token_logps(hidden_UD, model.head_weight, rows.target_S, impl, rows.state_S)


# --- weights -------------------------------------------------------------------------------------

class ResponseTable:
    """The distinct responses to one prompt, in sorted order, with their rows and weights, [N].

    An expectation over samples is a weighted sum over distinct responses: exactly the same, at a
    fraction of the cost. data, real (a part of data) and sampled map responses, token tuples, to
    weights.
    """
    def __init__(self, prompt, data, real, sampled):
        self.responses = sorted({*data, *sampled})
        self.rows = grow(prompt, self.responses)
        self.width = max(len(places) for places, _ in self.rows)
        weights = lambda of: np.array([of.get(y, 0.0) for y in self.responses])
        self.data_N, self.real_N, self.sampled_N = weights(data), weights(real), weights(sampled)
        self.weigh(np.zeros(len(self.responses)))  # until an opponent scores them

    def weigh(self, opponent_N, n=1, shares="sampled"):
        """Take in log p_t of the responses. n is how many responses were sampled."""
        generated_N = self.sampled_N
        if shares == "known":
            generated_N = known_shares(self.real_N, self.sampled_N, opponent_N, n)
        with np.errstate(divide="ignore"):  # log 0 = −∞
            # Logs, because p_t of a long response is too small for a float.
            log_share_N = np.where(self.real_N > 0, opponent_N, np.log(self.sampled_N))
        columns = {"is_response": np.ones_like(opponent_N), "data": self.data_N,
                   "real": self.real_N, "generated": generated_N, "opponent": opponent_N,
                   "log_share": log_share_N}
        self.columns_NX = torch.tensor(np.stack([columns[name] for name in COLUMNS], axis=1),
                                       dtype=torch.float32)


def known_shares(real_N, sampled_N, opponent_N, n):
    """The weights of y': real responses by p_t itself, others by how often n samples gave them. [N]

    Why not weigh every sampled response by p_t? Because where a sampling misses a response it would
    weigh 0: on average it would count p_t (1 − (1 − p_t)ⁿ), which is too little.

    The real responses have probability `known` together, so with chance 1 − knownⁿ at least one of
    n samples is another response. Where that is so, the others weigh (1 − known)/(1 − knownⁿ)
    together, split by their counts; else they weigh nothing. Dividing by that chance makes their
    mean weight together 1 − known. Samples are alike, so each other response gets its part of this,
    p_t/(1 − known), on average: its mean weight is p_t. The weights of a sampling sum to 1. (To let
    the others weigh their counts, and the real ones the rest, is right on average too, but noisier
    where known is small.)
    """
    known_N = np.where(real_N > 0, np.exp(opponent_N), 0.0)
    other_N = np.where(real_N > 0, 0.0, sampled_N)
    known, other = known_N.sum(), other_N.sum()
    if other == 0:
        return known_N / known
    if known == 0:
        return other_N / other
    # The others' part is never below 1/n, its limit at known = 1, but for rounding.
    part = max((1 - known) / max(1 - known**n, 1e-12), 1 / n)
    return part * other_N / other + (1 - part) * known_N / known_N.sum()


# --- what an iteration learns from ---------------------------------------------------------------

class Responses:
    """All responses of all prompts. `parts` is the one way to read them: for training, for scoring
    by the opponent, and for metrics."""
    def __init__(self, world, samples=None):
        samples = samples or [{}] * len(world.prompts)
        self.tables = [ResponseTable(prompt, data, real, sampled) for prompt, data, real, sampled
                       in zip(world.prompts, world.data, world.real, samples)]

    def parts(self, prompts, device="cpu"):
        """Yield some prompts after another as a Part, prompts of like width together.

        A part has at most PLACES places and PAIRS pairs, unless it is a single prompt: then the
        rows are read in pieces of at most PLACES. So the size of a batch does not decide memory.
        """
        most, some, rows, responses = PLACES[torch.device(device).type], [], 0, 0
        for p in sorted(prompts, key=lambda p: self.tables[p].width):
            table = self.tables[p]
            rows, responses = rows + len(table.rows), max(responses, len(table.responses))
            if some and (rows * table.width > most or (len(some) + 1) * responses**2 > PAIRS):
                yield self.part(some, device)
                some, rows, responses = [], len(table.rows), len(table.responses)
            some.append(p)
        if some:
            yield self.part(some, device)

    def part(self, prompts, device) -> Part:
        """One Part of some prompts."""
        tables = [self.tables[p] for p in prompts]
        N = max(len(table.responses) for table in tables)
        rows = [(i, *row) for i, table in enumerate(tables) for row in table.rows]
        at_a_time = max(1, PLACES[torch.device(device).type] // max(t.width for t in tables))
        pieces = [Rows.join(rows[first:first + at_a_time], N, device)
                  for first in range(0, len(rows), at_a_time)]

        columns_PNX = to_device(
            pad_sequence([table.columns_NX for table in tables], batch_first=True), device)
        column = dict(zip(COLUMNS, columns_PNX.unbind(dim=2)))
        is_response_PN = column["is_response"] > 0
        return Part(prompts, pieces, is_response_PN, column["data"], column["real"],
                    column["generated"], column["opponent"],
                    column["log_share"].masked_fill(~is_response_PN, -torch.inf))


def sft_responses(world) -> Responses:
    """What SFT learns from: the SFT set, and the other responses of p_data for the metrics."""
    return Responses(world)


@torch.no_grad()
def self_play_responses(world, samples, opponent, config) -> Responses:
    """What p_{t+1} learns from: also the samples of p_t, and log p_t of every response.

    samples[p] counts the opponent's responses to prompt p.
    """
    shares = [{y: count / some.total() for y, count in some.items()} for some in samples]
    responses = Responses(world, shares)
    for part in responses.parts(range(len(samples)), opponent.head_weight.device):
        logp_PN = response_logps(opponent, part, config.logprob).double().cpu().numpy()
        for p, logp_N in zip(part.prompts, logp_PN):
            table = responses.tables[p]
            table.weigh(logp_N[:len(table.responses)], samples[p].total(), config.shares)
    return responses
