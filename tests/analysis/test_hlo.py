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
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", "tensor"),
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=(0,2,1,3) {'c'}", "data"),
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
    assert Program(text).seconds(clock=1e3) == pytest.approx(73e-3)


def entry(*lines: str) -> Program:
    return Program(
        "\n".join(["HloModule m", "", "ENTRY %main (x: f32[8]) -> f32[8] {", *(f"  {line}" for line in lines), "}"])
    )


def test_of_fusions_for_gpus_the_least_time_for_memory_counts_and_of_others_nothing():
    cost = (
        '{{"end_to_end_cycles":9.9,"exec_time_us":99.0,"compute_time_us":98.0,"memory_access_time_us":{},"name":"{}"}}'
    )
    both = f"{cost.format(2.5, '')},{cost.format('1.5e-2', 'indexing-cost-model')},{cost.format(0, 'sol')}"
    lines = [f'%f = f32[8] fusion(%x), kind=kLoop, calls=%g, backend_config={{"reification_cost":[{both}]}}']
    lines += [
        f'%h = f32[8] fusion(%x), kind=kLoop, calls=%g, backend_config={{"reification_cost":[{cost.format(4, "")}]}}'
    ]
    lines += [f'%s = f32[8] all-reduce-start(%h), backend_config={{"reification_cost":[{cost.format(0, "sol")}]}}']
    assert entry(*lines).seconds(clock=1e9) == pytest.approx(4.015e-6)
    assert entry("%f = f32[8] fusion(%x), kind=kLoop, calls=%g").seconds(clock=1e9) is None


@pytest.mark.parametrize(
    ("types", "kind", "size"),
    [  # of a group of 4: (4 - 1) / 4 of what is gathered, three times what each keeps, half as much again as what is summed
        ("(f32[2]{0}, f32[8]{0})", "all-gather", 24),
        ("((f32[2]{0}, bf16[4,1]{1,0}), (f32[8]{0}, /*index=1*/bf16[16,1]{1,0}))", "all-gather", 24 + 24),
        ("((f32[8]{0}, f32[16]{0}), (f32[2]{0}, f32[4]{0}))", "reduce-scatter", 72),
        ("((f32[8]{0}), f32[2]{0})", "reduce-scatter", 24),
        ("(f32[8]{0}, f32[4]{0})", "all-reduce", 72),
        ("f32[8]{0}", "all-reduce", 48),
        ("(f32[8]{0}, f32[8]{0}, u32[], u32[])", "all-to-all", 24),
    ],
)
def test_what_an_asynchronous_start_has_beside_its_results_is_not_sent(types, kind, size):
    start = f"%s = {types} {kind}-start(%x), channel_id=1, replica_groups=[1,4]<=[4]"
    (row,) = entry(start, f"%d = f32[8] {kind}-done(%s)").collectives({"fsdp": 4})
    assert (row.kind, row.axes, row.count, row.bytes) == (kind, "fsdp", 1, size)


@pytest.mark.parametrize(
    ("groups", "kind", "across"),
    [  # 8 devices in two nodes; a result of 64 bytes
        ("[2,4]<=[8]", "all-gather", 0),
        ("[4,2]<=[2,4]T(1,0)", "all-gather", 32),  # each device has a partner in the other node
        ("[1,8]<=[8]", "all-gather", 8),  # half of all goes to the other node, by four devices
        ("[1,8]<=[8]", "all-reduce", 16),
        ("[1,8]<=[8]", "reduce-scatter", 64),  # of 512 bytes half, by four
        ("[1,8]<=[8]", "all-to-all", 32),
        ("{{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}", "collective-permute", 64),
        ("{{0,1},{1,0},{4,5},{5,4}}", "collective-permute", 0),
    ],
)
def test_what_leaves_a_node_is_told(groups, kind, across):
    where = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    program = entry(f"%r = f32[16]{{0}} {kind}(%x), channel_id=1, {where}={groups}, dimensions={{0}}")
    (row,) = program.collectives({"data": 2, "fsdp": 4}, node=4)
    assert row.across == across <= row.bytes
    assert program.collectives({"data": 2, "fsdp": 4})[0].across == 0


def test_kernels_are_counted_by_name():
    named = 'metadata={op_name="jit(f)/mixer/shard_map/step_attention_forward/pallas_call"}'
    for target in ("__gpu$xla.gpu.triton", "tpu_custom_call"):
        call = f'custom-call(%x), custom_call_target="{target}", {named}'
        other = (
            f'%o = f32[8] custom-call(%x), custom_call_target="__cublas$gemm", {named.replace("pallas_call", "dot")}'
        )
        part = f"%p = f32[8] get-tuple-element(%c), index=0, {named}"
        program = entry(f"%c = f32[8] {call}", f"%d = f32[8] {call}", other, part)
        assert program.kernels() == {"step_attention_forward": 2}


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
