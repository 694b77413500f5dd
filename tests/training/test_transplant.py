"""Weights between networks of unlike classes."""

from __future__ import annotations

import pytest
import torch

from data_shards import UserError
from tests.training.models.make import latents, pictures, small_gan, stir
from training.models import MODELS
from training.transplant import CLASS_TABLE, transplant

OURS, THEIRS = ("cat", "ship", "dog"), ("dog", "cat")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_another_set_of_classes_takes_rows_by_name(model: str, which: int) -> None:
    source = small_gan(model, classes=2, seed=1)[which]
    stir(source)
    network = small_gan(model, classes=3, seed=2)[which]
    done = transplant(network, source.state_dict(), what="source", classes=OURS, source_classes=THEIRS)
    assert done.kept_classes == ("cat", "dog")
    assert done.new_classes == ("ship",)
    assert not done.fresh
    assert not done.skipped
    assert {*done.loaded, *done.by_class} == network.state_dict().keys()
    inputs = latents(4) if which == 0 else pictures(4)
    cats, dogs = (torch.full((4,), label) for label in (0, 2))
    assert torch.equal(network(inputs, cats), source(inputs, torch.full((4,), 1)))
    assert torch.equal(network(inputs, dogs), source(inputs, torch.full((4,), 0)))
    for name in done.by_class:
        torch.testing.assert_close(network.state_dict()[name][1], source.state_dict()[name].mean(0))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_an_unconditional_source_is_continued_whatever_the_class(model: str, which: int) -> None:
    source, network = small_gan(model, seed=1)[which], small_gan(model, classes=3, seed=2)[which]
    stir(source)
    done = transplant(network, source.state_dict(), what="source", classes=OURS)
    assert done.fresh
    assert all(CLASS_TABLE in name for name in done.fresh)
    assert not done.skipped
    assert done.loaded == tuple(sorted(source.state_dict()))
    inputs = latents(4) if which == 0 else pictures(4)
    assert torch.equal(network(inputs, torch.tensor([0, 1, 2, 0])), source(inputs))


def test_an_unconditional_network_leaves_the_tables_out() -> None:
    source, network = small_gan("resnet", classes=2, seed=1)[1], small_gan("resnet", seed=2)[1]
    done = transplant(network, source.state_dict(), what="source", source_classes=THEIRS)
    assert done.skipped == ("head.class_embedding.weight",)
    assert done.loaded == tuple(sorted(network.state_dict()))
    assert torch.equal(network(pictures(4)), source(pictures(4), torch.tensor([0, 1, 1, 0])))  # the tables were still zero
    assert str(done) == f"{len(done.loaded)} tensors taken over; left out: head.class_embedding.weight."


def test_power_iteration_of_another_table_starts_anew() -> None:
    source = small_gan("dcgan", classes=2, seed=1, spectral_norm=True)[1]
    network = small_gan("dcgan", classes=3, seed=2, spectral_norm=True)[1]
    done = transplant(network, source.state_dict(), what="source", classes=OURS, source_classes=THEIRS)
    assert [name.rpartition(".")[2] for name in done.fresh] == ["_u", "_v"]
    assert [name.rpartition(".")[2] for name in done.by_class] == ["original"]
    assert torch.isfinite(network(pictures(4), torch.tensor([0, 1, 2, 0]))).all()


def test_everything_else_is_strict() -> None:
    wide, network = small_gan("dcgan", channels=8)[1], small_gan("dcgan")[1]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=r"source does not fit .*: blocks.0.bias is \(8,\) there and \(4,\) here"):
        transplant(network, wide.state_dict(), what="source")
    weights = dict(network.state_dict())
    weights.pop("head.weight")
    with pytest.raises(UserError, match=r"head\.weight is not there"):
        transplant(network, weights, what="source")
    done = transplant(network, wide.state_dict(), what="source", strict=False)
    assert set(done.fresh) == set(done.skipped) == set(network.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(("classes", "source_classes", "sentence"), [
    (("cat",), THEIRS, "3 rows here, and the classes named for them are cat"), (OURS, (), "2 rows there, .* are none"),
    (("cat", "cat", "dog"), THEIRS, "name each class once")])
def test_names_that_do_not_match_the_rows_are_refused(classes: tuple[str, ...], source_classes: tuple[str, ...],
                                                      sentence: str) -> None:
    source, network = small_gan("dcgan", classes=2)[1], small_gan("dcgan", classes=3)[1]
    with pytest.raises(UserError, match=sentence):
        transplant(network, source.state_dict(), what="source", classes=classes, source_classes=source_classes)
