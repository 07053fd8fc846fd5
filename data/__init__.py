"""The toy world, and what is known of it exactly."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, how to mend it."""
    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))
