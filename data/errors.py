"""The one error that a user may see: what was given cannot be used, in one line."""
import difflib


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, how to mend it."""
    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


def nearest(word, known) -> str:
    """"; did you mean …?" for a misspelt word, or nothing."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], 1, 0.67)
    return f"; did you mean {close[0]}?" if close else ""
