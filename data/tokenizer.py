"""The tokenizer: byte-pair encoding trained on the world's text, as a tiktoken.Encoding.

A rank file has one token a line, base64 then rank. Ranks 0-255 are the single bytes, so any text
encodes; each later token is two earlier ones joined, and the lower rank is merged first.
Reading order: `train_bpe` → rank files → `load_encoding` → `frame`, how x and y become tokens.
`python data/tokenizer.py` rewrites toy.tiktoken, byte for byte.
"""
import base64
import binascii
import re
from collections import Counter
from pathlib import Path

import tiktoken

try:
    from data.errors import InputError, nearest
except ModuleNotFoundError:  # run as a script, from this folder
    from errors import InputError, nearest

RANK_FILE = Path(__file__).parent / "toy.tiktoken"
VOCAB_SIZE = 510  # with the two special tokens: 512, a round number for the matrix of logits
# Merges never cross these chunks: a word with its space, one digit (so that 35% is "3", "5" and a
# network can learn place value), punctuation, one white space. Python and tiktoken read it alike.
PATTERN = r" ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s"
ANSWER, END = "<|answer|>", "<|end|>"  # after the prompt; after the response


def train_bpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Join the most frequent adjacent pair until vocab_size tokens exist; ties go to byte order.

    >>> list(train_bpe(["ababab"], 258))[256:]
    [b'ab', b'abab']
    """
    ranks = {bytes([i]): i for i in range(256)}
    chunks = Counter(chunk for text in texts for chunk in re.findall(PATTERN, text))
    words = [([bytes([b]) for b in chunk.encode()], count) for chunk, count in chunks.items()]
    while len(ranks) < vocab_size:
        pairs = Counter()
        for parts, count in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        if not pairs:
            break  # every chunk is one token already
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i:i + 2] = [left + right]
                i += 1
    return ranks


def dump_ranks(ranks: dict[bytes, int]) -> str:
    """The text of a rank file, in order of rank."""
    tokens = sorted(ranks, key=ranks.get)
    return "".join(f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in tokens)


def parse_ranks(text: str, name: str) -> dict[bytes, int]:
    """Read the text of a rank file; InputError names the line that is wrong.

    Subtle: tiktoken.load.load_tiktoken_bpe would cache a local file under a hash of its *path*,
    and go on serving the old tokens after the file has changed. Hence this parser.
    """
    ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{name}:{number}: expected a base64 token and a rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{name}: ranks must be 0, 1, 2, … each once")
    if not all(bytes([i]) in ranks for i in range(256)):
        raise InputError(f"{name}: not all 256 single bytes are there, so some text cannot encode")
    return ranks


def build_encoding(ranks: dict[bytes, int], pattern: str = PATTERN) -> tiktoken.Encoding:
    """An Encoding whose two last tokens are ANSWER and END."""
    n = max(ranks.values()) + 1
    return tiktoken.Encoding("spin", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={ANSWER: n, END: n + 1})


def load_encoding(source: str = str(RANK_FILE)) -> tiktoken.Encoding:
    """A rank file, or the name of a tiktoken encoding (gpt2, …), with ANSWER and END added."""
    names = tiktoken.list_encoding_names()
    try:
        if Path(source).is_file():
            text = Path(source).read_bytes().decode("utf-8")
            return build_encoding(parse_ranks(text, f"--encoding {source}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--encoding {source}: cannot be read ({error})") from None
    if source not in names:
        raise InputError(f"--encoding {source}: neither a rank file nor one of tiktoken's "
                         f"encodings ({', '.join(names)}){nearest(source, names)}")
    try:
        base = tiktoken.get_encoding(source)
    except Exception as error:  # tiktoken raises whatever the network library does
        raise InputError(f"--encoding {source}: tiktoken could not fetch it ({error})") from None
    return build_encoding(base._mergeable_ranks, base._pat_str)


def frame(encoding: tiktoken.Encoding, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Tokens of x, closed by ANSWER, and of y, closed by END: the same for SFT, SPIN and sampling.

    `encode_ordinary` reads "<|end|>" in a text as seven plain characters, never as the token.
    """
    specials = encoding._special_tokens
    return (encoding.encode_ordinary(prompt) + [specials[ANSWER]],
            encoding.encode_ordinary(response) + [specials[END]])


if __name__ == "__main__":
    from instructions import build_world
    world = build_world()
    texts = [text for row in world for text in (row["prompt"], *row["responses"])]
    RANK_FILE.write_text(dump_ranks(train_bpe(texts, VOCAB_SIZE)))
    print(f"wrote {RANK_FILE.name}: {VOCAB_SIZE} tokens")
