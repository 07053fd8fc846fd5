"""Reading a world: JSON lines in, validated rows out, and the finite SFT set drawn from them.

Reading order: `InputError` → `check_row` → `parse_lines` → `read_world` → `sample_sft`.
Whatever is wrong with a file is an InputError that says file, line and reason.
"""
import difflib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

WORLD = Path(__file__).parent / "world.jsonl"


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line: what, where, how to mend."""
    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


def nearest(word, known) -> str:
    """"; did you mean …?" for a misspelt word, or nothing."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], 1, 0.67)
    return f"; did you mean {close[0]}?" if close else ""


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
