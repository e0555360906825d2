"""Orders: which tokens come when. A new order is a function of a layout in one file, and a line in this table."""

from ar_jax.orders.blocks import blocks
from ar_jax.orders.coarse_to_fine import coarse_to_fine
from ar_jax.orders.diagonal import diagonal
from ar_jax.orders.locality import locality
from ar_jax.orders.nearest import nearest
from ar_jax.orders.next_scale import next_scale, subsample
from ar_jax.orders.one_of import one_of
from ar_jax.orders.parallel_groups import parallel_groups
from ar_jax.orders.patches import patches
from ar_jax.orders.random import random
from ar_jax.orders.raster import column, raster, right_to_left
from ar_jax.orders.spiral import spiral

ORDERS = {
    "raster": raster,
    "column": column,
    "right_to_left": right_to_left,
    "diagonal": diagonal,
    "spiral": spiral,
    "random": random,
    "nearest": nearest,
    "next_scale": next_scale,
    "subsample": subsample,
    "parallel_groups": parallel_groups,
    "blocks": blocks,
    "locality": locality,
    "coarse_to_fine": coarse_to_fine,
    "patches": patches,
    "one_of": one_of,
}
