from __future__ import annotations

import pytest

import vitprobe as vp
from vitprobe.demo import demo
from vitprobe.errors import ResultError


@pytest.mark.slow
def test_the_demo_trains_and_compares(tmp_path):
    page = demo(tmp_path / "demo")
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
