"""Official weights as a run, and back: python -m ar_jax.interop.convert --system=var --weights=FILE,FILE --out=DIR.

DIR is then what train.py leaves: eval.py and `ar_jax.load` read it, train.py goes on from it. The config's size follows
from the weights, or is given: --config=configs/var.py:d16. --export=FILE.safetensors --workdir=DIR writes the weights of
a run under their official names; what was converted and not trained since comes back bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import runpy
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax import run
from ar_jax.config import UsageError, get_config, nearest
from ar_jax.data.protocol import Facts
from ar_jax.interop import SYSTEMS, Interop
from ar_jax.interop.arguments import exit_code, parse
from ar_jax.interop.files import read_safetensors, read_weights, write_safetensors
from ar_jax.interop.transfer import Converted, misfits, to_official, to_ours
from ar_jax.interop.workdirs import write_run
from ar_jax.system import System, from_config
from ar_jax.training.paths import named_leaves
from ar_jax.training.workdir import plain_values

KEPT, RECORD = "kept.safetensors", "conversion.json"
Weights = Mapping[str, np.ndarray]


def convert(interop: Interop, weights: Weights, out: Path, config: str | None = None) -> tuple[str, Converted]:
    """Makes a run of official weights. The directory is made whole at the end, or not at all.

    Args:
      interop: an entry of SYSTEMS.
      weights: arrays by official name.
      out: the directory of the run; it must not exist or be empty.
      config: FILE.py:variant; None takes the variant of the system's config file whose parameters the weights fit.

    Returns:
      The config as FILE.py:variant, and what became of the weights.

    Raises:
      UsageError: weights, config and system do not fit one another, or the directory is in use.
    """
    _check_free(out)
    chosen = config or infer(interop, weights)
    values, system, facts = _built(interop, chosen)
    converted = to_ours(interop.rules(system), weights, _shapes(system))
    record = {
        "config": chosen,
        "parameters": sum(leaf.size for leaf in named_leaves(converted.params).values()),
        "used": converted.used,
        "kept": {name: list(array.shape) for name, array in converted.kept.items()},
        "dtypes": converted.dtypes,
    }
    with _whole(out) as folder:
        write_run(folder, values, system, facts, converted.params)
        if converted.kept:
            write_safetensors(folder / KEPT, converted.kept)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return chosen, converted


def infer(interop: Interop, weights: Weights) -> str:
    """The variant, as FILE.py:variant, all of whose parameters' shapes the weights fit.

    Raises:
      UsageError: none; it names the nearest, and the first thing that does not fit. Or several that are not the same, such
        as those of one network for images of two sizes.
    """
    found, fitting = {}, {}
    for variant in _variants(interop.config):
        spec = f"{interop.config}:{variant}"
        try:
            config, system, _ = _built(interop, spec)
            rules = interop.rules(system)
        except (AttributeError, UsageError):  # a variant of other parts or data, such as one to try things out with
            continue
        found[spec] = misfits(rules, weights, _shapes(system))
        if not found[spec]:
            fitting[json.dumps(plain_values(config), sort_keys=True)] = spec  # "base" and the size that it is are one
    if len(fitting) > 1:
        raise UsageError(f"These weights fit {', '.join(fitting.values())}; name one of them with --config.")
    if fitting:
        return next(iter(fitting.values()))
    if not found:
        raise UsageError(f"No variant of {interop.config} has the parts of the official system; give --config.")
    spec = min(found, key=lambda name: len(found[name]))
    raise UsageError(f"No variant of {interop.config} fits these weights; the nearest is {spec}. {found[spec][0]}")


def export(interop: Interop, workdir: Path, file: Path) -> dict[str, np.ndarray]:
    """Writes the weights of a run (averaged, where it keeps an average) under their official names.

    Raises:
      UsageError: there is no run, it is of another system, or the file is there already.
    """
    if file.exists():
        raise UsageError(f"{file} exists; choose another --export.")
    state = run.load(workdir)
    kept = read_safetensors(workdir / KEPT) if (workdir / KEPT).exists() else {}
    dtypes = json.loads((workdir / RECORD).read_text())["dtypes"] if (workdir / RECORD).exists() else {}
    official = to_official(interop.rules(state.system), state.params, kept, dtypes)
    write_safetensors(file, official)
    return official


def _built(interop: Interop, spec: str) -> tuple[Any, System, Facts]:
    config = get_config(spec)
    facts = _facts(json.dumps(dict(config["data"])), interop.num_classes)
    return config, from_config(config, facts), facts


@functools.cache
def _facts(data: str, num_classes: int) -> Facts:
    """What the config's data is: asked of the data set where it is at hand, otherwise an image of `image_size`."""
    options = json.loads(data)
    try:
        found = run.load_data({"seed": 0, "data": options} | dict.fromkeys(run.NEEDED[2:], {}))
        return Facts(found.modality, found.shape, found.levels, found.label_names)
    except UsageError:
        if not options.get("image_size"):
            raise
        size = options["image_size"]
        return Facts("image", (size, size, 3), 256, tuple(map(str, range(num_classes))))


def _shapes(system: System) -> Any:
    return jax.eval_shape(system.init, jax.random.key(0))


def _variants(config: str) -> list[str]:
    get_config(config)  # says what is wrong with the file, if anything is
    file = Path(config).absolute()
    root = next((str(folder.parent) for folder in file.parents if folder.name == "configs"), str(file.parent.parent))
    sys.path.insert(0, root)
    try:
        return list(runpy.run_path(str(file))["VARIANTS"])
    finally:
        sys.path.remove(root)


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty directory; choose another --out.")


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A directory to write in that becomes `out` when all has gone well, and vanishes otherwise."""
    part = out.absolute().with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, out)
    except OSError as error:
        raise UsageError(f"Cannot write {out} ({error.strerror or error}); choose another --out.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _report(chosen: str, converted: Converted, out: Path, verbose: bool) -> None:
    if verbose:
        for name in converted.used:
            print(f"used  {name}{f' ({converted.dtypes[name]})' if name in converted.dtypes else ''}")
        for name, array in converted.kept.items():
            print(f"kept  {name} {list(array.shape)}")
    size = sum(leaf.size for leaf in named_leaves(converted.params).values())
    print(f"{chosen}: {size:,} parameters from {len(converted.used)} official weights.")
    print(f"{len(converted.kept)} official arrays or parts of them are kept for an export; none is left over.")
    print(f"Next: python eval.py --workdir={out}")


def _command(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        "python -m ar_jax.interop.convert",
        description=__doc__,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", help=", ".join(SYSTEMS))
    parser.add_argument("--weights", help="FILE or FILE,FILE: .safetensors, or what torch.save writes")
    parser.add_argument("--key", help="where in the file the weights are, such as model_ema; KEY,KEY for two files")
    parser.add_argument("--config", help="FILE.py:variant; without it the size follows from the weights")
    parser.add_argument("--out", type=Path, help="the directory of the run to make")
    parser.add_argument("--workdir", type=Path, help="the directory of the run to export")
    parser.add_argument("--export", type=Path, help="FILE.safetensors to write")
    parser.add_argument("--verbose", action="store_true", help="name every official weight")
    options = parse(parser, arguments)
    if options.system not in SYSTEMS:
        raise UsageError(
            f"--system={options.system} is unknown.{nearest(options.system, SYSTEMS)} Known: {', '.join(SYSTEMS)}."
        )
    wanted = ("workdir", "export") if options.export or options.workdir else ("weights", "out")
    for name in wanted:
        if not getattr(options, name):
            raise UsageError(
                f"--{name} is missing; give --weights and --out to convert, --workdir and --export to export."
            )
    interop = SYSTEMS[options.system]
    if options.export:
        official = export(interop, options.workdir, options.export)
        print(f"{options.export}: {len(official)} official weights.")
    else:
        _check_free(options.out)
        weights = read_weights(options.weights, options.key)
        _report(*convert(interop, weights, options.out, options.config), options.out, options.verbose)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or one sentence on standard error and 2."""
    return exit_code(_command, arguments)


if __name__ == "__main__":
    sys.exit(main())
