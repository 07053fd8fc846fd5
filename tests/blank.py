"""One function of the working copy, emptied and put back: what exercises.py stands on.

Lines are bytes, so that what is put back is what was there, line ends included.
"""
import ast
import subprocess
import sys


def refuse(why):
    """One line on standard error and exit status 2."""
    sys.exit(print(f"exercises.py: {why}", file=sys.stderr) or 2)


class Function:
    """A function such as "model.Attention.forward", in HEAD and in the working copy.

    `original` and `stub` are its lines in HEAD and the same with `raise NotImplementedError(why)`
    for a body; `now()` are those in the working copy, which `put` replaces.
    """
    def __init__(self, root, name, why):
        self.name, (module, *self.names) = name, name.split(".")
        self.path = root / f"{module}.py"
        try:
            git = subprocess.run(["git", "-C", root, "show", f"HEAD:./{module}.py"],
                                 capture_output=True)
        except FileNotFoundError:
            refuse("the originals come from git, which is not installed here")
        if git.returncode:
            refuse(f"the originals come from git: {git.stderr.decode().strip().splitlines()[-1]}")
        self.here = self.path.read_bytes().splitlines(keepends=True)
        end = b"\r\n" if self.here and self.here[0].endswith(b"\r\n") else b"\n"
        self.head = [line + end for line in git.stdout.splitlines()]
        a, self.end, body = self.find(self.head)
        first = self.head[body]  # lends the stub its indentation and line end
        raise_ = f'raise NotImplementedError("{why}")'.encode()
        self.original = self.head[a:self.end]
        self.stub = self.head[a:body] + [first.replace(first.strip(), raise_)]
        if self.original == self.stub:
            refuse(f"HEAD itself has {name} empty; the solution is in an earlier commit")

    def find(self, lines):
        """Where the function stands: its first line, the line after it, the first of its body."""
        node = ast.parse(b"".join(lines))
        for name in self.names:
            node, = (child for child in node.body if getattr(child, "name", None) == name)
        return node.lineno - 1, node.end_lineno, node.body[bool(ast.get_docstring(node))].lineno - 1

    def place(self):
        """(first line, line after it) in the working copy, even where that is no valid Python."""
        try:
            return self.find(self.here)[:2]
        except (SyntaxError, ValueError):  # then from its `def` to the line that follows it in HEAD
            after = next(line for line in self.head[self.end:] if line.strip())
            if self.original[0] in self.here:
                a = b = self.here.index(self.original[0])
                if after in self.here[a:]:
                    b += self.here[a:].index(after)
                    while not self.here[b - 1].strip():
                        b -= 1  # blank lines stay
                    return a, b
        refuse(f"{self.name} is not to be found in {self.path.name} any more: see "
               f"`git diff {self.path.name}`")

    def now(self):
        a, b = self.place()
        return self.here[a:b]

    def put(self, lines):
        a, b = self.place()
        self.path.write_bytes(b"".join(self.here[:a] + lines + self.here[b:]))
