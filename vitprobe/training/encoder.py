"""The Vision Transformer being trained, and the checkpoint it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.files import replacing
from vitprobe.training.randomness import Draws


@dataclass(frozen=True)
class EncoderConfig:
    """A Vision Transformer (Dosovitskiy et al. 2021) with a class token, on square images.

    mean, std: per channel, of images in [0, 1]; they travel with the checkpoint.
    positions: embeddings that are learned, or the fixed `sincos_positions`.
    drop_path: largest rate of stochastic depth (Huang et al. 2016), rising linearly over the blocks
        from 0; only while training.
    """

    image_size: int
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mlp_ratio: float = 4.0
    positions: Literal["learned", "sincos"] = "learned"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name} must be at least 1, not {getattr(self, name)}.")
        if self.image_size % self.patch_size:
            raise RecipeError(
                f"encoder.image_size {self.image_size} must be a multiple of "
                f"encoder.patch_size {self.patch_size}."
            )
        if self.width % self.heads or self.width % 4:
            raise RecipeError(
                f"encoder.width {self.width} must be a multiple of encoder.heads {self.heads} "
                "and of 4."
            )
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise RecipeError(
                f"encoder.mean and encoder.std need one value for each of the {self.channels} "
                f"channels, not {len(self.mean)} and {len(self.std)}."
            )
        if min(self.std) <= 0:
            raise RecipeError(f"encoder.std must be above 0, not {list(self.std)}.")
        if not 0 <= self.drop_path < 1:
            raise RecipeError(f"encoder.drop_path must lie in [0, 1), not {self.drop_path}.")
        if self.mlp_ratio <= 0:
            raise RecipeError(f"encoder.mlp_ratio must be above 0, not {self.mlp_ratio}.")

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def architecture(self, num_classes: int) -> dict[str, Any]:
        """Arguments of timm's VisionTransformer; 0 classes leave the head out."""
        return {
            "img_size": [self.image_size, self.image_size],
            "patch_size": self.patch_size,
            "in_chans": self.channels,
            "num_classes": num_classes,
            "global_pool": "token",
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "class_token": True,
        }


def build_encoder(config: EncoderConfig, num_classes: int = 0) -> VisionTransformer:
    """timm's VisionTransformer, initialised as ViT's authors do: Xavier uniform, a head of zeros.

    Queries, keys and values count as three matrices, as in MoCo v3. timm's own defaults leave a
    narrow model far too small: layers at a standard deviation of 0.02, which suits width 768, and
    a class token of 1e-6, which the norms cannot lift above their epsilon.
    """
    encoder = VisionTransformer(**config.architecture(num_classes), weight_init="jax")
    nn.init.normal_(encoder.get_parameter("cls_token"), std=0.02)
    for i in range(config.depth):
        qkv = encoder.get_parameter(f"blocks.{i}.attn.qkv.weight").detach()
        for matrix in qkv.chunk(3):
            nn.init.xavier_uniform_(matrix)
    set_stochastic_depth(encoder, config.drop_path)
    if config.positions == "sincos":
        encoder.pos_embed = fixed_positions(config.width, config.grid)
    return encoder


def draw_block(block: nn.Module) -> None:
    """Draw a block's weights anew, as `build_encoder` does; layer scales become 1."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            # Queries, keys and values count as three matrices.
            for matrix in module.weight.detach().chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(matrix)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=1e-6 if "mlp" in name else 0.0)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(scale := getattr(module, "gamma", None), nn.Parameter):
            nn.init.ones_(scale)


def set_stochastic_depth(encoder: VisionTransformer, rate: float) -> None:
    """Give its blocks stochastic depth that rises linearly from 0 to `rate`; none where it is 0."""
    for i, block in enumerate(encoder.blocks):
        own = rate * i / max(len(encoder.blocks) - 1, 1)
        for branch in ("drop_path1", "drop_path2") if own else ():
            setattr(block, branch, StochasticDepth(own, f"{branch} {i}"))


class StochasticDepth(nn.Module):
    """Leaves a residual branch out for some samples: (n, tokens, width) → the same.

    Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, by sample; what is kept is
    scaled so that the mean stays. Which samples is decided by `draws`, those of the batch: unlike
    with torch's generator, a batch that is shared out or resumed sees the same. Several views that
    go through the encoder together are told apart, those that go one after another are not.

    rate: share of the samples that go without. name: of the stream of random numbers.
    """

    def __init__(self, rate: float, name: str) -> None:
        super().__init__()
        self.rate = rate
        self.name = name
        self.draws: Draws | None = None

    def forward(self, branch: Tensor) -> Tensor:
        """Change nothing in eval mode and where no draws were given."""
        if not self.training or self.rate == 0 or self.draws is None:
            return branch
        return branch * self._factors(self.draws, len(branch)).to(branch.dtype)[:, None, None]

    # A compiler would compile each block anew for its rate and each epoch for its key.
    @torch.compiler.disable
    def _factors(self, draws: Draws, n: int) -> Tensor:
        views = n // len(draws.index)
        kept = draws.uniform(f"{self.name} of {views}", views).T.flatten() >= self.rate
        return kept / (1 - self.rate)


def encode(encoder: VisionTransformer, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Tokens after the final norm: (b, prefix + patches, width), or with only some patches seen.

    images: (b, c, h, w) normalised. visible: (b, v) int64 indices of the patches that enter the
    blocks, in that order, each with the position it has in the whole image (He et al. 2022,
    section 3); only those are embedded.
    """
    if visible is None:
        return encoder.forward_features(images)
    projection = encoder.patch_embed.proj
    (rows, columns), (height, width) = encoder.patch_embed.grid_size, projection.kernel_size
    b, c, *_ = images.shape
    patches = images.reshape(b, c, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    chosen = patches[
        torch.arange(b, device=images.device)[:, None], visible // columns, visible % columns
    ].flatten(2)
    tokens = F.linear(chosen, projection.weight.flatten(1), projection.bias)
    tokens = encoder.patch_embed.norm(tokens)
    prefix = [
        token.expand(len(images), -1, -1)
        for token in (encoder.cls_token, encoder.reg_token)
        if token is not None
    ]
    count = sum(token.shape[1] for token in prefix)
    positions: Tensor = encoder.get_parameter("pos_embed")
    if positions.shape[1] > rows * columns:
        prefix = [torch.cat(prefix, dim=1) + positions[:, :count]]
        positions = positions[:, count:]
    tokens = tokens + take(positions.expand(len(images), -1, -1), visible)
    tokens = encoder.norm_pre(torch.cat([*prefix, tokens], dim=1))
    return encoder.norm(encoder.blocks(tokens))


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (b, n, d) at index (b, m) → (b, m, d)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def fixed_positions(width: int, grid: int) -> nn.Parameter:
    """(1, 1 + grid * grid, width), not trained: zeros for the class token, then sine-cosines."""
    positions = torch.cat([torch.zeros(1, width), sincos_positions(width, grid)])
    return nn.Parameter(positions[None], requires_grad=False)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed two-dimensional sine-cosine position embeddings: (grid * grid, width), row by row.

    The first half of the channels encodes the column, the second the row; within each half come
    the sines and then the cosines at frequencies 10000^(-i / (width / 4)) (Vaswani et al. 2017,
    section 3.5, in the two-dimensional form of MoCo v3 and MAE).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    row = axis[:, None].expand(grid, grid, -1)
    column = axis[None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()


def save_encoder(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write an encoder's state dict in fp32 as safetensors, with `metadata` as JSON under
    "vitprobe"."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in state.items()
    }
    with replacing(path) as partial:
        partial.write_bytes(save(tensors, metadata={"vitprobe": json.dumps(metadata)}))
