"""A world as tensors: prompts, their responses, and how likely each is, in data and in samples.

SPIN needs log p(y|x) for real and generated responses. In a small world the same response is
drawn again and again, so we keep each distinct one once, with its share of the draws as weight:
an expectation over draws is a weighted sum, exactly, at a fraction of the cost.

Reading order: `Responses`, the tensors → `World`, which makes them from rows and generations.
Dimensions: P prompts, T prompt tokens, N responses (of all prompts), S response tokens, B pairs,
K responses that p_data gives to one prompt.
"""
import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from data.reader import InputError, sample_sft
from data.tokenizer import END, frame


@dataclass
class Responses:
    """N responses to P prompts; response n belongs to prompt prompt_N[n]. Shares sum to 1 a prompt.

    `support_PK` lists, for each prompt, the responses that p_data can give; −1 fills the rest.
    """
    prompt_PT: torch.Tensor
    prompt_length_P: torch.Tensor
    support_PK: torch.Tensor
    prompt_N: torch.Tensor
    tokens_NS: torch.Tensor  # y, closed by END unless generation was cut short
    length_N: torch.Tensor
    data_N: torch.Tensor  # p_data(y|x), exact
    real_N: torch.Tensor  # share of y among the prompt's responses in the SFT set
    generated_N: torch.Tensor  # share of y among the opponent's draws
    older_N: torch.Tensor  # share of y among the draws of the iteration before, if they are used
    opponent_N: torch.Tensor  # log p_t(y|x), nats, computed once: the opponent is frozen
    negative_N: torch.Tensor  # what the loss compares with: generated_N, or its mean with older_N

    def select(self, prompts) -> "Responses":
        """The part of the table that belongs to some prompts, renumbered 0, 1, …"""
        number_P = torch.full_like(self.prompt_length_P, -1)
        number_P[prompts] = torch.arange(len(prompts), device=number_P.device)
        kept_N = number_P[self.prompt_N] >= 0
        rows, number_N = kept_N.nonzero()[:, 0], kept_N.cumsum(dim=0) - 1
        part = {name: value[prompts] if name.endswith(("_PT", "_P", "_PK")) else value[rows]
                for name, value in vars(self).items()}
        support_PK = number_N[part["support_PK"]].where(part["support_PK"] >= 0, -1)
        return Responses(**part | {"prompt_N": number_P[self.prompt_N[rows]],
                                   "support_PK": support_PK})

    def know_shares(self):
        """Let p_t itself, not a count of draws, be the share of each response of the SFT set.

        opponent_N holds log p_t(y) of those anyway. The other responses of a prompt share what is
        left, in proportion to their counts: E over y' ~ p_t keeps its value and loses noise.
        """
        known_N = self.real_N > 0
        known_share_N = self.opponent_N.exp().where(known_N, 0)
        drawn_N = self.generated_N.where(~known_N, 0)
        left_N = (1 - self.total(known_share_N)).clamp(min=0)
        share_N = known_share_N + drawn_N * left_N / self.total(drawn_N).clamp(min=1e-9)
        self.generated_N = share_N / self.total(share_N)  # where no other response was drawn

    def total(self, value_N):
        """The sum of value_N over the responses to the same prompt, at each of them. [N]"""
        sum_P = value_N.new_zeros(len(self.prompt_length_P))
        return sum_P.index_add(0, self.prompt_N, value_N)[self.prompt_N]

    def pairs(self, first_N, second_N):
        """All pairs (i, j) of one prompt with weight first_N[i]·second_N[j], averaged over prompts.

        n real and m generated draws give n·m pairs for n + m log-probs. Returns i_B, j_B, weight_B.
        """
        same_NN = self.prompt_N[:, None] == self.prompt_N[None, :]
        weight_NN = first_N[:, None] * second_N[None, :] * same_NN / len(self.prompt_length_P)
        i_B, j_B = weight_NN.nonzero(as_tuple=True)
        return i_B, j_B, weight_NN[i_B, j_B]

    def mean(self, weight_N, value_N, prompts) -> float:
        """Mean over some prompts of Σ_n weight_n value_n."""
        sum_P = torch.zeros(len(self.prompt_length_P), device=value_N.device)
        return sum_P.index_add(0, self.prompt_N, weight_N * value_N)[prompts].mean().item()

    def on_support(self, value_N, fill=float("-inf")):
        """value_N arranged as [P, K], one row a prompt, over the responses p_data can give."""
        return torch.where(self.support_PK >= 0, value_N[self.support_PK], fill)


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
                raise InputError(f"line {row['line']}: prompt {row['prompt']!r} and its longest "
                                 f"response are {longest} tokens, the model's --block-size is "
                                 f"{block_size}: raise it, or shorten the row")
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
