"""Errors of a job or a cluster."""

from __future__ import annotations

from data_shards.errors import Failure


class JobFailed(Failure):
    """A job was sent and did not end well."""
