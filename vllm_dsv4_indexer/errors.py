"""The errors that are meant for users."""


class UserError(ValueError):
    """Something that the user asked for or set cannot be honoured: the message says what was found
    and what to do.

    Every error that a user can mend is of this class, and our commands print it as one line. Any
    other exception is a fault of ours or of a library, and keeps its traceback.
    """


class NotInstalled(UserError, ImportError):
    """What is needed is missing, or is not the one that fits: the message says how to get it."""
