"""A plain Vision Transformer as the backbone of a dense predictor.

Li, Mao, Girshick & He, "Exploring Plain Vision Transformer Backbones for Object Detection"
(ViTDet), ECCV 2022: patch tokens alone, positions resampled to a larger square image, attention
within windows but for a few global blocks spread evenly, and no final norm. Relative positions are
added to attention by row and by column (Li et al., "MViTv2", CVPR 2022, equations 4 and 5).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.models import Model
from vitprobe.training.encoder import EncoderConfig, set_stochastic_depth


@dataclass(frozen=True)
class BackboneConfig:
    """How a checkpoint becomes a backbone; a recipe's table [backbone].

    window: patches along one side of a window of attention; 0 for global attention everywhere.
    global_blocks: how many blocks keep global attention, the last of each of as many equal parts.
    relative_positions: whether attention learns relative positions besides; they start at 0.
    drop_path: largest rate of stochastic depth, rising linearly over the blocks from 0.
    frozen: whether the checkpoint's weights stay as they are.
    """

    window: int = 0
    global_blocks: int = 4
    relative_positions: bool = False
    drop_path: float = 0.0
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.window < 0:
            raise RecipeError(f"backbone.window must be at least 0, not {self.window}.")
        if self.global_blocks < 0:
            raise RecipeError(
                f"backbone.global_blocks must be at least 0, not {self.global_blocks}."
            )
        if not 0 <= self.drop_path < 1:
            raise RecipeError(f"backbone.drop_path must lie in [0, 1), not {self.drop_path}.")
        if self.frozen and (self.relative_positions or self.drop_path):
            raise RecipeError(
                "backbone.frozen leaves nothing to learn relative positions with and nothing to "
                "drop; turn them off."
            )

    def is_global(self, block: int, depth: int) -> bool:
        """Whether a block of `depth` attends to the whole image."""
        parts = min(self.global_blocks, depth)
        last = {round((part + 1) * depth / parts) - 1 for part in range(parts)}
        return self.window == 0 or block in last


def encoder_config(model: Model, image_size: int) -> EncoderConfig:
    """What a recipe records of the encoder of a model, at that image size.

    Raises RecipeError, with the reason, for anything but a plain Vision Transformer of timm's with
    absolute positions; and for a size that is no multiple of its patches.
    """
    reason = _unfit(model)
    if reason:
        raise RecipeError(
            f"'{model.name}' ({model.spec}) cannot be a backbone of dense prediction: {reason}."
        )
    module: Any = model.module
    patch = module.patch_embed.patch_size[0]
    if image_size % patch:
        raise RecipeError(
            f"image_size {image_size} must be a multiple of the {patch} pixels of a patch of "
            f"'{model.name}'; the nearest is {max(1, round(image_size / patch)) * patch}."
        )
    return EncoderConfig(
        image_size=image_size,
        patch_size=patch,
        channels=model.input_size[0],
        width=module.embed_dim,
        depth=len(module.blocks),
        heads=module.blocks[0].attn.num_heads,
        mean=tuple(model.mean),
        std=tuple(model.std),
        mlp_ratio=module.blocks[0].mlp.fc1.out_features / module.embed_dim,
    )


def _unfit(model: Model) -> str:
    module = model.module
    if type(module) is not VisionTransformer:
        return f"it is a {type(module).__name__}, not timm's plain VisionTransformer"
    if type(module.patch_embed) is not PatchEmbed:
        return f"its patches pass through a {type(module.patch_embed).__name__} first"
    if len(set(module.patch_embed.patch_size)) > 1:
        return "its patches are not square"
    if module.pos_embed is None:
        return "it has no absolute position embedding"
    for block in module.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            return f"its blocks are {type(block).__name__}s with {type(block.attn).__name__}"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention is gated"
    return ""


class Backbone(nn.Module):
    """(b, channels, size, size) normalised → (b, width, grid, grid), what the last block writes.

    Parameters carry the names they have in timm's VisionTransformer, so that layer-wise decay finds
    its layers. The model that it is made of is left as it was.
    """

    def __init__(self, model: Model, config: BackboneConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        module: Any = copy.deepcopy(model.module)
        self.grid = encoder.grid
        self.frozen = config.frozen
        self.patch_embed = module.patch_embed
        self.pos_embed = nn.Parameter(_resampled(module, encoder.grid))
        self.norm_pre = module.norm_pre
        self.blocks = module.blocks
        for i, block in enumerate(self.blocks):
            window = 0 if config.is_global(i, len(self.blocks)) else config.window
            block.attn = GridAttention(
                block.attn, encoder.grid, window, relative=config.relative_positions
            )
            block.drop_path1 = block.drop_path2 = nn.Identity()
        set_stochastic_depth(module, config.drop_path)
        self.requires_grad_(not config.frozen)

    def forward(self, images: Tensor) -> Tensor:
        """The map above; without gradients where the backbone is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.patch_embed.norm(self.patch_embed.proj(images).flatten(2).mT)
            tokens = self.blocks(self.norm_pre(tokens + self.pos_embed))
            return tokens.mT.unflatten(2, (self.grid, self.grid))


def _resampled(module: VisionTransformer, grid: int) -> Tensor:
    """The patches' position embeddings for another grid: (1, grid * grid, width)."""
    positions = module.get_parameter("pos_embed").detach()
    old = module.patch_embed.grid_size
    patches = positions[:, positions.shape[1] - old[0] * old[1] :]
    return resample_abs_pos_embed(
        patches, new_size=[grid, grid], old_size=list(old), num_prefix_tokens=0
    ).clone()


class GridAttention(nn.Module):
    """timm's attention over a square grid of tokens, whole or within windows: (b, n, c) → the same.

    attention: whose weights are taken over. grid: tokens along one side. window: of a window, 0 for
    the whole grid; where windows do not fit, rows and columns of zeros are added below and to the
    right, which take part in attention, as in ViTDet. relative: see `BackboneConfig`.
    """

    def __init__(self, attention: Any, grid: int, window: int, *, relative: bool) -> None:
        super().__init__()
        self.heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norm = getattr(attention, "norm", nn.Identity())
        self.grid = grid
        self.window = window if window < grid else 0
        self.tokens = grid * grid
        side = self.window or grid
        channels = self.qkv.out_features // (3 * self.heads)
        self.relative = relative
        if relative:
            self.relative_rows = nn.Parameter(torch.zeros(2 * side - 1, channels))
            self.relative_columns = nn.Parameter(torch.zeros(2 * side - 1, channels))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend; the other arguments are those that timm's block gives, and of no use here."""
        b, n, c = x.shape
        if not self.window:
            return self._attend(x, self.grid)
        side, parts = self.window, -(-self.grid // self.window)
        missing = parts * side - self.grid
        tiles = F.pad(x.view(b, self.grid, self.grid, c), (0, 0, 0, missing, 0, missing))
        tiles = tiles.view(b, parts, side, parts, side, c).transpose(2, 3)
        mixed = self._attend(tiles.reshape(-1, side * side, c), side)
        mixed = mixed.view(b, parts, parts, side, side, c).transpose(2, 3)
        whole = mixed.reshape(b, parts * side, parts * side, c)
        return whole[:, : self.grid, : self.grid].reshape(b, n, c)

    def _attend(self, x: Tensor, side: int) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = self._bias(q, side) if self.relative else None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(self.norm(mixed.transpose(1, 2).reshape(b, n, -1)))

    def _bias(self, q: Tensor, side: int) -> Tensor:
        """q (b, heads, n, d) with the embeddings of how many rows and columns a key lies further:
        (b, heads, n, n)."""
        b, heads, n, d = q.shape
        places = torch.arange(side, device=q.device)
        apart = places[:, None] - places[None] + side - 1
        grid = q.view(b, heads, side, side, d)
        rows = torch.einsum("bhyxd,ykd->bhyxk", grid, self.relative_rows[apart].to(q.dtype))
        columns = torch.einsum("bhyxd,xkd->bhyxk", grid, self.relative_columns[apart].to(q.dtype))
        return (rows[..., :, None] + columns[..., None, :]).reshape(b, heads, n, n)
