"""The peers' training steps, read plainly: what MAE, MoCo v3, DINO and DeiT do with a batch.

Written from the papers' descriptions and the published hyper-parameters, on the same timm encoder
as vitprobe's, so that only the way of computing differs: Pillow transforms in DataLoader workers,
every patch embedded, a loop over parameters for moving averages, one forward pass a view, AdamW as
torch gives it. Mixed precision is float16 with a gradient scaler on CUDA, as the peers have it.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

WORKERS = {"mae": 10, "moco_v3": 32, "dino": 10, "supervised": 10}
"""DataLoader workers in the published commands."""


class MAE(nn.Module):
    def __init__(self, encoder: VisionTransformer, width: int, heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        dim = encoder.embed_dim
        self.patch = encoder.patch_embed.patch_size[0]
        count = encoder.patch_embed.num_patches
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, count + 1, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, qkv_bias=True)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.patch**2 * encoder.patch_embed.proj.in_channels)

    def forward(self, views: list[Tensor], labels: Tensor) -> Tensor:
        images = views[0]
        encoder = self.encoder
        x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        b, n, d = x.shape
        keep = int(n * 0.25)
        noise = torch.rand(b, n, device=x.device)
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        kept = torch.gather(x, 1, shuffle[:, :keep, None].repeat(1, 1, d))
        mask = torch.ones(b, n, device=x.device)
        mask[:, :keep] = 0
        mask = torch.gather(mask, 1, restore)
        token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(b, -1, -1)
        x = torch.cat([token, kept], dim=1)
        for block in encoder.blocks:
            x = block(x)
        x = self.embed(encoder.norm(x))
        tokens = self.mask_token.repeat(b, n + 1 - x.shape[1], 1)
        rest = torch.cat([x[:, 1:], tokens], dim=1)
        rest = torch.gather(rest, 1, restore[:, :, None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], rest], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        predicted = self.head(self.norm(x))[:, 1:]
        p, c = self.patch, images.shape[1]
        side = images.shape[2] // p
        target = images.reshape(b, c, side, p, side, p)
        target = torch.einsum("nchpwq->nhwpqc", target).reshape(b, n, p * p * c)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((predicted - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()

    def update(self) -> None:
        """Nothing follows an update."""


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(1, len(widths)):
        layers.append(nn.Linear(widths[i - 1], widths[i], bias=False))
        last = i + 1 == len(widths)
        layers.append(nn.BatchNorm1d(widths[i], affine=not last))
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _follow(copy_: nn.Module, model: nn.Module, momentum: float) -> None:
    with torch.no_grad():
        for ours, theirs in zip(copy_.parameters(), model.parameters(), strict=True):
            ours.data = ours.data * momentum + theirs.data * (1.0 - momentum)


class MoCoV3(nn.Module):
    def __init__(self, encoder: VisionTransformer, hidden: int, out: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(encoder, _perceptron(encoder.embed_dim, hidden, hidden, out))
        self.momentum = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = _perceptron(out, hidden, out)

    def forward(self, views: list[Tensor], labels: Tensor) -> Tensor:
        q1 = self.predictor(self.encoder(views[0]))
        q2 = self.predictor(self.encoder(views[1]))
        with torch.no_grad():
            k1, k2 = self.momentum(views[0]), self.momentum(views[1])
        return self._contrast(q1, k2) + self._contrast(q2, k1)

    def _contrast(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = torch.einsum("nc,mc->nm", [q, k]) / 0.2
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device)) * 0.4

    def update(self) -> None:
        _follow(self.momentum, self.encoder, 0.99)


class _Head(nn.Module):
    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last = nn.utils.parametrizations.weight_norm(
            nn.Linear(bottleneck, prototypes, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class DINO(nn.Module):
    def __init__(
        self, encoder: VisionTransformer, hidden: int, bottleneck: int, prototypes: int
    ) -> None:
        super().__init__()
        head = _Head(encoder.embed_dim, hidden, bottleneck, prototypes)
        self.student = nn.ModuleList([encoder, head])
        self.teacher = nn.ModuleList([copy.deepcopy(encoder), _Head(
            encoder.embed_dim, hidden, bottleneck, prototypes)])  # fmt: skip
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def _run(self, network: nn.ModuleList, views: list[Tensor]) -> Tensor:
        sizes = [view.shape[-1] for view in views]
        outputs, start = [], 0
        while start < len(views):
            end = start + sum(size == sizes[start] for size in sizes[start:])
            outputs.append(network[0](torch.cat(views[start:end])))
            start = end
        return network[1](torch.cat(outputs))

    def forward(self, views: list[Tensor], labels: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self._run(self.teacher, views[:2])
        student = (self._run(self.student, views) / 0.1).chunk(len(views))
        targets = F.softmax((teacher - self.centre) / 0.04, dim=-1).chunk(2)
        total, terms = torch.zeros((), device=teacher.device), 0
        for i, q in enumerate(targets):
            for j, output in enumerate(student):
                if i == j:
                    continue
                total = total + torch.sum(-q * F.log_softmax(output, dim=-1), dim=-1).mean()
                terms += 1
        self.centre = self.centre * 0.9 + teacher.mean(0, keepdim=True) * 0.1
        return total / terms

    def update(self) -> None:
        _follow(self.teacher, self.student, 0.996)


class Supervised(nn.Module):
    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, views: list[Tensor], labels: Tensor) -> Tensor:
        return F.cross_entropy(self.encoder(views[0]), labels, label_smoothing=0.1)

    def update(self) -> None:
        """Nothing follows an update."""


class _Blur:
    """Pillow's Gaussian blur of a random radius, with some probability."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(1).item() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(float(np.random.uniform(0.1, 2.0))))


class _Solarize:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if torch.rand(1).item() < self.p else image


def views_of(
    method: str, size: int, local: int, channels: int
) -> list[Callable[[Image.Image], Tensor]]:
    """The published transforms of one image, a callable a view."""
    bicubic = transforms.InterpolationMode.BICUBIC
    finish = [transforms.ToTensor(), transforms.Normalize([0.5] * channels, [0.5] * channels)]
    crop = transforms.RandomResizedCrop

    def colourful(scale: tuple[float, float], side: int, blur: float, solarize: float) -> Any:
        return transforms.Compose(
            [
                crop(side, scale=scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                _Blur(blur),
                _Solarize(solarize),
                *finish,
            ]
        )

    if method == "moco_v3":
        return [colourful((0.08, 1), size, 1.0, 0.0), colourful((0.08, 1), size, 0.1, 0.2)]
    if method == "dino":
        two = [colourful((0.4, 1), size, 1.0, 0.0), colourful((0.4, 1), size, 0.1, 0.2)]
        return two + [colourful((0.05, 0.4), local, 0.5, 0.0)] * 8
    simple = [crop(size, scale=(0.08, 1), interpolation=bicubic), transforms.RandomHorizontalFlip()]
    return [transforms.Compose([*simple, *finish])]


class Pictures(Dataset[tuple[list[Tensor], int]]):
    """Encoded or decoded images through Pillow and the transforms."""

    def __init__(
        self,
        images: list[bytes] | np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any],
        transforms: list[Callable[[Image.Image], Tensor]],
    ) -> None:
        self.images, self.labels, self.transforms = images, labels, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[list[Tensor], int]:
        stored = self.images[i]
        if isinstance(stored, bytes):
            image = Image.open(io.BytesIO(stored)).convert("RGB")
        else:
            image = Image.fromarray(
                stored.squeeze(0) if len(stored) == 1 else stored.transpose(1, 2, 0)
            )
        return [transform(image) for transform in self.transforms], int(self.labels[i])


class Loop:
    """A peer's loop: images/s of `steps` updates."""

    def __init__(
        self, network: nn.Module, data: Pictures, batch: int, workers: int, device: torch.device
    ) -> None:
        self.network = network.to(device).train()
        self.device = device
        self.amp = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(enabled=self.amp)
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
        self.loader = DataLoader(
            data, batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=self.amp
        )
        self.batches: Iterator[Any] = iter(())

    def start(self) -> None:
        """Start the workers, which go on preparing batches until `stop`."""
        self.batches = itertools.chain.from_iterable(itertools.repeat(self.loader))

    def stop(self) -> None:
        """End the workers, so that they take no time from anybody else."""
        self.batches = iter(())

    def step(self) -> None:
        views, labels = next(self.batches)
        views = [view.to(self.device, non_blocking=True) for view in views]
        labels = labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, enabled=self.amp):
            loss = self.network(views, labels)
        if not np.isfinite(loss.item()):
            raise RuntimeError("the peer's loss is not finite")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.network.update()
