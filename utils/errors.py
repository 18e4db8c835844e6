"""What ends a command-line script early: see `utils.cli.run`."""


class UserError(ValueError):
    """Bad input: the message names the file, key or value, what was expected, and what to do. Scripts exit with 2."""


class Interrupted(Exception):
    """The run was asked to stop by the signal `signum` and has saved its state; scripts exit with 128 + signum."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
