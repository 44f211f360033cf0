"""Compare checkpoints of your own on your own photographs, step by step.

    python -m analyses.own_checkpoints.compare --out runs/own \\
        --images photos/ --models "MAE=mae.pth,heads=12" "DeiT=deit.pth"

Without arguments it runs on what every installation has: two photographs that come with
scikit-learn, cut into overlapping squares, and two architectures with random weights. That says
nothing about anything, but every step is the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tyro
from sklearn.datasets import load_sample_images

import vitprobe as vp
from vitprobe.errors import VitprobeError

MODELS = ("ViT-Tiny=init:vit_tiny_patch16_224", "ViT-Small=init:vit_small_patch32_224")
MEASURES = ["cka", "attention_distance", "attention_entropy", "token_cosine"]


def main(
    out: Path,
    images: Path | None = None,
    models: tuple[str, ...] = MODELS,
    limit: int = 96,
    force: bool = False,
) -> None:
    """out: folder of the report. images: a folder, zip or tar of photographs. models: NAME=SPEC,
    where SPEC is a checkpoint file or timm:, hf:, torchvision:, init:NAME, with its options. limit:
    how many images, drawn with seed 0. force: replace an earlier report."""
    # 1. Load. Names are what figures say, so they should say what a checkpoint is and not where it
    # lies. Anything that a file does not tell is an assumption; the number of heads is the one that
    # does harm, for a wrong one loads without any error. `heads=12` behind the path sets it.
    loaded = [load(text) for text in models]
    for model in loaded:
        print(f"{model.name}: {described(model)}")

    # 2. Images. A thousand give narrow intervals; a hundred show what there is to see. All models
    # see the same centre square of each, resized and normalised as each wants it.
    pictures = vp.images(squares(limit) if images is None else images, limit=limit)

    # 3. Compare. An untrained twin of each model is the floor: a similarity that random weights
    # reach too says nothing of what was learned. One pass over the images does it all.
    result = vp.compare(loaded, pictures, MEASURES, random_reference=True)
    for note in result.notes:
        print(f"note: {note}")

    # 4. Read. CKA comes with an interval over images. Other measures are compared in pairs on the
    # same images, and the verdicts are corrected for how many differences are looked at.
    trained = [model.name for model in loaded]
    for i, a in enumerate(trained):
        for b in trained[i + 1 :]:
            print(alike(result, a, b))
    for row in result.differences().itertuples():
        print(
            f"{row.measure}, {row.model_a} minus {row.model_b}: {row.difference:+.3f} "
            f"[{row.low:+.3f}, {row.high:+.3f}] {row.units}, {row.verdict}"
        )

    # 5. Keep. The report is one page that opens offline; results.nc beside it opens again with
    # vp.open_result, for figures of one's own with vp.plots.
    print(vp.report(result, out, force=force))


def load(text: str) -> vp.Model:
    """A model from NAME=SPEC."""
    name, found, spec = text.partition("=")
    if not found:
        raise VitprobeError(f"'{text}' has no name; give NAME=SPEC")
    return vp.load(spec, name=name)


def described(model: vp.Model) -> str:
    """What was loaded, how much of it came from the file, and what is assumed."""
    facts = model.facts
    text = ", ".join(f"{key} {facts[key].value}" for key in ("width", "depth", "heads"))
    if model.report is not None:
        text += f"; {model.report.dialect}, {model.report.loaded_fraction:.0%} loaded"
    assumed = [key for key, fact in facts.items() if fact.evidence == "assumed"]
    return text + (f"; assumed: {', '.join(assumed)}" if assumed else "")


def squares(count: int) -> np.ndarray:
    """Overlapping squares of scikit-learn's two photographs: (count, 3, 224, 224) in [0, 1].

    They look alike, so that intervals over them are narrower than over as many photographs.
    """
    rng = np.random.default_rng(0)
    photos = [photo.astype(np.float32) / 255 for photo in load_sample_images().images]
    cut = []
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = (rng.integers(0, side - 224) for side in photo.shape[:2])
        cut.append(photo[top : top + 224, left : left + 224].transpose(2, 0, 1))
    return np.stack(cut)


def alike(result: vp.Comparison, a: str, b: str) -> str:
    """The most similar layer of b for the first, middle and last layer of a."""
    cka = result.cka(a, b)
    low, high = result.interval("cka", a, b)
    parts = []
    for row in (1, cka.sizes["layer_a"] // 2, cka.sizes["layer_a"] - 1):
        column = int(cka[row].values.argmax())
        parts.append(
            f"{int(cka['layer_a'][row])} ~ {int(cka['layer_b'][column])} "
            f"({float(cka[row, column]):.2f} [{float(low[row, column]):.2f}, "
            f"{float(high[row, column]):.2f}])"
        )
    return f"layers of {a} and the most similar ones of {b} (CKA): {', '.join(parts)}"


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except VitprobeError as error:
        print(f"own_checkpoints: {error}", file=sys.stderr)
        sys.exit(2)
