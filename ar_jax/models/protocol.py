"""What a backbone promises: embedded tokens to hidden vectors, whole or in pieces."""

from __future__ import annotations

from typing import ClassVar, Protocol

from jax import Array

from ar_jax.mixers.protocol import State, Tokens
from ar_jax.models.blocks import BlockOptions, MakeMixer


class Backbone(Protocol):
    """How mixers are stacked. A Linen module; its further fields are keys of `config.model`.

    A sequence fed whole, or in consecutive pieces cut between steps, gives the same outputs.
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions

    reads_blanks: ClassVar[bool]  # tokens without a value are read, and so need an embedding

    def check(self) -> None:
        """Raises UsageError where the fields do not fit one another."""

    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """The state before the first token; see `Mixer.init_state`."""

    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: State | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, State | None]:
        """Hidden vectors.

        Args:
          x: [B, T, D] embeddings.
          tokens: when and where they are.
          vector: [B, T or 1, D], conditions for adaLN.
          state: what was remembered before these tokens; None for a whole sequence.
          deterministic: no dropout.

        Returns:
          [B, T, D], and the state after these tokens (None if none was given). A backbone that does not use what a token
          was fed for may return anything in its place, as long as it is not asked. One that has an attribute `num_outputs`
          returns so many outputs of each token side by side, [B, T, num_outputs D], as feed "neighbors" asks for. One that
          has an attribute `keeps_segments_apart` serves packed sequences, which feed "recent" needs.
        """
