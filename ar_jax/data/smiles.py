"""Molecules written as SMILES, read into graphs of their heavy atoms, and what can be told of such graphs.

A graph is a list of kinds, (element, charge), and a symmetric matrix of bond orders 0 to 3. Hydrogens are left out: an atom has
as many as its valence leaves. Stereochemistry and isotopes are not kept, and aromatic rings become alternating bonds.
"""

from __future__ import annotations

import re

import numpy as np

Kind = tuple[str, int]
VALENCES = {"B": 3, "C": 4, "N": 3, "O": 2, "F": 1, "P": 5, "S": 6, "Cl": 1, "Br": 1, "I": 1}
IN_RINGS = {"P": 3, "S": 2}  # in aromatic rings
ORDERS = {"-": 1, "=": 2, "#": 3, "/": 1, "\\": 1}
_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOPSFIbcnops]|[-=#:/\\.()]|%\d\d|\d")
_BRACKET = re.compile(r"\[\d*([A-Z][a-z]?|[bcnops])@{0,2}(?:H(\d*))?(\++\d*|-+\d*)?(?::\d+)?\]")


def valence(kind: Kind) -> int:
    """How many bonds an atom of a kind has at most, its hydrogens counted: a charge of N, O, S, ... adds one, of C takes one."""
    element, charge = kind
    if element == "B":
        return VALENCES[element] - charge
    return VALENCES[element] - abs(charge) if element == "C" else VALENCES[element] + charge


def parse(text: str) -> tuple[list[Kind], np.ndarray]:
    """The graph of a molecule.

    Args:
      text: SMILES of one molecule, without blanks.

    Returns:
      The kinds of its N heavy atoms, in the order that they are written in, and [N, N] int8 bond orders.

    Raises:
      ValueError: what is not SMILES, or beyond what is read here: several molecules, atoms other than VALENCES, an aromatic
        ring without alternating bonds.
    """
    if "".join(_TOKEN.findall(text)) != text or "." in text:
        raise ValueError(f"{text!r} is not the SMILES of one molecule")
    kinds: list[Kind] = []
    hydrogens: list[int] = []
    aromatic: list[bool] = []
    bonds: dict[tuple[int, int], str] = {}
    rings: dict[str, tuple[int, str]] = {}
    branches: list[int] = []
    last, symbol = -1, ""
    for token in _TOKEN.findall(text):
        if token == "(":
            branches.append(last)
        elif token == ")":
            last = _popped(branches, text)
        elif token in ORDERS or token == ":":
            symbol = token
        elif token[0].isdigit() or token[0] == "%":
            if token in rings:
                other, opened = rings.pop(token)
                bonds[other, last] = symbol or opened
            else:
                rings[token] = (last, symbol)
            symbol = ""
        else:
            kind, count, lower = _atom(token, text)
            kinds, hydrogens, aromatic = [*kinds, kind], [*hydrogens, count], [*aromatic, lower]
            if last >= 0:
                bonds[last, len(kinds) - 1] = symbol
            last, symbol = len(kinds) - 1, ""
    if rings or branches or not kinds:
        raise ValueError(f"{text!r} has a ring or a branch that is not closed")
    return kinds, _bond_orders(kinds, hydrogens, aromatic, bonds, text)


def _popped(branches: list[int], text: str) -> int:
    if not branches:
        raise ValueError(f"{text!r} closes a branch that was not opened")
    return branches.pop()


def _atom(token: str, text: str) -> tuple[Kind, int, bool]:
    """Kind, hydrogens that are written, and whether the atom is aromatic."""
    if token[0] != "[":
        return (token.capitalize(), 0), 0, token.islower()
    found = _BRACKET.fullmatch(token)
    if found is None or found[1].capitalize() not in VALENCES:
        raise ValueError(f"{text!r} has the atom {token}, which is not known here")
    count, sign = found[2], found[3] or ""
    amount = int(sign.strip("+-") or len(sign)) if sign else 0
    charge = -amount if sign.startswith("-") else amount
    return (found[1].capitalize(), charge), 0 if count is None else int(count or 1), found[1].islower()


def _bond_orders(
    kinds: list[Kind], hydrogens: list[int], aromatic: list[bool], bonds: dict[tuple[int, int], str], text: str
) -> np.ndarray:
    orders = np.zeros((len(kinds), len(kinds)), np.int8)
    open_bonds = []
    for (a, b), symbol in bonds.items():
        if symbol == ":" or (not symbol and aromatic[a] and aromatic[b]):
            open_bonds.append((a, b))
        orders[a, b] = orders[b, a] = ORDERS.get(symbol, 1)
    room = [
        IN_RINGS[element] + charge if element in IN_RINGS else valence((element, charge)) for element, charge in kinds
    ]
    lacking = {i for i in range(len(kinds)) if aromatic[i] and room[i] - orders[i].sum() - hydrogens[i] >= 1}
    for a, b in _matching(lacking, [bond for bond in open_bonds if set(bond) <= lacking], text):
        orders[a, b] = orders[b, a] = 2
    return orders


def _matching(atoms: set[int], bonds: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Bonds that meet every atom once, so that a ring's bonds alternate."""
    if not atoms:
        return []
    beside = {a: [bond for bond in bonds if a in bond] for a in atoms}
    scarce = min(atoms, key=lambda a: (len(beside[a]), a))
    for bond in beside[scarce]:
        rest = atoms - set(bond)
        try:
            return [bond, *_matching(rest, [b for b in bonds if set(b) <= rest], text)]
        except ValueError:
            continue
    raise ValueError(f"{text!r} has an aromatic ring whose bonds do not alternate")


def possible(kinds: list[Kind], orders: np.ndarray) -> bool:
    """Whether a graph can be a molecule: at least one atom, all connected, none with more bonds than its valence."""
    if not kinds or any(orders[i].sum() > valence(kind) for i, kind in enumerate(kinds)):
        return False
    reached, border = {0}, [0]
    while border:
        found = set(np.flatnonzero(orders[border.pop()]).tolist()) - reached
        reached |= found
        border += sorted(found)
    return len(reached) == len(kinds)


def canonical(kinds: list[Kind], orders: np.ndarray) -> tuple[object, ...]:
    """A name of the graph that does not depend on the order of its atoms: equal just for molecules that are the same.

    Colours are refined by those of the neighbours; where several atoms share one, each of them is set apart in turn, and the
    least of the names that follow is taken.
    """
    table = {kind: number for number, kind in enumerate(sorted(set(kinds)))}
    return _least(np.asarray([table[kind] for kind in kinds]), kinds, orders)


def _least(colours: np.ndarray, kinds: list[Kind], orders: np.ndarray) -> tuple[object, ...]:
    while True:
        seen = [
            (int(c), tuple(sorted((int(o), int(colours[j])) for j, o in enumerate(row) if o)))
            for c, row in zip(colours, orders, strict=True)
        ]
        table = {key: number for number, key in enumerate(sorted(set(seen)))}
        refined = np.asarray([table[key] for key in seen])
        if len(table) == len(set(colours.tolist())):
            break
        colours = refined
    counts = np.bincount(refined)
    if counts.max() == 1:
        place = np.argsort(refined)
        return (*(kinds[i] for i in place), orders[np.ix_(place, place)].astype(np.int8).tobytes())
    tied = np.flatnonzero(refined == np.argmax(counts > 1))
    apart = [np.where(np.arange(len(kinds)) == i, -1, refined) for i in tied]
    return min(_least(np.unique(a, return_inverse=True)[1], kinds, orders) for a in apart)
