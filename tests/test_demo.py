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
    assert result.models == ("MAE", "Supervised", "Random")
    assert result.provenance["images"]["count"] == 360
    assert (result.cka("MAE", "MAE").values.diagonal() == 1).all()
    supervised = result.describe("Supervised")
    assert supervised["training"]["metrics"]["test_accuracy"] > 0.9
    # A random initialisation attends almost uniformly; what was trained does not.
    entropy = {
        name: float(result.attention_entropy(name, relative=True).mean()) for name in result.models
    }
    assert entropy["Random"] > 0.99 > entropy["MAE"]
    with pytest.raises(ResultError, match="exists; give another --out"):
        demo(tmp_path / "demo")
