"""The one exception for a mistake in the configuration or the input; entry scripts answer it with exit code 2."""


class InputError(ValueError):
    """A mistake of the user's, told in at most five lines: what was given, what is allowed, what to do.

    Entry scripts print the message on stderr without a traceback and exit with code 2.
    """
