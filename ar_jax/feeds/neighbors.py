"""Neighbours: the cells of the step before answer for the cells beside them, each along every axis (NAR, S016)."""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import NOWHERE, Feed, chunk, groups, prefix_source, prefix_steps
from ar_jax.orders.protocol import Order


def neighbors(order: Order, num_prefix: int) -> Feed:
    """Step k is fed all tokens of step k-1; the token of a cell is asked of all cells of that step that touch it.

    A fed token has one output for each direction in which cells touch (arXiv:2503.10696, sec. 3.2): in an image that starts
    in its corner one for the cell on the right and one for the cell below. Where several answer for a cell, their logits are
    averaged; for the first cell all outputs of the last prefix token do.

    Args:
      order: starts with one cell, and each further cell touches one of the step before: "nearest", or a parallel "diagonal".
      num_prefix: prefix tokens.

    Raises:
      UsageError: the order does not grow from cell to cell.
    """
    slots = np.argsort(order.step, kind="stable")
    ranks, cells = groups(order.sizes), order.position[slots].astype(int)
    if order.shuffled or len(ranks[0]) > 1 or len(ranks) < 2:
        raise _no_growth()
    touching = [
        cells[now][:, None] - cells[before][None]  # [cells of the step, cells before it, axes]
        for before, now in zip(ranks, ranks[1:], strict=False)
    ]
    directions = _directions(touching)
    chunks = [
        chunk(
            source=[prefix_source(p) for p in range(num_prefix)],
            place=np.full(num_prefix, NOWHERE),
            target=np.full(num_prefix, NOWHERE),
            step=prefix_steps(num_prefix),
            asked=np.full((1, len(directions)), num_prefix - 1),
            answers=ranks[0],
        )
    ]
    for step, (before, now, apart) in enumerate(zip(ranks, ranks[1:], touching, strict=False), start=1):
        beside = (apart[:, :, None] == directions[None, None]).all(axis=-1)  # [now, before, direction]
        if not beside.any(axis=(1, 2)).all():
            raise _no_growth()
        chunks.append(
            chunk(
                source=before,
                place=before,
                target=np.full(len(before), NOWHERE),
                step=np.full(len(before), step),
                asked=np.where(beside.any(axis=1), beside.argmax(axis=1), NOWHERE),
                answers=now,
            )
        )
    return Feed(tuple(chunks))


def _directions(touching: list[np.ndarray]) -> np.ndarray:
    """[R, axes] steps of one cell that lead from a step to the next: the last axis first, forwards before backwards."""
    apart = np.concatenate([a.reshape(-1, a.shape[-1]) for a in touching])
    unit = np.eye(apart.shape[1], dtype=int)[::-1]
    found = [sign * axis for sign in (1, -1) for axis in unit if (apart == sign * axis).all(axis=1).any()]
    return np.asarray(found, int).reshape(-1, apart.shape[1])


def _no_growth() -> UsageError:
    return UsageError(
        "feed 'neighbors' needs an order that grows from one cell to the cells beside it, such as 'nearest'; "
        "else use feed 'query'."
    )
