"""A training step as it was at commit c002988: what tests/bench/train.py compares today's with.

Then a prompt was read once, and all its responses went on from its keys and values, in four groups
of like length, so that short responses were not padded to the longest. Prefixes that responses
share were read again for each of them. Loss and gradient are the same as today's (a test says so).

Reading order: `RowCache` → `Table` → `table_of` → `grouped_logps` → the objectives → `fit`.
Dimensions: P prompts, N responses, S response tokens, B pairs, K responses of p_data to a prompt.
"""
import math
from dataclasses import dataclass

import torch
from torch.optim.swa_utils import AveragedModel

import train
from model import KVCache, causal_mask
from spin_loss import spin_loss, token_logps


class RowCache(KVCache):
    """The cache of that commit: it looked at the positions at every call, which waits for them."""
    def place(self, tokens_BT, block_size):
        is_text_BT = tokens_BT >= 0
        position_BT = self.length_B1 + is_text_BT.cumsum(dim=1) - 1
        if position_BT.numel() and int(position_BT.max()) >= block_size:
            raise ValueError(f"more tokens than the model's block_size of {block_size}")
        self.length_B1 = position_BT[:, -1:] + 1
        key_BT = position_BT.masked_fill(~is_text_BT, block_size)
        self.position_BC = key_BT if self.position_BC is None else torch.cat(
            [self.position_BC, key_BT], dim=1)
        self.visible_BTC = causal_mask(key_BT, self.position_BC)
        return key_BT.clamp(max=block_size - 1)

    def rows(self, index_N):
        new = RowCache()
        new.layers = {i: (k_BHCK.index_select(0, index_N), v_BHCK.index_select(0, index_N))
                      for i, (k_BHCK, v_BHCK) in self.layers.items()}
        new.position_BC, new.length_B1 = self.position_BC[index_N], self.length_B1[index_N]
        return new


@dataclass
class Table:
    """All responses to all prompts, padded with −1; response n belongs to prompt prompt_N[n]."""
    prompt_PT: torch.Tensor
    prompt_length_P: torch.Tensor
    support_PK: torch.Tensor  # the responses that p_data can give to each prompt
    prompt_N: torch.Tensor
    tokens_NS: torch.Tensor
    length_N: torch.Tensor
    data_N: torch.Tensor
    real_N: torch.Tensor
    own_N: torch.Tensor
    older_N: torch.Tensor
    opponent_N: torch.Tensor
    generated_N: torch.Tensor

    def select(self, prompts) -> "Table":
        """The part of the table that belongs to some prompts, renumbered 0, 1, …"""
        number_P = torch.full_like(self.prompt_length_P, -1)
        number_P[prompts] = torch.arange(len(prompts))
        kept_N = number_P[self.prompt_N] >= 0
        rows, number_N = kept_N.nonzero()[:, 0], kept_N.cumsum(dim=0) - 1
        part = {name: value[prompts] if name.endswith(("_PT", "_P", "_PK")) else value[rows]
                for name, value in vars(self).items()}
        support_PK = number_N[part["support_PK"]].where(part["support_PK"] >= 0, -1)
        return Table(**part | {"prompt_N": number_P[self.prompt_N[rows]],
                               "support_PK": support_PK})

    def pairs(self, first_N, second_N):
        """All pairs (i, j) of one prompt, found among all pairs of the table."""
        i_I, j_J = first_N.nonzero()[:, 0], second_N.nonzero()[:, 0]
        same_IJ = self.prompt_N[i_I][:, None] == self.prompt_N[j_J]
        at_B = same_IJ.nonzero()
        i_B, j_B = i_I[at_B[:, 0]], j_J[at_B[:, 1]]
        return i_B, j_B, first_N[i_B] * second_N[j_B] / len(self.prompt_length_P)


def table_of(world, responses) -> Table:
    """The same responses and shares as today's `Responses`, in the same order."""
    lists = [y for some in responses.trees.responses for y in some]
    support = [[] for _ in world.prompts]
    for n, (p, share) in enumerate(zip(responses.prompt_N, responses.data_N)):
        if share > 0:
            support[p].append(n)
    float_of = lambda name: torch.tensor(getattr(responses, name), dtype=torch.float32)
    return Table(
        pad(world.prompts), torch.tensor([len(x) for x in world.prompts]), pad(support),
        torch.tensor(responses.prompt_N), pad(lists), torch.tensor([len(y) for y in lists]),
        float_of("data_N"), float_of("real_N"), float_of("log_share_N").exp(),
        torch.zeros(len(lists)), float_of("opponent_N"), float_of("generated_N"))


def pad(lists):
    """[[1, 2], [3]] -> [[1, 2], [3, -1]] as a tensor."""
    longest = max(map(len, lists))
    return torch.tensor([[*items, *[-1] * (longest - len(items))] for items in lists])


def grouped_logps(model, table, impl="eager", groups=4):
    """log p_θ(y|x) of every response in a table, [N], nats."""
    length_P = table.prompt_length_P - 1  # ANSWER, a prompt's last token, is read with each y
    cache, index_T = RowCache(), torch.arange(table.prompt_PT.shape[1])
    model.hidden(table.prompt_PT.masked_fill(index_T >= length_P[:, None], -1), cache)
    answer_P1 = table.prompt_PT.gather(1, length_P[:, None])
    logp_N = torch.zeros(len(table.prompt_N))
    for n in table.length_N.argsort().chunk(groups):
        length_n, prompt_n = table.length_N[n], table.prompt_N[n]
        target_nS = table.tokens_NS[n, :int(length_n.max())]
        scored_nS = torch.arange(target_nS.shape[1]) < length_n[:, None]
        input_nS = torch.cat([answer_P1[prompt_n], target_nS[:, :-1]], dim=1)
        input_nS = input_nS.masked_fill(~scored_nS, -1)
        hidden_nSD = model.hidden(input_nS, cache.rows(prompt_n))
        logp = token_logps(hidden_nSD[scored_nS], model.head_weight, target_nS[scored_nS], impl)
        logp_N = logp_N.index_add(0, n[scored_nS.nonzero()[:, 0]], logp)
    return logp_N


@torch.no_grad()
def all_logps(model, table, impl="eager"):
    """log p of every response, 64 prompts at a time. [N], nats."""
    parts = torch.arange(len(table.prompt_length_P)).split(64)
    return torch.cat([grouped_logps(model, table.select(part), impl) for part in parts])


def sft_objective(model, table, config):
    return -(table.real_N * grouped_logps(model, table, config.logprob)).sum() / len(
        table.prompt_length_P)


def spin_objective(model, table, config):
    """The logistic loss over all pairs, and the mass anchor: the default settings only."""
    player_N, opponent_N = grouped_logps(model, table, config.logprob), table.opponent_N
    i_B, j_B, weight_B = table.pairs(table.real_N, table.generated_N)
    loss_B = spin_loss(player_N[i_B], player_N[j_B], opponent_N[i_B], opponent_N[j_B], config.lam)
    loss = (weight_B * loss_B).sum() * (2 / config.lam)
    ratio_N = table.own_N * (player_N - opponent_N).exp()
    m_P = ratio_N.new_zeros(int(table.prompt_N.max()) + 1).index_add(0, table.prompt_N, ratio_N)
    m_P = m_P.clamp(1e-30, 1)
    return loss + config.anchor_weight * ((m_P - 1) * m_P.log()).mean()


def fit(player, table, prompts, config, t, at_step):
    """The training loop of that commit, at today's rates; at_step() as each step begins."""
    steps, lr = (config.steps, config.lr) if t else (config.sft_steps, config.sft_lr)
    objective = spin_objective if t else sft_objective
    optimizer = torch.optim.AdamW(player.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    averaged = AveragedModel(player)
    order = torch.tensor(train.prompt_batches(prompts, steps, config, t))
    for step in range(steps):
        at_step()
        for group in optimizer.param_groups:
            group["lr"] = lr * train.share_of_rate(step, steps, config)
        loss = objective(player, table.select(order[step]), config)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(player.parameters(), config.clip)
        assert math.isfinite(norm)
        optimizer.step()
        if step + 1 > steps * (1 - config.average):
            averaged.update_parameters(player)
        loss.item()  # it went into a report's mean
