"""Small models and images that tests share."""

from __future__ import annotations

import timm
import torch

import vitprobe as vp


def tiny(name="tiny", *, size=32, patch=8, width=24, depth=3, heads=3, seed=0, channels=3, **more):
    """A wrapped ViT with weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    module = timm.models.vision_transformer.VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        in_chans=channels,
        num_classes=0,
        **more,
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return vp.wrap(module, name=name, input_size=(channels, size, size), mean=0.5, std=0.5)


def squares(n=40, size=32, seed=0):
    """Random smooth images, (n, 3, size, size) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
