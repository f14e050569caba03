"""Print the oldest release of every dependency that pyproject.toml allows, for pip.

Not torch: its oldest builds for Linux are several gigabytes. Its bound is tried by hand.
"""

import re
import sys
import tomllib
from pathlib import Path


def pin(requirement: str) -> str:
    """The oldest release that satisfies a requirement."""
    found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?", requirement)
    if found is None:
        sys.exit(
            f"pyproject.toml: '{requirement}' must say its oldest release, such as numpy>=1.26"
        )
    return f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [pin(each) for each in project["dependencies"]]
    sys.stdout.writelines(f"{each}\n" for each in pins if not each.startswith("torch=="))
