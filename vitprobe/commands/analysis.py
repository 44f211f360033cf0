"""Commands that look at models and compare them: inspect, compare, probe, report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from vitprobe.commands.arguments import check_images, check_output, named, spec_of
from vitprobe.commands.messages import LEADS, complain
from vitprobe.errors import DataError, ResultError, SourceError

if TYPE_CHECKING:
    from vitprobe.models.model import Subject
    from vitprobe.results import Comparison
    from vitprobe.scores import Scores
    from vitprobe.settings import Settings


@dataclass
class Inspect:
    """Show what would be loaded: dialect, every fact with its evidence, unmatched keys, layers,
    attention layers and what they have no number of, with the reason."""

    spec: tyro.conf.Positional[str]
    """Such as mae.pth,heads=12, a saved folder, timm:NAME, hf:FOLDER, torchvision:NAME, init:NAME,
    or a probe file."""

    def run(self) -> str:
        name, spec = named(self.spec)
        if spec_of(spec).kind == "probe":
            from vitprobe.probe import describe_probe, open_probe

            return describe_probe(open_probe(spec, name=name))

        from vitprobe.models import load
        from vitprobe.models.inspection import describe_text

        return describe_text(load(spec, name=name))


@dataclass(kw_only=True)
class _Gathering:
    """How models are run over images and what is kept of them."""

    layers: Literal["normed", "residual"] = "normed"
    """What a layer is: what each block's attention reads, or the residual stream."""
    tokens: Literal["patches", "cls", "mean", "all"] = "patches"
    """What of a layer is compared."""
    limit: int | None = None
    """Use the first so many images of the seeded permutation."""
    seed: int = 0
    """Of the permutation of images; 0 or more."""
    block: int = 128
    """Images over which similarity is computed before it is summed."""
    batch_size: int | None = None
    """Images in one forward pass; a block unless given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 turns TF32 and autocast off."""
    workers: int = 2
    """Threads that decode images ahead."""
    max_images: int = 256
    """Images of the measures that need all of theirs together (SVCCA, RSA, ...)."""

    @property
    def options(self) -> dict[str, Any]:
        """All but which images, as the public functions take them."""
        named = ("layers", "tokens", "block", "batch_size", "device", "precision", "workers")
        return {name: getattr(self, name) for name in (*named, "max_images")}


@dataclass(kw_only=True)
class Compare(_Gathering):
    """Compare models on the same images and write a report."""

    out: Path
    """Folder for report.html, figures, tables and results.nc."""
    specs: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=SPEC of each model, such as MAE=mae.pth,heads=12, DeiT=timm:deit_tiny_patch16_224, or a
    probe file, A=a.probe."""
    images: Path | None = None
    """Folder, zip, tar, tar shards ('val-{000..007}.tar') or .txt list of images; needed unless all
    models are probe files."""
    models: Path | None = None
    """TOML file with more models: one table a model, [NAME] with spec = "…" and options."""
    group: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=SPEC,SPEC,... of models that are seeds of one method; may be given again. Options follow
    their spec, as in MAE=a.pth,heads=12,b.pth,heads=12."""
    measures: tuple[str, ...] = ("cka", "attention_distance", "attention_entropy")
    """What to measure; all for everything there is."""
    estimator: Literal["unbiased", "biased"] = "unbiased"
    """Of HSIC in CKA."""
    random_reference: bool = False
    """Add to every trained model a twin of the same architecture with random weights."""
    probes: Path | None = None
    """Folder for the probe file of every model that is run, NAME.probe."""
    resume: bool = False
    """Take finished models from PROBES, and go on behind the last block that the others have."""
    scores: tuple[Path, ...] = ()
    """Folders of vitprobe evaluate with scores of these models, for the report."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also send figures and numbers by layer to these."""
    formats: tuple[Literal["pdf", "svg", "png"], ...] = ("pdf", "svg", "png")
    """Of the files of figures. Fewer take less time; SVG is always written, PNG for --log."""
    json: bool = False
    """Print a summary for scripts, as JSON, in place of the report's path."""
    dry_run: bool = False
    """Load models and list images, say what would be done, and stop."""
    force: bool = False
    """Replace an earlier report in OUT."""

    def run(self) -> str:
        specs = [named(spec) for spec in self.specs]
        entries: list[tuple[str | None, str, dict[str, Any]]] = [(n, s, {}) for n, s in specs]
        if self.models is not None:
            entries += _listed(self.models)
        groups: dict[str, list[str]] = {}
        for text in self.group:
            group, members = _grouped(text)
            if group in groups:
                raise SourceError(f"group '{group}' is given twice; list all its models in one")
            groups[group] = [f"{group} {i}" for i in range(1, len(members) + 1)]
            entries += [(n, s, {}) for n, s in zip(groups[group], members, strict=True)]
        if not entries:
            raise SourceError(
                "no models to compare; give NAME=SPEC of one or more, --group or --models"
            )
        if self.resume and self.probes is None:
            raise SourceError("--resume goes on with what is in --probes; give that folder")
        if self.json and self.dry_run:
            raise SourceError("--dry-run has no results for --json; give one of the two")
        if not self.dry_run:
            check_output(self.out, self.force)

        measures = [name for text in self.measures for name in text.split(",") if name]
        kinds = [spec_of(spec, **more).kind for _, spec, more in entries]
        if self.images is None and set(kinds) != {"probe"}:
            raise DataError("no images to compare models on; give --images")
        if self.images is not None:
            check_images(self.images)

        if self.log:
            from vitprobe.loggers import check_loggers

            check_loggers(self.log)

        from vitprobe.compare import checkpoints_of, compare, images_of
        from vitprobe.models import load
        from vitprobe.probe import open_probe
        from vitprobe.report import check_folder
        from vitprobe.settings import Settings

        scores = _joined(self.scores)
        options = {**self.options, "estimator": self.estimator}
        settings = Settings(measures, **options)
        if not self.dry_run:
            check_folder(self.out, force=self.force)
        models = [
            open_probe(spec, name=name) if kind == "probe" else load(spec, name=name, **more)
            for (name, spec, more), kind in zip(entries, kinds, strict=True)
        ]
        if len(scores):
            scores.matched(checkpoints_of(models, self.random_reference))
        seed = self.seed if self.images is not None else self.seed or None
        source = images_of(models, self.images, self.limit, seed)
        if self.dry_run:
            return _plan(models, len(source), settings, self.random_reference)
        with _resumable(self.probes):
            result = compare(
                models,
                source,
                measures,
                random_reference=self.random_reference,
                groups=groups,
                probes=self.probes,
                resume=self.resume,
                **options,
            )
        if not LEADS:
            return ""
        if len(scores):
            result = result.with_scores(scores)
        page = _reported(result, self.out, force=self.force, loggers=self.log, formats=self.formats)
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        return _as_json(result, page) if self.json else str(page)


@dataclass(kw_only=True)
class Probe(_Gathering):
    """Run one model over images and keep in a file what comparisons need of it."""

    spec: tyro.conf.Positional[str]
    """NAME=SPEC, such as MAE=mae.pth,heads=12 or DeiT=timm:deit_tiny_patch16_224."""
    images: Path
    """Folder, zip, tar, tar shards ('val-{000..007}.tar') or .txt list of images."""
    out: Path
    """File to write; its name ends in .probe."""
    measures: tuple[str, ...] = ("cka", "attention_distance", "attention_entropy")
    """What comparisons may ask for; all for everything there is."""
    resume: bool = False
    """Go on behind the last whole block of a run that was cut short."""
    force: bool = False
    """Replace OUT, or what a run that was cut short has left of it."""

    def run(self) -> str:
        name, spec = named(self.spec)
        spec_of(spec)
        check_images(self.images)

        from vitprobe.models import load
        from vitprobe.models.model import assumed_notes
        from vitprobe.probe import probe
        from vitprobe.probe_file import check_free

        check_free(self.out, resume=self.resume, force=self.force)
        model = load(spec, name=name)
        with _resumable(self.out):
            made = probe(
                model,
                self.images,
                self.out,
                [name for text in self.measures for name in text.split(",") if name],
                limit=self.limit,
                seed=self.seed,
                resume=self.resume,
                force=self.force,
                **self.options,
            )
        for note in assumed_notes(model):
            print(f"note: {note}", file=sys.stderr)
        return str(made)


@dataclass
class Report:
    """Write the report of a saved result again."""

    result: tyro.conf.Positional[Path]
    """results.nc of an earlier comparison."""
    out: Path
    """Folder for report.html, figures and tables."""
    scores: tuple[Path, ...] = ()
    """Folders of vitprobe evaluate with scores of the models, to be added to the result's."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also send figures and numbers by layer to these."""
    formats: tuple[Literal["pdf", "svg", "png"], ...] = ("pdf", "svg", "png")
    """Of the files of figures. Fewer take less time; SVG is always written, PNG for --log."""
    json: bool = False
    """Print a summary for scripts, as JSON, in place of the report's path."""
    force: bool = False
    """Replace an earlier report in OUT."""

    def run(self) -> str:
        if not self.result.is_file():
            raise ResultError(f"no result file '{self.result}'")
        check_output(self.out, self.force)

        from vitprobe.report import check_folder, report
        from vitprobe.results import open_result

        check_folder(self.out, force=self.force)
        result = open_result(self.result)
        if self.scores:
            result = result.with_scores(_joined(self.scores))
        page = report(result, self.out, force=self.force, loggers=self.log, formats=self.formats)
        return _as_json(result, page) if self.json else str(page)


@contextlib.contextmanager
def _resumable(kept: Path | None) -> Iterator[None]:
    """Tell who stops a run that its whole blocks are kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if kept is not None:
            complain(f"whole blocks of '{kept}' are kept; --resume goes on behind them")
        raise


def _grouped(text: str) -> tuple[str, list[str]]:
    """NAME=SPEC,SPEC,... as a name and specs; a part such as heads=12 is an option of the spec
    before it."""
    name, equals, listed = text.partition("=")
    if not equals or not name or not listed or re.search(r"[,:/\\]", name):
        raise SourceError(f"'{text}' is no NAME=SPEC,SPEC; write it as MAE=a.pth,b.pth")
    specs: list[str] = []
    for part in (part.strip() for part in listed.split(",")):
        is_option = re.match(r"[^/\\]*=", part) is not None
        if not part or (is_option and not specs):
            problem = f"'{part}' follows no spec" if part else "a spec between two commas is empty"
            raise SourceError(f"group '{name}': {problem}; write it as MAE=a.pth,heads=12,b.pth")
        if is_option:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return name, specs


def _listed(path: Path) -> list[tuple[str | None, str, dict[str, Any]]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read models from '{path}': {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"'{path}' is no TOML list of models: {error}") from error
    entries: list[tuple[str | None, str, dict[str, Any]]] = []
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(table.get("spec"), str):
            raise SourceError(
                f"model '{name}' in '{path}' has no spec; write [{name}] spec = \"…\""
            )
        options = {key: value for key, value in table.items() if key != "spec"}
        if "name" in options:
            raise SourceError(f"model '{name}' in '{path}' has a key name; its table is its name")
        entries.append((name, table["spec"], options))
    return entries


def _plan(models: Sequence[Subject], count: int, settings: Settings, random_reference: bool) -> str:
    from vitprobe.compare import subset_bytes

    twins = " and untrained twins" if random_reference else ""
    measures = (*settings.similarity, *settings.attention, *settings.layer_tokens)
    lines = [f"{count} images through {len(models)} models{twins} once; {', '.join(measures)}"]
    for model in models:
        size = "x".join(map(str, model.input_size))
        lines.append(
            f"{model.name}: {len(model.anatomy.blocks)} blocks, input {size}, {model.spec}"
        )
    if kept := subset_bytes(models, settings, count):
        kept *= 2 if random_reference else 1
        lines.append(
            f"features of {min(count, settings.max_images)} images kept for measures that need "
            f"them together: {kept / 1e9:.2g} GB of memory"
        )
    return "\n".join(lines)


def _reported(result: Comparison, out: Path, **options: Any) -> Path:
    """The report of a result, which is on disk before a figure is drawn: hours of work are not lost
    with a report that fails."""
    from vitprobe.report import report

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    name = f"{out.name}.{os.getpid()}.nc"
    try:
        kept = result.save(out.absolute().with_name(name))
    except ResultError as error:
        kept = result.save(Path(tempfile.gettempdir()) / name)
        raise ResultError(f"{error}; the result is in '{kept}', for vitprobe report") from error
    try:
        page = report(result, out, **options)
    except BaseException:
        complain(f"the report failed; the result is in '{kept}', for vitprobe report")
        raise
    kept.unlink()
    return page


def _as_json(result: Comparison, page: Path) -> str:
    """What `--json` prints: the summary of a result, and where its report and its file are."""
    places = {"page": str(page), "result": str(page.with_name("results.nc"))}
    return json.dumps({**places, **result.summary()}, indent=1, allow_nan=False)


def _joined(folders: Sequence[Path]) -> Scores:
    """The scores of several evaluations."""
    from vitprobe.scores import Scores, open_scores

    return sum((open_scores(folder) for folder in folders), Scores([]))
