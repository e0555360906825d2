"""The decoder: blocks of any mixers, scanned over layers."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from ar_jax.config import UsageError, build, choose
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Carried, State, Tokens
from ar_jax.models.blocks import Block, BlockOptions, MakeMixer, Modulation, modulated

NESTED = (Mapping, ConfigDict)  # the latter is none of the former


def mixer_pattern(config: Mapping[str, Any], **given: Any) -> tuple[MakeMixer, ...]:
    """The mixers of one repeat of the layers, from a kind such as "softmax" or "3 linear : 1 softmax".

    Args:
      config: `kind`; options that all its kinds share; and under a kind's own name a mapping of options for it alone.
      **given: fields that the code supplies.

    Raises:
      UsageError: an unknown kind or option, or a pattern that cannot be read.
    """
    shared = {k: v for k, v in config.items() if k != "kind" and not isinstance(v, NESTED)}
    own = {k: v for k, v in config.items() if isinstance(v, NESTED)}
    kinds: list[str] = []
    for term in str(config.get("kind", "")).split(":"):
        count, kind = re.fullmatch(r"\s*(\d*)\s*(.*?)\s*", term, re.DOTALL).groups()  # type: ignore[union-attr]  # matches anything
        kinds += [kind] * int(count or 1)
    if not kinds:
        raise UsageError(
            f"config.model.mixer.kind={config.get('kind')!r} names no mixer; use one of {', '.join(MIXERS)}."
        )
    for name in own:
        choose(MIXERS, name, "model.mixer.kind")
    options = [{"kind": kind} | shared | dict(own.get(kind, {})) for kind in kinds]
    makers = [functools.partial(build, MIXERS, option, "model.mixer", **given) for option in options]
    for make in makers:
        make()  # a wrong option is told now, not while tracing
    return tuple(makers)


def _unattached(make: Callable[..., Any]) -> Any:
    """A mixer that is nobody's part, made where another module runs."""
    return make(parent=None)


class Repeat(nn.Module):
    """One repeat of the pattern of blocks: the body of the scan over layers.

    Attributes:
      blocks: make them.
      deterministic: no dropout.
      adaln_groups: see BlockOptions.
    """

    blocks: tuple[Callable[..., Block], ...]
    deterministic: bool
    adaln_groups: int = 1

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, dict[str, Any]],
        state: State | None,
        tokens: Tokens,
        vector: Array | None,
        number: Array | int | None,
    ) -> tuple[tuple[Array, dict[str, Any]], State | None]:
        """The scan's carry is x and, by mixers' names, what their layers share.

        It scans over the state and the number of the repeat (None without groups).
        """
        (x, shared), after = carry, []
        for i, make in enumerate(self.blocks):
            told = vector
            if number is not None and vector is not None:
                groups = vector.reshape(*vector.shape[:-1], self.adaln_groups, -1)
                own = (number * len(self.blocks) + i) % self.adaln_groups
                told = jax.lax.dynamic_index_in_dim(groups, own, axis=-2, keepdims=False)
            block, new = make(name=f"block_{i}"), None if state is None else state[i]
            name = type(_unattached(block.make_mixer)).__name__ if shared else ""
            given = Carried(new, shared[name]) if name in shared else new
            x, new = block(x, tokens, told, given, self.deterministic)
            if isinstance(new, Carried):
                shared, new = shared | {name: new.shared}, new.state
            after.append(new)
        return (x, shared), None if state is None else tuple(after)


class Stack(nn.Module):
    """Blocks behind one another, `num_layers` deep, whose mixers repeat a pattern; see `mixer_pattern`."""

    mixers: tuple[MakeMixer, ...]
    num_layers: int
    options: BlockOptions

    @property
    def num_repeats(self) -> int:
        """How often the pattern fits the layers."""
        if self.num_layers < 1 or self.num_layers % len(self.mixers):
            raise UsageError(
                f"config.model.num_layers={self.num_layers} must be a multiple of the mixer pattern's {len(self.mixers)}."
            )
        return self.num_layers // len(self.mixers)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """The states of all layers: one per repeat of the pattern, in it one per mixer."""
        return tuple(
            tuple(make().init_state(batch_size, max_len, max_step_len) for make in self.mixers)
            for _ in range(self.num_repeats)
        )

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: State | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, State | None]:
        """Tokens [B, T, D] to [B, T, D], and the state after them; see `Block`."""
        blocks = tuple(
            functools.partial(Block, make, self.options, self.options.has_mlp(i, len(self.mixers)))
            for i, make in enumerate(self.mixers)
        )
        fields = (blocks, deterministic, self.options.adaln_groups)
        if state is not None or (not self.is_initializing() and FIRST_LAYER in self.variables["params"]["layers"]):
            return self._one_by_one(Repeat(*fields, parent=None), x, tokens, vector, state)
        scan = nn.scan(
            self.options.rematerialised(Repeat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, 0),
            length=self.num_repeats,
        )
        numbers = jnp.arange(self.num_repeats) if self.options.adaln_groups > 1 else None
        (x, _), after = scan(*fields, name="layers")((x, self._shared(x)), None, tokens, vector, numbers)
        return x, after

    @nn.nowrap
    def _shared(self, x: Array) -> dict[str, Any]:
        """What the first layer is handed of each mixer whose layers share something, for tokens x [B, T, D]."""
        mixers = [_unattached(make) for make in self.mixers]
        handed = {type(m).__name__: m.init_shared(*x.shape[:2]) for m in mixers if hasattr(m, "init_shared")}
        return {name: shared for name, shared in handed.items() if shared is not None}

    def _one_by_one(
        self, repeat: Repeat, x: Array, tokens: Tokens, vector: Array | None, state: State | None
    ) -> tuple[Array, State | None]:
        """The layers written out: a scan over them would copy the weights and the state of every layer in every step."""
        layers, after = self.variables["params"]["layers"], []
        layers = layers if FIRST_LAYER in layers else layer_by_layer(layers)
        carry = x, self._shared(x)
        for i, before in enumerate((None,) * self.num_repeats if state is None else state):
            number = i if self.options.adaln_groups > 1 else None
            carry, new = repeat.apply({"params": layers[f"layer_{i}"]}, carry, before, tokens, vector, number)
            after.append(new)
        return carry[0], None if state is None else tuple(after)


def make_stack(
    mixer: Mapping[str, Any] | None, embed_dim: int, num_layers: int, options: BlockOptions, grid: tuple[int, ...]
) -> Stack:
    """Blocks for tokens that fill a grid, without a prefix.

    Args:
      mixer: see `mixer_pattern`; None takes softmax attention.
      embed_dim: width.
      num_layers: see Stack.
      options: of the blocks.
      grid: a bound of the coordinates along each axis.

    Raises:
      UsageError: a wrong option, or layers that do not fit the pattern.
    """
    fields: dict[str, Any] = dict(position_axes=len(grid), grid=grid, num_rows=math.prod(grid), num_prefix=0)
    mixers = mixer_pattern(mixer or {"kind": "softmax"}, embed_dim=embed_dim, **fields, **options.types)
    stack = Stack(mixers, num_layers, options, parent=None)
    stack.num_repeats  # noqa: B018  (the property checks)
    return stack


FIRST_LAYER = "layer_0"


def layer_by_layer(stacked: Any) -> dict[str, Any]:
    """The parameters of each layer, of arrays [layers, ...]."""
    return {f"layer_{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(len(jax.tree.leaves(stacked)[0]))}


def layers_apart(params: Any) -> Any:
    """Parameters with those of each layer of all stacks apart, which `Stack` takes as well: for a loop that reads them often.

    A CPU's product cannot read a part of an array, so each turn of a loop would copy all weights first. On other machines
    the product reads them where they are, and this would only hold them twice.
    """
    if not isinstance(params, Mapping):
        return params
    return {name: layer_by_layer(part) if name == "layers" else layers_apart(part) for name, part in params.items()}


class Decoder(nn.Module):
    """A stack of blocks and a norm; see `Backbone`.

    Attributes:
      mixers: makes each mixer of one repeat of the layers; see `mixer_pattern`.
      options: of the blocks.
      branch_layers: gives each token further outputs, side by side behind the first: each is read, through a norm of its
        own, so many layers behind the one before it (NAR, arXiv:2503.10696, has one layer for each further axis).
      reads_answers: the token that an output gives is drawn before the layers behind it, which read it: its embedding is
        added to what they get (DnD-Transformer, arXiv:2410.01912, sec. 2.3).
    """

    embed_dim: int
    mixers: tuple[MakeMixer, ...]
    options: BlockOptions
    num_layers: int = 4
    branch_layers: Sequence[int] = ()
    reads_answers: bool = False

    reads_blanks: ClassVar[bool] = True
    keeps_segments_apart: ClassVar[bool] = True

    def setup(self) -> None:
        """The stack, those of further outputs, and what the condition does to the last norms and to all blocks."""
        self.stack = Stack(self.mixers, self.num_layers, self.options)
        self.branches = [Stack(self.mixers, n, self.options) if n else None for n in self.branch_layers]
        if self.options.norm_first:
            norm = self.options.make_norm(self.options.last_norm)
            self.norm, self.branch_norms = norm(), [norm() for _ in self.branch_layers]
        if self.options.adaln != "none":
            self.norm_modulation = Modulation(self.embed_dim, 2, self.options)
        if self.options.adaln == "shared":
            count = self.options.num_modulations(self.options.mlps == "all") * self.options.adaln_groups
            self.shared_modulation = Modulation(self.embed_dim, count, self.options)

    @nn.nowrap
    def check(self) -> None:
        """Raises UsageError where the layers do not fit the pattern."""
        Stack(self.mixers, self.num_layers, self.options).num_repeats  # noqa: B018  (the property checks)
        for n in self.branch_layers:
            if n < 0 or n % len(self.mixers):
                raise UsageError(
                    f"config.model.branch_layers={tuple(self.branch_layers)} must be multiples of the mixer pattern's "
                    f"{len(self.mixers)}, or 0."
                )

    @property
    def num_outputs(self) -> int:
        """How many outputs each token has, side by side."""
        return 1 + len(self.branch_layers)

    @property
    def num_stages(self) -> int:
        """In how many stages a step runs, with a draw behind each."""
        return self.num_outputs if self.reads_answers else 1

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> State:
        """See Backbone; where there are branches, the states of all stacks."""
        counts = (self.num_layers, *self.branch_layers)
        states = tuple(
            Stack(self.mixers, n, self.options).init_state(batch_size, max_len, max_step_len) if n else ()
            for n in counts
        )
        return states if self.branch_layers or self.reads_answers else states[0]

    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: State | None = None,
        deterministic: bool = True,
        between: Array | None = None,
    ) -> tuple[Array, State | None]:
        """See Backbone; between [B, T, R - 1, D] is added to the stream behind all outputs but the last."""
        many = self.branch_layers or self.reads_answers
        before = state if many and state is not None else (state,) * self.num_outputs
        outputs, after = [], []
        for i in range(self.num_outputs):
            x = x if between is None or not i else x + between[:, :, i - 1]
            out, x, new = self.stage(i, x, tokens, vector, before[i], deterministic)
            outputs.append(out)
            after.append(new)
        if not many:
            return outputs[0], after[0]
        return jnp.concatenate(outputs, axis=-1), None if state is None else tuple(after)

    def stage(
        self,
        number: int,
        x: Array,
        tokens: Tokens,
        vector: Array | None = None,
        state: State | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array, State | None]:
        """The layers from one output to the next: that output [B, T, D], the stream [B, T, D] and the stage's state."""
        told = self.shared_modulation(vector) if vector is not None and self.options.adaln == "shared" else vector
        stack = (self.stack, *self.branches)[number]
        if stack is not None:
            x, state = stack(x, tokens, told, state, deterministic)
        return self._finished(x, number, vector), x, state

    def _finished(self, x: Array, output: int, vector: Array | None) -> Array:
        """One output of the tokens, normed and modulated."""
        if self.options.norm_first:
            x = (self.norm, *self.branch_norms)[output](x)
        if vector is not None and self.options.adaln != "none":
            shift, scale = jnp.split(self.norm_modulation(vector), 2, axis=-1)
            x = modulated(x, shift, scale)
        return x
