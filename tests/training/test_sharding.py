import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ar_jax.config import UsageError
from ar_jax.training.mesh import make_mesh
from ar_jax.training.sharding import LAYOUTS, batch_sharding, choose_layout, put_batch, tree_shardings

needs_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def specs(tree, layout):
    mesh = make_mesh({"data": -1})
    return jax.tree.map(lambda s: s.spec, tree_shardings(tree, mesh, LAYOUTS[layout]))


@needs_devices
def test_fsdp_cuts_the_embed_axis_of_kernels_and_of_their_moments_and_replicates_the_rest():
    params = {
        "mlp": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)},
        "embed": {"embedding": jnp.zeros((9, 8))},
        "odd": {"kernel": jnp.zeros((7, 4))},
    }
    params["layers"] = {"kernel": jnp.zeros((2, 8, 16))}
    expected = {
        "mlp": {"kernel": P("data", None), "bias": P()},
        "embed": {"embedding": P(None, "data")},
        "odd": {"kernel": P()},
    }
    expected["layers"] = {"kernel": P(None, "data", None)}
    found = specs({"params": params, "mu": params, "count": jnp.zeros(())}, "fsdp")
    assert found == {"params": expected, "mu": expected, "count": P()}


def test_the_replicated_layout_replicates_every_parameter():
    assert specs({"mlp": {"kernel": jnp.zeros((8, 16))}}, "replicated") == {"mlp": {"kernel": P()}}


def test_a_batch_is_spread_over_the_data_axis_in_order():
    mesh, rows = make_mesh({"data": -1}), np.arange(8)
    placed = put_batch({"rows": rows}, batch_sharding(mesh, LAYOUTS["replicated"]))["rows"]
    assert placed.sharding.spec == P("data")
    np.testing.assert_array_equal(placed, rows)


def test_an_unknown_layout_and_a_missing_axis_are_refused():
    with pytest.raises(UsageError, match="Did you mean 'fsdp'"):
        choose_layout("fdsp", make_mesh({"data": -1}))
    with pytest.raises(UsageError, match="no axis 'data'"):
        choose_layout("fsdp", make_mesh({"model": -1}))
