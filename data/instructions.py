"""The world: instructions whose responses we invented, so p_data(y|x) is known exactly.

One row of `world.jsonl` is one prompt x with every response y it may get and p_data(y|x):
    {"family": "dice", "prompt": "Roll a die with 2 sides.", "responses": {"1": 0.5, "2": 0.5},
     "split": "train"}
Reading order: the six families → `build_world`. (`world.py` reads this file, or yours.)
`python data/instructions.py` rewrites world.jsonl, byte for byte.
"""
import json
from pathlib import Path

WORLD = Path(__file__).parent / "world.jsonl"
NAMES = ("Ana Ben Cleo Dan Eve Finn Gus Hana Ian Joy Kim Leo Mia Nick Olga Pam Rosa Sam Tom "
         "Zoe").split()
COLOURS = "red blue green pink black white gold".split()
THINGS = {  # the most usual first: Zipf gives the k-th a weight of 1/k^s
    "fruit": "apple pear plum lemon melon fig", "pet": "dog cat fish hamster rat",
    "drink": "tea milk water juice beer wine cola", "sport": "tennis golf rugby polo",
    "bird": "robin eagle owl swan crow hen gull kiwi", "tool": "hammer saw drill file",
    "colour": " ".join(COLOURS), "metal": "iron gold tin lead zinc", "tree": "oak pine ash elm fir",
    "game": "chess go poker bingo",
}


def coins():
    """A stated bias. Four biases are held out: the network must read the digits to get them."""
    for percent in range(5, 100, 5):
        for side, other in (("heads", "tails"), ("tails", "heads")):
            yield (f"Flip a coin with {percent}% {side}.",
                   {side: percent, other: 100 - percent}, percent in (15, 40, 65, 90))


def dice():
    """Fair dice, then dice loaded on one face by a stated percentage."""
    for sides in range(2, 17):
        yield f"Roll a die with {sides} sides.", {str(k + 1): 1 for k in range(sides)}, False
    for sides in range(3, 7):
        for face in range(1, sides + 1):
            for percent in (40, 70):
                rest = (100 - percent) / (sides - 1)
                yield (f"Roll a die with {sides} sides, {percent}% on {face}.",
                       {str(k): percent if k == face else rest for k in range(1, sides + 1)},
                       (sides + face + percent // 30) % 7 == 0)


def categories():
    """Zipf's law with exponent s = 0, 1, 2 or 3, which the adjective tells; inner ones held out."""
    for i, (kind, things) in enumerate(THINGS.items()):
        for s, adjective in enumerate(("random ", "", "common ", "typical ")):
            yield (f"Name a {adjective}{kind}.",
                   {thing: 1 / k**s for k, thing in enumerate(things.split(), 1)},
                   s in (1, 2) and i % 4 == s)


def greetings():
    """A name to copy and a manner that sets the style."""
    manners = {"": {"Hello, {}!": 4, "Hi, {}!": 3, "Hello {}.": 2, "Hey {}!": 1},
               " politely": {"Good day, {}.": 6, "Hello, {}.": 3, "Welcome, {}.": 1},
               " warmly": {"Hey {}!": 5, "Hi, {}!": 3, "Welcome, {}!": 2}}
    for i, name in enumerate(NAMES):
        for j, (manner, styles) in enumerate(manners.items()):
            yield (f"Greet {name}{manner}.",
                   {style.format(name): p for style, p in styles.items()}, i % 7 == j)


def sums():
    """One right number, in several styles: a response can be wrong in content or in style."""
    for a in range(1, 5):
        for b in range(1, 5):
            short, it, full = f"{a + b}", f"It is {a + b}.", f"{a} plus {b} is {a + b}."
            for i, (question, styles) in enumerate({
                    f"What is {a} plus {b}?": {short: 6, it: 3, full: 1},
                    f"Add up {a} plus {b}.": {short: 3, it: 1, full: 6},
                    f"Work out {a} plus {b}.": {it: 7, full: 3},
                    f"Tell me {a} plus {b}.": {short: 8, it: 2}}.items()):
                yield question, styles, (a + 2 * b) % 8 == 2 * i


def swaps():
    """A string operation: two words change places."""
    for i, a in enumerate(COLOURS):
        for j, b in enumerate(COLOURS):
            if a != b:
                yield (f"Swap {a} and {b}.", {f"{b} and {a}": 6, f"{b}, {a}": 3, f"{b} {a}": 1},
                       (2 * i + j) % 7 == 5)


def build_world() -> list[dict]:
    """All rows of the committed world, p_data normalised (7 digits: sums are 1 to 1e-6)."""
    rows = []
    for family in (coins, dice, categories, greetings, sums, swaps):
        for prompt, weights, heldout in family():
            total = sum(weights.values())
            rows.append({"family": family.__name__, "prompt": prompt,
                         "responses": {y: round(w / total, 7) for y, w in weights.items()},
                         "split": "heldout" if heldout else "train"})
    return rows


if __name__ == "__main__":
    lines = "".join(json.dumps(row) + "\n" for row in build_world())
    WORLD.write_text(lines, "utf-8", newline="\n")
    print(f"wrote {WORLD.name}: {len(build_world())} prompts")
