"""Mistakes a user can put right. The message is one line that says what is wrong and what to do; the command line prints just that."""

from __future__ import annotations


class UserError(ValueError):
    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class InputError(UserError):
    """Images, videos, points or options that cannot be used."""


class ConfigError(UserError):
    """A configuration that contradicts itself, or a preset that does not exist."""


class CheckpointError(UserError):
    """A weights file that is missing, damaged, holds something else, or does not fit the model."""
