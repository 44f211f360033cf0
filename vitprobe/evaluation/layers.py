"""The protocol `layers`: which pre-trained layers matter for fine-tuning.

Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023, section
4: keep the first blocks of a pre-trained model, draw the others anew, fine-tune, and see how the
accuracy depends on how many were kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from vitprobe import distributed, provenance
from vitprobe.data.parts import Labelled
from vitprobe.errors import RecipeError
from vitprobe.evaluation.finetune import Finetune
from vitprobe.models import Model
from vitprobe.scores import FILE, Score, Scores


@dataclass(frozen=True, kw_only=True)
class Layers(Finetune):
    """A fine-tuning for each number of pre-trained blocks that are kept.

    Each has a folder kept_03 (and so on) of its own, with its scores: what is done is not done
    again when the evaluation is resumed. Rows are those of `finetune`.

    keep: numbers of blocks; () for none, all, and the quarters between.
    """

    name: ClassVar[str] = "layers"
    keeps: ClassVar[tuple[str, ...]] = tuple(f"kept_{kept:02d}" for kept in range(200))

    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.keep,) if isinstance(self.keep, int) else tuple(self.keep)
        object.__setattr__(self, "keep", given)
        if self.kept is not None:
            raise RecipeError("The protocol layers takes keep, several numbers, and not kept.")
        if len(set(given)) < len(given) or min(given, default=0) < 0:
            listed = ", ".join(map(str, given))
            raise RecipeError(f"keep must be different numbers of blocks from 0, not {listed}.")

    def check(self, model: Model) -> None:
        """Raise SourceError or RecipeError where a model cannot be fine-tuned with all of them."""
        for one in self._each(model):
            Finetune.check(one, model)

    def tuned(self, model: Model, data: Labelled, folder: Path) -> Sequence[Score]:
        """The rows of every number of blocks, in its order."""
        rows: list[Score] = []
        # What was asked for before stays in the scores, if it was trained as this is.
        done = {
            int(path.parent.name.removeprefix("kept_")) for path in folder.glob(f"kept_*/{FILE}")
        }
        for one in self._each(model, sorted(distributed.gather_objects(done)[0])):
            own = folder / f"kept_{one.kept:02d}"
            if distributed.rank() == 0:
                own.mkdir(exist_ok=True)
            distributed.wait()
            found = one.tuned(model, data, own)
            if found:
                Scores(found, [provenance.collect()]).save(own / FILE)
            rows += found
        return rows

    def _each(self, model: Model, done: Sequence[int] = ()) -> list[Finetune]:
        depth = len(model.anatomy.blocks)
        keep = self.keep or tuple(dict.fromkeys(round(depth * part / 4) for part in range(5)))
        shared: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(Finetune)}
        each = dict.fromkeys((*keep, *done))
        return [Finetune(**{**shared, "kept": kept}) for kept in each]
