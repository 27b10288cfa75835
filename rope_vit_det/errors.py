"""The one exception that means: something the user gave is wrong, and this is what to do."""


class InputError(ValueError):
    """A wrong config value, file or combination of them.

    The message is a single line that names the key, file or value and says what to do about it;
    the command-line tools print it without a traceback and exit with status 2.
    """
