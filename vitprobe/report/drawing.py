"""The figures of a report drawn: saved in files, and made fit for a page.

Many figures are drawn by several processes at once. Helpers get the result through a file, plan the
same list of figures, and draw what nobody has begun; the figures do not depend on who drew them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt

from vitprobe import plots
from vitprobe.measures.registry import is_ours
from vitprobe.plots.style import FORMATS, figure_of
from vitprobe.report.figures import plan
from vitprobe.report.svg import inline

if TYPE_CHECKING:
    from markupsafe import Markup

    from vitprobe.report.figures import Job, Pictures
    from vitprobe.report.lists import Lists
    from vitprobe.report.numbers import Numbers
    from vitprobe.results import Comparison

# A helper starts in the time that some ten figures take.
_FIGURES_EACH = 20
_MOST_PROCESSES = 4


@dataclass(frozen=True)
class _Drawn:
    svg: Markup
    numbers: tuple[Numbers, ...]
    points: int
    images: dict[str, Markup]


_Task = tuple["Comparison", "Lists", Path, Collection[str]]
"""What helpers need to know."""
_Share = dict[int, _Drawn | None]
"""What was drawn, by its place in the list; None for a figure that the page does not show."""


def draw(
    result: Comparison,
    folder: Path,
    lists: Lists,
    *,
    formats: Collection[str] = FORMATS,
    processes: int | None = None,
) -> Pictures:
    """Draw and save everything in the new folder `folder`.

    formats: of the files, SVG among them, which the page holds.
    processes: as many as there are processors, but few, and one for few figures, unless given.
    """
    folder.mkdir()
    pictures, jobs = plan(result, lists)
    if processes is None:
        processes = max(1, min(_processors(), _MOST_PROCESSES, len(jobs) // _FIGURES_EACH))
    # What a user registered is known to this process alone.
    if not all(map(is_ours, result.measures)):
        processes = 1
    with _once(), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        begun = Path(temporary)
        helpers = _Helpers(begun, processes - 1, (result, lists, folder, formats))
        try:
            drawn = _draw(jobs, _unbegun(len(jobs), begun), folder, formats)
            drawn |= helpers.brought()
        finally:
            helpers.stop()
        # A helper that died, for want of memory say, must cost nothing but time.
        drawn |= _draw(jobs, [i for i in range(len(jobs)) if i not in drawn], folder, formats)
    for index, job in enumerate(jobs):
        found = drawn[index]
        if job.picture is not None and found is not None:
            job.picture.svg, job.picture.numbers = found.svg, found.numbers
            job.picture.points = found.points
            pictures.images.update(found.images)
    return pictures


@contextmanager
def _once() -> Iterator[None]:
    """Give each warning once, and not with every figure: a letter that no font has is in all."""
    with warnings.catch_warnings(record=True) as told:
        yield
    for message, category in dict.fromkeys((str(one.message), one.category) for one in told):
        warnings.warn(message, category, stacklevel=4)


def _unbegun(count: int, begun: Path) -> Iterator[int]:
    """Places of the list that no other process has begun, one by one; each marks its own by a file
    in the folder `begun`."""
    for index in range(count):
        try:
            (begun / str(index)).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield index


def _draw(jobs: list[Job], places: Iterable[int], folder: Path, formats: Collection[str]) -> _Share:
    return {index: _drawn(jobs[index], index, folder, formats) for index in places}


def _drawn(job: Job, index: int, folder: Path, formats: Collection[str]) -> _Drawn | None:
    drawn = job.plot()
    figure = figure_of(drawn)
    try:
        plots.save(drawn, folder / job.name, formats)
        if job.picture is None:
            return None
        numbers = tuple(job.numbers_of(drawn)) if job.numbers_of else ()
    finally:
        plt.close(figure)
    images: dict[str, Markup] = {}
    svg = (folder / f"{job.name}.svg").read_text(encoding="utf-8")
    # Names that differ in a dot alone must not share ids, and long ones would be half of the page.
    element = inline(svg, prefix=f"f{index}", label=job.label, images=images)
    return _Drawn(element, numbers, round(72 * figure.get_figwidth()), images)


class _Helpers:
    """Other processes, each drawing its share.

    Programs of their own and no forks, which would hold this one's threads, and no
    `multiprocessing`, which would run the main module of a script once more.
    """

    def __init__(self, folder: Path, count: int, task: _Task) -> None:
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []
        if not count:
            return
        given = folder / "task"
        with given.open("wb") as file:
            pickle.dump((*task, dict(mpl.rcParams)), file)
        environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(sys.path)}
        for number in range(count):
            brought = folder / f"drawn{number}"
            command = [sys.executable, "-P", "-c", f"from {__name__} import help_out; help_out()"]
            command += [str(given), str(brought)]
            # Where no process can be started, this one draws everything.
            with suppress(OSError):
                process = subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
                )
                self._running.append((process, brought))

    def brought(self) -> _Share:
        """What they drew, once they are done; their warnings are given again."""
        share: _Share = {}
        for process, path in self._running:
            if process.wait() == 0:
                with path.open("rb") as file:
                    found, warned = pickle.load(file)
                share |= found
                for message, category in warned:
                    warnings.warn(message, category, stacklevel=4)
        return share

    def stop(self) -> None:
        for process, _ in self._running:
            process.kill()
            process.wait()


def help_out() -> None:
    """Draw a share: the program of a helper."""
    given, brought = map(Path, sys.argv[1:])
    with given.open("rb") as file:
        result, lists, folder, formats, settings = pickle.load(file)
    settings.pop("backend")
    with warnings.catch_warnings(record=True) as warned:
        mpl.rcParams.update(settings)
        _, jobs = plan(result, lists)
        drawn = _draw(jobs, _unbegun(len(jobs), given.parent), folder, formats)
    told = [(str(warning.message), warning.category) for warning in warned]
    with brought.open("wb") as file:
        pickle.dump((drawn, told), file)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
