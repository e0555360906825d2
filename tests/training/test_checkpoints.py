import contextlib
import dataclasses
import logging
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.training import checkpoints
from ar_jax.training.program import CheckpointOptions
from ar_jax.training.state import TrainState


class Counter:
    """A data iterator whose position is one number, held as JSON or as bytes."""

    def __init__(self, position=0, as_bytes=False):
        self.position, self.as_bytes = position, as_bytes

    def __next__(self):
        self.position += 1
        return {"n": np.array([self.position])}

    def get_state(self):
        return bytes([self.position]) if self.as_bytes else {"position": self.position}

    def set_state(self, state):
        self.position = state[0] if self.as_bytes else state["position"]


def make_state(step, shape=(2, 3)):
    values = jnp.asarray(np.random.default_rng(step).normal(size=shape), jnp.float32)
    params = {"kernel": values, "half": values.astype(jnp.bfloat16), "flags": values > 0}
    return TrainState(jnp.int32(step), params, {"count": jnp.int32(step)}, None, jnp.int32(0), jnp.int32(0))


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_all(directory, steps, keep=3):
    with contextlib.closing(checkpoints.open_manager(directory, CheckpointOptions(keep=keep))) as manager:
        for step in steps:
            checkpoints.save(manager, make_state(step), Counter(step))


def restore(directory, iterator=None, shape=(2, 3)):
    with contextlib.closing(checkpoints.open_manager(directory, read_only=True)) as manager:
        return checkpoints.restore_latest(manager, like(make_state(0, shape)), iterator)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_all(directory, [1, 2])
    return directory


def flip_one_bit(file, content):
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])


DAMAGES = {
    "truncated": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "emptied": lambda file, content: file.write_bytes(b""),
    "garbage": lambda file, content: file.write_bytes(np.random.default_rng(0).bytes(len(content))),
    "one bit": flip_one_bit,
    "deleted": lambda file, content: file.unlink(),
}


def test_a_checkpoint_brings_back_state_and_position(saved):
    iterator = Counter()
    state = restore(saved, iterator)
    chex.assert_trees_all_equal(state, make_state(2))
    assert iterator.position == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that orbax has given up
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_state_is_the_newest_or_the_one_before_and_never_another(saved, damage, caplog):
    """The one before comes with one warning; the newest only where the damaged file is not needed to read values."""
    states = {1: jax.device_get(make_state(1)), 2: jax.device_get(make_state(2))}
    directory = saved.with_name("damaged")
    for file in sorted(file for file in (saved / "2").rglob("*") if file.is_file()):
        shutil.copytree(saved, directory)
        target, content, iterator = directory / file.relative_to(saved), file.read_bytes(), Counter()
        if content or damage == "deleted":
            DAMAGES[damage](target, content)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ar_jax"):
            state = restore(directory, iterator)
        chex.assert_trees_all_equal(state, states[int(state.step)])
        assert iterator.position == state.step
        warnings = [r.getMessage() for r in caplog.records if r.name.startswith("ar_jax")]
        assert len(warnings) == (1 if state.step == 1 else 0) and all(
            "is damaged and is skipped" in w for w in warnings
        )
        needed = file.name in ("metadata", "process_0-of-1.json")
        assert state.step == 1 or not needed
        shutil.rmtree(directory)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "deleted"])
def test_when_all_checkpoints_are_damaged_it_says_so(saved, damage, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    for file in (tmp_path / "checkpoints").glob("*/record/metadata"):
        DAMAGES[damage](file, file.read_bytes())
    with pytest.raises(UsageError, match="All 2 checkpoints in .* are damaged; remove"):
        restore(tmp_path / "checkpoints")


def test_values_that_were_not_saved_are_noticed_even_where_files_are_well_formed(saved, tmp_path):
    """The container's own checksums cover only some files: the digest covers all values."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    shutil.copytree(saved / "1" / "state", tmp_path / "checkpoints" / "2" / "state")
    assert restore(tmp_path / "checkpoints").step == 1


def test_a_half_written_checkpoint_is_no_checkpoint(saved, tmp_path):
    shutil.copytree(saved / "2", tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp")
    assert restore(tmp_path / "checkpoints") is None
    shutil.copytree(saved / "1", tmp_path / "checkpoints" / "1")
    assert restore(tmp_path / "checkpoints").step == 1


def test_another_shape_is_refused_with_the_first_name_and_both_shapes(saved):
    with pytest.raises(UsageError, match=r"params/flags is bool\[2,3\] there and bool\[2,4\] in this model"):
        restore(saved, shape=(2, 4))


def test_a_missing_parameter_is_refused_by_name(saved):
    state = make_state(0)
    state.params["more"] = jnp.zeros(2)
    with (
        contextlib.closing(checkpoints.open_manager(saved, read_only=True)) as manager,
        pytest.raises(UsageError, match=r"params/more is missing there and float32\[2\] in this model"),
    ):
        checkpoints.restore_latest(manager, like(state))


def test_only_the_newest_are_kept_and_damaged_ones_make_room(tmp_path):
    save_all(tmp_path, [1, 2, 3], keep=2)
    (tmp_path / "3" / "record" / "metadata").unlink()
    with contextlib.closing(checkpoints.open_manager(tmp_path, CheckpointOptions(keep=2))) as manager:
        checkpoints.remove_after(manager, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]
        checkpoints.save(manager, make_state(3), Counter(3))
    assert restore(tmp_path).step == 3


BEST = CheckpointOptions(keep=1, keep_every_steps=4, keep_best=2, best_metric="bits_per_dim")


def save_evaluated(directory, options=BEST):
    """Steps 1 to 7, of which all but 5 are evaluated; 2 and 3 are the best."""
    bits = {1: 3.0, 2: 1.0, 3: 1.5, 4: 2.0, 6: 4.0, 7: 2.5}
    with contextlib.closing(checkpoints.open_manager(directory, options)) as manager:
        for step in range(1, 8):
            evaluation = {"bits_per_dim": bits[step]} if step in bits else None
            checkpoints.save(manager, make_state(step), Counter(step), evaluation)


def restore_one(directory, step, options=BEST):
    with contextlib.closing(checkpoints.open_manager(directory, options, read_only=True)) as manager:
        return checkpoints.restore(manager, like(make_state(0)), step)


def test_the_newest_every_so_many_and_the_best_are_kept_and_found(tmp_path):
    save_evaluated(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4", "7"]
    chex.assert_trees_all_equal(restore_one(tmp_path, None), make_state(2))
    chex.assert_trees_all_equal(restore_one(tmp_path, 4), make_state(4))
    chex.assert_trees_all_equal(restore(tmp_path), make_state(7))
    with pytest.raises(UsageError, match=r"no one of step 5; there are those of steps 2, 3, 4, 7"):
        restore_one(tmp_path, 5)
    (tmp_path / "4" / "record" / "metadata").unlink()
    with pytest.raises(UsageError, match="4 is damaged; choose another step"):
        restore_one(tmp_path, 4)


def test_the_best_may_be_the_highest_and_a_metric_that_there_is_not_is_refused(tmp_path):
    highest = dataclasses.replace(BEST, best_is="highest", keep_best=1, keep_every_steps=0)
    save_evaluated(tmp_path, highest)
    assert restore_one(tmp_path, None, highest).step == 6
    with pytest.raises(UsageError, match="best_metric='fid' is no metric of the evaluation; it gives bits_per_dim"):
        dataclasses.replace(BEST, best_metric="fid").quality({"bits_per_dim": 1.0})
    with pytest.raises(UsageError, match="go together"):
        CheckpointOptions(keep_best=1)


def test_a_position_may_be_bytes(tmp_path):
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        checkpoints.save(manager, make_state(4), Counter(7, as_bytes=True))
    iterator = Counter(as_bytes=True)
    restore(tmp_path, iterator)
    assert iterator.position == 7


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = make_state(1, (512, 512))
    expected = jax.device_get(state)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        checkpoints.save(manager, state, Counter())
        jax.block_until_ready(
            jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0, keep_unused=True)(state)
        )
    chex.assert_trees_all_equal(restore(tmp_path, shape=(512, 512)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_the_digest_sees_one_changed_element_and_an_exchange_of_two(dtype):
    values = np.arange(24).reshape(2, 3, 4) % 5 > 1 if dtype == "bool" else np.arange(24).reshape(2, 3, 4)
    leaf = jnp.asarray(values, dtype)
    changed, exchanged = (
        leaf.at[1, 2, 3].set(leaf[0, 0, 0]),
        leaf.at[0, 0, 1].set(leaf[1, 1, 1]).at[1, 1, 1].set(leaf[0, 0, 1]),
    )
    exchanged = exchanged if dtype != "bool" else leaf.at[0, 0, 1].set(True).at[0, 0, 2].set(False)
    digests = {int(checkpoints.tree_digest(x)[0]) for x in (leaf, changed, exchanged)}
    assert len(digests) == 3
