"""Files out of an archive that a dataset is made of."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path

from data_shards.errors import UserError


def read_members(archive: Path, names: Collection[str], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Reads the files `names` of a .tar.gz, in its order: (name, content).

    Raises `UserError` for one that has more than `max_bytes`, and at the end for one that is not there.
    """
    missing = set(names)
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() and member.name in missing else None
            if stream is None:
                continue
            if member.size > max_bytes:
                raise UserError(f"{member.name} in {archive} has {member.size} bytes, over the cap of {max_bytes}; remove the"
                                " archive and fetch it again")
            missing.remove(member.name)
            yield member.name, stream.read()
            if not missing:  # what lies behind need not be unpacked
                return
    raise UserError(f"{archive} lacks the file {min(missing)!r}; remove it and fetch it again")
