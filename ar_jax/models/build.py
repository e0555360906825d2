"""A generator from config values: `config.model` holds the keys of its backbone, its blocks and its embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ar_jax.config import UsageError, build, check_keys, choose, parameters
from ar_jax.models import BACKBONES
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import mixer_pattern
from ar_jax.models.generator import Embedding, Generator

SUPPLIED = ("embed_dim", "mixers", "options", "num_rows", "num_prefix", "position_axes", "decoder_mixers")


def build_generator(
    config: Mapping[str, Any],
    head: Any,
    condition: Any,
    position: tuple[tuple[int, ...], ...],
    vocab_size: int,
    channels: int,
    blank: bool,
    num_transition: int = 0,
    num_merged: int = 1,
    reads_near: bool = False,
) -> Generator:
    """The generator that a config describes.

    Args:
      config: `kind`, a key of BACKBONES; embed_dim; `mixer`, see `mixer_pattern`; fields of that backbone, of BlockOptions and
        of Embedding.
      head: see Generator.
      condition: see Generator.
      position: [L] coordinates of the slots.
      vocab_size: see Generator.
      channels: see Generator.
      blank: some fed tokens have no value.
      num_transition: see Generator.
      num_merged: see Generator.
      reads_near: the feed tells who is near; see `ar_jax.mixers.protocol.Mixer`.

    Raises:
      UsageError: a key that no part has, or a value that no part takes.
    """
    defaults: dict[str, Any] = {"kind": "decoder", "embed_dim": 128, "mixer": {"kind": "softmax"}}
    config = defaults | dict(config)
    backbone = choose(BACKBONES, config["kind"], "model.kind")
    own = [key for key in parameters(backbone) if key not in SUPPLIED]
    parts: dict[str, Any] = {"options": BlockOptions, "embedding": Embedding}
    two_widths = "decoder_mixers" in parameters(backbone)
    basic = ["kind", "embed_dim", "mixer"] + ["decoder_mixer"] * two_widths
    check_keys(config, {*basic, *own, *(key for part in parts.values() for key in parameters(part))}, "model")
    if not isinstance(config["embed_dim"], int) or config["embed_dim"] < 1:
        raise UsageError(f"config.model.embed_dim={config['embed_dim']!r} must be a whole number of at least 1.")
    if getattr(head, "tied", False) and not vocab_size:
        raise UsageError("config.head.tied needs tokens that are fed by their numbers; set it to False.")
    options, embedding = (
        build(parts, {"kind": name} | {k: v for k, v in config.items() if k in parameters(part)}, "model")
        for name, part in parts.items()
    )
    num_rows = len(position) + condition.num_tokens
    grid = tuple(1 + max(axis) for axis in zip(*position, strict=True)) * (1 + embedding.target_axes)
    if embedding.direction_modulation and options.adaln == "none":
        raise UsageError("config.model.direction_modulation needs a vector of adaLN; set config.model.adaln='block'.")
    fields = {"position_axes": len(grid), "grid": grid, "num_rows": num_rows} | options.types
    fields |= {"num_prefix": condition.num_tokens, "reads_near": reads_near}
    given = {
        "embed_dim": config["embed_dim"],
        "mixers": mixer_pattern(config["mixer"], embed_dim=config["embed_dim"], **fields),
        "options": options,
        "num_rows": num_rows,
        "num_prefix": condition.num_tokens,
        "position_axes": len(grid),
    }
    if two_widths:
        width = config.get("decoder_dim") or config["embed_dim"]
        given["decoder_mixers"] = mixer_pattern(config.get("decoder_mixer", config["mixer"]), embed_dim=width, **fields)
    decoder = build(BACKBONES, {k: v for k, v in config.items() if k in ("kind", *own)}, "model", **given)
    decoder.check()
    return Generator(
        decoder=decoder,
        head=head,
        condition=condition,
        position=position,
        embedding=embedding,
        options=options,
        embed_dim=config["embed_dim"],
        vocab_size=vocab_size,
        channels=channels,
        blank=blank and decoder.reads_blanks,
        num_transition=num_transition,
        num_merged=num_merged,
    )
