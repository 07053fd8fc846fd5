"""The page of the paper's claims: its script runs, repeats nothing, and counts seeds rightly."""
import argparse

from study import claims, study


def test_claims_run_once_and_write_their_page(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MISTAKES", study.MISTAKES)  # main adds to it; put it back
    run = {"SPIN": {}, "five": ({"lam": 0.1}, "lam_5_at_last")}
    monkeypatch.setattr(claims, "CLAIMS", [
        claims.Claim("A claim", run, [[("SPIN", 0), ("five", 9)], [("SPIN", 0)] * 2], "Thus.")])
    args = argparse.Namespace(quick=True, out=str(tmp_path), workers=2)
    claims.main(args)
    page = (tmp_path / "CLAIMS.md").read_text(encoding="utf-8")
    kls = [[row["kl"] for row in claims.rows_of(args, run[name], 0)] for name in run]
    agrees = kls[0][0] > kls[1][-1]
    assert (f"SPIN, p_0 → five, end ({int(agrees)} of 1 seeds); along SPIN, p_0 → SPIN, p_0 "
            f"(0 of 1 seeds). Thus.") in " ".join(page.split())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    claims.main(args)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}


def test_lam_5_at_last_changes_the_last_iteration_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(claims.train, "fit", lambda player, objective, responses, stage, run:
                        seen.append((stage, run.config.lam)))
    config = claims.train.Config(iters=2, lam=0.1)
    claims.lam_5_at_last(config)
    run = argparse.Namespace(config=config)
    for t in range(3):
        claims.train.fit(None, None, None, t, run)
    assert seen == [(0, 0.1), (1, 0.1), (2, 5.0)]
