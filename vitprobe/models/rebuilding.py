"""timm's modules for an architecture that was read from a file: ViT, BEiT and ViT with RoPE.

They name a few tensors differently; here these are taken from the names of timm's
VisionTransformer, under which the tensors of every dialect are known before.
"""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed, SwiGLUPacked, resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.models.evidence import RELATIVE_TABLE, ROPE_PERIODS
from vitprobe.models.meta import on_meta
from vitprobe.models.model import Fact

Kind = Literal["vit", "distilled", "beit", "rope"]
# The base of DINOv3's rotary periods, and how far its files, in bfloat16, are from them.
ROPE_BASE, _ROPE_TOLERANCE = 100.0, 0.01


@dataclass(frozen=True)
class Architecture:
    """A Vision Transformer that timm can build.

    kind: which of timm's classes: VisionTransformer, its distilled one, Beit (relative positions)
        or Eva (rotary positions).
    arguments: of timm's VisionTransformer, and with rotary positions the `rope_base`.
    swiglu, patch_bias: whether its MLPs are gated, and its patch embedding adds a bias.
    relative: "table" a block, one "shared", or None.
    stored_grid, grid: (rows, columns) of patches in the file and in the model to build.
    antialias: whether position embeddings are resized with antialiasing.
    """

    kind: Kind
    arguments: dict[str, Any]
    swiglu: bool
    patch_bias: bool
    relative: Literal["table", "shared"] | None
    stored_grid: tuple[int, int]
    grid: tuple[int, int]
    antialias: bool
    facts: dict[str, Fact]

    def build(self, seed: int | None = None) -> nn.Module:
        """timm's module with its initialisation under `seed`, or with arbitrary weights, to be
        filled. The global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return _BUILDERS[self.kind](self, fresh=seed is not None)

    def blueprint(self) -> dict[str, Tensor]:
        """The module's `learned` tensors without their numbers, on the meta device."""
        with on_meta():
            return learned(self.build())

    def fit(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the module's own names, positions resized to `grid`.

        Raises ValueError for rotary periods that timm's module would not have, and whatever torch
        raises for impossible shapes.
        """
        tensors = dict(tensors)
        if "pos_embed" in tensors and self.grid != self.stored_grid:
            tensors["pos_embed"] = resample_abs_pos_embed(
                tensors["pos_embed"].float(),
                new_size=list(self.grid),
                old_size=list(self.stored_grid),
                num_prefix_tokens=0
                if self.arguments["no_embed_class"]
                else self.facts["prefix_tokens"].value,
                antialias=self.antialias,
            )
        if self.kind in ("beit", "rope"):
            tensors = _named_as_in_beit(tensors)
        if self.kind == "beit" and self.grid != self.stored_grid:
            tensors |= {
                key: self._resized_table(table)
                for key, table in tensors.items()
                if key.endswith(RELATIVE_TABLE)
            }
        if self.kind == "rope" and (periods := tensors.pop(ROPE_PERIODS, None)) is not None:
            _check_periods(periods, self.arguments["rope_base"])
        return tensors

    def _resized_table(self, table: Tensor) -> Tensor:
        rows, columns = (2 * side - 1 for side in self.grid)
        shape = (rows * columns + 3, table.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, about timm's own code
            return resize_rel_pos_bias_table(table.float(), self.grid, shape)


def _vision_transformer(architecture: Architecture, *, fresh: bool) -> nn.Module:
    build = VisionTransformerDistilled if architecture.kind == "distilled" else VisionTransformer
    arguments = dict(architecture.arguments)
    if architecture.swiglu:
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if architecture.patch_bias == arguments["pre_norm"]:
        arguments["embed_layer"] = partial(_patch_embed, with_bias=architecture.patch_bias)
    # timm's distilled class had no "skip" at first.
    if build is VisionTransformer and not fresh:
        arguments["weight_init"] = "skip"
    return build(**arguments)


def _patch_embed(*, bias: bool, with_bias: bool, **arguments: Any) -> PatchEmbed:
    """timm gives a patch embedding its bias where no norm follows; not all models do."""
    return PatchEmbed(bias=with_bias, **arguments)


_SHARED = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "qkv_bias", "init_values", "norm_layer"),
)


def _beit(architecture: Architecture, *, fresh: bool) -> nn.Module:
    arguments = architecture.arguments
    return Beit(
        **{name: arguments[name] for name in _SHARED},
        mlp_ratio=arguments["mlp_ratio"],
        use_abs_pos_emb=arguments["pos_embed"] == "learn",
        use_rel_pos_bias=architecture.relative == "table",
        use_shared_rel_pos_bias=architecture.relative == "shared",
    )


def _eva(architecture: Architecture, *, fresh: bool) -> nn.Module:
    if "rope_type" not in inspect.signature(Eva).parameters:
        raise RuntimeError("the rotary positions of DINOv3 need timm 1.0.20 or a newer one")
    arguments = architecture.arguments
    width, ratio = arguments["embed_dim"], arguments["mlp_ratio"]
    if architecture.swiglu:  # timm counts gate and value in the other classes, one of them here
        ratio = mlp_ratio(int(width * ratio) // 2, width)
    return Eva(
        **{name: arguments[name] for name in _SHARED},
        mlp_ratio=ratio,
        swiglu_mlp=architecture.swiglu,
        class_token=arguments["class_token"],
        num_reg_tokens=arguments["reg_tokens"],
        no_embed_class=arguments["no_embed_class"],
        use_abs_pos_emb=arguments["pos_embed"] == "learn",
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=arguments["rope_base"],
        rope_rotate_half=True,
        use_fc_norm=arguments["fc_norm"],
    )


_BUILDERS = {"vit": _vision_transformer, "distilled": _vision_transformer} | {
    "beit": _beit,
    "rope": _eva,
}


def learned(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, but for the index of relative positions that older timm computes into it."""
    state = module.state_dict()
    return {key: state[key] for key in state if not key.endswith("relative_position_index")}


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio from which timm finds this hidden width, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _named_as_in_beit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Beit and Eva: layer scale as gamma_1 and gamma_2, biases of queries and values apart."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith("blocks.") and key.endswith(".attn.qkv.bias"):
            attention = key.removesuffix("qkv.bias")
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{attention}{name}_bias"] = part
        else:
            for number in "12":
                key = key.replace(f".ls{number}.gamma", f".gamma_{number}")
            renamed[key] = tensor
    return renamed


def _check_periods(periods: Tensor, base: float) -> None:
    expected = base ** (torch.arange(len(periods)) / len(periods))
    if not torch.allclose(periods.float(), expected, rtol=_ROPE_TOLERANCE):
        raise ValueError(
            f"their rotary periods are not {base:g} to the powers from 0 to 1, and timm's are"
        )
