"""What the code of an exercise may not do, told by reading it, and enforced again while it runs.

No exercise needs a file, a process, the network or Python's own insides; an attempt that reaches
for them is not run. This is no sandbox: see README.md, "What grading cannot guarantee".
"""
import ast
import os
import sys
import sysconfig

MODULES = {"torch", "math", "cmath", "numpy", "collections", "itertools", "functools", "operator",
           "heapq", "bisect", "copy", "random", "typing", "dataclasses", "contextlib", "abc",
           "statistics", "numbers", "fractions", "string", "types", "time", "os", "warnings",
           # The product's own modules: they are imported from a copy without the solutions.
           "model", "sample", "spin_loss", "train", "data", "__future__"}
NAMES = {"open", "exec", "eval", "compile", "__import__", "globals", "locals", "vars", "breakpoint",
         "input", "exit", "quit", "setattr", "delattr", "getattr", "__builtins__", "__loader__",
         "__spec__"}
ATTRIBUTES = {"os", "sys", "subprocess", "builtins", "inspect", "ctypes", "importlib", "gc",
              "system", "popen", "modules", "hub", "ops", "serialization", "package",
              "cpp_extension", "ctypeslib", "f2py", "from_file", "fromfile", "memmap", "load",
              "loadtxt", "genfromtxt", "save", "savez", "savetxt", "tofile", "attrgetter",
              "methodcaller", "f_back", "f_globals", "f_locals", "tb_frame", "tb_next", "gi_frame",
              "cr_frame", "_getframe", "exit", "kill", "multiprocessing", "threading", "signal",
              "socket", "pathlib", "shutil", "testing"}
OWN = {"self", "cls", "ctx", "cache"}  # whose attributes an exercise may set
DUNDERS = {"__init__", "__name__", "__len__", "__getitem__", "__call__", "__eq__", "__add__"}


def broken_rules(nodes) -> list[str]:
    """One line for each thing that these functions and statements may not do; usually none."""
    found = {}
    for root in nodes:
        local = names_bound_in(root)
        for node in ast.walk(root):
            for what in broken_by(node, local):
                found.setdefault(what, f"line {getattr(node, 'lineno', '?')} {what}")
    return list(found.values())


def broken_by(node, local):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        relative = isinstance(node, ast.ImportFrom) and node.level
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
            alias.name for alias in node.names]
        for name in names:
            parts = set(name.split(".")[1:]) | {alias.name for alias in node.names}
            if relative or name.split(".")[0] not in MODULES or parts & (ATTRIBUTES | NAMES):
                yield f"imports {name or '.'}, which no exercise needs"
            if name == "os":
                yield "imports os, which no exercise needs"
            if any(alias.name == "*" for alias in node.names):
                yield f"imports everything from {name}, which no exercise needs"
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield f"uses {node.id}, which no exercise needs"
    elif isinstance(node, ast.Attribute):
        root = root_of(node)
        plain_os = root == "os" and ast.unparse(node) not in ("os.path", "os.path.commonprefix")
        dunder = node.attr.startswith("__") and node.attr not in DUNDERS
        private = node.attr.startswith("_") and node.attr not in DUNDERS and root not in OWN
        if node.attr in ATTRIBUTES or plain_os or private or dunder:
            yield f"uses {ast.unparse(node)[:40]}, which no exercise needs"
        own = isinstance(node.value, ast.Name) and root in OWN and root not in local
        if not isinstance(node.ctx, ast.Load) and not own:
            yield f"changes {ast.unparse(node)[:40]}, which is not its own"
    elif isinstance(node, ast.Global):
        yield "changes global names, which no exercise needs"


def root_of(node) -> str | None:
    """The name that a chain of attributes starts with: a.b[0].c -> "a"."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def names_bound_in(node) -> set[str]:
    """Names that are assigned to within a function, or that have a default value in it."""
    bound = {name.id for name in ast.walk(node)
             if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.arguments) and (inner.defaults or inner.kw_defaults):
            positional = inner.posonlyargs + inner.args
            bound |= {arg.arg for arg in positional[len(positional) - len(inner.defaults):]}
            bound |= {arg.arg for arg in inner.kwonlyargs}
    return bound


# --- while it runs -------------------------------------------------------------------------------

NEVER = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
         "os.startfile", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
         "os.truncate", "os.chmod", "os.chown", "os.putenv", "os.chdir", "os.fwalk", "os.walk",
         "socket.", "shutil.", "pty.", "winreg.", "urllib.", "ctypes.dlopen", "glob.", "pdb.",
         "webbrowser.", "sqlite3.", "gc.")


def forbid_the_rest_of_the_machine(tree):
    """From now on, in this process: no file but Python's own and those in `tree`, no process."""
    normal = lambda path: os.path.normcase(os.path.realpath(path))
    roots = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), tree}
    roots |= {path for path in sys.path if "site-packages" in path or "dist-packages" in path}
    roots = tuple(normal(root) + os.sep for root in roots)

    def hook(event, args):
        if event in ("open", "os.listdir", "os.scandir"):
            path = args[0]
            if isinstance(path, int):
                return
            path = normal(os.fsdecode("." if path is None else path))
            writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
            if writes or not (path + os.sep).startswith(roots):
                raise PermissionError(f"an exercise may not open {os.path.basename(path)}")
        elif event.startswith(NEVER):
            raise PermissionError(f"an exercise may not use {event}")
    sys.addaudithook(hook)
