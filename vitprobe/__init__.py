"""vitprobe: what did this Vision Transformer learn, and how does it differ from that one?

    import vitprobe as vp

    result = vp.compare([vp.load("mae.pth"), vp.load("deit.pth")], vp.images("photos/"))
    vp.report(result, "out/")

Names are loaded when first used, so importing vitprobe imports no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprobe import measures, plots
    from vitprobe.capture.api import Captured, capture, capturing
    from vitprobe.compare import compare
    from vitprobe.data.images import Images, images
    from vitprobe.errors import VitprobeError
    from vitprobe.evaluation.evaluate import evaluate
    from vitprobe.models import LoadReport, Model, load, wrap
    from vitprobe.probe import Probe, open_probe, probe
    from vitprobe.report import report
    from vitprobe.results import Comparison, open_result
    from vitprobe.scores import Scores, open_scores
    from vitprobe.training import pretrain

__version__ = "0.1.0"

_WHERE = {
    "Captured": "vitprobe.capture.api",
    "Comparison": "vitprobe.results",
    "Images": "vitprobe.data.images",
    "LoadReport": "vitprobe.models",
    "Model": "vitprobe.models",
    "Probe": "vitprobe.probe",
    "Scores": "vitprobe.scores",
    "VitprobeError": "vitprobe.errors",
    "capture": "vitprobe.capture.api",
    "capturing": "vitprobe.capture.api",
    "compare": "vitprobe.compare",
    "evaluate": "vitprobe.evaluation.evaluate",
    "images": "vitprobe.data.images",
    "load": "vitprobe.models",
    "open_probe": "vitprobe.probe",
    "open_result": "vitprobe.results",
    "open_scores": "vitprobe.scores",
    "pretrain": "vitprobe.training",
    "probe": "vitprobe.probe",
    "report": "vitprobe.report",
    "wrap": "vitprobe.models",
}
_MODULES = ("measures", "plots")

__all__ = [
    "Captured",
    "Comparison",
    "Images",
    "LoadReport",
    "Model",
    "Probe",
    "Scores",
    "VitprobeError",
    "capture",
    "capturing",
    "compare",
    "evaluate",
    "images",
    "load",
    "measures",
    "open_probe",
    "open_result",
    "open_scores",
    "plots",
    "pretrain",
    "probe",
    "report",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"vitprobe.{name}")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'vitprobe' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodules `capture`, `compare`, `probe` and `report` must not hide the
        # functions of that name.
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
