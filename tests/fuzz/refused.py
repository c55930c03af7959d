"""How a target says that its parser refused an input by other means than a UserError."""


class Refused(Exception):
    """The text is the parser's own reason."""
