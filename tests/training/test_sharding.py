import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ar_jax.config import UsageError
from ar_jax.training.mesh import make_mesh
from ar_jax.training.sharding import RULES, batch_sharding, checked_rules, own_rows, put_batch, tree_shardings

needs_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "block_0": {
        "mixer": {
            "query": {"kernel": shape(3, 8, 16), "bias": shape(3, 16)},
            "out": {"kernel": shape(3, 16, 8)},
            "poles": shape(3, 2, 16),
        },
        "mlp": {"up": {"kernel": shape(3, 8, 32)}, "down": {"kernel": shape(3, 32, 8)}},
        "norm": {"scale": shape(3, 8)},
    },
    "embed": {"embedding": shape(4096, 8)},
    "odd": {"kernel": shape(130, 1024)},
}


def specs(axes, tree, rules=RULES):
    return jax.tree.map(lambda s: s.spec, tree_shardings(tree, make_mesh(axes), rules))


@needs_devices
def test_parameters_and_their_moments_are_cut_by_the_rules_and_what_is_small_is_everywhere():
    expected = {
        "block_0": {
            "mixer": {
                "query": {"kernel": P(None, "fsdp", "tensor"), "bias": P()},
                "out": {"kernel": P(None, "tensor", "fsdp")},
                "poles": P(),
            },
            "mlp": {"up": {"kernel": P(None, "fsdp", "tensor")}, "down": {"kernel": P(None, "tensor", "fsdp")}},
            "norm": {"scale": P()},
        },
        "embed": {"embedding": P("fsdp", None)},
        "odd": {"kernel": P(None, "fsdp")},
    }
    found = specs({"fsdp": 2, "tensor": 2}, {"params": PARAMS, "mu": PARAMS, "count": shape()})
    assert found == {"params": expected, "mu": expected, "count": P()}
    whole = specs({"data": -1}, {"params": PARAMS})
    assert set(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, P))) == {P()}


@needs_devices
def test_a_rule_of_the_config_comes_first():
    rules = checked_rules([["embedding$", ["vocab", None]], ("odd/kernel", ())])
    found = specs(
        {"fsdp": 2, "tensor": 2}, {"params": {"a": {"embedding": shape(4, 8)}, "odd": {"kernel": shape(4, 4)}}}, rules
    )
    assert found["params"] == {"a": {"embedding": P("tensor", None)}, "odd": {"kernel": P()}}


@needs_devices
@pytest.mark.parametrize(
    ("params", "rules", "said"),
    [
        (
            {"mlp": {"up": {"kernel": shape(8, 6)}}},
            (),
            r"tensor=4 does not divide axis 'mlp' of mlp/up/kernel.*\[8, 6\]",
        ),
        ({"a": {"b": {"c": {"d": shape(8, 6)}}}}, (), "No rule says how a/b/c/d"),
        ({"a": {"kernel": shape(8)}}, [("kernel", ("embed", None))], "names 2 axes, but a/kernel"),
        ({}, [("kernel", ("embde",))], "Did you mean 'embed'"),
        ({}, [("kernel(", ("embed",))], "no regular expression"),
        ({}, ["kernel"], "write pairs"),
    ],
)
def test_what_no_rule_matches_or_no_axis_divides_is_named(params, rules, said):
    with pytest.raises(UsageError, match=said):
        specs({"tensor": 4}, {"params": params}, checked_rules(rules))


@needs_devices
@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ({"data": -1}, P(("data",))),
        ({"data": 2, "fsdp": 2}, P(("data", "fsdp"))),
        ({"tensor": 2, "fsdp": 2}, P(("fsdp",))),
        ({"sequence": 4}, P(None)),
    ],
)
def test_a_batch_is_spread_over_data_and_fsdp_in_order(axes, spec):
    rows, sharding = np.arange(8), batch_sharding(make_mesh(axes))
    np.testing.assert_array_equal(own_rows(sharding, 8), rows)  # a single process has all
    placed = put_batch({"rows": rows}, sharding, 8)["rows"]
    assert placed.sharding.spec == spec
    np.testing.assert_array_equal(placed, rows)
