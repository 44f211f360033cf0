"""What the loop asks of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, StochasticDepth, encode
from vitprobe.training.randomness import Draws


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step: its share of the global batch.

    views: each (b, channels, size, size) float32, augmented and normalised, in the recipe's order.
    labels: (b,) int64; all 0 where the data have none.
    draws: the random numbers of these samples in this epoch.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    draws: Draws


@dataclass(frozen=True)
class Moment:
    """Where in a run an update stands: 0-based `step` of `steps`, `per_epoch` updates an epoch."""

    step: int
    steps: int
    per_epoch: int

    @property
    def epoch(self) -> float:
        """Epochs gone by, a fraction within one."""
        return self.step / self.per_epoch

    @property
    def progress(self) -> float:
        """Share of the run gone by, in [0, 1)."""
        return self.step / self.steps


@dataclass(frozen=True)
class MethodConfig:
    """A method's own part of a recipe; `name` says which method."""

    name: str


class Method(nn.Module, ABC):
    """An encoder together with what trains it.

    Building one draws its weights from torch's global generator; after that all randomness comes
    from `Batch.draws`. Its parameters and buffers are the whole of its state: they, the optimiser
    and the step are all that a run saves. Parameters that are not trained by gradient (a momentum
    encoder's) do not require one.

    Under several processes each sees its share of the batch; a loss is the mean over that share,
    and what looks across samples goes through `vitprobe.distributed`.
    """

    Config: ClassVar[type[MethodConfig]]
    accumulation_changes: ClassVar[str] = ""
    """Why gradients summed over parts of a batch are not those of the whole; "" where they are."""
    graph_obstacle: ClassVar[str] = ""
    """Why a CUDA graph cannot replay the loss, "" where it can: whatever changes between updates is
    in tensors that stay in place, or is the number of the epoch."""
    needs_labels: ClassVar[bool] = False
    least_batch: ClassVar[int] = 1
    """Fewest images, over all processes, that a loss can be taken of."""

    encoder: VisionTransformer

    def __init__(self, config: MethodConfig, encoder: EncoderConfig, classes: int) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check_views(cls, sizes: Sequence[int], encoder: EncoderConfig) -> None:
        """Raise RecipeError where the method cannot use views of these sizes.

        By default it uses one, of the encoder's own size.
        """
        if list(sizes) != [encoder.image_size]:
            raise RecipeError(
                f"The method trains on one view of each image at encoder.image_size "
                f"{encoder.image_size}, not on views of sizes {list(sizes)}; leave out views."
            )

    @classmethod
    def complete(cls, method: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's table [encoder], with what the method knows of its own: nothing, unless it
        starts from a checkpoint.

        method, encoder: the two tables as the recipe has them.
        """
        return dict(encoder)

    def architecture(self, encoder: EncoderConfig) -> dict[str, Any]:
        """Of the encoder that is left behind, as its checkpoint states it."""
        return encoder.architecture(self.encoder.num_classes)

    @property
    def init_sha256(self) -> str | None:
        """Of the checkpoint file that training starts from; None where there is none."""
        return None

    @property
    def teacher_sha256(self) -> str | None:
        """Of the weights of a teacher; None without one."""
        return None

    @property
    def final_encoder(self) -> VisionTransformer:
        """The encoder that a run leaves behind: the one that is trained, unless a method says."""
        return self.encoder

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and further scalars worth logging, by name."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss`, with the batch's stochastic depth, as torch's wrappers of modules call it."""
        for module in self.modules():
            if isinstance(module, StochasticDepth):
                module.draws = batch.draws
        return self.loss(batch)

    def encode(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens after the final norm: (b, prefix + patches or visible, width).

        Every method runs the encoder it trains through here, which is where distillation listens.
        images: (b, c, h, w) normalised; visible: (b, v) indices of the patches that are seen.
        """
        return encode(self.encoder, images, visible)

    def features(self, images: Tensor) -> Tensor:
        """(b, width): what the online k-NN compares, the class token after the final norm."""
        return encode(self.final_encoder, images)[:, 0]

    def heard_modules(self) -> set[nn.Module]:
        """Modules that something listens to while the loss is taken; none by default."""
        return set()

    def before_step(self, moment: Moment) -> None:
        """Set what follows a schedule, before the loss of an update is taken."""

    def after_gradient(self, moment: Moment) -> None:
        """Change gradients (cancel some) before the optimiser uses them."""

    def after_step(self, moment: Moment) -> None:
        """Follow the weights that the optimiser has just changed."""

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Scores on held-out (images, labels), whole and normalised, without gradients.

        Called in eval mode; none by default.
        """
        return {}

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """What the method makes of a few normalised images (n, c, h, w), to look at: by title, in
        the same shape and units; none by default.
        """
        return {}
