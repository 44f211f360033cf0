"""Fine-tuning: supervised training that starts from a checkpoint.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, appendix A.1: all weights
are trained, with rates that decay from block to block downwards (`optimizer.layer_decay`), under a
new classifier. Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers",
ICML 2023, classify the mean of the patch tokens under a norm of its own instead of the class token,
may add relative position biases (Bao et al., "BEiT", ICLR 2022, after Raffel et al. 2020), and ask
which layers matter by keeping the first pre-trained blocks only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, gen_relative_position_index
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.models import Model, load
from vitprobe.models.sources import parse_spec
from vitprobe.training.encoder import EncoderConfig, draw_block, set_stochastic_depth
from vitprobe.training.methods.supervised import Supervised, SupervisedConfig


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """init: a spec that vitprobe.load takes, of a plain Vision Transformer on square images.

    kept: pre-trained blocks that are kept, from the first; the others and the final norm are drawn
        anew. What lies before the blocks (patches, class token, positions) is kept whatever the
        number, so that 0 tells what the blocks are worth; not given: all blocks and the norm.
    pool: what is classified: "mean" is the patch tokens' under a new norm, the final norm left out;
        "token" is the class token after the final norm.
    relative_positions: learned biases of each head for the offset between query and key, a table a
        block, 0 at the start.
    """

    init: str = ""
    kept: int | None = None
    pool: Literal["mean", "token"] = "mean"
    relative_positions: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init:
            raise RecipeError(
                "method.init must name the checkpoint to fine-tune, such as run:DIR or a file."
            )
        if self.kept is not None and self.kept < 0:
            raise RecipeError(f"method.kept must be at least 0, not {self.kept}.")


class Finetune(Supervised):
    """Cross-entropy of the labels under a new head on a pre-trained encoder."""

    Config = FinetuneConfig
    config: FinetuneConfig

    @classmethod
    def complete(cls, method: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint's encoder, with what the recipe has of its own (a size, stochastic depth).

        Raises RecipeError where the recipe names no checkpoint, or one of no plain Vision
        Transformer, and whatever `load` raises.
        """
        needed = {field.name for field in fields(EncoderConfig) if field.default is MISSING}
        if needed <= encoder.keys():
            return dict(encoder)
        spec = method.get("init")
        if not isinstance(spec, str) or not spec:
            raise RecipeError(
                "This recipe fine-tunes a checkpoint, which method.init has to name; "
                "vitprobe evaluate finetune SPEC does."
            )
        size = encoder.get("image_size")
        return describe(load_plain(spec, size if isinstance(size, int) else None)) | dict(encoder)

    def make_encoder(self, encoder: EncoderConfig) -> VisionTransformer:
        """The checkpoint's encoder, as the recipe changes it.

        Raises RecipeError where it is not the encoder that the recipe describes.
        """
        config = self.config
        model = load_plain(config.init, encoder.image_size)
        for name, value in describe(model).items():
            if name not in ("mean", "std") and getattr(encoder, name) != value:
                raise RecipeError(
                    f"encoder.{name} is {getattr(encoder, name)}, but that of '{config.init}' is "
                    f"{value}; leave it out of the recipe."
                )
        self._init_sha256 = model.sha256
        module: Any = model.module
        depth, width = len(module.blocks), module.embed_dim
        if config.kept is not None:
            if config.kept > depth:
                raise RecipeError(
                    f"method.kept is {config.kept}, but '{config.init}' has {depth} blocks."
                )
            for block in module.blocks[config.kept :]:
                draw_block(block)
        pool = "avg" if config.pool == "mean" else "token"
        if pool == "token" and not module.has_class_token:
            raise RecipeError(
                f'method.pool is "token", but \'{config.init}\' has no class token; use "mean".'
            )
        if config.relative_positions:
            _add_relative_positions(module, config.init)
        eps = module.blocks[0].norm1.eps
        # A checkpoint that was fine-tuned before may have its norm behind the pooling.
        pretrained = not isinstance(module.norm, nn.Identity)
        module.reset_classifier(self.classes, pool)
        nn.init.zeros_(module.head.weight)
        nn.init.zeros_(module.head.bias)
        if pool == "avg":
            module.norm, module.fc_norm = nn.Identity(), nn.LayerNorm(width, eps=eps)
        else:
            module.fc_norm = nn.Identity()
            if config.kept is not None or not pretrained:
                module.norm = nn.LayerNorm(width, eps=eps)
        set_stochastic_depth(module, encoder.drop_path)
        plain: VisionTransformer = module.requires_grad_(True)
        return plain

    @property
    def init_sha256(self) -> str | None:
        """Of the checkpoint file."""
        return self._init_sha256

    def architecture(self, encoder: EncoderConfig) -> dict[str, Any]:
        """Of the fine-tuned encoder, with what tensors do not show of one from elsewhere."""
        module: Any = self.encoder
        own = {
            "global_pool": module.global_pool,
            "class_token": module.has_class_token,
            "reg_tokens": module.num_reg_tokens,
            "no_embed_class": module.no_embed_class,
            "norm_eps": module.blocks[0].norm1.eps,
            "activation": type(module.blocks[0].mlp.act).__name__,
        }
        return super().architecture(encoder) | own

    def features(self, images: Tensor) -> Tensor:
        """(b, width): what the head classifies."""
        pooled: Tensor = self.encoder.forward_head(self.encode(images), pre_logits=True)
        return pooled


def load_plain(spec: str, size: int | None = None) -> Model:
    """The model of a spec, its positions resized to squares of `size` pixels where it has others.

    Raises RecipeError, with the reason, for anything but timm's plain Vision Transformer on square
    images; and whatever `load` raises.
    """
    # A size that the spec asks for decides, where the recipe has none of its own.
    given = size is not None and "size" not in parse_spec(spec).options
    model = load(spec)
    if given and model.input_size[1:] != (size, size):
        model = load(spec, size=(size, size))
    reason = unfit(model)
    if reason:
        raise RecipeError(f"'{spec}' cannot be fine-tuned: {reason}.")
    return model


def unfit(model: Model) -> str:
    """Why a model cannot be fine-tuned here, "" where it can."""
    module: Any = model.module
    _, height, width = model.input_size
    if type(module) is not VisionTransformer:
        return f"it is a {type(module).__name__}, not timm's plain VisionTransformer"
    if type(module.patch_embed) is not PatchEmbed:
        return f"its patches pass through a {type(module.patch_embed).__name__} first"
    if module.attn_pool is not None:
        return "it pools its tokens by attention"
    if any(not isinstance(block, Block) for block in module.blocks):
        return f"its blocks are {type(module.blocks[0]).__name__}"
    rows, columns = module.patch_embed.patch_size
    if height != width or rows != columns:
        return (
            f"its images are {height}x{width} in patches of {rows}x{columns}, not squares; "
            "give a size"
        )
    return ""


def describe(model: Model) -> dict[str, Any]:
    """The recipe's table [encoder] of a plain Vision Transformer."""
    module: Any = model.module
    hidden = module.blocks[0].mlp.fc1.out_features
    return {
        "image_size": model.input_size[1],
        "patch_size": module.patch_embed.patch_size[0],
        "channels": model.input_size[0],
        "width": module.embed_dim,
        "depth": len(module.blocks),
        "heads": module.blocks[0].attn.num_heads,
        "mlp_ratio": hidden / module.embed_dim,
        "mean": list(model.mean),
        "std": list(model.std),
    }


class RelativeAttention(Attention):
    """timm's attention with a learned bias for each head and offset from query to key.

    (b, tokens, width) → the same; the class token has three entries of its own, as in BEiT. The
    table has BEiT's name and order, by which checkpoints are told.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__(width, heads, qkv_bias=True)
        rows, columns = grid
        offsets = (2 * rows - 1) * (2 * columns - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, heads))
        index = gen_relative_position_index(grid, class_token=True)
        self.register_buffer("relative_position_index", index, persistent=False)

    def bias(self) -> Tensor:
        """(1, heads, tokens, tokens): what is added to the scaled products of queries and keys."""
        index: Tensor = self.get_buffer("relative_position_index")
        return self.relative_position_bias_table[index].permute(2, 0, 1)[None]

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """As timm's, without its masks."""
        b, n, width = x.shape
        packed = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = packed.unbind(0)
        bias = self.bias().to(q.dtype)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        projected: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, width))
        return projected


def _add_relative_positions(module: Any, spec: str) -> None:
    """Replace the attention of every block; what they compute stays the same at first."""
    first = module.blocks[0].attn
    plain = type(first) is Attention and {name for name, _ in first.named_parameters()} == {
        f"{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias")
    }
    if not plain or module.num_prefix_tokens != 1 or not module.has_class_token:
        raise RecipeError(
            f"method.relative_positions needs plain attention and one class token before the "
            f"patches, which '{spec}' has not."
        )
    for block in module.blocks:
        attention = RelativeAttention(
            module.embed_dim, block.attn.num_heads, module.patch_embed.grid_size
        )
        attention.load_state_dict(block.attn.state_dict(), strict=False)
        block.attn = attention
