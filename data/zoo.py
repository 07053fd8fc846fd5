"""Parts 3 and 4 of `python spin_loss.py`: every loss and its fixed point, then finite samples.

Reading order: `row` → `show_zoo` → `show_correlation` → `show_samples` → `show_blind_direction`.
"""
import torch

from data.table import (DATA, WEAK, descend, expected_loss, frequencies, kl, next_policy,
                        self_play)


def row(title, cells, note="", width=8):
    """One line of a table. A number below 1e-12 is a rounding error, and shown as 0."""
    short = lambda x: "0" if abs(x) < 1e-12 else f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.0e}"
    cells = [c if isinstance(c, str) else short(c) for c in cells]
    print(f"  {title}" + "".join(f"{c:>{width}}" for c in cells) + f"  {note}".rstrip())


def show_zoo():
    """Each loss minimised against p_0, then iterated, then against p_data itself."""
    print("3. Every loss: KL(p_data‖p_t), each iteration minimised. 'stays': the KL after one "
          "iteration\n   against p_t = p_data by a player that starts from p_0; 0 if p_data is "
          "the only optimum.")
    row(" " * 17, ["t=0", "1", "2", "4", "7", "8", "stays"], "one exact iteration")
    zoo = [("logistic", 1, "p_t(p_data/p_t)^(1/λ)"), ("logistic", 2, ""),
           ("exponential", 0.5, "p_t(p_data/p_t)^(1/2λ)"), ("exponential", 1, ""),
           ("space", 0.1, "p_data, whatever μ"), ("space", 1, ""), ("space", 10, ""),
           ("hinge", 1, "log p hops by 1/λ, 2/λ…"), ("hinge", 5, "")]
    for loss, size, note in zoo:
        how = dict(loss=loss, **{"mu" if loss == "space" else "lam": size})
        kls = [kl(DATA, p) for p in self_play(DATA, WEAK, **how)]
        stays = kl(DATA, next_policy(DATA, DATA, start_K=WEAK, **how))
        title = f"{loss} {'μ' if loss == 'space' else 'λ'}={size:g}"
        row(f"{title:17}", [*(kls[t] for t in (0, 1, 2, 4, 7, 8)), stays], note)
    print("   See: p_data is a fixed point of all. Under hinge it is a tie (every policy whose "
          "log(p/p_data)\n   spreads over at most 1/λ costs 1, as p_data does) and no step is "
          "smaller than 1/λ, however near\n   p_data is: self-play ends in a cycle around it, "
          "narrower for a larger λ.")


def show_correlation():
    """No minimum: where descent goes, and what stopping after one step makes of it."""
    print("   correlation has no minimum. Gradient descent against p_0, λ = 1, steps of 1 on the "
          "logits:")
    policy_K, done = WEAK, 0
    for steps in (1, 10, 100, 1000):
        policy_K = descend(loss_against(WEAK), policy_K, steps - done)
        done = steps
        row(f"after {steps:4d}", [f"loss {loss_against(WEAK)(policy_K):.3f}",
                                  f"KL {kl(DATA, policy_K):.3g}",
                                  f"p(A) {policy_K[0].exp():.3f}"], width=17)
    policy_K, kls = WEAK, []
    for _ in range(8):
        policy_K = descend(loss_against(policy_K), policy_K, steps=1)
        kls.append(kl(DATA, policy_K))
    row("opponent renewed after each step: KL", kls, width=7)
    print("   See: all mass ends on A, where p_data − p_0 is largest; the loss falls without end. "
          "Stopped\n   after one step an iteration it does converge: that step is λ (p_data − "
          "p_t), as for SFT.\n")


def loss_against(opponent_K):
    return lambda logits_K: expected_loss(logits_K, DATA, opponent_K, 1.0, "correlation")


def show_samples(seed=0):
    """n real answers, drawn once; then the theory with p_data replaced by their frequencies."""
    generator = torch.Generator().manual_seed(seed)
    print("4. Finite samples: p̂ holds n real answers, and each iteration draws n of p_t afresh; "
          "KL(p̂‖p_t):")
    row("n        λ", ["KL(p_data‖p̂)", "t=20, expected y'", "t=31…60, drawn y'",
                       "(K−1)/2n(2λ−1)"], width=19)
    for n in (200, 2000, 20000):
        real_K = frequencies(DATA, n, generator)
        for lam in (1, 2):
            expected_K = self_play(real_K, WEAK, iterations=20, lam=lam)[-1]
            policy_K, kls = WEAK, []
            for _ in range(60):
                policy_K = next_policy(real_K, policy_K, lam,
                                       generated_K=frequencies(policy_K, n, generator))
                kls.append(kl(real_K, policy_K))
            shown = [kl(DATA, real_K), kl(real_K, expected_K), sum(kls[30:]) / 30,
                     (len(DATA) - 1) / (2 * n * (2 * lam - 1))]
            row(f"{n:<6d}   {lam}", [f"{abs(x):.1e}" for x in shown], width=19)
    print("   See: the fixed point is p̂, not p_data. Drawn y' keep p_t trembling around it: "
          "less with more\n   draws, and less with a larger λ, which averages over the draws of "
          "more iterations.\n")


def show_blind_direction(seed=2):
    """20 draws a side, none of them F; three players that have leaked to F, or away from it.

    Returns (real_K, generated_K, {loss: [(p(F) at the start, p(F) at the end, loss)]}).
    """
    generator = torch.Generator().manual_seed(seed)
    real_K, generated_K = (frequencies(p_K, 20, generator) for p_K in (DATA, WEAK))
    print("   Blind direction: 20 draws a side. Neither has an F; the player starts with p(F) "
          "moved.")
    row("       ", list("ABCDEF"))
    for name, p_K in (("p_0", WEAK), ("real", real_K), ("drawn y'", generated_K)):
        row(f"{name:8}", p_K.exp().tolist())
    ends = {"logistic": [], "space": []}
    for start in (0.01, WEAK[5].exp().item(), 0.4):
        start_K = WEAK.clone()
        start_K[5] = torch.tensor(start / (1 - start)).log() + WEAK[:5].logsumexp(0)
        for loss, found in ends.items():
            end_K = next_policy(real_K, WEAK, loss=loss, generated_K=generated_K, start_K=start_K)
            value = expected_loss(end_K, real_K, WEAK, 1.0, loss, generated_K=generated_K).item()
            found.append((start, end_K[5].exp().item(), value))
    for loss, found in ends.items():
        for start, end, value in found:
            row(f"{loss:8} p(F) {start:.2f} → {end:.4f}", [f"loss {value:.10f}"], width=20)
    print("   See: SPIN never moves F's logit and costs the same at every p(F), so nothing brings "
          "F back.\n   SPACE pins it at 1 − Σ p_0 p̂_real/p̂_drawn, what the drawn answers "
          "leave over (0 if nothing).\n   Had one side alone drawn an answer, SPIN's optimum would "
          "lie at infinity: probability 1 if\n   that side is the real one, 0 if not.\n")
    return real_K, generated_K, ends
