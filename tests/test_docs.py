"""The docs hold: their examples run, their commands parse, their pages name what there is."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import runpy
import shlex
import shutil
import signal
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from models_for_tests import squares, tiny
from PIL import Image
from plots.synthetic import Subject, comparison
from safetensors.torch import load_file

import vitprobe as vp
from vitprobe import cli, measures, plots
from vitprobe.errors import MeasureError, RecipeError, ResultError
from vitprobe.measures import registry
from vitprobe.training.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The commands of a block of shell that are vitprobe's, without what they are piped into."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "vitprobe" not in words or words[0] in ("docker", "eval", "echo"):
            continue
        words = words[words.index("vitprobe") + 1 :]
        ends = [i for i, word in enumerate(words) if word in (">", "|", "&&", "&")]
        found.append(words[: min(ends, default=len(words))])
    return found


@pytest.fixture
def example(monkeypatch):
    """Import a file of docs/examples under its own name; what it registers is forgotten after."""
    monkeypatch.syspath_prepend(EXAMPLES)
    tables = ("MEASURES", "TOKENS", "ATTENTION", "SUBSET", "SYMMETRIC")
    before = {name: dict(getattr(registry, name)) for name in tables}
    methods, modules = dict(METHODS), set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    for table, old in [*((getattr(registry, n), before[n]) for n in tables), (METHODS, methods)]:
        table.clear()
        table.update(old)
    for name in {"measure", "dialect", "method"} & (set(sys.modules) - modules):
        del sys.modules[name]


# -- Docstrings ------------------------------------------------------------------------------------

PUBLIC = {
    **{f"vitprobe.{name}": getattr(vp, name) for name in vp.__all__},
    **{f"measures.{name}": getattr(measures, name) for name in measures.__all__},
    **{f"plots.{name}": getattr(plots, name) for name in plots.__all__},
}


def test_public_names_have_docstrings():
    for name, value in PUBLIC.items():
        if inspect.isroutine(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if ">>>" in str(v.__doc__)))
def test_examples_in_docstrings_hold(name):
    value = PUBLIC[name]
    finder = doctest.DocTestFinder(recurse=False)
    names = {"torch": torch, "np": np, "vp": vp, "paper_style": plots.paper_style}
    names |= {n: getattr(measures, n) for n in measures.__all__}
    (found,) = finder.find(inspect.unwrap(value), name, globs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(found)
    plt.close("all")
    assert runner.summarize(verbose=False).failed == 0


def test_the_reference_lists_every_public_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in vp.__all__:
        if name not in ("measures", "plots", "VitprobeError"):
            assert f":: vitprobe.{name}\n" in page, name
    for module in ("measures", "plots", "errors"):
        assert f"automodule:: vitprobe.{module}\n" in page


# -- Pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_on_pages_parse(page):
    for block in blocks(page, "sh"):
        for words in commands(block):
            if words and not any("…" in word or word == "..." for word in words):
                cli._parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_on_pages_names_what_there_is(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
        for module, name in re.findall(r"\bvp\.(plots\.|measures\.)?(\w+)", block):
            holder = getattr(vp, module[:-1]) if module else vp
            assert hasattr(holder, name), f"vp.{module}{name}"


def test_the_page_of_recipes_is_what_they_say():
    page = runpy.run_path(str(DOCS / "recipes.py"))["page"]()
    committed = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert committed == page, "run 'python docs/recipes.py'"


def test_notebooks_are_committed_without_outputs():
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert '"outputs": []' in text
        assert not re.search(r'"execution_count": \d', text), path.name
        assert text.count('"outputs": []') == text.count('"cell_type": "code"'), path.name


def deep(path, seed, heads=12):
    """A checkpoint file of a small ViT with 12 heads."""
    torch.manual_seed(seed)
    module = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=heads, num_classes=0
    )
    torch.save({"model": module.state_dict()}, path)


@pytest.fixture
def desk(tmp_path, monkeypatch, example):
    """A folder with what the pages take for granted: checkpoints, photos, a report, runs."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("mae", "deit", "mae1", "deit1")):
        deep(tmp_path / f"{name}.pth", seed)
    Path("photos").mkdir()
    for i, image in enumerate((squares(16) * 255).to(torch.uint8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"photos/{i:02}.png")
    Path("report").mkdir()
    result = comparison({"MAE": Subject(2, 2), "DeiT": Subject(2, 2)}, images=8)
    result.save("report/results.nc")
    Path("models.toml").write_text(blocks(DOCS / "own_checkpoints.md", "toml")[0])
    shutil.copy(EXAMPLES / "rotation.toml", tmp_path)
    monkeypatch.setattr(vp, "plots", plots)
    return tmp_path


def run(words, capsys):
    """A command in-process; its output, which `>` may have sent to a file."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    formatter = warnings.formatwarning
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
    finally:
        warnings.formatwarning = formatter
        for number, handler in before.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    assert stop.value.code == 0, (words, err)
    return out


def follow(page, capsys, skip=()):
    """Do what a page says, block by block."""
    text = page.read_text(encoding="utf-8")
    names = {}
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)  # noqa: S102
            plt.close("all")
            continue
        for words in commands(block):
            if words[0] in skip:
                continue
            out = run(words, capsys)
            if target := re.search(r"> (\S+\.json)", block):
                Path(target[1]).write_text(out)
    return names


@pytest.mark.slow
def test_five_minutes_are_as_told(desk, capsys):
    shutil.rmtree("photos")
    follow(DOCS / "start.md", capsys, skip=("demo",))
    for name in ("cka.pdf", "figure_2.svg", "mae-vs-supervised/report.html"):
        assert Path(name).is_file(), name


@pytest.mark.slow
@pytest.mark.parametrize("page", ["own_checkpoints", "interop", "add_measure", "add_method"])
def test_pages_are_as_told(desk, page, capsys):
    pytest.importorskip("tensorboard")
    names = follow(DOCS / f"{page}.md", capsys, skip=("completion",))
    assert "vp" in names


# -- Worked examples -------------------------------------------------------------------------------


def test_the_measure_of_the_docs_is_right(example):
    neighbour_cosine = example("measure").neighbour_cosine
    rows, columns = np.indices((4, 6))
    chess = torch.from_numpy(1.0 - 2 * ((rows + columns) % 2)).reshape(1, 24, 1)
    assert neighbour_cosine(chess, grid=(4, 6)).item() == -1
    assert neighbour_cosine(torch.ones(1, 24, 3), grid=(4, 6)).item() == pytest.approx(1)
    # Columns that take turns: all 18 pairs above each other are alike, all 20 beside are opposite.
    stripes = torch.from_numpy(1.0 - 2 * (columns % 2)).reshape(1, 24, 1)
    assert neighbour_cosine(stripes, grid=(4, 6)).item() == pytest.approx((18 - 20) / 38)
    chess[0, 0] = 0
    assert neighbour_cosine(chess, grid=(4, 6)).isnan().all()


def test_a_registered_measure_goes_all_the_way(example, tmp_path):
    own = example("measure")
    model = tiny()
    result = vp.compare([model], squares(8), ["neighbour_cosine", "token_cosine"])
    assert result.measures == ("neighbour_cosine", "token_cosine")
    captured = vp.capture(model, squares(8), layers=[1])
    tokens = captured.features[1][:, 1:]
    grid = captured.layouts[1].grid
    expected = own.neighbour_cosine(tokens, grid=grid).numpy()
    found = result.per_image("neighbour_cosine", "tiny").sel(layer=1)
    # A comparison sees its images in another order.
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-5)
    page = vp.report(result, tmp_path / "out").read_text(encoding="utf-8")
    assert own.NeighbourCosine.info.what in page
    # Where it is not registered, the saved result is refused in a sentence.
    registry.MEASURES.pop("neighbour_cosine")
    with pytest.raises(ResultError, match="'neighbour_cosine', which is not known here; import"):
        vp.open_result(tmp_path / "out" / "results.nc")


def test_what_is_no_measure_is_not_registered(example):
    own = example("measure").NeighbourCosine
    assert measures.register(own) is own  # a cell of a notebook that is run again
    for bad, reason in (
        (object, "is no class of a measure"),
        (type("Bare", (measures.TokenMeasure,), {}), "has no info"),
        (type("Open", (measures.TokenMeasure,), {"info": own.info}), "has no images"),
        (type("Taken", (own,), {"info": measures.MEASURES["token_cosine"]}), "choose another name"),
        (type("Moved", (own,), {"info": measures.MEASURES["cka"]}), "says that it is of similar"),
    ):
        with pytest.raises(MeasureError, match=reason):
            measures.register(bad)


def test_the_dialect_of_the_docs_loads_what_it_describes(example, tmp_path, monkeypatch):
    branches = sys.modules["vitprobe.models.branches"]
    acme = example("dialect").ACME
    monkeypatch.setattr(branches, "DIALECTS", (acme, *branches.DIALECTS))
    module = tiny().module
    ours = {
        r"^patch_embed\.proj\.": "stem.conv.",
        r"^cls_token$": "stem.class_token",
        r"^pos_embed$": "stem.positions",
        r"^blocks\.(\d+)\.attn\.": r"stages.\1.attention.",
        r"^blocks\.(\d+)\.mlp\.": r"stages.\1.feed_forward.",
        r"^blocks\.": "stages.",
        r"^norm\.": "last_norm.",
    }
    theirs = {}
    for key, value in module.state_dict().items():
        for pattern, replacement in ours.items():
            key = re.sub(pattern, replacement, key)
        theirs[f"module.{key}"] = value
    theirs["module.classifier.weight"] = torch.zeros(4, 24)
    torch.save({"state_dict": theirs, "args": {"n_heads": 3}}, tmp_path / "acme.pth")
    model = vp.load(tmp_path / "acme.pth")
    assert (model.report.dialect, model.report.loaded_fraction) == ("acme", 1.0)
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (3, "args")
    assert model.report.ignored == ("module.classifier.weight",)
    images = squares(2)
    with torch.no_grad():
        expected = module.eval().forward_features(images)
        assert torch.equal(model.module.forward_features(images), expected)


@pytest.mark.slow
def test_the_method_of_the_docs_trains_and_resumes_to_the_bit(example, tmp_path, monkeypatch):
    rotation = METHODS["rotation"] = example("method").Rotation
    options = {"overrides": {"knn": 0, "batch_size": 256, "compile": "off"}, "progress": False}
    whole = vp.pretrain(EXAMPLES / "rotation.toml", tmp_path / "whole", device="cpu", **options)

    def stopped(self, moment):
        if moment.step == 7:  # of 10
            raise RuntimeError("the power went")

    monkeypatch.setattr(rotation, "before_step", stopped)
    with pytest.raises(RuntimeError, match="power"):
        vp.pretrain(EXAMPLES / "rotation.toml", tmp_path / "b", device="cpu", **options)
    monkeypatch.undo()
    again = vp.pretrain(
        EXAMPLES / "rotation.toml", tmp_path / "b", device="cpu", resume=True, **options
    )
    ours, theirs = (load_file(path) for path in (whole, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())
    assert vp.load(whole).training["method"] == "rotation"
    with pytest.raises(RecipeError, match="turns must be 2 or 4, not 3"):
        vp.pretrain(
            EXAMPLES / "rotation.toml",
            tmp_path / "c",
            overrides={"method.turns": 3},
            progress=False,
        )
