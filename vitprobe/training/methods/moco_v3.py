"""MoCo v3: Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers",
ICCV 2021.

Section 3 in order: two views of each image; queries come from the encoder, a projector and a
predictor, keys from a momentum copy of the encoder and the projector; each query must pick out the
key of its own image's other view among the keys of the whole batch. Section 4.3: the patch
projection stays as it was drawn, which keeps the training stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprobe.distributed import GlobalBatchNorm, gather, rank, world_size
from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, build_encoder, encode
from vitprobe.training.methods.base import Batch, Method, MethodConfig, Moment
from vitprobe.training.methods.momentum import follow, momentum_copy
from vitprobe.training.schedule import cosine


@dataclass(frozen=True)
class MoCoV3Config(MethodConfig):
    """temperature: what similarities are divided by (tau in equation 1).

    momentum: of the momentum encoder at the start; half a cosine over the run leads it to 1.
    projection_width, hidden_width: of the projector and the predictor.
    freeze_patch: leave the patch projection at its random initialisation (section 4.3).
    """

    temperature: float = 0.2
    momentum: float = 0.99
    projection_width: int = 256
    hidden_width: int = 4096
    freeze_patch: bool = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(f"method.temperature must be above 0, not {self.temperature}.")
        if not 0 <= self.momentum <= 1:
            raise RecipeError(f"method.momentum must lie in [0, 1], not {self.momentum}.")
        for name in ("projection_width", "hidden_width"):
            if getattr(self, name) < 1:
                raise RecipeError(f"method.{name} must be at least 1, not {getattr(self, name)}.")


class MoCoV3(Method):
    """The networks f_q and f_k of the paper's algorithm 1."""

    Config = MoCoV3Config
    config: MoCoV3Config
    least_batch = 2
    accumulation_changes = "its negatives and its batch norm look across the whole batch"

    def __init__(self, config: MoCoV3Config, encoder: EncoderConfig, classes: int) -> None:
        super().__init__(config, encoder, classes)
        hidden, out = config.hidden_width, config.projection_width
        self.encoder = build_encoder(encoder)
        # The patch projection is a linear layer on the flattened patch.
        patch = cast(nn.Conv2d, self.encoder.patch_embed.proj)
        nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1))
        nn.init.zeros_(cast(nn.Parameter, patch.bias))
        patch.requires_grad_(not config.freeze_patch)
        self.projector = perceptron(encoder.width, hidden, hidden, out)
        self.predictor = perceptron(out, hidden, out)
        self.momentum_encoder = momentum_copy(self.encoder)
        self.momentum_projector = momentum_copy(self.projector)

    @classmethod
    def check_views(cls, sizes: Sequence[int], encoder: EncoderConfig) -> None:
        """Raise RecipeError unless there are two views of the encoder's size."""
        if list(sizes) != [encoder.image_size] * 2:
            raise RecipeError(
                "MoCo v3 compares two views of each image at encoder.image_size "
                f"{encoder.image_size}, not views of sizes {list(sizes)}; mend views."
            )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 1 both ways round; logs the share of queries whose nearest key is their own.

        Raises RecipeError for a batch of a single image.
        """
        count = len(batch.labels) * world_size()
        if count < 2:
            raise RecipeError(
                "MoCo v3 tells the images of a batch apart and normalises over them, so a batch "
                f"needs at least 2, not {count}; raise batch_size."
            )
        # One view at a time, of which the batch norms of the heads take the statistics.
        q1, q2 = (self.predictor(self.projector(self.encode(x)[:, 0])) for x in batch.views)
        with torch.no_grad():
            k1, k2 = (
                self.momentum_projector(encode(self.momentum_encoder, x)[:, 0]) for x in batch.views
            )
        temperature = self.config.temperature
        loss_1, hits_1 = contrast(q1, k2, temperature)
        loss_2, hits_2 = contrast(q2, k1, temperature)
        return loss_1 + loss_2, {"accuracy": (hits_1 + hits_2) / 2}

    def after_step(self, moment: Moment) -> None:
        """Move the momentum encoder and projector."""
        momentum = cosine(moment.progress, self.config.momentum, 1.0)
        follow(self.momentum_encoder, self.encoder, momentum)
        follow(self.momentum_projector, self.projector, momentum)


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next: (b, widths[0]) → (b, widths[-1]).

    Each is followed by batch norm and ReLU, the last by batch norm without scale and shift.
    """
    layers: list[nn.Module] = []
    for i in range(1, len(widths)):
        # A bias would be taken away again with the mean.
        layers.append(nn.Linear(widths[i - 1], widths[i], bias=False))
        hidden = i + 1 < len(widths)
        layers.append(GlobalBatchNorm(widths[i], affine=hidden))
        if hidden:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE in nats times 2 x temperature (algorithm 1), and the share of queries that succeed.

    queries, keys: (b, width) of this process, row i of both from the same image. The keys of all
    processes are candidates, and get no gradient.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=1)
        keys = gather(F.normalize(keys.float(), dim=1))
        own = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
        logits = queries @ keys.T / temperature
        # The gradient of InfoNCE is of the order of 1 / temperature, which this factor undoes.
        loss = 2 * temperature * F.cross_entropy(logits, own)
    hits = (logits.detach().argmax(dim=1) == own).float().mean()
    return loss, hits
