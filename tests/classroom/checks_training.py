"""Claims about train.py and data/responses.py: the objective, Algorithm 1, prefix trees, shares."""
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch

from classroom.checks import (STAND_INS, Broken, Quiet, claim, dice, expect, plain, require,
                              require_gradient, stand_in, table, tensor)

# --- sft_loss ------------------------------------------------------------------------------------

SFT = "train.sft_loss"


def check_sft(m, counts, name="sft"):
    """`counts` are how many responses each prompt has."""
    rng = dice(name)
    share = lambda: [w / sum(ws) for n in counts for ws in [[rng.uniform(0.1, 1) for _ in range(n)]]
                     for w in ws]
    real, data, own = share(), share(), share()
    logp, N, P = table(rng, sum(counts), low=-5, high=-1), sum(counts), len(counts)
    prompt = [p for p, n in enumerate(counts) for _ in range(n)]
    batch = SimpleNamespace(trees="the trees", P=P, real_N=tensor(real), data_N=tensor(data),
                            log_share_N=tensor(own).log(), opponent_N=tensor(logp),
                            prompt_N=torch.tensor(prompt))
    player_N = tensor(logp, grad=True)
    got = m.sft_loss(player_N, batch)
    total = sum(r * x for r, x in zip(real, logp))
    expect(got, -total / P, [
        ("the sign is wrong: a loss falls as log p rises", total / P),
        ("this is the sum over prompts; divide by their number, batch.P", -total),
        ("you divide by the number of responses; divide by that of prompts, batch.P", -total / N),
        ("the shares are not used: this is the mean over distinct responses", -sum(logp) / N),
        ("the shares are not used: this is the sum over distinct responses", -sum(logp) / P),
        ("p_data is used; SFT knows only the shares in its set, batch.real_N",
         -sum(r * x for r, x in zip(data, logp)) / P),
        ("the opponent's shares are used; those of the SFT set are batch.real_N",
         -sum(r * x for r, x in zip(own, logp)) / P),
        ("one number for each response; their weighted sum is asked for",
         [-r * x / P for r, x in zip(real, logp)]),
        ("this is log Σ share · p, not Σ share · log p",
         -math.log(sum(r * math.exp(x) for r, x in zip(real, logp)) / P)),
    ], "the loss")
    return got, player_N


@claim(SFT)
def it_is_minus_the_mean_of_log_p_weighted_by_shares(m):
    check_sft(m, [4])


@claim(SFT)
def every_prompt_counts_alike(m):
    check_sft(m, [1, 5, 2], "prompts")


@claim(SFT)
def a_gradient_reaches_the_player(m):
    require_gradient(*check_sft(m, [2, 3]))


# --- sample_responses ----------------------------------------------------------------------------

SAMPLE = "train.sample_responses"
STOP = 99
STAND_INS |= {"gather": lambda item: [item], "rank": lambda: 0, "ranks": lambda: 1,
              "rows_that_fit": lambda *_: 64}


@stand_in
def generate(model, prompts, *, max_new_tokens, end_token, temperature=1.0, top_k=None,
             generator=None):
    """Stands for generate: random responses, each beginning with the prompt's own first token."""
    generate.calls.append(dict(model=model, max_new_tokens=max_new_tokens, end_token=end_token,
                               temperature=temperature, top_k=top_k, generator=generator))
    found = []
    for prompt in prompts:
        numbers = torch.randint(0, 4, (max_new_tokens,), generator=generator).tolist()
        y = [prompt[0], *numbers][:max_new_tokens]
        if 0 in y[1:]:
            y = [*y[:1 + y[1:].index(0)], end_token]
        found.append(y)
        generate.given.append((tuple(prompt), tuple(y)))
    return [list(y) for y in found]


def sample_case(m, seed=3, t=1, negatives=40):
    world = SimpleNamespace(prompts=[[10, 5], [20], [30, 6, 6], [40, 5]], end_token=STOP,
                            max_new_tokens=4,
                            rows=[{"split": "train"}] * 3 + [{"split": "heldout"}],
                            splits={"train": [0, 1, 2], "heldout": [3]})
    model = SimpleNamespace(head_weight=torch.zeros(2, 2))
    generate.calls, generate.given = [], []
    got = m.sample_responses(model, world, SimpleNamespace(negatives=negatives, seed=seed), t)
    return got, world, model


def check_samples(m):
    got, world, _ = sample_case(m)
    require(isinstance(got, list) and all(isinstance(x, dict) for x in got),
            "a list with one Counter for each prompt is expected")
    asked = Counter(prompt for prompt, _ in generate.given)
    for p, prompt in enumerate(map(tuple, world.prompts)):
        unit = "once" if asked[prompt] == 1 else f"{asked[prompt]} times"
        require(asked[prompt] == 40, f"prompt {p} of {len(world.prompts)} was sampled {unit}, "
                f"expected config.negatives = 40 times" + ", the held-out ones too" * (
                    asked[prompt] == 0))
    require(len(got) == len(world.prompts),
            f"{len(got)} Counters for {len(world.prompts)} prompts")
    return got, world


def close(y):
    return y if y[-1:] == (STOP,) else (*y, STOP)


@claim(SAMPLE)
def each_prompt_gets_its_number_of_responses(m):
    got, world = check_samples(m)
    for p, (prompt, counts) in enumerate(zip(world.prompts, got)):
        owners = {y[0] for y in counts if y and isinstance(y, tuple)}
        require(owners <= {prompt[0]}, f"prompt {p} got responses that belong to another prompt: "
                f"generate answers in the order of the prompts that it is given")
        n = sum(counts.values())
        require(n == 40, f"the counts of prompt {p} sum to {n}, expected 40: " + (
            "count each response as often as it came" if n == len(counts) else
            "every response counts"))


@claim(SAMPLE)
def responses_are_kept_as_they_came(m):
    """As tuples, with END only where the model wrote it."""
    got, world = check_samples(m)
    for prompt, counts in zip(world.prompts, got):
        require(all(isinstance(y, tuple) for y in counts), "a response is counted as a tuple of "
                "tokens")
        given = [y for x, y in generate.given if x == tuple(prompt)]
        right = Counter(given)
        for words, change in (
                ("END was added to responses that generation cut short: the model did not write it",
                 close),
                ("END was cut off the responses; it is a token like the others, and is scored",
                 lambda y: y[:-1] if y[-1] == STOP else y),
                ("the last token was replaced by END", lambda y: (*y[:-1], STOP)),
                ("the last token was cut off", lambda y: y[:-1]),
                ("END stands twice at the end", lambda y: (*y, STOP)),
                ("the prompt was put before the response", lambda y: (*prompt, *y))):
            require(counts == right or counts != Counter(map(change, given)), words)
        require(counts == right or counts != Counter(y for y in given if y[-1] == STOP),
                "responses that were cut short are missing: they are samples too")
        require(counts == right, "the Counter differs from the responses that generate gave")


@claim(SAMPLE)
def responses_are_samples_of_p_t_itself(m):
    """Temperature 1, nothing cut off, the model that was passed in."""
    _, world, model = sample_case(m)
    require(generate.calls, "generate was not called")
    for call in generate.calls:
        require(call["model"] is model, "generate was given another model than `model`")
        require(call["temperature"] == 1, f"temperature {call['temperature']:g} gives "
                + ("the likeliest response, greedily" if call["temperature"] == 0 else "samples of "
                   "another distribution") + "; the theory needs samples of p_t: temperature 1")
        require(call["top_k"] is None,
                f"top_k={call['top_k']} cuts p_t off: rare tokens never come")
        require(call["max_new_tokens"] == world.max_new_tokens, f"max_new_tokens is "
                f"{call['max_new_tokens']}, expected world.max_new_tokens, {world.max_new_tokens}")
        require(call["end_token"] == STOP, "end_token should be world.end_token")


@claim(SAMPLE)
def responses_depend_on_seed_and_iteration_alone(m):
    one, again = sample_case(m)[0], sample_case(m)[0]
    require(all(call["generator"] is not None for call in generate.calls),
            "generate was given no generator, so the responses depend on what was drawn before")
    require(one == again, "the same seed and iteration give other responses the second time")
    require(sample_case(m, t=2)[0] != one, "another iteration t gets the same responses")
    require(sample_case(m, seed=4)[0] != one, "another config.seed gives the same responses")
    torch.manual_seed(5)
    sample_case(m)
    mine = torch.rand(1).item()
    torch.manual_seed(5)
    require(mine == torch.rand(1).item(), "torch's global generator was seeded or used; make a "
            "torch.Generator")


# --- Algorithm 1: the loop of main ---------------------------------------------------------------

LOOP = "train.main"


class Player:
    """A toy policy: its only weight stands in a list, as a module's weights stand in tensors."""
    def __init__(self, weight):
        self.weights = [weight]

    def to(self, device):
        return self

    eval = train = lambda self, *_: self

    def state_dict(self):
        return {"weights": list(self.weights)}

    def load_state_dict(self, state):
        self.weights = list(state["weights"])


class ToyConfig(SimpleNamespace):
    """Stands for Config: whatever is not set is off."""
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return False


class ToyRun(Quiet):
    """Stands for Run: p_0 to p_{t} are numbers that `fit` makes."""
    def __init__(self, saved):
        self.saved, self.stage = saved, 0

    def policy(self, t):
        if t not in self.saved:
            raise Broken(f"run.policy({t}) is asked for, which is not made yet")
        return Player(self.saved[t])

    def unfinished(self, iterations):
        return list(iterations)


def play(m, opponent="previous", iters=3, method="spin"):
    """Run main with a toy fit. Returns its log: ("fit" or "play", what happened)."""
    log, saved = [], {}
    run = ToyRun(saved)

    def fit(player, objective, responses, stage, run):
        before = None
        if isinstance(responses, SimpleNamespace):
            before = responses.opponent.weights[0]
        start = player.weights[0]
        player.weights[0] += 1.0  # the player itself is changed, …
        learnt = before is not None and responses.opponent.weights[0] != before
        result = Player(start + 10.0)  # … and what comes back is another object
        saved[stage] = result.weights[0]
        log.append(("fit", SimpleNamespace(player=player, start=start, objective=objective,
                                           responses=responses, stage=stage,
                                           learnt=learnt, end=result)))
        return result

    def self_play(opponent, config, t, run):
        log.append(("play", SimpleNamespace(opponent=opponent, weight=opponent.weights[0], t=t)))
        return SimpleNamespace(opponent=opponent, t=t)

    config = ToyConfig(iters=iters, opponent=opponent, method=method)
    vars(m).update(fit=fit, self_play=self_play, prepare=lambda *_: (Quiet(), "cpu"),
                   Run=lambda *_: run, new_player=lambda *_: Player(100.0),
                   OBJECTIVES={name: f"the objective {name}" for name in ("spin", "sft", "dpo")})
    m.main(config)
    fits = [entry for kind, entry in log if kind == "fit"]
    require(fits and fits[0].stage == 0, "main no longer begins with SFT, fit(…, 0, run)")
    return log, saved


def rounds(log, iters=3):
    """The plays and the fits after SFT; both must be there, in turn."""
    kinds = [kind for kind, _ in log][1:]
    require("play" in kinds, "self_play is never called: the opponent must respond in each "
            "iteration")
    require(kinds.count("fit") > 0, "fit is never called in the loop")
    require(kinds == ["play", "fit"] * iters, f"for {iters} iterations self_play and fit should be "
            f"called in turn; you called {', '.join(kinds).replace('play', 'self_play')}")
    return log[1::2], log[2::2]


@claim(LOOP)
def each_iteration_generates_then_trains(m):
    plays, fits = rounds(play(m)[0])
    times = [entry.t for _, entry in plays]
    require(times == [0, 1, 2], f"self_play is told t = {times}, expected [0, 1, 2]: the opponent "
            f"of iteration t is p_t")
    stages = [entry.stage for _, entry in fits]
    require(stages == [1, 2, 3], f"fit is told stage = {stages}, expected [1, 2, 3]: what it makes "
            f"out of p_t is p_{{t+1}}")


@claim(LOOP)
def the_opponent_is_a_frozen_copy(m):
    for way in ("previous", "sft"):
        plays, fits = rounds(play(m, way)[0])
        for (_, round_), (_, training) in zip(plays, fits):
            require(round_.opponent is not training.player, "the opponent is the player itself, "
                    "and learns with it: freeze a copy (copy.deepcopy)")
            require(not training.learnt, "the opponent's weight changed while the player was "
                    "trained: a shallow copy shares its weights; use copy.deepcopy")


@claim(LOOP)
def the_opponent_is_renewed_in_each_iteration(m):
    log, saved = play(m)
    weights = [round_.weight for _, round_ in rounds(log)[0]]
    if weights == [saved[0], saved[0], saved[1]]:
        raise Broken("the opponent lags behind: in iteration t = 2 it is p_1")
    for t, weight in enumerate(weights):
        require(weight == saved[t] or weight != saved[0], f"in iteration t = {t} the opponent is "
                f"still the SFT model p_0: with --opponent previous it is p_t, or it is no "
                f"self-play")
        require(weight == saved[t], f"in iteration t = {t} the opponent is not p_t, which is what "
                f"fit returned: the averaged policy, not the player that fit changed in place")


@claim(LOOP)
def the_player_goes_on_from_what_fit_returned(m):
    log, saved = play(m)
    for t, (_, training) in enumerate(rounds(log)[1]):
        if training.start == saved[t]:
            continue
        if training.start == saved[0]:
            raise Broken(f"in iteration t = {t} training starts from the SFT model; it should "
                         f"start from p_t")
        raise Broken("what fit returns is dropped: fit changes the player, but p_{t+1} is the "
                     "averaged policy that it returns")


@claim(LOOP)
def opponent_sft_keeps_p_0(m):
    log, saved = play(m, "sft")
    for t, (_, round_) in enumerate(rounds(log)[0]):
        require(round_.weight == saved[0], f'with config.opponent "sft" the opponent of iteration '
                f"{t} should be p_0, run.policy(0)")


@claim(LOOP)
def fit_gets_this_iterations_responses_and_the_methods_objective(m):
    for method in ("spin", "dpo"):
        plays, fits = rounds(play(m, method=method)[0])
        for t, (_, training) in enumerate(fits):
            require(isinstance(training.responses, SimpleNamespace) and training.responses.t == t,
                    f"fit of iteration t = {t} does not get the responses that self_play made "
                    f"in it")
            require(training.objective == f"the objective {method}", "fit should be given "
                    "OBJECTIVES[config.method]")


# --- grow ----------------------------------------------------------------------------------------

GROW = "data.responses.grow"
GREET = [70, 71, 72], [(1, 2, 3, 4, 9), (1, 3, 5, 9), (6, 9)]  # the picture at the top of the file
COLUMNS = ("token", "depth", "end", "parent", "target", "response", "edge")


def grown(m, prompt, responses):
    tree = m.grow(list(prompt), list(responses))
    require(isinstance(tree, dict), f"a dictionary is expected, not {type(tree).__name__}")
    for name in COLUMNS:
        require(name in tree, f"the tree has no {name!r}")
        require(isinstance(tree[name], list) and all(type(x) is int for x in tree[name]),
                f"tree[{name!r}] should be a list of whole numbers")
    for names in (("token", "depth", "end"), ("parent", "target"), ("response", "edge")):
        require(len({len(tree[name]) for name in names}) == 1,
                f"{', '.join(names)} should be equally long")
    for name, of in (("parent", "token"), ("edge", "target")):
        require(all(0 <= x < len(tree[of]) for x in tree[name]),
                f"tree[{name!r}] points beyond the {'nodes' if of == 'token' else 'edges'}")
    return tree


def read_by(tree) -> list[tuple]:
    """What each node has read: its ancestors' tokens and its own."""
    found, path = [], []
    for token, depth in zip(tree["token"], tree["depth"]):
        require(0 <= depth <= len(path), f"a node of depth {depth} follows a path of {len(path)} "
                f"nodes: the depth is the number of ancestors, and the walk is depth-first")
        path[depth:] = [token]
        found.append(tuple(path))
    return found


def cases():
    rng = dice("trees")
    many = sorted({tuple(rng.randrange(3) for _ in range(rng.randrange(1, 5))) + (9,)
                   for _ in range(9)})
    return [GREET, ([70], [(9,)]), ([70, 70], many), ([70], [(1,), (1, 1), (1, 1, 1), (1, 1, 9)])]


def some(tokens):
    return " ".join(map(str, tokens))


@claim(GROW)
def every_prefix_is_read_once(m):
    """A node for each token of the prompt and for each prefix that something follows."""
    for prompt, responses in cases():
        tree = grown(m, prompt, responses)
        found, wanted = read_by(tree), {tuple(prompt[:n + 1]) for n in range(len(prompt))}
        wanted |= {(*prompt, *y[:k]) for y in responses for k in range(1, len(y))}
        twice = [x for x, n in Counter(found).items() if n > 1]
        require(not twice, f"the prefix {some(twice[0] if twice else ())} is read by two nodes: a "
                f"response shares the nodes of the one before, as far as they are alike")
        extra = [x for x in found if x not in wanted]
        if extra and tuple(extra[0][len(prompt):]) in responses:
            raise Broken(f"a node reads the last token of {some(extra[0][len(prompt):])}: nothing "
                         f"follows it, so it is a target but no node")
        require(not extra, f"a node reads {some(extra[0] if extra else ())}, which begins no "
                f"response; is its depth the number of its ancestors?")
        missing = sorted(wanted - set(found))
        require(not missing, f"no node reads {some(missing[0] if missing else ())}")


@claim(GROW)
def each_edge_leads_from_a_prefix_to_the_next_token(m):
    for prompt, responses in cases():
        tree = grown(m, prompt, responses)
        found = read_by(tree)
        edges = list(zip(tree["parent"], tree["target"]))
        steps = {((*prompt, *y[:k]), y[k]) for y in responses for k in range(len(y))}
        for e, (parent, target) in enumerate(edges):
            if (found[parent], target) in steps:
                continue
            if found[parent][-1] == target and (found[parent][:-1], target) in steps:
                raise Broken(f"edge {e} leaves the node that reads its target: a token is scored "
                             f"by the node before it")
            raise Broken(f"edge {e} leads from {some(found[parent])} to {target}, where no "
                         f"response goes")
        twice = [x for x, n in Counter(edges).items() if n > 1]
        require(not twice, f"the edge from node {twice[0][0] if twice else 0} to the token "
                f"{twice[0][1] if twice else 0} stands twice: shared steps are scored once")
        require(len(edges) == len(steps), f"{len(edges)} edges, expected {len(steps)}")


@claim(GROW)
def the_edges_of_a_row_spell_its_response(m):
    for prompt, responses in cases():
        tree = grown(m, prompt, responses)
        for row, y in enumerate(responses):
            edges = [e for r, e in zip(tree["response"], tree["edge"]) if r == row]
            spelt = tuple(tree["target"][e] for e in edges)
            if spelt != y and len(spelt) < len(y) and y[len(y) - len(spelt):] == spelt:
                raise Broken(f"response {row} lacks the edges that it shares with the one before: "
                             f"{some(spelt)} instead of {some(y)}")
            if spelt == y[:-1]:
                raise Broken(f"response {row} lacks its last edge, that to {y[-1]}: END is scored "
                             f"too")
            require(spelt == y, f"the edges of response {row} spell {some(spelt)}, and it is "
                    f"{some(y)}")
            found = read_by(tree)
            for k, e in enumerate(edges):
                require(found[tree["parent"][e]] == (*prompt, *y[:k]), f"row {row}, token {k}: its "
                        f"edge leaves a node that has read {some(found[tree['parent'][e]])}")


@claim(GROW)
def the_depth_is_the_number_of_ancestors(m):
    for prompt, responses in cases():
        tree = grown(m, prompt, responses)
        require(tree["depth"][:len(prompt)] == list(range(len(prompt))),
                f"the prompt's nodes have the depths {tree['depth'][:len(prompt)]}, expected "
                f"{list(range(len(prompt)))}")
        found = read_by(tree)
        for node, depth in enumerate(tree["depth"]):
            require(len(found[node]) == depth + 1, f"node {node} has depth {depth} and "
                    f"{len(found[node]) - 1} ancestors")
        deepest = len(prompt) - 1 + max(len(y) - 1 for y in responses)
        require(max(tree["depth"]) == deepest, f"the deepest node has depth {max(tree['depth'])}, "
                f"expected {deepest}")


@claim(GROW)
def the_end_is_the_first_node_after_the_subtree(m):
    for prompt, responses in cases():
        tree = grown(m, prompt, responses)
        depth, M = tree["depth"], len(tree["depth"])
        for node in range(M):
            right = next((j for j in range(node + 1, M) if depth[j] <= depth[node]), M)
            require(tree["end"][node] == right, f"the subtree of node {node} ends at {right}, not "
                    f"at {tree['end'][node]}")


# --- response_logps ------------------------------------------------------------------------------

TREES = "data.responses.response_logps"


@stand_in
class TreeCache:
    """Stands for TreeCache: remembers its batch."""
    def __init__(self, batch):
        self.batch = batch


# The picture at the top of the file, and a second prompt with the responses (5, 9) and (8,).
PATHS = [[(2, 1), (3, 2), (4, 3), (5, 4), (6, 9)], [(2, 1), (3, 3), (7, 5), (8, 9)],
         [(2, 6), (9, 9)], [(11, 5), (12, 9)], [(11, 8)]]  # (node, target) of each response
SCORED = [2, 3, 4, 5, 6, 7, 8, 9, 11, 12]


def tree_case(m, impl="eager", order=None):
    """response_logps of PATHS; returns the result and {mistake: its value}."""
    M, V = 13, 10
    edges = list(dict.fromkeys(edge for path in PATHS for edge in path))
    steps = [(row, edges.index(edge)) for row, path in enumerate(PATHS) for edge in path]
    steps = [steps[i] for i in order] if order else steps
    log_p = table(dice("tree"), V, M, low=-4, high=-0.5)
    batch = SimpleNamespace(
        token_M=torch.arange(50, 50 + M), position_M=torch.arange(M), slot_M=torch.arange(M),
        end_RT=torch.full((1, M), M), scored_U=torch.tensor(SCORED),
        parent_E=torch.tensor([SCORED.index(node) for node, _ in edges]),
        target_E=torch.tensor([target for _, target in edges]),
        edge_L=torch.tensor([e for _, e in steps]), response_L=torch.tensor([r for r, _ in steps]),
        N=len(PATHS))
    calls = []

    def hidden(tokens, cache=None, wanted_N=None):
        calls.append((tokens, cache))
        return torch.eye(M) if wanted_N is None else torch.eye(M)[wanted_N]
    model = SimpleNamespace(hidden=hidden, head_weight=tensor(log_p, grad=True))
    STAND_INS["token_logps"].impls = []
    got = m.response_logps(model, batch, impl)
    value = lambda path: sum(log_p[target][node] for node, target in path)
    whole, seen, own = [value(path) for path in PATHS], set(), []
    for path in PATHS:
        own.append(value([edge for edge in path if edge not in seen]))
        seen |= set(path)
    mistakes = [
        ("this is the mean over tokens; log p(y|x) is the sum",
         [x / len(path) for x, path in zip(whole, PATHS)]),
        ("shared edges are added to the first response only: use edge_L and response_L", own),
        ("END's edge is missing", [value(path[:-1]) for path in PATHS]),
        ("parent_E counts the scored nodes, scored_U, not all nodes: select those first",
         [value([(SCORED.index(node), target) for node, target in path]) for path in PATHS]),
        ("these are the edges' log-probabilities; their sum along each path is asked for",
         [log_p[target][node] for node, target in edges]),
        ("these are probabilities; their logarithms are asked for", [math.exp(x) for x in whole]),
        ("the sign is wrong: log p is negative", [-x for x in whole]),
        ("this is one number for the whole batch; one for each response is asked for", sum(whole))]
    expect(got, whole, mistakes, "the result")
    return got, model, batch, calls


@claim(TREES)
def log_p_is_the_sum_over_the_edges_of_the_path(m):
    tree_case(m)


@claim(TREES)
def the_order_of_the_steps_does_not_matter(m):
    count = sum(map(len, PATHS))
    tree_case(m, order=dice("steps").sample(range(count), count))


@claim(TREES)
def the_network_reads_each_node_once_through_the_trees_cache(m):
    _, _, batch, calls = tree_case(m)
    require(len(calls) == 1, f"model.hidden is called {len(calls)} times, expected once")
    tokens, cache = calls[0]
    expect(tokens, plain(batch.token_M)[0], what="what model.hidden is given")
    require(isinstance(cache, TreeCache) and cache.batch is batch, "model.hidden should be given "
            "TreeCache(batch); without it every node sees all nodes before it")


@claim(TREES)
def the_implementation_is_passed_on(m):
    tree_case(m, "fused")
    impls = set(STAND_INS["token_logps"].impls)
    require(impls == {"fused"}, 'token_logps was not given impl="fused"')


@claim(TREES)
def a_gradient_reaches_the_model(m):
    got, model, *_ = tree_case(m)
    require_gradient(got, model.head_weight)
