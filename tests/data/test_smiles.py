"""SMILES become graphs, and graphs are told apart, whatever the order of their atoms."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.data.molecules import load_molecules
from ar_jax.data.smiles import canonical, parse, possible, valence

GRAPHS = {  # atoms, sum of bond orders, charges
    "C": (1, 0, 0),
    "C#N": (2, 3, 0),
    "CC(=O)[O-]": (4, 4, -1),
    "c1ccccc1": (6, 9, 0),  # three double bonds
    "c1cc[nH]c1": (5, 7, 0),  # pyrrole: two
    "Cn1cnc2c1c(=O)n(C)c(=O)n2C": (14, 19, 0),  # caffeine
    "c1ccc2ccccc2c1": (10, 16, 0),
    "C[C@@H](F)/C=C/Cl": (6, 6, 0),
    "C%12CC%12": (3, 3, 0),
    "C[NH+]1CC1": (4, 4, 1),
    "CS(=O)(=O)c1cccs1": (9, 13, 0),
}


@pytest.mark.parametrize("text", GRAPHS)
def test_molecules_have_their_atoms_and_bonds(text: str) -> None:
    kinds, orders = parse(text)
    assert (len(kinds), orders.sum() // 2, sum(charge for _, charge in kinds)) == GRAPHS[text]
    np.testing.assert_array_equal(orders, orders.T)
    assert possible(kinds, orders)


@pytest.mark.parametrize("text", ["", "C1CC", "C(C", "CC)C", "C.C", "[Xe]", "C!", "c1cccc1"])
def test_what_cannot_be_read_raises(text: str) -> None:
    with pytest.raises(ValueError, match="not|closed"):
        parse(text)


def test_names_tell_molecules_apart_and_not_their_orders() -> None:
    random = np.random.default_rng(0)
    # cubane and its like, where all atoms look alike at first; two ways of writing toluene; isomers
    texts = ["C12C3C4C1C5C2C3C45", "C1CCCCC1", "C1CC1C1CC1", "Cc1ccccc1", "CC(C)(C)C", "CCCCC", "CCO", "COC"]
    names = set()
    for text in texts:
        kinds, orders = parse(text)
        found = set()
        for _ in range(4):
            p = random.permutation(len(kinds))
            found.add(canonical([kinds[i] for i in p], orders[np.ix_(p, p)]))
        assert len(found) == 1
        names |= found
    assert len(names) == len(texts)
    assert canonical(*parse("C1=CC=CC=C1C")) == canonical(*parse("Cc1ccccc1")) == canonical(*parse("c1c(C)cccc1"))


def test_valences_bound_what_is_possible() -> None:
    assert [valence(k) for k in [("C", 0), ("C", 1), ("N", 1), ("O", -1), ("B", -1)]] == [4, 3, 4, 1, 4]
    kinds, orders = parse("OC")
    assert not possible(kinds, orders * 3)
    assert not possible(kinds, orders * 0) and not possible([], orders[:0, :0])


def test_samples_are_judged_by_validity_uniqueness_and_novelty() -> None:
    data = load_molecules()
    train, test = (source.take(np.arange(40))["image"] for source in (data.train, data.test))
    assert data.judge(test) == {"valid_fraction": 1.0, "unique_fraction": 1.0, "novel_fraction": 1.0}
    assert data.judge(train)["novel_fraction"] == 0.0
    assert data.judge(np.concatenate([test, test]))["unique_fraction"] == 0.5
    assert data.judge(-np.ones_like(test))["valid_fraction"] == 0.0  # no atoms
    broken = test.copy()
    broken[:20, 0, 1] = broken[:20, 1, 0] = 1.0  # the greatest level is no bond
    assert data.judge(broken)["valid_fraction"] == 0.5
