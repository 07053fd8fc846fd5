"""The same work by other people's code; a part of tests/bench/train.py (`--parts peers`).

TRL           trl.SFTTrainer and trl.DPOTrainer, whose loss is SPIN's for given pairs. Set up for
              speed: no logging, saving, evaluation, gradient checkpointing or worker processes,
              fused AdamW, padding to the longest of a batch, the opponent's log-probs kept.
careful loop  What a good engineer writes on Hugging Face's GPT-2: rows of like length in four
              groups, no mask (padding stands on the right, where a causal model does not look),
              the head on response tokens only, the opponent's log-probs kept, fused AdamW.

Both train a GPT-2 of our sizes with our weights p_0 on iteration 1's responses, 128 examples or 256
pairs a step, one row for each. An example is a response of the SFT set; a pair is a real and a
generated response to one prompt. Our step stands for sft_samples examples, or for as many pairs as
it has generated responses, for each of its prompts. We run in three ways:

32 prompts    … in a step: 4096 examples or 1024 pairs;
same number   1 prompt with 128 examples, or 8 prompts with 32 generated responses each;
no repeats    1 example or 1 pair for each prompt, and the two responses of a pair differ: what is
              gained from responses that come more than once is gone. The careful loop has the
              same pairs here.

Here the SFT set has 128 responses to each prompt, and the opponent gives 32. Its log-probs of all
responses are counted too, spread over the pairs of an iteration. Reading order: the material →
`gpt2` → `careful` → `sft_trainer`, `dpo_trainer` → `ours` →
`peer_tables`. Dimensions: B rows in a batch, T tokens, N scored tokens or rows, V vocabulary.
"""
import copy
import io
import os
import random
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
CACHE = tempfile.TemporaryDirectory()  # log-probs kept by an earlier run must not be found
os.environ["HF_HOME"] = CACHE.name
warnings.simplefilter("ignore", FutureWarning)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train  # noqa: E402
from bench.baseline import pad  # noqa: E402
from bench.measure import cpu_seconds, head, in_turns, row, show  # noqa: E402
from bench.steps import fit_now, material, step_seconds  # noqa: E402
from data.responses import all_logps, self_play_responses, sft_responses  # noqa: E402

EXAMPLES, PAIRS = 128, 256  # in a step of theirs
SETTINGS = dict(sft_samples=128, negatives=32, batch_size=1024)


# --- the material --------------------------------------------------------------------------------

def examples_of(world, config) -> list[list[tuple]]:
    """For each training prompt, its examples (x, y) in random order, repeated as in the SFT set."""
    rng, found = random.Random(0), []
    for p in world.splits["train"]:
        some = [(world.prompts[p], list(y)) for y, share in world.real[p].items()
                for _ in range(round(share * config.sft_samples))]
        rng.shuffle(some)
        found.append(some)
    return found


def pairs_of(world, examples, samples) -> list[list[tuple]]:
    """For each training prompt, pairs (x, y, y'), as many as p_0 gave responses to it."""
    rng, found = random.Random(0), []
    for p, some in zip(world.splits["train"], examples):
        generated = [list(y) for y in samples[p].elements()]
        rng.shuffle(generated)
        found.append([(x, y, other) for (x, y), other in zip(some, generated)])
    return found


def one_pair_each(pairs) -> list[tuple]:
    """Of each prompt, the first pair whose two responses differ, if there is one."""
    firsts = [[pair for pair in some if pair[1] != pair[2]][:1] for some in pairs]
    return [pair for first in firsts for pair in first]


# --- a careful loop ------------------------------------------------------------------------------

def gpt2(player, end_token):
    """Hugging Face's GPT-2 with our weights; checked to be the same function."""
    import transformers
    ours = player.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=ours.vocab_size, n_positions=ours.block_size, n_embd=ours.n_embd,
        n_layer=ours.n_layer, n_head=ours.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=end_token, eos_token_id=end_token, pad_token_id=0))
    weights = {f"transformer.{name}": value.T if value.dim() == 2 and name.startswith("h.") else
               value for name, value in player.state_dict().items()}  # its Conv1D is transposed
    missing, unknown = theirs.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    theirs.tie_weights()
    tokens_BT = torch.randint(ours.vocab_size, (4, 9))
    with torch.no_grad():
        gap = (player(tokens_BT) - theirs(tokens_BT).logits).abs().max()
    assert gap < 1e-4, gap
    return theirs


def hf_logps(model, rows, groups=4):
    """log p(y|x) of [(x, y)], summed over the response. [N], nats."""
    found, order = [], sorted(range(len(rows)), key=lambda n: sum(map(len, rows[n])))
    for part in torch.tensor(order).chunk(groups):
        chosen = [rows[n] for n in part.tolist()]
        tokens_BT = pad([x + y for x, y in chosen]).clamp(min=0)
        label_BT = pad([[-1] * len(x) + y for x, y in chosen])[:, 1:]
        hidden_BTD = model.transformer(tokens_BT[:, :-1], use_cache=False).last_hidden_state
        scored_BT = label_BT >= 0
        logits_NV = hidden_BTD[scored_BT] @ model.lm_head.weight.T
        logp_N = -F.cross_entropy(logits_NV, label_BT[scored_BT], reduction="none")
        row_N = scored_BT.nonzero()[:, 0]
        found.append(logp_N.new_zeros(len(chosen)).index_add(0, row_N, logp_N))
    return torch.cat(found)[torch.tensor(order).argsort()]


def careful(model, rows, lam, batch, opponent_N=None):
    """A function that trains one step and returns CPU seconds an item.

    SFT on rows (x, y); or SPIN on rows (x, y, y'), where opponent_N holds log p_t of all y, then
    of all y'.
    """
    model, rng = copy.deepcopy(model).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def step():
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
    return lambda: cpu_seconds(step) / batch


@torch.no_grad()
def careful_pass(model, rows):
    """log p_t of all real, then of all generated responses."""
    both = [(x, y) for x, y, _ in rows] + [(x, other) for x, _, other in rows]
    return torch.cat([hf_logps(model, both[n:n + 2048]) for n in range(0, len(both), 2048)])


# --- TRL -----------------------------------------------------------------------------------------

def tokenizer(V, end_token):
    """Writes token 17 as "17", so that the trainers' own tokenization gives our tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, "0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0",
                                                eos_token=str(end_token))


def arguments(kind, batch, **more):
    return kind(output_dir=CACHE.name, per_device_train_batch_size=batch, use_cpu=True, bf16=False,
                gradient_checkpointing=False, report_to="none", save_strategy="no",
                logging_strategy="no", eval_strategy="no", dataloader_num_workers=0,
                dataloader_pin_memory=False, disable_tqdm=True, optim="adamw_torch_fused",
                lr_scheduler_type="constant", learning_rate=1e-3, max_steps=5, **more)


def trainer_turn(trainer, batch):
    """A function that trains five steps and returns CPU seconds an item, start-up left out."""
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.process_time())
    times = []
    trainer.add_callback(Watch())

    def turn():
        times.clear()
        with redirect_stdout(io.StringIO()):  # its summary
            trainer.train()
        return (times[-1] - times[0]) / (len(times) - 1) / batch
    return turn


def sft_trainer(model, rows, words):
    import datasets
    import trl
    data = datasets.Dataset.from_dict({"input_ids": [x + y for x, y in rows],
                                       "labels": [[-100] * len(x) + y for x, y in rows]})
    return trainer_turn(trl.SFTTrainer(
        copy.deepcopy(model), train_dataset=data, processing_class=words,
        args=arguments(trl.SFTConfig, EXAMPLES, max_length=None,
                       dataset_kwargs={"skip_prepare_dataset": True})), EXAMPLES)


def dpo_trainer(model, rows, words, lam):
    """(a turn, CPU seconds of the opponent's pass over all pairs)."""
    import datasets
    import trl
    text = lambda tokens: " ".join(map(str, tokens))
    data = datasets.Dataset.from_list([
        {"prompt": text(x), "chosen": " " + text(y), "rejected": " " + text(other)}
        for x, y, other in rows])
    seconds, plain = [], trl.DPOTrainer._precompute_ref_logps

    def timed(*args):
        start = time.process_time()
        found = plain(*args)
        seconds.append(time.process_time() - start)
        return found
    with patch.object(trl.DPOTrainer, "_precompute_ref_logps", timed):
        trainer = trl.DPOTrainer(
            copy.deepcopy(model), train_dataset=data, processing_class=words,
            args=arguments(trl.DPOConfig, PAIRS, beta=lam, max_length=None,
                           precompute_ref_log_probs=True))
    return trainer_turn(trainer, PAIRS), sum(seconds)


# --- ours ----------------------------------------------------------------------------------------

def without_repeats(stage, rows):
    """The stage on a world in which each training prompt has one example, or one pair, of rows."""
    world, rows_of = copy.copy(stage.world), {tuple(x): rest for x, *rest in rows}
    chosen = [rows_of.get(tuple(x)) for x in world.prompts]
    world.real = world.data = [{tuple(y[0]): 1.0} if y else {(world.end_token,): 1.0}
                               for y in chosen]
    world.splits = {"train": [p for p, y in enumerate(chosen) if y]}
    if stage.t == 0:
        return replace(stage, world=world, responses=sft_responses(world))
    samples = [Counter([tuple(y[1])]) if y else Counter() for y in chosen]
    responses = self_play_responses(world, samples, None,
                                    lambda trees: all_logps(stage.player, trees))
    return replace(stage, world=world, responses=responses)


def ours(stage, prompts, items):
    """A function that trains some steps on `prompts` prompts each; CPU seconds an item."""
    config = replace(stage.config, batch_size=prompts * stage.config.negatives)
    stage = replace(stage, config=config)
    one_pass = 0.0
    if stage.t:
        one_pass = cpu_seconds(lambda: all_logps(stage.player, stage.responses.trees))
    spread = one_pass / (config.steps * SETTINGS["batch_size"])
    return lambda: step_seconds(fit_now, stage, 8) / items + spread


def our_ways(stage, single):
    each = stage.config.negatives if stage.t else stage.config.sft_samples
    many = stage.config.prompts_a_step()
    same = max(1, (PAIRS if stage.t else EXAMPLES) // each)
    few = min(len(single), PAIRS if stage.t else EXAMPLES)
    return {"ours, 32 prompts": ours(stage, many, many * each),
            "ours, same number": ours(stage, same, same * each),
            "ours, no repeats": ours(without_repeats(stage, single), few, few)}


# --- the tables ----------------------------------------------------------------------------------

def print_rates(work, unit, contenders, rounds):
    """A line for each; the last column says how many times as fast ours is, in each way."""
    seconds = in_turns(contenders, rounds)
    for name, each in seconds.items():
        times = [each / seconds[own] for own in seconds if own.startswith("ours")]
        row(work, name, f"{show(1 / each)} {unit}", " / ".join(f"{x:.3g}" for x in times))


def peer_tables(quick):
    import datasets
    import transformers
    import trl
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    rounds = 1 if quick else 5
    sft, spin = material(quick, iters=1, **SETTINGS)
    world, config, lam = spin.world, spin.config, spin.config.lam
    examples = examples_of(world, config)
    samples = train.sample_responses(spin.player, world, config, 0)
    pairs = pairs_of(world, examples, samples)
    one_example, one_pair = [some[0] for some in examples], one_pair_each(pairs)
    examples, pairs = sum(examples, []), sum(pairs, [])
    model = gpt2(spin.player, world.end_token)
    words = tokenizer(spin.player.config.vocab_size, world.end_token)

    print(f"\ntransformers {transformers.__version__}, trl {trl.__version__}")
    head("work", "contender", "a CPU second", "ours / this: 32 prompts / same number / no repeats")
    print_rates("SFT", "examples", our_ways(sft, one_example) | {
        "TRL's SFTTrainer": sft_trainer(model, examples, words),
        "careful loop": careful(model, examples, lam, EXAMPLES),
        "careful loop, no repeats": careful(model, one_example, lam, EXAMPLES)}, rounds)

    spread = config.steps * SETTINGS["batch_size"]
    trl_turn, trl_pass = dpo_trainer(model, pairs, words, lam)
    found = SimpleNamespace()
    loop_pass = cpu_seconds(lambda: setattr(found, "opponent_N", careful_pass(model, pairs)))
    loop = careful(model, pairs, lam, PAIRS, found.opponent_N)
    loop_once = careful(model, one_pair, lam, PAIRS, careful_pass(model, one_pair))
    print_rates("SPIN", "pairs", our_ways(spin, one_pair) | {
        "TRL's DPOTrainer": lambda: trl_turn() + trl_pass / spread,
        "careful loop": lambda: loop() + loop_pass / spread,
        "careful loop, no repeats": lambda: loop_once() + loop_pass / spread}, rounds)
