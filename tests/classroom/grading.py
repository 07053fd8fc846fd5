"""Many submissions graded in one command, and the hand-out that they start from."""
import ast
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from classroom.functions import (TESTS, TEXTS, decode, empty_all, find, is_empty,
                                 prose_without_code, split_name, written_part)
from classroom.judge import CLAIMS, CleanCopy, number_of
from classroom.workspace import Refusal

LARGEST = 1 << 20  # bytes of a submitted file
SHARE = 8  # one exercise may take this part of a submission's time


def numbers(text) -> list[int]:
    """"1-3,7" -> [1, 2, 3, 7]"""
    found = []
    for piece in text.replace(" ", "").split(","):
        first, _, last = piece.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise Refusal(f"--exercises {text}: write numbers and ranges, such as 1-8,12")
        found += range(int(first), int(last or first) + 1)
    if not found or not all(1 <= n <= len(TEXTS) for n in found):
        raise Refusal(f"--exercises {text}: there are exercises 1 to {len(TEXTS)}")
    return sorted(set(found))


# --- hand-out ------------------------------------------------------------------------------------

def handed_files(root) -> list[str]:
    """What a hand-out holds: the product and the exercises; no other test, answer or history."""
    found = [*root.glob("*.py"), *(root / name for name in (
        "README.md", "requirements.txt", ".gitignore", ".gitattributes", "LICENSE"))]
    found += [*(root / "data").rglob("*"), *(root / ".github").rglob("*")]
    found += [TESTS / "exercises.py", *(TESTS / "classroom").glob("*.py"),
              *(TESTS / "classroom" / name
                for name in ("exercises.toml", "README.md", "EXPERIMENTS.md"))]
    paths = [path for path in found if path.is_file() and "__pycache__" not in path.parts
             and path.suffix != ".pyc"]
    return sorted(path.relative_to(root).as_posix() for path in paths)


def hand_out(root, folder, chosen, reference) -> int:
    """Write a copy of the repository with the chosen functions empty. Returns how many files."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"{folder} is there already; name a new folder")
    if folder.resolve().is_relative_to(Path(root).resolve() / "data"):
        raise Refusal(f"{folder} lies in data/; name a folder elsewhere")
    exercises, files = [TEXTS[n - 1] for n in chosen], handed_files(Path(root))
    for path in files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path not in reference:
            shutil.copy(Path(root, path), target)
            if path.endswith(".md") and "/classroom/" not in path:
                text = prose_without_code(target.read_text("utf-8"), reference, exercises)
                target.write_text(text, "utf-8", newline="\n")
            continue
        text = empty_all(reference[path], path, exercises)
        for copy in (target, folder / "tests" / "classroom" / "shipped" / path):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text, "utf-8", newline="\n")
    handout = folder / "tests" / "classroom" / "shipped" / "handout.json"
    handout.write_text(json.dumps({"exercises": chosen}) + "\n", "utf-8")
    return len(files)


# --- grading -------------------------------------------------------------------------------------

def submissions(folders) -> list[Path]:
    """Each folder that holds one of the product's files; of other folders, their subfolders."""
    files, found = {split_name(e["function"])[0] for e in TEXTS}, []
    holds = lambda folder: any((folder / path).is_file() for path in files)
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise Refusal(f"{folder} is no folder")
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
        inner = [path for path in inside if path.name != "shipped" and holds(path)]
        found += [folder] if holds(folder) or not inner else [
            path for path in inside if not path.name.startswith(".")]
    return found


def attempt_in(folder, path) -> str:
    """The text of a submitted file. Raises Refusal if there is none, or it is not the student's."""
    file = folder / path
    if not file.is_file():
        raise Refusal(f"{path} is missing")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise Refusal(f"{path} is a link that leads out of the submission")
    if file.stat().st_size > LARGEST:
        raise Refusal(f"{path} is larger than {LARGEST >> 20} MB")
    return decode(file.read_bytes())[0]


def copies(attempt, reference, exercise) -> bool:
    """Whether an attempt is the original, comments and docstring aside."""
    try:
        found = []
        for text in (attempt, reference):
            node = find(ast.parse(text), split_name(exercise["function"])[1])
            written = written_part(node, exercise.get("part"))
            found.append([ast.dump(statement) for statement in written])
        return found[0] == found[1] and not is_empty(node, exercise.get("part"))
    except (SyntaxError, ValueError, RecursionError, MemoryError, AttributeError):
        return False


def grade_one(folder, chosen, reference, clean, minutes, seed) -> dict:
    """Grade one submission: {"name", "points", "of", "exercises": […]}."""
    left, graded = minutes * 60, []
    for n in chosen:
        exercise = TEXTS[n - 1]
        path = split_name(exercise["function"])[0]
        untried = [{"claim": name, "held": False, "said": "not tried"}
                   for name in CLAIMS[exercise["function"]]]
        result = {"claims": untried, "said": "", "seconds": 0.0}
        same = False
        try:
            text = attempt_in(folder, path)
            if left <= 0:
                raise Refusal(f"not tried: the submission has used its {minutes:g} minutes")
            limit = min(left, minutes * 60 / SHARE)
            result = clean.judge(exercise, text, limit, seed, quiet=True)
            left -= result["seconds"]
            solved = all(claim["held"] for claim in result["claims"])
            same = solved and copies(text, reference[path], exercise)
        except (Refusal, OSError) as error:
            result["said"] = str(error)
        except Exception as error:  # whatever it is, the others are graded
            result["said"] = f"could not be graded: {type(error).__name__}: {error}"
        points = sum(claim["held"] for claim in result["claims"])
        graded.append({"number": n, "function": exercise["function"], "same_as_original": same,
                       "points": points, "of": len(untried), **result})
    return {"name": folder.resolve().name, "folder": str(folder),
            "points": sum(e["points"] for e in graded), "of": sum(e["of"] for e in graded),
            "exercises": graded}


def grade(folders, chosen, reference, minutes, jobs, seed, saying) -> list[dict]:
    """Grade all submissions, `jobs` at a time; saying(result) after each, in order."""
    found = submissions(folders)
    with CleanCopy(reference) as clean, ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(grade_one, folder, chosen, reference, clean, minutes, seed)
                   for folder in found]
        results = []
        try:
            for one in waiting:
                results.append(one.result())
                saying(results[-1])
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C no other is begun
    return results


def table_row(cells, width) -> str:
    return f"{cells[0]:<{width}}" + "".join(f"{cell:>6}" for cell in cells[1:])


def remarks(result) -> list[str]:
    """Why points are missing, once for each reason; and what equals the original."""
    reasons = {}
    for e in result["exercises"]:
        if e["said"]:
            reasons.setdefault(e["said"], []).append(e["number"])
        elif e["points"] < e["of"]:
            broken = next(c for c in e["claims"] if not c["held"])
            reasons.setdefault(broken["said"], []).append(e["number"])
    same = [e["number"] for e in result["exercises"] if e["same_as_original"]]
    lines = [f"{', '.join(map(str, found))}: {words}" for words, found in reasons.items()]
    return lines + [f"{', '.join(map(str, same))}: the code is the original's"] * bool(same)


def write_json(path, results, seed):
    texts = [{"number": number_of(e), "function": e["function"], "title": e["title"],
              "claims": CLAIMS[e["function"]]} for e in TEXTS]
    Path(path).write_text(json.dumps({"seed": seed, "exercises": texts, "submissions": results},
                                     indent=1, ensure_ascii=False) + "\n", "utf-8", newline="\n")

