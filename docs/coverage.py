"""Writes coverage.md: which families of models can be probed, found out by probing each of them.

    python docs/coverage.py                      # all; about twenty minutes on one core
    python docs/coverage.py --cache rows.jsonl   # the same in several goes
    python docs/coverage.py swin_tiny_patch4_window7_224 hf:SwinModel   # prints their rows only

Every model has random weights, perturbed so that no gate or layer scale silences its attention.
What is captured of it is compared with what an independent watcher sees in the model: the sum of
squares of every row of every softmax, fused or not.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vitprobe as vp
from vitprobe.errors import VitprobeError
from vitprobe.sites import kind_of

PAGE = Path(__file__).with_suffix(".md")

TIMM = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_18x2_224",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_little_patch16_reg4_gap_256",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_224",
    "vit_xsmall_patch16_clip_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "flexivit_small",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_medium_patch16_rope_reg1_gap_256",
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_parfac_gap",
    "naflexvit_base_patch16_map",
    "gemma4_vit_167m",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "volo_d1_224",
    "swin_tiny_patch4_window7_224",
    "swin_s3_tiny_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "pvt_v2_b0",
    "pvt_v2_b2_li",
    "twins_svt_small",
    "twins_pcpvt_small",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hieradet_small",
    "samvit_base_patch16_224",
    "pit_ti_224",
    "tnt_s_patch16_224",
    "crossvit_9_240",
    "convit_tiny",
    "coat_lite_tiny",
    "coat_tiny",
    "levit_128s",
    "levit_conv_128s",
    "mvitv2_tiny",
    "mvitv2_small_cls",
    "maxvit_pico_rw_256",
    "coatnet_nano_rw_224",
    "maxxvit_rmlp_nano_rw_256",
    "nextvit_small",
    "tiny_vit_5m_224",
    "vitamin_small_224",
    "vit_relpos_small_patch16_224",
    "vit_srelpos_small_patch16_224",
    "vit_base_resnet26d_224",
    "vit_base_mci_224",
    "gcvit_xxtiny",
    "davit_tiny",
    "nest_tiny",
    "visformer_tiny",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "fastvit_sa12",
    "fastvit_mci0",
    "caformer_s18",
    "iformer_t",
    "lowformer_b0",
    "cpubone_nano",
    "shvit_s1",
    "csatv2",
    "mobilenetv4_hybrid_medium",
    "mobilenetv5_base",
    "botnet26t_256",
    "halonet26t",
    "lambda_resnet26t",
    "resnet50_clip",
    "efficientvim_m1",
]
"""timm 1.0.31's models with softmax attention, one or more a family."""

SMALLER = {
    "naflexvit_base_patch16_gap": 192,
    "naflexvit_base_patch16_parfac_gap": 192,
    "naflexvit_base_patch16_map": 192,
    "gemma4_vit_167m": 192,
    "sam2_hiera_tiny": 448,
    "csatv2": 256,
}
"""Sides of the images of models that take any size, where their own is large."""

WITHOUT_ATTENTION = ("efficientvit_b0", "swiftformer_xs", "resnet18", "convnext_atto")
"""timm's models without softmax attention: linear attention, additive attention, convolutions."""

TORCHVISION: dict[str, dict[str, Any]] = {
    "vit_b_16": {},
    "swin_t": {},
    "maxvit_t": {},
}

_PLAIN = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
_SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "Aimv2VisionModel": _PLAIN,
    "AltCLIPVisionModel": _PLAIN,
    "BeitModel": _PLAIN,
    "BlipVisionModel": _PLAIN,
    "ChineseCLIPVisionModel": _PLAIN,
    "CLIPVisionModel": _PLAIN,
    "CvtModel": {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 3]},
    "Data2VecVisionModel": _PLAIN,
    "DeiTModel": _PLAIN,
    "Dinov2Model": _PLAIN,
    "Dinov2WithRegistersModel": {**_PLAIN, "num_register_tokens": 3},
    "DINOv3ViTModel": {**_PLAIN, "num_register_tokens": 2},
    "DonutSwinModel": {**_SWIN, "window_size": 4},
    "DPTModel": _PLAIN,
    "FlavaImageModel": _PLAIN,
    "GLPNModel": {**_STAGES, "num_attention_heads": [1, 2, 3, 4]},
    "HieraModel": {
        "embed_dim": 16,
        "image_size": [64, 64],
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
    },
    "IJepaModel": _PLAIN,
    "InternVLVisionModel": {**_PLAIN, "image_size": [64, 64], "patch_size": [8, 8]},
    "LevitModel": {
        "image_size": 128,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 2],
        "key_dim": [8, 8, 8],
    },
    "MetaClip2VisionModel": _PLAIN,
    "MobileViTModel": {
        "image_size": 128,
        "hidden_sizes": [24, 32, 40],
        "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
    },
    "OwlViTVisionModel": _PLAIN,
    "PvtModel": {**_STAGES, "image_size": 64, "num_attention_heads": [1, 2, 3, 4]},
    "PvtV2Model": {**_STAGES, "image_size": 64, "num_attention_heads": [1, 2, 3, 4]},
    "SamVisionModel": {
        **_PLAIN,
        "window_size": 4,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "mlp_dim": 96,
    },
    "SegformerModel": {**_STAGES, "num_attention_heads": [1, 2, 3, 4]},
    "SiglipVisionModel": _PLAIN,
    "SwinModel": {**_SWIN, "window_size": 4},
    "Swinv2Model": {**_SWIN, "window_size": 4},
    "ViTModel": _PLAIN,
    "ViTMSNModel": _PLAIN,
    "VitDetModel": {
        **_PLAIN,
        "window_size": 4,
        "window_block_indices": [0],
        "pretrain_image_size": 64,
    },
    "YolosModel": {**_PLAIN, "image_size": [64, 64], "num_detection_tokens": 5},
}
"""Vision models of transformers, with configurations that make them tiny."""

HUGGING_FACE_WITHOUT_ATTENTION: dict[str, dict[str, Any]] = {
    "ConvNextModel": _STAGES,
    "FocalNetModel": {
        "image_size": 64,
        "embed_dim": 16,
        "depths": [1, 2],
        "hidden_sizes": [16, 32],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "PoolFormerModel": _STAGES,
    "ResNetModel": {**_STAGES, "embedding_size": 16},
}

TOLERANCE = {"torchvision:vit_b_16": 2e-6}
"""By how much outputs may differ where they are not bit-identical: torchvision's ViT leaves its
fused fast path while it is watched."""


@dataclass(frozen=True)
class Row:
    """What one model gave.

    layers: feature layers; placed: those whose patches have a known place in the image.
    maps: attention layers; equal: those whose maps are the model's own; known: those with places.
    missed: computations of attention in the model that no attention layer accounts for.
    finite: whether entropy is defined in every attention layer.
    difference: largest between the outputs with and without capture, relative to the largest.
    refused: why attention or distance is refused, or the error that stopped everything.
    """

    name: str
    failed: str = ""
    layers: int = 0
    placed: int = 0
    normed: bool = False
    maps: int = 0
    equal: int = 0
    known: int = 0
    missed: int = 0
    finite: bool = True
    difference: float = 0.0
    kinds: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether features and all attention were captured, and nothing else happened."""
        return (
            not self.failed
            and self.layers > 0
            and 0 < self.maps == self.equal
            and not self.missed
            and self.finite
            and self.difference <= TOLERANCE.get(self.name, 0.0)
        )


def names() -> list[str]:
    """All models of the table: timm's by their name, others behind "torchvision:" and "hf:"."""
    return [
        *TIMM,
        *WITHOUT_ATTENTION,
        *(f"torchvision:{name}" for name in TORCHVISION),
        *(f"hf:{name}" for name in HUGGING_FACE),
        *(f"hf:{name}" for name in HUGGING_FACE_WITHOUT_ATTENTION),
    ]


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model of the table with perturbed random weights, and its input size."""
    library, _, own = name.rpartition(":")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        if library == "hf":
            import transformers

            options = {**HUGGING_FACE, **HUGGING_FACE_WITHOUT_ATTENTION}[own]
            config = getattr(transformers, f"{own.removesuffix('Model')}Config")(**options)
            module = getattr(transformers, own)(config)
            side = options.get("image_size", 64)
            side = side[0] if isinstance(side, list) else side
            size = (3, side, side)
        elif library == "torchvision":
            import torchvision

            module = getattr(torchvision.models, own)(weights=None, **TORCHVISION[own])
            size = (3, 224, 224)
        else:
            module = timm.create_model(own, pretrained=False)
            channels, height, width = module.pretrained_cfg["input_size"]
            size = (channels, SMALLER.get(own, height), SMALLER.get(own, width))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return module.eval().requires_grad_(False), size


class Watcher(TorchFunctionMode):
    """Sees all attention of a forward pass, by other means than vitprobe's: from the results."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[Tensor] = []
        self.plain: list[Tensor] = []
        self.mixed: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.fused.append(fingerprint(_weights(*args, **kwargs)))
        elif func is F.multi_head_attention_forward:
            asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
            self.fused.append(fingerprint(func(*args, **asked)[1]))
        elif func in (torch.softmax, F.softmax, Tensor.softmax) and result.ndim > 2:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self.plain.append(fingerprint(result.movedim(axis, -1)))
        elif func is F.dropout and result.ndim > 3 and _are_rows(result):
            seen = fingerprint(result)
            # In eval mode it is the last softmax itself, or else a mixture of several.
            if not self.plain or not torch.equal(seen, self.plain[-1]):
                self.mixed.append(seen)
        return result


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    # Attention over an identity reads out its own weights.
    identity = torch.eye(key.shape[-2], dtype=query.dtype).expand(*key.shape[:-1], -1)
    return F.scaled_dot_product_attention(
        query, key, identity, attn_mask, is_causal=is_causal, scale=scale
    )


def _are_rows(values: Tensor) -> bool:
    return bool(values.min() >= 0) and torch.allclose(
        values.sum(-1), values.new_ones(()), atol=1e-4
    )


def fingerprint(weights: Tensor) -> Tensor:
    """Sums of squares of all rows, sorted: whatever the order of windows, heads and tokens."""
    return weights.double().square().sum(-1).flatten().sort().values


def examine(name: str) -> Row:
    """Probe one model of the table."""
    began = time.monotonic()
    module, size = build(name)
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(1))
    try:
        model = vp.wrap(module, name=name, input_size=size)
    except VitprobeError as error:
        return Row(name, str(error), seconds=time.monotonic() - began)
    anatomy = model.anatomy
    inputs = model.normalize(images)
    notes: list[str] = []
    with torch.no_grad():
        expected = _output(module, inputs)
        watcher = Watcher()
        with watcher:
            module(inputs)
        try:
            what = "both" if anatomy.sites else "features"
            with vp.capturing(model, what=what) as captured:
                output = _output(module, inputs)
        except VitprobeError as error:
            return Row(name, str(error), seconds=time.monotonic() - began)
        for layer, layout in captured.layouts.items():
            found = tuple(captured.features[layer].shape)
            if found != (2, layout.prefix_tokens + layout.patches, layout.width):
                notes.append(f"layer {layer} gives {found}")
        prints = {layer: fingerprint(maps) for layer, maps in captured.attention.items()}
    unclaimed = watcher.fused + watcher.plain + watcher.mixed
    equal = sum(_claim(prints[layer], unclaimed) for layer in prints)
    left = {id(print_) for print_ in unclaimed}
    # Where a mixture was captured, the softmaxes that it mixes are not wanted.
    mixtures = any(id(print_) not in left for print_ in watcher.mixed)
    wanted = watcher.fused + ([] if mixtures else watcher.plain)
    reasons = Counter(site.no_distance for site in anatomy.sites if site.no_distance)
    layouts = anatomy.normed or anatomy.residual
    return Row(
        name,
        layers=len(layouts),
        placed=sum(layout.grid is not None for layout in layouts),
        normed=bool(anatomy.normed),
        maps=len(anatomy.sites),
        equal=equal,
        known=sum(site.query_xy is not None and not site.no_distance for site in anatomy.sites),
        missed=sum(id(print_) in left for print_ in wanted),
        finite=all(bool(maps.isfinite().all()) for maps in prints.values()),
        difference=_difference(output, expected),
        kinds=tuple(dict.fromkeys(kind_of(site) for site in anatomy.sites)),
        refused=(anatomy.no_attention,)
        if anatomy.no_attention
        else tuple(
            reason if count == len(anatomy.sites) else f"{reason} ({count} of {len(anatomy.sites)})"
            for reason, count in reasons.items()
        ),
        notes=(*notes, *dict.fromkeys(site.note for site in anatomy.sites if site.note)),
        seconds=time.monotonic() - began,
    )


def _claim(found: Tensor, unclaimed: list[Tensor]) -> bool:
    """Whether a captured map is one of the model's, which is then taken."""
    for i, other in enumerate(unclaimed):
        if other.shape == found.shape and torch.allclose(other, found, atol=1e-5):
            del unclaimed[i]
            return True
    return False


def _output(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    return list(_tensors(module(inputs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _difference(output: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        0.0 if torch.equal(a, b) else float((a - b).abs().max() / b.abs().max())
        for a, b in zip(output, expected, strict=True)
    )


OPENING = """# Which models can be probed

Written by `docs/coverage.py`, which builds each model with random weights, probes it, and compares
every captured attention map with what an independent watcher sees in the model. A checkpoint of any
of these loads as a live module (`vp.wrap`); which *files* are understood is in the README.

- **Features**: layers that are captured; "normed" where each is what a block's attention reads,
  else the residual stream. "places" where it is known where in the image every token lies.
- **Attention**: attention layers captured whole, equal to the model's own to 1e-5.
- **Distance**: attention layers whose queries and keys have known places, so that they have an
  attention distance. Entropy is defined for all that is captured.
- **Output**: whether the model's output stays the same, bit by bit, while it is watched.
"""


def page(rows: list[Row]) -> str:
    """The whole of coverage.md."""
    groups = {
        "timm": [row for row in rows if row.name in TIMM],
        "Hugging Face transformers": [
            row for row in rows if row.name.removeprefix("hf:") in HUGGING_FACE
        ],
        "torchvision": [row for row in rows if row.name.startswith("torchvision:")],
    }
    listed = {row.name for part in groups.values() for row in part}
    without = [row for row in rows if row.name not in listed]
    parts = [OPENING, _summary(groups)]
    for title, part in groups.items():
        parts.append(f"## {title}\n\n{_table(part)}")
    parts.append(
        "## Without softmax attention\n\nThese give features (CKA and the like) and refuse "
        f"attention by name.\n\n{_table(without)}"
    )
    return "\n".join(parts)


def _summary(groups: Mapping[str, list[Row]]) -> str:
    lines = [
        f"- {title}: {sum(row.whole for row in rows)} of {len(rows)} models captured whole, "
        f"{sum(row.known == row.maps > 0 for row in rows)} with a distance in every attention "
        f"layer and {sum(0 < row.known < row.maps for row in rows)} in some."
        for title, rows in groups.items()
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> str:
    lines = [
        "| model | features | attention | distance | output | notes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    name = f"`{row.name.rpartition(':')[2]}`"
    if row.failed:
        return [name, "no", "no", "no", "", _plain(row.failed)]
    places = "places" if row.placed == row.layers else f"places in {row.placed}"
    kind = "normed" if row.normed else "residual"
    attention = "no"
    if row.maps:
        attention = f"{row.equal} of {row.maps}" if row.equal < row.maps else f"all {row.maps}"
        attention += f" ({', '.join(row.kinds)})"
    distance = {row.maps: "all", 0: "no"}.get(row.known, f"{row.known} of {row.maps}")
    output = "identical" if not row.difference else f"within {row.difference:.0e}"
    notes = [*row.refused, *row.notes]
    if row.missed:
        notes.append(f"{row.missed} softmaxes are not captured")
    return [
        name,
        f"{row.layers} {kind}, {places}",
        attention,
        distance if row.maps else "no",
        output,
        "; ".join(_plain(note).rstrip(".") for note in notes),
    ]


def _plain(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    return text.replace("|", r"\|").replace("*", r"\*").replace("<", "&lt;")


def _read(path: Path) -> dict[str, Row]:
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        fields = json.loads(line)
        rows[fields["name"]] = Row(
            **{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        )
    return rows


def main() -> None:
    """Examine what was asked for, and write the page where that is everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="models of the table; all unless given")
    parser.add_argument("--cache", type=Path, help="JSON lines of rows that are known already")
    given = parser.parse_args()
    rows = _read(given.cache) if given.cache else {}
    for name in given.names or names():
        if name in rows:
            continue
        rows[name] = row = examine(name)
        gc.collect()
        print(" | ".join(_cells(row)), f"| {row.seconds:.0f} s", flush=True)  # noqa: T201
        if given.cache:
            with given.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    if not given.names:
        PAGE.write_text(page([rows[name] for name in names()]), encoding="utf-8")


if __name__ == "__main__":
    main()
