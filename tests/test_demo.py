from __future__ import annotations

import pytest

import vitprobe as vp
from vitprobe.demo import BUNDLED, demo
from vitprobe.errors import ResultError


@pytest.mark.slow
def test_the_demo_compares_what_comes_with_vitprobe(tmp_path):
    page = demo(tmp_path / "demo")
    assert {path.suffix for path in (page.parent / "figures").iterdir()} == {".svg"}
    result = vp.open_result(page.parent / "results.nc")
    assert result.models == (*BUNDLED, "Untrained twin")
    assert result.provenance["images"]["count"] == 512
    for name in BUNDLED:
        described = result.describe(name)
        assert described["facts"]["heads"]["evidence"] == "config"
        assert described["training"]["schedule"]
        # Training leaves nothing of the evenness that attention starts with.
        entropy = result.attention_entropy(name, relative=True)
        assert entropy.min() < result.attention_entropy("Untrained twin", relative=True).min()
    with pytest.raises(ResultError, match="exists; give another --out"):
        demo(tmp_path / "demo")


@pytest.mark.slow
def test_the_demo_trains_and_compares(tmp_path):
    page = demo(tmp_path / "demo", train=True)
    assert page.name == "report.html"
    result = vp.open_result(page.parent / "results.nc")
    assert result.models == ("MAE", "MoCo-v3", "Supervised", "D-MAE", "Untrained")
    assert result.provenance["images"]["count"] == 360
    assert (result.cka("MAE", "MAE").values.diagonal() == 1).all()
    supervised = result.describe("Supervised")
    assert supervised["training"]["metrics"]["test_accuracy"] > 0.9
    # Training makes some heads look closely; at the start all attend almost evenly.
    sharpest = {n: float(result.attention_entropy(n, relative=True).min()) for n in result.models}
    assert max(sharpest["MAE"], sharpest["Supervised"]) < sharpest["Untrained"]
    with pytest.raises(ResultError, match="exists; give another --out"):
        demo(tmp_path / "demo")
