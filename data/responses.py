"""All responses to a prompt as one prefix tree: the network reads each distinct prefix once.

Self-play needs log p(y|x) of many responses to one prompt, and they begin alike. Written as a tree,
what they share is there once. Here a number is a node, a token that the network reads, and the
arrows are edges: each leads to a token that is scored by the node on its left.

    Greet 0 ─ Ana 1 ─ ANSWER 2 ┬→ Hello 3 ┬→ , 4 ─→ Ana 5 ─→ ! 6 ─→ END        Hello, Ana!
                               │          └→ Ana 7 ─→ . 8 ─→ END               Hello Ana.
                               └→ Hi 9 ─→ END                                  Hi

A node sees itself and its ancestors. Numbered as above, in the order of a depth-first walk, node i
sees node j exactly if j ≤ i < end_j, where end_j is the first node after j's subtree: end is 9 for
node 3, and 7 for node 4. In a plain text every subtree reaches to the end of the text, and what is
left is the causal mask, j ≤ i. A node's position is the number of its ancestors; log p(y|x) is the
sum over the edges of y's path, END's among them.

At a first reading, skip to `response_logps` and `Responses`: what stands between is bookkeeping,
and a test binds it to `sequence_logps`.

Reading order: `grow`, one tree → `PrefixTrees` → `TreeCache` → `response_logps` → `Responses`.
Dimensions: P prompts, K trees, M nodes, U nodes that score something, E edges, N responses (of all
prompts), L steps of their paths, R rows of T places for attention, B pairs, D width. Nats.
"""
import os
from dataclasses import dataclass

import numpy as np
import torch

from model import KVCache, causal_mask
from spin_loss import token_logps


LARGE_TREE = 128  # nodes: beyond, a prompt's responses are cut into several trees


def grow(prompt, responses) -> dict[str, list[int]]:
    """The tree of one prompt. `responses` are sorted, so that those which begin alike are adjacent.

    >>> tree = grow([7, 8], [(1, 2, 9), (1, 9), (3,)])
    >>> tree["token"], tree["depth"], tree["end"]  # 7 and 8, the prompt, are nodes 0 and 1
    ([7, 8, 1, 2], [0, 1, 2, 3], [4, 4, 4, 4])
    >>> list(zip(tree["parent"], tree["target"]))  # nothing follows 9 and 3: edges, but no nodes
    [(1, 1), (2, 2), (3, 9), (2, 9), (1, 3)]
    >>> list(zip(tree["response"], tree["edge"]))  # the second response shares its first edge
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 3), (2, 4)]
    """
    tree = {"token": list(prompt), "depth": list(range(len(prompt))),
            "parent": [], "target": [], "response": [], "edge": []}
    nodes, edges = [len(prompt) - 1], []  # of the current path: nodes[k] has read k of its tokens
    previous = ()
    for number, response in enumerate(responses):
        shared = len(os.path.commonprefix([previous, response]))
        del nodes[shared + 1:], edges[shared:]
        for k in range(shared, len(response)):
            if k == len(nodes):  # the first response that goes on from here
                nodes.append(len(tree["token"]))
                tree["token"].append(response[k - 1])
                tree["depth"].append(len(prompt) + k - 1)
            edges.append(len(tree["parent"]))
            tree["parent"].append(nodes[k])
            tree["target"].append(response[k])
        tree["response"] += [number] * len(edges)
        tree["edge"] += edges
        previous = response
    tree["end"] = subtree_ends(tree["depth"])
    return tree


def subtree_ends(depth) -> list[int]:
    """For each node of a depth-first walk, the first node after its subtree.

    >>> subtree_ends([0, 1, 2, 2, 1])
    [5, 4, 3, 4, 5]
    """
    end, path = [len(depth)] * len(depth), []
    for node, level in enumerate(depth):
        while path and depth[path[-1]] >= level:
            end[path.pop()] = node
        path.append(node)
    return end


def runs(prompt, responses, most):
    """Cut sorted responses into runs whose trees have at most `most` nodes, if need be.

    Attention's cost grows with the square of a tree: long responses that share little are cheaper
    in trees of their own, although their prompt is then read more than once.
    """
    run, size, previous = [], len(prompt), ()
    for response in responses:
        new = len(response) - len(os.path.commonprefix([previous, response]))
        if run and size + new > most:
            yield run
            run, size, new = [], len(prompt), len(response)
        run.append(response)
        size, previous = size + new, response
    yield run


def grow_all(prompt, responses) -> dict[str, np.ndarray]:
    """The tree of one prompt, or several if it would be large; `size` is the nodes of each.

    Numbers run on over all trees of the prompt: `parent` over the nodes that score something,
    `response` over the responses, `edge` over the edges. `end` starts anew in each tree.
    """
    most = max(LARGE_TREE, len(prompt) + max(map(len, responses), default=0))
    columns = {name: [] for name in ("token", "depth", "end", "parent", "target", "response",
                                    "edge")}
    sizes, scored, number = [], 0, 0
    for run in runs(prompt, responses, most):
        tree = grow(prompt, run)
        shift = {"parent": scored - (len(prompt) - 1), "response": number,
                 "edge": len(columns["parent"])}
        for name, column in columns.items():
            column += [x + shift.get(name, 0) for x in tree[name]]
        sizes.append(len(tree["token"]))
        scored, number = scored + sizes[-1] - (len(prompt) - 1), number + len(run)
    return {name: np.array(column, dtype=np.int64) for name, column in columns.items()} | {
        "size": np.array(sizes)}


class PrefixTrees:
    """The trees of all prompts, as flat arrays on the host, prompt after prompt.

    prompts[p] is a list of tokens, closed by ANSWER; responses[p] are distinct tuples of tokens,
    closed by END unless generation was cut short. `self.responses` has them sorted: that is the
    order of the N responses everywhere. Nodes, edges and responses are numbered from 0 in each
    prompt.
    """
    def __init__(self, prompts, responses):
        self.responses = [sorted(some) for some in responses]
        trees = [grow_all(prompt, some) for prompt, some in zip(prompts, self.responses)]
        self.columns = {name: np.concatenate([tree[name] for tree in trees]) for name in trees[0]}
        # ANSWER's depth: nodes that deep, and deeper ones, score something.
        self.answer_P = np.array([len(prompt) - 1 for prompt in prompts])
        self.length_N = np.array([len(y) for some in self.responses for y in some])
        first = lambda counts: np.cumsum([0, *counts])  # prompt p has first[p] … first[p + 1] − 1
        self.first_node = first(len(tree["token"]) for tree in trees)
        self.first_tree = first(len(tree["size"]) for tree in trees)
        self.first_edge = first(len(tree["parent"]) for tree in trees)
        self.first_step = first(len(tree["response"]) for tree in trees)
        self.first_response = first(len(some) for some in self.responses)

    def batch(self, prompts, device="cpu") -> "TreeBatch":
        """The trees of some prompts side by side, as tensors; prompts[i] becomes prompt i."""
        prompts = np.asarray(prompts)
        node_M, nodes_P = parts_of(self.first_node, prompts)
        tree_K, trees_P = parts_of(self.first_tree, prompts)
        edge_E, edges_P = parts_of(self.first_edge, prompts)
        step_L, steps_P = parts_of(self.first_step, prompts)
        response_N, responses_P = parts_of(self.first_response, prompts)
        answer_P, depth_M = self.answer_P[prompts], self.columns["depth"][node_M]

        size_K = self.columns["size"][tree_K]
        row_K, column_K, (R, T) = pack(size_K)
        slot_M = np.arange(len(node_M)) + np.repeat(row_K * T + column_K - before(size_K), size_K)
        end_RT = np.full((R, T), T)  # an empty place sees itself: its softmax must be a number
        end_RT.flat[slot_M] = self.columns["end"][node_M] + np.repeat(column_K, size_K)
        scored_P = nodes_P - trees_P * answer_P
        columns = dict(
            token_M=self.columns["token"][node_M], position_M=depth_M, slot_M=slot_M,
            end_RT=end_RT, scored_U=np.flatnonzero(depth_M >= np.repeat(answer_P, nodes_P)),
            parent_E=self.columns["parent"][edge_E] + np.repeat(before(scored_P), edges_P),
            target_E=self.columns["target"][edge_E],
            edge_L=self.columns["edge"][step_L] + np.repeat(before(edges_P), steps_P),
            response_L=(self.columns["response"][step_L]
                        + np.repeat(before(responses_P), steps_P)))
        return TreeBatch(**{name: to_device(x, device) for name, x in columns.items()},
                         N=len(response_N), longest=int(depth_M.max()) + 1)


def parts_of(first, prompts):
    """Where the entries of some prompts stand in a flat array, and how many each prompt has."""
    count_P = first[prompts + 1] - first[prompts]
    shift_P = first[prompts] - before(count_P)
    return np.arange(count_P.sum()) + np.repeat(shift_P, count_P), count_P


def before(count_P):
    """How many entries stand before each prompt's first: [3, 1, 2] -> [0, 3, 4]"""
    return np.cumsum(count_P) - count_P


def pack(size_K):
    """Where each tree stands: rows are as wide as the largest tree, and small trees share one.

    Returns each tree's row and first column, and the shape (rows, columns). First fit, large trees
    first. No tree sees another in its row: j ≤ i < end_j holds only within a tree.

    >>> pack(np.array([2, 5, 3]))
    (array([1, 0, 1]), array([3, 0, 0]), (2, 5))
    """
    width, room = int(size_K.max()), []
    row_K, column_K = np.zeros_like(size_K), np.zeros_like(size_K)
    for k in np.argsort(-size_K, kind="stable"):
        row = next((row for row, left in enumerate(room) if left >= size_K[k]), len(room))
        if row == len(room):
            room.append(width)
        row_K[k], column_K[k] = row, width - room[row]
        room[row] -= int(size_K[k])
    return row_K, column_K, (len(room), width)


def to_device(array, device):
    """A host array as a tensor there. From pinned memory a GPU fetches it without a wait."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class TreeBatch:
    """The trees of some prompts, as the network reads them."""
    token_M: torch.Tensor  # what each node reads
    position_M: torch.Tensor  # how many ancestors it has
    slot_M: torch.Tensor  # its place in [R, T], flattened
    end_RT: torch.Tensor  # the place after its subtree, in its own row
    scored_U: torch.Tensor  # the nodes from which edges go out: ANSWER and all after it
    parent_E: torch.Tensor  # which of those each edge leaves
    target_E: torch.Tensor  # the token that it leads to
    edge_L: torch.Tensor  # the edges of all paths, one after another
    response_L: torch.Tensor  # … and the response that each is a step of
    N: int  # how many responses there are
    longest: int  # positions that the deepest node needs


class TreeCache(KVCache):
    """Nodes stay flat, [M, D]; attention alone arranges them in rows, [R, T]."""
    def __init__(self, batch):
        super().__init__()
        self.batch, self.shape_RT = batch, batch.end_RT.shape

    def place(self, tokens_M, block_size):
        if self.batch.longest > block_size:
            raise ValueError(f"{self.batch.longest} tokens do not fit the model's block_size of "
                             f"{block_size}")
        order_1T = torch.arange(self.shape_RT[1], device=tokens_M.device)[None]
        in_subtree_RTT = order_1T[:, :, None] < self.batch.end_RT[:, None, :]
        self.visible_BTC = causal_mask(order_1T, order_1T) & in_subtree_RTT
        return self.batch.position_M

    def in_rows(self, x_MD):
        R, T = self.shape_RT
        places = x_MD.new_zeros(R * T, x_MD.shape[1]).index_copy(0, self.batch.slot_M, x_MD)
        return places.view(R, T, -1)

    def as_given(self, x_RTD):
        return x_RTD.flatten(0, 1).index_select(0, self.batch.slot_M)


def response_logps(model, batch: TreeBatch, impl="eager"):
    """log p_θ(y|x) of every response in a batch, [N], nats: `sequence_logps`, but faster."""
    hidden_UD = model.hidden(batch.token_M, TreeCache(batch), batch.scored_U)
    logp_E = token_logps(hidden_UD, model.head_weight, batch.target_E, impl, batch.parent_E)
    logp_L = logp_E.index_select(0, batch.edge_L)
    return logp_E.new_zeros(batch.N).index_add(0, batch.response_L, logp_L)


@torch.no_grad()
def all_logps(model, trees: PrefixTrees, impl="eager"):
    """log p of every response, [N], a float64 array; some prompts at a time, to bound memory."""
    device, V = model.head_weight.device, len(model.head_weight)
    most = max(1, (1 << 22) // V)  # nodes at a time: 16 MB of logits
    first, P, parts = 0, len(trees.answer_P), []
    while first < P:
        fits = np.searchsorted(trees.first_node, trees.first_node[first] + most, side="right") - 1
        prompts = np.arange(first, max(first + 1, fits))
        parts.append(response_logps(model, trees.batch(prompts, device), impl))
        first += len(prompts)
    return torch.cat(parts).cpu().double().numpy()  # an Apple GPU has no float64


# --- what an iteration learns from ---------------------------------------------------------------

@dataclass
class Responses:
    """All responses of all prompts, and how often each comes: arrays [N] on the host.

    A share is a probability or a frequency: data_N, real_N and generated_N sum to 1 over a prompt's
    responses (or to 0, where there are none). An expectation over samples is then a weighted sum
    over distinct responses: exactly the same, at a fraction of the cost.
    """
    trees: PrefixTrees  # of all prompts; a Batch's is a TreeBatch: those of some, as tensors
    prompt_N: np.ndarray  # the prompt of each response, in ascending order
    data_N: np.ndarray  # p_data(y|x), exact
    real_N: np.ndarray  # share in the SFT set
    log_share_N: np.ndarray  # for the anchor: log p_t(y|x) if y is in the SFT set, else the log of
                             # y's share of the samples; their exponentials need not sum to 1
    generated_N: np.ndarray  # what the loss compares with: `known_shares`, or older samples too
    opponent_N: np.ndarray  # log p_t(y|x), nats, computed once: the opponent is frozen

    def batch(self, prompts, device="cpu") -> "Batch":
        """The part of the table that belongs to some prompts, as tensors."""
        response_N, responses_P = parts_of(self.trees.first_response, np.asarray(prompts))
        shares = {name: getattr(self, f"{name}_N")[response_N].astype(np.float32)
                  for name in ("data", "real", "log_share", "generated", "opponent")}
        prompt_N = np.repeat(np.arange(len(prompts)), responses_P)
        return Batch(self.trees.batch(prompts, device), len(prompts), prompt_N, shares, device)


class Batch:
    """The responses of P prompts as tensors [N]; `pairs` finds those that the loss compares."""
    def __init__(self, trees: TreeBatch, P, prompt_N, shares, device):
        self.trees, self.P = trees, P
        self.host, self.host_prompt_N, self.device = shares, prompt_N, device
        self.prompt_N = to_device(prompt_N, device)
        self.data_N, self.real_N, self.log_share_N, self.opponent_N = (
            to_device(shares[name], device) for name in ("data", "real", "log_share", "opponent"))

    def pairs(self, first, second):
        """All pairs of one prompt, weighed by the product of two shares, averaged over prompts.

        first and second name shares: "real", "generated". Returns i_B, j_B, weight_B.
        """
        found = pairs(self.host_prompt_N, self.host[first], self.host[second])
        i_B, j_B, weight_B = (to_device(x, self.device) for x in found)
        return i_B, j_B, weight_B / self.P


def pairs(prompt_N, first_N, second_N):
    """All pairs (i, j) of responses to one prompt with weight first[i]·second[j] > 0.

    n real and m generated samples give n·m pairs for n + m log-probs. prompt_N is ascending.

    >>> i, j, weight = pairs(np.array([0, 0, 1]), np.array([1, 0, 1]), np.array([0.5, 0.5, 1]))
    >>> i.tolist(), j.tolist(), weight.tolist()
    ([0, 0, 2], [0, 1, 2], [0.5, 0.5, 1.0])
    """
    i_I, j_J = np.flatnonzero(first_N), np.flatnonzero(second_N)
    partners_P = np.bincount(prompt_N[j_J], minlength=prompt_N[-1] + 1)  # each prompt's number of j
    partners_I = partners_P[prompt_N[i_I]]
    i_B = np.repeat(i_I, partners_I)
    first_partner_I = before(partners_P)[prompt_N[i_I]]
    j_B = j_J[np.arange(len(i_B)) + np.repeat(first_partner_I - before(partners_I), partners_I)]
    return i_B, j_B, first_N[i_B] * second_N[j_B]


def sft_responses(world) -> Responses:
    """What SFT learns from: the responses of p_data, and their shares in the SFT set."""
    trees = PrefixTrees(world.prompts, world.data)
    none_N = np.zeros(trees.first_response[-1])
    return Responses(trees, prompt_of_each(trees), shares_of(world.data, trees),
                     shares_of(world.real, trees), none_N, none_N, none_N)


def self_play_responses(world, samples, older, opponent_logps) -> Responses:
    """What p_{t+1} learns from: also the samples of p_t, and log p_t of every response.

    samples[p] counts the opponent's responses to prompt p; `older` (or None) those of p_{t−1}.
    opponent_logps(trees) gives log p_t of all of them.
    """
    older_counts = older or [{}] * len(samples)
    trees = PrefixTrees(world.prompts, [
        {*data, *own, *old} for data, own, old in zip(world.data, samples, older_counts)])
    prompt_N, real_N = prompt_of_each(trees), shares_of(world.real, trees)
    opponent_N = opponent_logps(trees)
    sampled_N, n = shares_of(samples, trees), max(sum(some.values()) for some in samples)
    generated_N = known_shares(prompt_N, real_N, sampled_N, opponent_N, n)
    if older:
        generated_N = (generated_N + shares_of(older, trees)) / 2
    # Not scaled to sum to 1: where p_θ is all on the SFT set's responses, m is 1 exactly. Logs,
    # because p_t of a long response is too small for a float32.
    with np.errstate(divide="ignore"):  # log 0 = −∞: of what only p_{t−1} gave
        log_share_N = np.where(real_N > 0, opponent_N, np.log(sampled_N))
    return Responses(trees, prompt_N, shares_of(world.data, trees), real_N, log_share_N,
                     generated_N, opponent_N)


def prompt_of_each(trees):
    """The prompt of each response, [N]."""
    return np.repeat(np.arange(len(trees.responses)), np.diff(trees.first_response))


def shares_of(counts, trees):
    """What share of its prompt's counts each response has, [N]."""
    totals = [max(1e-300, sum(some.values())) for some in counts]
    return np.array([some.get(y, 0) / total for some, total, responses in
                     zip(counts, totals, trees.responses) for y in responses])


def known_shares(prompt_N, real_N, sampled_N, opponent_N, n):
    """The shares of y': of the SFT set's responses by p_t itself, of others by n samples' counts.

    p_t is known of the others too, but only of those that were sampled. To weigh them by it would
    count each of them too little on average: p_t (1 − (1 − p_t)ⁿ), since some samplings miss it.

    The SFT set's responses have probability `known` together; at least one of n samples is another
    response with chance 1 − knownⁿ. If one is, the others get (1 − known)/(1 − knownⁿ) together, in
    proportion to their counts, and else nothing. So the mean over samplings is p_t for every
    response, with less noise than counts have, and the shares of a prompt sum to 1.
    """
    total = lambda share_N: np.bincount(prompt_N, weights=share_N)[prompt_N]
    p_known_N = np.where(real_N > 0, np.exp(opponent_N), 0)
    other_N = np.where(real_N > 0, 0, sampled_N)
    known_N = np.minimum(total(p_known_N), 1)
    chance_N = np.maximum(1 - known_N ** n, 1e-12)
    part_N = np.maximum((1 - known_N) / chance_N, 1 / n)  # 1/n is its limit where `known` is 1
    part_N = np.where(total(other_N) > 0, part_N, 0)
    return (part_N * other_N / np.maximum(total(other_N), 1e-12)
            + (1 - part_N) * p_known_N / np.maximum(total(p_known_N), 1e-300))
