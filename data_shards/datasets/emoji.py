"""Emoji of two vendors, from the npm package emoji-datasource: each vendor's style as a source and as a target, RGB on white.

Both vendors draw the same code points, so the split is one of code points, the same for both: what a target shows is in no
source. The forms of one concept (man, woman and person with the same gesture) differ by a few pixels and stay on one side, and
of code points that a vendor draws alike only the first is kept. The package has pictures of two more vendors, which are not
free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.members import read_members
from data_shards.datasets.plan import SIDE, SetPlan
from data_shards.errors import BadImage, UserError
from data_shards.images import fit_image, open_image
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="npm",
    package="emoji-datasource",
    version="16.0.0",
    filename="emoji-datasource-16.0.0.tgz",
    sha256="2006725061dc0098daa832d65f854a7bec0740af2eb47cb5b23d89f7e2c849f9",
)
VERSION = 1
VENDORS = {  # with a free licence
    "google": "Apache-2.0 (Noto Emoji, Google); package MIT",
    "twitter": "CC BY 4.0 (Twemoji, Twitter and contributors); package MIT",
}
SOURCE = "npm emoji-datasource@16.0.0"
SHARD_SAMPLES = 64
POOL, REFERENCE = 150, 350  # code points of a target: 100 shots leave 50 to choose candidates on
CLASSES = (  # by label; the table's other categories are left out: flags, and five swatches of skin
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects",
    "Symbols",
)  # fmt: skip
SETS = 2 * len(VENDORS)

_TABLE = "package/emoji.json"
_SHEETS = {f"package/img/{vendor}/sheets/32.png": vendor for vendor in VENDORS}
_CELL = SIDE + 2  # pixels: a picture of a sheet has a border of 1
_CODE = re.compile(r"[0-9A-F]{4,6}(-[0-9A-F]{4,6})*")
_PERSON = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man and woman -> person
_UNSEEN = {"200D", "FE0F", "2640", "2642"}  # joiner, variation selector, female and male sign
_MAX_BYTES = 16 * 1024 * 1024
_REMEDY = "remove the archive and fetch it again"


class Emoji(NamedTuple):
    """A row of the table: code points as in "1F3C3-200D-2642-FE0F", concept, label, and place in each sheet, in cells."""

    code: str
    concept: str
    label: int
    row: int
    column: int


def sets(archive: Path) -> Iterator[SetPlan]:
    """Each vendor's source, labelled by category, and its target of 150 code points as pool and 350 others as reference."""
    table, sheets = read_archive(archive)
    pictures = {vendor: {emoji.code: picture(sheet, emoji) for emoji in table} for vendor, sheet in sheets.items()}
    codes = distinct(pictures)
    kept = [emoji for emoji in table if emoji.code in codes]
    parts = split_codes({emoji.code: emoji.concept for emoji in kept})
    labels = {emoji.code: emoji.label for emoji in kept}
    for vendor, licence in VENDORS.items():
        plan = partial(SetPlan, classes=CLASSES, licence=licence, source=SOURCE, shape=(3, SIDE, SIDE))
        source, target = {"train": parts["source"]}, {split: parts[split] for split in ("train", "reference")}
        yield plan(f"emoji/{vendor}", partial(_samples, pictures[vendor], labels, source), shard_samples=SHARD_SAMPLES)
        yield plan(f"emoji/{vendor}-target", partial(_samples, pictures[vendor], labels, target))


def read_archive(archive: Path) -> tuple[list[Emoji], dict[str, np.ndarray]]:
    """Reads the table and each vendor's sheet, uint8 (3, H, W), its transparency on white."""
    table, sheets = b"", {}
    for name, data in read_members(archive, {_TABLE, *_SHEETS}, _MAX_BYTES):
        if name == _TABLE:
            table = data
            continue
        try:
            sheet = open_image(data)
            sheets[_SHEETS[name]] = fit_image(sheet, (sheet.height, sheet.width), 3)
        except BadImage as error:
            raise UserError(f"{name} in {archive}: {error}; {_REMEDY}") from None
    rows, columns = np.min([sheet.shape[1:] for sheet in sheets.values()], 0) // _CELL
    return parse_table(table, int(rows), int(columns)), sheets


def parse_table(data: bytes, rows: int, columns: int) -> list[Emoji]:
    """Parses the table, sorted by code, to the emoji of our categories that every vendor has; the sheets have so many cells."""
    try:
        content: Any = json.loads(data)
        found = [
            Emoji(entry["unified"], concept_of(entry.get("obsoleted_by") or entry["unified"]),
                  CLASSES.index(entry["category"]), entry["sheet_y"], entry["sheet_x"])
            for entry in content
            if entry["category"] in CLASSES and all(entry[f"has_img_{vendor}"] is True for vendor in VENDORS)
        ]  # fmt: skip
        sound = len({emoji.code for emoji in found}) == len(found) and all(
            _CODE.fullmatch(emoji.code) and 0 <= emoji.row < rows and 0 <= emoji.column < columns for emoji in found
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{_TABLE} in {ARCHIVE.filename} is no table of emoji with their places in the sheets; {_REMEDY}")
    return sorted(found)


def concept_of(code: str) -> str:
    """What a sequence of code points shows, whether of a man, a woman or a person: "1F468-200D-1F33E" -> "1F9D1-1F33E"."""
    return "-".join(_PERSON.get(point, point) for point in code.split("-") if point not in _UNSEEN)


def picture(sheet_CHW: np.ndarray, emoji: Emoji) -> np.ndarray:
    """Cuts one picture out of a sheet, uint8 (3, 32, 32)."""
    top, left = emoji.row * _CELL + 1, emoji.column * _CELL + 1
    return sheet_CHW[:, top : top + SIDE, left : left + SIDE]


def distinct(pictures: Mapping[str, Mapping[str, np.ndarray]]) -> set[str]:
    """The codes, of vendor -> code -> picture, that no vendor draws exactly as it draws an earlier one."""
    copies: set[str] = set()
    for drawn in pictures.values():
        seen: set[bytes] = set()
        for code, image in drawn.items():
            if (content := image.tobytes()) in seen:
                copies.add(code)
            seen.add(content)
    return {code for drawn in pictures.values() for code in drawn} - copies


def split_codes(concepts: Mapping[str, str]) -> dict[str, list[str]]:
    """Splits codes (-> their concepts) into {"train", "reference", "source"}, sorted.

    The concepts are permuted once with RandomState(0), and each goes whole to the first part that has room for it: 150 codes in
    the pool, 350 in the reference, the source for the others. Raises `UserError` if they do not suffice.
    """
    names = sorted(set(concepts.values()))
    members: dict[str, list[str]] = {name: [] for name in names}
    for code, name in concepts.items():
        members[name].append(code)
    room = {"train": POOL, "reference": REFERENCE, "source": len(concepts)}
    parts: dict[str, list[str]] = {part: [] for part in room}
    for index in np.random.RandomState(0).permutation(len(names)).tolist():
        codes = members[names[index]]
        part = next(part for part, bound in room.items() if len(parts[part]) + len(codes) <= bound)
        parts[part] += codes
    if (len(parts["train"]), len(parts["reference"])) != (POOL, REFERENCE) or not parts["source"]:
        raise UserError(f"{ARCHIVE.filename} has {len(concepts)} emoji, too few for {POOL + REFERENCE} in a target; {_REMEDY}")
    return {part: sorted(codes) for part, codes in parts.items()}


def _samples(drawn: Mapping[str, np.ndarray], labels: Mapping[str, int], splits: Mapping[str, list[str]]) -> Iterator[Sample]:
    for split, codes in splits.items():
        for code in codes:
            yield Sample(f"u{code.lower()}", drawn[code], labels[code], split)
