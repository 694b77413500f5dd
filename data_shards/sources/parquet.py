"""Parquet tables of images: one file or a folder of files, as Hugging Face datasets have them.

Images are a column of bytes, or of struct{bytes, path} (paths are not followed); labels are a column of integers, with
the class names of the Hugging Face schema where it holds them, or of strings. A row cannot be read at random from
compressed pages, so the images are first written as they are, one file per row group, into the scratch folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import UserError
from data_shards.files import sync
from data_shards.images import MAX_BYTES
from data_shards.sources.base import FlatPart, MapFn, Part, Source, check_count, check_total, stamp
from data_shards.sources.labels import Labels, check_classes, from_numbers, from_values

ROWS = 8  # read at a time: a page's dictionary can make many large values out of one
THRIFT_BYTES, THRIFT_ITEMS = 64 * 1024 * 1024, 4_000_000  # of a file's own description
PARQUET_SUFFIXES = (".parquet", ".pq")
LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
EMPTY, TOO_LARGE = -1, -2


@dataclass(frozen=True)
class _Group:
    """One row group: its file, its number there, and its rows."""

    path: str
    number: int
    rows: int


def open_parquet(root: Path, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Lists the rows of the tables; the image and label columns are found by their types, or named.

    Raises `UserError` for a damaged file, columns that cannot be told, labels that do not fit, and absurd claims.
    """
    paths = [root] if root.is_file() else sorted(path for path in root.iterdir() if path.suffix.lower() in PARQUET_SUFFIXES)
    if not paths:
        raise UserError(f"folder {root} holds no .parquet file; give the folder that holds them")
    groups: list[_Group] = []
    columns: list[tuple[str, str | None, tuple[str, ...] | None]] = []
    values: list[Any] = []
    for path in paths:
        with _open(path) as table:
            columns.append(_columns(path, table.schema_arrow, image_column, label_column))
            check_count(table.metadata.num_rows, path)
            rows = [table.metadata.row_group(number).num_rows for number in range(table.metadata.num_row_groups)]
            if sum(rows) != table.metadata.num_rows or min(rows) < 0:
                raise UserError(f"{path} is damaged: its row groups do not add up; write it anew")
            groups += [_Group(str(path), number, count) for number, count in enumerate(rows) if count]
            if columns[-1][1] is not None:
                values += _label_values(path, table, columns[-1][1])
    if len(set(columns)) > 1:
        raise UserError(f"the tables in {root} differ in their columns ({columns[0]} and {columns[1]}); pack them one by one")
    image, label, names = columns[0]
    count = sum(group.rows for group in groups)
    labels, classes = _labels(values, label, names, count, str(root))
    digest = hashlib.sha256(repr([(path.name, stamp(path)) for path in paths]).encode())
    digest.update(f"{image} {label}".encode() + labels.tobytes())

    def unstaged(_indices: np.ndarray) -> Part:
        raise AssertionError("a parquet source is staged before it is read")

    def stage(scratch: Path, map_fn: MapFn) -> Source:
        folder = scratch / digest.hexdigest()[:24]
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(group, str(folder / f"{number:06d}")) for number, group in enumerate(groups)]
        for _ in map_fn(partial(_write_group, image), jobs):
            pass
        return Source("parquet", labels, classes, digest.hexdigest(), _staged(groups, [out for _, out in jobs]), notes,
                      numbered=True)

    notes = (f"images are the column {image}, labels {label or 'none'}", "rows are first written out, once, as plain files")
    return Source("parquet", labels, classes, digest.hexdigest(), unstaged, notes, stage=stage, numbered=True)


def _staged(groups: list[_Group], outs: list[str]) -> Any:
    sizes = [np.load(f"{out}.npy", allow_pickle=False) for out in outs]
    size = np.concatenate(sizes)
    offset = np.concatenate([np.cumsum(np.concatenate([[0], np.maximum(one, 0)[:-1]])) for one in sizes])
    file = np.repeat(np.arange(len(groups), dtype=np.int32), [group.rows for group in groups])
    files = tuple(f"{out}.bin" for out in outs)
    first: dict[str, int] = {}  # the row of its file that a group begins with
    starts = []
    for group in groups:
        starts.append(first.get(group.path, 0))
        first[group.path] = starts[-1] + group.rows
    bounds = np.cumsum([0, *(group.rows for group in groups)])

    def part(indices: np.ndarray) -> FlatPart:
        names = [
            f"{Path(groups[number].path).name}[{starts[number] + index - bounds[number]}]"
            for index, number in zip(indices.tolist(), file[indices].tolist(), strict=True)
        ]
        return FlatPart(files, names, file[indices], offset[indices], size[indices])

    return part


def _write_group(column: str, job: tuple[_Group, str]) -> int:
    """Writes the images of a row group one behind the other, and their sizes in `.npy`; returns the rows."""
    group, out = job
    if Path(f"{out}.npy").exists():
        return group.rows
    path, sizes, total = Path(group.path), [], 0
    try:
        with _open(path) as table, open(f"{out}.bin", "wb") as file:
            field = f"{column}.bytes" if pa.types.is_struct(table.schema_arrow.field(column).type) else column
            for batch in table.iter_batches(ROWS, row_groups=[group.number], columns=[field], use_threads=False):
                values = batch.column(0)
                for value in values.field("bytes") if pa.types.is_struct(values.type) else values:
                    data = value.as_buffer()
                    size = EMPTY if data is None or not data.size else TOO_LARGE if data.size > MAX_BYTES else data.size
                    sizes.append(size)
                    if size > 0:
                        total += size
                        check_total(total, path)
                        file.write(data)
    except (pa.ArrowException, MemoryError, OSError) as error:
        raise UserError(f"{path}, row group {group.number}, cannot be read ({' '.join(str(error).split())[:200]})") from None
    if len(sizes) != group.rows:
        raise UserError(f"{path}, row group {group.number}, holds {len(sizes)} rows, not the {group.rows} it claims")
    sync(Path(f"{out}.bin"))
    temporary = Path(f"{out}.partial")
    with temporary.open("wb") as file:
        np.save(file, np.array(sizes, np.int64), allow_pickle=False)
    sync(temporary)
    temporary.replace(f"{out}.npy")
    return group.rows


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(
            path, thrift_string_size_limit=THRIFT_BYTES, thrift_container_size_limit=THRIFT_ITEMS, buffer_size=1 << 20,
            pre_buffer=False, page_checksum_verification=True,
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({' '.join(str(error).split())[:200]}); write it anew") from None


def _columns(path: Path, schema: Any, image: str | None, label: str | None) -> tuple[str, str | None, tuple[str, ...] | None]:
    """(image column, label column, class names where the Hugging Face schema has them)."""
    features = _features(schema)
    for name in (image, label):
        if name is not None and name not in schema.names:
            raise UserError(f"{path} has no column {name!r}; its columns: {', '.join(schema.names)}")
    pictures = [name for name in schema.names if _is_image(schema.field(name).type)]
    marked = [name for name in pictures if features.get(name, {}).get("_type") == "Image"]
    if image is None:
        choice = marked or pictures
        if len(choice) != 1:
            raise UserError(f"{path} has {len(choice)} columns of images among {', '.join(schema.names)}; use --image-column")
        image = choice[0]
    elif image not in pictures:
        raise UserError(f"column {image!r} of {path} is {schema.field(image).type}, not bytes or struct<bytes, path>")
    if label is None:
        classed = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
        usual = [name for name in LABEL_NAMES if name in schema.names and name != image]
        if len(classed) > 1:
            raise UserError(f"{path} has {len(classed)} columns of labels ({', '.join(classed)}); use --label-column")
        label = classed[0] if classed else usual[0] if usual else None
    kind = None if label is None else schema.field(label).type
    if kind is not None and not (pa.types.is_integer(kind) or _is_text(kind)):
        raise UserError(f"column {label!r} of {path} is {kind}; labels are integers or strings, so use --label-column")
    names = features.get(label or "", {}).get("names")
    if isinstance(names, dict):  # of an old version: {"0": "cat", ...}
        names = [names[key] for key in sorted(names, key=int)]
    return image, label, check_classes(names, str(path)) if isinstance(names, list) else None


def _features(schema: Any) -> dict[str, Any]:
    """The columns' descriptions that Hugging Face's libraries leave in the schema, {} for none."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {str(key): value for key, value in found.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _label_values(path: Path, table: Any, column: str) -> Iterator[Any]:
    for batch in table.iter_batches(4096, columns=[column], use_threads=False):
        if batch.nbytes > THRIFT_BYTES:
            raise UserError(f"the labels {column} in {path} are too large to be labels; use --label-column")
        yield from batch.column(0).to_pylist()


def _labels(values: list[Any], column: str | None, names: tuple[str, ...] | None, count: int, where: str) -> Labels:
    if column is None:
        return np.full(count, -1, np.int32), ()
    if len(values) != count:
        raise UserError(f"column {column} in {where} holds {len(values)} labels for {count} rows; write the table anew")
    if names is None:
        return from_values([None if value == -1 else value for value in values], where)
    return from_numbers(np.array([-1 if value is None else value for value in values], np.int64), where, names)
