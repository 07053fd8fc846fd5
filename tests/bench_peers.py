"""The same work through TRL and Hugging Face's GPT-2; a part of tests/bench_train.py (--peer trl).

Everything is built from local objects: a GPT-2 of the same sizes with our weights, and a word-level
tokenizer that writes token 17 as "17", so that the trainers' own tokenization gives our tokens.
The trainers are set up for speed: no logging, saving, evaluation, gradient checkpointing or worker
processes, float32, fused AdamW, constant rate, padding to the longest of a batch.

An example is one response of the SFT set, a pair one real and one generated response of a prompt:
a peer's step takes 128 examples or 256 pairs, shuffled over all prompts. Ours runs three ways:
  default       its own step: whole prompts, equal rows merged, 4096 examples or 1024 pairs;
  same number   the same with 1 prompt × 128 examples, or 8 prompts × 32 generated responses;
  no merging    one example, or one pair, for each of 128, or of all training prompts: no draw is
                repeated, so neither merging nor shared prompts save anything. Rows like theirs.
The third contender is the careful loop of bench_careful.py. A pass of the opponent over the 32
pairs of each training prompt is spread over the pairs of an iteration (300 × 1024), as for ours; a
reference in the loop is paid at each step.

Reading order: `arguments` → `trainer_turn` → `sft_trainer`, `dpo_trainer` → `ours` → `peer_tables`.
"""
import copy
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
CACHE = tempfile.TemporaryDirectory()  # precomputed log-probs must not come from an earlier run
os.environ["HF_HOME"] = CACHE.name
warnings.simplefilter("ignore", FutureWarning)
import torch
try:
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers
except ImportError as error:
    print(f"bench_train.py: --peer trl needs transformers and trl ({error})", file=sys.stderr)
    sys.exit(2)

import train
from bench_train import ask, ratio, requests, row, show, stepper
from bench_careful import careful, careful_pass, draws, gpt2, pairs
from data.responses import Responses, answer_logps

EXAMPLES, PAIRS = 128, 256  # a step
datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()


# --- TRL ------------------------------------------------------------------------------------------

def tokenizer(m):
    words = Tokenizer(models.WordLevel({str(i): i for i in range(m.player.config.vocab_size)}, "0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0",
                                                eos_token=str(m.world.end_token))


class Watch(transformers.TrainerCallback):
    """Notes the time at the end of each step."""
    def __init__(self):
        self.times = []

    def on_step_end(self, *_, **__):
        self.times.append(time.process_time())


def arguments(kind, batch, **more):
    return kind(output_dir=CACHE.name, per_device_train_batch_size=batch, use_cpu=True, bf16=False,
                gradient_checkpointing=False, report_to="none", save_strategy="no",
                logging_strategy="no", eval_strategy="no", dataloader_num_workers=0,
                dataloader_pin_memory=False, disable_tqdm=True, optim="adamw_torch_fused",
                lr_scheduler_type="constant", learning_rate=1e-3, max_steps=5, **more)


def trainer_turn(trainer, batch):
    """A function that trains for a few steps and returns CPU seconds an item, start-up left out."""
    watch = Watch()
    trainer.add_callback(watch)

    def turn():
        watch.times.clear()
        with redirect_stdout(io.StringIO()):  # its summary
            trainer.train()
        return (watch.times[-1] - watch.times[0]) / (len(watch.times) - 1) / batch
    return turn


def sft_trainer(m, model):
    rows = draws(m, m.sft_draws, "real_N")
    data = datasets.Dataset.from_dict({"input_ids": [x + y for x, y in rows],
                                       "labels": [[-100] * len(x) + y for x, y in rows]})
    return trainer_turn(trl.SFTTrainer(
        copy.deepcopy(model), train_dataset=data, processing_class=tokenizer(m),
        args=arguments(trl.SFTConfig, EXAMPLES, max_length=None,
                       dataset_kwargs={"skip_prepare_dataset": True})), EXAMPLES)


def dpo_trainer(m, model, precompute):
    """(a turn, CPU seconds of the reference's pass over all pairs)."""
    words = lambda tokens: " ".join(map(str, tokens))
    data = datasets.Dataset.from_list([
        {"prompt": words(x), "chosen": " " + words(y), "rejected": " " + words(other)}
        for x, y, other in pairs(m)])
    seconds, plain = [0.0], trl.DPOTrainer._precompute_ref_logps

    def timed(*args):
        start = time.process_time()
        found = plain(*args)
        seconds[0] = time.process_time() - start
        return found
    with patch.object(trl.DPOTrainer, "_precompute_ref_logps", timed):
        trainer = trl.DPOTrainer(
            copy.deepcopy(model), None if precompute else copy.deepcopy(model),
            train_dataset=data, processing_class=tokenizer(m),
            args=arguments(trl.DPOConfig, PAIRS, beta=m.config.lam, max_length=None,
                           precompute_ref_log_probs=precompute))
    return trainer_turn(trainer, PAIRS), seconds[0]


# --- ours ----------------------------------------------------------------------------------------

def one_draw(table):
    """Of an unmerged table, the first real and the first generated row of each prompt."""
    keys = list(zip(table.prompt_N.tolist(), (table.real_N > 0).tolist()))
    n_M = torch.tensor(sorted({key: n for n, key in reversed(list(enumerate(keys)))}.values()))
    part = {name: value[n_M] if name.endswith(("_N", "_NS")) else value
            for name, value in vars(table).items()}
    shares = {name: (part[name] > 0).float() for name in ("real_N", "generated_N", "negative_N")}
    return Responses(**part | shares | {"support_PK": torch.full_like(part["support_PK"], -1)})


def ours(m, t, prompts, table, items):
    """A turn of our `fit` on some prompts a step, which stand for some examples or pairs."""
    config = replace(m.config, batch_size=prompts * m.config.negatives, steps=1000, sft_steps=1000)
    step, opponent = stepper(answer_logps, table, config, m.world.splits["train"], t, m.player,
                             m.player)
    start = time.process_time()
    if t:
        opponent()
    share = (time.process_time() - start) / (m.config.steps * m.config.batch_size)

    def turn():
        start = time.process_time()
        step()
        return (time.process_time() - start) / items + share
    return turn


def our_turns(m, t):
    table, unmerged = (m.spin, m.spin_draws) if t else (m.sft, m.sft_draws)
    each = m.config.negatives if t else m.config.sft_samples
    default, same = train.prompts_a_step(m.config), max(1, (PAIRS if t else EXAMPLES) // each)
    single = min(PAIRS if t else EXAMPLES, len(m.world.splits["train"]))
    return {"ours, default": ours(m, t, default, table, default * each),
            "ours, same number": ours(m, t, same, table, same * each),
            "ours, no merging": ours(m, t, single, one_draw(unmerged), single)}


# --- the table -----------------------------------------------------------------------------------

def alternate(turns, rounds):
    """{name: CPU seconds an item} of each turn, in turns, after one that does not count."""
    found = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            found[name].append(turn())
    return {name: times[1:] for name, times in found.items()}


def hf_generate(m, model, prompts):
    """A turn of `generate`: padding on the left, and a mask, as it wants; (turn, its answers)."""
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([[0] * (longest - len(x)) + x for x in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts])

    def turn():
        start = time.process_time()
        model.eval().generate(tokens_BT, attention_mask=mask_BT, do_sample=True, top_k=0,
                              top_p=1.0, max_new_tokens=m.world.max_new_tokens)
        return (time.process_time() - start) / len(prompts)
    return turn


def print_turns(work, unit, turns, rounds):
    times = alternate(turns, rounds)
    for name, seconds in times.items():
        mine = [ratio(seconds, times[own]) for own in times if own.startswith("ours")]
        row(work, name, f"{show(1 / statistics.median(seconds))} {unit}",
            " / ".join(f"{x:.3g}" for x in mine))


def peer_tables(m, rounds):
    """Ours and theirs in turns; the last column is how many times faster ours is, for each way."""
    model, rows = gpt2(m), pairs(m)
    print(f"\ntransformers {transformers.__version__}, trl {trl.__version__}, one thread, float32")
    row("work", "contender", "a CPU second", "ours / this: default / same number / no merging")
    row(*["---"] * 4)
    examples = draws(m, m.sft_draws, "real_N")
    print_turns("SFT", "examples", our_turns(m, 0) | {
        "TRL SFTTrainer": sft_trainer(m, model),
        "careful loop": careful(model, examples, m.config.lam, EXAMPLES)}, rounds)
    (kept, kept_s), (loop, _) = dpo_trainer(m, model, True), dpo_trainer(m, model, False)
    opponent_N, pass_s = careful_pass(model, rows)
    mine = careful(model, rows, m.config.lam, PAIRS, opponent_N)
    spread = m.config.steps * m.config.batch_size
    print_turns("SPIN", "pairs", our_turns(m, 1) | {
        "TRL DPOTrainer, reference kept": lambda: kept() + kept_s / spread,
        "TRL DPOTrainer, reference in the loop": loop,
        "careful loop": lambda: mine() + pass_s / spread}, rounds)
    for asked, prompts in requests(m).items():
        def own():
            start = time.process_time()
            ask(m, "shipped", prompts)
            return (time.process_time() - start) / len(prompts)
        print_turns(f"generation, {asked}", "responses", {
            "ours": own, "HF generate": hf_generate(m, model, prompts)}, rounds)
