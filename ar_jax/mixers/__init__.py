"""Mixers: how tokens read one another. A new mixer is one file, a line in this table, a config and a test row."""

from ar_jax.mixers.aft import AFT
from ar_jax.mixers.axial import Axial
from ar_jax.mixers.chela import CHELA
from ar_jax.mixers.convolution import Convolution
from ar_jax.mixers.fnet import FNet
from ar_jax.mixers.gss import GSS
from ar_jax.mixers.hrrformer import Hrrformer
from ar_jax.mixers.lightnet import LightNet
from ar_jax.mixers.lightweight_convolution import LightweightConvolution
from ar_jax.mixers.linear import Linear
from ar_jax.mixers.linformer import Linformer
from ar_jax.mixers.loki import Loki
from ar_jax.mixers.mega import Mega
from ar_jax.mixers.multiresolution import MultiResolution
from ar_jax.mixers.native_sparse import NativeSparse
from ar_jax.mixers.neighborhood import Neighborhood
from ar_jax.mixers.routing import Routing
from ar_jax.mixers.seer_attention import SeerAttention
from ar_jax.mixers.softmax import Softmax
from ar_jax.mixers.sparsek import SparseK
from ar_jax.mixers.toeplitz import Toeplitz
from ar_jax.mixers.vision_retention import VisionRetention
from ar_jax.mixers.subsampled import Subsampled

MIXERS = {
    "routing": Routing,
    "seer_attention": SeerAttention,
    "softmax": Softmax,
    "sparsek": SparseK,
    "subsampled": Subsampled,
    "linear": Linear,
    "convolution": Convolution,
    "fnet": FNet,
    "aft": AFT,
    "gss": GSS,
    "chela": CHELA,
    "mega": Mega,
    "hrrformer": Hrrformer,
    "linformer": Linformer,
    "lightweight_convolution": LightweightConvolution,
    "loki": Loki,
    "multiresolution": MultiResolution,
    "native_sparse": NativeSparse,
    "neighborhood": Neighborhood,
    "axial": Axial,
    "vision_retention": VisionRetention,
    "lightnet": LightNet,
    "toeplitz": Toeplitz,
}
