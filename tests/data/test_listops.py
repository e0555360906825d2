"""ListOps: values are those of the lists, worked out from the words by another way."""

import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.data.listops import WORDS, load_listops


def value_of(text):
    """By a stack, from the words."""
    stack = [[]]
    for word in (WORDS[i] for i in text if i):
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            name, *values = stack.pop()
            ordered = sorted(values)
            middle = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) // 2
            stack[-1].append({"[MIN": ordered[0], "[MAX": ordered[-1], "[MED": middle, "[SM": sum(values) % 10}[name])
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value


def test_values_lengths_and_depths_are_as_asked():
    data = load_listops(min_length=10, max_length=60, max_depth=4, max_arguments=5, num_train=200, num_test=50)
    batch = data.train.take(np.arange(200))
    lengths = (batch["text"] > 0).sum(axis=1)
    assert lengths.min() >= 10 and lengths.max() <= 60
    for text, label in zip(batch["text"], batch["label"], strict=True):
        assert value_of(text) == label
        opens = np.cumsum([WORDS[i].startswith("[") - int(WORDS[i] == "]") for i in text])
        assert opens.max() <= 3 and opens[-1] == 0 and not text[np.argmax(text == 0) :].any() | (text > 0).all()
    assert len({text.tobytes() for text in batch["text"]}) == 200
    held_out = {text.tobytes() for text in data.test.take(np.arange(50))["text"]}
    assert not held_out & {text.tobytes() for text in batch["text"]}


def test_the_arenas_lengths_are_the_default():
    text = load_listops().train[0]["text"]
    assert text.shape == (2000,) and 500 <= (text > 0).sum() <= 2000


def test_what_no_list_fits_is_told():
    with pytest.raises(UsageError, match="use a min_length of 4 to 50"):
        load_listops(min_length=100, max_depth=3, max_arguments=6, max_length=200)
