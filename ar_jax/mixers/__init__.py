"""Mixers: how tokens read one another. A new mixer is one file, a line in this table, a config and a test row."""

from ar_jax.mixers.axial import Axial
from ar_jax.mixers.aft import AFT
from ar_jax.mixers.convolution import Convolution
from ar_jax.mixers.fnet import FNet
from ar_jax.mixers.hrrformer import Hrrformer
from ar_jax.mixers.lightweight_convolution import LightweightConvolution
from ar_jax.mixers.lightnet import LightNet
from ar_jax.mixers.linear import Linear
from ar_jax.mixers.linformer import Linformer
from ar_jax.mixers.native_sparse import NativeSparse
from ar_jax.mixers.neighborhood import Neighborhood
from ar_jax.mixers.softmax import Softmax
from ar_jax.mixers.vision_retention import VisionRetention
from ar_jax.mixers.sparsek import SparseK

MIXERS = {
    "softmax": Softmax,
    "sparsek": SparseK,
    "linear": Linear,
    "convolution": Convolution,
    "fnet": FNet,
    "aft": AFT,
    "hrrformer": Hrrformer,
    "linformer": Linformer,
    "lightweight_convolution": LightweightConvolution,
    "native_sparse": NativeSparse,
    "neighborhood": Neighborhood,
    "axial": Axial,
    "vision_retention": VisionRetention,
    "lightnet": LightNet,
}
