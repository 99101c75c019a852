"""Errors that a user can fix. The message is one line that says what is wrong and what to do. The command line prints only that line."""

from __future__ import annotations


class UserError(ValueError):
    """The base class. White space in the message, line breaks included, becomes single spaces."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class InputError(UserError):
    """Images, videos, points or options that cannot be used."""


class ConfigError(UserError):
    """A configuration that contradicts itself, or a preset that does not exist."""


class CheckpointError(UserError):
    """A weights file that is missing, damaged, holds something else, or does not fit the model."""
