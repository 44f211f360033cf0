"""Distillation around any method: a frozen teacher sees what the student's encoder sees.

Attention maps: Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers",
ICML 2023, section 5 (D-MAE): the mean squared error between the scaled products QK^T of student
and teacher, before the softmax and with the row and column of the class token, through a 1x1
convolution from the student's heads to the teacher's. Under MAE the teacher is given the same
visible patches, and no decoder.

Hidden states: the mean squared error between the residual streams, through a linear adapter without
bias. The paper's ablation compares the inputs of the blocks after their norms, and where several
layers are distilled, attention or hidden, its code adds up what is averaged here.

Logits: hard, the cross-entropy with the class the teacher says (Touvron et al., "Training
data-efficient image transformers & distillation through attention", ICML 2021, equation 3), or soft
(Hinton, Vinyals & Dean 2015: KL divergence at a temperature, times its square).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.capture import Heard, listen
from vitprobe.data.blocks import LUMINANCE
from vitprobe.errors import CaptureError, RecipeError
from vitprobe.models import Model, load, wrap
from vitprobe.training.encoder import EncoderConfig, encode
from vitprobe.training.methods.base import Batch, Method, Moment


@dataclass(frozen=True)
class DistillConfig:
    """What is learned from which teacher; a recipe's table [distill].

    teacher: a spec that vitprobe.load takes, of a plain ViT on the student's grid of patches.
    attention, hidden: weights of the two losses on inner layers, 0 for none.
    logits: share of the teacher's word in the loss, the method's own keeps the rest; 0 for none.
    temperature: of the soft logits.
    student_layers: blocks, from 0, whose attention is distilled; none named means the last one.
    teacher_layers: the teacher's block for each; none named means those at the same relative depth.
    hidden_layers: of the student's residual stream, from 0 (what block 0 reads) to its depth (what
        the last block writes); none named means all. The teacher's are at the same relative depth.
    adapter: whether maps and states are compared through a learned adapter; without one the
        numbers of heads, and the widths, must be equal.
    """

    teacher: str
    attention: float = 0.0
    hidden: float = 0.0
    logits: float = 0.0
    logits_kind: Literal["hard", "soft"] = "hard"
    temperature: float = 1.0
    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()
    hidden_layers: tuple[int, ...] = ()
    adapter: bool = True

    def __post_init__(self) -> None:
        if not self.teacher:
            raise RecipeError("distill.teacher must name a model, such as a run:DIR or a file.")
        for name in ("attention", "hidden"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(
                    f"distill.{name} must be at least 0 and finite, not {getattr(self, name)}."
                )
        if not 0 <= self.logits <= 1:
            raise RecipeError(f"distill.logits must lie in [0, 1], not {self.logits}.")
        if not (self.attention or self.hidden or self.logits):
            raise RecipeError(
                "One of distill.attention, distill.hidden and distill.logits must be above 0."
            )
        if self.logits_kind not in ("hard", "soft"):
            raise RecipeError(
                f"distill.logits_kind must be 'hard' or 'soft', not {self.logits_kind!r}."
            )
        if not 0 < self.temperature < math.inf:
            raise RecipeError(
                f"distill.temperature must be above 0 and finite, not {self.temperature}."
            )
        for name in ("student_layers", "teacher_layers", "hidden_layers"):
            layers = getattr(self, name)
            if any(layer < 0 for layer in layers):
                raise RecipeError(
                    f"distill.{name} are counted from 0, not {min(layers)}; name none for the "
                    "default."
                )
        for name in ("student_layers", "hidden_layers"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise RecipeError(f"distill.{name} names a layer twice; each counts once.")
        expected = len(self.student_layers) or 1
        if self.teacher_layers and len(self.teacher_layers) != expected:
            raise RecipeError(
                f"distill.teacher_layers names {len(self.teacher_layers)} blocks for {expected} of "
                "distill.student_layers; name one for each."
            )

    def blocks(self, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
        """(student's block, teacher's block) pairs for models of these depths.

        At the same relative depth block i of L is matched with block round((i + 1) L' / L) - 1 of
        L'. Raises RecipeError for a block that a model does not have.
        """
        if not self.attention:
            return ()
        own = self.student_layers or (student - 1,)
        theirs = self.teacher_layers or tuple(
            max(1, round((layer + 1) * teacher / student)) - 1 for layer in own
        )
        _check_layers("student_layers", own, student - 1, "student")
        _check_layers("teacher_layers", theirs, teacher - 1, "teacher")
        return tuple(zip(own, theirs, strict=True))

    def states(self, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
        """(student's, teacher's) residual layers, for models of these depths.

        Layer i of 0 … L is matched with layer round(i L' / L) of 0 … L'. Raises RecipeError for a
        layer that the student does not have.
        """
        if not self.hidden:
            return ()
        own = self.hidden_layers or tuple(range(student + 1))
        _check_layers("hidden_layers", own, student, "student")
        return tuple((layer, round(layer * teacher / student)) for layer in own)


def _check_layers(name: str, layers: Iterable[int], last: int, whose: str) -> None:
    beyond = [layer for layer in layers if layer > last]
    if beyond:
        raise RecipeError(
            f"distill.{name} names {beyond[0]}, but the {whose}'s layers are 0 to {last}."
        )


def load_teacher(config: DistillConfig, encoder: EncoderConfig) -> Model:
    """The frozen teacher for students of this kind.

    Raises RecipeError, with the reason, for a model whose tokens are not the student's: anything
    but timm's plain Vision Transformer with a class token alone before the student's grid of
    patches; and whatever `load` raises.
    """
    teacher = load(config.teacher)
    reason = _unfit(teacher, encoder)
    if reason:
        raise RecipeError(f"distill.teacher '{config.teacher}' cannot teach: {reason}.")
    return teacher


def _unfit(teacher: Model, encoder: EncoderConfig) -> str:
    """Why a model cannot be the teacher, "" where it can."""
    module, anatomy = teacher.module, teacher.anatomy
    channels = {teacher.input_size[0], encoder.channels}
    if type(module) is not VisionTransformer:
        return f"it is a {type(module).__name__}, not timm's plain VisionTransformer"
    if type(module.patch_embed) is not PatchEmbed:
        return f"its patches pass through a {type(module.patch_embed).__name__} first"
    if module.pos_embed is None:
        return "it has no absolute position embedding"
    if anatomy.grid != (encoder.grid, encoder.grid):
        return (
            f"its grid is {anatomy.grid[0]}x{anatomy.grid[1]} patches, the student's "
            f"{encoder.grid}x{encoder.grid}"
        )
    if not module.has_class_token or anatomy.prefix_tokens != 1:
        return (
            f"it has {anatomy.prefix_tokens} tokens before the patches, the student a class token "
            "alone"
        )
    if damaged := teacher.nonfinite:
        return f"its weights '{damaged[0]}' are not all finite"
    if len(channels) > 1 and channels != {1, 3}:
        return (
            f"it wants images of {teacher.input_size[0]} channels, the student's have "
            f"{encoder.channels}"
        )
    return ""


class Distilled(Method):
    """A method whose encoder also learns from a teacher.

    The total is (1 - logits) x the method's own loss + logits x the logit loss + attention x the
    attention loss + hidden x the hidden-state loss; each is averaged over its layers and over the
    encoder's calls. Heard are the calls of `inner.encode` that the method's loss makes under
    gradients on images of the encoder's own size: DINO's small crops are not, as the teacher's
    grid has no place for them.

    An adapter between equal numbers starts as the identity, any other as an orthogonal matrix,
    which keeps the scale (Saxe et al. 2014); all of its weights are trained.

    The teacher is no part of the state or of the parameters: `distill.teacher` and
    `teacher_sha256` say which it is. It moves with the method between devices.

    config: the recipe's table. inner: the student's method, changed so that `encode` is heard.
    encoder: the student's. teacher: from `load_teacher`.

    Raises RecipeError for layers, heads, widths or classes that do not fit.
    """

    def __init__(
        self, config: DistillConfig, inner: Method, encoder: EncoderConfig, teacher: Model
    ) -> None:
        super().__init__(inner.config, encoder, classes=0)
        self.distill = config
        self.inner = inner
        self.teacher = teacher
        self._student = _described(inner.encoder, encoder)
        teacher.module.eval().requires_grad_(False)
        self._size = encoder.image_size
        self._view = _View(encoder, teacher)
        depths = len(self._student.anatomy.blocks), len(teacher.anatomy.blocks)
        self._blocks = config.blocks(*depths)
        self._states = config.states(*depths)
        widths = self._student.anatomy.width, teacher.anatomy.width
        self.attention_adapters = nn.ModuleList(
            _adapter(config, "heads", _heads(self._student, own), _heads(teacher, theirs))
            for own, theirs in self._blocks
        )
        self.hidden_adapters = nn.ModuleList(
            _adapter(config, "channels", *widths) for _ in self._states
        )
        if config.logits:
            _check_classes(self.encoder, self._teacher_module)
        self._losses: list[dict[str, Tensor]] | None = None
        inner.encode = self._listen  # type: ignore[method-assign]

    @property
    def encoder(self) -> VisionTransformer:  # type: ignore[override]
        """The student's."""
        return self.inner.encoder

    @property
    def final_encoder(self) -> VisionTransformer:
        """As the method's own."""
        return self.inner.final_encoder

    @property
    def teacher_sha256(self) -> str:
        """Of the teacher's checkpoint file, or of its weights where there was no file."""
        if self.teacher.sha256 is None:
            digest = hashlib.sha256()
            for tensor in self.teacher.module.state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
            self.teacher.sha256 = digest.hexdigest()
        return self.teacher.sha256

    @property
    def init_sha256(self) -> str | None:
        """As the method's own."""
        return self.inner.init_sha256

    def architecture(self, encoder: EncoderConfig) -> dict[str, Any]:
        """As the method's own."""
        return self.inner.architecture(encoder)

    def heard_modules(self) -> set[nn.Module]:
        """The distilled attention, and the blocks beside distilled states: compiled or run twice,
        they could not be heard."""
        anatomy = self._student.anatomy
        paths = [anatomy.attentions[own] for own, _ in self._blocks]
        paths += [anatomy.blocks[max(own - 1, 0)] for own, _ in self._states]
        return {self.encoder.get_submodule(path) for path in paths}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total above; logs the method's own terms and each "distill_" term, unweighted.

        Raises CaptureError where the method encoded nothing that could be heard.
        """
        self._losses = []
        try:
            own, terms = self.inner.loss(batch)
            calls = self._losses
        finally:
            self._losses = None
        if not calls:
            raise CaptureError(
                f"The method '{self.config.name}' encoded no image of {self._size} pixels under "
                "gradients, so there is nothing to distil."
            )
        total = (1 - self.distill.logits) * own
        terms = dict(terms)
        for name in calls[0]:
            term = torch.stack([call[name] for call in calls]).mean()
            total = total + getattr(self.distill, name) * term
            terms[f"distill_{name}"] = term.detach()
        return total, terms

    def encode(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """As the method's own."""
        return self.inner.encode(images, visible)

    def features(self, images: Tensor) -> Tensor:
        """As the method's own."""
        return self.inner.features(images)

    def before_step(self, moment: Moment) -> None:
        """As the method's own."""
        self.inner.before_step(moment)

    def after_gradient(self, moment: Moment) -> None:
        """As the method's own."""
        self.inner.after_gradient(moment)

    def after_step(self, moment: Moment) -> None:
        """As the method's own."""
        self.inner.after_step(moment)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """As the method's own."""
        return self.inner.evaluate(batches)

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """As the method's own."""
        return self.inner.pictures(images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Not registered, so that neither the state nor the optimiser finds it.
        self.teacher.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _listen(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """What `inner.encode` is replaced by: the same, and heard while a loss is taken."""

        def run() -> Tensor:
            return type(self.inner).encode(self.inner, images, visible)

        whole = images.shape[2:] == (self._size, self._size)
        if self._losses is None or not torch.is_grad_enabled() or not whole:
            return run()
        student = listen(
            self._student,
            run,
            attention=[own for own, _ in self._blocks],
            hidden=[own for own, _ in self._states],
        )
        with torch.no_grad():
            teacher = listen(
                self.teacher,
                lambda: encode(self._teacher_module, self._view(images), visible),
                attention=[theirs for _, theirs in self._blocks],
                hidden=[theirs for _, theirs in self._states],
            )
        self._losses.append(self._compare(student, teacher))
        return student.output

    @property
    def _teacher_module(self) -> VisionTransformer:
        module: Any = self.teacher.module
        return module

    def _compare(self, student: Heard, teacher: Heard) -> dict[str, Tensor]:
        """The losses of one call of the encoder, by the name of their weight."""
        losses = {}
        if self.distill.logits:
            own = self.encoder.forward_head(student.output).float()
            with torch.no_grad():
                theirs = self._teacher_module.forward_head(teacher.output).float()
            losses["logits"] = self._logit_loss(own, theirs)
        # Layers are compared in single precision, whatever precision they are computed in.
        with torch.autocast(student.output.device.type, enabled=False):
            if self._blocks:
                losses["attention"] = _mean_error(
                    self.attention_adapters, student.attention, teacher.attention
                )
            if self._states:
                losses["hidden"] = _mean_error(self.hidden_adapters, student.hidden, teacher.hidden)
        return losses

    def _logit_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distill.logits_kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        heat = self.distill.temperature
        divergence = F.kl_div(
            F.log_softmax(student / heat, dim=1),
            F.log_softmax(teacher / heat, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return heat**2 * divergence


class _View(nn.Module):
    """The student's normalised images (b, c, h, w) as the teacher was trained to see them.

    Resized with bicubic antialiasing; grey is repeated, and colour becomes ITU-R BT.601 luminance.
    """

    mean: Tensor
    std: Tensor
    own_mean: Tensor
    own_std: Tensor
    luminance: Tensor

    def __init__(self, encoder: EncoderConfig, teacher: Model) -> None:
        super().__init__()
        self.channels, *self.size = teacher.input_size
        self.same = (encoder.channels, encoder.mean, encoder.std) == (
            self.channels,
            tuple(teacher.mean),
            tuple(teacher.std),
        )
        for name, values in (
            ("mean", teacher.mean),
            ("std", teacher.std),
            ("own_mean", encoder.mean),
            ("own_std", encoder.std),
            ("luminance", LUMINANCE),
        ):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(b, channels, height, width) of the teacher; what needs no change is not touched."""
        if self.same and list(images.shape[2:]) == self.size:
            return images
        images = images * self.own_std + self.own_mean
        if self.channels < images.shape[1]:
            images = (images * self.luminance).sum(dim=1, keepdim=True)
        if list(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        # One grey channel broadcasts to the teacher's three here.
        return (images - self.mean) / self.std


def _described(encoder: VisionTransformer, config: EncoderConfig) -> Model:
    """The student as capture wants it; describing it puts it in eval mode for a moment."""
    training = encoder.training
    size = (config.channels, config.image_size, config.image_size)
    described = wrap(encoder, name="student", input_size=size, mean=config.mean, std=config.std)
    encoder.train(training)
    return described


def _heads(model: Model, block: int) -> int:
    attention: Any = model.module.get_submodule(model.anatomy.attentions[block])
    heads: int = attention.num_heads
    return heads


def _adapter(config: DistillConfig, what: str, own: int, theirs: int) -> nn.Module:
    """From maps of `own` heads, or states of `own` channels, to the teacher's number of them."""
    if not config.adapter:
        if own == theirs:
            return nn.Identity()
        raise RecipeError(
            f"distill.adapter is false, but the student has {own} {what} and the teacher {theirs}; "
            "set it to true."
        )
    adapter: nn.Conv2d | nn.Linear
    if what == "heads":
        adapter = nn.Conv2d(own, theirs, kernel_size=1, bias=False)
    else:
        adapter = nn.Linear(own, theirs, bias=False)
    weight = adapter.weight.detach().view(theirs, own)
    if own == theirs:
        nn.init.eye_(weight)
    else:
        nn.init.orthogonal_(weight)
    return adapter


def _check_classes(student: VisionTransformer, teacher: VisionTransformer) -> None:
    own, theirs = student.num_classes, teacher.num_classes
    if own == 0:
        raise RecipeError("distill.logits needs a method that classifies, such as supervised.")
    if own != theirs:
        raise RecipeError(
            f"distill.logits needs a teacher of the student's {own} classes, not of {theirs}."
        )


def _mean_error(
    adapters: Iterable[nn.Module], student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> Tensor:
    """Mean over layers of the mean squared error, the student's through its adapters."""
    errors = [
        F.mse_loss(adapter(own.float()), theirs.float())
        for adapter, own, theirs in zip(adapters, student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()
