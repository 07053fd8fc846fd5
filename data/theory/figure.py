"""theory.png: self-play on a table in four panels.

Reading order: (a) `draw_log_ratios`, one small panel for each λ → (b) `draw_kl` → (c) `draw_factor`
→ (d) `draw_blind_direction` → `draw_theory`, which puts them together.
"""
import numpy as np
import torch
from matplotlib.figure import Figure

from data.theory.table import (DATA, WEAK, behaviour, contraction, expected_loss, kl,
                               predicted_factor, play)

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"

COLOURS = [RED, ORANGE, PINK, GREEN, BLUE, SKY]  # one for each λ, with a marker each for grey print
MARKERS = ["v", "^", "D", "o", "s", "*"]
RESPONSES = {"A": 0, "C": 2, "E": 4}  # those of panel (a): in p_0 too rare, right, too frequent
RESPONSE_LINES = {"A": "-", "C": ":", "E": "--"}
# Chen et al. play λ = 0.1 first, and 5.0 in the last iteration. The pairs are the positions of the
# two labels in panel (c).
PAPER_LAMBDAS = {0.1: (0.135, 11), 5.0: (2.4, 0.27)}


def draw_log_ratios(ax, lam, policies, colour):
    """(a) log(p_t/p_data) of three responses against t, for one λ."""
    highest = 3
    log_ratio_TK = torch.stack(policies) - DATA
    log_ratio_TK = log_ratio_TK - log_ratio_TK.mean(dim=1, keepdim=True)
    outside_T = (log_ratio_TK.abs() > highest).any(dim=1)
    if outside_T.any():  # the lines end where the first of them leaves the panel
        log_ratio_TK = log_ratio_TK[:outside_T.nonzero()[0].item() + 1]
    ax.axhline(0, color="0.7", lw=1)
    for name, k in RESPONSES.items():
        ax.plot(log_ratio_TK[:, k], RESPONSE_LINES[name], marker="o", ms=4, color=colour, lw=1.8)
        ax.annotate(name, (0, log_ratio_TK[0, k]), xytext=(-7, 0), textcoords="offset points",
                    ha="right", va="center", fontsize=13)
    ax.set_title(f"λ = {lam:g}\n{behaviour(contraction(*policies[:2]))}", fontsize=13)
    ax.set(xlim=(-1.8, 8.4), ylim=(-highest, highest), xticks=(0, 4, 8), xlabel="t")


def draw_kl(ax, runs):
    """(b) KL(p_data‖p_t) against t, one line for each λ."""
    smallest = 1e-9
    for (lam, policies), colour, marker in zip(runs.items(), COLOURS, MARKERS):
        kl_T = [max(kl(DATA, p_K), 1e-14) for p_K in policies]  # a log axis has no place for 0
        ax.plot(kl_T, marker + "-", color=colour)
        last_t = len(kl_T) - 1
        place = (last_t + 0.3, min(kl_T[-1], 150)) if kl_T[-1] > smallest else (0.8, 3 * smallest)
        ax.text(*place, f"λ = {lam:g}", color=colour, fontsize=13, va="center")
    hinge_T = [kl(DATA, p_K) for p_K in play(DATA, WEAK, loss="hinge")]
    ax.plot(hinge_T, "k--", lw=1)
    ax.text(8.3, 1.3 * max(hinge_T[-2:]), "hinge, λ=1", fontsize=12, va="center")
    ax.set(yscale="log", ylim=(smallest, 3e2), xlim=(-0.2, 11.8), xticks=range(9), xlabel="t",
           ylabel="KL(p_data‖p$_t$), nats", title="(b) distance to p_data")


def draw_factor(ax, runs):
    """(c) the factor on log(p_t/p_data) against λ: curves from theory, points as measured."""
    lowest, highest = 0.022, 20
    lams = np.geomspace(0.08, 20, 2001)
    ax.axhspan(1, highest, color=RED, alpha=0.12, lw=0)
    ax.plot(lams, abs(1 - 1 / lams), color=BLACK)
    ax.plot(lams, abs(1 - 0.5 / lams), color="0.5", ls="--")
    ax.text(1.3, 0.06, "logistic loss:\n|1 − 1/λ|", fontsize=12, va="center")
    ax.text(0.44, 0.06, "exponential:\n|1 − 1/2λ|", fontsize=12, color="0.4", va="center",
            ha="right")
    for (lam, policies), colour, marker in zip(runs.items(), COLOURS, MARKERS):
        factor = max(abs(contraction(*policies[:2])), lowest)  # 0 is drawn on the lower edge
        ax.plot(lam, factor, marker, color=colour, ms=10, mec=BLACK, zorder=3,
                clip_on=factor > lowest)
    for lam, place in PAPER_LAMBDAS.items():
        factor = abs(predicted_factor("logistic", lam))
        ax.plot(lam, factor, "o", color=BLACK, ms=16, mfc="none", mew=2)
        ax.text(*place, f"paper's λ = {lam:g}:\n{factor:.3g}", fontsize=13, va="center")
    for lam, name in ((0.5, "½"), (1, "1")):
        ax.axvline(lam, color=BLACK, ls=":", lw=1)
        ax.text(lam * 1.05, 1.1 * highest, name, fontsize=13, ha="center")
    ax.text(3, 2.2, "diverges", color=RED, fontsize=13)
    ax.text(0.09, 0.17, "converges", fontsize=13)
    ax.set(xscale="log", yscale="log", xlim=(0.08, 20), ylim=(lowest, highest), xlabel="λ",
           ylabel="|factor| on log(p$_t$/p_data)", title="(c) one iteration's factor\n")


def draw_blind_direction(ax, real_K, generated_K, ends):
    """(d) the loss against p(F), where no sample holds an F.

    The other responses stand in their best proportions, which are the same for both losses at
    λ = 1. `ends` says where minimisation ended: {loss: [(p(F) at the start, at the end, loss)]}.
    """
    best_K = WEAK[:5] + real_K[:5] - generated_K[:5]
    share_N = torch.linspace(0.004, 0.6, 300, dtype=torch.float64)
    policy_NK = torch.cat([best_K.log_softmax(0) + (1 - share_N[:, None]).log(),
                           share_N[:, None].log()], dim=1)
    for loss, colour, marker in (("logistic", RED, "o"), ("space", BLUE, "s")):
        loss_N = expected_loss(policy_NK, real_K, WEAK, loss=loss, generated_K=generated_K)
        end_shares = [share for _, share, _ in ends[loss]]
        end_losses = [value for _, _, value in ends[loss]]
        smallest = min(loss_N.min().item(), *end_losses)
        ax.plot(share_N, loss_N - smallest, color=colour, lw=2)
        ax.plot(end_shares, [value - smallest for value in end_losses], marker, color=colour,
                ms=10, mec=BLACK, zorder=3)
    ax.text(0.15, 2e-4, "SPIN: flat, so it ends (●)\nclose to where it began", color=RED,
            fontsize=13)
    ax.text(0.24, 4e-3, "SPACE: one\nminimum, found\nfrom all starts\n(■)", color=BLUE,
            fontsize=13)
    ax.set(xlabel="p(F); F is in no sample", ylabel="loss above its minimum, nats",
           title="(d) what SPIN cannot see", xlim=(0, 0.45), ylim=(-4e-4, 8e-3))
    ax.yaxis.get_major_locator().set_params(nbins=5)


def draw_theory(path, runs, real_K, generated_K, ends):
    """Write the figure. runs: {λ: [p_0, p_1, …]}; the rest as in `draw_blind_direction`."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    top.suptitle("(a) log(p$_t$/p_data) of responses A, C and E, minus the mean over all six: "
                 "each iteration multiplies it by 1 − 1/λ", fontsize=14)
    small_axes = top.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    small_axes[0].set_ylabel("log(p$_t$/p_data), nats", fontsize=12)
    for ax, (lam, policies), colour in zip(small_axes, runs.items(), COLOURS):
        draw_log_ratios(ax, lam, policies, colour)
    kl_ax, factor_ax, blind_ax = bottom.subplots(1, 3)
    draw_kl(kl_ax, runs)
    draw_factor(factor_ax, runs)
    draw_blind_direction(blind_ax, real_K, generated_K, ends)
    for ax in (kl_ax, factor_ax, blind_ax):
        ax.title.set_fontsize(14)
        ax.xaxis.label.set_fontsize(13)
        ax.yaxis.label.set_fontsize(13)
    figure.savefig(path, dpi=100)
