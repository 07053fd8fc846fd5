"""Copies of the repository for tests that change it, and a quick way to run a copy's tests.

Each run happens in a child of a process that has imported torch already: a second, not three.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]

# One JSON line a job: the folder of a copy, and pytest's arguments. The child inherits the imports.
SERVER = """
import json, os, sys
import matplotlib.figure, numpy, pytest, tiktoken, torch
import torch._dynamo  # an optimiser wants it, and it takes a second
torch.set_num_threads(1)
for line in sys.stdin:
    folder, args = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.makedirs("out", exist_ok=True)
        log = os.open("out/log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.dont_write_bytecode, sys.path[:0] = True, [folder]
        code = pytest.main(args)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def copy_of_the_repository(folder) -> Path:
    """The working tree's own files, at `folder`, which must not exist yet."""
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / ".gitignore"]:
        shutil.copy(path, folder)
    for name in ("data", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def git(folder, *args) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    return subprocess.run(["git", "-C", folder, *settings, *args], capture_output=True, text=True,
                          encoding="utf-8", check=True).stdout


def copy_with_a_history(folder) -> Path:
    """`copy_of_the_repository` in a git repository of one commit: exercises.py asks for HEAD."""
    copy_of_the_repository(folder)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    return folder


class Servers:
    """with Servers(2) as servers: servers.run(folder, tests), from as many threads."""
    def __init__(self, count):
        self.free, self.all = Queue(), [subprocess.Popen(
            [sys.executable, "-c", SERVER], text=True, encoding="utf-8", stdin=subprocess.PIPE,
            stdout=subprocess.PIPE) for _ in range(count)]
        for server in self.all:
            self.free.put(server)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in self.all:
            server.communicate()  # an empty line of input ends it

    def run(self, folder, tests, *flags):
        """(exit status, output) of some tests, such as "test_data.py::test_…", in a copy."""
        args = ["-q", "--tb=short", "-rfE", "-W", "ignore", "-p", "no:cacheprovider", *flags]
        server = self.free.get()
        server.stdin.write(json.dumps([str(folder), args + [f"tests/{x}" for x in tests]]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        self.free.put(server)
        return status, (folder / "out" / "log.txt").read_text("utf-8")
