"""Backbones: how mixers are stacked. A new backbone is one file and a line in this table."""

from ar_jax.models.axial_transformer import AxialTransformer
from ar_jax.models.block_transformer import BlockTransformer
from ar_jax.models.decoder import Decoder
from ar_jax.models.masked_autoencoder import MaskedAutoencoder
from ar_jax.models.perceiver_ar import PerceiverAR
from ar_jax.models.two_pass import TwoPass
from ar_jax.models.u_vit import UViT

BACKBONES = {
    "decoder": Decoder,
    "two_pass": TwoPass,
    "masked_autoencoder": MaskedAutoencoder,
    "u_vit": UViT,
    "axial_transformer": AxialTransformer,
    "block_transformer": BlockTransformer,
    "perceiver_ar": PerceiverAR,
}
