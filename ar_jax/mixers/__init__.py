"""Mixers: how tokens read one another. A new mixer is one file, a line in this table, a config and a test row."""

from ar_jax.mixers.convolution import Convolution
from ar_jax.mixers.linear import Linear
from ar_jax.mixers.softmax import Softmax

MIXERS = {"softmax": Softmax, "linear": Linear, "convolution": Convolution}
