"""The toy world, and what is known of it exactly."""
import sys


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, how to mend it."""
    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


def in_one_line(kind, error, trace):
    """What goes wrong while imports go on, before `command` watches, is one line as well."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything began", file=sys.stderr)
    elif issubclass(kind, ImportError):
        print(f"{error}; pip install -r requirements.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = in_one_line
