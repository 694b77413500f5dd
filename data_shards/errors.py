"""The errors of this package: each message is one sentence that names the value and the remedy."""

from __future__ import annotations


class Failure(RuntimeError):
    """What is not the caller's mistake and needs no traceback all the same: one sentence, exit code 1."""


class UserError(ValueError):
    """The caller's mistake, or data that cannot be used: one sentence naming the value and the remedy."""


class BadImage(UserError):
    """Bytes that are not an image we accept (format, size, damage)."""


class DamagedShard(UserError):
    """A shard whose bytes are not the ones its manifest describes; the message names the shard."""
