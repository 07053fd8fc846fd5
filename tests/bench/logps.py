"""What log p(y) costs without ever holding all logits: time and memory of six ways.

    python tests/bench/logps.py            tables, and out/bench_logps.png  (8 minutes)
    python tests/bench/logps.py --quick    smaller shapes and fewer vocabularies (90 seconds)
    python tests/bench/logps.py --diagram  out/fused_memory.png: what is kept, what is not

Each way is measured in a process of its own. Time is that of forward and backward pass, as a
multiple of the three bare matrix products (Z = H Wᵀ, dH = Z W, dW = Zᵀ H, each allocating its
result), which take turns with it in the same process: processor time of one thread, or CUDA events.
Memory is the most that is held above the inputs; the gradients dH and dW count. It is the
process's resident memory, or torch.cuda.max_memory_allocated.

Reading order: the six ways → `measure`, one of them → `table` and `sweep` → figures → `main`.
Dimensions: N tokens, D width, V vocabulary.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench.measure import (BLACK, BLUE, GREEN, MB, ORANGE, PURPLE, cpu_seconds,  # noqa: E402
                           machine, peak_memory)
from spin_loss import token_logps  # noqa: E402

GPT2, TOY = (384, 50257), (128, 512)  # D, V


# --- six ways ------------------------------------------------------------------------------------

def eager_gather_minus_logsumexp(h_ND, W_VD, y_N):
    z_NV = h_ND @ W_VD.T
    return z_NV.gather(1, y_N[:, None])[:, 0] - z_NV.logsumexp(1)


@torch.compile
def compiled_cross_entropy(h_ND, W_VD, y_N):
    return -F.cross_entropy(h_ND @ W_VD.T, y_N, reduction="none")


def linear_cross_entropy(h_ND, W_VD, y_N):  # torch 2.13's own; its defaults choose the chunks
    return -F.linear_cross_entropy(h_ND, W_VD, y_N, reduction="none",
                                   options=torch.nn.LinearCrossEntropyOptions())


def checkpointed_chunks(h_ND, W_VD, y_N):
    """Chunks of tokens, each recomputed in the backward pass: memory falls, dW is added up."""
    chunks = zip(h_ND.split(256), y_N.split(256))
    return torch.cat([checkpoint(compiled_cross_entropy, h, W_VD, y, use_reentrant=False)
                      for h, y in chunks])


WAYS = {
    "eager": ("log_softmax + gather, eager", token_logps),
    "logsumexp": ("gather − logsumexp, eager", eager_gather_minus_logsumexp),
    "compiled": ("F.cross_entropy, compiled", compiled_cross_entropy),
    "linear_ce": ("F.linear_cross_entropy, chunked", linear_cross_entropy),
    "chunks": ("chunks of tokens + checkpoint, compiled", checkpointed_chunks),
    "fused": ("fused: blocks of the vocabulary", lambda h, W, y: token_logps(h, W, y, "fused")),
}
DRAWN = {"eager": (BLACK, "o-"), "compiled": (ORANGE, "s--"), "chunks": (PURPLE, "^:"),
         "fused": (BLUE, "D-")}


# --- one measurement -----------------------------------------------------------------------------

def seconds(run, device) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    return cpu_seconds(run)


def measure(way, N, D, V, repeats, device) -> dict:
    """One way at one shape, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    h_ND = torch.randn(N, D, device=device, requires_grad=True)
    W_VD = torch.randn(V, D, device=device).mul_(D ** -0.5).requires_grad_()
    y_N, g_N = torch.randint(V, (N,), device=device), torch.rand(N, device=device)

    def run():
        WAYS[way][1](h_ND, W_VD, y_N).backward(g_N)
        h_ND.grad = W_VD.grad = None

    @torch.no_grad()
    def products():
        z_NV = h_ND @ W_VD.T
        z_NV @ W_VD, z_NV.T @ h_ND

    run()  # compiles, and lets libraries take their work space
    floor, own = [seconds(products, device)], []
    memory = peak_memory(lambda: own.append(seconds(run, device)), device)
    if repeats > 1:  # those first ones also had to ask the system for memory: drop them
        floor, own = zip(*[(seconds(products, device), seconds(run, device))
                           for _ in range(repeats)])
    floor, own = (sorted(times)[len(times) // 2] for times in (floor, own))
    return {"way": way, "N": N, "D": D, "V": V, "floor_s": floor, "ratio": own / floor,
            "memory": memory, "gradients": 4 * (N * D + V * D)}


def in_own_process(way, N, D, V, repeats, device) -> dict | None:
    """`measure` in a new process; None, with the reason printed, where it fails."""
    command = [sys.executable, __file__, "--one", way, str(N), str(D), str(V), str(repeats),
               "--device", device]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed: too little memory?"])[-1]
        print(f"  {WAYS[way][0]:42} failed: {reason}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# --- the table and the sweep ---------------------------------------------------------------------

def table(ways, N, D, V, repeats, device) -> None:
    """Some ways at one shape, a line each as soon as it is known."""
    print(f"\nN = {N}, D = {D}, V = {V}: dH and dW are {4 * (N * D + V * D) / MB:.1f} MB, "
          f"the table of logits {4 * N * V / MB:.0f} MB")
    print(f"  {'':42} time / products     memory   memory / (dH + dW)")
    for way in ways:
        row = in_own_process(way, N, D, V, repeats, device)
        if row:
            print(f"  {WAYS[way][0]:42} {row['ratio']:8.2f}        {row['memory'] / MB:8.1f} MB "
                  f"{row['memory'] / row['gradients']:10.2f}     "
                  f"(products: {1e3 * row['floor_s']:.1f} ms)", flush=True)


def sweep(vocabularies, N, D, repeats, device) -> dict[str, list[dict]]:
    found = {way: [] for way in DRAWN}
    for V in vocabularies:
        print(f"sweep: V = {V}", flush=True)
        for way in DRAWN:
            row = in_own_process(way, N, D, V, repeats, device)
            found[way] += [row] if row else []
    return found


# --- figures -------------------------------------------------------------------------------------

def draw_sweep(found, N, D, where) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    for way, rows in found.items():
        V = [row["V"] for row in rows]
        (colour, mark), label = DRAWN[way], WAYS[way][0]
        left.plot(V, [row["memory"] / MB for row in rows], mark, color=colour, label=label, lw=2)
        right.plot(V, [row["ratio"] for row in rows], mark, color=colour, label=label, lw=2)
    rows = found["fused"]
    left.plot([row["V"] for row in rows], [row["gradients"] / MB for row in rows], color=GREEN,
              lw=6, alpha=0.4, zorder=0, label="dH and dW alone")
    left.set(xscale="log", yscale="log", ylabel="peak memory above the inputs, MB")
    right.axhline(1, color=GREEN, lw=6, alpha=0.4, zorder=0, label="three bare products")
    right.set(xscale="log", ylabel="time / three bare products", ylim=(0, None))
    for ax in (left, right):
        ticks = [row["V"] for row in rows]
        ax.set_xticks(ticks, [str(V) for V in ticks])
        ax.minorticks_off()
        ax.set_xlabel(f"vocabulary V   (N = {N} tokens, D = {D}, float32)")
        ax.grid(alpha=0.3)
    figure.suptitle("log p(y) and its gradients, without the table of logits", fontsize=14)
    entries = dict(zip(*[handles[::-1] for handles in right.get_legend_handles_labels()][::-1]))
    entries |= dict(zip(*left.get_legend_handles_labels()[::-1]))
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=3, fontsize=12)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.savefig(where, dpi=90)
    print(f"{where} drawn")


def draw_diagram(where) -> None:
    """Two panels, plain and fused: shapes drawn to size, solid if kept for the backward pass."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle
    figure, axes = plt.subplots(2, 1, figsize=(10, 8.4))
    x0, y0, wide, high, deep = 1.6, 0.2, 9.0, 2.4, 1.1  # of the table of logits; D is `deep`
    for ax, fused in zip(axes, (False, True)):
        def box(x, y, w, h, text, colour=BLUE, **style):
            ax.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=BLACK, lw=1.5,
                                   **({"alpha": 0.45} | style)))
            ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=15)
        box(0.2, y0, deep, high, "h\n[N, D]")
        box(x0, y0 + high + 0.3, wide, deep, "W   [V, D]")
        if fused:
            for i in range(6):
                box(x0 + i * wide / 6, y0, wide / 6, high, "", "white", ls=":", alpha=1)
            box(x0 + 2 * wide / 6, y0, wide / 6, high, "one\nblock", ORANGE, hatch="//")
            ax.annotate("", (x0 + 4.6 * wide / 6, y0 + high / 2),
                        (x0 + 3.1 * wide / 6, y0 + high / 2),
                        arrowprops=dict(arrowstyle="-|>", lw=2.5))
            ax.text(x0 + 0.98 * wide / 6, y0 + high / 2, "gone", ha="center", va="center",
                    fontsize=15, backgroundcolor="white")
            ax.text(x0 + 5.25 * wide / 6, y0 + high / 2, "not yet", ha="center", va="center",
                    fontsize=15, backgroundcolor="white")
            box(x0 + wide + 0.3, y0, 0.35, high, "m")
            box(x0 + wide + 0.85, y0, 0.35, high, "s")
        else:
            box(x0, y0, wide, high, "log-softmax of all logits   [N, V]")
            box(x0 + 0.18, y0 + 0.15, wide - 0.36, 0.5, "and, for a while, the logits beside it",
                ORANGE, hatch="//")
        ax.set_title("fused: one block of columns at a time, in one buffer" if fused else
                     "eager: the whole table", fontsize=17, loc="left", weight="bold")
        ax.set(xlim=(0, 12), ylim=(0, 4.3))
        ax.axis("off")
    figure.text(0.02, 0.015, "blue: kept for the backward pass     orange, hatched: there for a "
                "moment     dotted: never stored", fontsize=13)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(where, dpi=90)
    print(f"{where} drawn")


# --- the run -------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; about 90 s")
    parser.add_argument("--diagram", action="store_true", help="only draw what is kept in memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the figures")
    parser.add_argument("--one", nargs=5, metavar=("WAY", "N", "D", "V", "REPEATS"),
                        help=f"one measurement, as JSON; WAY is one of {', '.join(WAYS)}")
    return parser.parse_args()


def main(args) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/logps.py: --device cuda: torch sees no GPU here; use --device cpu")
    if args.one:
        way, *numbers = args.one
        return print(json.dumps(measure(way, *map(int, numbers), args.device)))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.diagram:
        return draw_diagram(args.out / "fused_memory.png")
    began = time.time()
    print(f"torch {torch.__version__}, "
          + (torch.cuda.get_device_name() if args.device == "cuda" else f"{machine()}, one thread")
          + ", float32, forward + backward")
    if args.quick:
        table(WAYS, 512, 128, 8192, 3, args.device)
        found, N, D = sweep((512, 8192), 512, 128, 3, args.device), 512, 128
    else:
        table(WAYS, 2048, *TOY, 41, args.device)
        table(WAYS, 2048, *GPT2, 3, args.device)
        table(DRAWN, 8192, *GPT2, 1, args.device)
        N, D = 2048, GPT2[0]
        found = sweep((512, 2048, 8192, 32768, 131072), N, D, 1, args.device)
    draw_sweep(found, N, D, args.out / "bench_logps.png")
    print(f"{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main(parse_args())
