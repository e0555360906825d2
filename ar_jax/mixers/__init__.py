"""Mixers: how tokens read one another. A new mixer is one file, a line in this table, a config and a test row."""

from ar_jax.mixers.aft import AFT
from ar_jax.mixers.agalite import AGaLiTe
from ar_jax.mixers.axial import Axial
from ar_jax.mixers.chela import CHELA
from ar_jax.mixers.combiner import Combiner
from ar_jax.mixers.conditioned_attention import ConditionedEncoder
from ar_jax.mixers.convolution import Convolution
from ar_jax.mixers.delta import Delta
from ar_jax.mixers.fixed_point_attention import FixedPointAttention
from ar_jax.mixers.fnet import FNet
from ar_jax.mixers.gss import GSS
from ar_jax.mixers.hgrn import HGRN
from ar_jax.mixers.hrrformer import Hrrformer
from ar_jax.mixers.hyper_zzw import HyperZZW
from ar_jax.mixers.lightnet import LightNet
from ar_jax.mixers.lightweight_convolution import LightweightConvolution
from ar_jax.mixers.linear import Linear
from ar_jax.mixers.linformer import Linformer
from ar_jax.mixers.loki import Loki
from ar_jax.mixers.mamba import Mamba
from ar_jax.mixers.mamba2 import Mamba2
from ar_jax.mixers.mega import Mega
from ar_jax.mixers.mesa import Mesa
from ar_jax.mixers.multiresolution import MultiResolution
from ar_jax.mixers.native_sparse import NativeSparse
from ar_jax.mixers.neighborhood import Neighborhood
from ar_jax.mixers.routing import Routing
from ar_jax.mixers.rwkv import RWKV6, RWKV7
from ar_jax.mixers.seer_attention import SeerAttention
from ar_jax.mixers.select_and_pack import SelectAndPack
from ar_jax.mixers.slots import SlotAttention
from ar_jax.mixers.softmax import Softmax
from ar_jax.mixers.sparsek import SparseK
from ar_jax.mixers.subsampled import Subsampled
from ar_jax.mixers.toeplitz import Toeplitz
from ar_jax.mixers.transformer_xl import TransformerXL
from ar_jax.mixers.ttt import TTT
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
    "transformer_xl": TransformerXL,
    "vision_retention": VisionRetention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "delta": Delta,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "hgrn": HGRN,
    "mesa": Mesa,
    "slots": SlotAttention,
    "agalite": AGaLiTe,
    "ttt": TTT,
    "fixed_point": FixedPointAttention,
    "hyper_zzw": HyperZZW,
    "conditioned_attention": ConditionedEncoder,
}
