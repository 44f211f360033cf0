"""The detector: what its samplers draw, what it is made of, and in which precision."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

import vitprobe as vp
from vitprobe.evaluation.dense.detector import Detector, KeyedSampler
from vitprobe.evaluation.dense.feed import Annotated
from vitprobe.evaluation.dense.pyramid import SimpleFeaturePyramid
from vitprobe.evaluation.dense.recipe import load_dense_recipe
from vitprobe.evaluation.dense.segmenter import Segmenter, predicted
from vitprobe.training.randomness import Draws


def model():
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    return vp.wrap(module.eval(), name="small", input_size=(3, 64, 64))


def detector(**overrides):
    small = {"detector.channels": 8, "detector.fully_connected": 8, "backbone.window": 2}
    recipe = load_dense_recipe("shapes_vitdet", small | overrides)
    torch.manual_seed(0)
    return Detector(recipe.for_model(model(), "noise"), model(), 3)


def batch(count=2, first=0, size=64):
    draws = Draws(0, 0, torch.arange(first, first + count))
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[:, 10:40, 20:50] = 1
    target = {
        "boxes": torch.tensor([[20.0, 10.0, 50.0, 40.0]]), "labels": torch.tensor([2]),
        "masks": mask,
    }  # fmt: skip
    images = draws.normal("images", 3 * size * size).view(count, 3, size, size)
    return Annotated((images,), torch.ones(count, dtype=torch.int64), draws, (target,) * count)


def test_the_pyramid_has_four_scales():
    made = SimpleFeaturePyramid(16, 8)
    maps = made(torch.randn(2, 16, 6, 6))
    assert [tuple(level.shape) for level in maps] == [(2, 8, s, s) for s in (24, 12, 6, 3)]


def test_samplers_keep_shares_and_follow_the_draws():
    sampler = KeyedSampler(BalancedPositiveNegativeSampler(16, 0.25), "some")
    matched = [torch.tensor([1] * 40 + [0] * 40 + [-1] * 40), torch.tensor([1] * 2 + [0] * 50)]
    with pytest.raises(RuntimeError, match="outside of a batch"):
        sampler(matched)
    sampler.draws = Draws(0, 0, torch.tensor([5, 6]))
    positive, negative = sampler(matched)
    assert [int(mask.sum()) for mask in (*positive, *negative)] == [4, 2, 12, 14]
    assert all((m[p == 1] == 1).all() for m, p in zip(matched, positive, strict=True))
    assert all((m[n == 1] == 0).all() for m, n in zip(matched, negative, strict=True))
    # What an image draws does not depend on what else is in the batch.
    sampler.draws = Draws(0, 0, torch.tensor([6]))
    assert torch.equal(sampler(matched[1:])[1][0], negative[1])
    sampler.draws = Draws(0, 1, torch.tensor([6]))
    assert not torch.equal(sampler(matched[1:])[1][0], negative[1])


def test_losses_are_five_and_reach_every_weight():
    made = detector().train()
    loss, terms = made(batch())
    assert set(terms) == {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}
    torch.testing.assert_close(loss, sum(terms.values()))
    loss.backward()
    without = [name for name, p in made.named_parameters() if p.grad is None]
    assert not without
    assert "mask" not in detector(**{"detector.masks": False}).train()(batch())[1]


def test_images_without_objects_are_all_background():
    made, given = detector().train(), batch()
    nothing = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }  # fmt: skip
    loss, terms = made(Annotated(given.views, given.labels, given.draws, (nothing,) * 2))
    assert torch.isfinite(loss)
    assert terms["box_reg"] == terms["mask"] == 0


def test_half_precision_leaves_coordinates_alone():
    made = detector().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = made(batch())
        made.eval()
        found = made.detect(batch().views[0])
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(one["boxes"].dtype == torch.float32 for one in found)


def test_maps_have_the_strides_that_regions_are_cut_by():
    made = detector()
    features = made._features(torch.randn(1, 3, 64, 64))
    scales = [level.shape[-1] / 64 for level in list(features.values())[:4]]
    assert made.roi_heads.box_roi_pool.scales == scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("head", ["linear", "multiscale"])
def test_segmenters_give_logits_for_every_pixel(head):
    overrides = {"segmenter.head": head, "segmenter.channels": 8}
    recipe = load_dense_recipe("shapes_segmentation", overrides).for_model(model(), "noise")
    made = Segmenter(recipe, model(), 5).train()
    images = torch.randn(2, 3, 64, 64)
    assert made.logits(images).shape == (2, 5, 64, 64)
    labels = torch.full((2, 64, 64), 255)
    draws = Draws(0, 0, torch.arange(2))
    loss, terms = made(Annotated((images,), labels, draws))
    assert loss == 0
    labels[:, :32] = 3
    loss, terms = made(Annotated((images,), labels, draws))
    assert 1 < loss < 3
    assert 0 <= terms["accuracy"] <= 1
    loss.backward()
    assert all(p.grad is not None for p in made.parameters())


def test_predictions_have_the_size_of_the_image():
    logits = torch.zeros(3, 8, 8)
    logits[1, :4, :4] = 1
    logits[2, :, 4:] = 9  # where no image is
    found = predicted(logits, (4, 4), (6, 6))
    assert found.shape == (6, 6)
    assert (found == 1).all()
