"""The plain ways that tests/bench_train.py measures the shipped ones against; equal in result.

Reading order: `padded_logps` → `unmerged` → `generate_uncached`.
Dimensions: as in data/responses.py; T tokens of prompt and response; M rows of an unmerged table.
"""
import torch

from data.responses import Responses
from data.world import pad
from sample import next_tokens
from spin_loss import sequence_logps


def padded_logps(model, answers, impl="eager", size=None):
    """`answer_logps` in the plain way: each row prompt + response, padded, `size` rows a time."""
    prompt_length_N = answers.prompt_length_P[answers.prompt_N]
    end_N = prompt_length_N + answers.length_N
    index_T = torch.arange(int(end_N.max()))
    prompt_NT = index_T < prompt_length_N[:, None]
    response_NT = (index_T < end_N[:, None]) & ~prompt_NT
    tokens_NT, prompts_NT = torch.zeros_like(response_NT, dtype=torch.long), answers.prompt_PT
    prompts_NT = prompts_NT[answers.prompt_N]
    tokens_NT[prompt_NT] = prompts_NT[prompts_NT >= 0]  # both go through the rows in order
    tokens_NT[response_NT] = answers.tokens_NS[answers.tokens_NS >= 0]
    return torch.cat([sequence_logps(model, tokens_NT[n, :T], response_NT[n, :T], impl)
                      for n in torch.arange(len(end_N)).split(size or len(end_N))
                      for T in [int(end_N[n].max())]])


def one_by_one(model, answers, impl="eager"):
    return padded_logps(model, answers, impl, 1)


def unmerged(table, real, generated) -> Responses:
    """A table with one row for each draw, from the responses drawn for each prompt."""
    tokens = [tuple(y[:n]) for y, n in zip(table.tokens_NS.tolist(), table.length_N.tolist())]
    row_of = {key: n for n, key in enumerate(zip(table.prompt_N.tolist(), tokens))}
    rows = [(row_of[p, y], share / len(drawn), (1 - share) / len(drawn))
            for share, draws in ((1, real), (0, generated))
            for p, drawn in enumerate(draws) for y in drawn]
    n_M, real_M, generated_M = map(torch.tensor, zip(*rows))
    part = {name: value[n_M] if name.endswith(("_N", "_NS")) else value
            for name, value in vars(table).items()}
    return Responses(**part | {"real_N": real_M.float(), "generated_N": generated_M.float(),
                               "negative_N": generated_M.float(),
                               "support_PK": torch.full_like(table.support_PK, -1)})


@torch.no_grad()
def generate_uncached(model, prompts, *, max_new_tokens, end_token, generator):
    """`generate`, but each token reads all of its sequence again. Finished answers leave too."""
    written, alive = [list(x) for x in prompts], list(range(len(prompts)))
    for _ in range(max_new_tokens):
        length_B = torch.tensor([len(written[b]) for b in alive])
        hidden_BTD = model.hidden(pad([written[b] for b in alive], 0))
        last_BD = hidden_BTD[torch.arange(len(alive)), length_B - 1]
        drawn = next_tokens(last_BD @ model.head_weight.T, generator=generator).tolist()
        for b, token in zip(alive, drawn):
            written[b].append(token)
        alive = [b for b, token in zip(alive, drawn) if token != end_token]
        if not alive:
            break
    return [y[len(x):] for x, y in zip(prompts, written)]
