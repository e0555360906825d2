"""Mixers: how tokens read one another. A new mixer is one file, a line in this table, a config and a test row."""

from ar_jax.mixers.aft import AFT
from ar_jax.mixers.axial import Axial
from ar_jax.mixers.chela import CHELA
from ar_jax.mixers.combiner import Combiner
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
from ar_jax.mixers.select_and_pack import SelectAndPack
from ar_jax.mixers.softmax import Softmax
from ar_jax.mixers.sparsek import SparseK
from ar_jax.mixers.subsampled import Subsampled
from ar_jax.mixers.toeplitz import Toeplitz
from ar_jax.mixers.vision_retention import VisionRetention

MIXERS = {
    "softmax": Softmax,
    "linear": Linear,
    "convolution": Convolution,
    "aft": AFT,
    "axial": Axial,
    "chela": CHELA,
    "combiner": Combiner,
    "fnet": FNet,
    "gss": GSS,
    "hrrformer": Hrrformer,
    "lightnet": LightNet,
    "lightweight_convolution": LightweightConvolution,
    "linformer": Linformer,
    "loki": Loki,
    "mega": Mega,
    "multiresolution": MultiResolution,
    "native_sparse": NativeSparse,
    "neighborhood": Neighborhood,
    "routing": Routing,
    "seer_attention": SeerAttention,
    "select_and_pack": SelectAndPack,
    "sparsek": SparseK,
    "subsampled": Subsampled,
    "toeplitz": Toeplitz,
    "vision_retention": VisionRetention,
}
