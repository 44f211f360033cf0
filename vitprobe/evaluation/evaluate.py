"""`vp.evaluate`: one model, one protocol, one folder with its scores."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vitprobe import distributed, provenance
from vitprobe.errors import ResultError, VitprobeError, suggest
from vitprobe.models import Model, load
from vitprobe.scores import FILE, Scores, open_scores
from vitprobe.training.loop import STATE
from vitprobe.training.state import previous

if TYPE_CHECKING:
    from vitprobe.evaluation.base import Protocol

PROTOCOLS: Final = {
    "head": "vitprobe.evaluation.head.Head",
    "knn": "vitprobe.evaluation.nearest.Knn",
    "linear": "vitprobe.evaluation.linear.Linear",
    "frozen": "vitprobe.evaluation.frozen.Frozen",
    "finetune": "vitprobe.evaluation.finetune.Finetune",
    "transfer": "vitprobe.evaluation.transfer.Transfer",
    "layers": "vitprobe.evaluation.layers.Layers",
    "detection": "vitprobe.evaluation.dense.protocols.Detection",
    "segmentation": "vitprobe.evaluation.dense.protocols.Segmentation",
}
"""Where each is; loaded when it is asked for."""
_TO_GO_ON_WITH: Final = (STATE, previous(Path(STATE)).name, FILE)


def evaluate(
    protocol: str,
    model: Model | str | os.PathLike[str],
    data: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    resume: bool = False,
    **options: Any,
) -> Scores:
    """Measure what a model is worth for a task.

    Args:
        protocol: `head` (the model's own classification head), `knn`, `linear`, `frozen` (these two
            from one forward pass), `finetune`, `transfer`, `layers`; see `PROTOCOLS`.
        model: from `load` or `wrap`, or a spec for `load`.
        data: labelled images, whatever `vitprobe.data.labelled.load_labelled` takes.
        out: folder to make, with scores.json; None to keep nothing on disk.
        name: of a model that is given as a spec.
        force: replace an earlier evaluation in `out`. Other files there are left alone; a folder
            with files but no evaluation is refused all the same.
        resume: go on with an evaluation that was cut short, where the protocol can.
        options: fields of the protocol's class, such as `k=20` of `knn`; `batch_size`, `device`,
            `precision`, `workers` and `progress` are of all.

    Returns:
        A row for each number, see `Scores`.

    Raises:
        VitprobeError: no such protocol or option, or one that cannot be followed.
        ResultError: `out` exists (without `force`), is something else, or cannot be written.
        DataError, SourceError, CheckpointError, CaptureError, MeasureError: of the data, of the
            model, or of what it gives.
    """
    chosen = find_protocol(protocol)(**_checked(protocol, options))
    if resume and not chosen.keeps:
        raise VitprobeError(f"{protocol} keeps nothing to go on with; run it again with force")
    # Of the processes that torchrun started, which train together, one keeps what is found.
    folder, leads = None if out is None else Path(out), distributed.leads()
    if folder is not None and leads:
        check_folder(folder, chosen.keeps, force=force, resume=resume)
        if resume:
            _check_protocol(folder, protocol)
    subject = model if isinstance(model, Model) else load(model, name=name)
    found = chosen.read(data)
    writes = folder is not None and chosen.keeps and leads and not resume
    with _cleared(folder, chosen.keeps) if writes and folder else nullcontext():
        rows = chosen.run(subject, found, folder if chosen.keeps else None)
    about = {
        **provenance.collect(),
        "model": subject.describe(),
        "protocol": protocol,
        "options": asdict(chosen),
    }
    scores = Scores(rows, [about])
    if folder is not None and leads:
        _make(folder)
        scores.save(folder / FILE)
    return scores


def find_protocol(name: str) -> type[Protocol]:
    """The class of a protocol.

    Raises:
        VitprobeError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise VitprobeError(
            f"no protocol '{name}'; there are {', '.join(PROTOCOLS)}.{suggest(name, PROTOCOLS)}"
        )
    module, _, kind = PROTOCOLS[name].rpartition(".")
    found: type[Protocol] = getattr(importlib.import_module(module), kind)
    return found


def check_folder(
    out: Path, keeps: tuple[str, ...] = (), *, force: bool = False, resume: bool = False
) -> None:
    """Raise ResultError if an evaluation cannot go to `out`: before hours of work, and not after.

    Args:
        keeps: what, beside scores.json, tells that it holds an earlier evaluation.
    """
    try:
        if out.exists() or out.is_symlink():
            _check(out, keeps, force=force, resume=resume)
        elif resume:
            raise ResultError(f"'{out}' holds nothing to go on with; leave out resume")
        parent = out.absolute().parent
        while not parent.exists():
            parent = parent.parent
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.", suffix=".part"):
            pass
    except OSError as error:
        raise ResultError(f"cannot write '{out}': {error.strerror or error}") from error


def _check(out: Path, keeps: tuple[str, ...], *, force: bool, resume: bool) -> None:
    if not out.is_dir():
        raise ResultError(f"'{out}' is no folder; choose another")
    held = any(out.iterdir())
    if held and not (force or resume):
        raise ResultError(f"'{out}' exists; choose another folder, or force replacing it")
    if held and not any((out / name).exists() for name in (FILE, *keeps)):
        raise ResultError(f"'{out}' holds files but no evaluation; choose another folder")


def _check_protocol(out: Path, protocol: str) -> None:
    """Raise ResultError where a folder holds the scores of another protocol."""
    if not (out / FILE).exists():
        return
    held = {str(one.get("protocol")) for one in open_scores(out).provenance}
    if other := sorted(held - {protocol}):
        raise ResultError(
            f"'{out}' holds scores by {other[0]}, and {protocol} cannot go on with them; choose "
            "another folder"
        )


@contextmanager
def _cleared(out: Path, keeps: tuple[str, ...]) -> Iterator[None]:
    """The folder, made and clear of an earlier evaluation.

    Should this one end before it has anything to go on with, that comes back: neither a slip in a
    recipe nor images that cannot be read may cost anyone what they had.
    """
    made = not out.exists()
    _make(out)
    try:
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".old"))
    except OSError as error:
        raise ResultError(f"cannot write '{out}': {error.strerror or error}") from error
    try:
        # Only what an evaluation writes is moved: force must not cost anyone their other files.
        _move(out, aside, keeps)
    except ResultError:
        _move(aside, out, keeps)
        raise
    try:
        yield
    except BaseException:
        if not any(path.name in _TO_GO_ON_WITH for path in out.rglob("*")):
            for path in _held(out, keeps):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            # Should this fail, what was set aside stays where it is.
            _move(aside, out, keeps)
            if made:
                out.rmdir()
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _held(folder: Path, keeps: tuple[str, ...]) -> list[Path]:
    paths = (folder / name for name in (FILE, *keeps))
    return [path for path in paths if path.exists() or path.is_symlink()]


def _move(source: Path, target: Path, keeps: tuple[str, ...]) -> None:
    try:
        for path in _held(source, keeps):
            path.rename(target / path.name)
    except OSError as error:
        raise ResultError(f"cannot write '{target}': {error.strerror or error}") from error


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot write '{out}': {error.strerror or error}") from error


def _checked(protocol: str, options: dict[str, Any]) -> dict[str, Any]:
    known = [one.name for one in fields(find_protocol(protocol))]
    for key in options:
        if key not in known:
            raise VitprobeError(
                f"{protocol} has no option '{key}'; it takes {', '.join(known)}."
                f"{suggest(key, known)}"
            )
    return options
