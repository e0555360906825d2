"""Names of the leaves of a tree of parameters, such as `layers/attention/query/kernel`, and parts of it by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: the keys of its path joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `jax.tree.map`, with the leaf's name as the first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves of a tree by name, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def without(tree: Any, leave_out: Callable[[str], bool]) -> Any:
    """Nested dicts without the leaves whose name `leave_out` is true of, nor what is empty then; the others keep names."""
    kept = {name: leaf for name, leaf in named_leaves(tree).items() if not leave_out(name)}
    return traverse_util.unflatten_dict(kept, sep="/")


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree with some leaves replaced, by name.

    Raises:
      ValueError: a name that the tree does not have.
    """
    if unknown := set(leaves) - set(named_leaves(tree)):
        raise ValueError(f"There are no leaves {', '.join(sorted(unknown))} to replace.")
    return map_with_name(lambda name, leaf: leaves.get(name, leaf), tree)
