"""Mask R-CNN (He et al., ICCV 2017) on a plain Vision Transformer, as ViTDet (Li et al. 2022) has
it: two convolutions in the region proposals' head, four and a fully connected layer in the boxes',
four in the masks', all with layer norms. Anchors, matching, losses and suppression are
torchvision's.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from vitprobe.evaluation.dense.backbone import Backbone
from vitprobe.evaluation.dense.feed import Annotated
from vitprobe.evaluation.dense.pyramid import LEVELS, SimpleFeaturePyramid
from vitprobe.evaluation.dense.recipe import DenseRecipe
from vitprobe.models import Model
from vitprobe.training.methods.base import Batch, Method
from vitprobe.training.randomness import Draws

_RATIOS = (0.5, 1.0, 2.0)
_BOX, _MASK = 7, 14
"""Sides of what is cut from the maps for an object."""


class Detector(Method):
    """Boxes, classes and masks of objects in square images.

    recipe: with the model's encoder in it. model: whose weights it starts from. classes: of
    objects; label 0 is none of them.
    """

    encoder: Any
    config: Any

    def __init__(self, recipe: DenseRecipe, model: Model, classes: int) -> None:
        nn.Module.__init__(self)
        self.config = recipe.method
        assert recipe.detector is not None and recipe.encoder is not None  # noqa: S101, PT018
        config, encoder = recipe.detector, recipe.encoder
        self.size = encoder.image_size
        self.encoder = Backbone(model, recipe.backbone, encoder)
        self.pyramid = SimpleFeaturePyramid(encoder.width, config.channels)
        self.coarsest = nn.MaxPool2d(1, 2)
        strides = [encoder.patch_size * 2.0 ** (level - 2) for level in range(LEVELS + 1)]
        anchors = AnchorGenerator(
            tuple((config.anchor * stride,) for stride in strides), (_RATIOS,) * len(strides)
        )
        channels = config.channels
        self.rpn = RegionProposalNetwork(
            anchors,
            _Single(RPNHead(channels, len(_RATIOS), conv_depth=2)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=config.anchors_sampled,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * config.proposals, "testing": config.proposals},
            post_nms_top_n=dict.fromkeys(("training", "testing"), config.proposals),
            nms_thresh=0.7,
        )
        box_head = FastRCNNConvFCHead(
            (channels, _BOX, _BOX),
            [channels] * config.convolutions,
            [config.fully_connected],
            LayerNorm2d,
        )
        parts: dict[str, Any] = {}
        if config.masks:
            parts = {
                "mask_roi_pool": _pool(_MASK, strides, encoder.patch_size),
                "mask_head": MaskRCNNHeads(
                    channels, [channels] * config.convolutions, 1, LayerNorm2d
                ),
                "mask_predictor": _Single(MaskRCNNPredictor(channels, channels, classes + 1)),
            }
        self.roi_heads = RoIHeads(
            _pool(_BOX, strides, encoder.patch_size),
            box_head,
            _Single(FastRCNNPredictor(config.fully_connected, classes + 1)),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=config.regions_sampled,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **parts,
        )
        self._samplers = [
            KeyedSampler(part.fg_bg_sampler, name)
            for part, name in ((self.rpn, "proposals"), (self.roi_heads, "regions"))
        ]
        self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler = self._samplers

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the five losses, which are logged; those of masks only where masks are
        learned."""
        assert isinstance(batch, Annotated)  # noqa: S101 - what the feed of detection gives
        for sampler in self._samplers:
            sampler.draws = batch.draws
        targets = [dict(target) for target in batch.targets]
        (images,) = batch.views
        features = self._features(images)
        sizes = [(self.size, self.size)] * len(images)
        # Coordinates have no place in half precision: only convolutions and products are in it.
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        _, more = self.roi_heads(features, proposals, sizes, targets)
        terms = {name.removeprefix("loss_"): value for name, value in (losses | more).items()}
        return torch.stack(list(terms.values())).sum(), terms

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """What is seen in images (b, c, size, size), in eval mode: of each `boxes` (n, 4) corners
        in the square, `labels` (n,) from 1 on, `scores` (n,) and `masks` (n, 1, 28, 28), the
        chance that a part of the box is the object."""
        features = self._features(images)
        sizes = [(self.size, self.size)] * len(images)
        proposals, _ = self.rpn(ImageList(images, sizes), features)
        found: list[dict[str, Tensor]]
        found, _ = self.roi_heads(features, proposals, sizes)
        return found

    def outcomes(self, images: Tensor, regions: int) -> list[Tensor]:
        """What the heads give for images and so many empty regions, a quarter of which have a mask:
        all products and convolutions of an update, for a count of them."""
        features = self._features(images)
        objectness, deltas = self.rpn.head(list(features.values()))
        heads = self.roi_heads
        shape = regions, features["0"].shape[1]
        boxes = heads.box_predictor(heads.box_head(images.new_empty(*shape, _BOX, _BOX)))
        found = [*objectness, *deltas, *boxes]
        if heads.mask_head is not None:
            shape = regions // 4, features["0"].shape[1]
            cut = images.new_empty(*shape, _MASK, _MASK)
            found.append(heads.mask_predictor(heads.mask_head(cut)))
        return found

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        maps = [level.float() for level in self.pyramid(self.encoder(images))]
        maps.append(self.coarsest(maps[-1]))
        return {str(i): level for i, level in enumerate(maps)}


class _Single(nn.Module):
    """A head whose outcome is in single precision, whatever autocast made of it: torchvision would
    round anchors to what comes out here."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Any) -> Any:
        return _single(self.head(features))


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else type(value)(map(_single, value))


def _pool(side: int, strides: list[float], patch: int) -> MultiScaleRoIAlign:
    """torchvision's, which would guess the strides of maps, and guess wrong for patches of 14."""
    pool = MultiScaleRoIAlign([str(level) for level in range(LEVELS)], side, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides[:LEVELS]]
    # Objects of 224 pixels go to the backbone's own scale where patches are of 16 (Lin et al.,
    # "Feature Pyramid Networks", 2017, equation 1).
    pool.map_levels = LevelMapper(2, 5, 14 * patch, 4)
    return pool


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors and proposals, with the draws of the batch: a run that is
    resumed, or shared by several processes, samples the same.

    like: whose numbers it takes. stream: of the draws.
    """

    def __init__(self, like: BalancedPositiveNegativeSampler, stream: str) -> None:
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self.stream = stream
        self.draws: Draws | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks, one an image, of the positives and of the negatives that are taken."""
        if self.draws is None:
            raise RuntimeError("a sampler was asked for samples outside of a batch")
        chosen: tuple[list[Tensor], list[Tensor]] = [], []
        for i, matched in enumerate(matched_idxs):
            draws = Draws(self.draws.seed, self.draws.epoch, self.draws.index[i : i + 1])
            order = draws.bits(self.stream, len(matched))[0].argsort()
            ordered = matched[order]
            positive, negative = order[ordered >= 1], order[ordered == 0]
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive = positive[:most]
            negative = negative[: self.batch_size_per_image - len(positive)]
            for masks, taken in zip(chosen, (positive, negative), strict=True):
                mask = torch.zeros_like(matched, dtype=torch.uint8)
                mask[taken] = 1
                masks.append(mask)
        return chosen
