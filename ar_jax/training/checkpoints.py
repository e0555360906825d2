"""Checkpoints that are whole or not there: written atomically by orbax, sealed by digests, verified when read.

A checkpoint has two parts: the train state, and a record of shapes, digests and the position in the data, which is that of
all processes, however many there are.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from ar_jax.config import UsageError
from ar_jax.training.paths import named_leaves
from ar_jax.training.program import CheckpointOptions
from ar_jax.training.state import TrainState

_log = logging.getLogger(__name__)


class DataIterator(Protocol):
    """Batches without end (dicts of arrays [B, ...]), and a position that can be noted and gone back to."""

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch."""
        ...

    def get_state(self) -> Any:
        """The position: bytes, or values that JSON can hold."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` returned."""
        ...


def open_manager(
    directory: Path, options: CheckpointOptions | None = None, read_only: bool = False
) -> ocp.CheckpointManager:
    """Orbax's manager of a directory of checkpoints, to be closed after use.

    Args:
      directory: of the checkpoints.
      options: which checkpoints a save leaves, and which is the best.
      read_only: nothing is made or cleaned up.
    """
    options = options or CheckpointOptions()
    kept: list[Any] = [LatestN(n=options.keep)]
    if options.keep_every_steps:
        kept.append(EveryNSteps(interval_steps=options.keep_every_steps))
    quality = options.quality if options.keep_best else None
    if quality:
        kept.append(BestN(get_metric_fn=quality, n=options.keep_best, keep_checkpoints_without_metrics=False))
    policy = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(kept),
        best_fn=quality,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
    )
    return ocp.CheckpointManager(directory.absolute(), options=policy)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    iterator: DataIterator,
    evaluation: Mapping[str, float] | None = None,
) -> None:
    """Writes a checkpoint of the state's step in the background; training may go on, and donate the state, at once.

    Args:
      manager: of the directory.
      state: what is saved.
      iterator: its position is saved.
      evaluation: metrics of that step by name, by which the best are kept; None where it was not evaluated.
    """
    record = {"shapes": _shapes(state), "digest": _digests(state), "position": _position(iterator)}
    parts = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave(_seal(record)),
    )
    manager.save(int(state.step), args=parts, force=True, metrics=dict(evaluation) if evaluation else None)


def restore(manager: ocp.CheckpointManager, like: TrainState, step: int | None) -> TrainState:
    """The checkpoint of one step; None for the best by the options that the manager was opened with (`keep_best`).

    Raises:
      UsageError: there is none, it is of another model, or damaged.
    """
    found = manager.best_step() if step is None else step
    there = sorted(_steps(Path(manager.directory)))
    if found not in there:
        what = "evaluated one, which could be the best" if step is None else f"one of step {step}"
        raise UsageError(
            f"Among the checkpoints in {manager.directory} there is no {what}; there are those of steps "
            f"{', '.join(map(str, there)) or '(none)'}."
        )
    try:
        with _without_afterthoughts():
            return _restore(manager, found, like, None)
    except UsageError:
        raise
    except Exception as error:  # see restore_latest
        raise UsageError(
            f"Checkpoint {Path(manager.directory) / str(found)} is damaged; choose another step."
        ) from error


def restore_latest(
    manager: ocp.CheckpointManager, like: TrainState, iterator: DataIterator | None = None
) -> TrainState | None:
    """The newest checkpoint that is undamaged, or None where there is none at all.

    Args:
      manager: of the directory.
      like: shapes, dtypes and shardings of the state to read.
      iterator: set to the position of that checkpoint, if given.

    Raises:
      UsageError: the checkpoint is of another model, or all checkpoints are damaged.
    """
    steps = _steps(Path(manager.directory))
    for step in steps:
        try:
            with _without_afterthoughts():
                return _restore(manager, step, like, iterator)
        except UsageError:
            raise
        except Exception as error:  # damage shows as almost any exception of the file readers
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            _log.warning("Checkpoint %s is damaged and is skipped (%s).", Path(manager.directory) / str(step), reason)
    if steps:
        raise UsageError(
            f"All {len(steps)} checkpoints in {manager.directory} are damaged; remove it to train from the start."
        )
    return None


def remove_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Removes the checkpoints of later steps: damaged ones, in the way of those that training will write anew."""
    if jax.process_index() == 0:
        for later in (s for s in _steps(Path(manager.directory)) if s > step):
            shutil.rmtree(Path(manager.directory) / str(later))
    manager.reload()


@jax.jit
def tree_digest(tree: Any) -> list[jax.Array]:
    """A 32-bit digest of each leaf's bits, [] uint32: computed where the leaf lives, the same for every sharding.

    Each element is hashed together with its place (a bijection for a given place, so one changed element always shows);
    sums of integers do not depend on their order.
    """
    return [_leaf_digest(leaf) for leaf in jax.tree.leaves(tree)]


def _digests(tree: Any) -> list[int]:
    return [int(digest) for digest in jax.device_get(tree_digest(tree))]


def _leaf_digest(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits + place * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _restore(manager: ocp.CheckpointManager, step: int, like: TrainState, iterator: DataIterator | None) -> TrainState:
    record = _unseal(manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"])
    _check_shapes(record["shapes"], _shapes(like), f"Checkpoint {Path(manager.directory) / str(step)}")
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    if _digests(state) != record["digest"]:
        raise OSError("its bytes are not those that were saved")
    if iterator is not None:
        position = record["position"]
        iterator.set_state(base64.b64decode(position["bytes"]) if "bytes" in position else position["json"])
    return state


@contextlib.contextmanager
def _without_afterthoughts() -> Iterator[None]:
    """Silences reads still under way when orbax gives up at the first bad array: they complain at length."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled, log.disabled = log.disabled, True
    sys.unraisablehook = lambda unraisable: None if isinstance(unraisable.exc_value, RuntimeError) else hook(unraisable)
    try:
        yield
    except Exception:
        gc.collect()  # afterthoughts come when the reads are collected: now, rather than later
        raise
    finally:
        log.disabled, sys.unraisablehook = disabled, hook


def _check_shapes(saved: dict[str, str], wanted: dict[str, str], what: str) -> None:
    """Raises UsageError on the first leaf that is missing on either side or has another shape or dtype."""
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            there, here = saved.get(name, "missing"), wanted.get(name, "missing")
            raise UsageError(
                f"{what} is of another model: {name} is {there} there and {here} in this model; "
                "use the config and the code that it was trained with, or another --workdir."
            )


def _shapes(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by name, such as `float32[2,3]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for name, leaf in named_leaves(tree).items()}


def _steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory, newest first. What is half written has another kind of name."""
    return sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)


def _seal(value: Any) -> dict[str, Any]:
    """A value together with its digest."""
    return {"value": value, "digest": _json_digest(value)}


def _unseal(sealed: Any) -> Any:
    """The value of `_seal`, if it is still the same."""
    if sealed["digest"] != _json_digest(sealed["value"]):
        raise OSError("its record is not the one that was saved")
    return sealed["value"]


def _json_digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _position(iterator: DataIterator) -> dict[str, Any]:
    """Where an iterator is, as JSON can hold it."""
    state = iterator.get_state()
    return {"bytes": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state}
