"""`python spin_loss.py`: what the theory promises, measured on a table of six answers.

Reading order: `contraction` → 1 `show_theorem` → 2 `show_floor` → `main`. The game itself is in
data/table.py; parts 3 (every loss) and 4 (finite samples) are in data/zoo.py.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch

from data.table import DATA, FAR, WEAK, expected_loss, kl, self_play
from data.zoo import row, show_blind_direction, show_correlation, show_samples, show_zoo
from spin_loss import loss_floor, optimal_next_policy

LAMBDAS = [0.4, 0.5, 0.75, 1.0, 2.0, 5.0]  # each kind of behaviour; 5.0 is the paper's last λ


def contraction(before_K, after_K, data_K=DATA) -> float:
    """c in log(p_{t+1}/p_data) = c · log(p_t/p_data) + const, fitted by least squares."""
    before_K, after_K = ((p - data_K) - (p - data_K).mean() for p in (before_K, after_K))
    return (before_K @ after_K / before_K.square().sum()).item()


def behaviour(c) -> str:
    """In words, what comes of multiplying log(p_t/p_data) by c at each iteration."""
    if abs(c) < 1e-9:
        return "× 0: one step"
    word = ("2-cycle" if abs(abs(c) - 1) < 1e-9 else "DIVERGES" if abs(c) > 1 else
            "oscillates" if c < 0 else "geometric")
    return f"× {'−' * (c < 0)}{abs(c):.3g}: {word}"


def show_theorem(lams):
    """Minimise, iterate, compare with the closed form. Returns {λ: [p_0, p_1, …]}."""
    print("1. Theorem 5.4, p_{t+1} ∝ p_t (p_data/p_t)^(1/λ): KL(p_data‖p_t), each iteration "
          "minimised, and the\n   factor by which one multiplies log(p_t/p_data), as measured "
          "(theory: 1 − 1/λ).")
    row("λ   ", [f"t={t}" for t in range(9)])
    runs, gap = {lam: self_play(DATA, WEAK, lam=lam) for lam in lams}, 0.0
    for lam, run in runs.items():
        predicted_K = WEAK
        for measured_K in run[1:]:
            predicted_K = optimal_next_policy(DATA, predicted_K, lam)
            gap = max(gap, abs(kl(DATA, measured_K) - kl(DATA, predicted_K)))
        kls = [kl(DATA, p) for p in run if kl(DATA, p) < FAR]
        row(f"{lam:<4g}", kls + ["far"] * (9 - len(kls)), behaviour(contraction(*run[:2])))
    print(f"   Largest difference from the closed form, iterated on its own: {gap:.0e} nats.\n"
          "   See: λ = 1 arrives at once, a larger λ takes longer, λ < ½ gets worse for ever (the "
          "log-ratios\n   at every t; KL, which weighs the two sides differently, at every other)."
          "\n")
    return runs


def show_floor(runs):
    """Lemma C.2 beside the minimum that was found, for each λ and then along one run."""
    floor = loss_floor(DATA, WEAK).item()
    print(f"2. The floor against p_0, log 2 − JSD = {floor:.10f} nats, and the minimum found:")
    for lam, run in runs.items():
        least = expected_loss(run[1], DATA, WEAK, lam).item()
        row(f"λ = {lam:<5g}", [f"{least:.10f}"], f"difference {abs(least - floor):.0e}", 13)
    lam, run = max(runs.items(), key=lambda item: (item[0] == 2, len(item[1]), item[0]))
    floors = [f"{loss_floor(DATA, p):.4f}" for p in run]
    row(f"floor at λ = {lam:g}, t = 0…{len(run) - 1}:", floors)
    print("   See: λ is not in it. As p_t nears p_data the best loss RISES to log 2 = "
          f"{math.log(2):.4f}.\n")


class Parser(argparse.ArgumentParser):
    """argparse, with one line on an error instead of the whole usage."""
    def error(self, message):
        sys.exit(print(f"spin_loss.py: {message}", file=sys.stderr) or 2)


def lam_value(text) -> float:
    try:
        lam = float(text)
    except ValueError:
        lam = math.nan
    if not 0.01 <= lam <= 100:  # beyond, float64 cannot hold p_1, or cannot see p_0 move
        raise argparse.ArgumentTypeError(f"{text}: must be a number from 0.01 to 100")
    return lam


def main(argv=None):
    """Print the four parts, then draw them."""
    parser = Parser(prog="python spin_loss.py", formatter_class=argparse.RawTextHelpFormatter,
                    description="SPIN played exactly by a policy that is a table of six answers: "
                    "no network, no data,\nno sampling noise. Prints what one iteration reaches, "
                    "what repeating it does, and where\neach loss ends; draws it in theory.png.",
                    epilog="try: python spin_loss.py --lam 0.1     the paper's first λ: watch KL "
                    "grow\n     python spin_loss.py --lam 0.49 0.51   either side of the threshold")
    parser.add_argument("--lam", type=lam_value, nargs="+", default=LAMBDAS, metavar="λ",
                        help="up to six values of λ to play (default: 0.4 0.5 0.75 1 2 5)")
    parser.add_argument("--out", default="out", metavar="FOLDER",
                        help="where theory.png goes (default: out)")
    args, began = parser.parse_args(argv), time.time()
    if len(args.lam) > 6:
        parser.error("--lam: at most six values, one colour each")
    path = Path(args.out) / "theory.png"
    torch.set_num_threads(1)  # six numbers: a second thread would only wait for the first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()  # before the work rather than after it
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    print("A policy that is a table of six answers. Float64; nothing is sampled before part 4.")
    row("       ", list("ABCDEF"))
    row("p_data ", DATA.exp().tolist())
    row("p_0    ", WEAK.exp().tolist())
    print()
    runs = show_theorem(args.lam)
    show_floor(runs)
    show_zoo()
    show_correlation()
    show_samples()
    blind = show_blind_direction()
    from data.theory_plot import draw_theory  # here, as matplotlib takes a second to load
    draw_theory(path, runs, blind)
    print(f"{path} drawn; {time.time() - began:.1f} s in all")
