"""The one exception class of this project, and what others say."""

_LONGEST = 1000  # characters; a damaged file may hold a name of a mebibyte


class UserError(Exception):
    """A mistake that the user can mend. The text is one line: the value, the limit, the remedy.

    Each command's main prints it and exits with code 2; every other exception is a defect of ours
    and keeps its traceback. Names from archives and files stand in such lines, so what a terminal
    would obey (line ends, escapes) or not encode is shown as Python writes
    it, such as \\n or \\x1b.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} … {text[-297:]}"


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind: some say nothing."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
