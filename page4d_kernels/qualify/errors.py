"""Errors of this package, each one line for the user."""


class QualifyError(RuntimeError):
    """The options do not fit, or the record cannot be written."""
