"""Nets from files: TorchScript and ONNX give the numbers of their module; pickles under such a name are refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from data_shards.errors import UserError
from training.metrics.encoder import Encoder, save_encoder
from training.metrics.features import load_feature_net

SETTINGS = {"input_size": 8, "channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def pictures(n: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(n)).to(torch.uint8)


def expected(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """ReLU(W x), x the pixels less the mean over the deviation: what every net of this file computes."""
    mean, std = (torch.tensor(SETTINGS[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return torch.relu(((images / 255 - mean) / std).flatten(1) @ weight)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(192, 5, generator=torch.Generator().manual_seed(0))


def write_torchscript(path: Path, weight: torch.Tensor) -> None:
    linear = nn.Linear(192, 5, bias=False)
    linear.weight.data = weight.T.clone()
    module = nn.Sequential(nn.Flatten(), linear, nn.ReLU())
    torch.jit.save(torch.jit.trace(module, torch.zeros(2, 3, 8, 8)), path)


def write_onnx(path: Path, weight: torch.Tensor, size: int | str = 8) -> None:
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["h"]),
             helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])], [numpy_helper.from_array(weight.numpy(), "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


def settings(path: Path, **changed: object) -> None:
    path.with_name(f"{path.name}.json").write_text(json.dumps({**SETTINGS, **changed}))


@pytest.mark.parametrize(("name", "write"), [("net.pt", write_torchscript), ("net.onnx", write_onnx)])
def test_the_numbers_are_the_modules(name: str, write: object, weight: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path, weight)  # type: ignore[operator]
    settings(path)
    net = load_feature_net(str(path))
    torch.testing.assert_close(net.extract(pictures(6)), expected(pictures(6), weight), rtol=1e-4, atol=1e-4)
    assert net.extract(pictures(2, 1, 20)).shape == (2, 5)
    assert net.name == f"{path.suffix[1:]}:net" and net.file == str(path) and net.classify is None


def test_the_hash_is_of_program_and_settings(weight: torch.Tensor, tmp_path: Path) -> None:
    hashes = set()
    for factor, mean in ((1, 0.4), (2, 0.4), (1, 0.5)):
        write_torchscript(tmp_path / "net.pt", factor * weight)
        settings(tmp_path / "net.pt", mean=[mean])
        hashes.add(load_feature_net(str(tmp_path / "net.pt")).hash)
    assert len(hashes) == 3


def test_an_onnx_file_says_its_own_size(weight: torch.Tensor, tmp_path: Path) -> None:
    write_onnx(tmp_path / "net.onnx", weight)
    net = load_feature_net(str(tmp_path / "net.onnx"))
    assert (net.input_size, net.channels) == (8, 3)
    found = net.extract(pictures(3))
    torch.testing.assert_close(found, torch.relu((pictures(3) / 255).flatten(1) @ weight), rtol=1e-4, atol=1e-4)
    write_onnx(tmp_path / "free.onnx", weight, size="s")
    with pytest.raises(UserError, match="input_size"):
        load_feature_net(str(tmp_path / "free.onnx"))


def test_an_encoder_of_another_run_is_read_by_path(tmp_path: Path) -> None:
    fingerprint = save_encoder(Encoder(1, 28, 3, 8, 16), tmp_path / "mine.safetensors")
    net = load_feature_net(str(tmp_path / "mine.safetensors"))
    assert net.name == "encoder" and net.hash == fingerprint and net.file == str(tmp_path / "mine.safetensors")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_pickle_under_the_name_is_never_opened(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "net.pt"
    for new_format in (True, False):
        torch.save({"weights": Canary(canary)}, path, _use_new_zipfile_serialization=new_format)
        settings(path)
        with pytest.raises(UserError, match="no TorchScript program"):
            load_feature_net(str(path))
    assert not canary.exists()


def test_external_data_is_not_followed(weight: torch.Tensor, tmp_path: Path) -> None:
    write_onnx(tmp_path / "inside.onnx", weight)
    model = onnx.load(tmp_path / "inside.onnx")
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").exists()
    with pytest.raises(UserError, match="weights inside"):
        load_feature_net(str(tmp_path / "net.onnx"))


@pytest.mark.parametrize(("changed", "words"), [
    ({"channels": 2}, "2 channels"), ({"std": [0.0]}, "std"), ({"mean": [0.1, 0.2]}, "mean"), ({"input_size": 0}, "input_size"),
    ({"sise": 3}, "sise")])
def test_settings_that_do_not_fit(changed: dict[str, object], words: str, weight: torch.Tensor, tmp_path: Path) -> None:
    write_torchscript(tmp_path / "net.pt", weight)
    settings(tmp_path / "net.pt", **changed)
    if changed == {"channels": 2}:
        settings(tmp_path / "net.pt", channels=2, mean=[0.0], std=[1.0])
    with pytest.raises(UserError, match=words):
        load_feature_net(str(tmp_path / "net.pt"))


def test_errors(weight: torch.Tensor, tmp_path: Path) -> None:
    write_torchscript(tmp_path / "net.pt", weight)
    with pytest.raises(UserError, match="input_size"):
        load_feature_net(str(tmp_path / "net.pt"))
    (tmp_path / "net.pt.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_feature_net(str(tmp_path / "net.pt"))
    with pytest.raises(UserError, match="no feature net at"):
        load_feature_net(str(tmp_path / "gone.pt"))
    with pytest.raises(UserError, match=r"\.safetensors, \.pt, \.onnx"):
        load_feature_net(str(tmp_path / "net.pth"))
    (tmp_path / "net.onnx").write_bytes(np.arange(100).tobytes())
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        load_feature_net(str(tmp_path / "net.onnx"))
