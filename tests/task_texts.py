"""Tasks of the harness that are made up: questions of the small language that test models learn."""

import json
import random
from pathlib import Path
from typing import Any

from conftest import NOUNS, VERBS

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
  cache_dir: "{cache}"
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
{metrics}
metadata: {{version: 3.0}}
"""
COUNT = 14


def questions() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "question": f"{number}. The {rng.choice(NOUNS)} {rng.choice(VERBS)} the",
            "choices": rng.sample(NOUNS, 3),
            "label": rng.randrange(3),
        }
        for number in range(COUNT)
    ]


def write_task(
    folder: Path,
    name: str,
    rows: list[dict[str, Any]],
    *metrics: str,
    kind: str = "multiple_choice",
) -> None:
    """A task's file, and the questions that it reads, beside each other."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = "\n".join(f"  - {{metric: {metric}}}" for metric in metrics)
    text = TASK.format(name=name, data=data, cache=folder / "cache", kind=kind, metrics=listed)
    (folder / f"{name}.yaml").write_text(text)
