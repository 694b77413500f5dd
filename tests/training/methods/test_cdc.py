"""CDC: the consistency term against torch.distributions, and which images D judges whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cosine_similarity, softplus

from data_shards import UserError
from tests.training.methods.start import SMALL, adaptation_of, batch_of, pictures, recipe_of, start_of
from tests.training.models.make import stir
from training.draws import latents as draw_latents
from training.families import Batch
from training.methods import METHODS
from training.methods.anchors import patch_block
from training.methods.cdc import distance_consistency
from training.methods.features import block_outputs, outputs_of

EIGHT: dict[str, Any] = {"adaptation.batch": 8}


def anchored(recipe: Any, count: int = 8) -> Batch:
    """A batch with draws of anchors."""
    batch = batch_of(recipe, pictures(count))
    draws = torch.rand(count, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return dataclasses.replace(batch, uniforms={f"{name} anchor": draws for name in ("generator", "discriminator")})


def features(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 4, 4, generator=draw), torch.randn(8, 5, generator=draw)]


def test_the_term_is_the_divergence_of_softmaxed_similarities() -> None:
    target, source = features(0), features(1)
    total = []
    for ours, theirs in zip(target, source, strict=True):
        for i in range(8):
            others = [j for j in range(i % 2, 8, 2) if j != i]  # groups of 4: entries 2 apart
            p, q = (Categorical(logits=torch.stack([cosine_similarity(x[i].flatten(), x[j].flatten(), 0) for j in others]))
                    for x in (ours, theirs))
            total.append(kl_divergence(p, q))
    torch.testing.assert_close(distance_consistency(target, source, 4), torch.stack(total).mean())


def test_the_term_and_its_gradient_are_zero_at_the_source(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {**EIGHT, "adaptation.cdc.weight": 1e3})
    networks = start_of(recipe)
    adaptation = adaptation_of(recipe, networks)
    METHODS["cdc"].prepare(networks, adaptation)
    z = batch_of(recipe, pictures(8)).latents["generator"]
    source = [x.detach() for x in block_outputs(adaptation.source["generator"], z, None)]
    term = distance_consistency(block_outputs(networks["generator"], z, None), source, 4)
    gradients = torch.autograd.grad(term, list(networks["generator"].parameters()), allow_unused=True)
    assert abs(term.item()) < 1e-7
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-6
    # The phase reports just this, and no longer once the generator has moved.
    phase = METHODS["cdc"].phases(adaptation)[1]
    assert abs(phase.loss(networks, anchored(recipe))["distance_consistency"].item()) < 1e-7
    stir(networks["generator"], scale=0.2)
    terms = phase.loss(networks, anchored(recipe))
    ours = block_outputs(networks["generator"], z, None)
    torch.testing.assert_close(terms["distance_consistency"], distance_consistency(ours, source, 4).detach())
    torch.testing.assert_close(terms["total"].detach(), terms["adversarial"] + 1e3 * terms["distance_consistency"])


def test_micro_batches_have_the_mean_of_the_batch() -> None:
    target, source = features(0), features(1)
    parts = [distance_consistency([x[i::2] for x in target], [x[i::2] for x in source], 4) for i in range(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), distance_consistency(target, source, 4))


def test_a_quarter_is_near_anchors_and_judged_whole_the_rest_by_patches(tmp_path: Path) -> None:
    """Both losses written out, with images made and judged one by one."""
    recipe = recipe_of(tmp_path, EIGHT)
    networks = start_of(recipe)
    adaptation = adaptation_of(recipe, networks)
    METHODS["cdc"].prepare(networks, adaptation)
    g, d = networks["generator"], networks["discriminator"]
    batch = dataclasses.replace(anchored(recipe), weights={})
    anchors = draw_latents(1, "anchors", 0, 6, 4)

    def logits(image: Tensor, whole: bool) -> Tensor:
        with outputs_of([patch_block(d, recipe.adaptation.anchors)]) as found:
            logit = d(image[None])
        patches: Tensor = d.patch(found[0]).flatten()  # type: ignore[operator]
        return logit.expand(len(patches)) if whole else patches

    for phase in METHODS["cdc"].phases(adaptation):
        losses = []
        for i in range(8):
            z = batch.latents[phase.network][i]
            if i < 2:
                z = anchors[int(batch.uniforms[f"{phase.network} anchor"][i, 0] * 6)] + 0.1 * z
            margin = logits(batch.images[i], i < 2) - logits(g(z[None])[0], i < 2)
            losses.append(softplus(margin if phase.network == "generator" else -margin).mean())
        torch.testing.assert_close(phase.loss(networks, batch)["adversarial"], torch.stack(losses).mean().detach(),
                                   rtol=1e-5, atol=1e-6)


def test_r1_is_on_the_mean_over_an_images_patches(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, EIGHT)
    networks = start_of(recipe)
    adaptation = adaptation_of(recipe, networks)
    METHODS["cdc"].prepare(networks, adaptation)
    d, batch = networks["discriminator"], dataclasses.replace(anchored(recipe), weights={"r1": 1.0})
    squares = []
    for i, image in enumerate(batch.images):
        image = image[None].clone().requires_grad_(True)
        with outputs_of([patch_block(d, recipe.adaptation.anchors)]) as found:
            logit = d(image)
        if i >= 2:
            logit = d.patch(found[0]).mean()  # type: ignore[operator]
        squares.append(torch.autograd.grad(logit.sum(), image)[0].square().sum() / 2)
    terms = METHODS["cdc"].phases(adaptation)[0].loss(networks, batch)
    torch.testing.assert_close(terms["r1"], torch.stack(squares).mean())


@pytest.mark.parametrize("model", sorted(set(SMALL) - {"mlp"}))
def test_patches_are_of_a_part_of_the_image(tmp_path: Path, model: str) -> None:
    """The first patch's logit does not see the last pixel, the whole logit does."""
    recipe = recipe_of(tmp_path, {**EIGHT, "adaptation.anchors.patch_blocks": 1}, model)
    networks = start_of(recipe)
    METHODS["cdc"].prepare(networks, adaptation_of(recipe, networks))
    d, image = networks["discriminator"], pictures(1).requires_grad_(True)
    with outputs_of([patch_block(d, recipe.adaptation.anchors)]) as found:
        whole = d(image)
    patches = d.patch(found[0]).flatten(1)  # type: ignore[operator]
    (seen,) = torch.autograd.grad(patches[0, 0], image, retain_graph=True)
    assert patches.shape[1] > 1 and seen.abs().sum() > 0 and seen[0, 0, -1, -1] == 0
    assert torch.autograd.grad(whole.sum(), image)[0][0, 0, -1, -1] != 0


@pytest.mark.parametrize("method", ["cdc", "rssa"])
@pytest.mark.parametrize(("settings", "model", "message"), [
    ({"adaptation.batch": 6}, "dcgan", r"adaptation\.batch = 6 is no multiple"),
    ({}, "mlp", r"model mlp has none of; use a convolutional model"),
    ({"training.objective.pack": 2}, "dcgan", r"training\.objective\.pack = 2 packs them; set it to 1")])
def test_what_it_cannot_serve_is_refused(tmp_path: Path, method: str, settings: dict[str, Any], model: str,
                                         message: str) -> None:
    recipe = recipe_of(tmp_path, {**EIGHT, **settings}, model)
    networks = start_of(recipe)
    with pytest.raises(UserError, match=f"the method {method} .*{message}"):
        METHODS[method].prepare(networks, adaptation_of(recipe, networks))


@pytest.mark.parametrize(("method", "terms"), [
    ("cdc", {"distance_consistency"}), ("rssa", {"self_correlation", "disturbance_correlation"})])
def test_an_autoencoder_gets_the_terms_on_its_decoder_and_no_patches(tmp_path: Path, method: str, terms: set[str]) -> None:
    recipe = recipe_of(tmp_path, {**EIGHT, "training.family": "vae"})
    networks = start_of(recipe)
    adaptation = adaptation_of(recipe, networks)
    METHODS[method].prepare(networks, adaptation)
    assert networks["generator"].state_dict().keys() == adaptation.source["generator"].state_dict().keys()
    batch = dataclasses.replace(batch_of(recipe, pictures(8)), weights={"kl": 1.0})
    (plain,), (phase,) = adaptation.phases, METHODS[method].phases(adaptation)
    found = phase.loss(networks, batch)
    assert found.keys() - plain.loss(networks, batch).keys() == terms
    assert all(abs(found[term].item()) < 1e-6 for term in terms)
    stir(networks["generator"].get_submodule("decoder"), scale=0.2)
    assert all(phase.loss(networks, batch)[term].item() > 1e-6 for term in terms)


@pytest.mark.parametrize("method", ["cdc", "rssa"])
def test_a_discriminator_with_another_use_is_refused(tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tmp_path, {**EIGHT, "training.family": "vaegan"})
    networks = start_of(recipe)
    with pytest.raises(UserError, match=f"the method {method} changes how a GAN's discriminator judges, .* is vaegan; leave"):
        METHODS[method].prepare(networks, adaptation_of(recipe, networks))
