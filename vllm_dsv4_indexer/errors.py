"""The errors that a user can mend."""


class UserError(ValueError):
    """What the user asked for cannot be done. The message says what was found and what to do.

    Every error that a user can mend is of this class. Our commands print it as one line. Any other
    exception is a fault of ours or of a library, and keeps its traceback.
    """


class NotInstalled(UserError, ImportError):
    """Something that is needed is missing or has the wrong version. The message says how to get
    it."""
