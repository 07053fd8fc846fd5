"""SPIN without a network: a policy is a table with one logit for each of six responses.

    L(θ) = Σ_y Σ_y' p_data(y) p_t(y') loss(r, s),   r = log p_θ(y)/p_t(y),  s = log p_θ(y')/p_t(y')

The sum runs over every pair of responses, so nothing is sampled, and each iteration is minimised
as far as float64 allows. What is left is the theory. `python -m data.theory` prints it in five
parts and draws it in theory.png; THEORY.md, beside this file, explains the figure.

Reading order: the policies and `kl` → `ZOO`, the losses → `expected_loss`, `minimise`,
`next_policy`, `play`: Algorithm 1 on a table → `contraction` and `predicted_factor`: how fast it
converges → the five parts that are printed → the figure → the command line.

Dimensions: K responses, T iterations. A policy is the vector of its K log-probabilities, in nats.
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian, jacobian

from spin_loss import LOSSES, loss_floor, optimal_next_policy


# --- policies ------------------------------------------------------------------------------------

def log_table(*probabilities):
    """A policy from its probabilities: their logarithms, float64 [K]."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


# Six responses, called A to F. p_0 gives each of them some probability, but ranks them badly.
DATA = log_table(0.34, 0.24, 0.18, 0.12, 0.08, 0.04)  # p_data
WEAK = log_table(0.08, 0.12, 0.18, 0.26, 0.30, 0.06)  # p_0

# A sample for the blind direction: the frequencies of 20 real and of 20 generated responses. It
# happens to hold no F on either side.
REAL_SAMPLE = log_table(0.3, 0.2, 0.3, 0.05, 0.15, 0)
GENERATED_SAMPLE = log_table(0.1, 0.2, 0.15, 0.2, 0.35, 0)


def kl(p_K, q_K) -> float:
    """KL(p‖q) in nats, where p gives every response some probability."""
    return (p_K.exp() * (p_K - q_K)).sum().item()


# --- losses --------------------------------------------------------------------------------------

# The losses of spin_loss.py, and five that others have proposed. Each is a function of the two
# log-ratios: r of the real response, s of the generated one. kliep and space ignore λ.
ZOO = LOSSES | {
    # IPO, arXiv 2310.12036: its (r − s − 1/(2τ))² is this one divided by λ², at λ = 2τ.
    "squared": lambda r, s, lam: (lam * (r - s) - 1).square(),
    # SPPO, arXiv 2405.00675, where the real response always wins; its η is 1/λ.
    "sppo": lambda r, s, lam: (lam * r - 0.5).square() + (lam * s + 0.5).square(),
    # DDO, arXiv 2503.01103: a GAN's discriminator, made of the policy's own log-ratio.
    "ddo": lambda r, s, lam: F.softplus(-lam * r) + F.softplus(lam * s),
    # KLIEP (Sugiyama et al. 2008). Its mean is SFT's loss plus a constant: E_{p_t} e^s = Σ p_θ = 1.
    "kliep": lambda r, s, lam: s.exp() - r,
    # SPACE, arXiv 2512.07175, with μ = 4 generated responses to a real one; in LOSSES μ is 1.
    "space μ=4": lambda r, s, lam: F.softplus(math.log(4) - r) + 4 * F.softplus(s - math.log(4)),
}


def expected_loss(logits_K, data_K, opponent_K, lam=1.0, loss="logistic", generated_K=None):
    """The mean loss over all pairs y ~ p_data, y' ~ p_t. logits_K may have leading dimensions.

    opponent_K is the policy in the log-ratios. y' comes from it too, unless generated_K says
    otherwise: the frequencies in a sample, for example.
    """
    generated_K = opponent_K if generated_K is None else generated_K
    ratio_K = logits_K.log_softmax(-1) - opponent_K
    loss_KK = ZOO[loss](ratio_K[..., :, None], ratio_K[..., None, :], lam)
    weight_KK = (data_K[:, None] + generated_K[None, :]).exp()
    return (weight_KK * loss_KK).sum(dim=(-2, -1))


# --- Algorithm 1 on a table ----------------------------------------------------------------------

def minimise(loss_of, start_K):
    """Newton's method: the logits at a minimum of loss_of(logits), from start_K. [K]

    The step is −(Hessian)⁻¹ slope, taken along each of the Hessian's axes by itself. Along an axis
    without curvature the loss is flat, and the logits stay where they are; one such axis is a
    constant added to all logits. Where the loss curves down, dividing by |curvature| still goes
    downhill. A step that raises the loss is halved. log p is then right to about 1e-14, and to 1e-9
    where p_t has diverged almost FAR.
    """
    logits_K = start_K
    for _ in range(100):
        slope_K = jacobian(loss_of, logits_K)
        curvature_K, axes_KK = torch.linalg.eigh(hessian(loss_of, logits_K))
        size_K = curvature_K.abs()
        length_K = torch.where(size_K > 1e-13 * size_K.max(), axes_KK.T @ slope_K / size_K, 0.0)
        step_K = -axes_KK @ length_K
        while loss_of(logits_K + step_K) > loss_of(logits_K) + 1e-15:  # allow for rounding
            step_K = step_K / 2
        logits_K = logits_K + step_K
        if step_K.abs().max() < 1e-9:  # the error left is about the square of the last step
            break
    return logits_K


def next_policy(data_K, opponent_K, lam=1.0, loss="logistic", generated_K=None, start_K=None):
    """p_{t+1}: the policy with the least expected loss against p_t. [K]

    The player starts as its own opponent, or from start_K. Raises ValueError for two losses.
    """
    if loss in ("hinge", "correlation"):
        raise ValueError(f"Newton's method needs a curved loss; {loss} is made of straight lines")

    def loss_of(logits_K):
        return expected_loss(logits_K, data_K, opponent_K, lam, loss, generated_K)

    start_K = opponent_K if start_K is None else start_K
    return minimise(loss_of, start_K).log_softmax(0)


# A diverging p_t soon gives some response less than 1e-13, where the Hessian is only noise.
FAR = 10  # nats of KL(p_data‖p_t)


def play(data_K, first_K, lam=1.0, loss="logistic", iterations=8):
    """Algorithm 1 without sampling: [p_0, p_1, …]. It ends early at a p_t that is FAR away."""
    policies = [first_K]
    while len(policies) <= iterations and kl(data_K, policies[-1]) < FAR:
        policies.append(next_policy(data_K, policies[-1], lam, loss))
    return policies


# --- how fast self-play converges ----------------------------------------------------------------

def contraction(before_K, after_K) -> float:
    """The factor c in log(p_{t+1}/p_data) = c log(p_t/p_data) + const, by least squares.

    For the logistic loss c = 1 − 1/λ, whatever p_t is (Theorem 5.4).
    """
    before_K = (before_K - DATA) - (before_K - DATA).mean()
    after_K = (after_K - DATA) - (after_K - DATA).mean()
    return (before_K @ after_K / before_K.square().sum()).item()


def predicted_factor(loss, lam=1.0) -> float:
    """1 + L_r / (L_rr + L_ss − L_r − L_s), L's derivatives at r = s = 0: c close to p_data.

    Why: let e = log(p_t/p_data) and x = log(p_{t+1}/p_t) be small. Normalisation, E_{p_t} e^x = 1,
    makes E_{p_t} x = −½ E x². As p_data = p_t e^−e, E_{p_data} x = −½ E x² − E ex. To second order
    the expected loss is then a constant plus ½ (L_rr + L_ss − L_r − L_s) E x² − L_r E ex. Its
    minimum is at x = e L_r / (L_rr + L_ss − L_r − L_s), and log(p_{t+1}/p_data) is e + x.

    >>> predicted_factor("logistic", lam=2.0), predicted_factor("exponential", lam=2.0)
    (0.5, 0.75)
    """
    def loss_of(ratios):
        return ZOO[loss](ratios[0], ratios[1], lam)

    zero = torch.zeros(2, dtype=torch.float64)
    slope_r, slope_s = jacobian(loss_of, zero)
    curvature = hessian(loss_of, zero).trace()
    return (1 + slope_r / (curvature - slope_r - slope_s)).item()


def behaviour(factor) -> str:
    """What becomes of log(p_t/p_data) if each iteration multiplies it by this factor.

    >>> behaviour(-1.5), behaviour(0.01)
    ('× −1.5: diverges', '× 0.01: geometric')
    """
    size = abs(factor)
    if size < 1e-9:
        return "× 0: one step"
    if abs(size - 1) < 1e-9:
        word = "2-cycle"
    elif size > 1:
        word = "diverges"
    else:
        word = "oscillates" if factor < 0 else "geometric"
    return f"× {'−' if factor < 0 else ''}{size:.3g}: {word}"


# --- the five parts that are printed -------------------------------------------------------------

LAMBDAS = [0.4, 0.5, 0.75, 1.0, 2.0, 5.0]  # each kind of behaviour; 5.0 is the paper's last λ


def print_row(title, cells, note="", width=8):
    """Print one line of a table: cells are texts or numbers, right-aligned."""
    texts = [cell if isinstance(cell, str) else digits(cell) for cell in cells]
    print(f"  {title}{''.join(f'{text:>{width}}' for text in texts)}  {note}".rstrip())


def digits(x) -> str:
    """Three digits, or one below 0.001. A number below 1e-12 is a rounding error: 0."""
    if abs(x) < 1e-12:
        return "0"
    return f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.0e}"


def show_policies():
    print("A policy is a table of six responses, in float64.")
    print_row("      ", list("ABCDEF"))
    print_row("p_data", DATA.exp().tolist())
    print_row("p_0   ", WEAK.exp().tolist())


def show_theorem(runs):
    """Part 1: KL of each run beside Theorem 5.4. runs: {λ: [p_0, p_1, …]}."""
    print("""
1. Theorem 5.4: p_{t+1} ∝ p_t (p_data/p_t)^(1/λ). The table shows KL(p_data‖p_t) in nats, where each
   iteration is minimised numerically, and the factor by which the first one multiplies
   log(p_t/p_data). By the theorem every iteration multiplies it by 1 − 1/λ.""")
    print_row("λ   ", [f"t={t}" for t in range(9)])
    largest_difference = 0.0
    for lam, policies in runs.items():
        kl_T = [kl(DATA, p_K) for p_K in policies]
        cells = [value for value in kl_T if value < FAR]
        predicted_K = WEAK
        for measured_K in policies[1:len(cells)]:
            predicted_K = optimal_next_policy(DATA, predicted_K, lam)
            difference = (measured_K - predicted_K).abs().max().item()
            largest_difference = max(largest_difference, difference)
        print_row(f"{lam:<4g}", cells + ["far"] * (9 - len(cells)),
                  behaviour(contraction(*policies[:2])))
    print(f"""\
   Largest difference of log p_t from the theorem's, iterated on its own: {largest_difference:.0e}.
   See: λ = 1 arrives after one iteration, and a larger λ takes more of them. With λ < ½ each
   iteration enlarges log(p_t/p_data) and flips its sign. KL weighs the two signs differently, so
   it may fall in one iteration, but over two it rises. "far" is a KL above {FAR}.""")


def show_floor(runs):
    """Part 2: Lemma C.2 beside the minimum that was found, for each λ, then along one run."""
    floor = loss_floor(DATA, WEAK).item()
    print(f"""
2. Lemma C.2: whatever λ is, the least loss against p_0 is log 2 − JSD = {floor:.10f} nats. Found
   by minimising:""")
    for lam, policies in runs.items():
        found = expected_loss(policies[1], DATA, WEAK, lam).item()
        print_row(f"λ = {lam:<5g}", [f"{found:.10f}"], f"difference {abs(found - floor):.0e}", 13)
    lam = min(runs, key=lambda lam: abs(lam - 2))  # the one nearest to 2
    print_row(f"floor at λ = {lam:g}, t=0…{len(runs[lam]) - 1}:",
              [f"{loss_floor(DATA, p_K):.4f}" for p_K in runs[lam]])
    print(f"   See: the floor does not depend on λ. As p_t nears p_data, it rises to log 2 = "
          f"{math.log(2):.4f};\n   where p_t moves away, it falls.")


LOSSES_SHOWN = [("logistic", 1.0), ("logistic", 2.0), ("exponential", 0.5), ("exponential", 1.0),
                ("squared", 1.0), ("sppo", 1.0), ("ddo", 1.0), ("ddo", 2.0), ("kliep", 1.0),
                ("space", 1.0), ("space μ=4", 1.0)]


def show_losses():
    """Part 3: each loss's factor near p_data, and self-play with it from p_0."""
    print("""
3. Every loss. 'formula' and 'found' are the factor on log(p_t/p_data) close to p_data: from
   1 + L_r/(L_rr + L_ss − L_r − L_s), and from minimising. 't=…' is KL(p_data‖p_t), played from p_0.
   kliep and space have no λ.""")
    shown = (0, 1, 2, 4, 8)
    print_row("loss          λ  ", ["formula", "found", *(f"t={t}" for t in shown)])
    near_K = (DATA + 1e-4 * (WEAK - DATA)).log_softmax(0)
    for loss, lam in LOSSES_SHOWN:
        found = contraction(near_K, next_policy(DATA, near_K, lam, loss))
        policies = play(DATA, WEAK, lam, loss)
        print_row(f"{loss:12}  {lam:<3g}", [predicted_factor(loss, lam), round(found, 3),
                                            *(kl(DATA, policies[t]) for t in shown)])
    print("""\
   See: one formula predicts all of them. Where the factor is 0 they arrive in one iteration.""")


def frequencies(policy_K, n, generator):
    """Sample n responses from a policy; return the logarithm of each one's frequency. [K]"""
    response_N = torch.multinomial(policy_K.exp(), n, replacement=True, generator=generator)
    return (response_N.bincount(minlength=len(policy_K)).double() / n).log()


def show_samples():
    """Part 4: n real responses, sampled once; n of the opponent's, sampled at each iteration."""
    print("""
4. Finite samples: n real responses with frequencies p̂, and n new ones of p_t at each iteration,
   with frequencies q̂. Then p_{t+1} ∝ p_t (p̂/q̂)^(1/λ). KL(p̂‖p_t) is a mean over t = 31…60; its
   theory is (K−1)/(2n(2λ−1)), with K = 6 responses.""")
    print_row("n        λ", ["KL(p_data‖p̂)", "KL(p̂‖p_t)", "theory"], width=15)
    generator = torch.Generator().manual_seed(0)
    for n in (200, 2000, 20000):
        real_K = frequencies(DATA, n, generator)
        for lam in (1, 2, 5):
            policy_K, kl_T = WEAK, []
            for _ in range(60):
                generated_K = frequencies(policy_K, n, generator)
                policy_K = (policy_K + (real_K - generated_K) / lam).log_softmax(0)
                kl_T.append(kl(real_K, policy_K))
            cells = kl(DATA, real_K), sum(kl_T[30:]) / 30, 5 / (2 * n * (2 * lam - 1))
            print_row(f"{n:<6d}   {lam}", [f"{x:.1e}" for x in cells], width=15)
    print("""\
   See: p_t keeps moving around p̂, which is not p_data. It moves less with more samples, and less
   with a larger λ, which averages over the samples of more iterations.""")


def play_blind_direction():
    """One iteration on samples without F, by players that start with different p(F).

    Returns {loss: [(p(F) at the start, p(F) at the end, loss at the end), …]}.
    """
    ends = {"logistic": [], "space": []}
    for start in (0.01, 0.06, 0.4):
        start_K = torch.cat([WEAK[:5].log_softmax(0) + math.log(1 - start), log_table(start)])
        for loss, found in ends.items():
            end_K = next_policy(REAL_SAMPLE, WEAK, 1.0, loss, GENERATED_SAMPLE, start_K)
            value = expected_loss(end_K, REAL_SAMPLE, WEAK, 1.0, loss, GENERATED_SAMPLE).item()
            found.append((start, end_K[5].exp().item(), value))
    return ends


def show_blind_direction(ends):
    """Part 5: SPIN does not see p(F), SPACE does. `ends` as in `play_blind_direction`."""
    print("\n5. What SPIN cannot see: 20 responses on each side, none of them F. One iteration, by "
          "players\n   that start with another p(F):")
    print_row("           ", list("ABCDEF"))
    print_row("p_0        ", WEAK.exp().tolist())
    print_row("real y     ", REAL_SAMPLE.exp().tolist())
    print_row("sampled y' ", GENERATED_SAMPLE.exp().tolist())
    for loss, found in ends.items():
        for start, end, value in found:
            print(f"  {loss:8}  p(F) {start:.2f} → {end:.4f}   loss {value:.10f}")
    print("""\
   See: SPIN's loss is the same for every p(F), and gives F's logit no gradient. SPACE has one
   minimum, where p(F) is what p_0(y) p̂(y)/q̂(y), summed over A to E, leaves of 1.""")


# --- the figure ----------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers can tell apart: one for each λ.
RED, BLUE = "#D55E00", "#0072B2"
COLOURS = [RED, "#E69F00", "#CC79A7", "#009E73", BLUE, "#56B4E9"]


def draw_log_ratios(ax, lam, policies, colour):
    """(a) log(p_t/p_data) of three responses against t, for one λ."""
    log_ratio_TK = torch.stack(policies) - DATA
    log_ratio_TK = log_ratio_TK - log_ratio_TK.mean(dim=1, keepdim=True)
    ax.axhline(0, color="0.7", lw=1)
    for name, k, line in (("A", 0, "o-"), ("C", 2, "o:"), ("E", 4, "o--")):
        ax.plot(log_ratio_TK[:, k], line, ms=4, color=colour)
        ax.text(-0.7, log_ratio_TK[0, k], name, ha="right", va="center")
    ax.set(xlim=(-1.9, 8.4), ylim=(-3, 3), xticks=(0, 4, 8), xlabel="t")
    ax.set_title(f"λ = {lam:g}\n{behaviour(contraction(*policies[:2]))}", fontsize=13)


def draw_kl(ax, runs):
    """(b) KL(p_data‖p_t) against t, one line for each λ."""
    lowest = 1e-9  # a log axis has no place for 0: it is drawn on the lower edge
    for (lam, policies), colour in zip(runs.items(), COLOURS):
        kl_T = [max(kl(DATA, p_K), lowest) for p_K in policies]
        ax.plot(kl_T, "o-", color=colour, clip_on=False)
        ax.text(len(kl_T) - 0.6, kl_T[-1], f"λ = {lam:g}", color=colour, va="center")
    ax.set(yscale="log", ylim=(lowest, 1e3), xlim=(-0.3, 11.3), xticks=range(9), xlabel="t",
           ylabel="KL(p_data‖p$_t$), nats", title="(b) distance to p_data")


def draw_factor(ax, runs):
    """(c) |1 − 1/λ| against λ: the curve is the theorem, the points are measured."""
    lam_N = torch.logspace(-1.2, 1.2, 2001)
    ax.plot(lam_N, (1 - 1 / lam_N).abs(), color="black")
    ax.axhspan(1, 20, color=RED, alpha=0.12, lw=0)
    ax.plot((0.5, 0.5), (0.02, 1), ":", color="black")
    for (lam, policies), colour in zip(runs.items(), COLOURS):
        factor = abs(contraction(*policies[:2]))
        ax.plot(lam, max(factor, 0.02), "o", color=colour, ms=11, mec="black", clip_on=False)
    for lam, place in ((0.1, (0.14, 10)), (5.0, (2.1, 0.3))):
        ax.plot(lam, abs(1 - 1 / lam), "o", color="black", ms=17, mfc="none", mew=2)
        ax.text(*place, f"λ = {lam:g}, in the\npaper: × {abs(1 - 1 / lam):.3g}", va="center")
    ax.text(2.1, 2.5, "diverges", color=RED)
    ax.text(0.075, 0.25, "converges")
    ax.set(xscale="log", yscale="log", xlim=(0.065, 15), ylim=(0.02, 20), xlabel="λ",
           ylabel="|factor| on log(p$_t$/p_data)", title="(c) one iteration's factor, |1 − 1/λ|")
    ax.set_xticks((0.1, 0.5, 1, 5), ("0.1", "½", "1", "5"))


def draw_blind_direction(ax, ends):
    """(d) the loss against p(F), where no sample holds an F. `ends`: `play_blind_direction`.

    The other responses stand in the proportions p_0 p̂/q̂, the best ones for both losses.
    """
    others_K = (WEAK + REAL_SAMPLE - GENERATED_SAMPLE)[:5].log_softmax(0)
    share_N = torch.linspace(0.004, 0.6, 300, dtype=torch.float64)
    policy_NK = torch.cat([others_K + (1 - share_N[:, None]).log(), share_N[:, None].log()], dim=1)
    for loss, colour, marker in (("logistic", RED, "o"), ("space", BLUE, "s")):
        loss_N = expected_loss(policy_NK, REAL_SAMPLE, WEAK, 1.0, loss, GENERATED_SAMPLE)
        _, end_shares, end_losses = zip(*ends[loss])
        ax.plot(share_N, loss_N - min(end_losses), color=colour)
        ax.plot(end_shares, torch.tensor(end_losses) - min(end_losses), marker, color=colour,
                ms=11, mec="black")
    ax.text(0.17, 3e-4, "SPIN: flat; each player\n(●) ends near its start", color=RED)
    ax.text(0.24, 4e-3, "SPACE: one\nminimum, found\nfrom all starts\n(■)", color=BLUE)
    ax.set(xlim=(0, 0.45), ylim=(-4e-4, 8e-3), yticks=(0, 2e-3, 4e-3, 6e-3, 8e-3),
           xlabel="p(F); F is in no sample", ylabel="loss above its minimum, nats",
           title="(d) what SPIN cannot see")


def draw_theory(path, runs, ends):
    """Write the figure. runs: {λ: [p_0, p_1, …]}; ends: what `play_blind_direction` returns."""
    os.environ.pop("MPLBACKEND", None)  # it names a kind of window, and a file needs none
    import matplotlib.style  # here, so that --help and importers need not wait for it
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {"font.size": 13, "lines.linewidth": 2}]):
        figure = Figure(figsize=(13, 8.6), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
        top.suptitle("(a) log(p$_t$/p_data) of responses A, C and E, minus the mean over all six: "
                     "each iteration multiplies it by 1 − 1/λ", fontsize=14)
        small_axes = top.subplots(1, len(runs), squeeze=False, sharey=True)[0]
        small_axes[0].set_ylabel("nats")
        for ax, (lam, policies), colour in zip(small_axes, runs.items(), COLOURS):
            draw_log_ratios(ax, lam, policies, colour)
        kl_ax, factor_ax, blind_ax = bottom.subplots(1, 3)
        draw_kl(kl_ax, runs)
        draw_factor(factor_ax, runs)
        draw_blind_direction(blind_ax, ends)
        figure.savefig(path, dpi=100)


# --- the command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, without the usage."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None):
    """Print the five parts, then draw them."""
    parser = Parser(
        prog="python -m data.theory", formatter_class=argparse.RawTextHelpFormatter,
        description="SPIN played exactly by a policy that is a table of six responses, without a\n"
                    "network. Prints what one iteration reaches, what repeating it does, how fast\n"
                    "each loss converges, and what SPIN cannot see; draws it in theory.png.",
        epilog="try: python -m data.theory --lam 0.1        the paper's first λ: KL grows\n"
               "     python -m data.theory --lam 0.49 0.51  either side of the threshold")
    parser.add_argument("--lam", type=float, nargs="+", default=LAMBDAS, metavar="λ",
                        help="up to six values of λ (default: 0.4 0.5 0.75 1 2 5)")
    parser.add_argument("--out", default="out", metavar="FOLDER",
                        help="where theory.png goes (default: out)")
    flags = parser.parse_args(argv)
    if len(flags.lam) > 6 or not all(0.01 <= lam <= 100 for lam in flags.lam):
        parser.error("argument --lam: give up to six numbers from 0.01 to 100")
    began = time.monotonic()
    torch.set_num_threads(1)  # tables of six numbers are too small to share among threads
    runs = {lam: play(DATA, WEAK, lam) for lam in flags.lam}
    ends = play_blind_direction()
    show_policies()
    show_theorem(runs)
    show_floor(runs)
    show_losses()
    show_samples()
    show_blind_direction(ends)
    path = Path(flags.out) / "theory.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_theory(path, runs, ends)
    except OSError as error:
        parser.error(f"argument --out: {path}: {error.strerror}")
    print(f"\n{path} drawn; {time.monotonic() - began:.1f} s in all")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without λ shows ?
    main()
