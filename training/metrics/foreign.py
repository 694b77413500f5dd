"""Feature nets from a file that the user names: TorchScript (.pt) and ONNX (.onnx) programs, with a settings file beside.

Beside NET.pt or NET.onnx stands NET.pt.json or NET.onnx.json: {"input_size": 224, "channels": 3, "mean": [...], "std": [...]};
pixels are divided by 255, less the mean, over the standard deviation. Of an ONNX file the size and channels may be left out.

What is executed. Both files hold a program, and naming one runs it in this process, as naming a script would: give only a
file that you trust. TorchScript runs in torch's interpreter, which has no Python but has torch's operators, some of which
read files; ONNX runs in onnxruntime on the CPU, from the bytes alone, so that external data files and custom operator
libraries are refused. Neither is ever unpickled: a Python pickle under the name .pt is refused before torch reads it. The
hash of program and settings stands in the contract of every score.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from data_shards.errors import UserError


class Settings(BaseModel):
    """What a net wants of its images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: int = Field(ge=1, le=4096, description="side of its input in px")
    channels: int = Field(ge=1, le=3, description="1 or 3")
    mean: tuple[float, ...] = Field((0.0,), description="of pixels in 0..1, one for all or one a channel")
    std: tuple[float, ...] = Field((1.0,), description="likewise")


class Program(NamedTuple):
    """A loaded net: float images (N, channels, S, S) -> features (N, ...)."""

    module: nn.Module
    settings: Settings
    hash: str


def load_program(path: Path, device: torch.device) -> Program:
    """Load a TorchScript or ONNX net.

    Raises:
        UserError: no such file, one that is no such program, or settings that are missing or wrong.
    """
    if not path.is_file():
        raise UserError(f"there is no feature net at {path}; check the path.")
    content, beside = path.read_bytes(), path.with_name(f"{path.name}.json")
    given: Any = {}
    if beside.is_file():
        try:
            given = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{beside} is not JSON ({error}); write the net's input_size, channels, mean and std.") from error
    load = _load_onnx if path.suffix == ".onnx" else _load_torchscript
    module, known = load(path, content, device)
    try:
        settings = Settings.model_validate({**known, **given} if isinstance(given, dict) else given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "all of it"
        raise UserError(f"{beside} does not describe the net ({field}: {first['msg']}); write input_size, channels (1 or 3), "
                        "mean and std.") from error
    for name in ("mean", "std"):
        values = getattr(settings, name)
        if len(values) not in (1, settings.channels) or (name == "std" and min(values) <= 0):
            raise UserError(f"{beside}: {name} = {list(values)} does not fit {settings.channels} channels; give one value for "
                            "all or one a channel, the std's over 0.")
    if settings.channels == 2:
        raise UserError(f"{beside}: a net of 2 channels fits no image; feature nets take 1 or 3.")
    return Program(module, settings, _hash(content, settings))


def _hash(content: bytes, settings: Settings) -> str:
    return hashlib.sha256(hashlib.sha256(content).digest() + settings.model_dump_json().encode()).hexdigest()


def _load_torchscript(path: Path, content: bytes, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        names = set()
    if "constants.pkl" not in names or not any(name.startswith("code/") for name in names):
        raise UserError(f"{path} is no TorchScript program (torch.jit.save writes them), and nothing else called .pt is read: "
                        "a state dict is a pickle; export the whole net by torch.jit.trace, or as ONNX.")
    try:
        module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as TorchScript ({_one_line(error)}); export it anew.") from error
    return module, {}


class OnnxNet(nn.Module):
    """An onnxruntime session as a module, on the CPU."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.input = session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        out = self.session.run(None, {self.input: images.detach().cpu().numpy()})[0]
        return torch.from_numpy(out).flatten(1)


def _load_onnx(path: Path, content: bytes, _device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs onnxruntime, which is not installed; `pip install 'graft-gan[onnx]'`.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen types of its own
        raise UserError(f"{path} cannot be read as ONNX ({_one_line(error)}); export it anew, its weights inside.") from error
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) != 4 or inputs[0].type != "tensor(float)":
        raise UserError(f"{path} takes {len(inputs)} inputs, the first {inputs[0].type} {inputs[0].shape if inputs else ''}; a "
                        "feature net takes one float tensor (N, C, S, S).")
    known = {"channels": shape[1], "input_size": shape[2]}
    return OnnxNet(session), {name: size for name, size in known.items() if isinstance(size, int)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
