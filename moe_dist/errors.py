"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: one sentence that names the key, file or number at fault.

    Command lines print the sentence without a traceback and exit with status 2.
    """
