"""TiTok: an image as a short line of latents, read and written by transformers (arXiv:2406.07550)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, build, check_keys, parameters
from ar_jax.kernels.dense import Dense
from ar_jax.orders.protocol import Grid
from ar_jax.tokenizers import conv
from ar_jax.tokenizers.learned import LearnedTokenizer, Network
from ar_jax.tokenizers.quantizers import QUANTIZERS
from ar_jax.tokenizers.vit import Transformer, ViTSize, table


class Encoder(nn.Module):
    """Patches and latent tokens through a transformer; what becomes of the latter is z.

    Attributes:
      patch_size: pixels along each side of a patch.
      num_latent_tokens: K.
      out_channels: of z.
      scrambled: the K vectors are read as if their matrix were transposed, a mistake that the published models with proxy
        codes learned to live with.
    """

    size: ViTSize
    patch_size: int
    num_latent_tokens: int
    out_channels: int
    scrambled: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] to z [B, K, out_channels] in float32."""
        width, patch = self.size.embed_dim, (self.patch_size,) * 2
        dtype = conv.DTYPES[self.size.dtype]
        embed = nn.Conv(width, patch, strides=patch, padding="VALID", dtype=dtype, name="patch_embed")
        patches = embed(images).reshape(len(images), -1, width)
        x = jnp.concatenate([_repeated(table(self, "class_embedding", 1, width), len(images)), patches], axis=1)
        x = x + table(self, "position_embedding", x.shape[1], width)[None]
        latents = table(self, "latent_tokens", self.num_latent_tokens, width)
        latents += table(self, "latent_position_embedding", self.num_latent_tokens, width)
        x = Transformer(self.size, name="transformer")(jnp.concatenate([x, _repeated(latents, len(images))], axis=1))
        x = x[:, -self.num_latent_tokens :]
        if self.scrambled:
            x = x.reshape(len(x), width, self.num_latent_tokens).swapaxes(1, 2)
        return Dense(self.out_channels, dtype=dtype, name="out")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """Latents and mask tokens through a transformer; what becomes of the latter is the image, patch by patch.

    Attributes:
      grid: of the patches.
      head: patches [B, *grid, D] to images, in two methods: `features` and `last`.
    """

    size: ViTSize
    grid: Grid
    head: Any

    @nn.compact
    def features(self, values: Array) -> Array:
        """Quantized latents [B, K, channels] to what the last layer reads."""
        width, dtype, num_patches = self.size.embed_dim, conv.DTYPES[self.size.dtype], self.grid[0] * self.grid[1]
        latents = Dense(width, dtype=dtype, name="value_embed")(values)
        latents += table(self, "latent_position_embedding", values.shape[1], width)[None]
        masks = jnp.broadcast_to(table(self, "mask_token", 1, width), (num_patches, width))
        x = jnp.concatenate([table(self, "class_embedding", 1, width), masks])
        x = _repeated(x + table(self, "position_embedding", 1 + num_patches, width), len(values))
        x = Transformer(self.size, name="transformer")(jnp.concatenate([x, latents], axis=1))
        return self.head.features(x[:, 1 : 1 + num_patches].reshape(-1, *self.grid, width))

    def last(self, features: Array) -> Array:
        """The head's last layer."""
        return self.head.last(features)


class PixelHead(nn.Module):
    """Each patch's pixels by one projection, smoothed by a convolution."""

    patch_size: int
    image_channels: int
    dtype: str

    def setup(self) -> None:
        """Projection and convolution."""
        dtype = conv.DTYPES[self.dtype]
        self.to_pixels = Dense(self.patch_size**2 * self.image_channels, dtype=dtype)
        self.conv_out = nn.Conv(self.image_channels, (3, 3), dtype=dtype)

    def features(self, patches: Array) -> Array:
        """[B, h, w, D] to [B, H, W, C]."""
        p, (batch, rows, cols, _) = self.patch_size, patches.shape
        pixels = self.to_pixels(patches).reshape(batch, rows, cols, p, p, self.image_channels).swapaxes(2, 3)
        return pixels.reshape(batch, rows * p, cols * p, self.image_channels)

    def last(self, features: Array) -> Array:
        """Images [B, H, W, C] in float32."""
        return self.conv_out(features).astype(jnp.float32)


class ProxyHead(nn.Module):
    """Each patch's distribution over the codes of a VQGAN, whose decoder paints their mean vector (the paper's two stages).

    Attributes:
      num_proxies: codes of that VQGAN.
      proxy_channels: numbers in each of its vectors.
      hidden_dim: of the projection to the logits.
    """

    num_proxies: int
    proxy_channels: int
    hidden_dim: int
    image_channels: int
    options: conv.ConvOptions

    def setup(self) -> None:
        """Projections, vectors and decoder."""
        dtype = conv.DTYPES[self.options.dtype]
        self.hidden, self.logits = Dense(self.hidden_dim, dtype=dtype), Dense(self.num_proxies, dtype=dtype)
        self.proxies = nn.Embed(self.num_proxies, self.proxy_channels)
        self.pixel_decoder = conv.Decoder(self.options, self.proxy_channels, self.image_channels, quant_kernel_size=0)

    def features(self, patches: Array) -> Array:
        """[B, h, w, D] to what the VQGAN's last convolution reads."""
        return self.pixel_decoder.features(nn.softmax(self.proxy_logits(patches)) @ self.proxies.embedding)

    def proxy_logits(self, patches: Array) -> Array:
        """[B, h, w, num_proxies] in float32: what the paper's first stage trains towards the VQGAN's own codes."""
        return self.logits(nn.tanh(self.hidden(patches))).astype(jnp.float32)

    def last(self, features: Array) -> Array:
        """Images [B, H, W, C] in float32."""
        return self.pixel_decoder.last(features)


def titok(
    shape: tuple[int, ...],
    quantizer: Mapping[str, Any] | None = None,
    num_latent_tokens: int = 32,
    patch_size: int = 16,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    pixel_decoder: Mapping[str, Any] | None = None,
    image_range: Sequence[float] = (0.0, 1.0),
    latent_scale: float = 1.0,
    dtype: str = "float32",
) -> LearnedTokenizer:
    """A line of K latents for the whole image.

    Args:
      shape: (H, W, C) of the images.
      quantizer: `kind`, a key of QUANTIZERS, and its fields; None takes 4096 vectors of 12 numbers.
      num_latent_tokens: K.
      patch_size: pixels along each side of a transformer's patch.
      encoder: embed_dim, num_layers and num_heads of the encoder.
      decoder: those of the decoder.
      pixel_decoder: of the published models: fields of ConvOptions, and num_proxies and proxy_channels of a VQGAN, the
        mean of whose codes is painted. None predicts pixels.
      image_range: the numbers that stand for black and white in the network.
      latent_scale: factor of continuous tokens.
      dtype: of the computation, "float32" or "bfloat16".

    Raises:
      UsageError: sizes that do not fit one another.
    """
    if len(shape) != 3 or patch_size < 1 or shape[0] % patch_size or shape[1] % patch_size or num_latent_tokens < 1:
        raise UsageError(
            f"config.tokenizer.patch_size={patch_size} must divide the sides of the images, {shape}, and "
            f"num_latent_tokens={num_latent_tokens} be at least 1."
        )
    default = {"kind": "vq", "vocab_size": 4096, "channels": 12}
    inner = build(QUANTIZERS, default if quantizer is None else quantizer, "tokenizer.quantizer")
    sizes = [_record(ViTSize, o, w, dtype=dtype) for o, w in ((encoder, "encoder"), (decoder, "decoder"))]
    head, last = _head(pixel_decoder, patch_size, shape[2], 2 * sizes[1].embed_dim, dtype)
    scrambled = pixel_decoder is not None
    network = Network(
        encoder=Encoder(sizes[0], patch_size, num_latent_tokens, inner.in_channels, scrambled),
        quantizer=inner,
        decoder=Decoder(sizes[1], (shape[0] // patch_size, shape[1] // patch_size), head),
    )
    low, high = image_range
    return LearnedTokenizer(
        shape, network, (num_latent_tokens,), f"decoder/head/{last}/kernel", (low, high), latent_scale=latent_scale
    )


def _head(
    config: Mapping[str, Any] | None, patch_size: int, image_channels: int, hidden_dim: int, dtype: str
) -> tuple[nn.Module, str]:
    """The decoder's head, and the name of its last layer."""
    if config is None:
        return PixelHead(patch_size, image_channels, dtype), "conv_out"
    sizes = {"num_proxies": 1024, "proxy_channels": 256} | dict(config)
    num_proxies, proxy_channels = sizes.pop("num_proxies"), sizes.pop("proxy_channels")
    published = {"style": "maskgit", "attention": ()} | sizes
    options = _record(conv.ConvOptions, published, "pixel_decoder", dtype=dtype)
    return ProxyHead(num_proxies, proxy_channels, hidden_dim, image_channels, options), "pixel_decoder/conv_out"


def _record(kind: Any, config: Mapping[str, Any] | None, where: str, **given: Any) -> Any:
    """kind(**config), after a check of the keys."""
    options = dict(config or {})
    check_keys(options, set(parameters(kind)) - set(given), f"tokenizer.{where}")
    return kind(**options, **given)


def _repeated(rows: Array, batch_size: int) -> Array:
    return jnp.broadcast_to(rows[None], (batch_size, *rows.shape))
