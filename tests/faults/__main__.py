"""``python -m faults``, in the folder of the tests: the campaign."""

import argparse
from pathlib import Path

from faults.campaign import campaign, listed, table, to_json
from faults.kinds import FAMILIES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=2200, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="at a time")
    parser.add_argument("--hours", type=float, default=2.0, help="at most")
    parser.add_argument("--family", action="append", help="these alone: NAME, or NAME:INDEX")
    parser.add_argument("--table", type=Path, help="write the table into this file")
    parser.add_argument("--json", type=Path, help="write every fault into this file")
    asked = parser.parse_args()
    results = campaign(
        asked.faults, asked.seed, asked.lanes, only(asked.family, asked.faults), asked.hours * 3600
    )
    text = f"{table(results)}\n\n{listed(results)}\n"
    print(text)
    if asked.table:
        asked.table.write_text(text)
    if asked.json:
        asked.json.write_text(to_json(results))
    return int(any(each.kind not in ("ok", "clean") for each in results))


def only(names: list[str] | None, total: int) -> dict[str, list[int]] | None:
    """Families, whole or single faults of them."""
    found: dict[str, list[int]] = {}
    for name in names or ():
        family, _, index = name.partition(":")
        own = range(FAMILIES[family].count(total))
        found.setdefault(family, []).extend([int(index)] if index else own)
    return found or None


if __name__ == "__main__":
    raise SystemExit(main())
