"""Masked autoencoder: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

Section 3 in order: a random subset of the patches is masked; the encoder sees only the visible
ones; mask tokens stand in for the masked ones; a small decoder predicts their pixels; the loss is
the mean squared error on the masked patches only, against pixels normalised per patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, build_encoder, fixed_positions, take
from vitprobe.training.methods.base import Batch, Method, MethodConfig
from vitprobe.training.randomness import Draws


@dataclass(frozen=True)
class MAEConfig(MethodConfig):
    """mask_ratio: share of patches hidden; int(patches x (1 - mask_ratio)) stay visible.

    normalize_targets: predict pixels normalised per patch (section 3, "Reconstruction target").
    """

    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mask_ratio: float = 0.75
    normalize_targets: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise RecipeError(f"method.mask_ratio must lie between 0 and 1, not {self.mask_ratio}.")
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise RecipeError(f"method.{name} must be at least 1, not {getattr(self, name)}.")
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise RecipeError(
                f"method.decoder_width {self.decoder_width} must be a multiple of "
                f"method.decoder_heads {self.decoder_heads} and of 4."
            )


class MAE(Method):
    """The asymmetric encoder and decoder of the paper's figure 1."""

    Config = MAEConfig
    config: MAEConfig

    def __init__(self, config: MAEConfig, encoder: EncoderConfig, classes: int) -> None:
        super().__init__(config, encoder, classes)
        self.mean, self.std = encoder.mean, encoder.std
        self.patch_size = encoder.patch_size
        self.patches = encoder.grid**2
        self.visible = int(self.patches * (1 - config.mask_ratio))
        if self.visible < 1:
            raise RecipeError(
                f"method.mask_ratio {config.mask_ratio} leaves none of the {self.patches} patches "
                "visible; lower it."
            )
        pixels = encoder.patch_size**2 * encoder.channels
        if config.normalize_targets and pixels == 1:
            raise RecipeError(
                "method.normalize_targets needs patches of more than one value; "
                "raise encoder.patch_size or set it to false."
            )
        width = config.decoder_width

        self.encoder = build_encoder(encoder)
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = fixed_positions(width, encoder.grid)
        self.decoder_blocks = nn.Sequential(
            *(
                Block(width, config.decoder_heads, qkv_bias=True, norm_layer=LayerNorm)
                for _ in range(config.decoder_depth)
            )
        )
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, pixels)
        self._initialise()

    def _initialise(self) -> None:
        """Appendix A.1: Xavier-uniform layers, as the encoder already has; the token as in BERT."""
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        # The patch embedding is a linear layer on the flattened patch.
        projection = self.encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error per masked pixel, in units of the patch's standard deviation."""
        (images,) = batch.views
        order = self.order(batch.draws)
        visible, masked = order[:, : self.visible], order[:, self.visible :]
        predicted = self.decode(self.encode(images, visible), order)
        target = take(patchify(images, self.patch_size), masked)
        if self.config.normalize_targets:
            target = normalize_patches(target)
        return F.mse_loss(predicted.float(), target), {}

    def order(self, draws: Draws) -> Tensor:
        """(b, patches): the patches in random order, of which the first `visible` are seen."""
        return draws.permutation("mask", self.patches)

    def decode(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Predicted pixels of the masked patches, as `order` has them: (b, masked, p * p * c).

        tokens: (b, 1 + visible, width) of the class token and the first patches of `order`.
        """
        tokens = self.decoder_embed(tokens)
        seen = tokens.shape[1]
        masks = self.mask_token.expand(len(tokens), self.patches + 1 - seen, -1)
        # Attention knows patches by their positions alone, so none has to go back to its place.
        positions = self.decoder_pos_embed.expand(len(tokens), -1, -1)
        positions = torch.cat([positions[:, :1], take(positions, 1 + order)], dim=1)
        sequence = self.decoder_blocks(torch.cat([tokens, masks], dim=1) + positions)
        return self.decoder_pred(self.decoder_norm(sequence[:, seen:]))

    @torch.no_grad()
    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """The originals, what the encoder sees of them, and what the decoder makes of that.

        The mask is always the same; a prediction normalised per patch is given the mean and the
        standard deviation of the patch that it is of.
        """
        order = self.order(Draws(0, 0, torch.arange(len(images), device=images.device)))
        visible, masked = order[:, : self.visible], order[:, self.visible :]
        patches = patchify(images, self.patch_size)
        predicted = self.decode(self.encode(images, visible), order).float()
        if self.config.normalize_targets:
            mean, deviation = patch_statistics(take(patches, masked))
            predicted = predicted * deviation + mean
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        grey = ((0.5 - mean) / std).expand_as(images)
        grey = take(patchify(grey, self.patch_size), masked)
        places = masked[:, :, None].expand_as(grey)
        seen, made = (
            unpatchify(patches.scatter(1, places, fill), self.patch_size, images.shape[1])
            for fill in (grey, predicted)
        )
        return {"original": images, "visible": seen, "reconstruction": made}


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(b, c, h, w) → (b, patches, p * p * c): patches row by row, and so the pixels within each."""
    b, c, h, w = images.shape
    p = patch_size
    cut = images.reshape(b, c, h // p, p, w // p, p)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """The square images (b, c, h, h) of which `patchify` makes these patches."""
    b, n, _ = patches.shape
    p, grid = patch_size, math.isqrt(n)
    cut = patches.reshape(b, grid, grid, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return cut.reshape(b, channels, grid * p, grid * p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1 in the denominator) of each patch: (b, patches, 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    # The paper's code adds the same 1e-6, without which a uniform patch would be 0 / 0.
    return mean, torch.sqrt(variance + 1e-6)


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch less its mean, over its standard deviation."""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation
