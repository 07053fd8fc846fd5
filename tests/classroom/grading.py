"""Many submissions graded in one command, and the hand-out that they start from."""
import ast
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from classroom.judge import CleanCopy
from classroom.workspace import TEXTS, Refusal, empty_all, find, read, written_part

SHARE = 8  # one exercise may take this part of a submission's time
LITTER = ("__MACOSX", "__pycache__")  # what archives leave; also names that begin with a dot


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
    found = [*root.glob("*.py"), *root.glob("data/**/*"), *root.glob(".github/**/*"),
             *root.glob("tests/classroom/*.py"), *(root / name for name in (
                 "README.md", "requirements.txt", ".gitignore", ".gitattributes",
                 "tests/exercises.py", "tests/classroom/exercises.toml",
                 "tests/classroom/README.md", "tests/classroom/EXPERIMENTS.md"))]
    return sorted(path.relative_to(root).as_posix() for path in found
                  if path.is_file() and "__pycache__" not in path.parts)


def hand_out(root, folder, chosen, reference) -> int:
    """Write a copy of the repository with the chosen functions empty. Returns how many files."""
    root, folder = Path(root), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"{folder} is there already; name a new folder")
    exercises, files = [TEXTS[n - 1] for n in chosen], handed_files(root)
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in reference:
            text = empty_all(reference[file], file, exercises)
            for copy in (target, folder / "tests" / "classroom" / "shipped" / file):
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text, "utf-8")
        else:
            shutil.copy(root / file, target)
    return len(files)


# --- grading -------------------------------------------------------------------------------------

def submissions(folders) -> list[Path]:
    """Each folder that holds one of the product's files; of other folders, their subfolders.

    A subfolder whose only content is another folder, as archives make it, is searched once more.
    """
    holds = lambda folder: any((folder / e["file"]).is_file() for e in TEXTS)
    inside = lambda folder: sorted(path for path in folder.iterdir() if path.is_dir()
                                   and path.name not in LITTER and not path.name.startswith("."))
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise Refusal(f"{folder} is no folder")
        for one in [folder] if holds(folder) else inside(folder):
            deeper = [path for path in inside(one) if holds(path)]
            found += deeper if deeper and not holds(one) else [one]
    return found


def is_copy(attempt, reference, exercise) -> bool:
    """Whether an attempt is the original, comments and docstring aside."""
    code = lambda text: [ast.dump(s) for s in written_part(
        find(ast.parse(text), exercise["function"]), exercise)]
    return code(attempt) == code(reference)


def grade_one(folder, chosen, reference, clean, minutes, seed) -> dict:
    """Grade one submission: {"name", "points", "of", "exercises": […]}."""
    left, graded = minutes * 60, []
    for n in chosen:
        exercise, same = TEXTS[n - 1], False
        result = clean.untried(exercise)
        try:
            text = read(folder / exercise["file"])
            if left <= 0:
                raise Refusal(f"not tried: the submission has used its {minutes:g} minutes")
            result = clean.judge(exercise, text, min(left, minutes * 60 / SHARE), seed, quiet=True)
            left -= result["seconds"]
            same = all(c["held"] for c in result["claims"]) and is_copy(
                text, reference[exercise["file"]], exercise)
        except Exception as error:  # whatever it is, the others are graded
            result["said"] = str(error)
        graded.append({"number": n, "function": exercise["function"], "same_as_original": same,
                       "points": sum(c["held"] for c in result["claims"]),
                       "of": len(result["claims"]), **result})
    return {"name": folder.resolve().name, "folder": str(folder), "exercises": graded,
            "points": sum(e["points"] for e in graded), "of": sum(e["of"] for e in graded)}


def grade(folders, chosen, reference, minutes, jobs, seed, saying) -> list[dict]:
    """Grade all submissions, `jobs` at a time; saying(result) after each, in order."""
    with CleanCopy(reference) as clean, ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(grade_one, folder, chosen, reference, clean, minutes, seed)
                   for folder in folders]
        try:
            return [saying(one.result()) for one in waiting]
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C no other is begun


def remarks(result) -> list[str]:
    """Why points are missing, once for each reason; and what equals the original."""
    reasons = {}
    for e in result["exercises"]:
        broken = next((c["said"] for c in e["claims"] if not c["held"]), "")
        if e["said"] or broken:
            reasons.setdefault(e["said"] or broken, []).append(e["number"])
        if e["same_as_original"]:
            reasons.setdefault("the code is the original's", []).append(e["number"])
    return [f"{', '.join(map(str, found))}: {words}" for words, found in reasons.items()]
