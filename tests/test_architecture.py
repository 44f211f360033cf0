"""The import rules that keep data flowing one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitprobe

PACKAGE = Path(vitprobe.__file__).parent
MEASURES_MAY = {
    "__future__", "abc", "collections", "threading", "dataclasses", "functools", "importlib",
    "inspect", "itertools", "math", "numpy", "scipy", "torch", "typing",
}  # fmt: skip
MAY_TRITON = "fused_kernel.py"


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(part: str) -> list[Path]:
    path = PACKAGE / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def offending(part: str, *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files(part)
        for name in imports(path)
        if any(name == rule or name.startswith(rule + ".") for rule in forbidden)
    ]


def test_measures_know_tensors_only():
    for path in files("measures"):
        for name in imports(path):
            inside = name.startswith(("vitprobe.measures", "vitprobe.errors"))
            inside |= path.name == MAY_TRITON and name.split(".")[0] == "triton"
            assert inside or name.split(".")[0] in MEASURES_MAY, f"{path.name} imports {name}"


@pytest.mark.parametrize("part", ["plots", "report", "results.py"])
def test_plots_and_reports_read_results_only(part):
    assert not offending(
        part, "torch", "timm", "vitprobe.models", "vitprobe.capture", "vitprobe.training"
    )


def test_training_writes_no_results():
    assert not offending("training", "vitprobe.results", "vitprobe.plots", "vitprobe.report")


def test_nothing_imports_the_command_line():
    for path in files("."):
        if path.name != "__main__.py":
            assert not any(name.startswith("vitprobe.cli") for name in imports(path)), path


@pytest.mark.parametrize("module", ["vitprobe", "vitprobe.cli", "vitprobe.models"])
def test_importing_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_resolve_to_functions_and_not_to_modules():
    import vitprobe.capture
    import vitprobe.compare
    import vitprobe.report

    for name in vitprobe.__all__:
        value = getattr(vitprobe, name)
        assert callable(value) or name in ("measures", "plots"), name
