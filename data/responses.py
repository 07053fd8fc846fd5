"""A table of prompts and responses, how likely each is in data and in samples, and its log-probs.

SPIN needs log p(y|x) for real and generated responses. In a small world the same response is
drawn again and again, so we keep each distinct one once, with its share of the draws as weight:
an expectation over draws is a weighted sum, exactly, at a fraction of the cost.

Reading order: `Responses` → `answer_logps` → `all_logps`.
Dimensions: P prompts, T prompt tokens, N responses (of all prompts), S response tokens, B pairs,
K responses that p_data gives to one prompt. Log-probs are in nats.
"""
from dataclasses import dataclass

import torch

from spin_loss import token_logps


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
        i_I, j_J = first_N.nonzero()[:, 0], second_N.nonzero()[:, 0]
        same_IJ = self.prompt_N[i_I][:, None] == self.prompt_N[j_J]
        at_B = same_IJ.nonzero()
        i_B, j_B = i_I[at_B[:, 0]], j_J[at_B[:, 1]]
        return i_B, j_B, first_N[i_B] * second_N[j_B] / len(self.prompt_length_P)

    def mean(self, weight_N, value_N, prompts) -> float:
        """Mean over some prompts of Σ_n weight_n value_n."""
        sum_P = torch.zeros(len(self.prompt_length_P), device=value_N.device)
        return sum_P.index_add(0, self.prompt_N, weight_N * value_N)[prompts].mean().item()

    def on_support(self, value_N, fill=float("-inf")):
        """value_N arranged as [P, K], one row a prompt, over the responses p_data can give."""
        return torch.where(self.support_PK >= 0, value_N[self.support_PK], fill)


def answer_logps(model, answers: Responses, impl="eager", groups=4):
    """log p_θ(y|x) of every answer in a table, [N], nats: `sequence_logps`, several times faster.

    A prompt is read once, and all of its answers continue from its keys and values; answers are
    read in groups of like length, so that short ones are not padded to the longest.
    """
    length_P = answers.prompt_length_P - 1  # ANSWER, a prompt's last token, is read with each y:
    cache = model.read(answers.prompt_PT, length_P)
    first_P1 = answers.prompt_PT.gather(1, length_P[:, None])  # it is what predicts y's first.
    logp_N = torch.zeros(len(answers.prompt_N), device=length_P.device)
    for n in answers.length_N.argsort().chunk(groups):
        length_n, prompt_n = answers.length_N[n], answers.prompt_N[n]
        target_nS = answers.tokens_NS[n, :int(length_n.max())]
        scored_nS = torch.arange(target_nS.shape[1], device=n.device) < length_n[:, None]
        input_nS = torch.cat([first_P1[prompt_n], target_nS[:, :-1]], dim=1)  # shifted by one
        input_nS = input_nS.masked_fill(~scored_nS, -1)  # padding, which has no position
        hidden_nSD = model.hidden(input_nS, cache.rows(prompt_n))
        logp = token_logps(hidden_nSD[scored_nS], model.head_weight, target_nS[scored_nS], impl)
        logp_N = logp_N.index_add(0, n[scored_nS.nonzero()[:, 0]], logp)
    return logp_N


@torch.no_grad()
def all_logps(model, responses, impl):
    """log p of every response, some prompts at a time so that memory stays small. [N], nats."""
    P = len(responses.prompt_length_P)
    parts = torch.arange(P, device=responses.prompt_N.device).split(64)
    return torch.cat([answer_logps(model, responses.select(part), impl) for part in parts])
