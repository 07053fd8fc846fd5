"""Each wrong version of classroom/mistakes.toml is caught, in words that name what is wrong.

A version is made in memory: the changed text of a file becomes a fresh module, and the claims of
the function, or the test that the catalogue names, are tried on it.
"""
import importlib

import pytest

from classroom import checks, claims_loss, claims_model, claims_training  # noqa: F401 (register)
from classroom.judge import describe
from classroom.workspace import catalogue, with_mistake

MISTAKES = [(place, wrong) for place, entry in catalogue().items() for wrong in entry["wrong"]]
PUBLISHED = (
    "no shift between logits and targets", "mean instead of sum over tokens",
    "prompt tokens scored", "padding scored", "END dropped, or counted twice",
    "truncated generations treated as finished", "negatives drawn greedily or with top-p",
    "negatives drawn from the live player instead of the frozen opponent",
    "opponent frozen at the SFT model for ever (that is DPO with self-generated negatives, not "
    "SPIN)", "reference log-probs from another iteration's model than the one that generated",
    "same labels used for the real and the generated sequence", "sign of the margin flipped",
    "generation prompt formatted unlike the training prompt", "SFT mask inverted")


def said_of(place, wrong) -> list[str]:
    """What the claims or the named test say of a mistake; nothing if they do not see it."""
    file, _, function = place.partition(" ")
    tests = checks.CLAIMS.get((file, function), [])
    if "test" in wrong:
        module, name = wrong["test"].split(".")
        module = module if module.startswith("test_") else f"classroom.{module}"
        tests = [getattr(importlib.import_module(module), name)]
    assert tests, f"{place} has no claim, and no test is named"
    said = []
    for test in tests:
        text = (checks.ROOT / file).read_text("utf-8")
        module = checks.load(file, with_mistake(text, function, wrong))
        if hasattr(module, "compiled"):
            module.compiled = lambda body, device: body  # torch.compile takes seconds
        try:
            test(module)
        except Exception as error:
            said.append(describe(error))
    return said


@pytest.mark.parametrize("place, wrong", MISTAKES, ids=lambda x: x if isinstance(x, str) else
                         x.get("published", x["says"])[:40])
def test_mistake_is_named(place, wrong):
    said = said_of(place, wrong)
    assert said, "nothing is said of this mistake: it survives"
    assert any(wrong["says"] in line for line in said), f"{wrong['says']!r} is not said: {said}"


def test_every_mistake_that_published_code_made_is_in_the_catalogue():
    assert {wrong["published"] for _, wrong in MISTAKES if "published" in wrong} == set(PUBLISHED)
