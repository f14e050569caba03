"""A few faults of every kind in every run of the tests; `make faults` tries them all."""

import pytest

from faults.campaign import listed, run_all
from faults.kinds import FAMILIES

QUICK = {
    "weights": 14,
    "configs": 12,
    "GGUF files": 10,
    "tokenizers": 4,
    "texts": 10,
    "records": 8,
    "recipes": 6,
    "numbers": 6,
    "paths": 5,
    "kills": 4,
    "full disks": 3,
    "code": 6,
}
"""How many of each kind; those with a process of their own are left to the whole campaign."""


def spread(family: str, count: int) -> list[tuple[str, int]]:
    """Members of a family, evenly through what there is."""
    whole = FAMILIES[family].count(10 * count)
    first = 3 if family == "code" else 0  # after those in processes of their own
    return [(family, first + (whole - first) * number // count) for number in range(count)]


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_wrong(tmp_path) -> None:
    faults = [fault for family, count in QUICK.items() for fault in spread(family, count)]
    results = list(run_all(faults, seed=0, lanes=1, home=tmp_path))
    assert len(results) == len(faults)
    assert {each.kind for each in results} >= {"ok", "clean"}
    wrong = [each for each in results if each.kind not in ("ok", "clean")]
    assert not wrong, f"{len(wrong)} of {len(results)} faults ended wrong:\n{listed(results)}"
