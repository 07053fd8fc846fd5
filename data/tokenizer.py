"""The tokenizer: byte-pair encoding trained on the world's text, as a tiktoken.Encoding.

A rank file has one token a line, base64 then rank. Ranks 0-255 are the single bytes, so any text
encodes; each later token is two earlier ones joined, and the lower rank is merged first.
Reading order: `train_bpe` → rank files → `build_encoding` → `load_encoding` → `frame`, how x and y
become tokens.
`python data/tokenizer.py` rewrites toy.tiktoken, byte for byte.
"""
import base64
import binascii
import re
import unicodedata
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import tiktoken

try:
    from data.errors import InputError, nearest
    from data.foreign import read_text
except ModuleNotFoundError:  # run as a script, from this folder
    from errors import InputError, nearest
    from foreign import read_text

RANK_FILE = Path(__file__).parent / "toy.tiktoken"
VOCAB_SIZE = 510  # with the two special tokens: 512, a round number for the matrix of logits
# Merges never cross these chunks: a word with its space and its combining marks (as Hindi and
# Arabic have), one digit (so that 35% is "3", "5" and a network can learn place value),
# punctuation, one white space.
PATTERN = r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s"
PATTERNS = {"toy": PATTERN, "gpt2": (  # GPT-2's, as tiktoken writes it
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")}
ANSWER, END = "<|answer|>", "<|end|>"  # after the prompt; after the response


def pieces(text) -> list[str]:
    """Cut a text as tiktoken does by PATTERN. Python's own `re` knows no classes such as \\p{L}.

    So each character is replaced by a letter for its class, and that text is cut.

    >>> pieces("Roll 12 dice!")
    ['Roll', ' 1', '2', ' dice', '!']
    """
    classes = "".join(class_of(c) for c in text)
    return [text[found.start():found.end()]
            for found in re.finditer(r" ?L+| ?N| ?P+|[ S]", classes)]


def class_of(c) -> str:
    """L letter or mark, N number, a blank itself, S other white space, P anything else."""
    category = unicodedata.category(c)[0]
    if category in "LMN":
        return "N" if category == "N" else "L"
    return " " if c == " " else "S" if c.isspace() and not "\x1c" <= c <= "\x1f" else "P"


def train_bpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Join the most frequent adjacent pair until vocab_size tokens exist; ties go to byte order.

    >>> list(train_bpe(["ababab"], 258))[256:]
    [b'ab', b'abab']
    """
    ranks = {bytes([i]): i for i in range(256)}
    chunks = Counter(chunk for text in texts for chunk in pieces(text))
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
    ranks, line_of = {}, {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            if not (rank.isascii() and rank.isdigit()):
                raise ValueError
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{name}:{number}: expected a base64 token and a rank") from None
        if token in ranks or rank in line_of:
            what = f"rank {rank}" if rank in line_of else f"the token {token!r}"
            before = line_of[rank if rank in line_of else ranks[token]]
            raise InputError(f"{name}:{number}: {what} is on line {before} already; ranks must be "
                             f"0, 1, 2, … each once, for tokens that differ")
        ranks[token], line_of[rank] = rank, number
    if not all(bytes([i]) in ranks for i in range(256)):
        raise InputError(f"{name}: not all 256 single bytes are there, so some text cannot encode")
    return ranks


# Letters, marks, digits, signs and white space of many kinds: a pattern must cut up all of them.
PROBE = "Ab cd_e 12½ e\u0301 \u0915\u093f\u200d \u0e44\u0e17\u0e22 \u4e2d, \t\r\n  \x00\x85😀?!"


def build_encoding(ranks: dict[bytes, int], pattern: str = PATTERN) -> tiktoken.Encoding:
    """An Encoding whose two last tokens are ANSWER and END.

    Byte-pair encoding uses the order of the ranks alone, so the tokens are numbered 0, 1, 2, … in
    that order: a hole in the ranks, as p50k_base has, would be a token that cannot be decoded.
    Raises ValueError if tiktoken cannot work with the ranks or the pattern.
    """
    ranks = {token: i for i, token in enumerate(sorted(ranks, key=ranks.get))}
    specials = {ANSWER: len(ranks), END: len(ranks) + 1}
    taken = [name for name in specials if name.encode() in ranks]
    if taken:
        raise ValueError(f"{taken[0]} is among the tokens already, and text would be read as it")
    check_pattern(pattern)
    with no_panic("tiktoken cannot use its ranks and its pattern"):
        encoding = tiktoken.Encoding("spin", pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens=specials)
        if encoding.decode(encoding.encode_ordinary(PROBE)) != PROBE:
            raise ValueError(f"the pattern {pattern[:60]!r} loses some characters of a text")
    return encoding


def check_pattern(pattern):
    """ValueError for a pattern that matches the empty text: tiktoken's Rust code panics on it."""
    try:  # Python's re knows no \\p{L}; \\w is near enough to find an empty match
        found = re.finditer(re.sub(r"\\[pP]\{\w+\}", r"\\w", pattern), PROBE + "a")
        empty = any(match.start() == match.end() for match in found)
    except re.error as error:
        raise ValueError(f"the pattern {pattern[:60]!r} is not one ({error})") from None
    if empty:
        raise ValueError(f"the pattern {pattern[:60]!r} matches nothing at some places of a text")


@contextmanager
def no_panic(what):
    """Turn a panic of tiktoken's Rust code, which is no Exception, into an InputError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({error})") from None


def load_encoding(source: str = str(RANK_FILE), pattern: str = "toy") -> tiktoken.Encoding:
    """A rank file, or the name of a tiktoken encoding (gpt2, …), with ANSWER and END added.

    A rank file says nothing of how a text is cut, so `pattern` names it, one of PATTERNS.
    """
    names, name = tiktoken.list_encoding_names(), f"--encoding {source}"
    try:
        if Path(source).is_file():
            return build_encoding(parse_ranks(read_text(source, name), name), PATTERNS[pattern])
        if source not in names:
            raise InputError(f"{name}: neither a rank file nor one of tiktoken's encodings "
                             f"({', '.join(names)}){nearest(source, names)}")
        base = fetch(source, name)
        return build_encoding(base._mergeable_ranks, base._pat_str)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error})") from None
    except ValueError as error:
        raise InputError(f"{name}: cannot be used: {error}") from None


def fetch(source, name) -> tiktoken.Encoding:
    """One of tiktoken's own encodings, which it downloads once."""
    try:
        return tiktoken.get_encoding(source)
    except Exception as error:  # tiktoken raises whatever the network library does
        how = f"python -c \"import tiktoken; tiktoken.get_encoding('{source}')\""
        raise InputError(f"{name}: tiktoken could not fetch it; where there is a network, run "
                         f"TIKTOKEN_CACHE_DIR=ranks {how}, bring the folder ranks here, and set "
                         f"TIKTOKEN_CACHE_DIR to it ({str(error)[:200]})") from None


def frame(encoding: tiktoken.Encoding, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Tokens of x, closed by ANSWER, and of y, closed by END: the same for SFT, SPIN and sampling.

    `encode_ordinary` reads "<|end|>" in a text as seven plain characters, never as the token.
    """
    specials = encoding._special_tokens
    with no_panic(f"tiktoken cannot split a text of {max(len(prompt), len(response))} characters"):
        return (encoding.encode_ordinary(prompt) + [specials[ANSWER]],
                encoding.encode_ordinary(response) + [specials[END]])


if __name__ == "__main__":
    from instructions import build_world
    world = build_world()
    texts = [text for row in world for text in (row["prompt"], *row["responses"])]
    RANK_FILE.write_text(dump_ranks(train_bpe(texts, VOCAB_SIZE)), "ascii", newline="\n")
    print(f"wrote {RANK_FILE.name}: {VOCAB_SIZE} tokens")
