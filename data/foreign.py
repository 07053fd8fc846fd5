"""Files as others write them: encodings, line ends and shapes of rows that a user may bring.

Alpaca, Dolly and chat rows are read as they are; what else is found is named, with the way to
convert it. Reading order: `read_text`, a file → `as_row`, `misspelt`, a row → `no_row`, a line that
is no row.
"""
import difflib
import json
import shlex
from pathlib import Path

try:
    from data.errors import InputError
except ModuleNotFoundError:  # data/tokenizer.py, run as a script
    from errors import InputError

KEYS = ("prompt", "response", "responses", "split", "family")  # all that our own rows have
EXAMPLE = 'write each row as a line {"prompt": "…", "response": "…"}'
UTF_16 = "it is UTF-16 or UTF-32; convert it: iconv -f UTF-16 -t UTF-8 {path} > {new}"
SIGNATURES = {  # the first bytes of a file → what it is, and how to make text of it
    b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16, b"\0\0\xfe\xff": UTF_16,
    b"\x1f\x8b": "it is compressed by gzip; unpack it: gunzip -c {path} > {new}",
    b"PK\x03\x04": "it is a zip archive or a spreadsheet; unpack it, or export it as text",
    b"BZh91AY&SY": "it is compressed by bzip2; unpack it: bunzip2 -c {path} > {new}",
    b"\xfd7zXZ": "it is compressed by xz; unpack it: unxz -c {path} > {new}",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd; unpack it: zstd -dc {path} > {new}",
    b"PAR1\x15": "it is a Parquet file; convert it: python -c \"import pandas, sys; pandas.read_"
                 "parquet(sys.argv[1]).to_json('{new}', orient='records', lines=True)\" {path}",
}
ARRAY = ("the file is one JSON list, but each row needs a line of its own; convert it: python -c "
         "\"import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], "
         "encoding='utf-8-sig'))]\" {path} > {new}")
TABLE = ("the file is a table, but each row needs to be a JSON object; convert it: python -c "
         "\"import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader("
         "open(sys.argv[1], encoding='utf-8-sig', newline=''))]\" {path} > {new}")
SPREAD = "a row is spread over several lines, but needs one; convert it: jq -c . {path} > {new}"


def convert(advice, path) -> str:
    """The advice, with the file's name as a shell reads it, and a name for the new file."""
    return advice.format(path=shlex.quote(str(path)), new="converted.jsonl")


def read_text(path, name=None) -> str:
    """The text of a UTF-8 file, without byte-order marks; every line end becomes a line feed.

    A mark may open any line, since files are put together. name is what an InputError calls it.
    """
    name = name or path
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({error})") from None
    for signature, advice in SIGNATURES.items():
        if data.startswith(signature):
            raise InputError(f"{name}: cannot be read as UTF-8 text: {convert(advice, path)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: cannot be read as UTF-8 text: byte {error.start} is "
                         f"0x{data[error.start]:02x}; save the file as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{name}: cannot be read as UTF-8 text: it has NUL bytes, as UTF-16 and "
                         f"programs have; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n\ufeff", "\n")


def as_row(row: dict) -> dict:
    """A row of another shape as prompt and response, its other keys kept; our own rows unchanged.

    Alpaca    {"instruction": …, "input": …, "output": …}; the prompt is instruction, then input
    Dolly     {"instruction": …, "context": …, "response": …}
    messages  {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
    SPIN      {"real": two such messages, "generated": …}: the rows of the paper's own code
    Raises ValueError with the reason if the values do not fit the shape.
    """
    if "instruction" in row and "prompt" not in row:
        used = ("instruction", "input" if "input" in row else "context",
                "output" if "output" in row else "response")
        x, more, y = (row.get(key) for key in used)
        if not all(isinstance(text, str) for text in (x, more or "", y)):
            raise ValueError(f'a row with an "instruction" needs a text {used[2]!r} as its response'
                             f', and may have a text {used[1]!r}')
        pair = {"prompt": f"{x}\n{more}" if more else x, "response": y}
    elif not {"response", "responses"} & row.keys() and {"messages", "real"} & row.keys():
        used = ("messages" if "messages" in row else "real", "prompt")
        pair = dict(zip(("prompt", "response"), two_turns(row[used[0]], used[0])))
    else:
        return row
    return pair | {key: value for key, value in row.items() if key not in used}


def two_turns(messages, key) -> list[str]:
    """What the user says and what the assistant responds. ValueError if there is more, or less."""
    turns = messages if isinstance(messages, list) else []
    roles = [turn.get("role") if isinstance(turn, dict) else turn for turn in turns]
    if roles != ["user", "assistant"]:
        raise ValueError(f"{key!r} has the roles {str(roles)[:60]}; a row needs two messages, the "
                         f"first of role 'user' and the second of role 'assistant'; leave out "
                         f"the others, or make rows of two of them")
    if not all(isinstance(turn.get("content"), str) for turn in turns):
        raise ValueError(f"the content of a message in {key!r} is not a text; join its parts")
    return [turn["content"] for turn in turns]


def misspelt(row) -> str | None:
    """Return what is wrong with a key that looks like one the row lacks, or None.

    >>> misspelt({"prompt": "x", "response": "y", "spilt": "heldout"})
    "unknown key 'spilt'; did you mean 'split'?"
    """
    lacks = [key for key in KEYS if key not in row]
    if "response" in row or "responses" in row:
        lacks = [key for key in lacks if not key.startswith("response")]
    for key in (key for key in row if key not in KEYS):
        unlike = "response" if isinstance(row[key], dict) else "responses"
        near = [known for known in lacks if known != unlike]
        for meant in difflib.get_close_matches(key.strip().lower(), near, 1, 0.67):
            return f"unknown key {key[:60]!r}; did you mean {meant!r}?"
    return None


def no_row(text: str, error, path) -> str:
    """Say what a file is whose first bad line is no JSON object, and how to convert it."""
    start = text.lstrip()
    if start.startswith("["):
        return convert(ARRAY, path)
    if Path(path).suffix.lower() == ".csv":
        return convert(TABLE, path)
    try:
        _, end = json.JSONDecoder().raw_decode(start)
        if "\n" in start[:end]:
            return convert(SPREAD, path)
    except (ValueError, RecursionError):
        pass
    return f"not a JSON object ({error}); {EXAMPLE}"
