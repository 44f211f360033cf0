"""The command line: thin subcommands over the public functions.

Only the standard library and tyro are imported before a command has been parsed, so that help is
immediate. The path of what was made is all that goes to stdout.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import tyro

from vitprobe import __version__
from vitprobe.commands.analysis import Compare, Inspect, Probe, Report
from vitprobe.commands.evaluate_dense import EvaluateDetection, EvaluateSegmentation, MakeShapes
from vitprobe.commands.evaluate_features import (
    EvaluateFrozen,
    EvaluateHead,
    EvaluateKnn,
    EvaluateLinear,
)
from vitprobe.commands.evaluate_finetune import (
    EvaluateFinetune,
    EvaluateLayers,
    EvaluateTransfer,
)
from vitprobe.commands.messages import LEADS, complain, one_line
from vitprobe.commands.training import Export, Pretrain, Runs
from vitprobe.errors import ElsewhereError, VitprobeError, is_out_of_memory

_NO_MEMORY = "memory ran out; give a smaller --batch-size or --block, or fewer models at once"


@dataclass
class Demo:
    """Compare the encoders that come with vitprobe; nothing is downloaded."""

    out: Path = Path("demo")
    """Folder for the report, and for the runs of --train."""
    train: bool = False
    """Train four small ViTs on handwritten digits, and compare those."""
    force: bool = False
    """Replace what an earlier demo left there."""

    def run(self) -> str:
        from vitprobe.demo import demo

        return str(demo(self.out, train=self.train, force=self.force))


Protocol = (
    Annotated[EvaluateHead, tyro.conf.subcommand("head")]
    | Annotated[EvaluateKnn, tyro.conf.subcommand("knn")]
    | Annotated[EvaluateLinear, tyro.conf.subcommand("linear")]
    | Annotated[EvaluateFrozen, tyro.conf.subcommand("frozen")]
    | Annotated[EvaluateFinetune, tyro.conf.subcommand("finetune")]
    | Annotated[EvaluateTransfer, tyro.conf.subcommand("transfer")]
    | Annotated[EvaluateLayers, tyro.conf.subcommand("layers")]
    | Annotated[EvaluateDetection, tyro.conf.subcommand("detection")]
    | Annotated[EvaluateSegmentation, tyro.conf.subcommand("segmentation")]
    | Annotated[MakeShapes, tyro.conf.subcommand("shapes")]
)


@dataclass
class Evaluate:
    """Measure what a checkpoint is worth for a task, under one of several protocols."""

    protocol: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Protocol]]

    def run(self) -> str:
        return self.protocol.run()


@dataclass
class Completion:
    """Print the script that lets a shell complete commands and options."""

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    """Of which shell: eval "$(vitprobe completion bash)"."""

    def run(self) -> str:
        script = io.StringIO()
        with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
            _cli(["--tyro-print-completion", self.shell])
        return script.getvalue()


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Completion, tyro.conf.subcommand("completion")]
)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 2 bad input, 130 Ctrl-C, 143 SIGTERM, 1 a defect."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    warnings.formatwarning = lambda message, *_: f"vitprobe: warning: {one_line(str(message))}\n"
    try:
        command = _parse(args)
        with _together(command):
            outcome = command.run()
        if LEADS:
            print(outcome)
        if sys.stdout is not None:
            sys.stdout.flush()
        status = 0
    except VitprobeError as error:
        # torchrun stops all processes when one has ended; those that are about to say nothing.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not isinstance(error, ElsewhereError):
            complain(str(error))
        status = 2
    except KeyboardInterrupt as stop:
        complain(str(stop) or "interrupted")
        status = 130
    except MemoryError:
        complain(_NO_MEMORY)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        complain(f"cannot read or write {where}{error.strerror or error}")
        status = 2
    except Exception as error:
        if is_out_of_memory(error):
            complain(_NO_MEMORY)
            sys.exit(2)
        if os.environ.get("VITPROBE_TRACEBACK"):
            raise
        complain(
            f"{type(error).__name__}: {error}. This was not foreseen; set VITPROBE_TRACEBACK=1 to "
            "see where it happened, and please report it"
        )
        status = 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    sys.exit(status)


def _together(command: object) -> contextlib.AbstractContextManager[object]:
    """The processes of torchrun, where a command shares its work: an error of one ends all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(command, Compare):
        return contextlib.nullcontext()
    from vitprobe.distributed import together

    return together()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Stop the command, and again a while later should it go on: Python discards an exception that
    happens to be raised inside a destructor or a weak reference's callback."""
    signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame))
    signal.setitimer(signal.ITIMER_REAL, 3)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    complain("terminated")
    sys.exit(143)


def _parse(args: Sequence[str] | None) -> Any:
    """tyro's parse, its boxed usage errors folded into one line."""
    given = sys.argv[1:] if args is None else args
    if list(given) == ["--version"]:
        print(f"vitprobe {__version__}")
        raise SystemExit(0)
    if list(given).count("--set") > 1:
        complain("--set is given more than once; list all overrides after one --set")
        raise SystemExit(2)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return _cli(args)
    except SystemExit as stop:
        if stop.code == 2:
            complain(_unboxed(errors.getvalue()))
        raise


def _cli(args: Sequence[str] | None) -> Any:
    return tyro.cli(
        Command,
        prog="vitprobe",
        description="Probe and compare what Vision Transformers learned.",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _unboxed(text: str) -> str:
    # Boxes are drawn in ASCII where the terminal speaks no UTF-8.
    lines = [re.sub(r"^[│|╭╰+]|[│|╮╯+]$", "", line.strip()).strip() for line in text.splitlines()]
    sections = re.split(r"^[─-].*[─-]$", "\n".join(lines), flags=re.MULTILINE)
    kept = [one_line(section) for section in sections if "Argument helptext" not in section]
    return "; ".join(section.rstrip(".:") for section in kept if section)
