"""Masked autoencoder: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

Section 3 in order: a random subset of the patches is masked; the encoder sees only the visible
ones; mask tokens are put in at the masked places; a small decoder predicts pixels everywhere; the
loss is the mean squared error on the masked patches only, against pixels normalised per patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.training.augment import Augment
from vitprobe.training.encoder import EncoderConfig, build_encoder, fixed_positions
from vitprobe.training.methods.base import Batch, Method, MethodConfig


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

    def __init__(
        self, config: MAEConfig, encoder: EncoderConfig, augment: Augment, classes: int
    ) -> None:
        super().__init__(config, encoder, augment, classes)
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
        images = self.augment(batch.images, batch.draws)
        order = batch.draws.permutation("mask", self.patches)
        visible, masked = order[:, : self.visible], order[:, self.visible :]
        predicted = self.decode(self.encode(images, visible), visible)
        target = patchify(images, self.patch_size)
        if self.config.normalize_targets:
            target = normalize_patches(target)
        return F.mse_loss(_take(predicted, masked), _take(target, masked)), {}

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Class token and the patches `visible` (b, v): (b, 1 + v, width), after the final norm."""
        tokens = self.encoder._pos_embed(self.encoder.patch_embed(images))
        tokens = torch.cat([tokens[:, :1], _take(tokens[:, 1:], visible)], dim=1)
        return self.encoder.norm(self.encoder.blocks(tokens))

    def decode(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Predicted pixels of every patch: (b, patches, p * p * c), in the order of `patchify`."""
        tokens = self.decoder_embed(tokens)
        places = visible[:, :, None].expand(-1, -1, tokens.shape[2])
        patches = self.mask_token.expand(len(tokens), self.patches, -1)
        patches = patches.scatter(1, places, tokens[:, 1:])
        sequence = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(sequence))[:, 1:])


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(b, c, h, w) → (b, patches, p * p * c): patches row by row, and so the pixels within each."""
    b, c, h, w = images.shape
    p = patch_size
    cut = images.reshape(b, c, h // p, p, w // p, p)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch less its mean, over its standard deviation (n - 1 in the denominator)."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    # The paper's code adds the same 1e-6, without which a uniform patch would be 0 / 0.
    return (patches - mean) / torch.sqrt(variance + 1e-6)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (b, n, d) at index (b, m) → (b, m, d)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
