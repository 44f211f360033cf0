"""torchvision's VisionTransformer, https://github.com/pytorch/vision.

`class_token`, `conv_proj`, `encoder.layers.encoder_layer_N` with queries, keys and values in one
`in_proj_weight`. lightly trains it too, under `backbone.`.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect

_BLOCK = r"^encoder\.layers\.encoder_layer_(\d+)\."

TORCHVISION = Dialect(
    name="torchvision",
    recognise=lambda branches, settings: True,
    landmark="conv_proj.weight",
    ignored=r"(mask_token|decoder|heads?|projection_head|online_classifier)\b",
    rename=(
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.ln\.", "norm."),
        (_BLOCK + r"ln_([12])\.", r"blocks.\1.norm\2."),
        (_BLOCK + r"self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
        (_BLOCK + r"self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
        (_BLOCK + r"mlp\.(0|linear_1)\.", r"blocks.\1.mlp.fc1."),
        (_BLOCK + r"mlp\.(3|linear_2)\.", r"blocks.\1.mlp.fc2."),
        (_BLOCK, r"blocks.\1."),
        (r"^heads\.head\.", "head."),
    ),
    # Its constructor's; no checkpoint can have another activation.
    fixed={"activation": "gelu", "norm_eps": 1e-6},
)
