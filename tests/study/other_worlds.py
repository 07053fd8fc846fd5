"""Other worlds for `train.py --data`; `python tests/study/other_worlds.py` writes them.

In out/worlds: town.jsonl and desk.jsonl have other families than the default world's; no default
was tuned on them. Their words are not in the tokenizer's vocabulary, so that responses are up to
three times longer in tokens; their splits and sizes differ. quarter.jsonl is the default world
with every fourth train prompt, and with all of its held-out prompts.
"""
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
from data.world import WORLD  # noqa: E402  (sys.path makes it importable)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
OPPOSITES = {"hot": "cold", "big": "small", "fast": "slow", "old": "young", "light": "dark",
             "early": "late", "happy": "sad", "rich": "poor", "wet": "dry", "open": "shut",
             "loud": "quiet", "near": "far"}
CAPITALS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo",
            "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana", "Norway": "Oslo"}


def town():
    """Weather by numbers, the calendar, opposites, and a game with a biased hand."""
    for rain in range(5, 96, 5):
        for place in ("coast", "hills"):
            yield "weather", f"Forecast for the {place}: {rain}% rain?", {
                "Rain today.": rain * 0.7, "Showers.": rain * 0.3, "Dry.": 100 - rain}
    for i, day in enumerate(DAYS):
        after, before = DAYS[(i + 1) % 7], DAYS[i - 1]
        for ask in ("Which day follows {}?", "What comes after {}?", "The day after {}, please."):
            yield "calendar", ask.format(day), {after: 5, f"It's {after}.": 3, f"{after}!": 2}
        yield "calendar", f"Which day is before {day}?", {before: 7, f"It's {before}.": 3}
    for a, b in OPPOSITES.items():
        for x, y in ((a, b), (b, a)):
            yield "opposites", f"Opposite of {x}?", {y: 6, f"not {x}": 1, f"{y}, of course": 3}
    for beats, move in (("paper", "rock"), ("scissors", "paper"), ("rock", "scissors")):
        for mood, odds in (("fair", (1, 1, 1)), ("clever", (8, 1, 1)), ("kind", (1, 8, 1))):
            rest = {"rock", "paper", "scissors"} - {beats, move}
            yield "game", f"I play {move}; be {mood}.", {
                beats: odds[0], rest.pop(): odds[1], move: odds[2]}


def desk():
    """Few prompts: capitals, spelling, lists to choose from, and yes or no with a confidence."""
    for country, capital in CAPITALS.items():
        yield "capitals", f"Capital of {country}?", {capital: 8, f"{capital}, I think": 2}
        yield "capitals", f"Where is {capital}?", {f"In {country}.": 6, country: 4}
    for word in "cab bed fig ham jug kit lip mud nod pet".split():
        yield "spelling", f"Spell {word}", {"-".join(word): 7, " ".join(word): 2, word.upper(): 1}
    for a, b, c in itertools.islice(itertools.permutations(("ink", "pen", "pad", "map"), 3), 18):
        yield "choice", f"Choose {a}, {b} or {c}", {a: 4, b: 3, c: 2, f"{a} and {b}": 1}
    for sure in range(10, 100, 10):
        yield "doubt", f"Is it so? {sure}% sure", {"Yes": sure, "No": 90 - sure * 0.9, "Hm": 10}


def rows(family_rows):
    """Normalised rows; every sixth prompt is held out, where it follows from the others at all."""
    for i, (family, prompt, weights) in enumerate(family_rows):
        total = sum(weights.values())
        held = i % 6 == 4 and family in ("weather", "game", "choice", "doubt")
        yield {"family": family, "prompt": prompt, "split": "heldout" if held else "train",
               "responses": {y: w / total for y, w in weights.items()}}


def quarter():
    """The default world's rows, with one train prompt of four."""
    all_rows = [json.loads(line) for line in WORLD.read_text(encoding="utf-8").splitlines()]
    train = [row for row in all_rows if row["split"] == "train"]
    return train[::4] + [row for row in all_rows if row["split"] == "heldout"]


def write(out):
    """Write every world into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, some in {"town": rows(town()), "desk": rows(desk()), "quarter": quarter()}.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(ROOT / "out/worlds")
