"""The bars of panel (d), moving over the training steps: out/convergence.gif."""
from pathlib import Path

import numpy as np
from matplotlib.animation import PillowWriter

from data.checkpoint import replacing
from data.plot import BLUE, draw_bars, plt, read


def draw_gif(out):
    """Write out/convergence.gif, a frame for each evaluation in metrics.jsonl."""
    world, pick = read(out)
    rows = pick("step", "train")
    figure, axes = plt.subplots(1, len(world["shown"]), figsize=(15, 4.2), dpi=60, sharey=True,
                                squeeze=False)
    for i, (ax, shown) in enumerate(zip(axes[0], world["shown"])):
        draw_bars(ax, shown, [("p_θ", BLUE, [0] * len(shown["responses"]))])
        ax.containers[1][-1].set_height(0)  # "(other)" too: the background has no blue
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    keep_as_background(figure)
    writer = PillowWriter(fps=4)
    with replacing(Path(out) / "convergence.gif") as part, writer.saving(figure, part, figure.dpi):
        for row in [*rows, *[rows[-1]] * 5]:  # the last one stays a while
            for ax, p in zip(axes[0], row["shown"]):
                for bar, height in zip(ax.containers[1], [*p, max(0.0, 1 - sum(p))]):
                    bar.set_height(height)
            stage = f"iteration {row['iteration']}" if row["iteration"] else "SFT"
            figure.suptitle(f"{stage}, step {row['step']}: KL(p_data‖p_θ) = {row['kl']:.3f} nats "
                            f"(black: p_data, blue: p_θ)")
            writer.grab_frame()
    plt.close(figure)


def keep_as_background(figure):
    """Replace all that never moves by a picture of it: 40 frames in 1 s instead of 6 s."""
    figure.canvas.draw()
    figure.figimage(np.array(figure.canvas.buffer_rgba()), zorder=-1)
    for ax in figure.axes:
        ax.set_axis_off()
        ax.set_title("")
