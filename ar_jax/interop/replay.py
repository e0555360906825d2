"""Official runs replayed: python -m ar_jax.interop.replay DIR --out=FILE.safetensors.

DIR holds meta.json, weights.safetensors (official names) and io.safetensors, of which only the inputs, `in.*`, are read;
FILE gets every output, `out.*`, that meta.json names, computed by this library. With --compare the recorded outputs are
read afterwards and the differences told; --markdown=FILE writes them as a page, for any number of DIRs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.config import UsageError
from ar_jax.interop import lazily, mixers
from ar_jax.interop.arguments import exit_code, parse
from ar_jax.interop.files import read_safetensors, write_safetensors
from ar_jax.interop.kinds import Arrays, Meta, Replay

REPLAYS = mixers.REPLAYS | {
    "llamagen_c2i": Replay(
        r"FoundationVision/LlamaGen;.*class-cond.*gpt\.Transformer", lazily("llamagen:replay_class")
    ),
    "llamagen_t2i": Replay(r"FoundationVision/LlamaGen;.*text-cond.*gpt\.Transformer", lazily("llamagen:replay_text")),
    "llamagen_vq": Replay(
        r"FoundationVision/LlamaGen;.*vq_model\.VQModel", lazily("replay_tokenizers:replay_llamagen_vq")
    ),
    "var": Replay(r"FoundationVision/VAR;.*models\.var\.VAR", lazily("var:replay")),
    "var_vqvae": Replay(
        r"FoundationVision/VAR;(?!.*models\.var\.).*models\.vqvae\.VQVAE", lazily("replay_tokenizers:replay_var_vqvae")
    ),
    "rar": Replay(r"bytedance/1d-tokenizer;.*modeling\.rar\.RAR", lazily("rar:replay")),
    "arpg": Replay(r"hp-l33/ARPG;.*models\.arpg\.Transformer", lazily("arpg:replay")),
    "aim": Replay(r"hp-l33/AiM;.*MambaLMHeadModel", lazily("aim:replay")),
    "mvar": Replay(r"OliverRensu/MVAR;.*models\.mvar\.MVAR", lazily("mvar:replay")),
    "mar": Replay(r"LTH14/mar;.*models\.mar\.MAR", lazily("mar:replay")),
    "maskgit": Replay(r"bytedance/1d-tokenizer;.*modeling\.maskgit\.(ImageBert|UViTBert)", lazily("maskgit:replay")),
    "lpd": Replay(r"mit-han-lab/lpd;.*models\.lpd\.LPD", lazily("lpd:replay")),
    "npp": Replay(r"PKU-YuanGroup/Next-Patch-Prediction;.*gpt\.Transformer", lazily("npp:replay")),
    "maskgil": Replay(r"synbol/MaskGIL;.*Network\.gpt\.Transformer", lazily("maskgil:replay")),
    "dnd_transformer": Replay(
        r"chenllliang/DnD-Transformer;.*gpt_multitoken_v3\.Transformer", lazily("dnd_transformer:replay")
    ),
    "par": Replay(r"(Epiphqny|YuqingWang1029)/PAR;.*gpt\.Transformer", lazily("par:replay")),
    "nar": Replay(r"ThisisBillhe/NAR;.*gpt\.Transformer", lazily("nar:replay")),
    "titok": Replay(r"bytedance/1d-tokenizer;.*modeling\.titok\.TiTok", lazily("replay_tokenizers:replay_titok")),
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one output of a replay differs from the recorded one.

    Attributes:
      run: the folder's name.
      output: its name, such as `out.logits`.
      found: the greatest difference of floats, or how many integers are unequal.
      atol: the greatest difference allowed, or 0 for integers.
      size: how many values there are.
      exact: whether they are integers.
    """

    run: str
    output: str
    found: float
    atol: float
    size: int
    exact: bool

    @property
    def within(self) -> bool:
        """Whether it may be so; what is not a number may not."""
        return self.found <= self.atol

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Run, output, difference and allowance, for people."""
        if not self.exact:
            return self.run, self.output, f"{self.found:.1e}", f"{self.atol:.0e}"
        return self.run, self.output, f"{self.found:.0f} of {self.size} unequal" if self.found else "equal", "equal"


def kind_of(meta: Meta, name: str = "") -> str:
    """The key of REPLAYS for a run that meta.json describes; the folder's name decides only where the text does not.

    Raises:
      UsageError: there is none.
    """
    text = "; ".join(str(meta.get(key, "")) for key in ("source", "system", "class")).replace("\n", " ")
    found = [kind for kind, replay in REPLAYS.items() if re.search(replay.told_by, text)]
    if len(found) == 1:
        return found[0]
    named = [kind for kind in found or REPLAYS if name.startswith(kind)]
    if not named:
        raise UsageError(f"There is no replay of {text[:150]!r}; known are {', '.join(REPLAYS)}.")
    return max(named, key=len)


def replay(folder: Path) -> dict[str, np.ndarray]:
    """All outputs that the folder's meta.json names, from its weights and inputs, in the shapes and dtypes it tells.

    Raises:
      UsageError: a file is missing or damaged, or no replay is known for such a run.
    """
    meta = _meta(folder)
    inputs = read_safetensors(folder / "io.safetensors", "in.")
    weights = read_safetensors(folder / "weights.safetensors")
    found = REPLAYS[kind_of(meta, folder.name)].function(meta, weights, inputs)
    missing = [name for name in meta["outputs"] if name not in found]
    if missing:
        raise UsageError(f"The replay of {folder} gives no {', '.join(missing)}; it gives {', '.join(found)}.")
    return {name: _as_told(name, found[name], told) for name, told in meta["outputs"].items()}


def compare(folder: Path, outputs: Arrays) -> list[Difference]:
    """The differences between outputs of a replay and those recorded in the folder, floats against its meta's `atol`."""
    recorded, meta = read_safetensors(folder / "io.safetensors", "out."), _meta(folder)
    return [_difference(folder.name, name, outputs[name], recorded[name], meta["atol"]) for name in meta["outputs"]]


def _difference(run: str, name: str, found: np.ndarray, recorded: np.ndarray, atol: float) -> Difference:
    if not np.issubdtype(recorded.dtype, np.floating):
        return Difference(run, name, float(np.sum(found != recorded)), 0.0, recorded.size, True)
    same = (found == recorded) | (np.isnan(found) & np.isnan(recorded))  # infinities of masked logits, too
    gaps = np.where(same, 0, np.abs(np.where(same, 0, found.astype(np.float64)) - np.where(same, 0, recorded)))
    return Difference(run, name, float(gaps.max(initial=0)), atol, recorded.size, False)


def _as_told(name: str, array: Any, told: Mapping[str, Any]) -> np.ndarray:
    array = np.asarray(array)
    if array.size != np.prod(told["shape"], dtype=int):
        raise UsageError(f"The replay gives {name} the shape {list(array.shape)}, but meta.json tells {told['shape']}.")
    return array.reshape(told["shape"]).astype(told["dtype"])


def _meta(folder: Path) -> Meta:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return meta | {"outputs": dict(meta["outputs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / 'meta.json'} cannot be read ({error}); give the folder of an official run."
        ) from error


def markdown(differences: Sequence[Difference]) -> str:
    """The page docs/parity.md."""
    rows = [f"| {' | '.join(d.texts)} | {'yes' if d.within else '**no**'} |" for d in differences]
    runs = len({d.run for d in differences})
    return "\n".join(
        [
            "# Parity with official implementations",
            "",
            "<!-- Written by `python -m ar_jax.interop.replay --compare --markdown=docs/parity.md DIR ...`. -->",
            "",
            f"{runs} recorded runs of official code, replayed from their weights and inputs: the greatest difference of each "
            "output in float32, and the difference allowed. Tokens must be equal.",
            "",
            "| run | output | greatest difference | allowed | within |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _command(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        "python -m ar_jax.interop.replay",
        description=__doc__,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="of recorded official runs")
    parser.add_argument("--out", type=Path, help="FILE.safetensors to write the outputs to, of one DIR")
    parser.add_argument("--compare", action="store_true", help="tell the differences; exit code 1 if one is too great")
    parser.add_argument("--markdown", type=Path, help="FILE.md to write the differences to; means --compare")
    options = parse(parser, arguments)
    compares = options.compare or options.markdown is not None
    if not options.folders or (options.out is None and not compares):
        raise UsageError("Nothing to do; give a DIR and --out=FILE.safetensors, or DIRs and --compare.")
    if options.out and len(options.folders) > 1:
        raise UsageError(
            f"--out takes the outputs of one DIR, not of {len(options.folders)}; leave it out or give one."
        )
    differences = []
    for folder in options.folders:
        outputs = replay(folder)
        if options.out:
            write_safetensors(options.out, outputs)
        found = compare(folder, outputs) if compares else []
        for difference in found:
            print("\t".join((*difference.texts, "" if difference.within else "TOO GREAT")), flush=True)
        differences += found
    if options.markdown:
        options.markdown.write_text(markdown(differences))
    return int(any(not difference.within for difference in differences))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, 1 if a difference is too great, or one sentence on standard error and 2."""
    return exit_code(_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
