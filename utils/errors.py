"""The error that means "the user can mend this": command-line scripts show its message alone and exit with code 2."""


class UserError(ValueError):
    """Bad input: the message names the file, key or value, what was expected, and what to do about it."""
