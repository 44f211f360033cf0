"""DINO: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.

Section 3.1 in order: the teacher sees two global views of an image, the student these and several
local ones; the student learns to predict, from every view, what the teacher says of another
(equation 3). The teacher is a slow average of the student. Its outputs are centred, so that no one
prototype wins everywhere, and sharpened, so that the prototypes do not all become alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe import distributed
from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, build_encoder, encode
from vitprobe.training.methods.base import Batch, Method, MethodConfig, Moment
from vitprobe.training.methods.momentum import follow, momentum_copy
from vitprobe.training.schedule import cosine


@dataclass(frozen=True)
class DINOConfig(MethodConfig):
    """prototypes: outputs of the head (K in the paper).

    hidden_width, bottleneck_width: of the head before the prototypes.
    norm_last_layer: keep the prototypes at length 1.
    freeze_last_layer_epochs: epochs at the start in which the prototypes do not move.
    student_temperature, teacher_temperature: what outputs are divided by before the softmax.
    first_teacher_temperature: the teacher's at the start; it rises linearly to teacher_temperature
        over warmup_teacher_epochs, which may be a fraction.
    momentum: of the teacher at the start; half a cosine over the run leads it to 1.
    centre_momentum: m in equation 4.
    """

    prototypes: int = 65536
    hidden_width: int = 2048
    bottleneck_width: int = 256
    norm_last_layer: bool = True
    freeze_last_layer_epochs: float = 1.0
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    first_teacher_temperature: float = 0.04
    warmup_teacher_epochs: float = 30.0
    momentum: float = 0.996
    centre_momentum: float = 0.9

    def __post_init__(self) -> None:
        for name, least in (("prototypes", 2), ("hidden_width", 1), ("bottleneck_width", 1)):
            if getattr(self, name) < least:
                raise RecipeError(
                    f"method.{name} must be at least {least}, not {getattr(self, name)}."
                )
        for name in ("freeze_last_layer_epochs", "warmup_teacher_epochs"):
            if getattr(self, name) < 0:
                raise RecipeError(f"method.{name} must be at least 0, not {getattr(self, name)}.")
        for name in ("student_temperature", "teacher_temperature", "first_teacher_temperature"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"method.{name} must be above 0, not {getattr(self, name)}.")
        for name in ("momentum", "centre_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"method.{name} must lie in [0, 1], not {getattr(self, name)}.")


class DINO(Method):
    """Student and teacher of the paper's figure 2 and algorithm 1."""

    Config = DINOConfig
    config: DINOConfig
    graph_obstacle = "DINO keeps its teacher's temperature and counts outputs in Python numbers"
    centre: Tensor
    _output_sum: Tensor

    def __init__(self, config: DINOConfig, encoder: EncoderConfig, classes: int) -> None:
        super().__init__(config, encoder, classes)
        self.image_size = encoder.image_size
        self.encoder = build_encoder(encoder)
        self.head = Head(encoder.width, config)
        self.teacher_encoder = momentum_copy(self.encoder)
        self.teacher_head = momentum_copy(self.head)
        self.teacher_temperature = config.first_teacher_temperature
        self.register_buffer("centre", torch.zeros(config.prototypes))
        # The teacher's outputs since the update began, from which the centre moves at its end.
        self.register_buffer("_output_sum", torch.zeros(config.prototypes), persistent=False)
        self._output_count = 0

    @property
    def final_encoder(self) -> VisionTransformer:
        """The teacher, which stays ahead of the student throughout (section 5.1 and figure 6)."""
        return self.teacher_encoder

    @classmethod
    def check_views(cls, sizes: Sequence[int], encoder: EncoderConfig) -> None:
        """Raise RecipeError unless two views have the encoder's size and all fit its patches."""
        if list(sizes[:2]) != [encoder.image_size] * 2:
            raise RecipeError(
                "DINO's teacher needs the first two views at encoder.image_size "
                f"{encoder.image_size}, not views of sizes {list(sizes)}; mend views."
            )
        for i, size in enumerate(sizes):
            if size % encoder.patch_size:
                raise RecipeError(
                    f"The size {size} of view {i} must be a multiple of encoder.patch_size "
                    f"{encoder.patch_size}; mend views."
                )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 3 in nats; logs the two parts of that cross-entropy, which show a collapse.

        teacher_entropy at the logarithm of the prototypes: all are alike. At 0: one wins always,
        if kl (of the student from the teacher) is 0 too.
        """
        with torch.no_grad():
            tokens = encode(self.teacher_encoder, torch.cat(batch.views[:2]))
            outputs = self.teacher_head(tokens[:, 0]).float()
            self._output_sum += outputs.sum(dim=0)
            self._output_count += len(outputs)
            log_p = F.log_softmax((outputs - self.centre) / self.teacher_temperature, dim=1)
            p = log_p.exp()
            entropy = -(p * log_p).sum(dim=1).mean()
        groups = groupby(batch.views, key=lambda view: view.shape[-1])
        tokens = torch.cat([self.encode(torch.cat(list(views)))[:, 0] for _, views in groups])
        outputs = self.head(tokens).float()
        log_q = F.log_softmax(outputs / self.config.student_temperature, dim=1)
        loss = cross_entropy(p.chunk(2), log_q.chunk(len(batch.views)))
        return loss, {"teacher_entropy": entropy, "kl": loss.detach() - entropy}

    def encode(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens after the final norm, of images of any size that is a multiple of the patch."""
        if images.shape[-1] == self.image_size:
            return super().encode(images, visible)
        return encode_resampled(self.encoder, images)

    def before_step(self, moment: Moment) -> None:
        """Set the teacher's temperature, and start to gather its outputs."""
        warmup = self.config.warmup_teacher_epochs
        first, last = self.config.first_teacher_temperature, self.config.teacher_temperature
        share = moment.epoch / warmup if moment.epoch < warmup else 1.0
        self.teacher_temperature = first + (last - first) * share
        self._output_sum.zero_()
        self._output_count = 0

    def after_gradient(self, moment: Moment) -> None:
        """Keep the prototypes as they are in the first epochs."""
        if moment.epoch < self.config.freeze_last_layer_epochs:
            # Without a gradient the optimiser skips them; a gradient of zeros would still let
            # weight decay and the moments of AdamW move them.
            for parameter in self.head.prototypes.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Move the teacher (section 3.1) and the centre (equation 4)."""
        momentum = cosine(moment.progress, self.config.momentum, 1.0)
        follow(self.teacher_encoder, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)
        average = distributed.mean(self._output_sum / self._output_count)
        self.centre.lerp_(average, 1 - self.config.centre_momentum)


class Head(nn.Module):
    """Similarity to each prototype (appendix C): (b, width) → (b, prototypes), cosines in [-1, 1].

    With `norm_last_layer` off each is multiplied by the learned length of its prototype.
    """

    def __init__(self, width: int, config: DINOConfig) -> None:
        super().__init__()
        hidden, bottleneck = config.hidden_width, config.bottleneck_width
        self.perceptron = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.perceptron:
            if isinstance(layer, nn.Linear):
                # 0.022 at the paper's hidden width, whose code has 0.02 everywhere. That would
                # leave the outputs of a narrow head so small that normalising them to length 1
                # multiplies the gradients by orders of magnitude.
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(bottleneck, config.prototypes, config.norm_last_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.prototypes(F.normalize(self.perceptron(tokens).float(), dim=1))


class Prototypes(nn.Module):
    """A linear layer, (b, width) → (b, count), with weight normalisation.

    Its weights are directions times lengths (Salimans & Kingma 2016), the lengths fixed at 1 or
    starting there.
    """

    def __init__(self, width: int, count: int, unit: bool) -> None:
        super().__init__()
        bound = width**-0.5  # of torch's linear layers
        self.direction = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.length = None if unit else nn.Parameter(torch.ones(count, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.direction, dim=1)
        return F.linear(x, weight if self.length is None else weight * self.length)


def cross_entropy(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean over the samples and the pairs of a teacher's and another view, in nats (equation 3).

    teacher: probabilities (b, k) of the first two views. student: log-probabilities (b, k) of all.
    """
    first, second = teacher
    targets = [second, first, *[first + second] * (len(student) - 2)]
    sums = [(p * log_q).sum(dim=1).mean() for p, log_q in zip(targets, student, strict=True)]
    return -torch.stack(sums).sum() / (2 * (len(student) - 1))


def encode_resampled(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens after the final norm, of images of another size than the encoder's.

    images: (b, c, h, w) normalised, sides multiples of the patch. The position embeddings are
    interpolated to their grid: bicubic without antialiasing, as in the paper's code.
    """
    patches = encoder.patch_embed.proj(images)
    positions = resample_abs_pos_embed(
        encoder.pos_embed,
        new_size=list(patches.shape[-2:]),
        old_size=list(encoder.patch_embed.grid_size),
        num_prefix_tokens=1,
        antialias=False,
    )
    class_token = encoder.get_parameter("cls_token").expand(len(images), -1, -1)
    tokens = torch.cat([class_token, patches.flatten(2).mT], dim=1)
    return encoder.norm(encoder.blocks(encoder.norm_pre(tokens + positions)))
