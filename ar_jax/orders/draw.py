"""Draws every order: python -m ar_jax.orders.draw docs/orders.png."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ar_jax.orders import ORDERS
from ar_jax.orders.protocol import Layout, Order

SIDE = 8
PYRAMID: Layout = ((1, 1), (2, 2), (4, 4), (8, 8))
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("diagonal", {"parallel": True}),
    ("spiral", {"outward": True}),
    ("random", {"num_steps": 8}),
    ("nearest", {"start": (3, 3)}),
    ("blocks", {"block": 4}),
    ("locality", {"num_steps": 12}),
)


def steps(order: Order) -> np.ndarray:
    """[L] the step of each slot; of a shuffled order, for one draw."""
    slots = np.asarray(order.slots(jax.random.key(0), 1))[0]
    found = np.empty(order.length, int)
    found[slots] = np.repeat(np.arange(order.num_steps), order.sizes)
    return found


def draw(path: str) -> None:
    """Writes one panel per order, on a grid of 8 x 8: a cell's number and colour are its step."""
    rows: list[tuple[str, dict[str, Any]]] = [(kind, {}) for kind in ORDERS] + list(VARIANTS)
    panels = [(kind, options, PYRAMID if kind == "next_scale" else ((SIDE, SIDE),)) for kind, options in rows]
    columns = 4
    figure = Figure(figsize=(3.1 * columns, 3.3 * -(-len(panels) // columns)), dpi=75)
    axes = figure.subplots(-(-len(panels) // columns), columns).ravel()
    for axis, (kind, options, layout) in zip(axes, panels, strict=False):
        order = ORDERS[kind](layout, **options)
        told = ", ".join(f"{k}={v}" for k, v in options.items())
        axis.set_title(f"{kind}{f' ({told})' if told else ''}: {order.num_steps} steps", fontsize=10)
        offset = 0
        for scale, grid in enumerate(layout):  # the grids of a pyramid stand side by side
            size = int(np.prod(grid))
            cells = steps(order)[sum(int(np.prod(g)) for g in layout[:scale]) :][:size].reshape(grid)
            _cells(axis, cells, order.num_steps, offset)
            offset += grid[1] + 1
        axis.set_xlim(-0.1, offset - 0.9)
        axis.set_ylim(max(g[0] for g in layout) + 0.1, -0.1)
    for axis in axes:
        axis.set_aspect("equal")
        axis.axis("off")
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(path)


def _cells(axis: Any, cells: np.ndarray, num_steps: int, offset: int) -> None:
    colours = colormaps["viridis"](cells / max(num_steps - 1, 1))
    axis.imshow(colours, extent=(offset, offset + cells.shape[1], cells.shape[0], 0), interpolation="nearest")
    for (row, col), step in np.ndenumerate(cells):
        shade = "white" if step < 0.6 * num_steps else "black"
        axis.text(offset + col + 0.5, row + 0.5, str(step), ha="center", va="center", fontsize=6, color=shade)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ar_jax.orders.draw FILE.png")
    draw(sys.argv[1])
