"""Grey levels written with several digits."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.tokenizers.pixels import Pixels


@pytest.mark.parametrize(("levels", "depth", "base"), [(17, 2, 5), (256, 8, 2), (2, 3, 2), (27, 3, 3)])
def test_digits_give_each_level_back_the_greatest_first(levels: int, depth: int, base: int) -> None:
    tokenizer = Pixels((1, levels, 1), levels, depth=depth)
    image = np.linspace(-1, 1, levels, dtype=np.float32).reshape(1, 1, levels, 1)
    tokens = tokenizer.encode({}, image)
    assert tokenizer.vocab_size == base and tokenizer.layout == ((1, levels, depth),)
    assert tokens.shape == (1, levels * depth) and tokens.max() < base
    np.testing.assert_allclose(tokenizer.decode({}, tokens), image, atol=1e-6)
    first = np.asarray(tokens).reshape(levels, depth)[:, 0]
    assert (np.diff(first) >= 0).all()
    known = np.arange(levels * depth)[None] < depth
    np.testing.assert_allclose(tokenizer.preview({}, tokens, known)[0, 0, :, 0], [-1] + [0] * (levels - 1), atol=1e-6)
