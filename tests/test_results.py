from __future__ import annotations

import numpy as np
import pytest
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe.errors import ResultError


@pytest.fixture(scope="module")
def result():
    models = [tiny("a"), tiny("b", depth=2, heads=2, seed=1)]
    return vp.compare(models, squares(), progress=False, device="cpu")


def test_save_and_open_round_trip(result, tmp_path):
    path = result.save(tmp_path / "run.nc")
    again = vp.open_result(path)
    assert again.provenance == result.provenance
    assert [p.name for p in tmp_path.iterdir()] == ["run.nc"]
    for node in result.tree.subtree:
        assert again.tree[node.path].to_dataset().identical(node.to_dataset()), node.path
    assert again.samples("a")["attention"].dtype == np.float16


def test_similarity_table(result):
    table = result.to_dataframe("cka")
    assert list(table) == [
        "model_a", "layer_a", "model_b", "layer_b", "cka", "standard_error", "low", "high",
    ]  # fmt: skip
    assert len(table) == 10 + 4 * 3 + 6
    row = table[(table.model_a == "a") & (table.model_b == "b") & (table.layer_a == 3)].iloc[1]
    assert row.cka == float(result.cka("a", "b")[3, 1])


def test_attention_table(result):
    table = result.to_dataframe("attention_distance")
    assert len(table) == 3 * 3 + 2 * 2
    row = table[(table.model == "a") & (table.layer == 2) & (table["head"] == 1)].iloc[0]
    assert row.attention_distance == pytest.approx(float(result.attention_distance("a")[2, 1]))
    relative = result.attention_distance("a", relative=True)
    assert row.relative == pytest.approx(float(relative[2, 1]), rel=1e-5)
    assert (row.images, row.undefined_rows) == (40, 0)
    values = result.per_image("attention_distance", "a")[:, 2, 1].values
    assert row.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=1e-4)
    assert "relative" not in result.to_dataframe("sink_mass")
    assert len(result.to_dataframe("first_direction_share")) == 7


def test_unequal_heads_are_nan_where_they_do_not_exist(result):
    both = result.attention_distance("a"), result.attention_distance("b")
    assert [array.shape for array in both] == [(3, 3), (2, 2)]


def test_the_interval_of_a_layer_with_itself_is_undefined(result):
    low, high = result.interval("cka", "a", "a")
    assert np.isnan(np.diag(low)).all()
    assert not np.isnan(low.values[~np.eye(4, dtype=bool)]).any()
    assert (high.fillna(1) <= 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.cka("a", "c"), "no model 'c' in this result"),
        (lambda r: r.attention("attention_distanc", "a"), "Did you mean 'attention_distance'"),
        (lambda r: r.attention("sink_mass", "a", relative=True), "'sink_mass' has no relative"),
        (lambda r: r.interval("sink_mass", "a", "b"), "intervals are kept for 'cka'"),
        (lambda r: r.interval("cka", "a", "b", level=95), "a level of 95 is no probability"),
        (lambda r: r.to_dataframe("rsa"), "'rsa' was not measured"),
    ],
)
def test_refusals(result, call, message):
    with pytest.raises(ResultError, match=message):
        call(result)


def test_files_that_are_no_results(tmp_path, result):
    with pytest.raises(ResultError, match="no result file"):
        vp.open_result(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(ResultError, match="is no whole vitprobe result"):
        vp.open_result(tmp_path / "text.nc")
    path = result.save(tmp_path / "cut.nc")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ResultError, match="is no whole vitprobe result"):
        vp.open_result(path)
    result.tree["similarity"].to_dataset().to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ResultError, match="is no vitprobe result of format 1"):
        vp.open_result(tmp_path / "other.nc")


def test_a_folder_that_does_not_exist(result, tmp_path):
    with pytest.raises(ResultError, match=r"cannot write .*run.nc.*: there is no folder"):
        result.save(tmp_path / "no" / "run.nc")
    assert list(tmp_path.iterdir()) == []
