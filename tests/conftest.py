"""What holds for every test: strict arrays, several devices, no memory of what ran before."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than running here: without XLA's newer emitters of fused loops it takes a third of the time.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # the last one holds

import jax  # noqa: E402  (the flags above count only before the first import)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

_tests_run = itertools.count(1)
_MANY_MAPS = 30_000  # of the 65,530 memory maps that Linux lets a process have by default


@pytest.fixture(autouse=True)
def compiled_programs_are_given_up_in_time() -> Iterator[None]:
    """Every compiled program keeps some memory maps: one process of this suite was seen with more than half of its share."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests_run) % 20 == 0 and maps.exists() and maps.read_text().count("\n") > _MANY_MAPS:
        jax.clear_caches()
