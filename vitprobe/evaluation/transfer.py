"""The protocol `transfer`: fine-tuning on another data set than the one of pre-training.

Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023, transfer
to CIFAR-10, CIFAR-100, Flowers, Pets, Aircraft, Cars and iNaturalist 2018 with SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vitprobe.data.published import download
from vitprobe.errors import DataError
from vitprobe.evaluation.finetune import Finetune
from vitprobe.evaluation.intervals import Interval, class_mean_interval


@dataclass(frozen=True, kw_only=True)
class Transfer(Finetune):
    """As `Finetune`; and the mean over classes of their accuracies where classes have different
    numbers of test images, as is usual for Flowers, Pets and Aircraft.

    download: have torchvision download a published set first, where it is not there yet.
    """

    name: ClassVar[str] = "transfer"

    recipe: str = "transfer"
    download: bool = False

    def read(self, data: Any) -> Any:
        """The labelled images, downloaded if that was asked for."""
        if self.download:
            if not isinstance(data, str):
                raise DataError("only published sets can be downloaded, such as 'cifar10:PATH'")
            download(data)
        return super().read(data)

    def values(
        self, ranks: NDArray[np.int64], labels: NDArray[np.int64], classes: int
    ) -> dict[str, Interval]:
        """As of fine-tuning, and the mean over classes."""
        values = super().values(ranks, labels, classes)
        sizes = np.bincount(labels)
        if len(set(sizes[sizes > 0].tolist())) > 1:
            values["mean_per_class"] = class_mean_interval(ranks == 0, labels)
        return values
