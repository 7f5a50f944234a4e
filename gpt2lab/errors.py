"""Exceptions whose message is enough: entry scripts print it without a traceback."""


class InputError(ValueError):
    """Invalid configuration or input. At most five lines: the value given, what is allowed, what to do.

    Entry scripts print the message on stderr and exit with code 2.
    """


class RunError(RuntimeError):
    """A failure whose cause is outside the code; the message contains what to do. The exit code is 1."""


class ExportError(RuntimeError):
    """An exported folder does not give the logits of the model that was trained."""
