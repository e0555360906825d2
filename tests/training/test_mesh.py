import jax
import pytest
from jax.sharding import AxisType

from ar_jax.config import UsageError
from ar_jax.training.mesh import make_mesh


@pytest.mark.parametrize("axes", [{"data": -1}, {"data": -1, "tensor": 1}, {"data": 1}])
def test_a_mesh_has_the_asked_axes_and_leaves_sharding_to_the_compiler(axes):
    mesh = make_mesh(axes)
    assert mesh.axis_names == tuple(axes)
    assert mesh.size == (jax.device_count() if -1 in axes.values() else 1)
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"data": 0},
        {"data": -2},
        {"data": 1.5},
        {"data": True},
        {"data": 999},
        {"data": -1, "tensor": -1},
        {"data": -1, "tensor": 999},
        {"data": -1, "model": 1},
    ],
)
def test_sizes_that_make_no_mesh_are_refused(axes):
    with pytest.raises(UsageError, match="config.mesh"):
        make_mesh(axes)
