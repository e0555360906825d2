"""Feeds: an order says when, a feed says with what. A new feed is a function of an order, and a line in this table."""

from ar_jax.feeds.mask import mask
from ar_jax.feeds.merge import merge
from ar_jax.feeds.nearby import nearby
from ar_jax.feeds.neighbors import neighbors
from ar_jax.feeds.protocol import Feed
from ar_jax.feeds.query import query
from ar_jax.feeds.recent import recent
from ar_jax.feeds.refine import refine
from ar_jax.feeds.resize import follows_first_axis, resize
from ar_jax.feeds.shift import shift
from ar_jax.orders.protocol import Order

__all__ = ["FEEDS", "auto"]


def auto(order: Order, num_prefix: int, resampled: bool = False) -> Feed:
    """The feed that serves an order best: shift for one token a step, resize for scales, rows and frames, else query."""
    if max(order.sizes) == 1:
        return shift(order, num_prefix)
    return resize(order, num_prefix, resampled) if follows_first_axis(order) else query(order, num_prefix)


FEEDS = {
    "auto": auto,
    "shift": shift,
    "query": query,
    "resize": resize,
    "mask": mask,
    "neighbors": neighbors,
    "merge": merge,
    "recent": recent,
    "refine": refine,
    "nearby": nearby,
}
