"""Data: where examples come from. A kind is a function of its options that returns a `Dataset`."""

from ar_jax.data.digits import load_digits
from ar_jax.data.idx import load_idx
from ar_jax.data.npz import load_npz
from ar_jax.data.text import load_text
from ar_jax.data.tfds import load_tfds

DATASETS = {
    "digits": load_digits,
    "idx": load_idx,
    "npz": load_npz,
    "text": load_text,
    "tfds": load_tfds,
}
