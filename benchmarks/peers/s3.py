"""An S3 server process on this machine (moto), with what the peers are to read."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "bench"


@contextmanager
def s3_server() -> Iterator[None]:
    """Runs a server and sets the environment by which every peer finds it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
    # S3_ENDPOINT_URL is mosaicml-streaming's, AWS_ALLOW_HTTP litdata's.
    os.environ.update(keys, AWS_ENDPOINT_URL=url, S3_ENDPOINT_URL=url, AWS_REGION="us-east-1", AWS_ALLOW_HTTP="true")
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(process, url)
            yield
        finally:
            process.terminate()
            process.wait()


def upload(folder: Path, prefix: str) -> str:
    """Puts the files of a folder and its subfolders under the prefix; returns their URL."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


def empty(folder: str) -> str:
    """The folder, empty: a peer's cache before each of its runs."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    return folder


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the S3 server did not start; moto[s3] and flask must be installed") from None
            time.sleep(0.1)
