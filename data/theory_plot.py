"""out/theory.png: the theory of self-play in one picture.

Reading order: (a) `draw_walk`, one triangle for each λ → (b) `draw_kl` → (c) `draw_phases` →
(d) `draw_blind` → `draw_theory`. Colours are Okabe and Ito's, as in data/plot.py.
"""
import matplotlib
matplotlib.use("Agg")  # files only: no screen is needed
import matplotlib.pyplot as plt
import numpy as np
import torch

from data.plot import BLACK, BLUE, GREEN, ORANGE, RED, SKY
from data.table import DATA, WEAK, expected_loss, kl, log_table, self_play
from data.theory import behaviour, contraction

PINK = "#CC79A7"  # the seventh of Okabe and Ito's colours
COLOURS, MARKS = [RED, ORANGE, PINK, GREEN, BLUE, SKY], "v^Dos*"
DATA3, WEAK3 = log_table(0.5, 0.3, 0.2), log_table(0.2, 0.2, 0.6)  # three answers fit a triangle
PAPER = {0.1: (0.135, 9), 5.0: (2.7, 0.27)}  # λ in Chen et al., and where its note stands


def corner(p_K) -> tuple[float, float]:
    """Where a policy over three answers stands in an upright triangle of side 1."""
    _, right, top = p_K.exp().tolist()
    return right + top / 2, top * 3 ** 0.5 / 2


def draw_walk(ax, lam, colour):
    """(a) p_0 → p_1 → …; on the grey curve, log(p/p_data) is a multiple of what it was at p_0."""
    ax.plot([0, 1, 0.5, 0], [0, 0, 3 ** 0.5 / 2, 0], color=BLACK, lw=1)
    line = [corner((DATA3 + c * (WEAK3 - DATA3)).log_softmax(0)) for c in np.linspace(-9, 9, 400)]
    ax.plot(*zip(*line), color="0.75", lw=1.5)
    run = self_play(DATA3, WEAK3, lam=lam)
    points = [corner(p_K) for p_K in run]
    for start, end in zip(points, points[1:]):
        if np.hypot(end[0] - start[0], end[1] - start[1]) > 0.03:  # else all head
            ax.annotate("", end, start, arrowprops=dict(
                arrowstyle="-|>", color=colour, lw=1.6, shrinkA=0, shrinkB=2, mutation_scale=11,
                connectionstyle="arc3,rad=0.45"))  # bent, so that there and back stay apart
    ax.plot(*points[0], "s", color=BLACK, ms=8)
    ax.plot(*corner(DATA3), "*", color=BLACK, ms=14)
    ax.plot(*zip(*points[1:]), "o", color=colour, ms=5, mec="white", mew=0.5)
    ax.set_title(f"λ = {lam:g}\n{behaviour(contraction(*run[:2], DATA3))}", fontsize=12)
    ax.set(aspect="equal", xlim=(-0.1, 1.1), ylim=(-0.1, 0.97))
    for name, x, y in (("A", -0.06, -0.08), ("B", 1.06, -0.08), ("C", 0.58, 0.86)):
        ax.text(x, y, name, ha="center", fontsize=11)
    ax.axis("off")


def draw_kl(ax, runs):
    """(b) distance to p_data, each iteration minimised exactly."""
    for (lam, run), colour, mark in zip(runs.items(), COLOURS, MARKS):
        kls = [max(kl(DATA, p_K), 1e-14) for p_K in run]  # 0 has no place on a log axis
        ax.plot(range(len(kls)), kls, mark + "-", color=colour)
        place = (0.8, 3e-9) if kls[-1] < 1e-9 else (len(kls) - 0.75, min(kls[-1], 150))
        ax.text(*place, f"λ = {lam:g}", color=colour, fontsize=11, va="center")
    kls = [kl(DATA, p_K) for p_K in self_play(DATA, WEAK, loss="hinge")]
    ax.plot(range(len(kls)), kls, "k--", lw=1)
    ax.text(8.25, 1.2 * max(kls[-2:]), "hinge λ = 1", fontsize=10, va="center")
    ax.set(yscale="log", ylim=(1e-9, 3e2), xlabel="iteration t", ylabel="KL(p_data‖p$_t$), nats",
           title="(b) distance to p_data, six answers", xlim=(-0.2, 11.2), xticks=range(9))


def draw_phases(ax, runs):
    """(c) the factor on log(p_t/p_data), theory and measurement, against λ."""
    lam = np.geomspace(0.08, 20, 2001)
    ax.axhspan(1, 20, color=RED, alpha=0.12, lw=0)
    ax.plot(lam, abs(1 - 1 / lam), color=BLACK, label="|1 − 1/λ|, logistic")
    ax.plot(lam, abs(1 - 0.5 / lam), color="0.6", ls="--", label="|1 − 1/2λ|, exponential")
    for (lam, run), colour, mark in zip(runs.items(), COLOURS, MARKS):
        factor = max(abs(contraction(*run[:2])), 0.022)  # λ = 1: 0, drawn on the lower edge
        ax.plot(lam, factor, mark, color=colour, ms=9, mec=BLACK, zorder=3, clip_on=lam != 1)
    for lam, place in PAPER.items():
        ax.plot(lam, abs(1 - 1 / lam), "o", color=BLACK, ms=15, mfc="none", mew=2)
        ax.text(*place, f"paper's λ = {lam:g}:\n{behaviour(1 - 1 / lam)}", fontsize=10,
                va="center")
    for threshold, name in ((0.5, "½"), (1, "1")):
        ax.axvline(threshold, color=BLACK, ls=":", lw=1)
        ax.text(threshold * 1.05, 22, name, fontsize=12, ha="center")
    ax.text(3, 2.2, "diverges", color=RED, fontsize=12)
    ax.text(0.1, 0.3, "converges", fontsize=12)
    ax.set(xscale="log", yscale="log", ylim=(0.022, 20), xlim=(0.08, 20), xlabel="λ",
           ylabel="factor on log(p$_t$/p_data) an iteration",
           title="(c) λ decides (points: measured)\n")
    ax.legend(fontsize=10, loc="lower right")


def draw_blind(ax, real_K, generated_K, ends):
    """(d) the loss against p(F), the drawn answers in their best proportions; F was not drawn."""
    best_K = WEAK[:5] + real_K[:5] - generated_K[:5]  # for both losses, at λ = 1
    share = torch.linspace(0.004, 0.6, 300, dtype=torch.float64)
    policy_XK = torch.cat([best_K.log_softmax(0) + (1 - share[:, None]).log(),
                           share[:, None].log()], dim=1)
    for loss, colour, mark in (("logistic", RED, "o"), ("space", BLUE, "s")):
        loss_X = torch.stack([expected_loss(p_K, real_K, WEAK, 1.0, loss, generated_K=generated_K)
                              for p_K in policy_XK])
        least = min(loss_X.min().item(), min(value for _, _, value in ends[loss]))
        ax.plot(share, loss_X - least, color=colour, lw=2)
        ax.plot([p for _, p, _ in ends[loss]], [v - least for _, _, v in ends[loss]], mark,
                color=colour, ms=9, mec=BLACK, zorder=3)
    ax.text(0.17, 2e-4, "SPIN: flat, so it ends (●)\nabout where it began", color=RED, fontsize=12)
    ax.text(0.245, 4e-3, "SPACE: one\nminimum, found\nfrom all starts (■)", color=BLUE,
            fontsize=12)
    ax.set(xlabel="p(F), an answer that neither side has drawn",
           ylabel="loss above its least, nats", title="(d) what SPIN cannot see", xlim=(0, 0.45),
           ylim=(-4e-4, 8e-3))
    ax.yaxis.get_major_locator().set_params(nbins=5)


def draw_theory(path, runs, blind):
    """runs: {λ: [p_0, p_1, …]} on six answers; blind: what `show_blind_direction` returned."""
    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    top.suptitle("(a) three answers: every λ walks the same curve through p$_0$ (■) and p_data "
                 "(★), in steps of its own", fontsize=13)
    for ax, lam, colour in zip(top.subplots(1, len(runs), squeeze=False)[0], runs, COLOURS):
        draw_walk(ax, lam, colour)
    axes = bottom.subplots(1, 3)
    draw_kl(axes[0], runs)
    draw_phases(axes[1], runs)
    draw_blind(axes[2], *blind)
    figure.savefig(path, dpi=100)
    plt.close(figure)
