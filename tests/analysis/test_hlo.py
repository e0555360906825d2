"""Collectives are read from a compiled program as they were written: kind, axes, how often, how many bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ar_jax.analysis.hlo import BYTES, Program

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def test_collectives_are_counted_with_the_turns_of_their_loops():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def form(x):
        def turn(x, _):
            return jnp.tanh(jax.lax.psum(x, "tensor")), None

        x, _ = jax.lax.scan(turn, x, None, length=5)
        x = jax.lax.all_gather(x, "data", tiled=True)
        return jax.lax.psum(jnp.sin(x), ("data", "tensor"))

    mapped = jax.shard_map(form, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.zeros((8, 256))).compile().as_text()
    found = {(row.kind, row.axes): (row.count, row.bytes) for row in Program(text).collectives(dict(mesh.shape))}
    assert found == {
        ("all-reduce", "tensor"): (5, 5 * 4 * 256 * 4),  # [4, 256] float32, there and back by halves
        ("all-gather", "data"): (1, 4 * 256 * 4),
        ("all-reduce", "data x tensor"): (1, 2 * 8 * 256 * 4 * 3 // 4),
    }


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,2},{1,3}}", "data"),
        ("[2,2]<=[4]", "tensor"),
        ("[2,2]<=[2,2]T(1,0)", "data"),
        ("[1,4]<=[4]", "data x tensor"),
        ("mesh['a'=2,'b'=2] {'a'}", "data"),
        ("{{0,1,2}}", "?"),
    ],
)
def test_groups_are_read_in_each_of_their_notations(groups, axes):
    line = f"  %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    rows = Program(f"HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}\n").collectives(
        {"data": 2, "tensor": 2}
    )
    assert [(row.kind, row.axes) for row in rows] == [("all-reduce", axes)]


def test_estimated_cycles_count_as_often_as_their_loop_turns():
    text = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %g = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"3"}
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
}
"""
    assert Program(text).cycles() == 3 + 7 * 10


def test_numbers_have_the_bytes_of_their_types():
    for name, kind in {"bf16": jnp.bfloat16, "f32": np.float32, "s8": np.int8, "pred": np.bool_}.items():
        assert BYTES[name] == jnp.dtype(kind).itemsize


def test_a_collective_that_is_spread_over_fusions_counts_once():
    part = "  %g = f32[8]{0} all-gather(%p), channel_id=7, replica_groups={{0,1}}, dimensions={0}"
    text = "\n".join(
        [
            *("HloModule m", "", "%async_collective_fusion.1 (p: f32[4]) -> f32[8] {", part, "}"),
            *("", "%async_collective_fusion.2 (p: f32[4]) -> f32[8] {", part, "}", ""),
            "ENTRY %main (x: f32[4]) -> f32[8] {",
            *(f"  %a.{i} = f32[8] fusion(%x), kind=kCustom, calls=%async_collective_fusion.{i}" for i in (1, 2)),
            *(part.replace("%g", f"%b.{i}") for i in (1, 2)),
            "}",
        ]
    )
    (row,) = Program(text).collectives({"data": 2})
    assert (row.kind, row.count, row.bytes) == ("all-gather", 3, 3 * 16)


def test_a_sum_of_which_each_device_keeps_its_part_is_a_reduce_scatter_and_what_travels_together_is_summed():
    arrays = "(f32[8]{0}, f32[4]{0})"
    text = f"""HloModule m

%all-reduce-scatter.1 (p: f32[8], q: f32[4]) -> (f32[4], f32[2]) {{
  %r = {arrays} all-reduce(%p, %q), channel_id=7, replica_groups={{{{0,1}}}}, to_apply=%add
}}

ENTRY %main (x: f32[8], y: f32[4]) -> f32[4] {{
  %f = (f32[4], f32[2]) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.1
  %s = {arrays} all-reduce(%x, %y), channel_id=8, replica_groups={{{{0,1}}}}, to_apply=%add
}}
"""
    found = {row.kind: row.bytes for row in Program(text).collectives({"data": 2})}
    assert found == {"reduce-scatter": 24, "all-reduce": 48}
