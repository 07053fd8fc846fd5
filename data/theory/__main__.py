"""`python -m data.theory`: what the theory of SPIN promises, measured on a table of six responses.

Reading order, as it is printed: 1 `show_theorem` → 2 `show_floor` → 3 `show_losses`,
`show_correlation` → 4 `show_other_games` → 5 `show_samples`, `play_blind_direction` and
`show_blind_direction` → the command line and `main`. The game itself is in table.py.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch

from data.theory.table import (DATA, FAR, WEAK, alpha_spin_limit, behaviour, contraction, descend,
                               expected_loss, fixed_point, frequencies, kl, next_alpha_spin,
                               next_policy, next_t_spin, predicted_factor, play,
                               t_spin_limit_near_uniform)
from spin_loss import loss_floor, optimal_next_policy

LAMBDAS = [0.4, 0.5, 0.75, 1.0, 2.0, 5.0]  # each kind of behaviour; 5.0 is the paper's last λ
LETTERS = list("ABCDEF")  # the names of the responses


def print_row(title, cells, note="", width=8):
    """Print one line of a table: cells are texts or numbers, right-aligned."""
    texts = [cell if isinstance(cell, str) else digits(cell) for cell in cells]
    line = "".join(f"{text:>{width}}" for text in texts)
    print(f"  {title}{line}  {note}".rstrip())


def digits(x) -> str:
    """Three digits, or one below 0.001. A number below 1e-12 is a rounding error: 0."""
    if abs(x) < 1e-12:
        return "0"
    return f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.0e}"


def show_policies():
    print("A policy is a table of six responses, in float64. Parts 1 to 4 sample nothing.")
    print_row("       ", LETTERS)
    print_row("p_data ", DATA.exp().tolist())
    print_row("p_0    ", WEAK.exp().tolist())
    print()


# --- 1. the theorem ------------------------------------------------------------------------------

def show_theorem(lams):
    """Self-play for each λ beside Theorem 5.4. Returns {λ: [p_0, p_1, …]}."""
    print("""\
1. Theorem 5.4, p_{t+1} ∝ p_t (p_data/p_t)^(1/λ). In the table: KL(p_data‖p_t), where each iteration
   is minimised numerically, and the factor by which the first one multiplies log(p_t/p_data). In
   theory every iteration multiplies it by 1 − 1/λ.""")
    print_row("λ   ", [f"t={t}" for t in range(9)])
    runs = {lam: play(DATA, WEAK, lam=lam) for lam in lams}
    largest_difference = 0.0
    for lam, policies in runs.items():
        kl_T = [kl(DATA, p_K) for p_K in policies]
        predicted_K = WEAK
        for measured_kl in kl_T[1:]:
            predicted_K = optimal_next_policy(DATA, predicted_K, lam)
            difference = abs(measured_kl - kl(DATA, predicted_K))
            largest_difference = max(largest_difference, difference)
        cells = [value for value in kl_T if value < FAR]
        cells += ["far"] * (9 - len(cells))
        print_row(f"{lam:<4g}", cells, behaviour(contraction(*policies[:2])))
    print(f"   Largest difference from the closed form, iterated on its own: "
          f"{largest_difference:.0e} nats.")
    print("""\
   See: λ = 1 arrives after one iteration, and a larger λ takes more of them. With λ < ½ each
   iteration enlarges log(p_t/p_data) and flips its sign. KL weighs the two signs differently, so
   that it may fall a little in one iteration, but over two it rises.
""")
    return runs


# --- 2. the floor of the loss --------------------------------------------------------------------

def show_floor(runs):
    """Lemma C.2 beside the minimum that was found: for each λ, then along one run."""
    floor = loss_floor(DATA, WEAK).item()
    print(f"2. The lowest loss against p_0 is log 2 − JSD = {floor:.10f} nats (Lemma C.2). "
          "Found:")
    for lam, policies in runs.items():
        found = expected_loss(policies[1], DATA, WEAK, lam).item()
        print_row(f"λ = {lam:<5g}", [f"{found:.10f}"], f"difference {abs(found - floor):.0e}", 13)
    lam = 2.0 if 2.0 in runs else max(runs, key=lambda lam: (len(runs[lam]), lam))
    floors = [f"{loss_floor(DATA, p_K):.4f}" for p_K in runs[lam]]
    print_row(f"floor at λ = {lam:g}, t=0…{len(floors) - 1}:", floors)
    print(f"   See: the floor does not depend on λ. As p_t nears p_data, it RISES to log 2 = "
          f"{math.log(2):.4f}.\n")


# --- 3. every loss -------------------------------------------------------------------------------

LOSSES_SHOWN = [("logistic", 1), ("logistic", 2), ("exponential", 0.5), ("exponential", 1),
                ("squared", 1), ("sppo", 1), ("ddo", 2), ("kliep", None), ("space", 0.1),
                ("space", 1), ("space", 10), ("hinge", 1), ("hinge", 5)]


def show_losses():
    """Each loss: its factor near p_data, self-play from p_0, and one iteration against p_data."""
    print("""\
3. Every loss. 'theory' and 'found' are the factor on log(p_t/p_data) close to p_data, from the one
   formula 1 + L_r/(L_rr + L_ss − L_r − L_s) and from minimising. 't=…' is KL(p_data‖p_t), played
   from p_0. 'stays' is KL after one iteration against p_t = p_data, by a player that starts at
   p_0. It is 0 if p_data is the only minimum.""")
    print_row(" " * 17, ["theory", "found", *(f"t={t}" for t in (0, 1, 2, 4, 7, 8)), "stays"])
    for loss, size in LOSSES_SHOWN:
        if size is None:
            title, settings = loss, {}
        elif loss == "space":
            title, settings = f"space μ={size:g}", {"mu": size}
        else:
            title, settings = f"{loss} λ={size:g}", {"lam": size}
        factors = ["–", "–"]  # the hinge has none
        if loss != "hinge":
            near_K = (DATA + 1e-4 * (WEAK - DATA)).log_softmax(0)
            found = contraction(near_K, next_policy(DATA, near_K, loss=loss, **settings))
            factors = [predicted_factor(loss, **settings), round(found, 4)]
        kl_T = [kl(DATA, p_K) for p_K in play(DATA, WEAK, loss=loss, **settings)]
        stays = kl(DATA, next_policy(DATA, DATA, start_K=WEAK, loss=loss, **settings))
        print_row(f"{title:17}", [*factors, *(kl_T[t] for t in (0, 1, 2, 4, 7, 8)), stays])
    print("""\
   See: p_data is a fixed point of every loss. The hinge only ties there: every policy whose
   log(p/p_data) spreads over at most 1/λ costs 1, as p_data does. Its steps are multiples of 1/λ,
   however near p_data is, so it ends in a cycle around p_data, narrower for a larger λ.""")


def show_correlation():
    """The loss without a minimum: where descent goes, and what stopping early makes of it."""
    def loss_against(opponent_K):
        return lambda logits_K: expected_loss(logits_K, DATA, opponent_K, loss="correlation")

    print("   The correlation loss has no minimum. Gradient descent against p_0 with λ = 1 and "
          "step size 1:")
    policy_K, steps_done = WEAK, 0
    for steps in (1, 10, 100, 1000):
        policy_K = descend(loss_against(WEAK), policy_K, steps - steps_done)
        steps_done = steps
        print_row(f"after {steps:4d}", [f"loss {loss_against(WEAK)(policy_K):.3f}",
                                        f"KL {kl(DATA, policy_K):.3g}",
                                        f"p(A) {policy_K[0].exp():.3f}"], width=17)
    policy_K, kl_T = WEAK, []
    for _ in range(8):
        policy_K = descend(loss_against(policy_K), policy_K, steps=1)
        kl_T.append(kl(DATA, policy_K))
    print_row("one step an iteration, t=1…8: KL", kl_T, width=7)
    print("""\
   See: all probability goes to A, where p_data − p_0 is largest, and the loss falls for ever. With
   one step an iteration it does converge: that step is λ (p_data − p_t), as in SFT.
""")


# --- 4. games that do not end at p_data ----------------------------------------------------------

def show_other_games():
    """α-SPIN and T-SPIN, played until the policy stands still, beside their formulas."""
    print("""\
4. Two games that do not end at p_data. Each is played from p_0 until p_t stands still. 'off' is the
   largest difference of log p_t from the formula under the table.""")
    print_row(" " * 20, [*LETTERS, "KL", "off"])
    print_row(f"{'p_data':20}", DATA.exp().tolist())
    for lam, alpha in ((1, 0.1), (1, 0.5), (2, 0.5)):
        end_K = fixed_point(lambda p_K: next_alpha_spin(DATA, p_K, WEAK, alpha, lam), WEAK)
        print_end(f"α-SPIN λ={lam:g} α={alpha:g}", end_K, alpha_spin_limit(DATA, WEAK, alpha, lam))
    for alpha, beta in ((2, 0), (2, 1), (1, 0.5), (1, 1), (0.5, 1), (0.5, 0.5)):
        end_K = fixed_point(lambda p_K: next_t_spin(DATA, p_K, WEAK, alpha, beta), WEAK)
        formula_K = t_spin_limit_near_uniform(DATA, WEAK, alpha, beta)
        print_end(f"T-SPIN α={alpha:g} β={beta:g}", end_K, formula_K)
    after_data_K = next_t_spin(DATA, DATA, first_K=DATA)
    print_row(f"{'T-SPIN one iteration':20}", after_data_K.exp().tolist(),
              "from p_t = p_0 = p_data")
    print("""\
   See: α-SPIN ends at ∝ p_0^(αλ/(1+αλ)) p_data^(1/(1+αλ)), between p_0 and p_data. T-SPIN ends near
   ∝ (p_data/p_0^β)^(1/(α(1+β)+1−β)), which is exact for β = 0 and a first-order formula otherwise;
   we know of no exact one. p_data is not a fixed point, since p_t is not in its log-ratios: where
   p_t = p_0 = p_data, no response is preferred to any other, and the next policy is uniform.
""")


def print_end(title, end_K, formula_K):
    if end_K is None:
        print_row(f"{title:20}", [], "never stands still: a cycle of two policies")
    else:
        off = (end_K - formula_K).abs().max().item()
        print_row(f"{title:20}", [*end_K.exp().tolist(), kl(DATA, end_K), f"{off:.0e}"])


# --- 5. finite samples ---------------------------------------------------------------------------

def show_samples(seed=0):
    """n real responses, sampled once; each iteration samples n responses of its opponent."""
    generator = torch.Generator().manual_seed(seed)
    print("""\
5. Finite samples. p̂ is the frequencies of n real responses. The opponent's responses y' are either
   summed over exactly, or sampled: n new ones at each iteration. After the first column the table
   shows KL(p̂‖p_t), for sampled y' as a mean over t beside its theory (K−1)/(2n(2λ−1)).""")
    print_row("n        λ", ["KL(p_data‖p̂)", "exact y', t=20", "sampled y', t=31…60", "theory"],
              width=21)
    for n in (200, 2000, 20000):
        real_K = frequencies(DATA, n, generator)
        for lam in (1, 2):
            exact_K = play(real_K, WEAK, iterations=20, lam=lam)[-1]
            policy_K, kl_T = WEAK, []
            for _ in range(60):
                generated_K = frequencies(policy_K, n, generator)
                policy_K = next_policy(real_K, policy_K, lam, generated_K=generated_K)
                kl_T.append(kl(real_K, policy_K))
            cells = [kl(DATA, real_K), kl(real_K, exact_K), sum(kl_T[30:]) / 30,
                     (len(DATA) - 1) / (2 * n * (2 * lam - 1))]
            print_row(f"{n:<6d}   {lam}", [f"{abs(x):.1e}" for x in cells], width=21)
    print("""\
   See: the fixed point is p̂, not p_data. With sampled y', p_t keeps moving around p̂: less with
   more samples, and less with a larger λ, which averages over the samples of more iterations.
""")


def play_blind_direction(seed=2):
    """20 responses a side, none of them F; three players, which start with different p(F).

    Returns real_K, generated_K and {loss: [(p(F) at the start, p(F) at the end, loss)]}.
    """
    generator = torch.Generator().manual_seed(seed)
    real_K = frequencies(DATA, 20, generator)
    generated_K = frequencies(WEAK, 20, generator)
    ends = {"logistic": [], "space": []}
    for start in (0.01, WEAK[5].exp().item(), 0.4):
        start_K = WEAK.clone()
        start_K[5] = math.log(start / (1 - start)) + WEAK[:5].logsumexp(0)
        for loss, found in ends.items():
            end_K = next_policy(real_K, WEAK, loss=loss, generated_K=generated_K, start_K=start_K)
            value = expected_loss(end_K, real_K, WEAK, loss=loss, generated_K=generated_K).item()
            found.append((start, end_K[5].exp().item(), value))
    return real_K, generated_K, ends


def show_blind_direction(real_K, generated_K, ends):
    print("   What SPIN cannot see: 20 responses a side, none of them F. The player starts with "
          "another p(F).")
    print_row("            ", LETTERS)
    for name, policy_K in (("p_0", WEAK), ("real y", real_K), ("sampled y'", generated_K)):
        print_row(f"{name:12}", policy_K.exp().tolist())
    for loss, found in ends.items():
        for start, end, value in found:
            print_row(f"{loss:8} p(F) {start:.2f} → {end:.4f}", [f"loss {value:.10f}"], width=20)
    print("""\
   See: SPIN's loss is the same for every p(F), and it never moves F's logit, so nothing brings p(F)
   back. SPACE holds it at 1 − Σ p_0 p̂_real/p̂_sampled, or at 0 if that is negative. Where only one
   side has a response, SPIN's minimum lies at infinity: that response's probability goes to 1 if
   the side is the real one, and to 0 if not.
""")


# --- the command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, without the usage."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}\n")


def lam_value(text) -> float:
    """A λ from the command line. Beyond these limits float64 cannot hold p_1, or see p_0 move."""
    try:
        lam = float(text)
    except ValueError:
        lam = math.nan
    if not 0.01 <= lam <= 100:
        raise argparse.ArgumentTypeError(f"{text}: must be a number from 0.01 to 100")
    return lam


def read_flags(argv):
    """Returns the λs to play and the path of the figure, in a folder that exists."""
    parser = Parser(
        prog="python -m data.theory", formatter_class=argparse.RawTextHelpFormatter,
        description="SPIN played exactly by a policy that is a table of six responses: no\n"
                    "network, no data. Prints what one iteration reaches, what repeating it\n"
                    "does, and where each loss ends. Draws it in theory.png.",
        epilog="try: python -m data.theory --lam 0.1        the paper's first λ: KL grows\n"
               "     python -m data.theory --lam 0.49 0.51  either side of the threshold")
    parser.add_argument("--lam", type=lam_value, nargs="+", default=LAMBDAS, metavar="λ",
                        help="up to six values of λ (default: 0.4 0.5 0.75 1 2 5)")
    parser.add_argument("--out", default="out", metavar="FOLDER",
                        help="where theory.png goes (default: out)")
    flags = parser.parse_args(argv)
    if len(flags.lam) > len(LAMBDAS):
        parser.error("--lam: at most six values, one colour each")
    path = Path(flags.out) / "theory.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()  # If it cannot be written, say so before the work.
    except OSError as error:
        parser.error(f"--out {flags.out}: {error.strerror}")
    return flags.lam, path


def main(argv=None):
    """Print the five parts, then draw them."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # a terminal without λ shows ?
    lams, path = read_flags(argv)
    began = time.time()
    torch.set_num_threads(1)  # Tables of six numbers are too small to share among threads.
    show_policies()
    runs = show_theorem(lams)
    show_floor(runs)
    show_losses()
    show_correlation()
    show_other_games()
    show_samples()
    blind_direction = play_blind_direction()
    show_blind_direction(*blind_direction)
    from data.theory.figure import draw_theory  # here, for --help need not wait for matplotlib
    draw_theory(path, runs, *blind_direction)
    print(f"{path} drawn; {time.time() - began:.1f} s in all")


if __name__ == "__main__":
    main()
