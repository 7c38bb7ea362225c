"""One picture: what a step costs in each framework, and how fast each feeds it, against the hand-written loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import Block

PANELS = [
    (("mlp", "off", "cpu"), "Tiny MLP, everything off", "lower is better"),
    (("mlp", "defaults", "cpu"), "Tiny MLP, defaults on", "lower is better"),
    (("logging", "five", "cpu"), "Tiny MLP, five scalars logged", "lower is better"),
    (("cnn", "epoch", "epoch"), "CNN, an epoch", "lower is better"),
    (("transformer", "steps", "cpu"), "Transformer", "lower is better"),
    (("data", "tensors-0", "rate"), "Samples/s of a TensorDataset", "higher is better"),
]
OURS, HAND, OTHERS = "#d1495b", "#444444", "#8fa3ad"


def draw(blocks: Sequence[Block], path: Path) -> bool:
    """Draw the panels that were measured; return whether matplotlib is installed and there was anything to draw."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    with_ratios = [block for block in blocks if any(row.ratio for row in block.rows)]
    found = {(block.workload, block.case, block.metric.name): block for block in with_ratios}
    panels = [(found[where], title, better) for where, title, better in PANELS if where in found]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (block, title, better) in zip(axes.flat, panels, strict=False):
        draw_panel(axis, block)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(f"ratio to the loop by hand, {better}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def draw_panel(axis: Any, block: Block) -> None:
    """A bar for each peer: the median ratio, with a line from the least to the most."""
    rows = [(row.peer, row.ratio) for row in block.rows if row.ratio is not None][::-1]
    colours = [OURS if peer == "trainkit" else HAND if peer == "hand" else OTHERS for peer, _ in rows]
    middles = [ratio.median for _, ratio in rows]
    errors = [[r.median - r.least for _, r in rows], [r.most - r.median for _, r in rows]]
    bars = axis.barh([peer for peer, _ in rows], middles, color=colours, xerr=errors, error_kw={"lw": 0.8})
    axis.bar_label(bars, [f"{middle:.2f}" for middle in middles], padding=6, fontsize=8)
    axis.axvline(1, color=HAND, lw=0.8, ls=":")
    axis.set_xlim(0, 1.18 * max(r.most for _, r in rows))
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
