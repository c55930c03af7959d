"""The one exception class of this project."""


class UserError(Exception):
    """A mistake that the user can mend. The text is one line: the value, the limit, the remedy.

    Each command's main prints it and exits with code 2; every other exception is a defect of ours
    and keeps its traceback.
    """
