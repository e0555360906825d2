"""Weights that pretend to be official, of the model in toy_config.py, and the rules that tell what they are."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np

from ar_jax.interop import Interop
from ar_jax.interop.rules import join, linear, norm, packed_linear, prefixed, rows, same, stacked, unused


def rules(system):
    layer = "decoder/stack/layers/block_0"
    block = [
        packed_linear("blocks.{i}.qkv", [f"{layer}/mixer/{name}" for name in ("query", "key", "value")], bias=False),
        linear("blocks.{i}.proj", f"{layer}/mixer/out", bias=False),
        norm("blocks.{i}.norm1", f"{layer}/mixer_norm", bias=False),
        norm("blocks.{i}.norm2", f"{layer}/mlp_norm", bias=False),
        linear("blocks.{i}.fc1", f"{layer}/mlp/up", bias=False),
        linear("blocks.{i}.fc2", f"{layer}/mlp/down", bias=False),
        unused("blocks.{i}.mask"),
    ]
    network = [
        rows("codes.weight", {"value_embed/embedding": (0, 17)}, length=18),
        join({"classes": 10, "null": 1}, "condition/embed/embedding"),
        same("positions", "position_embed/embedding", shape=(1, 64, -1)),
        same("targets", "target_embed/embedding"),
        stacked(system.model.generator.decoder.num_layers, block),
        norm("norm", "decoder/norm", bias=False),
        linear("head", "head/logits"),
        unused("counter", required=False),
    ]
    return prefixed("", "generator/", network)


def weights(width: int, seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {
        "codes.weight": (18, width),
        "classes": (10, width),
        "null": (1, width),
        "positions": (1, 64, width),
        "targets": (64, width),
        "norm.weight": (width,),
        "head.weight": (17, width),
        "head.bias": (17,),
    }
    for i in range(2):
        shapes |= {
            f"blocks.{i}.qkv.weight": (3 * width, width),
            f"blocks.{i}.proj.weight": (width, width),
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.norm2.weight": (width,),
            f"blocks.{i}.fc1.weight": (4 * width, width),
            f"blocks.{i}.fc2.weight": (width, 4 * width),
        }
    random = np.random.default_rng(seed)
    drawn = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {f"blocks.{i}.mask": np.full((1, 2), -np.inf, np.float32) for i in range(2)}


INTEROP = Interop(str(Path(__file__).with_name("toy_config.py")), rules)


class Global:
    """A name in a pickle: what `pickle` writes is a reference to module.name, whatever that is."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """A call in a pickle, REDUCE: of a Global with arguments."""

    def __init__(self, function: Global, *arguments):
        self.function, self.arguments = function, arguments


class Stored:
    """A storage: values under a key."""

    def __init__(self, kind: str, key: str, values: np.ndarray):
        self.kind, self.key, self.values = kind, key, values


class Writer(pickle._Pickler):
    """Writes trees as torch.save does, with names that need not exist here."""

    legacy = False

    def persistent_id(self, value):
        if isinstance(value, Stored):
            end = (None,) if self.legacy else ()
            return ("storage", Global("torch", value.kind), value.key, "cpu", value.values.size, *end)
        return None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def tensor(stored: Stored, shape=None, strides=None, offset: int = 0) -> Call:
    shape = stored.values.shape if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, stored, offset, shape, strides, False, Call(Global("collections", "OrderedDict")))


def write_torch(file: Path, tree, stored=(), compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes what torch.save would."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        with archive.open("archive/data.pkl", "w") as entry:
            Writer(entry, protocol=2).dump(tree)
        archive.writestr("archive/byteorder", "little")
        for storage in stored:
            archive.writestr(f"archive/data/{storage.key}", storage.values.tobytes())
        archive.writestr("archive/version", "3\n")
    return file


def write_legacy_torch(file: Path, tree, stored=(), little_endian: bool = True) -> Path:
    """Writes what torch.save did before 1.6."""
    stored = sorted(stored, key=lambda storage: storage.key)
    facts = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with file.open("wb") as stream:
        for part in (0x1950A86A20F9469CFC6C, 1001, facts, tree, [storage.key for storage in stored]):
            writer = Writer(stream, protocol=2)
            writer.legacy = True
            writer.dump(part)
        for storage in stored:
            stream.write(storage.values.size.to_bytes(8, "little") + storage.values.tobytes())
    return file


KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def write_torch_weights(file: Path, arrays, wrap=lambda tree: tree) -> Path:
    stored = {name: Stored(KINDS[str(a.dtype)], str(i), a) for i, (name, a) in enumerate(arrays.items())}
    return write_torch(file, wrap({name: tensor(storage) for name, storage in stored.items()}), stored.values())
