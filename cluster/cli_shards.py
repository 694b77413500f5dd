"""`graft shards`: images to sets. As in `cli.py`, a command imports what it needs when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

shards = typer.Typer(no_args_is_help=True, help="Images to shards: datasets by name, or any folder of images.",
                     epilog="Example: graft shards pack photos --out data/photos --size 32")

Address = Annotated[str | None, typer.Option("--address", help="Join this Ray cluster, HOST:6379 or auto.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing set or manifest.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and stop.")]
ShardFolder = Annotated[str, typer.Argument(metavar="SET", help="A folder of shards, or its URL.")]


@shards.command(epilog="Example: graft shards fetch quickdraw")
def fetch(name: Annotated[str, typer.Argument(metavar="NAME", help="quickdraw, mnist, fashion-mnist, kanjivg, "
                                                                "cifar10, emoji, histology, kanjivg-strokes or words")],
          root: Annotated[Path, typer.Option(help="Folder that holds all sets.")] = Path("data")) -> None:
    """Get a dataset by name and pack its sets; what is there and intact is kept."""
    from cluster.progress import counting
    from data_shards import fetch as fetch_sets

    with counting(name) as show:
        found = fetch_sets(name, root, progress=lambda what, which, done, total: show(done, total, f"{what} {which}"))
    print(f"{name}: {len(found.sets)} sets in {root / name}, {found.packed} packed, {found.kept} kept")


@shards.command(epilog="Example: graft shards pack photos --out data/photos --size 64 --reference 0.2")
def pack(source: Annotated[str, typer.Argument(metavar="SRC", help="A folder of images, a .zip, .tar, .npz, .npy or "
                                                ".parquet file, or a folder of .parquet or WebDataset .tar files.")],
         out: Annotated[str, typer.Option("--out", metavar="DST", help="Folder for the shards, or a store's URL.")],
         size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 32,
         channels: Annotated[int, typer.Option(help="1 gray, 3 colour.")] = 3,
         kind: Annotated[str | None, typer.Option(help="folder, zip, tar, webdataset, arrays, parquet.")] = None,
         image_column: Annotated[str | None, typer.Option(help="Images, if it cannot be told.")] = None,
         label_column: Annotated[str | None, typer.Option(help="Labels, if it cannot be told.")] = None,
         reference: Annotated[float, typer.Option(help="Share of the images held out for scores; a target needs some.")] = 0.0,
         encoding: Annotated[str, typer.Option(help="png or webp (both lossless), or jpeg.")] = "png",
         quality: Annotated[int, typer.Option(help="Of JPEG, 1 to 100.")] = 95,
         background: Annotated[int, typer.Option(help="Gray value behind transparency, 0 black to 255 white.")] = 255,
         keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Keep exact copies of an image.")] = False,
         near: Annotated[int, typer.Option(help="List images whose dHash differs in so many bits; -1: do not.")] = 4,
         max_bad: Annotated[int, typer.Option(min=0, help="Unreadable images that are left out before it is an error.")] = 0,
         seed: Annotated[int, typer.Option(min=0, help="Of the held-out draw and of the order.")] = 0,
         shard_samples: Annotated[int, typer.Option(min=1, help="Images in a shard at most.")] = 4096,
         shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a shard at most.")] = 256,
         name: Annotated[str | None, typer.Option(help="Name of the set; that of SRC.")] = None,
         licence: Annotated[str, typer.Option(help="Licence of the images, for the manifest.")] = "unknown",
         processes: Annotated[int | None, typer.Option(min=1, help="Processes on this machine; its CPUs.")] = None,
         address: Address = None,
         scratch: Annotated[str | None, typer.Option(help="Folder to unpack compressed sources in; beside DST.")] = None,
         overwrite: Overwrite = False, dry_run: DryRun = False) -> None:
    """Pack images into a set of shards. Classes are subfolders, or stand in labels.csv, the table or the array.

    The same command again goes on from the shards that an interrupted one has finished.
    """
    from cluster import packing

    options: dict[str, Any] = {
        "kind": kind, "image_column": image_column, "label_column": label_column, "reference": reference,
        "encoding": encoding, "quality": quality, "background": background, "near": near, "seed": seed,
        "shard_samples": shard_samples, "shard_bytes": shard_mb << 20}
    if dry_run:
        for line in packing.describe(source, out, size, channels, overwrite=overwrite, **options):
            print(line)
        return
    made = packing.pack(source, out, size, channels, address=address, processes=processes, scratch=scratch,
                        keep_duplicates=keep_duplicates, max_bad=max_bad, name=name, licence=licence, overwrite=overwrite,
                        **options)
    print(f"{out}: {packing.summary(made)}")


@shards.command(epilog="Example: graft shards index /data/my-tars --channels 3")
def index(path: ShardFolder, channels: Annotated[int, typer.Option(help="1 gray, 3 colour.")] = 3,
          overwrite: Overwrite = False) -> None:
    """Make the manifest of WebDataset tars that another tool wrote."""
    from cluster.progress import counting
    from data_shards import index_tars

    with counting(path) as show:
        made = index_tars(path, channels=channels, overwrite=overwrite, progress=show)
    print(f"{path}: {len(made)} images in {len(made.manifest.shards)} shards")


@shards.command(epilog="Example: graft shards copy data/quickdraw/source s3://bucket/quickdraw/source")
def copy(path: ShardFolder, out: Annotated[str, typer.Argument(metavar="DST", help="A folder, or a store's URL.")],
         overwrite: Overwrite = False) -> None:
    """Copy a set to another place as it is, hashing every shard on the way."""
    from cluster.progress import counting
    from data_shards import copy_set, open_set

    opened = open_set(path)
    with counting(path) as show:
        made = copy_set(opened, out, overwrite=overwrite, progress=show)
    print(f"{out}: {len(made)} images in {len(made.manifest.shards)} shards")


@shards.command(epilog="Example: graft shards info data/quickdraw/source")
def info(path: ShardFolder) -> None:
    """What a set holds, as JSON."""
    from data_shards import info as describe_set
    from data_shards import open_set

    print(json.dumps(describe_set(open_set(path)), indent=2, ensure_ascii=False))


@shards.command(epilog="Example: graft shards verify data/quickdraw/source")
def verify(path: ShardFolder) -> None:
    """Hash every shard again and compare with the manifest."""
    from cluster.progress import counting
    from data_shards import open_set
    from data_shards import verify as verify_set

    opened = open_set(path)
    with counting(path) as show:
        verify_set(opened, progress=show)
    print(f"{path}: {len(opened.manifest.shards)} shards are the ones of the manifest")
