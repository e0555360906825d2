"""Lexicons: what is known of a vocabulary's tokens from outside the data."""

from __future__ import annotations

import string

import numpy as np

CLASSES = (
    string.ascii_lowercase, string.ascii_uppercase, "aeiouAEIOU", string.digits, " \t", "\n\r", string.punctuation, ".!?",
)  # fmt: skip


def byte_classes(vocab_size: int) -> np.ndarray:
    """[vocab_size, 9] float32: small, capital, vowel, digit, blank, end of a line, punctuation, end of a sentence, not ASCII."""
    known = [[chr(i) in members for members in CLASSES] for i in range(min(vocab_size, 128))]
    table = np.zeros((vocab_size, len(CLASSES) + 1), np.float32)
    table[: len(known), :-1] = known
    table[128:, -1] = 1
    return table


LEXICONS = {"byte_classes": byte_classes}
