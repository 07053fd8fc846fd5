"""Claims about train.py, data/ and the variants: objectives, Algorithm 1, rows, weights."""
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch

from classroom.checks import (Broken, claim, dice, expect, numbers, require, require_gradient,
                              require_tensor, shares, table)
from classroom.claims_loss import spin_loss_alone

# --- sft_loss ------------------------------------------------------------------------------------


def check_sft(m, P=3, N=4):
    rng = dice("sft")
    real, data, opponent = shares(rng, P, N), shares(rng, P, N), shares(rng, P, N)
    real[0, 2:] = 0
    real[0] /= real[0].sum()
    player = table(rng, P, N, low=-5, high=-1, grad=True)
    part = SimpleNamespace(real_PN=real, data_PN=data, generated_PN=opponent,
                           opponent_PN=opponent.log(), log_share_PN=opponent.log())
    got, x = m.sft_loss(player, part), player.detach()
    right = -(real * x).sum(1)
    expect(got, right, {
        "the shares are not used: this is the mean over responses": -x.mean(1),
        "the shares are not used: this is the sum over responses": -x.sum(1),
        "the shares are not used: this is the sum over the set's responses":
            -((real > 0) * x).sum(1),
        "the shares are not used: this is the mean over the set's responses":
            -((real > 0) * x).sum(1) / (real > 0).sum(1),
        "log p_t is subtracted; SFT knows no opponent": right + (real * opponent.log()).sum(1),
        "you divide by the number of responses; the shares sum to 1 already": right / N,
        "the mask is inverted: what is not in the SFT set is learned":
            -((real == 0) * x).sum(1),
        "p_data is used; SFT knows only the shares in its set, real_PN": -(data * x).sum(1),
        "the opponent's weights are used; those of the SFT set are real_PN":
            -(opponent * x).sum(1),
        "one number for each response; their weighted sum is asked for": -real * x,
        "this is log Σ share · p, not Σ share · log p": -(real * x.exp()).sum(1).log()},
        "the loss")
    return got, player


@claim("train.py", "sft_loss")
def it_is_minus_the_mean_of_log_p_weighted_by_shares(m):
    check_sft(m, P=1)
    check_sft(m)


@claim("train.py", "sft_loss")
def its_gradient_reaches_the_player(m):
    require_gradient(*check_sft(m))


# --- spin_objective ------------------------------------------------------------------------------


@claim("train.py", "spin_objective")
def the_chosen_anchor_is_added_to_the_pair_loss(m):
    rng = dice("objective")
    player, part = table(rng, 2, 3, low=-5, high=-1), SimpleNamespace(
        real_PN=shares(rng, 2, 3), generated_PN=shares(rng, 2, 3),
        opponent_PN=table(rng, 2, 3, low=-4, high=-1), log_share_PN=shares(rng, 2, 3).log())
    m.response_logps = lambda model, part, impl: player
    ratio = player - part.opponent_PN
    weight = part.real_PN[:, :, None] * part.generated_PN[:, None, :]
    pairs = (weight * (-0.5 * (ratio[:, :, None] - ratio[:, None, :])).exp()).sum((1, 2))
    mass = -(part.log_share_PN + ratio).logsumexp(1).clamp(max=0)
    sft = -(part.real_PN * player).sum(1)
    for anchor, more in (("none", 0 * mass), ("mass", mass), ("sft", sft)):
        config = SimpleNamespace(anchor=anchor, anchor_weight=3.0, lam=0.5, loss="exponential",
                                 logprob="eager")
        expect(m.spin_objective(None, part, config), pairs + 3 * more, {
            "the anchor is missing": pairs, "anchor_weight is missing": pairs + more,
            "the mass anchor stands for every anchor": pairs + 3 * mass},
            f"with anchor {anchor} the objective")


# --- fit -----------------------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """A policy of one weight."""
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0]))


def toy_fit(m, steps=4):
    """Run fit on four prompts, two a step; returns (policy, what came back, gradients, rates)."""
    policy, gradients, rates, slope_of = Toy(), [], [], [1.0, 2.0, 4.0, 8.0]

    def no_sampling(*_, **__):
        raise Broken("fit asks for new responses: those of the live player? They must be the "
                     "frozen opponent's, drawn once, before the iteration")
    m.generate = m.sample_responses = m.self_play = no_sampling
    m.show_responses, m.clip_gradients = lambda *_: None, lambda player, *_: gradients.append(
        player.w.grad.item())

    def report(t, step, steps, responses, learner):
        rates.append(learner[1].param_groups[0]["lr"])
    config = m.Config(steps=steps, lr=0.1, batch_size=2, negatives=1, sft_steps=steps, sft_lr=0.1)
    run = SimpleNamespace(config=config, world=SimpleNamespace(splits={"train": [0, 1, 2, 3]}),
                          restore=lambda learner: 0, report=report, device="cpu")
    responses = SimpleNamespace(parts=lambda prompts, device: [[p] for p in prompts])
    objective = lambda player, part, config: player.w * torch.tensor([slope_of[p] for p in part])
    return policy, m.fit(policy, objective, responses, 1, run), gradients, rates


@claim("train.py", "fit")
def fit_trains_a_copy_against_what_it_is_given(m):
    policy, player, *_ = toy_fit(m)
    require(player is not policy and policy.w.item() == 1, "fit changes its argument: that is the "
            "opponent, and it learned with the player; train a copy")
    require(player.w.item() < 0.9, "what fit returns is not trained")


@claim("train.py", "fit")
def no_gradient_reaches_the_opponent(m):
    """The opponent is fit's argument; its log-probs are numbers in the responses."""
    policy, *_ = toy_fit(m)
    require(policy.w.grad is None, "a gradient reached the opponent, fit's argument")


@claim("train.py", "fit")
def a_step_takes_the_mean_over_its_prompts_and_the_rate_falls_to_zero(m):
    _, _, gradients, rates = toy_fit(m)
    means = {(a + b) / 2 for a, b in itertools.combinations((1.0, 2.0, 4.0, 8.0), 2)}
    require(len(gradients) == 4, f"{len(gradients)} steps, expected config.steps = 4")
    for one, two in (gradients[:2], gradients[2:]):  # one pass over the prompts each
        words = "gradients of earlier steps add up: call zero_grad in each step"
        require({one, two} <= means, f"the gradient is {one:g}, then {two:g}: " + (
            "a sum over prompts, not their mean" if one / 2 in means else words))
        require(one + two == 7.5, "a pass over the prompts takes each of them once")
    require(rates[-1] == 0 and rates == sorted(rates, reverse=True) and rates[0] == 0.1,
            f"the rate is {rates}: level for half of the steps, then down to 0")


# --- self_play and sample_responses --------------------------------------------------------------


@claim("train.py", "self_play")
def one_frozen_model_generates_and_is_scored(m):
    policies = {t: f"p_{t}" for t in range(4)}
    m.sample_responses = lambda model, world, config, t: (f"responses of {model}", t)
    m.self_play_responses = lambda world, samples, opponent, config: (samples, opponent)
    run = SimpleNamespace(world="world", config="config", policy=policies.get)
    for t in (0, 2, 3):
        (drawn, at), scorer = m.self_play(policies[t], t, run)
        require(drawn == f"responses of p_{t}", f"iteration {t} has {drawn}; its opponent did not "
                f"draw these")
        require(scorer == f"p_{t}", f"log p_t of iteration {t} is that of {scorer}: these are the "
                f"log-probs of another model than the one that generated")
        require(at == t, f"iteration {t} samples with the random numbers of iteration {at}")


STOP = 99


def fake_generate(calls):
    """Stands for generate: random responses, each beginning with the prompt's own first token."""
    def generate(model, prompts, *, max_new_tokens, end_token, temperature=1.0, top_k=None,
                 generator=None):
        calls.append(SimpleNamespace(model=model, max_new_tokens=max_new_tokens, given=[],
                                     temperature=temperature, top_k=top_k, generator=generator))
        found = []
        for prompt in prompts:
            y = [prompt[0], *torch.randint(0, 4, (max_new_tokens - 1,), generator=generator)
                 .tolist()]
            found.append([*y[:1 + y[1:].index(0)], end_token] if 0 in y[1:] else y)
            calls[-1].given.append((tuple(prompt), tuple(found[-1])))
        return found
    return generate


def sample_case(m, seed=3, t=1):
    """sample_responses of four prompts, 40 each: (the Counters, world, model, calls)."""
    calls, prompts = [], [[10, 5], [20, 5], [30, 6, 5], [40, 5]]
    world = SimpleNamespace(prompts=prompts, end_token=STOP, max_new_tokens=4, rows=[],
                            splits={"train": [0, 1, 2], "heldout": [3]})
    model = SimpleNamespace(head_weight=torch.zeros(2, 2), config=SimpleNamespace(
        n_layer=1, n_embd=2, block_size=9))
    m.generate = fake_generate(calls)
    got = m.sample_responses(model, world, SimpleNamespace(negatives=40, seed=seed), t)
    require(isinstance(got, list) and all(isinstance(x, dict) for x in got),
            "a list with one Counter for each prompt is expected")
    return got, world, model, calls


@claim("train.py", "sample_responses")
def each_prompt_gets_its_number_of_responses(m):
    got, world, _, calls = sample_case(m)
    asked = Counter(x for call in calls for x, _ in call.given)
    right = {tuple(prompt) for prompt in world.prompts}
    require(set(asked) <= right, f"generate is asked {sorted(set(asked) - right)}, which is no "
            f"prompt as training reads it: world.prompts, ANSWER at the end")
    for p, prompt in enumerate(map(tuple, world.prompts)):
        require(asked[prompt] == 40, f"prompt {p} of 4 was sampled {asked[prompt]} times, expected "
                f"config.negatives = 40" + ", the held-out ones too" * (not asked[prompt]))
    require(len(got) == 4, f"{len(got)} Counters for 4 prompts")
    for p, (prompt, counts) in enumerate(zip(world.prompts, got)):
        require({y[0] for y in counts} == {prompt[0]}, f"prompt {p} got responses that belong to "
                f"another prompt: generate answers in the order of its prompts")
        n = sum(counts.values())
        require(n == 40, f"the counts of prompt {p} sum to {n}, expected 40: count each response "
                f"as often as it came")


@claim("train.py", "sample_responses")
def responses_are_kept_as_they_came(m):
    """As tuples, with END only where the model wrote it."""
    got, world, _, calls = sample_case(m)
    for prompt, counts in zip(world.prompts, got):
        require(all(isinstance(y, tuple) for y in counts), "a response is counted as a tuple")
        given = [y for call in calls for x, y in call.given if x == tuple(prompt)]
        ended = [y for y in given if y[-1] == STOP]
        for words, wrong in {
                "END was added to responses that generation cut short: the model did not write "
                "it, they are truncated and not finished":
                    [y if y[-1] == STOP else (*y, STOP) for y in given],
                "END was cut off the responses; it is a token like the others, and is scored":
                    [y[:-1] if y[-1] == STOP else y for y in given],
                "the last token was replaced by END": [(*y[:-1], STOP) for y in given],
                "the prompt was put before the response": [(*prompt, *y) for y in given],
                "responses that were cut short are missing: they are samples too": ended}.items():
            require(counts == Counter(given) or counts != Counter(wrong), words)
        require(counts == Counter(given), "the Counter differs from what generate gave")


@claim("train.py", "sample_responses")
def responses_are_samples_of_p_t_itself(m):
    _, world, model, calls = sample_case(m)
    for call in calls:
        require(call.model is model, "generate was given another model than `model`")
        require(call.temperature == 1, f"temperature {call.temperature:g} gives " + (
            "the likeliest response, greedily, not a sample" if call.temperature == 0 else
            "samples of another distribution") + "; the theory needs samples of p_t")
        require(call.top_k is None, f"top_k={call.top_k} cuts p_t off: rare tokens never come")
        require(call.max_new_tokens == 4, f"max_new_tokens is {call.max_new_tokens}, expected "
                f"world.max_new_tokens, 4")


@claim("train.py", "sample_responses")
def responses_depend_on_seed_and_iteration_alone(m):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, *_, calls = sample_case(m)
    require(all(call.generator is not None for call in calls),
            "generate was given no generator, so the responses depend on what was drawn before")
    require(one == sample_case(m)[0], "the same seed and iteration give other responses")
    require(sample_case(m, t=2)[0] != one, "another iteration t gets the same responses")
    require(sample_case(m, seed=4)[0] != one, "another config.seed gives the same responses")
    require(torch.equal(before, torch.random.get_rng_state()),
            "torch's global generator was used; make a torch.Generator")


# --- Algorithm 1: the loop of main ---------------------------------------------------------------


def play(m, opponent="previous", method="spin", iters=3):
    """Run main with toys; returns its plays (opponent, t) and its fits, SFT left out."""
    plays, fits, saved, made = [], [], {}, []

    class Policy(str):
        def to(self, device):
            return self

    def fit(policy, objective, responses, t, run):
        fits.append(SimpleNamespace(policy=policy, objective=objective, responses=responses, t=t))
        saved[t] = f"p_{t}"
        made.append(Policy(saved[t]))  # another object than that of run.policy
        return made[-1]

    def self_play(opponent, t, run):
        plays.append((opponent, t))
        return f"responses {len(plays) - 1}"

    def policy(t):
        require(t in saved, f"run.policy({t}) is asked for, which is not made yet")
        return saved[t]
    run = SimpleNamespace(stage=0, policy=policy, unfinished=list, world=None, state=None,
                          print_start=lambda *_: None, close=lambda: None)
    vars(m).update(fit=fit, self_play=self_play, Run=lambda *_: run, sft_responses=lambda _: "SFT",
                   prepare=lambda *_: (None, "cpu"), new_policy=lambda *_: Policy("new"),
                   OBJECTIVES={"spin": "the SPIN loss", "sft": "the SFT loss"})
    m.main(SimpleNamespace(iters=iters, opponent=opponent, method=method))
    require(plays, "self_play is never called: the opponent must respond in each iteration")
    require(len(plays) == iters == len(fits) - 1, f"for {iters} iterations self_play is called "
            f"{len(plays)} times and fit {len(fits) - 1} times; each once in an iteration")
    require(fits[-1].policy is not made[0], "what fit returns is dropped, so the policy is never "
            "renewed: policy = fit(…)")
    return plays, fits[1:]


@claim("train.py", "main")
def each_iteration_generates_then_trains(m):
    plays, fits = play(m)
    times = [t for _, t in plays]
    require(times == [0, 1, 2], f"self_play is told t = {times}, expected [0, 1, 2]")
    made = [fit.t for fit in fits]
    require(made == [1, 2, 3], f"fit is told stage {made}, expected [1, 2, 3]: what it makes out "
            f"of p_t is p_{{t+1}}")


def opponents(m):
    """The opponents of config.opponent "previous" and "sft"."""
    found = [[opponent for opponent, _ in play(m, way)[0]] for way in ("previous", "sft")]
    require(found != [["p_0"] * 3, ["p_0", "p_1", "p_2"]], 'config.opponent "previous" and "sft" '
            'are exchanged: it is "previous" that renews the opponent')
    return found


@claim("train.py", "main")
def opponent_is_renewed_between_iterations(m):
    whom, _ = opponents(m)
    for t, opponent in enumerate(whom):
        late = f"p_{max(0, t - 1)}"
        require(opponent == f"p_{t}", f"in iteration t = {t} the opponent is " + (
            "still the SFT model p_0: that is DPO with its own negatives, no self-play"
            if set(whom) == {"p_0"} else f"{opponent}, not p_{t}" + (
                ": it lags behind" if opponent == late else "")))


@claim("train.py", "main")
def the_player_goes_on_from_p_t(m):
    for opponent in ("previous", "sft"):
        starts = [fit.policy for fit in play(m, opponent)[1]]
        require(starts == ["p_0", "p_1", "p_2"], f"training starts from {', '.join(starts)}, "
                f"expected p_0, p_1, p_2" + (
                    ": it starts from the SFT model again" if set(starts) == {"p_0"} else ""))


@claim("train.py", "main")
def opponent_sft_keeps_p_0(m):
    _, whom = opponents(m)
    require(set(whom) == {"p_0"}, f'with config.opponent "sft" the opponents are '
            f"{', '.join(whom)}; it should be p_0, run.policy(0), in each iteration")


@claim("train.py", "main")
def fit_gets_this_iterations_responses_and_the_methods_objective(m):
    for method, objective in (("spin", "the SPIN loss"), ("sft", "the SFT loss")):
        for t, fit in enumerate(play(m, method=method)[1]):
            require(not str(fit.objective).startswith("responses"), "fit is given objective and "
                    "responses in the wrong order")
            require(fit.responses == f"responses {t}", f"fit of iteration t = {t} does not get the "
                    f"responses that self_play made in it")
            require(fit.objective == objective, "fit should get OBJECTIVES[config.method]")


# --- frame, and what sample.py asks --------------------------------------------------------------


def letters():
    """Stands for an encoding: a letter is a token."""
    return SimpleNamespace(encode_ordinary=lambda text: list(map(ord, text)), n_vocab=512,
                           _special_tokens={"<|answer|>": 300, "<|end|>": 301},
                           encode_single_token={"<|answer|>": 300, "<|end|>": 301}.get,
                           decode=lambda tokens: "".join(map(chr, tokens)))


@claim("data/tokenizer.py", "frame")
def a_prompt_is_closed_by_answer_and_a_response_by_one_end(m):
    x, y = m.frame(letters(), "ab", "c")
    require(y.count(301) == 1 and y[-1] == 301, f"the response has END {y.count(301)} times")
    require((x, y) == ([97, 98, 300], [99, 301]), f"prompt and response are {x} and {y}")


@claim("sample.py", "ask")
def sample_py_asks_a_prompt_as_training_reads_it(m):
    asked = []
    m.samples_of = lambda model, prompt, n, **how: asked.append(prompt) or [[99, 301]] * n
    m.expectation = lambda *_: (0.0, 0.0)
    model = SimpleNamespace(config=SimpleNamespace(block_size=64))
    m.ask(model, letters(), "ab", m.SampleConfig(samples=3, max_new_tokens=4),
          None)
    require(asked == [[97, 98, 300]], f"sample.py asks {asked[0]}; training reads [97, 98, 300], "
            f"ANSWER at the end")


# --- grow ----------------------------------------------------------------------------------------


def cases():
    rng = dice("trees")
    many = sorted({tuple(rng.randrange(3) for _ in range(rng.randrange(1, 5))) + (9,)
                   for _ in range(9)})
    return [([70, 71, 72], [(1, 2, 3, 4, 9), (1, 3, 5, 9), (6, 9)]), ([70], [(9,)]),
            ([70, 70], many), ([70], [(1,), (1, 1), (1, 1, 1), (1, 1, 9)])]


def grown(m, prompt, responses):
    """The rows, each as (places, steps, what each place has read, by its ancestors)."""
    found = []
    for row in m.grow(list(prompt), list(responses)):
        require(isinstance(row, tuple) and len(row) == 2, "each row is a pair (places, steps)")
        places, steps = (np.asarray(x).tolist() for x in row)
        require(set(map(len, places + steps)) == {3}, "a place is (token, position, end), a step "
                "(place, target, response)")
        path, read = [], []
        for place, (token, position, _) in enumerate(places):
            require(0 <= position <= len(path), f"place {place} has position {position} after a "
                    f"path of {len(path)}: the position is the number of ancestors, and the walk "
                    f"is depth-first")
            path[position:] = [token]
            read.append(tuple(path))
        require(all(0 <= place < len(places) for place, *_ in steps), "a step's place is none of "
                "its row")
        found.append((places, steps, read))
    return found


def one_row(m, prompt, responses):
    rows = grown(m, prompt, responses)
    require(len(rows) == 1, f"{len(responses)} short responses make {len(rows)} rows; a new row "
            f"begins where one gets too wide")
    return rows[0]


def some(tokens):
    return " ".join(map(str, tokens))


@claim("data/responses.py", "grow")
def every_prefix_is_read_once(m):
    """A place for each token of the prompt and for each prefix that something follows."""
    for prompt, responses in cases():
        _, _, read = one_row(m, prompt, responses)
        wanted = {tuple(prompt[:n + 1]) for n in range(len(prompt))}
        wanted |= {(*prompt, *y[:k]) for y in responses for k in range(1, len(y))}
        for x in read:
            require(read.count(x) == 1, f"the prefix {some(x)} is read by two places: a response "
                    f"shares the places of the one before, as far as they are alike")
            require(x in wanted or x[len(prompt):] not in responses, f"a place reads the last "
                    f"token of {some(x)}: nothing follows it, so it is a target but no place")
            require(x in wanted, f"a place reads {some(x)}, which begins no response: is its "
                    f"position the number of its ancestors?")
        require(set(read) == wanted, "a prefix is read by no place")


@claim("data/responses.py", "grow")
def the_steps_spell_each_response_and_its_place_has_read_what_stands_before(m):
    for prompt, responses in cases():
        _, steps, read = one_row(m, prompt, responses)
        for number, y in enumerate(responses):
            own = [(place, target) for place, target, whose in steps if whose == number]
            spelt = tuple(target for _, target in own)
            require(spelt != y[:-1], f"response {number} lacks the step to its last token: END is "
                    f"scored too")
            require(spelt == y or spelt != y[len(y) - len(spelt):], f"response {number} lacks the "
                    f"steps that it shares with the one before")
            require(spelt == y, f"the steps of response {number} spell {some(spelt)}, and it is "
                    f"{some(y)}")
            for k, (place, target) in enumerate(own):
                require(read[place] != (*prompt, *y[:k + 1]), "a step leaves the place that has "
                        "read its target: no shift; a token is scored by the place before it")
                require(read[place] == (*prompt, *y[:k]), f"response {number}, token {k}: its step "
                        f"leaves a place that has read {some(read[place])}")


@claim("data/responses.py", "grow")
def the_end_is_the_first_place_after_the_subtree(m):
    for prompt, responses in cases():
        places, _, _ = one_row(m, prompt, responses)
        depth = [position for _, position, _ in places]
        for i, (_, _, end) in enumerate(places):
            right = next((j for j in range(i + 1, len(depth)) if depth[j] <= depth[i]), len(depth))
            require(end == right, f"the subtree of place {i} ends at {right}, not at {end}")


@claim("data/responses.py", "grow")
def a_row_that_gets_too_wide_ends_and_the_next_begins_with_the_prompt(m):
    prompt, responses = [7] * 60, [(k, *[5] * 29, 9) for k in range(6)]
    rows = grown(m, prompt, responses)
    require([len(places) for places, _, _ in rows] == [120] * 3, f"six responses of 31 tokens to a "
            f"prompt of 60 make rows of {[len(p) for p, _, _ in rows]} places, expected [120, 120, "
            f"120]: at most 60 + 60")
    for row, (_, steps, read) in enumerate(rows):
        require({number for _, _, number in steps} == {2 * row, 2 * row + 1}, f"row {row} has the "
                f"steps of other responses than {2 * row} and {2 * row + 1}")
        require(all(read[place][:60] == tuple(prompt) for place, _, _ in steps),
                f"row {row} does not begin with the prompt")


# --- all responses of a prompt, read by a network ------------------------------------------------


def played(m, shares="known"):
    """(world, opponent, the Responses of self_play_responses), two prompts and a tiny network."""
    from conftest import tiny_gpt  # here: an exercise of model.py is tried without it
    data = [{(1, 9): 0.5, (1, 2, 9): 0.25, (2, 9): 0.25}, {(9,): 0.5, (3, 1, 9): 0.5}]
    world = SimpleNamespace(prompts=[[5, 7], [6, 6, 7]], data=data,
                            real=[{(1, 9): 0.8, (2, 9): 0.2}, {(9,): 1.0}])
    samples = [Counter({(1, 9): 2, (1, 1, 1): 2}), Counter({(9,): 1, (3, 9): 3})]
    opponent = tiny_gpt(vocab_size=10, block_size=12)
    config = SimpleNamespace(logprob="eager", shares=shares)
    return world, samples, opponent, m.self_play_responses(world, samples, opponent, config)


@claim("data/responses.py", "response_logps")
def response_logps_are_sums_of_token_logps(m):
    from conftest import logp_by_hand
    world, _, opponent, responses = played(m)
    for part in responses.parts([0, 1]):
        logp_PN = m.response_logps(opponent, part)
        for i, p in enumerate(part.prompts):
            ys = responses.tables[p].responses
            right = [logp_by_hand(opponent, world.prompts[p], y) for y in ys]
            expect(logp_PN[i, :len(ys)], right, {"you averaged over tokens": [
                x / len(y) for x, y in zip(right, ys)]}, "beside log p by hand")


@claim("data/responses.py", "self_play_responses")
def opponent_scores_every_response_and_weighs_them(m):
    from conftest import logp_by_hand
    for way in ("known", "sampled"):
        world, samples, opponent, responses = played(m, way)
        for p, (x, counts, real) in enumerate(zip(world.prompts, samples, world.real)):
            part, ys = next(iter(responses.parts([p]))), responses.tables[p].responses
            logp = np.array([logp_by_hand(opponent, x, y) for y in ys])
            share = np.array([counts[y] / 4 for y in ys])
            is_real = np.array([real.get(y, 0.0) for y in ys])
            expect(part.opponent_PN[0], logp.tolist(), what="beside log p by hand log p_t")
            weight = m.known_shares(is_real, share, logp, 4) if way == "known" else share
            expect(part.generated_PN[0], weight.tolist(), what=f"with shares {way} the weight")
            own = np.where(is_real > 0, np.exp(logp), share)
            expect(part.log_share_PN[0].exp(), own.tolist(), what="the anchor's share")


# --- known_shares --------------------------------------------------------------------------------


def weights(m, real, sampled, opponent, n):
    """What known_shares gives, as an array; opponent are probabilities."""
    got = np.asarray(m.known_shares(np.array(real, float), np.array(sampled), np.log(opponent), n))
    require(got.shape == (len(real),), f"the result has shape {list(got.shape)}, expected "
            f"[{len(real)}]: one weight for each response")
    require(np.isfinite(got).all(), f"the weights are {got}: 0/0; take care of nothing known, of "
            f"nothing else sampled, and of known = 1, whose limit is 1/n")
    require(abs(got.sum() - 1) < 1e-6, f"the weights sum to {got.sum():.4f}, expected 1")
    return got


def check_shares(m, opponent, real, n):
    """The mean over all samplings of n responses must be p_t, and each result sum to 1."""
    right, K = [float(x) for x in opponent], len(opponent)
    mean, naive = np.zeros(K), np.zeros(K)
    for drawn in itertools.product(range(K), repeat=n):
        chance = math.prod(right[y] for y in drawn)
        sampled = np.bincount(drawn, minlength=K) / n
        got = weights(m, real, sampled, opponent, n)
        others = [y for y in range(K) if not real[y] and sampled[y] == 0]
        require(not got[others].any(), "a response that is neither real nor sampled has a weight")
        mean += chance * got
        known = sum(p for p, r in zip(right, real) if r)
        part = 0 if all(real[y] for y in drawn) else 1 - known
        wrong = sampled * (np.array(real) == 0)
        naive += chance * (part * wrong / max(wrong.sum(), 1e-9) + (1 - part) * np.where(
            real, right, 0) / known if known else sampled)
    expect(mean.tolist(), right, {
        "other responses are weighed too little: some samplings have none of them, so divide "
        "1 − known by the chance that there is one, 1 − knownⁿ": naive.tolist()},
        "the mean over all samplings")


@claim("data/responses.py", "known_shares")
def known_shares_keep_the_expectation(m):
    check_shares(m, [0.5, 0.2, 0.3], [0.6, 0.4, 0], 2)
    check_shares(m, [0.3, 0.2, 0.1, 0.4], [0.5, 0.5, 0, 0], 3)


@claim("data/responses.py", "known_shares")
def real_responses_are_weighed_by_p_t_not_by_counts(m):
    got = weights(m, [0.3, 0.7, 0], [0.25, 0.25, 0.5], [0.5, 0.1, 0.2], 4)
    require(abs(got[0] - 0.25) > 1e-3, "these are the counts: real responses are weighed by p_t")
    require(abs(got[0] / max(got[1], 1e-9) - 5) < 1e-6,
            f"two real responses with p_t = 0.5 and 0.1 are weighed {got[0]:.3f} and {got[1]:.3f}; "
            f"these should be as 5 to 1, whatever was sampled")


@claim("data/responses.py", "known_shares")
def nothing_known_or_nothing_else_sampled(m):
    one = weights(m, [0.5, 0.5, 0], [1.0, 0, 0], [0.3, 0.1, 0.6], 5)
    expect(one.tolist(), [0.75, 0.25, 0],
           what="with real responses only among the samples the weights")
    none = weights(m, [0, 0], [0.25, 0.75], [0.5, 0.5], 4)
    expect(none.tolist(), [0.25, 0.75], what="without real responses the weights")
    weights(m, [1.0, 0], [0.5, 0.5], [1.0, 1e-30], 2)


# --- variants ------------------------------------------------------------------------------------


def play_with_history(m, t):
    """What self_play_with_history samples, [(model, t)], and what it hands on."""
    calls = []

    def sample_responses(model, world, config, t):
        calls.append((model, t))
        return [Counter({(t, 9): 3, (5, 9): 1}), Counter({(t, 9): 4})]
    m.sample_responses = sample_responses
    m.self_play_responses = lambda world, samples, opponent, config: (samples, opponent)
    run = SimpleNamespace(world="world", config="config", policy=lambda t: f"p_{t}")
    got = m.self_play_with_history(f"p_{t}", t, run)
    require(isinstance(got, tuple), "what self_play_responses gives is to be returned")
    return calls, got


@claim("tests/classroom/variants.py", "self_play_with_history")
def both_iterations_count_from_the_second_on(m):
    calls, _ = play_with_history(m, 0)
    require(calls == [("p_0", 0)], f"in iteration 0 there is nothing before; you sample {calls}")
    for t in (2, 1):
        calls, (samples, _) = play_with_history(m, t)
        require((f"p_{t}", t) in calls, "the responses of p_t itself are missing")
        require(len(calls) > 1, "the responses of the iteration before are missing")
        require((f"p_{t - 1}", t - 1) in calls, f"the responses of the iteration before are those "
                f"of p_{t - 1}, with its t = {t - 1}: the same as then; you sample {calls}")
        require(len(calls) == 2, f"two iterations count, the others no more; you sample {calls}")
        right = [Counter({(t, 9): 3, (t - 1, 9): 3, (5, 9): 2}),
                 Counter({(t, 9): 4, (t - 1, 9): 4})]
        require(samples == right, "the counts of both iterations should be added, prompt by prompt")


@claim("tests/classroom/variants.py", "self_play_with_history")
def all_responses_are_scored_by_the_opponent_of_this_iteration(m):
    for t in (0, 1, 3):
        _, (_, opponent) = play_with_history(m, t)
        require(opponent == f"p_{t}", f"iteration {t} is scored by {opponent}, expected p_{t}: "
                f"also for responses of the one before")


@claim("tests/classroom/variants.py", "sampled_pair_loss")
def its_mean_is_the_loss_over_all_pairs(m):
    spin_loss_alone(m)
    rng = dice("sampled pairs")
    player, opponent = table(rng, 2, 3, low=-4, high=-1), table(rng, 2, 3, low=-4, high=-1)
    real, generated, ratio = shares(rng, 2, 3), shares(rng, 2, 3), player - opponent
    torch.manual_seed(0)
    got = m.sampled_pair_loss(player, opponent, real, generated, 0.5, "exponential", n=40_000)
    of = lambda a, b, r=ratio, lam=0.5, loss="exponential": (
        a[:, :, None] * b[:, None, :] * m.spin_loss(
            r[:, :, None], r[:, None, :], 0.0, 0.0, lam, loss)).sum((1, 2))
    close = lambda value: value.shape == got.shape and bool(
        (got - value).abs().max() < 0.02 * float(value.mean()))
    require_tensor(got)
    require(list(got.shape) == [2], f"one loss for each prompt, [2], not {list(got.shape)}")
    even = torch.full_like(real, 1 / 3)
    for words, wrong in {"y and y' are exchanged": of(generated, real),
                         "y is drawn without its weight": of(even, generated),
                         "y' is drawn without its weight": of(real, even),
                         "y' is always the same response as y: draw it by its own weight":
                             torch.ones(2).double(),
                         "the opponent is left out": of(real, generated, player),
                         "λ is missing": of(real, generated, lam=1.0),
                         "`loss` is not passed on": of(real, generated, loss="logistic"),
                         "this is the sum over the pairs, not their mean":
                             of(real, generated) * 40_000,
                         "y' comes from real_PN": of(real, real)}.items():
        require(close(of(real, generated)) or not close(wrong), words)
    require(close(of(real, generated)), f"the mean of 40,000 pairs is {got.tolist()}, expected "
            f"{of(real, generated).tolist()} within its noise")


@claim("tests/classroom/variants.py", "sampled_pair_loss")
def it_draws_n_pairs_anew_and_passes_the_gradient(m):
    spin_loss_alone(m)
    rng = dice("few pairs")
    player, even = table(rng, 1, 50, low=-4, grad=True), torch.full((1, 50), 0.02).double()
    args = player, table(rng, 1, 50, low=-4), even, even, 1.0
    values = {str(numbers(m.sampled_pair_loss(*args, n=3)).tolist()) for _ in range(8)}
    require(len(values) == 8, "each call draws new pairs; yours gives equal values twice")
    gradient, = require_gradient(m.sampled_pair_loss(*args, n=3), player)
    count = int((gradient != 0).sum())
    require(2 <= count <= 6, f"with n = 3 pairs {count} responses get a gradient, expected at most "
            f"6: n pairs of each prompt")
