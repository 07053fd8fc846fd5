"""SPIN by other people's code. Needs `pip install transformers==5.24.0 trl==1.16.0`.

    python tests/bench/peers.py            (3 minutes)
    python tests/bench/peers.py --quick    tiny sizes: does it still run?

TRL           trl.DPOTrainer, whose loss is SPIN's for given pairs. Set up for speed: no logging,
              saving, evaluation, gradient checkpointing or worker processes, fused AdamW, padding
              to the longest of a batch, the opponent's log-probs kept.
careful loop  What a good engineer writes on Hugging Face's GPT-2: rows of like length in four
              groups, no mask (padding stands on the right, where a causal model does not look),
              the head on response tokens only, the opponent's log-probs kept, fused AdamW.

Both train a GPT-2 of our sizes with our weights p_0 on iteration 1's responses, 256 pairs a step,
one row for each response. A pair is a real and a generated response to one prompt; the SFT set has
128 responses to each prompt here, and the opponent gives 32. Our step takes 8 prompts: that stands
for 256 pairs too. In the second table each prompt has one pair of two different responses, so that
nothing is gained from responses that come more than once.

The opponent's log-probs of all responses are counted too, spread over the pairs of an iteration.
Reading order: the pairs → `gpt2` → `hf_logps`, `careful` → `dpo_trainer` → `ours` → `main`.
Dimensions: B rows in a batch, T tokens, N scored tokens or rows, V vocabulary.
"""
import copy
import io
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
CACHE = tempfile.TemporaryDirectory()  # log-probs kept by an earlier run must not be found
os.environ["HF_HOME"] = CACHE.name
warnings.simplefilter("ignore", FutureWarning)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

import train  # noqa: E402
from bench.measure import cpu_seconds, head, in_turns, row, show  # noqa: E402
from bench.step import QUICK, stages, step_seconds  # noqa: E402
from data.responses import self_play_responses  # noqa: E402

PAIRS = 256  # in a step
SETTINGS = dict(sft_samples=128, negatives=32, batch_size=PAIRS)


# --- the pairs -----------------------------------------------------------------------------------

def pairs_of(world, config, samples) -> list[list[tuple]]:
    """For each training prompt, pairs (x, y, y'), as many as p_0 gave responses to it."""
    rng, found = random.Random(0), []
    for p in world.splits["train"]:
        real = [list(y) for y, share in world.real[p].items()
                for _ in range(round(share * config.sft_samples))]
        generated = [list(y) for y in samples[p].elements()]
        rng.shuffle(real)
        rng.shuffle(generated)
        found.append([(world.prompts[p], y, other) for y, other in zip(real, generated)])
    return found


def one_pair_each(pairs) -> list[list[tuple]]:
    """Of each prompt, the first pair whose two responses differ, if there is one."""
    return [[pair for pair in some if pair[1] != pair[2]][:1] for some in pairs]


# --- a careful loop ------------------------------------------------------------------------------

def gpt2(policy, end_token):
    """Hugging Face's GPT-2 with our weights; checked to be the same function."""
    import transformers
    ours = policy.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=ours.vocab_size, n_positions=ours.block_size, n_embd=ours.n_embd,
        n_layer=ours.n_layer, n_head=ours.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=end_token, eos_token_id=end_token, pad_token_id=0))
    weights = {f"transformer.{name}": value.T if value.dim() == 2 and name.startswith("h.") else
               value for name, value in policy.state_dict().items()}  # its Conv1D is transposed
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    tokens_BT = torch.randint(ours.vocab_size, (4, 9))
    with torch.no_grad():
        gap = (policy(tokens_BT) - theirs(tokens_BT).logits).abs().max()
    assert gap < 1e-4, gap
    return theirs


def hf_logps(model, rows, groups=4):
    """log p(y|x) of [(x, y)], summed over the response. [N], nats."""
    pad = lambda lists, value: pad_sequence([torch.tensor(some) for some in lists],
                                            batch_first=True, padding_value=value)
    found, order = [], sorted(range(len(rows)), key=lambda n: sum(map(len, rows[n])))
    for group in torch.tensor(order).chunk(groups):
        chosen = [rows[n] for n in group.tolist()]
        tokens_BT = pad([x + y for x, y in chosen], 0)
        label_BT = pad([[-1] * len(x) + y for x, y in chosen], -1)[:, 1:]
        hidden_BTD = model.transformer(tokens_BT[:, :-1], use_cache=False).last_hidden_state
        scored_BT = label_BT >= 0
        logits_NV = hidden_BTD[scored_BT] @ model.lm_head.weight.T
        logp_N = -F.cross_entropy(logits_NV, label_BT[scored_BT], reduction="none")
        row_N = scored_BT.nonzero()[:, 0]
        found.append(logp_N.new_zeros(len(chosen)).index_add(0, row_N, logp_N))
    return torch.cat(found)[torch.tensor(order).argsort()]


def careful(model, rows, lam, iteration):
    """A function that trains one step on rows (x, y, y') and returns CPU seconds a pair.

    log p_t of all y, then of all y', is computed once for the `iteration` pairs of an iteration.
    """
    both = [(x, y) for x, y, _ in rows] + [(x, other) for x, _, other in rows]
    with torch.no_grad():
        began = time.process_time()
        opponent_N = torch.cat([hf_logps(model, both[n:n + 2048])
                                for n in range(0, len(both), 2048)])
        one_pass = time.process_time() - began
    model, rng = copy.deepcopy(model).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def step():
        n_B = torch.randint(len(rows), (PAIRS,), generator=rng)
        n_B = torch.cat([n_B, n_B + len(rows)])
        ratio_B = hf_logps(model, [both[n] for n in n_B.tolist()]) - opponent_N[n_B]
        loss = F.softplus(lam * (ratio_B[PAIRS:] - ratio_B[:PAIRS])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return lambda: cpu_seconds(step) / PAIRS + one_pass / iteration


# --- TRL -----------------------------------------------------------------------------------------

def tokenizer(V, end_token):
    """Writes token 17 as "17", so that the trainers' own tokenization gives our tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, "0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0",
                                                eos_token=str(end_token))


def dpo_trainer(model, rows, words, lam, iteration):
    """A function that trains five steps and returns CPU seconds a pair, start-up left out."""
    import datasets
    import transformers
    import trl
    text = lambda tokens: " ".join(map(str, tokens))
    data = datasets.Dataset.from_list([
        {"prompt": text(x), "chosen": " " + text(y), "rejected": " " + text(other)}
        for x, y, other in rows])
    args = trl.DPOConfig(
        output_dir=CACHE.name, per_device_train_batch_size=PAIRS, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
        eval_strategy="no", dataloader_num_workers=0, dataloader_pin_memory=False,
        disable_tqdm=True, optim="adamw_torch_fused", lr_scheduler_type="constant",
        learning_rate=1e-3, max_steps=5, beta=lam, max_length=None, precompute_ref_log_probs=True)
    passes, steps, plain = [], [], trl.DPOTrainer._precompute_ref_logps

    def timed(*given):
        began = time.process_time()
        found = plain(*given)
        passes.append(time.process_time() - began)
        return found

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.append(time.process_time())
    with patch.object(trl.DPOTrainer, "_precompute_ref_logps", timed):
        trainer = trl.DPOTrainer(copy.deepcopy(model), train_dataset=data, processing_class=words,
                                 args=args, callbacks=[Watch()])

    def turn():
        steps.clear()
        with redirect_stdout(io.StringIO()):  # its summary
            trainer.train()
        return (steps[-1] - steps[0]) / (len(steps) - 1) / PAIRS + sum(passes) / iteration
    return turn


# --- ours ----------------------------------------------------------------------------------------

def ours(stage, pairs, iteration):
    """A function that trains some steps and returns CPU seconds a pair. pairs: for each prompt."""
    world, each = copy.copy(stage.world), max(map(len, pairs))
    samples = [Counter([(world.end_token,)]) for _ in world.prompts]  # of held-out prompts
    for p, some in zip(world.splits["train"], pairs):
        if some:
            samples[p] = Counter(tuple(other) for _, _, other in some)
    if each == 1:
        world.real = world.data = [{y: 1.0 for y in list(real)[:1]} for real in world.real]
        for p, some in zip(world.splits["train"], pairs):
            if some:
                world.real[p] = world.data[p] = {tuple(some[0][1]): 1.0}
        world.splits = {"train": [p for p, some in zip(world.splits["train"], pairs) if some]}
    prompts = min(PAIRS // each, len(world.splits["train"]))
    config = replace(stage.config, batch_size=prompts * stage.config.negatives)
    began = time.process_time()
    responses = self_play_responses(world, samples, stage.policy, config)
    one_pass = time.process_time() - began
    stage = replace(stage, world=world, config=config, responses=responses)
    return lambda: step_seconds(stage, 8) / (prompts * each) + one_pass / iteration


def main(quick):
    import datasets
    import transformers
    import trl
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, trl {trl.__version__}")
    _, stage = stages(1, **(QUICK if quick else {}) | SETTINGS)
    world, config = stage.world, stage.config
    iteration = config.steps * 4 * PAIRS  # a default step compares 1024 pairs
    model = gpt2(stage.policy, world.end_token)
    words = tokenizer(stage.policy.config.vocab_size, world.end_token)
    pairs = pairs_of(world, config, train.sample_responses(stage.policy, world, config, 0))
    for title, some in [("all pairs", pairs), ("one pair of each prompt", one_pair_each(pairs))]:
        rows = sum(some, [])
        seconds = in_turns({"ours": ours(stage, some, iteration),
                            "TRL": dpo_trainer(model, rows, words, config.lam, iteration),
                            "careful loop": careful(model, rows, config.lam, iteration)},
                           1 if quick else 5)
        head(title, "pairs a CPU second", "ours / this")
        for name, each in seconds.items():
            row(name, show(1 / each), show(each / seconds["ours"]))


if __name__ == "__main__":
    main("--quick" in sys.argv)
