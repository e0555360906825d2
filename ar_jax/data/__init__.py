"""Data: where examples come from. A kind is a function of its options that returns a `Dataset`."""

from collections.abc import Callable

from ar_jax.data.addition import load_addition
from ar_jax.data.crops import load_crops
from ar_jax.data.digits import load_digits
from ar_jax.data.episodes import load_episodes
from ar_jax.data.idx import load_idx
from ar_jax.data.listops import load_listops
from ar_jax.data.molecules import load_molecules
from ar_jax.data.moving_digits import load_moving_digits
from ar_jax.data.npz import load_npz
from ar_jax.data.protocol import Dataset
from ar_jax.data.text import load_text
from ar_jax.data.tfds import load_tfds
from ar_jax.data.token_shards import load_token_shards

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "idx": load_idx,
    "npz": load_npz,
    "text": load_text,
    "tfds": load_tfds,
    "token_shards": load_token_shards,
    "addition": load_addition,
    "molecules": load_molecules,
    "moving_digits": load_moving_digits,
    "crops": load_crops,
    "listops": load_listops,
    "episodes": load_episodes,
}
