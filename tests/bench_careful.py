"""What a good engineer writes on Hugging Face's GPT-2; tests/bench_peers.py measures it.

Rows sorted into four groups of like length, no mask (the padding is on the right, where a causal
model does not look), the head on response tokens only, the opponent's log-probs computed once,
gradients clipped, fused AdamW. One row a draw: neither equal rows nor prompts are shared.

Reading order: `gpt2` → `draws`, `pairs` → `hf_logps` → `careful` → `careful_pass`.
Dimensions: B rows in a batch, T tokens, N scored tokens or rows, V vocabulary, D width.
"""
import copy
import time

import torch
import torch.nn.functional as F

from data.world import pad


# --- the same model, the same material -----------------------------------------------------------

def gpt2(m):
    """Hugging Face's GPT-2 with the weights of m.player; the same function to 1e-4, checked."""
    import transformers  # here, so that the rest can be read and used without it
    ours, end = m.player.config, m.world.end_token
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=ours.vocab_size, n_positions=ours.block_size, n_embd=ours.n_embd,
        n_layer=ours.n_layer, n_head=ours.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=end, eos_token_id=end, pad_token_id=0))
    weights = {f"transformer.{name}": value.T if value.dim() == 2 and name.startswith("h.") else
               value for name, value in m.player.state_dict().items()}  # its Conv1D is transposed
    missing, unknown = theirs.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    theirs.tie_weights()
    tokens_BT = torch.randint(ours.vocab_size, (4, 9))
    with torch.no_grad():
        gap = (m.player(tokens_BT) - theirs(tokens_BT).logits).abs().max()
    assert gap < 1e-4, gap
    return theirs


def draws(m, table, share):
    """[(prompt, response)]: the rows of an unmerged table with a share, training prompts only."""
    table = table.select(m.world.splits["train"])
    prompts = [x[:n] for x, n in zip(table.prompt_PT.tolist(), table.prompt_length_P.tolist())]
    return [(prompts[p], y[:n]) for p, y, n, has in zip(
        table.prompt_N.tolist(), table.tokens_NS.tolist(), table.length_N.tolist(),
        getattr(table, share).tolist()) if has]


def pairs(m):
    """[(prompt, real, generated)], as many to a prompt as there are draws."""
    return [(x, y, other) for (x, y), (_, other) in zip(draws(m, m.spin_draws, "real_N"),
                                                        draws(m, m.spin_draws, "generated_N"))]


# --- a careful loop ------------------------------------------------------------------------------

def hf_logps(model, rows, groups=4):
    """log p(y|x) of [(x, y)], summed over the response. [N], nats."""
    found, order = [], sorted(range(len(rows)), key=lambda n: sum(map(len, rows[n])))
    for part in torch.tensor(order).chunk(groups):
        chosen = [rows[n] for n in part.tolist()]
        tokens_BT = pad([x + y for x, y in chosen], 0)
        label_BT = pad([[-100] * len(x) + y for x, y in chosen], -100)[:, 1:]
        hidden_BTD = model.transformer(tokens_BT[:, :-1], use_cache=False).last_hidden_state
        scored_BT = label_BT >= 0
        logits_NV = hidden_BTD[scored_BT] @ model.lm_head.weight.T
        logp_N = -F.cross_entropy(logits_NV, label_BT[scored_BT], reduction="none")
        row_N = scored_BT.nonzero()[:, 0]
        found.append(logp_N.new_zeros(len(chosen)).index_add(0, row_N, logp_N))
    return torch.cat(found)[torch.tensor(order).argsort()]


def careful(model, rows, lam, batch, opponent_N=None):
    """A turn of the hand-written loop: SFT on [(x, y)], SPIN on [(x, y, y')] with log p_t kept."""
    model, rng = copy.deepcopy(model).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def turn():
        start = time.process_time()
        n_B = torch.randint(len(rows), (batch,), generator=rng)
        chosen = [rows[n] for n in n_B.tolist()]
        if opponent_N is None:
            loss = -hf_logps(model, chosen).mean()
        else:
            both = [(x, y) for x, y, _ in chosen] + [(x, other) for x, _, other in chosen]
            ratio_N = hf_logps(model, both) - opponent_N[torch.cat([n_B, n_B + len(rows)])]
            loss = F.softplus(lam * (ratio_N[batch:] - ratio_N[:batch])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return (time.process_time() - start) / batch
    return turn


@torch.no_grad()
def careful_pass(model, rows):
    """(log p_t of all real, then of all generated responses, CPU seconds)."""
    start = time.process_time()
    both = [(x, y) for x, y, _ in rows] + [(x, other) for x, _, other in rows]
    found = [hf_logps(model, both[n:n + 2048]) for n in range(0, len(both), 2048)]
    return torch.cat(found), time.process_time() - start
