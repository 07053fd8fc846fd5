"""The pages speak of what exists: commands, flags, links, files, names; and they render whole."""
import re
import shlex
from pathlib import Path

import pytest

import sample
import train
from data import InputError
from data.run.options import check_limits, parse_args
from processes import without_figures

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for pattern in ("*.md", "data/*.md", "tests/**/*.md")
               for page in ROOT.glob(pattern))
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
SOURCE = "".join(path.read_text("utf-8") for pattern in ("*.py", "data/**/*.py", "tests/**/*.py",
                                                        "tests/**/*.toml")
                 for path in ROOT.glob(pattern))
SMALL = ("--iters 1 --steps 2 --sft-steps 2 --reports 1 --n-layer 1 --n-head 2 --n-embd 16 "
         "--negatives 2 --batch-size 8 --sft-samples 2 --overwrite").split()


def code(page) -> list[str]:
    """The lines of code blocks marked sh, and what stands between backticks in the text."""
    text = TEXT[page].replace("\\\n", " ")
    found = re.findall(r"```sh\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", text, re.S)
    lines = [line for block, inline in found for line in (block.split("\n") if block else [inline])]
    return [line.split("  #")[0].strip() for line in lines]


def commands(page) -> list[str]:
    """Commands that start with python; "…" marks a pattern rather than a command."""
    return list(dict.fromkeys(c for c in code(page) if re.match(r"(\w+=\S+ )*python3? ", c)
                              and "…" not in c))


def headings(page) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-")
            for line in re.findall(r"^#+ (.*)", TEXT[page], re.M)}


def wrong_with(command) -> str:
    """What is wrong with a command: no such script, no such flag, no such value."""
    words = shlex.split(re.sub(r"^(\w+=\S+ )*", "", command).split(" && ")[0])[1:]
    if words[0] == "-c" or words[:1] == ["-m"] and words[1] in ("venv", "pytest", "pip"):
        return ""
    module, *flags = words[1:] if words[0] == "-m" else words
    script = (ROOT / module.removesuffix(".py").replace(".", "/")).with_suffix(".py")
    if not script.is_file():
        return f"{command}: no such script"
    kind = {"train": train.Config, "sample": sample.SampleConfig}.get(script.stem)
    if kind and script.parent == ROOT and "--help" not in flags:
        try:
            check_limits(parse_args(kind, "", flags))
        except InputError as error:
            return f"{command}: {error}"
        return ""
    text = "".join(path.read_text("utf-8") for path in script.parent.glob("*.py"))
    known = lambda flag: f'"{flag}"' in text or f" {flag[2:].replace('-', '_')}: " in text
    unknown = [word for word in flags if word.startswith("--") and word != "--help"
               and not known(word.split("=")[0])]
    return f"{command}: {script.name} has no {unknown[0]}" if unknown else ""


@pytest.mark.parametrize("page", TEXT)
def test_every_command_has_its_script_and_its_flags(page):
    """train.py and sample.py read them themselves; elsewhere a flag stands in the script's text."""
    wrong = list(filter(None, map(wrong_with, commands(page))))
    assert not wrong, "\n".join([f"{page}:", *wrong])


def test_the_readmes_commands_run_in_their_order(tmp_path, monkeypatch, capsys):
    """Those of its first block, made small by flags behind them; the last one runs the tests."""
    without_figures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    block = next(b for b in re.findall(r"```sh\n(.*?)```", TEXT["README.md"], re.S)
                 if "train.py" in b)
    lines = [line.split("  #")[0].strip() for line in block.split("\n")
             if line.startswith("python ")]
    assert [line.split()[1] for line in lines] == ["train.py", "sample.py", "-m"]
    assert lines[-1] == "python -m pytest"
    train.main(parse_args(train.Config, "", [*shlex.split(lines[0])[2:], *SMALL]))
    sample.main(parse_args(sample.SampleConfig, "", [*shlex.split(lines[1])[2:],
                                                     "--samples", "10"]))
    assert "p_data" in capsys.readouterr().out and (tmp_path / "out" / "iteration_1.pt").exists()


@pytest.mark.parametrize("page", TEXT)
def test_every_link_leads_somewhere(page):
    """Files from the page's own folder, and headings; links to the web are not followed."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", TEXT[page]):
        if target.startswith("http"):
            continue
        place = (ROOT / page).parent.joinpath(target) if target else ROOT / page
        assert place.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in headings(place.resolve().relative_to(ROOT).as_posix()), anchor


@pytest.mark.parametrize("page", TEXT)
def test_every_file_and_name_that_a_page_names_exists(page):
    places, wrong = [ROOT, ROOT / "data", ROOT / "tests", (ROOT / page).parent], []
    for line in code(page):
        own = re.findall(r"--(?:data|init|encoding)[= ](\S+)", line)  # the reader's files
        for word in (word.strip(",.:;()") for word in line.split()):
            if re.fullmatch(r"[\w./]+\.(py|jsonl|tiktoken|txt|toml|md)", word) and not (
                    word in own or word in SOURCE or word.startswith("out/")
                    or any((place / word).exists() for place in places)):
                wrong.append(word)
        for name in re.findall(r"^(?:[a-z]\w*_\w+|[A-Z]+[a-z]\w+)$", line):
            if not re.search(rf"\b{name}\b", SOURCE):
                wrong.append(name)
        for flag in re.findall(r"^--([a-z-]+)", line):
            if flag.replace("-", "_") not in SOURCE:
                wrong.append(f"--{flag}")
    assert not wrong, f"{page} names {', '.join(wrong)}, which are nowhere"


def test_the_students_sheet_asks_what_the_answers_answer():
    """EXPERIMENTS.md is ANSWERS.md without the answers: its questions, and no other command."""
    sheet, answers = (f"tests/classroom/{name}.md" for name in ("EXPERIMENTS", "ANSWERS"))
    questions = [re.findall(r"^## .*", TEXT[page], re.M) for page in (sheet, answers)]
    assert questions[0] == questions[1] and len(questions[0]) >= 6
    words = lambda page: " ".join(TEXT[page].split())  # a command may be wrapped
    missing = [command for command in commands(sheet)
               if " --out " in command and command not in words(answers)]
    assert not missing, missing


# ---- As they render -----------------------------------------------------------------------------

@pytest.mark.parametrize("page", TEXT)
def test_pages_are_written_in_lines_of_at_most_a_hundred_columns(page):
    """But for the rows of a table, which cannot be broken."""
    for number, line in enumerate(TEXT[page].split("\n"), 1):
        assert len(line) <= 100 or line.startswith(("|", "!", "    ")), f"{page}:{number}"


def torn(text) -> list[str]:
    """What of a page does not render as it was meant: a line number and the words for it."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    lines, inside, found = text.split("\n"), set(), []
    for token in markdown.parse(text):
        first, end = token.map or (0, 0)
        if token.type in ("table_open", "fence", "code_block"):
            inside |= set(range(first, end))
        if token.type == "table_open":
            cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines[first:end]]
            found += [f"{first + i + 1}: {n - 1} cells under {cells[0] - 1} headings"
                      for i, n in enumerate(cells) if n != cells[0]]
        if token.type == "ordered_list_open" and first and lines[first - 1].strip():
            found.append(f"{first + 1}: a number begins a list within a paragraph")
        if token.type == "html_block":
            found.append(f"{first + 1}: is taken for HTML")
        for part in token.children or []:
            if part.type == "html_inline" or (part.type == "text" and re.search(
                    r"\*\*|`|\]\(", part.content)):
                found.append(f"{first + 1}: {part.content[:40]!r} stands as it was typed")
    return found + [f"{i + 1}: a row outside a table" for i, line in enumerate(lines)
                    if line.startswith("|") and i not in inside]


@pytest.mark.parametrize("page", TEXT)
def test_tables_lists_and_emphasis_render_whole(page):
    assert not torn(TEXT[page]), "\n".join(f"{page}:{line}" for line in torn(TEXT[page]))


@pytest.mark.parametrize("text, words", [
    ("| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |\n", "5: a row outside a table"),
    ("| a |\n|---|\n| 1 | 2 |\n", "3: 2 cells under 1 headings"),
    ("the KL falls to\n1. That is all.\n", "2: a number begins a list"),
    ("a `tick that is\n\nnever closed", "1: 'a `tick"), ("the token <b> ends", "1: '<b>'")])
def test_a_torn_page_is_found(text, words):
    assert torn(text)[0].startswith(words)
