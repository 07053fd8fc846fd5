"""How time and memory grow with the number of prompts, with their responses, and with length.

    python tests/bench/growth.py                 every case (15 minutes)
    python tests/bench/growth.py long "prompts 50000"   these alone
    python tests/bench/growth.py --quick         tiny cases: does it still run?

Each case writes a data file and runs `python train.py --data FILE` on it, with the default flags
but for few steps: a step's memory does not depend on how many there are. Where prompts or their
responses become more, SFT has all of its steps, for an untrained policy gives no response twice.
The table has the processor time of the whole run, and the most memory that the process held,
imports included (about 250 MB).

Reading order: the files → `CASES` → `measure` → `main`.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench.measure import MB, head, row, show  # noqa: E402  (the line above makes it importable)
from data.tokenizer import load_encoding  # noqa: E402
from data.world import WORLD, read_world  # noqa: E402

FEW = "--device cpu --iters 1 --steps 5 --reports 1"


# --- the files: lists of rows --------------------------------------------------------------------

def numbered(n):
    """The default world again and again, with a number before each prompt: n distinct prompts."""
    rows = read_world(WORLD)
    return [{**rows[i % len(rows)], "prompt": f"{i}. {rows[i % len(rows)]['prompt']}"}
            for i in range(n)]


def many_responses(count, to=1, prompts=1):
    """The first `to` of some prompts have `count` equally likely responses each, the others two."""
    few, many = (0, 1), range(count)
    return [{"family": "numbers", "split": "train", "prompt": f"Name a number for list {i}.",
             "responses": {f"It is {k}.": 1 / len(names) for k in names}}
            for i in range(prompts) for names in [many if i < to else few]]


def pairs(n, shortest, longest):
    """n questions and answers, each pair of so many tokens, out of the world's words."""
    rng, encoding = random.Random(0), load_encoding()
    words = sorted({word for row in read_world(WORLD) for y in row["responses"]
                    for word in y.split()})

    def text(tokens):
        found = " ".join(rng.choices(words, k=tokens))  # a word has at least one token
        return encoding.decode(encoding.encode(found)[:tokens]).strip()
    found = []
    for i in range(n):
        length = round(shortest + (longest - shortest) * i / max(1, n - 1))
        found.append({"prompt": f"{i}. {text(length // 4)}", "response": text(length * 3 // 4)})
    return found


# name: (rows, flags)
CASES = {
    "long": (lambda: pairs(150, 300, 1000), "--block-size 1100 --sft-steps 5"),
    "one prompt, 8000 responses": (lambda: many_responses(8000), "--sft-steps 5"),
    "2000 responses among 300 prompts": (lambda: many_responses(2000, prompts=300),
                                         "--sft-steps 5"),
    **{f"prompts {n}": (lambda n=n: numbered(n), "") for n in (400, 2000, 50_000)},
    "responses 512": (lambda: numbered(64), "--negatives 512 --batch-size 16384"),
}
QUICK = {"prompts 20": (lambda: numbered(20), "--n-embd 8 --sft-steps 5"),
         "responses 20": (lambda: many_responses(20), "--n-embd 8 --sft-steps 5"),
         "length 60": (lambda: pairs(4, 50, 60), "--n-embd 8 --sft-steps 5 --negatives 2")}


def measure(rows, flags) -> tuple[float, int]:
    """(processor seconds, bytes) of one run of train.py. A run that fails ends this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [sys.executable, "train.py", *f"{FEW} {flags}".split(), "--data", str(path),
                   "--out", str(Path(folder) / "out")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench/growth.py: train.py ended with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return used.ru_utime + used.ru_stime, used.ru_maxrss * unit


def main(names, quick):
    cases = QUICK if quick else CASES
    print(f"python train.py {FEW} --data FILE, and the flags of the case")
    head("case", "flags", "CPU s", "memory, MB")
    for name in names or cases:
        rows, flags = cases[name]
        seconds, memory = measure(rows(), flags)
        row(name, flags, show(seconds), show(memory / MB))


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--quick"], "--quick" in sys.argv)
