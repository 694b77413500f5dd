"""Errors of a job or a cluster that are not the caller's mistake, and need no traceback all the same."""

from __future__ import annotations


class JobFailed(RuntimeError):
    """A job was sent and did not end well: one sentence, exit code 1."""
