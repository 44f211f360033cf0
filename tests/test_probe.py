from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from models_for_tests import squares, tiny
from PIL import Image
from safetensors.torch import load, save

import vitprobe as vp
from vitprobe.errors import DataError, MeasureError, ResultError, SourceError, VitprobeError
from vitprobe.forward import Forward
from vitprobe.probe import ProbeWriter
from vitprobe.probe_file import HEADER, member
from vitprobe.settings import Settings

QUIET = {"progress": False, "device": "cpu", "block": 32}
FEW = ["cka", "attention_distance"]


@pytest.fixture(scope="module")
def pair():
    return tiny("a", depth=2), tiny("b", size=48, width=36, depth=2, heads=2, seed=1)


@pytest.fixture(scope="module")
def probes(pair, tmp_path_factory):
    """Probe files of the pair, made once; tests that damage them take copies."""
    folder = tmp_path_factory.mktemp("probes")
    return [vp.probe(m, squares(100), folder / f"{m.name}.probe", FEW, **QUIET) for m in pair]


def loader(n, seed=0):
    return torch.utils.data.DataLoader(squares(n, seed=seed), batch_size=50)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate((squares(100) * 255).to(torch.uint8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


def check_same(found, expected):
    """Whether two results hold the same bits, and say the same."""
    ours, theirs = found.tree.to_dict(), expected.tree.to_dict()
    assert ours.keys() == theirs.keys()
    for path, node in theirs.items():
        if path != "/":
            assert node.identical(ours[path]), path
    assert found.notes == expected.notes
    alike = ("measures", "groups", "block", "blocks", "cka_value", "images", "device")
    for key in alike:
        assert found.provenance[key] == expected.provenance[key], key
    for one, other in zip(found.provenance["models"], expected.provenance["models"], strict=True):
        assert {**one, "probe": None} == json.loads(json.dumps({**other, "probe": None}))


@pytest.mark.parametrize(
    ("measures", "tokens"), [(["all"], "patches"), (["cka", "rankme"], "mean"), (["all"], "cls")]
)
def test_probes_give_the_result_of_the_models_to_the_last_bit(pair, tmp_path, measures, tokens):
    options = {"tokens": tokens, "max_images": 40, "measures": measures, **QUIET}
    live = vp.compare(pair, squares(100), **options)
    paths = [vp.probe(m, squares(100), tmp_path / f"{m.name}.probe", **options) for m in pair]
    a, b = (vp.open_probe(path) for path in paths)
    for models, images in (
        ([a, b], None),
        ([a, pair[1]], squares(100)),
        ([pair[0], b], squares(100)),
        ([a, b], squares(100)),
    ):
        check_same(vp.compare(models, images, **options), live)


def test_fewer_measures_and_one_alone(pair, probes):
    a = vp.open_probe(probes[0])
    check_same(
        vp.compare([a], measures=["cka"], **QUIET),
        vp.compare(pair[:1], squares(100), ["cka"], **QUIET),
    )
    # RBF CKA is of the same Grams.
    found = vp.compare([a], measures=["cka_rbf"], **QUIET)
    check_same(found, vp.compare(pair[:1], squares(100), ["cka_rbf"], **QUIET))
    biased = vp.compare([a], measures=["cka"], estimator="biased", **QUIET)
    expected = vp.compare(pair[:1], squares(100), ["cka"], estimator="biased", **QUIET)
    check_same(biased, expected)


def test_what_a_probe_says_of_itself(pair, probes):
    a = vp.open_probe(probes[0])
    assert (a.name, a.input_size, a.dtype) == ("a", (3, 32, 32), "torch.float32")
    assert a.facts["depth"]["value"] == 2
    assert a.settings.named == ("cka", "attention_distance", "sink_mass")
    assert (a.images.limit, a.images.seed, len(a.images.used)) == (None, 0, 100)
    assert a.weights_sha256() == pair[0].weights_sha256() != pair[1].weights_sha256()
    assert re.fullmatch("[0-9a-f]{64}", a.sha256)
    assert vp.open_probe(probes[0], name="other").describe()["name"] == "other"
    found = vp.compare([a], measures=["cka"], **QUIET)
    assert found.provenance["models"][0]["probe"]["sha256"] == a.sha256


def test_renamed_models_groups_and_reports(pair, probes, tmp_path):
    models = [vp.open_probe(path, name=name) for path, name in zip(probes, "xy", strict=True)]
    result = vp.compare(models, measures=FEW, groups={"Both": ["x", "y"]}, **QUIET)
    assert result.models == ("x", "y")
    page = vp.report(result, tmp_path / "out", formats=["svg"]).read_text(encoding="utf-8")
    assert page.count("Not run here: read from the probe file ") == 2
    twice = [models[0], vp.open_probe(probes[0], name="z")]
    with pytest.raises(VitprobeError, match="'x' and 'z' of group 'Same' have the same weights"):
        vp.compare(twice, measures=FEW, groups={"Same": ["x", "z"]}, **QUIET)
    live = [models[0], pair[0]]
    with pytest.raises(VitprobeError, match="'x' and 'a' of group 'Same' have the same weights"):
        vp.compare(live, squares(100), FEW, groups={"Same": ["x", "a"]}, **QUIET)


def test_a_probe_has_no_twin_and_says_so(probes):
    result = vp.compare([vp.open_probe(probes[0])], measures=FEW, random_reference=True, **QUIET)
    assert any("a has no untrained twin: a probe file holds no model" in n for n in result.notes)


def test_a_probe_is_no_model_to_load(probes):
    with pytest.raises(SourceError, match="holds no model to run; open_probe reads it"):
        vp.load(probes[0])
    with pytest.raises(SourceError, match=r"'heads' does not apply .* made with them"):
        vp.load(f"{probes[0]},heads=3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 40}, r"a\.probe' was probed with block 32 and this comparison has 40"),
        ({"layers": "residual"}, "layers normed and this comparison has residual; compare with"),
        ({"tokens": "mean"}, "tokens patches and this comparison has mean"),
        ({"precision": "bf16"}, "precision fp32 and this comparison has bf16"),
        ({"measures": ["cka", "svcca"]}, "holds nothing of svcca; leave them out, or probe"),
        ({"measures": ["token_cosine"]}, "holds nothing of token_cosine"),
        ({"measures": ["attention_entropy"]}, "holds nothing of attention_entropy"),
    ],
)
def test_what_was_probed_otherwise_is_refused(probes, options, message):
    with pytest.raises(MeasureError, match=message):
        vp.compare([vp.open_probe(probes[0])], **{"measures": FEW, **QUIET, **options})


def test_max_images_matter_where_they_are_used(pair, tmp_path):
    made = vp.probe(
        pair[0], squares(40), tmp_path / "a.probe", ["cka", "svcca"], max_images=20, **QUIET
    )
    a = vp.open_probe(made)
    with pytest.raises(MeasureError, match="max images 20 and this comparison has 256"):
        vp.compare([a], measures=["svcca"], **QUIET)
    assert vp.compare([a], measures=["cka"], **QUIET).measures == ("cka",)


def test_other_images_are_refused(pair, probes, photos, tmp_path):
    a = vp.open_probe(probes[0])
    with pytest.raises(DataError, match=r"a.probe' was probed on 100 images and 'array' has 60"):
        vp.compare([a, pair[1]], squares(60), FEW, **QUIET)
    with pytest.raises(DataError, match=r"another '.*' than 'array' has, by the same name"):
        vp.compare([a, pair[1]], squares(100, seed=9), FEW, **QUIET)
    with pytest.raises(DataError, match="no limit of the images and 'array' has limit 100"):
        vp.compare([a, pair[1]], squares(120), FEW, limit=100, **QUIET)
    with pytest.raises(DataError, match="with seed 0 of the images and 'array' has seed 3"):
        vp.compare([a, pair[1]], squares(100), FEW, seed=3, **QUIET)
    with pytest.raises(
        DataError, match=r"was probed on '\d+' as image 0, where '.*' has '0\d\d.png'"
    ):
        vp.compare([a, pair[1]], photos, FEW, **QUIET)
    loader = torch.utils.data.DataLoader(squares(100), batch_size=50)
    with pytest.raises(DataError, match="with seed 0 of the images and 'DataLoader' has no seed"):
        vp.compare([a, pair[1]], loader, FEW, **QUIET)
    other = vp.probe(pair[1], squares(96), tmp_path / "b.probe", FEW, **QUIET)
    with pytest.raises(
        DataError, match=r"b.probe' was probed on 96 images and '.*a.probe' has 100"
    ):
        vp.compare([a, vp.open_probe(other)], measures=FEW, **QUIET)
    with pytest.raises(DataError, match="no images to compare models on"):
        vp.compare([a, pair[1]], measures=FEW, **QUIET)
    with pytest.raises(DataError, match="have their limit and seed already"):
        vp.compare([a], measures=FEW, limit=5, **QUIET)


def test_sources_of_unknown_length(pair, tmp_path):
    made = vp.probe(pair[0], loader(80), tmp_path / "a.probe", FEW, **QUIET)
    live = vp.compare(pair, loader(80), FEW, **QUIET)
    check_same(vp.compare([vp.open_probe(made), pair[1]], loader(80), FEW, **QUIET), live)
    other = vp.probe(pair[1], loader(80), tmp_path / "b.probe", FEW, **QUIET)
    probes = [vp.open_probe(path) for path in (made, other)]
    check_same(vp.compare(probes, loader(80), FEW, **QUIET), live)
    with pytest.raises(DataError, match=r"a.probe' "):
        vp.compare([vp.open_probe(made), pair[1]], loader(200), FEW, **QUIET)


def test_undecodable_images(pair, photos, tmp_path):
    (photos / "050.png").write_bytes(b"no image")
    live = vp.compare(pair, photos, FEW, limit=90, **QUIET)
    made = [vp.probe(m, photos, tmp_path / f"{m.name}.probe", FEW, limit=90, **QUIET) for m in pair]
    a, b = map(vp.open_probe, made)
    check_same(vp.compare([a, b], measures=FEW, **QUIET), live)
    check_same(vp.compare([a, pair[1]], photos, FEW, limit=90, **QUIET), live)


# Being cut short, and going on.


class CutError(Exception):
    pass


@pytest.fixture
def cut(monkeypatch):
    """Let a run end before its n-th block, and count the blocks that are run after that."""
    run = Forward.block
    state = {"left": None, "run": []}

    def block(self, first, pixels):
        if state["left"] == 0:
            raise CutError
        if state["left"] is not None:
            state["left"] -= 1
        state["run"].append((self.model.name, first))
        return run(self, first, pixels)

    monkeypatch.setattr(Forward, "block", block)
    return state


def test_resume_goes_on_behind_the_last_whole_block(pair, photos, tmp_path, cut):
    (photos / "000.png").write_bytes(b"no image")
    whole = vp.probe(pair[0], photos, tmp_path / "whole.probe", FEW, **QUIET)
    out = tmp_path / "a.probe"
    cut.update(left=2, run=[])
    with pytest.raises(CutError):
        vp.probe(pair[0], photos, out, FEW, **QUIET)
    assert not out.exists()
    assert sorted(os.listdir(tmp_path / "a.probe.partial" / "blocks")) == [
        "000000.safetensors",
        "000001.safetensors",
    ]
    with pytest.raises(ResultError, match=r"a\.probe\.partial' is left of a run .* by resume"):
        vp.probe(pair[0], photos, out, FEW, **QUIET)
    cut.update(left=None, run=[])
    assert vp.probe(pair[0], photos, out, FEW, resume=True, **QUIET) == out
    assert cut["run"] == [("a", 64)]
    assert not (tmp_path / "a.probe.partial").exists()
    one, other = map(vp.open_probe, (whole, out))
    assert one.images.sha256 == other.images.sha256
    assert one.images.undecodable == other.images.undecodable == ["000.png"]
    check_same(vp.compare([other], measures=FEW, **QUIET), vp.compare([one], measures=FEW, **QUIET))
    cut.update(run=[])
    vp.probe(pair[0], photos, out, FEW, resume=True, **QUIET)
    assert not cut["run"]


def test_resume_after_the_last_block_has_nothing_left_to_run(
    pair, photos, tmp_path, cut, monkeypatch
):
    out = tmp_path / "a.probe"

    def fail(*args):
        raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(ProbeWriter, "finish", fail)
        with pytest.raises(CutError):
            vp.probe(pair[0], photos, out, FEW, **QUIET)
    cut.update(run=[])
    vp.probe(pair[0], photos, out, FEW, resume=True, **QUIET)
    assert not cut["run"]
    assert len(vp.open_probe(out).images.used) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 16}, "with block 32, where this one has 16; give the same, or remove it"),
        ({"measures": ["cka"]}, "with measures cka, attention_distance, sink_mass, where"),
        ({"limit": 50}, "with limit none, where this one has 50"),
        ({"seed": 1}, "with seed 0, where this one has 1"),
        ({"model": 1}, "with weights [0-9a-f]+…, where this one has"),
    ],
)
def test_resume_of_another_run_is_refused(pair, photos, tmp_path, cut, change, message):
    cut["left"] = 1
    with pytest.raises(CutError):
        vp.probe(pair[0], photos, tmp_path / "a.probe", FEW, **QUIET)
    cut["left"] = None
    model = pair[change.pop("model", 0)]
    options = {"measures": FEW, **QUIET, **change}
    with pytest.raises(ResultError, match=message):
        vp.probe(model, photos, tmp_path / "a.probe", resume=True, **options)
    (path,) = [vp.probe(model, photos, tmp_path / "a.probe", force=True, **options)]
    assert vp.open_probe(path).images.limit == change.get("limit")


def test_resume_on_another_kind_of_device_is_refused(pair, tmp_path):
    settings = Settings(FEW)
    images = vp.images(squares(40))
    out = tmp_path / "a.probe"
    more = {"resume": True, "force": False}
    for name in ("cuda:1", "cuda:0"):
        ProbeWriter(out, pair[0], settings, images, torch.device(name), **more)
    with pytest.raises(ResultError, match="with device cuda, where this one has cpu; give the sa"):
        ProbeWriter(out, pair[0], settings, images, torch.device("cpu"), **more)


def test_resume_with_other_images_is_refused(pair, photos, tmp_path, cut):
    cut["left"] = 1
    with pytest.raises(CutError):
        vp.probe(pair[0], photos, tmp_path / "a.probe", FEW, **QUIET)
    cut["left"] = None
    for path in photos.iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(DataError, match="which an earlier pass has used"):
        vp.probe(pair[0], photos, tmp_path / "a.probe", FEW, resume=True, **QUIET)


def test_a_finished_file_of_another_model_is_not_taken_for_this_one(pair, tmp_path):
    out = vp.probe(pair[0], squares(40), tmp_path / "a.probe", FEW, **QUIET)
    with pytest.raises(ResultError, match=r"'.*a.probe' exists; take it as it is by resume"):
        vp.probe(pair[0], squares(40), out, FEW, **QUIET)
    with pytest.raises(ResultError, match="is of another model than 'b'"):
        vp.probe(pair[1], squares(40), out, FEW, resume=True, **QUIET)


def test_the_same_weights_with_other_facts_are_another_model(tmp_path, cut):
    three, two = (tiny("a", depth=2, heads=heads) for heads in (3, 2))
    two.module.load_state_dict(three.module.state_dict())
    darker = replace(three, mean=(0.1, 0.1, 0.1))
    out = vp.probe(three, squares(40), tmp_path / "a.probe", FEW, **QUIET)
    for other, said in ((two, "heads 3, where it has 2"), (darker, "mean .* where it has 0.1")):
        with pytest.raises(ResultError, match=rf"is of another model than 'a' \({said}"):
            vp.probe(other, squares(40), out, FEW, resume=True, **QUIET)
    out.unlink()
    cut["left"] = 1
    with pytest.raises(CutError):
        vp.probe(three, squares(100), out, FEW, **QUIET)
    cut["left"] = None
    with pytest.raises(ResultError, match="with heads 3, where this one has 2"):
        vp.probe(two, squares(100), out, FEW, resume=True, **QUIET)


@pytest.mark.parametrize("source", [squares, loader])
def test_resume_with_other_images_that_have_no_names(pair, tmp_path, cut, source):
    out = tmp_path / "a.probe"
    cut["left"] = 2
    with pytest.raises(CutError):
        vp.probe(pair[0], source(100), out, FEW, **QUIET)
    cut["left"] = None
    other = r"'\d+' in '.*' is not what an earlier pass was given; give the same images"
    with pytest.raises(DataError, match=other):
        vp.probe(pair[0], source(100, seed=9), out, FEW, resume=True, **QUIET)
    vp.probe(pair[0], source(100), out, FEW, resume=True, **QUIET)
    with pytest.raises(DataError, match=other):
        vp.probe(pair[0], source(100, seed=9), out, FEW, resume=True, **QUIET)


@pytest.mark.parametrize(("before", "after"), [(80, 200), (100, 80)])
def test_resume_where_the_end_has_moved(pair, tmp_path, cut, before, after):
    """The last block takes in a tail, which another length makes another one."""
    images = squares(200)
    cut["left"] = 2

    def some(n):
        return torch.utils.data.DataLoader(images[:n], batch_size=10)

    def stop(*args):
        raise CutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeWriter, "finish", stop)
        with pytest.raises(CutError):
            vp.probe(pair[0], some(before), tmp_path / "a.probe", FEW, **QUIET)
    cut["left"] = None
    with pytest.raises(DataError, match=r"which these .* are not divided into"):
        vp.probe(pair[0], some(after), tmp_path / "a.probe", FEW, resume=True, **QUIET)


def test_blocks_without_a_header_are_not_taken(pair, tmp_path, cut):
    """Such as a kill may leave that comes while a folder is removed."""
    out = tmp_path / "a.probe"
    cut["left"] = 2
    with pytest.raises(CutError):
        vp.probe(pair[1], squares(100), out, FEW, **QUIET)
    (tmp_path / "a.probe.partial" / HEADER).unlink()
    cut.update(left=None, run=[])
    vp.probe(pair[0], squares(100), out, FEW, resume=True, **QUIET)
    assert cut["run"] == [("a", 0), ("a", 32), ("a", 64)]


def test_the_images_of_a_probe_are_none_to_run_a_model_on(pair, probes, tmp_path):
    images = vp.open_probe(probes[0]).images
    for run in (
        lambda: vp.compare([vp.open_probe(probes[0]), pair[1]], images, FEW, **QUIET),
        lambda: vp.probe(pair[1], images, tmp_path / "b.probe", FEW, **QUIET),
    ):
        with pytest.raises(DataError, match="images of a probe file are not at hand"):
            run()


def test_compare_writes_probes_and_resumes(pair, photos, tmp_path, cut):
    live = vp.compare(pair, photos, FEW, **QUIET)
    folder = tmp_path / "probes"
    cut.update(left=3, run=[])
    with pytest.raises(CutError):
        vp.compare(pair, photos, FEW, probes=folder, **QUIET)
    cut.update(left=None, run=[])
    check_same(vp.compare(pair, photos, FEW, probes=folder, resume=True, **QUIET), live)
    assert cut["run"] == [("b", 32), ("a", 64), ("b", 64)]
    assert sorted(os.listdir(folder)) == ["a.probe", "b.probe"]
    cut.update(run=[])
    third = tiny("c", depth=2, seed=5)
    vp.compare([*pair, third], photos, FEW, probes=folder, resume=True, **QUIET)
    assert {name for name, _ in cut["run"]} == {"c"}
    probes = [vp.open_probe(folder / f"{name}.probe") for name in "ab"]
    check_same(vp.compare(probes, measures=FEW, **QUIET), live)


def test_compare_begins_no_probe_file_where_another_is_taken(pair, tmp_path):
    (tmp_path / "b.probe").write_bytes(b"taken")
    with pytest.raises(ResultError, match=r"b.probe' exists; take it as it is by resume"):
        vp.compare(pair, squares(8), FEW, probes=tmp_path, **QUIET)
    assert os.listdir(tmp_path) == ["b.probe"]


KILLED = """
import sys, time
sys.path[:0] = [{tests!r}]
from models_for_tests import tiny
import vitprobe as vp
from vitprobe.forward import Forward
run = Forward.block
def slow(self, first, pixels):
    made = run(self, first, pixels)
    if first:
        print("waiting", flush=True)
        time.sleep(60)
    return made
Forward.block = slow
vp.probe(tiny("a", depth=2), {photos!r}, {out!r}, {few!r}, progress=False, device="cpu", block=32)
"""


def test_a_kill_loses_one_block_at_most(pair, photos, tmp_path, cut):
    out = tmp_path / "a.probe"
    tests = os.path.dirname(__file__)
    code = KILLED.format(tests=tests, photos=str(photos), out=str(out), few=FEW)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGKILL)
    vp.probe(pair[0], photos, out, FEW, resume=True, **QUIET)
    assert cut["run"] == [("a", 32), ("a", 64)]
    check_same(
        vp.compare([vp.open_probe(out)], measures=FEW, **QUIET),
        vp.compare(pair[:1], photos, FEW, **QUIET),
    )


# Files that are damaged, or made to do harm.


def rewritten(path, out, change, compress=zipfile.ZIP_STORED, drop=()):
    """A copy of a probe file, its header's sums set right again; change(name, content)."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name not in drop}
    contents = {name: change(name, content) for name, content in members.items() if name != HEADER}
    header = json.loads(change(HEADER, members[HEADER]))
    if isinstance(header, dict) and isinstance(header.get("members"), dict):
        for name in header["members"].keys() & contents:
            content = contents[name]
            header["members"][name] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    with zipfile.ZipFile(out, "w", compress) as archive:
        archive.writestr(HEADER, json.dumps(header))
        for name, content in contents.items():
            archive.writestr(name, content)
    return out


def in_header(edit):
    def change(name, content):
        if name != HEADER:
            return content
        header = json.loads(content)
        edit(header)
        return json.dumps(header).encode()

    return change


def in_block(edit, number=1):
    def change(name, content):
        if name != member(number):
            return content
        arrays = load(content)
        edit(arrays)
        return save(arrays)

    return change


def said(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def set_nan(name):
    def edit(arrays):
        arrays[name].view(-1)[3] = torch.nan

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_block(set_nan("grams")), "'blocks/000001.safetensors' holds NaN .* in 'grams'"),
        (in_block(lambda a: a.update(grams=a["grams"][:, 1:].clone())), "holds 'grams' as"),
        (in_block(lambda a: a.update(grams=a["grams"].half())), "holds 'grams' as torch.float16"),
        (in_block(lambda a: a.pop("grams")), "lacks 'grams'"),
        (in_block(lambda a: a.update(more=torch.ones(1))), "holds 'more', which is nothing"),
        (
            in_block(lambda a: a.pop("attention.sink_mass.0.total")),
            "lacks 'attention.sink_mass.0.total'",
        ),
        (
            in_block(lambda a: a["attention.sink_mass.0.defined"].sub_(1000)),
            "negative counts in 'attention.sink_mass.0.defined'",
        ),
        (in_block(lambda a: a.update(about=torch.ones(3, dtype=torch.uint8))), "damaged: "),
        (in_block(lambda a: a.update(about=said('{"halved": [Infinity, 1]}'))), "damaged: "),
        (in_block(lambda a: a.update(about=said("[" * 100_000))), "damaged: "),
        (lambda name, content: content[:-1] if name == member(0) else content, "cannot be read"),
    ],
)
def test_damaged_blocks(probes, tmp_path, change, message):
    path = rewritten(probes[0], tmp_path / "bad.probe", change)
    with pytest.raises(ResultError, match=message) as error:
        vp.compare([vp.open_probe(path)], measures=FEW, **QUIET)
    assert "bad.probe' is damaged" in str(error.value)
    assert "\n" not in str(error.value)


def put(path, value):
    def edit(header):
        at = header
        *parents, last = path
        for part in parents:
            at = at[part]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return in_header(edit)


@pytest.mark.parametrize(
    "change",
    [
        *(put((name,), None) for name in ("model", "settings", "images", "anatomy", "weights")),
        *(put((name,), 5) for name in ("model", "settings", "images", "anatomy", "members")),
        put(("model", "facts"), {"depth": {}}),
        put(("model", "input_size"), [3, 1 << 40, 4]),
        put(("model", "nonfinite"), None),
        put(("model", "assumed"), ["charm"]),
        put(("model", "parameters"), "many"),
        put(("model", "input_size"), [3, 32]),
        put(("provenance", "created"), "once"),
        put(("provenance", "device"), 5),
        put(("provenance", "versions"), "new"),
        put(("settings", "block"), 1),
        put(("settings", "measures"), ["nonsense"]),
        put(("settings", "more"), 1),
        put(("images", "starts"), [0, 64, 32]),
        put(("images", "starts"), []),
        put(("images", "names"), ["a"]),
        put(("images", "digests"), ["zz"] * 100),
        put(("images", "sha256"), "0" * 64),
        put(("images", "limit"), "ten"),
        put(("images", "limit"), -1),
        put(("anatomy", "sites", 0, "heads"), 1 << 60),
        put(("anatomy", "sites", 0, "query_prefix"), -1),
        put(("anatomy", "sites", 0, "keys"), 9),
        put(("anatomy", "sites", 0, "path"), 9),
        put(("anatomy", "sites", 0, "more"), 9),
        put(("anatomy", "residual"), []),
        put(("anatomy", "residual", 0, "patches"), 1 << 50),
        put(("anatomy", "blocks"), []),
        put(("members", "anatomy.safetensors"), None),
    ],
)
def test_headers_that_are_none(probes, tmp_path, change):
    path = rewritten(probes[0], tmp_path / "bad.probe", change)
    with pytest.raises(
        ResultError, match=r"bad\.probe' is damaged: .*; probe the model again"
    ) as e:
        vp.open_probe(path)
    assert "\n" not in str(e.value)


def test_files_that_are_no_probe_files(probes, tmp_path):
    with pytest.raises(ResultError, match=r"no probe file '.*none.probe'"):
        vp.open_probe(tmp_path / "none.probe")
    whole = probes[0].read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-40]):
        (tmp_path / "cut.probe").write_bytes(content)
        with pytest.raises(ResultError, match="is no probe file, or only a part of one"):
            vp.open_probe(tmp_path / "cut.probe")
    same = rewritten(probes[0], tmp_path / "same.probe", lambda name, content: content)
    assert vp.open_probe(same).name == "a"
    later = rewritten(probes[0], tmp_path / "later.probe", put(("format",), 99))
    with pytest.raises(ResultError, match="has format 99 and this vitprobe reads 1"):
        vp.open_probe(later)
    later = rewritten(probes[0], tmp_path / "later.probe", put(("format",), "two\nlines"))
    with pytest.raises(ResultError, match=r"has format 'two\\nlines' and this vitprobe reads 1"):
        vp.open_probe(later)
    squeezed = rewritten(
        probes[0], tmp_path / "bomb.probe", lambda n, c: c, compress=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(ResultError, match=r"'header.json' is not stored as it should be"):
        vp.open_probe(squeezed)
    lacking = rewritten(probes[0], tmp_path / "l.probe", lambda n, c: c, drop=(member(1),))
    with pytest.raises(ResultError, match=r"is damaged: it lacks 'blocks/000001.safetensors'"):
        vp.compare([vp.open_probe(lacking)], measures=FEW, **QUIET)


def test_flipped_bits_are_found(probes, tmp_path):
    content = bytearray(probes[0].read_bytes())
    generator = np.random.default_rng(0)
    bad = tmp_path / "bad.probe"
    found = 0
    expected = vp.compare([vp.open_probe(probes[0])], measures=FEW, **QUIET)
    for place in generator.integers(0, len(content), 40):
        damaged = content.copy()
        damaged[place] ^= 0x10
        bad.write_bytes(damaged)
        try:
            result = vp.compare([vp.open_probe(bad)], measures=FEW, **QUIET)
        except VitprobeError:
            found += 1
        else:
            check_same(result, expected)  # a bit of the zip's own that nothing depends on
    assert found > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "a.pt"}, "give a probe file a name that ends in .probe"),
        ({"out": "no/a.probe"}, "there is no folder"),
        ({"measures": ["nonsense"]}, "unknown measure 'nonsense'"),
        ({"images": "nowhere"}, "no images at 'nowhere'"),
        ({"model": 3}, "cannot probe int"),
    ],
)
def test_bad_arguments(pair, tmp_path, arguments, message):
    given = {"model": pair[0], "images": squares(8), "out": "a.probe", "measures": FEW} | arguments
    given["out"] = tmp_path / given["out"]
    with pytest.raises(VitprobeError, match=message):
        vp.probe(**given, **QUIET)
    assert not list(tmp_path.iterdir())


def test_names_that_make_no_file(pair, tmp_path):
    model = tiny("a/b", depth=2)
    with pytest.raises(ResultError, match="no probe file can be named after 'a/b'"):
        vp.compare([model], squares(8), FEW, probes=tmp_path, **QUIET)
