"""The one exception for mistakes that a user can mend: a wrong file, key or argument.

Its text is one line that says what was received, what was expected and what to do. The command line prints it and exits
with code 2.
"""


class UserError(ValueError):
    """Wrong input, with a message of one line: what was received, what was expected, what to do.

    >>> raise UserError("the batch is 0, expected at least 1: give --batch")
    Traceback (most recent call last):
    starflow.errors.UserError: the batch is 0, expected at least 1: give --batch
    """
