"""In-painting, out-painting and editing by class: what is given stays, the rest is drawn, whatever the order."""

from __future__ import annotations

import functools
from pathlib import Path

import cases
import numpy as np
import pytest

from ar_jax.config import UsageError, get_config
from ar_jax.data.protocol import Facts
from ar_jax.orders.protocol import within
from ar_jax.run import Run
from ar_jax.system import from_config

ROOT = Path(__file__).parents[2]
SYSTEMS = ("llamagen", "var", "mar", "rar", "arpg", "maskgit", "nar", "lpd", "maskgil")
LEFT, INSIDE = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
LEFT[:, :4], INSIDE[2:6, 2:6] = True, True
# Random parameters leave MaskGIT sure of a single code; its usual temperature, which falls to 0, shows little else.
HOT = {"maskgit": dict(temperature=4.0, temperature_schedule="constant")}
REGIONS = {"the left half": LEFT, "the middle": INSIDE, "all but the middle": ~INSIDE}


@functools.cache
def run_of(name: str) -> Run:
    """The smoke variant with parameters that are all away from zero."""
    config = get_config(ROOT / f"configs/{name}.py:smoke")
    system = from_config(config, Facts("image", (8, 8, 1), 17, tuple("0123456789")))
    return Run(system, cases.tiny_params(system), config)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("nar", "lpd", "maskgil") else name for name in SYSTEMS],
)
def test_a_given_region_stays_and_the_rest_is_drawn(name: str, region: str) -> None:
    run, rng = run_of(name), np.random.default_rng(0)
    given = run.encode(rng.uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32))
    mask = run.slots_within(REGIONS[region])
    drawn = [
        run.sample_tokens(labels, given=given, given_mask=mask, seed=seed, **HOT.get(name, {}))
        for labels, seed in (([1, 2], 0), ([1, 2], 1), ([3, 4], 0))
    ]
    kept = np.broadcast_to(mask, drawn[0].shape[:2])
    for tokens in drawn:
        np.testing.assert_array_equal(tokens[kept], given[kept].astype(tokens.dtype))
    assert kept.any() and not kept.all()
    # Another seed, another class; but random norms behind the embedding or the blocks all but forget the class.
    for other in drawn[1:2] if name in ("maskgit", "lpd") else drawn[1:]:
        assert (other[~kept] != drawn[0][~kept]).any()


@pytest.mark.parametrize("name", ["llamagen", "var", "mar"])
def test_what_is_given_changes_what_is_drawn_beside_it(name: str) -> None:
    """The seed is the same, only what is given differs. Raster and scales read what comes before, sets read everything."""
    run, mask = run_of(name), run_of(name).slots_within(np.arange(8)[:, None].repeat(8, axis=1) < 4)
    dark, light = (
        run.sample_tokens(
            [1], given=run.encode(np.full((1, 8, 8, 1), level, np.float32)), given_mask=mask, temperature=2.0
        )
        for level in (-1.0, 1.0)
    )
    free = ~np.broadcast_to(mask, dark.shape[:2])
    assert (dark[free] != light[free]).any()


def test_slots_are_within_a_region_where_all_their_pixels_are() -> None:
    pyramid = ((1, 1), (2, 2), (4, 4))
    half = np.zeros((8, 8), bool)
    half[:4] = True
    expected = [False] + [True, True, False, False] + [True] * 8 + [False] * 8
    np.testing.assert_array_equal(within(pyramid, half), expected)
    assert within(pyramid, np.ones((8, 8), bool)).all()
    np.testing.assert_array_equal(within(((2, 2, 3),), half[:2, :2]), [True] * 12)


@pytest.mark.parametrize(("layout", "shape"), [(((5,),), (8, 8)), (((8, 8),), (4, 4)), (((2, 2),), (8,))])
def test_a_region_that_tells_nothing_of_the_slots_is_refused(layout, shape) -> None:
    with pytest.raises(UsageError, match="does not tell which cells"):
        within(layout, np.ones(shape, bool))
