"""Names of the leaves of a tree of parameters, such as `layers/attention/query/kernel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: the keys of its path joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `jax.tree.map`, with the leaf's name as the first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves of a tree by name, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
