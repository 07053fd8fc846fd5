"""log p(y) with and without the table of all logits, at GPT-2's vocabulary of 50,257.

    python tests/bench/fused.py            N = 2048 tokens, D = 384 (1 minute)
    python tests/bench/fused.py --quick    small shapes: does it still run?

Time is that of forward and backward pass, as a multiple of the three bare matrix products
(Z = H Wᵀ, dH = Z W, dW = Zᵀ H), which take turns with it. Memory is the most that is held above the
inputs; the gradients dH and dW count.
Dimensions: N tokens, D width, V vocabulary.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench.measure import MB, head, in_turns, peak_memory, row, seconds, show  # noqa: E402
from spin_loss import token_logps  # noqa: E402


def measure(way, N, D, V, device) -> dict:
    """One way at one shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    h_ND = torch.randn(N, D, device=device, requires_grad=True)
    W_VD = torch.randn(V, D, device=device).mul_(D**-0.5).requires_grad_()
    y_N, grad_N = torch.randint(V, (N,), device=device), torch.rand(N, device=device)

    def run():
        token_logps(h_ND, W_VD, y_N, way).backward(grad_N)
        h_ND.grad = W_VD.grad = None

    @torch.no_grad()
    def products():
        z_NV = h_ND @ W_VD.T
        z_NV @ W_VD, z_NV.T @ h_ND

    run()  # compiles, and lets libraries take their work space
    memory = peak_memory(run, device)
    found = in_turns({"own": lambda: seconds(run, device),
                      "products": lambda: seconds(products, device)}, 3)
    return {"seconds": found["own"], "ratio": found["own"] / found["products"], "memory": memory}


def main(quick):
    N, D, V = (64, 16, 4096) if quick else (2048, 384, 50257)
    head(f"log-probs, N = {N}, D = {D}, V = {V:,}", "seconds", "time / three products",
         "memory, MB")
    for way in ("eager", "fused"):
        found = measure(way, N, D, V, "cpu")
        row(way, show(found["seconds"]), f"{found['ratio']:.2f}", show(found["memory"] / MB))


if __name__ == "__main__":
    main("--quick" in sys.argv)
