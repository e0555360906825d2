"""Molecules as pictures of their graphs: kinds of atoms on the diagonal, orders of bonds beside it."""

from __future__ import annotations

import collections
import csv
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ar_jax.config import UsageError
from ar_jax.data.arrays import image_dataset
from ar_jax.data.files import find, read_bytes
from ar_jax.data.protocol import Dataset
from ar_jax.data.smiles import Kind, canonical, parse, possible

BUILT_IN = Path(__file__).with_name("qm9_small.txt")
REMEDY = "set config.data.path to a file of SMILES, one a line or in a column 'smiles', or leave it out for small molecules of QM9"
BOND_ORDERS = 4  # none, single, double, triple
SHUFFLE = 0  # seeds which molecules are held out


def load_molecules(
    path: str = "", max_atoms: int = 0, num_kinds: int = 8, test_fraction: float = 0.1, limit: int = 0
) -> Dataset:
    """Pictures [N, N, 1] of graphs of up to N heavy atoms; hydrogens are what valences leave.

    Level 0 is nothing: no atom, no bond. On the diagonal level k is the k-th most frequent kind of atom, an element with a
    charge; elsewhere levels 1 to 3 are bonds, double and triple ones included, and greater ones mean nothing. Atoms stand in
    the order that the SMILES names them in. `judge` tells of samples

    - `valid_fraction`: at least one atom, nothing that means nothing, no bond without its atoms, all connected, no valence
      exceeded. Nothing else is asked of chemistry.
    - `unique_fraction`: different graphs among the valid ones.
    - `novel_fraction`: valid ones, each counted once, that are not among the molecules to learn from.

    Args:
      path: a file of SMILES, the first word of each line, or a CSV file with a column "smiles"; "" takes the 795 molecules of
        QM9 (doi:10.1038/sdata.2014.22) of up to 6 heavy atoms that come with the library.
      max_atoms: N, larger molecules are left out; 0 takes the largest molecule's.
      num_kinds: molecules with an atom of a rarer kind than so many are left out.
      test_fraction: held out, drawn at random.
      limit: only the first so many molecules of the file are read; 0 reads all.

    Raises:
      UsageError: a file that is missing or holds no molecules, or options that leave none.
    """
    if max_atoms < 0 or num_kinds < 1 or limit < 0 or not 0 < test_fraction < 1:
        raise UsageError(
            f"config.data.max_atoms={max_atoms}, limit={limit}, num_kinds={num_kinds} or test_fraction={test_fraction} means "
            "nothing; use 0 or more, 0 or more, 1 or more, and a fraction between 0 and 1."
        )
    graphs = list(_graphs(_lines(path)[: limit or None]))
    counts = collections.Counter(kind for kinds, _ in graphs for kind in kinds)
    names = [kind for kind, _ in counts.most_common(num_kinds)]
    most = max_atoms or max((len(kinds) for kinds, _ in graphs), default=0)
    kept = [(kinds, orders) for kinds, orders in graphs if len(kinds) <= most and set(kinds) <= set(names)]
    kept = [kept[i] for i in np.random.default_rng(SHUFFLE).permutation(len(kept))]
    num_test = round(len(kept) * test_fraction)
    if not 0 < num_test < len(kept):
        raise UsageError(f"{path or BUILT_IN.name} has {len(kept)} molecules that can be taken, too few; {REMEDY}.")
    pictures = np.stack([_picture(kinds, orders, names, most) for kinds, orders in kept])
    train, test = pictures[num_test:], pictures[:num_test]
    levels = max(len(names) + 1, BOND_ORDERS)
    data = image_dataset((train, None), (test, None), path or BUILT_IN.name, levels=levels)
    judge = functools.partial(judged, names=names, levels=levels, known=kept[num_test:])
    return Dataset("image", data.shape, levels, train=data.train, test=data.test, judge=judge)


def _lines(path: str) -> list[str]:
    """The SMILES of a file."""
    text = read_bytes(find(path, REMEDY) if path else BUILT_IN, REMEDY).decode("utf-8", "replace")
    lines = text.splitlines()
    header = next(csv.reader(lines[:1]), [])
    if "smiles" in header:
        return [row["smiles"].strip() for row in csv.DictReader(lines)]
    return [line.split()[0] for line in lines if line.strip()]


def _graphs(lines: Iterable[str]) -> Iterable[tuple[list[Kind], np.ndarray]]:
    for line in lines:
        try:
            graph = parse(line)
        except ValueError:  # several molecules, or an element that is not read here
            continue
        if possible(*graph):
            yield graph


def _picture(kinds: Sequence[Kind], orders: np.ndarray, names: Sequence[Kind], side: int) -> np.ndarray:
    picture = np.zeros((side, side), np.uint8)
    count = len(kinds)
    picture[:count, :count] = orders
    picture[np.arange(count), np.arange(count)] = [1 + names.index(kind) for kind in kinds]
    return picture


def graph_of(picture: np.ndarray, names: Sequence[Kind]) -> tuple[list[Kind], np.ndarray] | None:
    """The graph of a picture [N, N] of levels, or None where something in it means nothing; absent atoms are left out."""
    atoms = np.diagonal(picture)
    orders = np.where(np.eye(len(picture), dtype=bool), 0, picture)
    present = np.flatnonzero(atoms)
    if atoms.max(initial=0) > len(names) or orders.max(initial=0) >= BOND_ORDERS or orders[atoms == 0].any():
        return None
    return [names[level - 1] for level in atoms[present]], orders[np.ix_(present, present)]


def judged(
    samples: np.ndarray, names: Sequence[Kind], levels: int, known: Sequence[tuple[list[Kind], np.ndarray]]
) -> dict[str, float]:
    """How many samples are molecules, and how many of these are different and new; see `load_molecules`.

    Args:
      samples: [n, N, N, 1] in [-1, 1].
      names: the kinds of atoms, from level 1 on.
      levels: of the pictures.
      known: graphs to learn from.
    """
    values = np.round((samples[..., 0] + 1) / 2 * (levels - 1)).astype(int)
    graphs = [graph for graph in (graph_of(picture, names) for picture in values) if graph and possible(*graph)]
    found = {canonical(*graph): _formula(*graph) for graph in graphs}
    wanted = set(found.values())
    old = {canonical(*graph) for graph in known if _formula(*graph) in wanted}
    return {
        "valid_fraction": len(graphs) / len(samples),
        "unique_fraction": len(found) / max(len(graphs), 1),
        "novel_fraction": len(set(found) - old) / max(len(found), 1),
    }


def _formula(kinds: Sequence[Kind], orders: np.ndarray) -> tuple[tuple[Kind, int], ...]:
    """Each kind with its bonds: what the same molecule has in any order."""
    return tuple(sorted(zip(kinds, orders.sum(axis=1).tolist(), strict=True)))
