r"""The tokenizer: byte-pair encoding trained on the world's text, as a tiktoken.Encoding.

A text is cut into chunks, a chunk is a sequence of bytes, and adjacent tokens are merged for as
long as their concatenation is in the vocabulary, the one of lowest rank first. A rank file has one
token a line, in base64, and its rank:

    YQ== 97          the byte "a"; ranks 0 to 255 are the single bytes, so that any text encodes
    YWI= 300         "ab"; merged before any token of a higher rank

Reading order: `train_bpe` → rank files: `dump_ranks`, `read_text`, `parse_ranks` →
`build_encoding` → `load_encoding` → `frame`: how prompt and response become tokens.
`python -m data.tokenizer` rewrites toy.tiktoken, byte for byte.
"""
import base64
import os
import re
from collections import Counter
from pathlib import Path

import tiktoken

from data import InputError

RANK_FILE = Path(__file__).parent / "toy.tiktoken"
VOCAB_SIZE = 510  # with the two special tokens: 512, a round number for the matrix of logits
ANSWER, END = "<|answer|>", "<|end|>"  # after the prompt; after the response

# The chunks, which no merge crosses: a word with the blank before it, one digit (so that 35% is
# "3", "5" and a network can learn place value), punctuation, one white-space character. Each
# character belongs to one of them, so nothing of a text is lost. Python and tiktoken read this
# pattern alike on printable ASCII, as the world is; elsewhere tiktoken knows more letters (marks).
PATTERN = r" ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s"


def train_bpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Merge the most frequent adjacent pair until vocab_size tokens exist; ties go to byte order.

    Returns {token: rank}.

    >>> list(train_bpe(["ababab"], 258))[256:]
    [b'ab', b'abab']
    """
    ranks = {bytes([i]): i for i in range(256)}
    chunks = Counter(chunk for text in texts for chunk in re.findall(PATTERN, text))
    words = [([bytes([b]) for b in chunk.encode()], count) for chunk, count in chunks.items()]
    while len(ranks) < vocab_size:
        pairs = Counter()
        for tokens, count in words:
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += count
        if not pairs:
            break  # every chunk is one token already
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for tokens, _ in words:
            i = 0
            while i < len(tokens) - 1:
                if tokens[i] == left and tokens[i + 1] == right:
                    tokens[i:i + 2] = [left + right]
                i += 1
    return ranks


# --- rank files ----------------------------------------------------------------------------------

def dump_ranks(ranks: dict[bytes, int]) -> str:
    """The text of a rank file, in order of rank."""
    tokens = sorted(ranks, key=ranks.get)
    return "".join(f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in tokens)


def read_text(path, name) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark; every line end becomes \\n.

    Raises InputError if it is none; `name` is what the message calls the file.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({error})") from None
    try:
        text, wrong = data.decode("utf-8-sig"), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        if data.startswith(b"\x1f\x8b"):
            found = "is compressed by gzip; unpack it with gunzip"
        elif b"\0" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            found = "seems to be UTF-16; save it as UTF-8 in an editor"
        else:
            found = "may be cp1252; save it as UTF-8 in an editor"
        line = 1 + data.count(b"\n", 0, wrong)
        raise InputError(f"{name}:{line}: not UTF-8 text: the file {found}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_ranks(text: str, name: str) -> dict[bytes, int]:
    """Read the text of a rank file as {token: rank}; InputError names the line that is wrong.

    Subtle: tiktoken.load.load_tiktoken_bpe would cache a local file under a hash of its *path*,
    and go on serving the old tokens after the file has changed. Hence this parser.
    """
    ranks, seen = {}, set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise InputError(f"{name}:{number}: expected a base64 token and a rank, as in "
                             f"YQ== 97") from None
        if token in ranks or rank in seen:
            raise InputError(f"{name}:{number}: this token or this rank is on an earlier line "
                             f"already; give each once")
        ranks[token] = rank
        seen.add(rank)
    if not all(bytes([i]) in ranks for i in range(256)):
        raise InputError(f"{name}: not all 256 single bytes are there, so some text cannot encode")
    return ranks


# --- encodings -----------------------------------------------------------------------------------

def build_encoding(ranks: dict[bytes, int], pattern: str = PATTERN) -> tiktoken.Encoding:
    """An Encoding whose last two tokens are ANSWER and END.

    Byte-pair encoding uses the order of the ranks alone, so the tokens are numbered 0, 1, 2, … in
    that order: a gap in the ranks, as p50k_base has, would be a token that cannot be decoded.
    """
    ranks = {token: i for i, token in enumerate(sorted(ranks, key=ranks.get))}
    specials = {ANSWER: len(ranks), END: len(ranks) + 1}
    return tiktoken.Encoding("spin", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens=specials)


def load_encoding(source: str = str(RANK_FILE)) -> tiktoken.Encoding:
    """A rank file, or one of tiktoken's encodings by name (gpt2, …), with ANSWER and END added.

    A rank file says nothing of how a text is cut into chunks, so PATTERN does it.
    """
    name, known = f"--encoding {source}", tiktoken.list_encoding_names()
    if source in known:
        base = fetch(source, name)
        return build_encoding(base._mergeable_ranks, base._pat_str)
    if not os.path.isfile(source):
        raise InputError(f"{name}: neither a rank file nor one of tiktoken's encodings "
                         f"({', '.join(known)})")
    return build_encoding(parse_ranks(read_text(source, name), name))


def fetch(source, name) -> tiktoken.Encoding:
    """One of tiktoken's own encodings, which it downloads once."""
    try:
        return tiktoken.get_encoding(source)
    except Exception:  # tiktoken raises whatever the network library does
        how = f"python -c \"import tiktoken; tiktoken.get_encoding('{source}')\""
        raise InputError(f"{name}: tiktoken could not fetch it; where there is a network, run "
                         f"TIKTOKEN_CACHE_DIR=ranks {how}, bring the folder ranks here, and set "
                         f"TIKTOKEN_CACHE_DIR to it") from None


def frame(encoding: tiktoken.Encoding, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Tokens of x, closed by ANSWER, and of y, closed by END: the same for SFT, SPIN and sampling.

    `encode_ordinary` reads "<|end|>" in a text as plain characters, never as the token.
    """
    specials = encoding._special_tokens
    return (encoding.encode_ordinary(prompt) + [specials[ANSWER]],
            encoding.encode_ordinary(response) + [specials[END]])


if __name__ == "__main__":
    from data.instructions import build_world
    texts = [text for row in build_world() for text in (row["prompt"], *row["responses"])]
    RANK_FILE.write_text(dump_ranks(train_bpe(texts, VOCAB_SIZE)), "ascii", newline="\n")
    print(f"wrote {RANK_FILE.name}: {VOCAB_SIZE} tokens")
