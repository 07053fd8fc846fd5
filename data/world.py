"""A world: prompts with every response they may get, read from a file, checked and tokenized.

    {"family": "dice", "prompt": "Roll a die with 2 sides.", "responses": {"1": 0.5, "2": 0.5},
     "split": "train"}

One row of JSON is one prompt x with p_data(y|x) of each response y; "family" and "split" may be
left out. A file of one's own may have rows of other forms, whose p_data is then known only by its
samples:

    {"prompt": "…", "response": "…"}
    {"instruction": "…", "input": "…", "output": "…"}                                    Alpaca
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

The rows stand one a line, or in one JSON array. Whatever is wrong with a file is an InputError that
says file, line and reason.

Reading order: one row: `as_pair`, `check_row` → one file: `parse_rows`, `read_world` and its
checks, `hold_out` → its tokens: `sample_sft`, `World`.
"""
import difflib
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from data import InputError
from data.tokenizer import END, frame, read_text

WORLD = Path(__file__).parent / "world.jsonl"
EXAMPLE = '{"prompt": "…", "response": "…"} (or "responses": {"…": 1.0})'
KEYS = {"family", "prompt", "response", "responses", "split"}


# --- one row -------------------------------------------------------------------------------------

def as_pair(row):
    """A row of Alpaca or of messages as prompt and response, its other keys kept; others as is.

    >>> as_pair({"instruction": "Add.", "input": "1 2", "output": "3"})
    {'prompt': 'Add.\\n1 2', 'response': '3'}
    """
    match row:
        case {"messages": [{"role": "user", "content": str(x)},
                           {"role": "assistant", "content": str(y)}], **rest}:
            return {"prompt": x, "response": y, **rest}
        case {"instruction": str(x), "output": str(y), **rest}:
            more = rest.pop("input", "")
            return {"prompt": f"{x}\n{more}" if more else x, "response": y, **rest}
    return row


def check_row(row):
    """Raise ValueError with what is wrong with a row, in words."""
    if not isinstance(row, dict) or "prompt" not in row or (
            ("response" in row) == ("responses" in row)) or (
            not isinstance(row.get("responses", {}), dict)):
        turns = ", with one turn of the user and one of the assistant," if (
            isinstance(row, dict) and "messages" in row) else ""
        raise ValueError(f"expected a row{turns} such as {EXAMPLE}, not {json.dumps(row)[:60]}")
    if row.get("split", "train") not in ("train", "heldout"):
        raise ValueError(f'split is {row["split"]!r:.60}; use "train" or "heldout"')
    for text in (row["prompt"], *row.get("responses", [row.get("response")])):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the prompt or a response is empty or not a text: "
                             f"{json.dumps(text)[:60]}")
    if "responses" in row:
        check_probabilities(row["responses"])


def check_probabilities(responses):
    """Raise ValueError unless {response: p} has numbers above 0 that sum to 1."""
    for text, p in responses.items():
        if type(p) not in (int, float) or not 0 < p <= 1 + 1e-6:  # also refuses NaN and true
            raise ValueError(f"the probability of {text!r:.60} is {p!r:.60}; it must be a number "
                             f"in (0, 1]")
    total = math.fsum(responses.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the probabilities sum to {total:.7g}, not to 1 within 1e-6")


def once(pairs) -> dict:
    """A JSON object that gives no name twice: json would keep the last and say nothing."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r:.60} is given twice")
    return dict(pairs)


# --- one file ------------------------------------------------------------------------------------

def parse_rows(path):
    """Yield (line on which it begins, row) for each row, of JSON lines or of one JSON array."""
    text, decoder = read_text(path, path), json.JSONDecoder(object_pairs_hook=once)
    between = re.compile(r"[\s,\[\]]*" if text.lstrip().startswith("[") else r"[\s,]*")
    end, number = 0, 1
    while (at := between.match(text, end).end()) < len(text):
        number += text.count("\n", end, at)
        try:
            row, end = decoder.raw_decode(text, at)
            json.dumps(row, ensure_ascii=False).encode()  # refuses half of a surrogate pair
            row = as_pair(row)
            check_row(row)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg}); expected a row such as "
                             f"{EXAMPLE}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: {error}") from None
        yield number, row
        number += text.count("\n", at, end)


def read_world(path=WORLD) -> list[dict]:
    """Read a world, or pairs, whose p_data is then empirical.

    Returns one row for each prompt, as in the header, in file order and with "line"; those from
    pairs also carry "counts". Raises InputError naming file, line and reason.
    """
    rows, world = list(parse_rows(path)), {}
    check_keys(path, rows)
    check_splits(path, rows)
    for number, row in rows:
        x = row["prompt"]
        if x in world and ("responses" in row or "responses" in world[x]):
            raise InputError(f"{path}:{number}: prompt {x!r:.60} is on line {world[x]['line']} "
                             f"already; give all its responses there")
        entry = world.setdefault(x, {"family": str(row.get("family", "all")), "prompt": x,
                                     "line": number, "split": row.get("split", "train")})
        if "responses" in row:
            total = math.fsum(row["responses"].values())
            entry["responses"] = {y: p / total for y, p in row["responses"].items()}
        else:
            entry.setdefault("counts", Counter())[row["response"]] += 1
    check_one_kind(path, world.values())
    for entry in world.values():
        if counts := entry.get("counts"):
            entry["responses"] = {y: n / counts.total() for y, n in counts.items()}
    print_notices(path, world.values())
    return list(world.values())


def check_keys(path, rows):
    """InputError for a misspelt "split", which would train on held-out rows; name other keys."""
    unknown = {}
    for number, row in rows:
        for key in row:
            if key in KEYS or key in unknown:
                continue
            if difflib.get_close_matches(key.strip().lower(), ["split"], cutoff=0.8):
                raise InputError(f'{path}:{number}: unknown key {key!r:.60}; is it "split"?')
            unknown[key] = number
    if unknown:
        names = ", ".join(f"{key!r:.60} (line {number})" for key, number in unknown.items())
        print(f"{path}: these keys are ignored: {names[:400]}")


def check_splits(path, rows):
    """InputError if a prompt is in both splits, or none in train."""
    first_of = {}
    for number, row in rows:
        x, split = row["prompt"], row.get("split", "train")
        line, first, its_split = first_of.setdefault(essence(x), (number, x, split))
        if split != its_split:
            but = "" if x == first else ", but for white space or Unicode form"
            raise InputError(f"{path}:{number}: prompt {x!r:.60} is in both splits{but}: line "
                             f"{line} is {its_split}, this one {split}")
    if not any(split == "train" for _, _, split in first_of.values()):
        other = "" if rows else ", nor any other"
        raise InputError(f"{path}: no row of split train{other}, so there is nothing to learn from")


def check_one_kind(path, world):
    """InputError if p_data is known of some prompts alone: no metric could tell them apart."""
    pairs = [row["line"] for row in world if "counts" in row]
    others = [row["line"] for row in world if "counts" not in row]
    if pairs and others:
        raise InputError(f'{path}:{pairs[0]}: this row has a "response", and line {others[0]} has '
                         f'"responses"; give rows of one kind')


def print_notices(path, world):
    """Print what in a file has another effect than its writer may expect."""
    copies = sum(row["counts"].total() - len(row["counts"]) for row in world if "counts" in row)
    if copies:
        print(f"{path}: {copies} rows repeat a prompt with its response; copies weigh the "
              f"responses to one prompt, as probabilities in \"responses\" do, but each prompt "
              f"counts once")
    markers = Counter(found[0] for row in world for y in row["responses"]
                      if (found := re.search(r"(<\|\w+\|>|</s>)$", y[-40:].rstrip())))
    if markers:
        marker, n = markers.most_common(1)[0]
        print(f"{path}: {n} responses end with {marker!r}; take it off: it is learnt as plain "
              f"characters, and each response gets an end token anyway")


def essence(prompt: str) -> str:
    """What a prompt shares with those that look the same: NFC, single blanks, nothing invisible.

    >>> essence(" Cafe\\u0301\\u00a0 au lait ") == essence("Caf\\u00e9 au lait")
    True
    """
    if not prompt.isascii():
        normal = unicodedata.normalize("NFC", prompt)
        prompt = "".join(c for c in normal if unicodedata.category(c) != "Cf")
    return " ".join(prompt.split())


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
        longest = [max(map(len, responses)) for responses in self.data]
        # Two tokens beyond the longest response: enough to see that a sample is not one of them.
        self.max_new_tokens = 2 + max(longest)
        self.check_lengths(longest, block_size)
        in_split = lambda split: [p for p, row in enumerate(rows) if row["split"] == split]
        self.splits = {split: in_split(split) for split in ("train", "heldout") if in_split(split)}

    def check_lengths(self, longest, block_size):
        """InputError if a row does not fit the model; a notice if one is far longer than the rest.

        longest[p] is the number of tokens of the longest response to prompt p.
        """
        lengths = [len(prompt) + n for prompt, n in zip(self.prompts, longest)]
        most, too_long = max(lengths), sum(n > block_size for n in lengths)
        if too_long:
            line = self.rows[lengths.index(most)]["line"]
            raise InputError(f"line {line}: prompt and response are {most} tokens, but the "
                             f"--block-size is {block_size} (or that of the model in --init); it "
                             f"is too short for {too_long} of {len(lengths)} prompts, and "
                             f"--block-size {most} would hold them all")
        most, median = max(longest), sorted(longest)[len(longest) // 2]
        if most > 100 and most > 10 * median:
            line = self.rows[longest.index(most)]["line"]
            print(f"line {line}: a response of {most} tokens, while half of the prompts have none "
                  f"longer than {median}. Sampling for any prompt may go on to its length, which "
                  f"takes long; shorten it, or leave it out")

    def shown(self) -> list[int]:
        """Four prompts to look at: two of each split, of different families and few responses."""
        shown = []
        for prompts in [*self.splits.values()] * (4 // len(self.splits)):
            families = {self.rows[p]["family"] for p in shown}
            rest = [p for p in prompts if p not in shown]
            if rest:
                shown.append(min(rest, key=lambda p: (self.rows[p]["family"] in families,
                                                      len(self.rows[p]["responses"]) > 4)))
        return sorted(shown, key=lambda p: self.rows[p]["split"] != "train")
