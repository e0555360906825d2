"""The recurrent encoder whose attention a lexicon conditions: whole or in pieces, and told of the tokens by the generator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.data.protocol import Facts
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.lexicons import byte_classes
from ar_jax.system import from_config


@pytest.mark.parametrize("conditioning", ["concat", "affine"])
def test_features_say_what_is_read_whole_and_in_pieces(conditioning: str) -> None:
    mixer, length = MIXERS["conditioned_attention"](4, conditioning=conditioning), 7
    x, features = (
        jax.random.normal(jax.random.key(0), (2, length, 4)),
        jax.random.normal(jax.random.key(1), (2, length, 3)),
    )
    step = jnp.arange(length)[None]
    tokens = Tokens(step, step[..., None], length, features=features)
    params, apply = jax.jit(mixer.init)(jax.random.key(2), x, tokens), jax.jit(mixer.apply)
    whole, _ = apply(params, x, tokens)
    state, pieces = mixer.init_state(2, length, 1), []
    for piece in (slice(0, 3), slice(3, 7)):
        out, state = apply(params, x[:, piece], tokens.part(piece), state)
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)
    other, _ = apply(params, x, tokens.replace(features=features.at[:, 2].add(3.0)))
    moved = np.abs(other - whole).max(axis=(0, 2)) > 1e-5
    assert not moved[:2].any() and moved[2:].all()  # the features of a token are read from there on
    with pytest.raises(UsageError, match="set config.model.lexicon"):
        apply(params, x, tokens.replace(features=None))


def test_a_language_model_tells_its_mixers_what_a_lexicon_knows() -> None:
    names = dict(zip("aB.", byte_classes(256)[[97, 66, 46]], strict=True))
    assert [list(np.flatnonzero(entry)) for entry in names.values()] == [[0, 2], [1], [6, 7]]
    config = {
        "tokenizer": {"kind": "bytes"},
        "order": {"kind": "raster"},
        "model": {
            "num_layers": 1,
            "embed_dim": 8,
            "lexicon": "byte_classes",
            "mixer": {"kind": "conditioned_attention"},
        },
        "objective": {"kind": "next_token"},
    }
    system = from_config(config, Facts("text", (5,), 256, ()))
    params = jax.jit(system.init)(jax.random.key(0))
    gate = params["generator"]["decoder"]["stack"]["layers"]["block_0"]["mixer"]["energy"]["gate"]["kernel"]
    assert gate.shape == (1, 9, 8)
    with pytest.raises(UsageError, match="lexicon='words' is unknown"):
        from_config(config | {"model": config["model"] | {"lexicon": "words"}}, Facts("text", (5,), 256, ()))
