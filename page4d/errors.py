"""Errors that a user can fix. The message is one line that says what is wrong and what to do. The command line prints only that line."""

from __future__ import annotations

import re


class UserError(ValueError):
    """The base class. White space and control characters in the message, line breaks included, become single spaces."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """The text without control characters, and with single spaces."""
    return " ".join(_CONTROL.sub(" ", text).split())


_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x1f\x7f-\x9f]")  # with the colour codes of terminals


class InputError(UserError):
    """Images, videos, points or options that cannot be used."""


class ConfigError(UserError):
    """A configuration that contradicts itself, or a preset that does not exist."""


class CheckpointError(UserError):
    """A weights file that is missing, damaged, holds something else, or does not fit the model."""


class RankError(UserError):
    """Another process of a group failed, ended, or did not come. `rank`: which, None if nobody knows. `reason`: what it said."""

    def __init__(self, rank: int | None, reason: str) -> None:
        super().__init__(reason if rank is None or reason.startswith("rank") else f"rank {rank}: {reason}")
        self.rank, self.reason = rank, reason
