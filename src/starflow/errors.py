"""The one exception that means "the user can fix this".

Raised wherever input is wrong (a file, a key, an argument). Its text is one line that says what was
received, what was expected and what to do. The command line prints it and exits with code 2.
"""


class UserError(ValueError):
    """Bad input, with a one-line message: received, expected, remedy."""


class DamagedFileError(UserError):
    """A file that differs from the digest it is known by."""
