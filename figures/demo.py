"""The figure in README.md, from the result of `make demo`.

python figures/demo.py demo/report/results.nc figures/demo
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt

import vitprobe as vp

result = vp.open_result(sys.argv[1])
with vp.plots.paper_style():
    figure, axes = plt.subplots(
        1, 3, figsize=(6.75, 2.2), layout="constrained", width_ratios=(1, 1, 1.25)
    )
    vp.plots.cka_heatmap(result, "MAE", "Supervised", ax=axes[0])
    vp.plots.cka_heatmap(result, "MAE", "MAE", ax=axes[1])
    vp.plots.attention_overlay(result, "attention_entropy", ax=axes[2])
    vp.plots.save(figure, sys.argv[2])
