"""A world: prompts with every response they may get, read from a file, checked and tokenized.

    {"family": "die", "prompt": "Roll a die with 2 sides.", "responses": {"1": 0.5, "2": 0.5},
     "split": "train"}                                   one row of JSON for each prompt

Plain pairs {"prompt": …, "response": …} are read too; p_data is then known only by its samples.
Whatever is wrong with a file is an InputError that says file, line and reason.

Reading order: `check_row` → `parse_lines` → `read_world` → `sample_sft` → `World`.
"""
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from data.errors import InputError
from data.tokenizer import END, frame

WORLD = Path(__file__).parent / "world.jsonl"


def check_row(row) -> str | None:
    """Return what is wrong with one parsed line, in words, or None."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        return 'expected an object with a text "prompt"'
    if not row["prompt"].strip():
        return "the prompt is empty"
    if row.get("split", "train") not in ("train", "heldout"):
        return f'split is {row["split"]!r}; use "train" or "heldout"'
    if not isinstance(row.get("family", ""), str):
        return "family is not a text"
    if ("response" in row) == ("responses" in row):
        return 'give either "responses": {answer: probability} or "response": answer'
    if "response" in row and not isinstance(row["response"], str):
        return "the response is not a text"
    answers = row.get("responses", {row.get("response"): 1.0})
    if not isinstance(answers, dict) or not answers:
        return '"responses" must map at least one answer to its probability'
    for text, p in answers.items():
        if not isinstance(text, str) or not text.strip():
            return "a response is empty or not a text"
        if type(p) not in (int, float) or not 0 < p <= 1 + 1e-6:  # also refuses NaN and true
            return f"the probability of {text!r} is {p!r}; it must be a number in (0, 1]"
    if abs(math.fsum(answers.values()) - 1) > 1e-6:
        return f"the probabilities sum to {math.fsum(answers.values()):.7g}, not to 1 within 1e-6"
    return None


def once(pairs) -> dict:
    """A JSON object that gives no name twice: json would keep the last and say nothing."""
    named = dict(pairs)
    if len(named) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r} is given twice")
    return named


def parse_lines(path) -> list[tuple[int, dict]]:
    """Read JSON lines as (line number, row); raise InputError with file, line, reason."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=once)
                json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not a JSON object ({error})") from None
            if wrong := check_row(row):
                raise InputError(f"{path}:{number}: {wrong}")
            rows.append((number, row))
    return rows


def read_world(path=WORLD) -> list[dict]:
    """Read a world, or plain {"prompt", "response"} pairs, whose p_data is then empirical.

    Returns rows as in the header, in file order; those from pairs also carry "counts".
    Raises InputError naming file, line and reason, before anything is trained.
    """
    world = {}
    for number, row in parse_lines(path):
        x, split = row["prompt"], row.get("split", "train")
        if x in world and ("responses" in row or "responses" in world[x]):
            raise InputError(f"{path}:{number}: prompt {x!r} stands on an earlier line already")
        entry = world.setdefault(x, {"family": row.get("family", "all"), "prompt": x,
                                     "line": number, "split": split, "counts": Counter()})
        if entry["split"] != split:
            raise InputError(f"{path}:{number}: prompt {x!r} is in both splits")
        if "responses" in row:
            total = math.fsum(row["responses"].values())
            entry["responses"] = {y: p / total for y, p in row["responses"].items()}
        else:
            entry["counts"][row["response"]] += 1
    for entry in world.values():
        counts = entry.pop("counts")
        if counts:
            entry |= {"counts": counts,
                      "responses": {y: c / counts.total() for y, c in counts.items()}}
    if not any(entry["split"] == "train" for entry in world.values()):
        raise InputError(f"{path}: no row of split train, so there is nothing to learn from")
    return list(world.values())


def sample_sft(world: list[dict], n: int, seed: int) -> list[dict[str, int]]:
    """Draw the finite SFT set: n i.i.d. responses y ~ p_data(·|x) a training prompt.

    Returns {response: count} for each row, {} for held-out ones. Plain pairs are the set.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for row in world:
        p = np.array(list(row["responses"].values()))
        counts = row.get("counts") or dict(zip(row["responses"], rng.multinomial(n, p / p.sum())))
        drawn.append({y: int(c) for y, c in counts.items() if c and row["split"] == "train"})
    return drawn


class World:
    """The rows of a world as tokens, and the finite SFT set drawn from them.

    prompts[p]    tokens of prompt p, closed by ANSWER
    data[p]       {response tokens, closed by END: p_data(y|x)}
    real[p]       {response tokens: its share among the prompt's responses in the SFT set}
    splits        {"train": [p, …], "heldout": [p, …]}; heldout only if there is any
    """
    def __init__(self, rows, encoding, sft_samples, seed, block_size):
        self.rows, self.encoding = rows, encoding
        self.prompts = [frame(encoding, row["prompt"], "")[0] for row in rows]
        self.data, self.real = [], []
        for row, counts in zip(rows, sample_sft(rows, sft_samples, seed)):
            tokens = {y: tuple(frame(encoding, "", y)[1]) for y in row["responses"]}
            self.data.append({tokens[y]: p for y, p in row["responses"].items()})
            self.real.append({tokens[y]: n / sum(counts.values()) for y, n in counts.items()})
        self.end_token = encoding.encode_single_token(END)
        # Two tokens beyond the longest response: enough to see that a sample is not one of them.
        self.max_new_tokens = 2 + max(len(y) for responses in self.data for y in responses)
        self.check_lengths(block_size)
        self.splits = {"train": self.prompts_of("train"), "heldout": self.prompts_of("heldout")}
        if not self.splits["heldout"]:
            del self.splits["heldout"]

    def prompts_of(self, split) -> list[int]:
        return [p for p, row in enumerate(self.rows) if row["split"] == split]

    def check_lengths(self, block_size):
        """InputError if a prompt with its longest response does not fit the model."""
        for row, prompt, responses in zip(self.rows, self.prompts, self.data):
            longest = len(prompt) + max(map(len, responses))
            if longest > block_size:
                x = row["prompt"] if len(row["prompt"]) < 60 else row["prompt"][:59] + "…"
                raise InputError(f"line {row['line']}: prompt {x!r} and its longest response are "
                                 f"{longest} tokens, the model's --block-size is {block_size}: "
                                 f"raise it, or shorten the row")

    def shown(self) -> list[int]:
        """Four prompts to look at: one of each family, held-out ones first, of few responses."""
        first_of_family = {}
        for p in sorted(range(len(self.rows)), key=lambda p: self.rows[p]["split"] == "train"):
            if len(self.rows[p]["responses"]) <= 6:
                first_of_family.setdefault(self.rows[p]["family"], p)
        return list(dict.fromkeys([*first_of_family.values(), *range(len(self.rows))]))[:4]
