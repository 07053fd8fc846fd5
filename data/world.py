"""A world: prompts with every response they may get, read from a file, checked and tokenized.

    {"family": "die", "prompt": "Roll a die with 2 sides.", "responses": {"1": 0.5, "2": 0.5},
     "split": "train"}                                   one row of JSON for each prompt

Plain pairs {"prompt": …, "response": …} are read too, and Alpaca, Dolly and chat rows as such pairs
(data/foreign.py); p_data is then known only by its samples.
Whatever is wrong with a file is an InputError that says file, line and reason.

Reading order: `check_row` → `parse_lines` → `read_world` → `hold_out` → `sample_sft` → `World`.
"""
import hashlib
import json
import math
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from data.errors import InputError
from data.foreign import EXAMPLE, KEYS, as_row, misspelt, no_row, read_text
from data.tokenizer import END, frame

WORLD = Path(__file__).parent / "world.jsonl"


# --- one row -------------------------------------------------------------------------------------

def check_row(row) -> str | None:
    """Return what is wrong with one parsed line, in words, or None."""
    if not isinstance(row, dict):
        return f"expected an object, not {json.dumps(row)[:60]}; {EXAMPLE}"
    if wrong := misspelt(row):
        return wrong
    found = "the keys here are " + (", ".join(map(repr, row)) or "none")[:200]
    if not isinstance(row.get("prompt"), str):
        return f'expected an object with a text "prompt"; {found}; {EXAMPLE}'
    if not row["prompt"].strip():
        return "the prompt is empty"
    if row.get("split", "train") not in ("train", "heldout"):
        return f'split is {row["split"]!r}; use "train" or "heldout"'
    if not isinstance(row.get("family", ""), str):
        return "family is not a text"
    if ("response" in row) == ("responses" in row):
        return f'give "response": a text, or "responses": {{text: probability}}; {found}'
    if "response" in row and not isinstance(row["response"], str):
        return (f'the response is not a text but {json.dumps(row["response"])[:60]}; put a text in '
                f'quotes, or one of several in each row')
    responses = row.get("responses", {row.get("response"): 1.0})
    if not isinstance(responses, dict) or not responses:
        return '"responses" must map at least one response to its probability'
    for text, p in responses.items():
        if not isinstance(text, str) or not text.strip():
            return "a response is empty or not a text"
        if type(p) not in (int, float) or not 0 < p <= 1 + 1e-6:  # also refuses NaN and true
            return f"the probability of {text!r} is {p!r}; it must be a number in (0, 1]"
    total = math.fsum(responses.values())
    if abs(total - 1) > 1e-6:
        return f"the probabilities sum to {total:.7g}, not to 1 within 1e-6"
    return None


def once(pairs) -> dict:
    """A JSON object that gives no name twice: json would keep the last and say nothing."""
    named = dict(pairs)
    if len(named) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r} is given twice")
    return named


# --- one file ------------------------------------------------------------------------------------

def parse_lines(path) -> list[tuple[int, dict]]:
    """Read JSON lines as (line number, row); raise InputError with file, line, reason."""
    rows, text = [], read_text(path)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            what = f"not a JSON object ({error})" if rows else no_row(text, error, path)
            raise InputError(f"{path}:{number}: {what}") from None
        try:
            json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
            if isinstance(row, dict):
                row = as_row(row)
            elif not rows:
                raise ValueError(no_row(text, f"it is {json.dumps(row)[:60]}", path))
            wrong = check_row(row)
        except (ValueError, RecursionError) as error:
            wrong = str(error)
        if wrong:
            raise InputError(f"{path}:{number}: {wrong}")
        rows.append((number, row))
    return rows


def read_world(path=WORLD) -> list[dict]:
    """Read a world, or plain {"prompt", "response"} pairs, whose p_data is then empirical.

    Returns rows as in the header, in file order; those from pairs also carry "counts". Prints which
    keys it does not use. Raises InputError naming file, line and reason.
    """
    world, first_of, unused = {}, {}, {}
    for number, row in parse_lines(path):
        x, split = row["prompt"], row.get("split", "train")
        if x in world and ("responses" in row or "responses" in world[x]):
            raise InputError(f"{path}:{number}: prompt {x!r} stands on an earlier line already, "
                             f"line {world[x]['line']}")
        entry = world.setdefault(x, {"family": row.get("family", "all"), "prompt": x,
                                     "line": number, "split": split, "counts": Counter()})
        first = first_of.setdefault(essence(x), entry)
        if first["split"] != split:
            but = "" if first["prompt"] == x else ", but for white space or Unicode form"
            raise InputError(f"{path}:{number}: prompt {x!r} is in both splits{but}: line "
                             f"{first['line']} is {first['split']}, this one {split}")
        if "responses" in row:
            total = math.fsum(row["responses"].values())
            entry["responses"] = {y: p / total for y, p in row["responses"].items()}
        else:
            entry["counts"][row["response"]] += 1
        unused |= {key: number for key in row if key not in KEYS and key not in unused}
    for entry in world.values():
        counts = entry.pop("counts")
        if counts:
            entry |= {"counts": counts,
                      "responses": {y: c / counts.total() for y, c in counts.items()}}
    if not any(entry["split"] == "train" for entry in world.values()):
        raise InputError(f"{path}: no row of split train, so there is nothing to learn from")
    if unused:
        names = ", ".join(f"{key!r} (first on line {line})" for key, line in unused.items())
        print(f"{path}: these keys are ignored: {names[:400]}")
    return list(world.values())


def essence(prompt: str) -> str:
    """What a prompt shares with those that look the same: NFC, single blanks, nothing invisible.

    >>> essence(" Cafe\\u0301\\u00a0 au lait ") == essence("Caf\\u00e9 au lait")
    True
    """
    normal = unicodedata.normalize("NFC", prompt)
    visible = "".join(c for c in normal if unicodedata.category(c) != "Cf")
    return " ".join(visible.split())


def hold_out(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Rows with a share of the train prompts moved to the split heldout.

    Which ones depends on the seed and on the prompts, not on their order. At least one prompt moves
    and at least one stays; prompts that look the same stay together.
    """
    digest = lambda x: hashlib.sha256(f"{seed} {x}".encode()).digest()
    train = sorted({essence(row["prompt"]) for row in rows if row["split"] == "train"}, key=digest)
    if len(train) < 2:
        raise InputError("there is only one train prompt, so none can be held out")
    moved = set(train[:min(max(1, round(share * len(train))), len(train) - 1)])
    return [row | {"split": "heldout"} if essence(row["prompt"]) in moved else row for row in rows]


# --- its tokens ----------------------------------------------------------------------------------

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

    From here on a response is a sequence of tokens. Only the one that the tokenizer makes of a text
    has p_data; any other spelling of the same text counts as wrong.

    prompts[p]    tokens of prompt p, closed by ANSWER
    data[p]       {response tokens, closed by END: p_data(y|x)}
    real[p]       {response tokens: its share among the prompt's responses in the SFT set}
    splits        {"train": [p, …], "heldout": [p, …]}; heldout only if there is any
    """
    def __init__(self, rows, encoding, sft_samples, seed, block_size):
        self.rows, self.encoding = rows, encoding
        self.empirical = any("counts" in row for row in rows)  # p_data known by its samples alone
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
        lengths = [len(prompt) + max(map(len, responses))
                   for prompt, responses in zip(self.prompts, self.data)]
        long, longest = sum(n > block_size for n in lengths), max(lengths)
        if long:
            row = self.rows[lengths.index(longest)]
            x = row["prompt"] if len(row["prompt"]) < 60 else row["prompt"][:59] + "…"
            raise InputError(f"{long} of {len(lengths)} rows exceed {block_size} tokens; longest "
                             f"{longest}, line {row['line']}: --block-size {longest} would hold it "
                             f"(its prompt {x!r} and longest response are {longest} tokens; the "
                             f"--block-size is {block_size}, or that of the model in --init)")

    def shown(self) -> list[int]:
        """Four prompts to look at: one of each family, held-out ones first, of few responses."""
        first_of_family = {}
        for p in sorted(range(len(self.rows)), key=lambda p: self.rows[p]["split"] == "train"):
            if len(self.rows[p]["responses"]) <= 6:
                first_of_family.setdefault(self.rows[p]["family"], p)
        return list(dict.fromkeys([*first_of_family.values(), *range(len(self.rows))]))[:4]
