"""sample.py's `expectation` and `main`.

`next_tokens` is among the claims; test_model_and_sampling.py compares `generate` with a naive one.
"""
import math
from collections import Counter

import pytest
import torch

from conftest import logp_by_hand, tiny_gpt
from data.run.files import load_policy
from data.run.options import parse_args
from data.tokenizer import frame
from processes import SMALL, here, without_figures, write_world
from sample import SampleConfig, expectation, print_answers, rows_that_fit, samples_of
from train import Config, main

PROMPT, END = [2, 0], 3


def test_expectation_is_the_mean_of_f_of_each_response_and_its_logp_with_the_standard_error():
    model, seen = tiny_gpt(vocab_size=4), []
    got, error = expectation(lambda y, logp: seen.append((y, logp)) or len(y), model, PROMPT,
                             [[0, END], [END], [0, END], [1, 1, 1]])
    assert (got, error) == (2.0, pytest.approx(math.sqrt(2 / 3) / 2))
    for y, logp in seen:
        assert logp == pytest.approx(logp_by_hand(model, PROMPT, list(y)), abs=1e-5)


def test_samples_come_in_the_number_asked_for_however_few_fit_at_once(monkeypatch):
    model = tiny_gpt(vocab_size=4)
    monkeypatch.setattr("sample.rows_that_fit", lambda model, tokens: 7)
    for n in (1, 7, 20):
        assert len(samples_of(model, PROMPT, n, max_new_tokens=2, end_token=END,
                              generator=torch.Generator())) == n
    model.config.n_layer, model.config.n_embd = 12, 768  # GPT-2 small: 75 MB for each row
    assert 1 <= rows_that_fit(model, 1024) <= 4 and rows_that_fit(model, 10**9) == 1


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """--out of a run of one iteration that knows its few responses."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        main(parse_args(Config, "", [
            *SMALL, "--iters", "1", "--sft-steps", "60", "--sft-lr", "1e-2", "--n-embd", "32",
            "--data", write_world(folder), "--out", str(folder / "out")]))
    return folder / "out"


def table_of(text) -> dict:
    """{response: its numbers} of one printed table."""
    return {line.split("'")[1]: list(map(float, line.split("'")[0].split()))
            for line in text.splitlines() if line.count("'") == 2}


def test_frequencies_stand_beside_p_data_and_entropy_beside_its_own(out, capsys):
    """Of 2,000 samples; five standard deviations are 0.056."""
    status, text, err = here(capsys, ["--out", str(out), "--prompt", "Name a pet.", "--samples",
                                      "2000"], "sample.py")
    assert (status, err) == (0, "")
    lines = text.strip().split("\n")
    assert lines[0] == "Name a pet.  (a training prompt)"
    assert lines[1].split() == ["p_data", "p_0", "p_1", "response"]
    shown = table_of(text)
    assert shown["dog"][0] == 0.75 and shown["a cat"][0] == 0.25
    entropy = next(line for line in lines if "entropy" in line).split()
    assert float(entropy[0]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25),
                                              abs=1e-3)
    assert all(float(cell) > 0 for cell in entropy[1:3]), "of p_0 and p_1"
    for t in (0, 1):
        model, encoding, _ = load_policy(out / f"iteration_{t}.pt")
        for y in ("dog", "a cat"):
            exact = math.exp(logp_by_hand(model, *frame(encoding, "Name a pet.", y)))
            assert abs(shown[y][1 + t] - exact) < 0.056, (t, y)


def test_a_prompt_of_ones_own_has_no_p_data(out, capsys):
    args = ["--out", str(out), "--prompt", "Who <|end|>?", "--prompt", "", "--prompt",
            "Flip a coin with 50% heads.", "--samples", "50", "--max-new-tokens", "1"]
    status, text, err = here(capsys, args, "sample.py")
    assert (status, err) == (0, "")
    heads = ["Who <|end|>?  (not in the data)", "(not in the data)",
             "Flip a coin with 50% heads.  (held out)"]
    for part, head in zip(text.strip().split("\n\n"), heads, strict=True):
        assert part.split("\n")[0].strip() == head and "cut short" in part
        assert (part.split("\n")[2].split()[0] == "?") == ("not in" in head)


def test_a_response_that_was_cut_short_is_told_from_one_that_ends_in_dots(capsys):
    counts = Counter({("Hm…", True): 3, ("Hm", False): 1})
    print_answers("Well?", {"responses": {"Hm…": 1.0}, "split": "train"}, ["0"],
                  [(counts, (0.5, 0.01))], SampleConfig(samples=4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:5] == ["     1.000   0.750   'Hm…'", "         0   0.250   'Hm' …"]
    assert lines[5].split()[:3] == ["cut", "short", "0.250"]


def test_greedy_and_top_k_print_no_entropy_of_p_theta(out, capsys):
    for more in (["--temperature", "0"], ["--top-k", "2"]):
        status, text, _ = here(capsys, ["--out", str(out), "--samples", "20", *more], "sample.py")
        assert status == 0 and "entropy" not in text
        assert text.count("p_data") == 4, "four prompts of the world by default"
        shares = {share for numbers in table_of(text).values() for share in numbers[1:]}
        assert (shares == {0, 1}) == ("0" in more), "greedily, one response has all the samples"
    assert text != here(capsys, ["--out", str(out), "--samples", "20"], "sample.py")[1]
