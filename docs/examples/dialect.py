"""Checkpoints of a code base that vitprobe does not know: the dialect `acme`."""

from __future__ import annotations

from vitprobe.models.formats import Dialect

# [dialect]
ACME = Dialect(
    name="acme",
    # Which key every such file has: the patch embedding's weight (width, channels, patch, patch).
    landmark="stem.conv.weight",
    recognise=lambda branches, settings: any(key.startswith("stages.") for key in branches[0].keys),
    # Theirs (a pattern), ours: timm's names.
    rename=(
        (r"^stem\.conv\.", "patch_embed.proj."),
        (r"^stem\.class_token$", "cls_token"),
        (r"^stem\.positions$", "pos_embed"),
        (r"^stages\.(\d+)\.attention\.", r"blocks.\1.attn."),
        (r"^stages\.(\d+)\.feed_forward\.", r"blocks.\1.mlp."),
        (r"^stages\.", "blocks."),
        (r"^last_norm\.", "norm."),
    ),
    # Keys of theirs that are no part of the encoder.
    ignored=r"classifier\.|projector\.",
    # What their settings say, under the names that vitprobe gives facts.
    stated=lambda settings: {"num_heads": settings.get("n_heads")},
    # What holds for all their files, and what a tensor's shape cannot show.
    fixed={"norm_eps": 1e-6, "activation": "gelu"},
)
