"""The one loop: every image through every model once, every measure on the way.

Layers are reduced to Gram matrices and per-image numbers as they arrive, attention to per-image
sums; nothing else is kept of an image, so memory does not grow with their number, but for a few
numbers an image, one vector an image and layer for RankMe, and the features of the first
`max_images` where a measure needs them together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Final

import xarray as xr
from tqdm.auto import tqdm

from vitprobe import provenance
from vitprobe.block_sources import Live, Read, Source, kept_blocks
from vitprobe.capture.features import Convention, convention_of, feature_layouts
from vitprobe.data.blocks import Block, View
from vitprobe.data.images import Images
from vitprobe.data.images import images as as_images
from vitprobe.devices import find_device
from vitprobe.distributed import Team, team
from vitprobe.errors import DataError, MeasureError, VitprobeError, suggest
from vitprobe.forward import Forward, running
from vitprobe.gather import Gathered, kept_numbers
from vitprobe.measures.cka import MINIMUM_IMAGES, Estimator
from vitprobe.measures.registry import SUBSET
from vitprobe.measures.tokens import TokenPolicy
from vitprobe.model_block import ModelBlock, Wanted
from vitprobe.models import Model
from vitprobe.models.anatomy import Layout
from vitprobe.models.model import Subject, assumed_notes
from vitprobe.models.sources import PROBE_SUFFIX
from vitprobe.models.untrained import is_untrained, same_architecture, untrained
from vitprobe.probe import Probe, ProbeWriter, check_finished, check_folder, open_probe
from vitprobe.probe_file import check_free
from vitprobe.results import Comparison
from vitprobe.settings import DEFAULT_MEASURES, Precision, Settings
from vitprobe.sites import described

LONGEST_NAME: Final = 100
UNTRAINED: Final = " (untrained)"
SHARED_TWIN: Final = "Untrained twin"


def compare(
    models: Sequence[Model | Probe],
    images: Any = None,
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    layers: Convention = "normed",
    tokens: TokenPolicy = "patches",
    estimator: Estimator = "unbiased",
    block: int = 128,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    limit: int | None = None,
    seed: int | None = None,
    workers: int = 2,
    progress: bool = True,
    max_images: int = 256,
    random_reference: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
    probes: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Comparison:
    """Compare models on the same images, in one pass.

    Under torchrun the processes share the images, block by block, and each returns the result of
    all, which is that of one process. Every one has to be given the same models and images.

    Models may differ in depth, width, patch, input size and normalisation. Similarity compares
    every layer of every model with every other; one model alone is compared with itself.

    Args:
        models: from `load`, `wrap` or `open_probe`, with different names. Probe files have to be of
            the same images, block, layers, tokens and precision.
        images: whatever `vitprobe.images` takes; may be left out where all models are probe files.
        measures: names from `vitprobe.measures.MEASURES`, or `["all"]`; attention measures bring
            sink mass with them, CKA the first-direction share. What a model cannot give is left out
            and noted with its reason, as all attention of a convolutional network is.
        layers: `normed` (what each block's attention reads, and the final norm) or `residual`.
        tokens: what of a layer is compared: `patches`, `cls`, `mean` or `all`. Linear CKA of `cls`
            and `mean` is exact over all images; any other belongs to the block size.
        estimator: of HSIC in CKA; summed over blocks, `biased` is exact only with one block.
        block: images over which similarity is computed before it is summed; recorded.
        batch_size: images in one forward pass, at most and by default a block.
        device: `auto` (CUDA or MPS where there is one), or a torch device.
        precision: `fp32` (TF32 and autocast off) or `bf16` autocast.
        limit: take the first so many images of the seeded permutation.
        seed: of the permutation, 0 unless given.
        workers: threads that decode images ahead.
        progress: show a progress bar on stderr where that is a terminal.
        max_images: on how many of the first images measures are computed that need all their
            images together; their features are kept in memory until the end.
        random_reference: add to every model that was trained a twin of the same architecture with
            random weights, "NAME (untrained)"; models that differ in weights alone share one,
            "Untrained twin".
        groups: names of models that are seeds of one method, by the method's name.
        probes: a folder that is given the probe file of every model that is run, NAME.probe.
        resume: take from that folder the probe files that are there already, and go on behind the
            last block that all models have that are not finished.

    Returns:
        The Comparison.

    Raises:
        VitprobeError: models that share a name, images too few or undecodable, an unknown measure,
            an attention measure asked for by name (and not by default or as "all") that no model
            can give, a layer that stays silent, features or attention that are not finite, a group
            of models that are not there, a probe file that was made otherwise or is damaged.
    """
    settings = Settings(
        measures if isinstance(measures, str) else tuple(measures),
        layers,
        tokens,
        estimator,
        block,
        batch_size,
        device,
        precision,
        workers,
        progress,
        max_images,
    )
    if isinstance(models, (Model, Probe)):
        raise VitprobeError(f"models are a list: give [model] to compare '{models.name}' alone")
    with team() as processes:
        run = _Run(
            list(models),
            images_of(models, images, limit, seed),
            settings,
            {name: list(members) for name, members in (groups or {}).items()},
            random_reference,
            processes,
            None if probes is None else Path(probes),
            resume,
        )
        return run.result()


def checkpoints_of(models: Sequence[Subject], random_reference: bool = False) -> dict[str, str]:
    """SHA-256 of the checkpoint of each model of a comparison, by name; "" where it has none."""
    twins = [f"{model.name}{UNTRAINED}" for model in models] + [SHARED_TWIN]
    known = {model.name: model.describe().get("sha256") or "" for model in models}
    return {**known, **(dict.fromkeys(twins, "") if random_reference else {})}


def images_of(
    models: Sequence[Model | Probe], images: Any, limit: int | None, seed: int | None
) -> Images:
    """The images of a comparison: those that are given, or else those of its probe files."""
    if images is not None:
        return as_images(images, limit=limit, seed=seed)
    alone = next((model for model in models if not isinstance(model, Probe)), None)
    if alone is not None or not models:
        raise DataError(
            "no images to compare models on: give some; only where all models are probe files can "
            "they be left out"
        )
    if limit is not None or seed is not None:
        raise DataError("probe files have their limit and seed already; give them with images only")
    return next(model for model in models if isinstance(model, Probe)).images


def subset_bytes(models: Sequence[Subject], settings: Settings, images: int) -> int:
    """Memory that the features of the subset measures will take, 0 where there are none."""
    if not any(name in SUBSET for name in settings.similarity):
        return 0
    numbers = (
        kept_numbers(layout, settings.tokens)
        for model in models
        for layout in feature_layouts(model, settings.layers)
    )
    return 4 * min(images, settings.max_images) * sum(numbers)


@dataclass
class _Run:
    models: list[Model | Probe]
    images: Images
    settings: Settings
    groups: dict[str, list[str]]
    random_reference: bool
    team: Team
    probes: Path | None = None
    resume: bool = False
    notes: list[str] = field(default_factory=list)
    references: dict[str, str] = field(default_factory=dict)
    bandwidth_is_shared: bool = False

    def __post_init__(self) -> None:
        for model in self.models:
            if not isinstance(model, (Model, Probe)):
                raise VitprobeError(
                    f"cannot compare {type(model).__name__}: make a model of it with load, wrap or "
                    "open_probe"
                )
        check_groups(self.groups, [model.name for model in self.models])
        self._check_seeds()
        if self.random_reference:
            self._add_references()
        self._check_names()
        settings = self.settings
        for model in self.models:
            if settings.features:
                self._note_layers(model)
            Wanted.of(model, settings)
            if isinstance(model, Probe):
                model.check(settings)
                model.images.check_same(model.path, self.images, self._where)
        self.device = find_device(settings.device)
        self.gathered = Gathered(self.models, settings, self.device)
        if not (settings.features or self.gathered.attention.measures):
            raise MeasureError(
                "no model here has attention, and nothing else was asked for; give other measures, "
                "such as cka"
            )

    @property
    def _where(self) -> str:
        """What the images are those of, as messages name it."""
        owner = next((m for m in self.models if getattr(m, "images", None) is self.images), None)
        return f"'{owner.path}'" if isinstance(owner, Probe) else f"'{self.images.source}'"

    def _check_seeds(self) -> None:
        by_name = {model.name: model for model in self.models}
        for group, members in self.groups.items():
            for a, b in combinations([by_name[name] for name in members], 2):
                if a.weights_sha256() == b.weights_sha256():
                    raise VitprobeError(
                        f"'{a.name}' and '{b.name}' of group '{group}' have the same weights: "
                        "give each seed once"
                    )

    def _check_names(self) -> None:
        names = [model.name for model in self.models]
        if not names:
            raise VitprobeError("no models to compare; give at least one")
        for name in names:
            if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
                raise VitprobeError(
                    f"a model cannot be named {name[:LONGEST_NAME]!r}: give a name of 1 to "
                    f"{LONGEST_NAME} printable characters"
                )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise VitprobeError(f"two models are named '{twice}'; give each its own name")

    def _add_references(self) -> None:
        """An untrained twin for every trained model, one for all that differ in weights alone."""
        alike: list[list[Model]] = []
        for model in self.models:
            if is_untrained(model):
                continue
            if isinstance(model, Probe):
                self.notes.append(
                    f"{model.name} has no untrained twin: a probe file holds no model to build "
                    "again; probe one with random weights (init:…) and compare with that."
                )
                continue
            part = next((part for part in alike if same_architecture(part[0], model)), None)
            if part is None:
                alike.append([model])
            else:
                part.append(model)
        shared = 0
        for part in alike:
            name = part[0].name[: LONGEST_NAME - len(UNTRAINED)] + UNTRAINED
            if len(part) > 1:
                shared += 1
                name = SHARED_TWIN if shared == 1 else f"{SHARED_TWIN} {shared}"
            try:
                twin = untrained(part[0], name)
            except VitprobeError as error:
                reason = str(error).rstrip(".")
                self.notes += [f"{m.name} has no untrained twin: {reason}." for m in part]
                continue
            self.models = [*self.models, twin]
            self.references |= {model.name: twin.name for model in part}

    def result(self) -> Comparison:
        """The comparison, after one pass over the images."""
        self._check_alike()
        total = len(self.images) if self.images.names is not None else self.images.limit
        bar = tqdm(
            total=total,
            unit=" images",
            desc="comparing",
            disable=None if self.settings.progress and self.team.leads else True,
        )
        with ExitStack() as stack:
            stack.enter_context(bar)
            sources = self._sources()
            live = [source for source in sources.values() if isinstance(source, Live)]
            models = [source.forward.model for source in live]
            stack.enter_context(running(models, self.settings, self.device))
            views = [View(*model.input_size) for model in models]
            known = kept_blocks(live)
            done = [pair for b in known for pair in zip(b.names, b.digests, strict=True)]
            blocks = self.images.blocks(
                views, self.settings.block, workers=self.settings.workers, done=done, team=self.team
            )
            for block in chain(known, blocks):
                self._check_block(block)
                parts = {name: source.part(block) for name, source in sources.items()}
                self._add(block.first, parts)
                # The others are at the blocks beside this one.
                bar.update(min(self.team.size * len(block.names), len(self.images.used) - bar.n))
            for source in sources.values():
                source.finish(self.images)
        self._share_bandwidth()
        self.team.to_leader(self.gathered, self.gathered.merge)
        return self.team.from_leader(self._assemble)

    def _add(self, first: int, parts: Mapping[str, ModelBlock]) -> None:
        if self.team.leads:
            self.gathered.add(first, parts)
        self._share_bandwidth()
        if not self.team.leads:
            self.gathered.add(first, parts)

    def _share_bandwidth(self) -> None:
        """Once: hand on the RBF bandwidth, which is that of the run's first block."""
        rbf = self.gathered.similarities.rbf
        if rbf is not None and not self.bandwidth_is_shared:
            rbf.variances = self.team.from_leader(lambda: rbf.variances)
        self.bandwidth_is_shared = True

    def _check_alike(self) -> None:
        """Raise VitprobeError where the processes that share this run were given different ones."""
        if self.team.size == 1:
            return
        settings = asdict(self.settings) | {"progress": None, "workers": None}
        given = {
            "models": [(model.name, model.weights_sha256()) for model in self.models],
            "probe files": [m.sha256 for m in self.models if isinstance(m, Probe)],
            "settings": settings | {"random_reference": self.random_reference},
            "groups": self.groups,
        }
        of_all = self.team.exchange(given)
        for process, other in enumerate(of_all):
            what = next((name for name in given if other[name] != of_all[0][name]), None)
            if what is not None:
                raise VitprobeError(
                    f"process {process} of this run is given other {what} than process 0; give all "
                    "of them the same (seed what is random before you make it)"
                )

    def _check_block(self, block: Block) -> None:
        needed = MINIMUM_IMAGES[self.settings.estimator]
        if self.gathered.similarities.streaming and len(block.names) < needed:
            raise DataError(
                f"'{self.images.source}' gives too few images that can be decoded, "
                f"{len(block.names)}: {self.settings.estimator} CKA needs at least {needed}"
            )

    def _sources(self) -> dict[str, Source]:
        """Where the blocks of each model come from."""
        if self.probes is not None:
            check_folder(self.probes, [m.name for m in self.models], self.team.size)
            # Before any is begun, so that none is left of a run that cannot be.
            for model in self.models:
                if isinstance(model, Model):
                    check_free(_file(self.probes, model), resume=self.resume, force=False)
        return {model.name: self._source(model) for model in self.models}

    def _source(self, model: Model | Probe) -> Source:
        if isinstance(model, Probe):
            return Read(model, self.settings, self._where)
        forward = Forward(model, self.settings, self.device)
        if self.probes is None:
            return Live(forward)
        path = _file(self.probes, model)
        if self.resume and path.exists():
            found = open_probe(path, name=model.name)
            check_finished(found, model, self.settings, self.images)
            return Read(found, self.settings, self._where)
        return Live(
            forward,
            ProbeWriter(
                path,
                model,
                self.settings,
                self.images,
                self.device,
                resume=self.resume,
                force=False,
            ),
        )

    def _assemble(self) -> Comparison:
        groups: dict[str, xr.Dataset] = {}
        names = self.images.used
        gathered = self.gathered
        if self.settings.similarity:
            groups["similarity"] = gathered.similarities.dataset(len(names), self.notes)
        first_direction = gathered.similarities.first_direction
        if self.settings.layer_tokens or first_direction is not None:
            groups["tokens"] = gathered.tokens.dataset(names, first_direction, self.notes)
        if gathered.attention.measures:
            groups["attention"] = gathered.attention.dataset(names, self.notes)
            groups |= gathered.samples.groups(names)
        gathered.attention.note(self.notes)
        gathered.note(self.notes)
        self._note_images()
        self._note_groups()
        for model in self.models:
            self.notes += assumed_notes(model)
        return Comparison.assemble(groups, self._provenance())

    def _note_groups(self) -> None:
        for name, members in self.groups.items():
            if len(members) == 1:
                self.notes.append(
                    f"Group {name} has one seed, so nothing is known of how its seeds differ: it "
                    "has no interval over seeds."
                )

    def _note_layers(self, model: Subject) -> None:
        anatomy = model.anatomy
        followed = convention_of(model, self.settings.layers)
        if followed != self.settings.layers:
            which = "its attention" if anatomy.sites else "its blocks"
            self.notes.append(
                f"{model.name}: no norm before {which}, so its layers are residual ones."
            )
        elif followed == "normed" and anatomy.final_norm is None:
            self.notes.append(
                f"{model.name}: no final norm, so its layer {len(anatomy.blocks)} is what the last "
                "block writes."
            )

    def _note_images(self) -> None:
        lost = self.images.undecodable
        if lost:
            named = ", ".join(lost[:5]) + (" …" if len(lost) > 5 else "")
            count = f"{len(lost)} image" + ("s" if len(lost) > 1 else "")
            place = (
                "" if self.images.limit is None else ", and the next of the order took its place"
            )
            self.notes.append(f"{count} could not be decoded{place}: {named}.")
        limit = self.images.limit
        if limit is not None and len(self.images.used) < limit:
            self.notes.append(
                f"{limit} images were asked for and {len(self.images.used)} could be had."
            )
        blocks = self.gathered.similarities.blocks
        exact = (
            self.gathered.similarities.cka_value == "exact"
            and "cka_rbf" not in self.settings.similarity
        )
        if self.settings.estimator == "biased" and blocks is not None and blocks > 1 and not exact:
            self.notes.append(
                f"Biased CKA was summed over {blocks} blocks and so depends on the block size; it "
                "is exact only with one block."
            )
        if self.images.seed is None:
            self.notes.append(
                "The images were taken in the order their source gives; CKA over blocks is biased "
                "where that order is by class."
            )
        for model in self.models:
            if model.dtype != "torch.float32":
                self.notes.append(
                    f"{model.name}: its weights are {model.dtype}, and so it was run."
                )
            height, width = model.input_size[1:]
            if height != width:
                self.notes.append(
                    f"{model.name}: its input is {height} x {width}, so the square images are "
                    "stretched."
                )

    def _provenance(self) -> dict[str, Any]:
        settings = self.settings
        return {
            **provenance.collect(),
            "models": [model.describe() | self._described(model) for model in self.models],
            "measures": [
                *settings.similarity,
                *self.gathered.attention.measures,
                *settings.layer_tokens,
            ],
            "groups": self.groups,
            "references": self.references,
            "layers": settings.layers,
            "tokens": settings.tokens,
            "estimator": settings.estimator,
            "cka_value": self.gathered.similarities.cka_value,
            "max_images": settings.max_images,
            "block": settings.block,
            "blocks": self.gathered.similarities.blocks,
            "batch_size": settings.batch_size,
            "processes": self.team.size,
            "device": self._devices(),
            "precision": settings.precision,
            "seed": self.images.seed,
            "preprocessing": "centre square; bicubic, antialiased; each model's own mean and std",
            "images": {
                "source": self.images.source,
                "count": len(self.images.used),
                "limit": self.images.limit,
                "order": "as given" if self.images.seed is None else "permuted by the seed",
                "sha256": self.images.sha256,
                "undecodable": list(self.images.undecodable),
            },
            "notes": self.notes,
        }

    def _devices(self) -> str:
        """On what the forward passes ran, those of probe files included."""
        found = [
            model.made["device"] if isinstance(model, Probe) else str(self.device)
            for model in self.models
        ]
        return ", ".join(dict.fromkeys(found))

    def _described(self, model: Subject) -> dict[str, Any]:
        """What this comparison took of a model, and what it could not."""
        return {
            "layers": convention_of(model, self.settings.layers),
            "layouts": [_layout(part) for part in feature_layouts(model, self.settings.layers)],
            "attention": described(model.anatomy),
            "no_attention": model.anatomy.no_attention,
            "refused": [asdict(part) for part in self.gathered.attention.refused[model.name]],
            "probe": _probed(model) if isinstance(model, Probe) else None,
        }


def _file(folder: Path, model: Model) -> Path:
    """Where the probe file of a model goes."""
    return folder / f"{model.name}{PROBE_SUFFIX}"


def _probed(probe: Probe) -> dict[str, Any]:
    """What a result records of a probe file."""
    return {"file": probe.path.name, "sha256": probe.sha256, **probe.made}


def _layout(layout: Layout) -> dict[str, Any]:
    """What of a layer's tokens a result records."""
    names = ("width", "prefix_tokens", "patches", "grid", "patch_size")
    return {name: getattr(layout, name) for name in names}


def check_groups(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    """Raise VitprobeError for a group without models, of unknown ones, or of one that is taken."""
    owner: dict[str, str] = {}
    for group, members in groups.items():
        if not members:
            raise VitprobeError(f"group '{group}' has no models; name those that are its seeds")
        if group in names:
            raise VitprobeError(f"a model and a group are both named '{group}'; rename one")
        for name in members:
            if name not in names:
                raise VitprobeError(
                    f"group '{group}' names '{name}', which is no model of this comparison."
                    f"{suggest(name, names)}"
                )
            if name in owner:
                raise VitprobeError(
                    f"model '{name}' is in group '{owner[name]}' already; a seed counts once"
                )
            owner[name] = group
