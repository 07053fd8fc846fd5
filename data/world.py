"""A world, tokenized: rows, the finite SFT set drawn from them, and tables of responses.

Reading order: `World` → `counting_kl`, the mark that counting alone would reach.
Dimensions: P prompts, N responses, K responses that p_data gives to one prompt.
"""
from collections import Counter

import numpy as np
import torch

from data.reader import InputError, sample_sft
from data.responses import Responses
from data.tokenizer import END, frame


class World:
    """Rows of a world, tokenized, and the finite SFT set drawn from them."""
    def __init__(self, rows, encoding, samples, seed, block_size, device="cpu"):
        self.rows, self.encoding, self.device = rows, encoding, device
        self.prompts, self.data, self.real = [], [], []
        for row, counts in zip(rows, sample_sft(rows, samples, seed)):
            self.prompts.append(frame(encoding, row["prompt"], "")[0])
            tokens = {y: tuple(frame(encoding, "", y)[1]) for y in row["responses"]}
            longest = len(self.prompts[-1]) + max(map(len, tokens.values()))
            if longest > block_size:
                x = row["prompt"] if len(row["prompt"]) < 60 else row["prompt"][:59] + "…"
                raise InputError(f"line {row['line']}: prompt {x!r} and its longest response are "
                                 f"{longest} tokens, the model's --block-size is {block_size}: "
                                 f"raise it, or shorten the row")
            self.data.append({tokens[y]: p for y, p in row["responses"].items()})
            self.real.append({tokens[y]: c / sum(counts.values()) for y, c in counts.items()})
        is_train = np.array([row["split"] == "train" for row in rows])
        self.splits = {"train": torch.tensor(is_train.nonzero()[0], device=device)}
        if not is_train.all():
            self.splits["heldout"] = torch.tensor((~is_train).nonzero()[0], device=device)
        # A few prompts to look at: one a family, held-out ones first, with few enough responses.
        first = {}
        for p in sorted(range(len(rows)), key=lambda p: rows[p]["split"] == "train"):
            if len(rows[p]["responses"]) <= 6:
                first.setdefault(rows[p]["family"], p)
        self.shown = [*first.values(), *range(min(4, len(rows)))][:4]
        self.end_token = encoding.encode_single_token(END)
        # Two tokens beyond the longest response: enough to see that a sample is not one of them.
        self.max_new_tokens = 2 + max(len(y) for data in self.data for y in data)
        self.counting_kl = np.mean([counting_kl(row["responses"].values(), samples)
                                    for row in rows if row["split"] == "train"])

    def tabulate(self, generated=None, older=None) -> Responses:
        """Every response of p_data, of the SFT set and of the draws (a Counter a prompt), once."""
        generated, older = (draws or [Counter()] * len(self.rows) for draws in (generated, older))
        rows, support = [], []
        for p, (data, real, *draws) in enumerate(zip(self.data, self.real, generated, older)):
            support.append(range(len(rows), len(rows) + len(data)))  # p_data's come first
            rows += [(p, y, data.get(y, 0.0), real.get(y, 0.0),
                      *(counts[y] / max(1, counts.total()) for counts in draws))
                     for y in dict.fromkeys([*data, *draws[0], *draws[1]])]
        prompt, tokens, *shares = zip(*rows)
        tensor = lambda values: torch.tensor(values, device=self.device)
        data_N, real_N, generated_N, older_N = map(tensor, shares)
        return Responses(
            pad(self.prompts, -1).to(self.device), tensor([len(p) for p in self.prompts]),
            pad(support, -1).to(self.device), tensor(prompt), pad(tokens, -1).to(self.device),
            tensor([len(y) for y in tokens]), data_N, real_N, generated_N, older_N,
            torch.zeros_like(data_N), generated_N)


def pad(lists, fill):
    """[[1, 2], [3]] -> [[1, 2], [3, fill]] as a tensor."""
    longest = max(map(len, lists))
    return torch.tensor([[*items, *[fill] * (longest - len(items))] for items in lists])


def counting_kl(probabilities, n):
    """Expected KL(p_data‖p̂), nats, of counting n draws with ½ added to each count (p̂ > 0 then).

    The mark to beat without learning anything across prompts: about (K − 1)/2n.
    """
    p = np.array(list(probabilities))
    draws = np.random.default_rng(0).multinomial(n, p / p.sum(), size=200) + 0.5
    return float((p * np.log(p * draws.sum(1, keepdims=True) / draws)).sum(1).mean())
