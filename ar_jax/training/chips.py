"""What accelerators can do, by their vendors' figures: for utilisation in the logs, and for plans."""

from __future__ import annotations

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: bfloat16 FLOP/s of its matrix units.
      memory: bytes.
      bandwidth: bytes/s between it and its memory.
      links: bytes/s that it sends to its neighbours over all links together.
      clock: cycles/s; what the compiler's estimates are counted in.
      kind: a pattern of JAX's `device_kind`.
      node: so many are joined by such links; 0 for all of a pod.
      network: bytes/s that it sends to other nodes.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    clock: float
    kind: str
    node: int = 0
    network: float = 0.0

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, or else a TPU."""
        return self.node > 0


# Of GPUs those of NVIDIA's own nodes (DGX A100 and H100), whose figures for NVLink count both directions, and whose GPUs each
# have a network adapter, of 200 and 400 Gbit/s.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 1.05e9, "TPU v4"),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 1.5e9, "TPU v5( lite|e)"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 1.75e9, "TPU v5p?"),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, 1.75e9, "TPU v6( lite|e)"),
    "a100": Chip(312e12, 80 * GIB, 2039e9, 300e9, 1.41e9, "NVIDIA A100.*", 8, 25e9),
    "h100": Chip(989e12, 80 * GIB, 3350e9, 450e9, 1.98e9, "NVIDIA H100.*", 8, 50e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, or None where it is not among CHIPS."""
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device_kind)), None)
