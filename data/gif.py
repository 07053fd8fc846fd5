"""The bars of panel (d), moving over the training steps: out/convergence.gif."""
from pathlib import Path

from matplotlib.animation import FuncAnimation, PillowWriter

from data.checkpoint import replacing
from data.plot import BLUE, draw_bars, plt, read


def draw_gif(out):
    """Write out/convergence.gif, a frame for each evaluation in metrics.jsonl."""
    world, pick = read(out)
    rows = pick("step", "train")
    figure, axes = plt.subplots(1, len(world["shown"]), figsize=(15, 4.2), sharey=True,
                                squeeze=False)
    for i, (ax, shown) in enumerate(zip(axes[0], world["shown"])):
        draw_bars(ax, shown, [("p_θ", BLUE, rows[0]["shown"][i])])
    figure.tight_layout(rect=(0, 0, 1, 0.93))

    def frame(k):
        row = rows[k]
        for ax, p in zip(axes[0], row["shown"]):
            for bar, height in zip(ax.containers[1], [*p, max(0.0, 1 - sum(p))]):
                bar.set_height(height)
        stage = f"iteration {row['iteration']}" if row["iteration"] else "SFT"
        figure.suptitle(f"{stage}, step {row['step']}: KL(p_data‖p_θ) = {row['kl']:.3f} nats "
                        f"(black: p_data, blue: p_θ)")

    frames = [*range(len(rows)), *[len(rows) - 1] * 5]  # the last one stays a while
    with replacing(Path(out) / "convergence.gif") as part:
        FuncAnimation(figure, frame, frames).save(part, PillowWriter(fps=4), dpi=60)
    plt.close(figure)
