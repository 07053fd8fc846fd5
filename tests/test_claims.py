"""Every claim of classroom/claims_*.py holds of the original: a test for each, of the same name.

They state what the functions of the product do. The other test files keep what no claim says: how
the functions work together.
"""
import pytest

from classroom import checks, claims_loss, claims_model, claims_training  # noqa: F401 (register)
from classroom.workspace import TEXTS


def trying(claim):
    def test(seed, monkeypatch):
        monkeypatch.setattr(checks, "SEED", [seed])
        claim(checks.load(claim.file))
    test.__doc__ = claim.__doc__
    return pytest.mark.parametrize("seed", ["0", "another"])(test)


for each in [claim for claims in checks.CLAIMS.values() for claim in claims]:
    assert f"test_{each.__name__}" not in globals(), f"two claims are called {each.__name__}"
    globals()[f"test_{each.__name__}"] = trying(each)


def test_every_exercise_has_claims():
    for text in TEXTS:
        assert 2 <= len(checks.CLAIMS[text["file"], text["function"]]) <= 5, text["function"]
