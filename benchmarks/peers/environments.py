"""An environment for each peer, made on first use, with exact versions."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HOME = Path(os.environ.get("GRAFT_BENCH_HOME", Path.home() / ".cache" / "graft" / "bench"))

# torch, Pillow and psutil are those of constraints.txt: decoding must be alike.
_EVERYWHERE = ("torch==2.13.0", "pillow==13.0.0", "psutil==7.2.2")
# Installed with --no-deps are those whose own dependencies would bring torchvision, and with it another build of torch.
_ALONE = {"mosaicml-streaming": ("mosaicml-streaming==0.13.0",), "litdata": ("litdata==0.2.76",)}
_PINS = {
    "webdataset": ("webdataset==1.0.2", "numpy==2.4.6", "braceexpand==0.1.7", "PyYAML==6.0.3", "boto3==1.44.5"),
    "mosaicml-streaming": (
        *("numpy==2.1.3", "boto3==1.44.5", "Brotli==1.2.1", "python-snappy==0.7.3", "tqdm==4.70.1", "xxhash==3.8.1"),
        *("zstd==1.5.7.2", "catalogue==2.0.10", "requests==2.34.2", "matplotlib==3.11.2"),
    ),
    "litdata": (
        *("numpy==2.4.6", "boto3==1.44.5", "requests==2.34.2", "lightning-utilities==0.15.3", "tifffile==2026.3.3"),
        "obstore==0.12.1",
    ),
}
# What runs in this very environment: all that it needs is here for graft's own tests.
_BESIDE = {"lightning": ("lightning==2.6.1",)}
# What mosaicml-streaming imports of torchvision and transformers at start, none of which reading a set uses.
_STUBS = {
    "torchvision/__init__.py": "",
    "torchvision/datasets.py": "class VisionDataset: ...\n",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "def to_tensor(image): raise NotImplementedError\n",
    "transformers/__init__.py": "",
    "transformers/feature_extraction_utils.py": "class BatchFeature: ...\n",
    "transformers/tokenization_utils_base.py": "class BatchEncoding: ...\n",
    "transformers/models/__init__.py": "",
    "transformers/models/auto/__init__.py": "",
    "transformers/models/auto/tokenization_auto.py": "class AutoTokenizer: ...\n",
}


def python_of(peer: str) -> str:
    """The interpreter for a peer: this one for graft and the limit, else that of the peer's environment."""
    if peer not in _PINS:
        return sys.executable
    folder = HOME / peer
    pins = (*_EVERYWHERE, *_PINS[peer])
    wanted = hashlib.sha256(repr((sys.version, pins, _ALONE.get(peer), sorted(_STUBS.items()))).encode()).hexdigest()
    mark = folder / "graft-bench"
    if not mark.is_file() or mark.read_text() != wanted:
        print(f"making the environment of {peer} in {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *pins], check=True)
        if peer in _ALONE:
            subprocess.run([*pip, "--no-deps", *_ALONE[peer]], check=True)
        if peer == "mosaicml-streaming":
            packages = next(folder.glob("lib/python3*/site-packages"))
            for name, content in _STUBS.items():
                (packages / name).parent.mkdir(parents=True, exist_ok=True)
                (packages / name).write_text(content)
        mark.write_text(wanted)
    return str(folder / "bin" / "python")


def target_of(peer: str) -> list[Path]:
    """Folders that a peer which runs in this very environment needs on its path, installed on first use."""
    if peer not in _BESIDE:
        return []
    folder = HOME / "-".join(pin.replace("==", "-") for pin in _BESIDE[peer])
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--target", str(partial), *_BESIDE[peer]], check=True)
        partial.rename(folder)
    return [folder]


def versions() -> dict[str, str]:
    """What was compared, by exact version."""
    pins = [pin for peer in _PINS for pin in (*_ALONE.get(peer, ()), *_PINS[peer])]
    chosen = ("webdataset", "mosaicml-streaming", "litdata")
    return dict(pin.split("==") for pin in (*_EVERYWHERE, *pins) if pin.split("==")[0] in (*chosen, "torch", "pillow"))
