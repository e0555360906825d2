"""However a run is cut over devices, it computes what one device computes; and what is cut takes less room on each."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.analysis.hlo import Program
from ar_jax.config import UsageError, get_config
from ar_jax.data import pipeline
from ar_jax.kernels.step_attention import ROUTES
from ar_jax.run import load_data
from ar_jax.system import compiled as sampler
from ar_jax.system import from_config
from ar_jax.training.mesh import make_mesh
from ar_jax.training.paths import named_leaves
from ar_jax.training.program import make_program
from ar_jax.training.sharding import replicated

CONFIGS = Path(__file__).parents[2] / "configs"
DEVICES = jax.device_count()
MODELS = {
    "softmax": ("digits", {}),
    "linear": ("digits", {"kind": "linear", "num_heads": 4}),
    "hybrid": ("digits", {"kind": "linear : softmax", "num_heads": 4}),
    "var": ("var", {}),
    "mar": ("mar", {}),
}
MESHES = {
    "data": dict(data=-1),
    "fsdp": dict(fsdp=-1),
    "tensor": dict(data=-1, tensor=2),
    "sequence": dict(data=-1, sequence=2),
    "sequence alone": dict(sequence=4),
    "fsdp and tensor": dict(fsdp=-1, tensor=2),
    "all": dict(data=1, fsdp=-1, sequence=2, tensor=2),
}
ACROSS = {f"across={name}": ("digits", {"kind": "softmax", "across": name}) for name in ROUTES}
FAST = {("hybrid", "all"), ("softmax", "fsdp and tensor")}
pytestmark = pytest.mark.skipif(DEVICES < 4, reason="needs 4 devices")


def config_of(model: str, mesh: dict[str, int]) -> Any:
    name, mixer = (MODELS | ACROSS)[model]
    config = get_config(CONFIGS / f"{name}.py:smoke")
    if mixer:
        config.model.mixer = mixer
    config.mesh, config.train.batch_size, config.train.num_steps = mesh, 16, 20
    # Adam's first steps divide by a gradient's size: where that is rounding alone, signs would differ, and so would steps.
    config.optimizer = dict(kind="sgd", learning_rate=0.1)
    return config


@functools.cache
def data_of(model: str) -> Any:
    return load_data(config_of(model, dict(data=1)))


@functools.cache
def trained(model: str, mesh: str, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and the parameters in the end."""
    config = config_of(model, MESHES[mesh] if mesh else dict(data=1))
    program = make_program(from_config(config, data_of(model)), config)
    batches = pipeline.train_iterator(data_of(model), 16, 0)
    state, losses = program.init(), []
    first = program.put(next(batches))
    compiled = program.compile(first)
    for batch in itertools.chain([first], (program.put(next(batches)) for _ in range(steps - 1))):
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, {name: np.asarray(leaf) for name, leaf in named_leaves(state.params).items()}


@pytest.mark.parametrize(
    ("model", "mesh"),
    [pytest.param(*row, marks=() if row in FAST else pytest.mark.slow) for row in itertools.product(MODELS, MESHES)],
)
def test_any_mesh_trains_like_one_device(model: str, mesh: str) -> None:
    steps = 20
    losses, params = trained(model, mesh, steps)
    expected, alone = trained(model, "", steps)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] != losses[0]
    for name, leaf in alone.items():
        np.testing.assert_allclose(params[name], leaf, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", ACROSS)
def test_whatever_way_a_sequence_takes_across_devices_trains_like_one_device(way: str) -> None:
    losses, params = trained(way, "sequence", 20)
    expected, alone = trained("softmax", "", 20)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, leaf in alone.items():
        np.testing.assert_allclose(params[name], leaf, atol=1e-5, err_msg=name)


def test_the_way_across_devices_that_a_config_names_is_the_one_that_is_taken() -> None:
    batch = {
        name: jax.numpy.asarray(rows) for name, rows in next(pipeline.train_iterator(data_of("softmax"), 4, 0)).items()
    }
    exchanges = {}
    for way in ACROSS:
        system = from_config(config_of(way, MESHES["sequence"]), data_of(way))
        params = jax.eval_shape(system.init, jax.random.key(0))
        with jax.set_mesh(make_mesh(MESHES["sequence"])):
            loss = jax.make_jaxpr(lambda p, s=system: s.loss(p, batch, jax.random.key(0), jax.numpy.float32(0))[0])
            text = str(loss(params))
        exchanges[way] = text.count("= ppermute["), text.count("= psum")
    assert exchanges["across=zigzag"][0] > exchanges["across=ring"][0] > 0 == exchanges["across=tree"][0]
    assert exchanges["across=tree"][1] > exchanges["across=gather"][1] == exchanges["across=ring"][1]
    assert exchanges["across=gather"][0] == 0


def test_a_way_across_devices_that_does_not_exist_is_named_before_anything_is_compiled() -> None:
    config = config_of("across=ring", MESHES["sequence"])
    config.model.mixer.across = "zigzig"
    with pytest.raises(UsageError, match="config.model.mixer.across='zigzig' is unknown. Did you mean 'zigzag'"):
        make_program(from_config(config, data_of("softmax")), config)


def test_no_device_brings_a_sequence_together() -> None:
    """Softmax and linear mixers, forward and backward: what is gathered are numbers of places at most."""
    config = config_of("hybrid", dict(sequence=4))
    program = make_program(from_config(config, data_of("hybrid")), config)
    compiled = program.compile(program.put(next(pipeline.train_iterator(data_of("hybrid"), 16, 0))))
    text = compiled.as_text()
    sent = {row.kind: row.axes for row in Program(text).collectives({"sequence": 4})}
    assert sent["collective-permute"] == sent["all-reduce"] == "sequence"
    gathers = [line for line in text.splitlines() if " all-gather" in line]
    assert not [line for line in gathers if " f32[" in line], gathers


@pytest.mark.slow
def test_a_cache_is_cut_where_sequences_are_and_only_what_was_read_in_it_travels() -> None:
    config = config_of("softmax", dict(sequence=4))
    system = from_config(config, data_of("softmax"))
    rows, labels = np.zeros(4, bool), np.arange(4) % 3
    args = (system.init(jax.random.key(0)), jax.random.key(9), labels, rows, system.drawing(top_k=1), None)
    expected = sampler(system.sample)(*args)
    mesh = make_mesh(dict(sequence=4))
    args = (jax.device_put(args[0], replicated(mesh)), *args[1:])
    np.testing.assert_array_equal(sampler(system.sample)(*args), expected)
    with jax.set_mesh(mesh):
        program = Program(sampler(system.sample).jitted(mesh).lower(*args).compile().as_text())
    assert {row.kind for row in program.collectives({"sequence": 4})} == {"all-reduce"}
    caches = {
        shape for shape, _, _ in program.arrays() if shape[-3:-2] == (4,) and shape[-1:] == (8,)
    }  # [..., heads, S, H]
    assert caches and {shape[-2] for shape in caches} <= {1, 16}  # of 64 places; and the one that is new


def test_fully_sharded_state_takes_a_part_of_the_room_on_each_device() -> None:
    """Of the parameters that are worth cutting; of the compiled program, as the compiler has planned its memory."""
    sizes = []
    for parts in (1, 2, 4):
        config = get_config(CONFIGS / "digits.py:base")
        config.mesh, config.train.batch_size = dict(fsdp=parts), 16
        data = data_of("softmax")
        program = make_program(from_config(config, data), config)
        compiled = program.compile(program.put(next(pipeline.train_iterator(data, 16, 0))))
        sizes.append(compiled.memory_analysis().argument_size_in_bytes)
    cut = 2 * (sizes[0] - sizes[1])  # what half of it was saved by two devices; the rest is small, and whole on each
    assert cut > 0.95 * sizes[0] and sizes[0] - sizes[2] == pytest.approx(0.75 * cut, rel=0.01)
