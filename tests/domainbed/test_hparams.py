"""The table of DomainBed's own hyper-parameters, for where there is no DomainBed."""

from __future__ import annotations

import numpy as np
from beds import Bed

from fastdg.domainbed.hparams import DOMAINBED, SEARCHES
from fastdg.domainbed.plug import find


def test_defaults_and_draws_are_domainbeds(bed: Bed) -> None:
    registry, misc, known = (find(name) for name in ("hparams_registry", "lib.misc", "algorithms"))
    compared = [name for name in DOMAINBED if name in known.ALGORITHMS]
    assert len(compared) > 10
    for name in compared:
        defaults = registry.default_hparams(name, "PACS")
        for hparam, (default, draw) in DOMAINBED[name].items():
            assert default == defaults[hparam], (name, hparam)
            for seed in range(1, 6):
                drawn = draw(np.random.RandomState(misc.seed_hash(seed, hparam)))
                assert drawn == registry.random_hparams(name, "PACS", seed)[hparam], (name, hparam)


def test_both_tables_are_apart() -> None:
    both = DOMAINBED.keys() & SEARCHES.keys()
    assert not any(DOMAINBED[name].keys() & SEARCHES[name].keys() for name in both)
