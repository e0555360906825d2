"""Official checkpoints in, and out: which config file, which rules. Rules are found when they are asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Interop:
    """What official weights of one system need.

    Attributes:
      config: the file whose variants are the official sizes.
      network: System to the rules of the network, whose leaves are `generator/...`.
      tokenizer: tokenizer to the rules of the tokenizer, whose leaves follow `tokenizer/`; None where it learns nothing.
      num_classes: of the data that the official weights were trained on.
    """

    config: str
    network: Callable[[Any], Any]
    tokenizer: Callable[[Any], Any] | None = None
    num_classes: int = 1000

    def rules(self, system: Any) -> list[Any]:
        """The rules of all parameters of a system; of its tokenizer's only where that is a learned one."""
        from ar_jax.interop.rules import prefixed

        if self.tokenizer is None or not hasattr(system.tokenizer, "network"):
            return [self.network(system)]
        return [self.network(system), prefixed("", "tokenizer/", self.tokenizer(system.tokenizer))]


def lazily(place: str) -> Callable[..., Any]:
    """The function at `module:name` of this folder, imported when it is first called."""
    module, _, name = place.partition(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(*args)

    return call


SYSTEMS = {
    "llamagen": Interop("configs/llamagen.py", lazily("llamagen:rules"), lazily("tokenizers:llamagen_vq")),
    "var": Interop("configs/var.py", lazily("var:rules"), lazily("tokenizers:var_vqvae")),
    "rar": Interop("configs/rar.py", lazily("rar:rules"), lazily("tokenizers:maskgit_vqgan")),
    "arpg": Interop("configs/arpg.py", lazily("arpg:rules"), lazily("tokenizers:llamagen_vq")),
    "aim": Interop("configs/aim.py", lazily("aim:rules"), lazily("aim:tokenizer_rules")),
    # With the places of the official sampling, which are not those of the official training.
    "aim_as_sampled": Interop("configs/aim.py", lazily("aim:rules_as_sampled"), lazily("aim:tokenizer_rules")),
    "mvar": Interop("configs/mvar.py", lazily("mvar:rules"), lazily("tokenizers:var_vqvae")),
    "mar": Interop("configs/mar.py", lazily("mar:rules"), lazily("tokenizers:mar_kl")),
    "maskgit": Interop("configs/maskgit.py", lazily("maskgit:rules"), lazily("tokenizers:titok")),
    "lpd": Interop("configs/lpd.py", lazily("lpd:rules"), lazily("tokenizers:llamagen_vq")),
    "npp": Interop("configs/npp.py", lazily("llamagen:rules"), lazily("tokenizers:llamagen_vq")),
    "maskgil": Interop("configs/maskgil.py", lazily("maskgil:rules"), lazily("tokenizers:llamagen_vq")),
    "dnd_transformer": Interop(
        "configs/dnd_transformer.py", lazily("dnd_transformer:rules"), lazily("tokenizers:rq_vae")
    ),
    "par": Interop("configs/par.py", lazily("par:rules"), lazily("tokenizers:llamagen_vq")),
    "nar": Interop("configs/nar.py", lazily("nar:rules"), lazily("tokenizers:llamagen_vq")),
    "nar_video": Interop("configs/nar_video.py", lazily("nar:video_rules"), num_classes=101),
}
