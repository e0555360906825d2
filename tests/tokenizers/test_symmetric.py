"""A symmetric picture is what is on and above its diagonal."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.tokenizers.symmetric import Symmetric


def test_tokens_are_the_diagonal_and_what_is_above_it_and_give_the_picture_back() -> None:
    tokenizer = Symmetric((3, 3, 1), 7)
    levels = np.asarray([[0, 3, 4], [3, 1, 5], [4, 5, 2]])
    image = jnp.asarray(levels[None, ..., None] / 3 - 1, jnp.float32)
    tokens = tokenizer.encode({}, image)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 3, 4, 5]])
    assert tokenizer.layout == ((6,),) and tokenizer.num_dims == 6
    np.testing.assert_allclose(tokenizer.decode({}, tokens), image, atol=1e-6)  # float32
    shown = tokenizer.preview({}, tokens, jnp.asarray([[True] * 3 + [False] * 3]))[0, ..., 0]
    np.testing.assert_allclose(shown, np.where(np.eye(3), image[0, ..., 0], 0), atol=1e-6)


def test_other_pictures_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(3, 4, 1\); use 'pixels'"):
        Symmetric((3, 4, 1), 7)
