"""Errors that explain themselves: entry scripts tell them without a traceback."""


class InputError(ValueError):
    """A mistake of the user's, told in at most five lines: what was given, what is allowed, what to do.

    Entry scripts print the message on stderr and exit with code 2.
    """


class RunError(RuntimeError):
    """What ended a run, if nobody need look into the code for it; the message says what to do. The exit code is 1."""


class ExportError(RuntimeError):
    """An exported folder does not give the logits of the model that was trained."""
