import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_training import Toy

from ar_jax.system import compiled
from ar_jax.training.mesh import make_mesh
from ar_jax.training.paths import named_leaves, without
from ar_jax.training.state import create_state, step_key
from ar_jax.training.step import compile_step, make_train_step
from ar_jax.training.tables import OPTIMIZERS

SEED = 3


def schedule(count):
    return 0.01 * (1.0 + count)


def make(kind="adamw", task=None, ema_decay=0.0, **options):
    """The jitted step and the first state."""
    task, optimizer = task or Toy(), OPTIMIZERS[kind](schedule)
    step = make_train_step(task, optimizer, schedule, seed=SEED, num_steps=10, ema_decay=ema_decay, **options)
    return jax.jit(step), jax.jit(lambda: create_state(task, optimizer, SEED, ema_decay > 0))()


def batch(seed=0, size=8):
    x = np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}


def broken():
    return {"x": np.full((8, 4), np.nan, np.float32), "y": np.zeros(8, np.float32)}


def test_a_step_is_one_update_of_the_optimizer_with_the_key_of_that_step():
    step, state = make("sgd")
    new, metrics = step(state, batch())
    loss = lambda p: Toy().loss(state.params | p, batch(), step_key(SEED, 0), jnp.float32(0))[0]  # noqa: E731
    trained = without(state.params, Toy().frozen)
    value, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    expected = jax.tree.map(lambda p, g: p - 0.01 * g, trained, gradients)
    chex.assert_trees_all_close(without(new.params, Toy().frozen), expected, atol=1e-6)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-6)
    assert new.step == 1 and metrics["learning_rate"] == pytest.approx(0.01)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    task = Toy(noise=0.0)
    whole, state = make("sgd", task)
    pieces, _ = make("sgd", task, accumulate_steps=4)
    for seed in range(2):
        (state, metrics), (same, pieced) = whole(state, batch(seed)), pieces(state, batch(seed))
        trained = [without(params, task.frozen) for params in (state.params, same.params)]
        chex.assert_trees_all_close(*trained, atol=1e-6)  # sums in another order
        chex.assert_trees_all_close(state.opt_state, same.opt_state, atol=1e-6)
        chex.assert_trees_all_close(metrics, pieced, rtol=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_leaves_cost_no_memory_and_no_decay_and_change_by_replacement_alone(kind):
    task, optimizer = Toy(), OPTIMIZERS[kind](schedule, weight_decay=0.5)
    task.frozen = lambda name: name.startswith("seen/") or name == "head/kernel"
    step = jax.jit(make_train_step(task, optimizer, schedule, seed=SEED, num_steps=10, ema_decay=0.9))
    state = jax.jit(lambda: create_state(task, optimizer, SEED, True))()
    new, _ = step(state, batch())
    memory = "|".join(named_leaves((new.opt_state, new.ema)))
    assert "hidden/kernel" in memory and "head/kernel" not in memory and "seen" not in memory
    np.testing.assert_array_equal(new.params["head"]["kernel"], state.params["head"]["kernel"])
    np.testing.assert_allclose(new.params["seen"]["mean"], 0.1 * batch()["x"].mean(axis=0), atol=1e-7)
    assert new.params["seen"]["count"] == 8 and not np.allclose(new.params["head"]["bias"], 0)


def test_micro_batches_replace_one_after_another():
    step, state = make("sgd", accumulate_steps=4)
    new, _ = step(state, batch())
    mean = np.zeros(4, np.float32)
    for micro in range(4):  # rows i, i + 4
        mean = 0.9 * mean + 0.1 * batch()["x"][micro::4].mean(axis=0)
    np.testing.assert_allclose(new.params["seen"]["mean"], mean, atol=1e-6)
    assert new.params["seen"]["count"] == 8


@pytest.mark.parametrize("name", ["seen/men", "head/bias"])
def test_only_frozen_leaves_that_exist_can_be_replaced(name):
    class Wrong(Toy):
        def replaced(self, params, batch):
            return {name: jnp.zeros(1)}

    step, state = make("sgd", Wrong())
    with pytest.raises(ValueError, match=f"replaces '{name}'"):
        step(state, batch())


def test_micro_batches_have_different_keys():
    class KeyOnly(Toy):
        def loss(self, params, batch, key, progress):
            return jax.random.uniform(key, ()) + 0 * params["head"]["bias"].sum(), {}, {}

    step, state = make("sgd", KeyOnly(), accumulate_steps=2)
    losses = [float(jax.random.uniform(k, ())) for k in jax.random.split(step_key(SEED, 0), 2)]
    assert step(state, batch())[1]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-6) and losses[0] != losses[1]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(kind):
    step, state = make(kind, ema_decay=0.9)
    state, _ = step(state, batch())
    after, metrics = step(state, broken())
    chex.assert_trees_all_equal((after.params, after.opt_state, after.ema), (state.params, state.opt_state, state.ema))
    assert (after.step, after.skipped, after.skipped_total) == (2, 1, 1) and metrics["skipped_total"] == 1
    again, _ = step(after, broken())
    assert (again.skipped, again.skipped_total) == (2, 2)
    good, metrics = step(again, batch())
    assert (good.step, good.skipped, good.skipped_total) == (4, 0, 2)
    assert metrics["learning_rate"] == pytest.approx(0.02)  # of the second update, as the optimiser uses it


def test_a_finite_loss_with_a_gradient_that_is_not_finite_is_skipped():
    class Cliff(Toy):
        def loss(self, params, batch, key, progress):
            return jnp.sqrt(jnp.sum(params["head"]["bias"] ** 2)), {}, {}  # infinite slope at 0, where the bias starts

    step, state = make("sgd", Cliff())
    after, metrics = step(state, batch())
    assert np.isfinite(metrics["loss"]) and after.skipped == 1
    chex.assert_trees_all_equal(after.params, state.params)


def test_the_average_follows_the_parameters_with_a_decay_that_warms_up():
    step, state = make(ema_decay=0.15)
    average = without(state.params, Toy().frozen)
    for t, decay in enumerate([1 / 10, 0.15, 0.15]):
        state, _ = step(state, batch(t))
        trained = without(state.params, Toy().frozen)
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, trained)
    chex.assert_trees_all_close(state.ema, average, atol=1e-6)
    chex.assert_trees_all_equal(state.averaged_params, state.ema | {"seen": state.params["seen"]})
    assert make()[1].averaged_params is not None


def test_bfloat16_parameters_keep_float32_moments_and_one_compilation_serves():
    class Half(Toy):
        def init(self, key):
            return jax.tree.map(lambda p: p.astype(jnp.bfloat16), super().init(key))

    step, state = make("adamw", Half(), ema_decay=0.9)
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    for seed in range(3):
        state, _ = step(state, batch(seed))
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    assert {str(x.dtype) for x in jax.tree.leaves((state.ema, state.opt_state))} == {"float32", "int32"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert step._cache_size() == 1


def _two_chains(state: dict[str, jax.Array], batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """Of no use, but at any time a product of either could be due, and the rows of other devices with it."""
    for _ in range(3):
        state = {name: jnp.sin(x @ x.T) @ x for name, x in state.items()}
    return state, batch["image"].sum()


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize("of", ["training", "sampling"])
def test_cpu_devices_begin_their_collectives_in_one_order(of: str) -> None:
    """XLA takes what it does not heed, too: the order is read from the program, where one chain follows the other."""
    mesh = make_mesh(dict(data=4))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=rows) for name in ("x", "y", "image")}
    state, batch = {name: arrays[name] for name in "xy"}, {"image": arrays["image"]}
    if of == "training":
        program = compile_step(_two_chains, state, batch, rows, rows, NamedSharding(mesh, PartitionSpec()))
    else:
        program = compiled(_two_chains).jitted(mesh).lower(state, batch).compile()
    gathered = [int(n) for n in re.findall(r" all-gather\(.*channel_id=(\d+)", program.as_text())]
    gathered = [n for n in gathered if n <= 12]  # six of each chain; later ones bring results together
    assert sorted(gathered) == list(range(1, 13))
    halves = sorted(gathered[:6]), sorted(gathered[6:])
    assert halves[0][-1] < halves[1][0] or halves[1][-1] < halves[0][0], gathered
