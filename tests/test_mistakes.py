"""The mistakes that published code really makes: each, made here on purpose, turns a test red.

A mutation replaces one piece of source in a copy of the repository; the test it names must then
fail, and say what is wrong. If `old` is not found exactly once, the mutation has rotted: renew it.
Two copies are tried at a time.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from copies import ROOT, Servers, copy_of_the_repository

LOSS, TREES = "test_spin_loss.py::test_", "test_responses.py::test_"
PLAY, DATA = "test_play.py::test_", "test_data.py::test_"
MODEL = "test_model_and_sampling.py::test_"
SCORED = "tokens_BT[:, 1:], response_BT[:, 1:]"
FRAMED = "encoding.encode_ordinary(response) + [specials[END]]"
SAMPLED = PLAY + "negatives_are_samples_of_p_t_itself"
DRAWN = "end_token=world.end_token,\n                           max_new_tokens"
SAMPLES = "(p, tuple(y)) for p, y in zip(some, sampled)"
OPPONENT = 'copy.deepcopy(player if config.opponent == "previous" else run.policy(0))'
RATIOS = "player_N[i_B], player_N[j_B], opponent_N[i_B], opponent_N[j_B]"
LOGISTIC = "F.softplus(-lam * (r - s))"

# the mistake: (file, old, new, the test that catches it, words of its message)
MISTAKES = {
    # ---- what is scored, and how: the slow way, then the fast one that training uses
    "no shift between logits and targets": (
        "spin_loss.py", "model.hidden(tokens_BT[:, :-1])", "model.hidden(tokens_BT[:, 1:])",
        LOSS + "token_is_scored_by_the_logits_before_it", "by the logits that have read it"),
    "no shift, in prefix trees": (
        "data/responses.py", 'tree["parent"].append(nodes[k])',
        'tree["parent"].append(nodes[max(0, k - 1)])',
        TREES + "response_logps_equal_sequence_logps", "not close"),
    "mean instead of sum over tokens": (
        "spin_loss.py", "index_add(0, row_N, logp_N)",
        "index_add(0, row_N, logp_N) / scored_BS.sum(1)",
        LOSS + "logprob_is_a_sum_over_response_tokens_not_a_mean",
        "you averaged: your value is 1/"),
    "mean instead of sum, in prefix trees": (
        "data/responses.py", "batch.response_L, logp_L)\n",
        "batch.response_L, logp_L) / torch.bincount(batch.response_L)\n",
        PLAY + "sft_objective_is_minus_the_mean_log_probability_of_the_sft_set",
        "you averaged over tokens"),
    "prompt tokens scored": (
        "spin_loss.py", SCORED, SCORED + ".flip(1).cumsum(1).flip(1) > 0",
        LOSS + "prompt_and_padding_are_not_scored",
        "6.00 tokens scored, 4 expected: your sum includes the prompt"),
    "padding scored": (
        "spin_loss.py", SCORED, SCORED + ".cumsum(1) > 0",
        LOSS + "prompt_and_padding_are_not_scored", "your sum includes the padding"),
    "padding read as if it were text": (
        "model.py", "is_text_BT = tokens_BT >= 0", "is_text_BT = tokens_BT >= -1",
        MODEL + "padding_in_the_cache_is_never_seen", "not close"),
    "END dropped from the sum": (
        "spin_loss.py", SCORED, SCORED + " & F.pad(response_BT[:, 2:], (0, 1))",
        LOSS + "end_token_is_scored", "END is not scored"),
    "END dropped from the response": (
        "data/tokenizer.py", FRAMED, "encoding.encode_ordinary(response)",
        DATA + "world_frames_prompt_and_response_with_one_answer_and_one_end", "END 0 times"),
    "END counted twice": (
        "data/tokenizer.py", FRAMED, FRAMED + " * 2",
        DATA + "world_frames_prompt_and_response_with_one_answer_and_one_end", "END 2 times"),
    "SFT mask inverted": (
        "spin_loss.py", SCORED, SCORED.replace("response", "~response"),
        LOSS + "prompt_and_padding_are_not_scored", "your mask is inverted"),
    "SFT learns what is not in its set": (
        "train.py", "    return -(batch.real_N * player_N)",
        "    return -((batch.real_N == 0) * player_N)",
        PLAY + "sft_objective_is_minus_the_mean_log_probability_of_the_sft_set",
        "mask is inverted"),
    # ---- what is generated
    "truncated generations treated as finished": (
        "train.py", SAMPLES,
        "(p, tuple(y) if y[-1] == world.end_token else (*y, world.end_token))\n"
        "                 for p, y in zip(some, sampled)",
        PLAY + "truncated_responses_carry_no_end", "its longest responses all end with END"),
    "END forced onto the last token": (
        "train.py", SAMPLES, SAMPLES.replace("tuple(y)", "(*y[:-1], world.end_token)"),
        SAMPLED + "[whole responses]", "chi-square"),
    "negatives drawn greedily": (
        "train.py", DRAWN, "temperature=0, " + DRAWN,
        SAMPLED + "[a wide vocabulary]", "greedy decoding, not a sample"),
    "negatives drawn from the 50 likeliest tokens": (
        "train.py", DRAWN, "top_k=50, " + DRAWN,
        SAMPLED + "[a wide vocabulary]", "rare tokens never come"),
    "negatives drawn with top-p": (
        "sample.py", "    # Subtle: the float32 cumsum may", "    cdf_BV = cdf_BV.clamp(max=0.95)\n"
        "    # Subtle: the float32 cumsum may",
        SAMPLED + "[a wide vocabulary]", "rare tokens never come"),
    "negatives drawn at temperature 0.7": (
        "train.py", DRAWN, "temperature=0.7, " + DRAWN,
        SAMPLED + "[a wide vocabulary]", "this is temperature 0.7"),
    "generation prompt formatted unlike the training prompt": (
        "train.py", "[world.prompts[p] for p in some]", "[world.prompts[p][:-1] for p in some]",
        PLAY + "prompts_are_framed_alike_for_training_generation_and_sampling", "self-play asks"),
    "sample.py's prompt formatted unlike the training prompt": (
        "sample.py", 'frame(encoding, prompt, "")[0]', "encoding.encode_ordinary(prompt)",
        PLAY + "prompts_are_framed_alike_for_training_generation_and_sampling", "sample.py asks"),
    # ---- who is the opponent
    "opponent not frozen: no copy is made": (
        "train.py", OPPONENT, "player",
        PLAY + "opponent_is_a_frozen_copy_of_p_t", "it learned with the player"),
    "negatives drawn from the live player": (
        "train.py", "        prompts = batches[step]",
        "        responses = self_play(player, config, stage - 1, run) if stage else responses\n"
        "        prompts = batches[step]",
        PLAY + "opponent_is_frozen_within_an_iteration", "the live player?"),
    "opponent frozen at the SFT model for ever": (
        "train.py", OPPONENT, "run.policy(0)",
        PLAY + "opponent_is_renewed_between_iterations", "these are p_0's"),
    "another iteration's model generates": (
        "train.py", "sample_responses(opponent, run.world,",
        "sample_responses(run.policy(0), run.world,",
        PLAY + "opponent_scores_what_it_generated", "its opponent did not draw"),
    "reference log-probs from another iteration's model": (
        "train.py", "all_logps(opponent, trees", "all_logps(run.policy(0), trees",
        PLAY + "opponent_scores_what_it_generated", "these are the log-probs of p_0"),
    "every iteration starts again from SFT": (
        "train.py", "fit(player, OBJECTIVES[", "fit(run.policy(0), OBJECTIVES[",
        PLAY + "player_starts_each_iteration_as_its_own_opponent",
        "the player does not start as p_t"),
    # ---- the loss
    "same labels used for the real and the generated sequence": (
        "train.py", RATIOS, RATIOS.replace("j_B", "i_B"),
        PLAY + "spin_objective_compares_every_real_with_every_generated_response",
        "the same labels for both?"),
    "sign of the margin flipped": (
        "spin_loss.py", LOGISTIC, LOGISTIC.replace("-lam", "lam"),
        LOSS + "loss_is_its_formula_written_out", "the sign of the margin is flipped"),
    "λ forgotten": (
        "spin_loss.py", LOGISTIC, LOGISTIC.replace("lam * ", ""),
        LOSS + "loss_is_its_formula_written_out", "λ is missing"),
    "opponent forgotten": (
        "spin_loss.py", "LOSSES[loss](real_ratio_B, generated_ratio_B,",
        "LOSSES[loss](policy_real_B, policy_generated_B,",
        LOSS + "loss_is_its_formula_written_out", "the opponent is left out"),
    # ---- invariants of our own
    "responses of different prompts compared": (
        "data/responses.py", "np.repeat(first_partner_I - before(partners_I), partners_I)",
        "np.repeat(-before(partners_I), partners_I)",
        TREES + "pairs_are_all_pairs_of_one_prompt_with_product_weights",
        "Mappings has different keys"),
    "responses beyond the SFT set weighed too little": (
        "data/responses.py", "np.maximum((1 - known_N) / chance_N, 1 / n)", "1 - known_N",
        TREES + "known_shares_keep_the_expectation", "expected"),
}


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """{mistake: a future of (exit status, output)}; None stands for no mistake."""
    wanted = [item.callspec.params["mistake"] for item in request.session.items
              if item.path == request.node.path and hasattr(item, "callspec")]
    folder = tmp_path_factory.mktemp("mistakes")

    def attempt(number, name):
        copy = copy_of_the_repository(folder / str(number))
        if name is None:
            of_each_file = {test.split("::")[0]: test for *_, test, _ in MISTAKES.values()}
            return servers.run(copy, of_each_file.values())
        file, old, new, test, _ = MISTAKES[name]
        text = (copy / file).read_text("utf-8")
        (copy / file).write_text(text.replace(old, new), "utf-8")
        return servers.run(copy, [test], "-x")
    with Servers(2) as servers, ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(attempt, number, name)
               for number, name in enumerate([None, *wanted])}


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@needs_fork
def test_copy_without_a_mistake_is_green(outcomes):
    """Else a red test below would prove nothing. One test of each file shows that a copy works."""
    status, output = outcomes[None].result()
    assert status == 0, output


@needs_fork
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_turns_its_test_red(outcomes, mistake):
    file, old, _, test, words = MISTAKES[mistake]
    count = (ROOT / file).read_text("utf-8").count(old)
    assert count == 1, f"{file} has {count} times what this mutation replaces: renew it"
    status, output = outcomes[mistake].result()
    assert f"FAILED tests/{test}" in output, (
        f"{mistake}: survives {test}\n{output}" if status == 0 else output)
    assert words in output, f"{mistake}: {test} fails without saying {words!r}\n{output}"
