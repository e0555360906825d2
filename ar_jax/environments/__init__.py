"""Environments: what an agent acts in. A new one is a file and a line in this table; `config.data.environment` names one."""

from collections.abc import Callable

from ar_jax.environments.cart_pole import cart_pole
from ar_jax.environments.protocol import Environment
from ar_jax.environments.t_maze import t_maze

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {
    "t_maze": t_maze,
    "cart_pole": cart_pole,
}
