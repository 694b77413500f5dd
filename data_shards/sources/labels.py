"""Class labels of a source: from the folders that images lie in, from a table, or from values found beside them."""

from __future__ import annotations

import csv
from collections.abc import Container, Iterable, Sequence

import numpy as np

from data_shards.errors import UserError

LABELS = "labels.csv"
MAX_CLASSES = 100_000
MAX_CLASS_NAME = 200  # characters

Labels = tuple[np.ndarray, tuple[str, ...]]  # int32 (N,), and the class names


def from_names(names: Sequence[str], table: Iterable[str] | None, where: str) -> Labels:
    """Labels of images by their relative names: from the lines of `labels.csv` (columns file,label) if there is one, else
    from the first-level folders if no image lies outside them, else none.

    `where` names the source in messages. Raises `UserError` for a table that does not fit or for lone images.
    """
    if table is not None:
        return _named(_from_table(names, table, f"{where}/{LABELS}"))
    inside = sum("/" in name for name in names)
    if not inside:
        return np.full(len(names), -1, np.int32), ()
    if inside < len(names):
        lone = next(name for name in names if "/" not in name)
        raise UserError(
            f"{where} holds images in subfolders and {len(names) - inside} beside them, such as {lone}; move these into a"
            f" subfolder, or name every label in {LABELS}"
        )
    return _named(name.split("/", 1)[0] for name in names)


def without_wrapper(names: Sequence[str], tables: Container[str]) -> str:
    """The one folder, as "name/", that holds all there is in an archive, with subfolders or a labels.csv (among `tables`) of
    its own; "" if there is none."""
    head = names[0].split("/", 1)[0] + "/"
    wrapped = all(name.startswith(head) for name in names)
    return head if wrapped and (head + LABELS in tables or any("/" in name[len(head) :] for name in names)) else ""


def from_values(found: Sequence[int | str | None], where: str) -> Labels:
    """Labels of all one kind: names become sorted classes, numbers 0 to n the classes "0" to "n"; None is no label.

    Raises `UserError` for mixed kinds, negative numbers, or too many classes.
    """
    kinds = {type(label) for label in found if label is not None}
    if len(kinds) > 1:
        raise UserError(f"labels in {where} are partly numbers and partly names; use one kind")
    if kinds == {str}:
        return _named(found)
    labels = np.array([-1 if label is None else label for label in found], np.int64)
    return from_numbers(labels, where)


def from_numbers(labels: np.ndarray, where: str, classes: Sequence[str] | None = None) -> Labels:
    """Integer labels, -1 where there is none, with the names of the classes where they are known; see `from_values`."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"the labels in {where} are {labels.dtype} {labels.shape}, not one integer or name for each image")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (-1, -1)
    count = min(high + 1, MAX_CLASSES) if classes is None else len(classes)
    if low < -1 or high >= count:
        raise UserError(
            f"the labels in {where} go from {low} to {high}, where 0 to {max(count, 1) - 1} and -1 for none can be; renumber"
            f" them (a set has at most {MAX_CLASSES} classes)"
        )
    return labels.astype(np.int32), tuple(map(str, range(count))) if classes is None else tuple(classes)


def check_classes(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Returns class names if they can be those of a set; raises `UserError` otherwise."""
    classes = tuple(names)
    for name in classes:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_CLASS_NAME or not name.isprintable():
            raise UserError(
                f"{where} has a class called {str(name)[:80]!r}; a class name has 1 to {MAX_CLASS_NAME} printable characters"
            )
    if len(classes) > MAX_CLASSES or len(set(classes)) < len(classes):
        raise UserError(f"{where} has {len(classes)} classes; at most {MAX_CLASSES} are possible, each with its own name")
    return classes


def _named(values: Iterable[int | str | None]) -> Labels:
    """Numbers for names, in the order of the sorted names."""
    numbers: dict[str, int] = {}
    found = np.fromiter(
        (-1 if value is None else numbers.setdefault(str(value), len(numbers)) for value in values), np.int32
    )
    classes = check_classes(sorted(numbers), "the source")
    ranks = np.empty(len(numbers) + 1, np.int32)
    ranks[-1] = -1
    for rank, name in enumerate(classes):
        ranks[numbers[name]] = rank
    return ranks[found], classes


def _from_table(names: Sequence[str], table: Iterable[str], where: str) -> list[str]:
    known = dict.fromkeys(names, "")
    try:
        for line, row in enumerate(csv.DictReader(table), start=2):
            file, label = (row.get("file") or "").strip(), (row.get("label") or "").strip()
            if not file or not label:
                raise UserError(f"{where} line {line} lacks a file or a label; its columns must be named file and label")
            if file not in known:
                raise UserError(f"{where} line {line} names {file!r}, which is no image in the folder; correct the row")
            if known[file] not in ("", label):
                raise UserError(f"{where} line {line} gives {file!r} a second label {label!r}; keep one")
            known[file] = label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where} cannot be read as CSV in UTF-8 ({error})") from None
    missing = [file for file, label in known.items() if not label]
    if missing:
        raise UserError(f"{where} has no row for {missing[0]} ({len(missing)} such images); add it or remove the image")
    return list(known.values())
