"""The mistakes that published code really makes: each, made here on purpose, turns a test red.

A mutation replaces one piece of source in a copy of the repository; the test it names must then
fail, and say what is wrong. If `old` is not found exactly once, the mutation has rotted: renew it.
Two copies are tried at a time.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from copies import ROOT, Servers, copy_of_the_repository

THEORY, MODEL = "test_theory.py::test_", "test_model_and_sampling.py::test_"
PLAY, DATA, FUSED = "test_play.py::test_", "test_data.py::test_", "test_fused.py::test_"
SCORED = "tokens_BT[:, 1:], response_BT[:, 1:]"
PAIR = """player_N[real_B], player_N[generated_B], opponent_N[real_B],
                                 opponent_N[generated_B]"""

# the mistake: (file, old, new, the test that catches it, words of its message)
MISTAKES = {
    # ---- what is scored, and how: the slow way, then the fast one that training uses
    "no shift between logits and targets": (
        "spin_loss.py", "model.hidden(tokens_BT[:, :-1])", "model.hidden(tokens_BT[:, 1:])",
        THEORY + "token_is_scored_by_the_logits_before_it", "by the logits that have read it"),
    "no shift, with shared prompts": (
        "data/responses.py", "torch.cat([first_P1[prompt_n], target_nS[:, :-1]], dim=1)",
        "target_nS", THEORY + "answer_logps_equal_sequence_logps", "not close"),
    "mean instead of sum over tokens": (
        "spin_loss.py", "index_add(0, row_N, logp_N)",
        "index_add(0, row_N, logp_N) / scored_BS.sum(1)",
        THEORY + "logprob_is_a_sum_over_response_tokens_not_a_mean",
        "you averaged: your value is 1/"),
    "mean instead of sum, with shared prompts": (
        "data/responses.py", "    return logp_N\n", "    return logp_N / answers.length_N\n",
        PLAY + "sft_loss_is_minus_the_mean_log_probability_of_the_sft_set",
        "you averaged over tokens"),
    "prompt tokens scored": (
        "spin_loss.py", SCORED, SCORED + ".flip(1).cumsum(1).flip(1) > 0",
        THEORY + "prompt_and_padding_are_not_scored",
        "6.00 tokens scored, 4 expected: your sum includes the prompt"),
    "padding scored": (
        "spin_loss.py", SCORED, SCORED + ".cumsum(1) > 0",
        THEORY + "prompt_and_padding_are_not_scored", "your sum includes the padding"),
    "padding read as if it were text": (
        "model.py", "real_BT = tokens_BT >= 0", "real_BT = tokens_BT >= -1",
        MODEL + "padding_in_the_cache_is_never_seen", "not close"),
    "END dropped from the sum": (
        "spin_loss.py", SCORED, SCORED + " & F.pad(response_BT[:, 2:], (0, 1))",
        THEORY + "end_token_is_scored", "END is not scored"),
    "END dropped from the response": (
        "data/tokenizer.py", "encoding.encode_ordinary(response) + [specials[END]]",
        "encoding.encode_ordinary(response)",
        DATA + "world_frames_prompt_and_response_with_one_answer_and_one_end", "END 0 times"),
    "END counted twice": (
        "data/tokenizer.py", "encoding.encode_ordinary(response) + [specials[END]]",
        "encoding.encode_ordinary(response) + [specials[END]] * 2",
        DATA + "world_frames_prompt_and_response_with_one_answer_and_one_end", "END 2 times"),
    "SFT mask inverted": (
        "spin_loss.py", SCORED, SCORED.replace("response", "~response"),
        THEORY + "prompt_and_padding_are_not_scored", "your mask is inverted"),
    "SFT learns what is not in its set": (
        "train.py", "(batch.real_N * answer_logps", "((batch.real_N == 0) * answer_logps",
        PLAY + "sft_loss_is_minus_the_mean_log_probability_of_the_sft_set", "mask is inverted"),
    # ---- what is drawn
    "truncated generations treated as finished": (
        "train.py", "map(tuple, answers[i:i + config.negatives])",
        "(tuple(y) if y[-1] == world.end_token else (*y, world.end_token)\n"
        "                 for y in answers[i:i + config.negatives])",
        PLAY + "truncated_answers_carry_no_end", "its longest answers all end with END"),
    "END forced onto the last token": (
        "train.py", "map(tuple, answers[i:i + config.negatives])",
        "((*y[:-1], world.end_token) for y in answers[i:i + config.negatives])",
        PLAY + "negatives_are_samples_of_p_t_itself", "chi-square"),
    "negatives drawn greedily": (
        "train.py", "end_token=world.end_token, generator=rng",
        "end_token=world.end_token, generator=rng, temperature=0",
        PLAY + "negatives_are_samples_of_p_t_itself", "greedy decoding, not a sample"),
    "negatives drawn from the 50 likeliest tokens": (
        "train.py", "end_token=world.end_token, generator=rng",
        "end_token=world.end_token, generator=rng, top_k=50",
        PLAY + "negatives_are_samples_of_p_t_itself", "rare tokens never come"),
    "negatives drawn with top-p": (
        "sample.py", "    # Subtle: the sum of float32", "    cdf_BV = cdf_BV.clamp(max=0.95)\n"
        "    # Subtle: the sum of float32",
        PLAY + "negatives_are_samples_of_p_t_itself", "rare tokens never come"),
    "negatives drawn at temperature 0.7": (
        "sample.py", "temperature: float = 1.0,", "temperature: float = 0.7,",
        PLAY + "negatives_are_samples_of_p_t_itself", "this is temperature 0.7"),
    "generation prompt formatted unlike the training prompt": (
        "train.py", "prompts = [x for x in", "prompts = [x[:-1] for x in",
        PLAY + "prompts_are_framed_alike_for_training_generation_and_talk", "self-play asks"),
    "the talk's prompt formatted unlike the training prompt": (
        "sample.py", 'tokens, limit = frame(encoding, prompt, "")[0], ',
        "tokens, limit = encoding.encode_ordinary(prompt), ",
        PLAY + "prompts_are_framed_alike_for_training_generation_and_talk", "sample.py asks"),
    # ---- who is the opponent
    "negatives drawn from the live player": (
        "train.py", "                if progress.due(step, loss):",
        "                if t:\n"
        "                    save_checkpoint(Path(config.out) / f'iteration_{t - 1}.pt',\n"
        "                                    parts['player'], world)\n"
        "                    vars(responses).update(vars(self_play(world, config, t)))\n"
        "                if progress.due(step, loss):",
        PLAY + "opponent_is_frozen_within_an_iteration", "the live player?"),
    "opponent frozen at the SFT model for ever": (
        "train.py", 'load_player(config, 0 if config.opponent == "sft" else t - 1, device)',
        "load_player(config, 0, device)",
        PLAY + "opponent_is_renewed_between_iterations", "these are iteration 0's"),
    "the wrong iteration's model generates": (
        "train.py", "world.tabulate(draw(opponent, world",
        "world.tabulate(draw(load_player(config, 0, world.device), world",
        PLAY + "opponent_scores_what_it_generated", "its opponent did not draw"),
    "reference log-probs from another iteration's model": (
        "train.py", "all_logps(opponent, responses", "all_logps(load_player(config, 0, "
        "world.device), responses",
        PLAY + "opponent_scores_what_it_generated", "the log-probs of iteration 0's model"),
    "the opponent learns too": (
        "data/responses.py", "@torch.no_grad()\ndef all_logps", "def all_logps",
        PLAY + "opponent_scores_what_it_generated", "the opponent must not learn"),
    "every iteration starts again from SFT": (
        "train.py", "player = load_player(config, t - 1,", "player = load_player(config, 0,",
        PLAY + "player_starts_each_iteration_as_its_own_opponent", "not close"),
    "known responses weighed without making room for the others": (
        "data/responses.py", "drawn_N * left_N /", "drawn_N /",
        PLAY + "known_shares_keep_the_expectation", "expected"),
    # ---- the loss
    "same labels used for the real and the generated sequence": (
        "train.py", PAIR, PAIR.replace("generated_B", "real_B"),
        PLAY + "spin_objective_compares_every_real_with_every_generated_response",
        "the same labels for both?"),
    "responses of different prompts compared": (
        "data/responses.py", "at_B = same_IJ.nonzero()",
        "at_B = torch.ones_like(same_IJ).nonzero()",
        DATA + "pairs_are_all_pairs_of_one_prompt_with_product_weights", "assert"),
    "sign of the margin flipped": (
        "spin_loss.py", "lam * (real_B - generated_B)", "lam * (generated_B - real_B)",
        THEORY + "loss_is_its_formula_written_out", "the sign of the margin is flipped"),
    "λ forgotten": (
        "spin_loss.py", "lam * (real_B - generated_B)", "real_B - generated_B",
        THEORY + "loss_is_its_formula_written_out", "λ is missing"),
    "opponent forgotten": (
        "spin_loss.py", "lam * (real_B - generated_B)",
        "lam * (policy_real_B - policy_generated_B)",
        THEORY + "loss_is_its_formula_written_out", "the opponent is left out"),
    "SPACE without μ": (
        "spin_loss.py", "mu * F.softplus(generated_B", "F.softplus(generated_B",
        THEORY + "space_asks_of_each_answer_alone_whether_it_is_real", "μ is missing"),
    "the anchor punishes an excess": (
        "spin_loss.py", "m_P.clamp(1e-30, 1)", "m_P.clamp(1e-30)",
        THEORY + "mass_anchor_looks_at_each_prompt_and_at_shortfalls_only", "assert"),
    "Theorem 5.4 with λ for 1/λ": (
        "spin_loss.py", "(1 - 1 / lam) * logp_opponent_K + logp_data_K / lam",
        "(1 - lam) * logp_opponent_K + logp_data_K * lam",
        THEORY + "optimal_next_policy_is_the_formula_row_by_row", "the exponent is 1/λ, not λ"),
    "the divergence added to the floor": (
        "spin_loss.py", "return (plus_KK.exp() * F.softplus(ratio_KK)).sum(dim=(-2, -1))",
        "return 2 * math.log(2) - (plus_KK.exp() * F.softplus(ratio_KK)).sum(dim=(-2, -1))",
        THEORY + "loss_floor_is_log_2_minus_the_jensen_shannon_divergence",
        "subtract the divergence"),
    # ---- the network
    "a token hidden from itself": (
        "model.py", "key_BC[:, None, :] <= query_BT[:, :, None]",
        "key_BC[:, None, :] < query_BT[:, :, None]",
        MODEL + "a_query_sees_its_own_position_and_those_before", "you hide a token from itself"),
    "attention without 1/√K": (
        "model.py", " / math.sqrt(D // self.n_head)", "",
        MODEL + "attention_is_a_mean_of_values_weighted_by_softmax_of_q_k_over_root_k",
        "the scores lack 1/√K"),
    "the fused sum not rescaled to the new maximum": (
        "spin_loss.py", "sum_N * (max_N - new_N).exp()", "sum_N",
        FUSED + "fused_value_and_both_gradients_match_the_definition", "∂L/∂h is wrong"),
    "the fused gradient without its targets": (
        "spin_loss.py", "            logits_NC[at] += grad_N[at[0]]\n", "",
        FUSED + "fused_value_and_both_gradients_match_the_definition", "1[v = y] is missing"),
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
