"""How tasks are asked for, wherever they are."""

from dataclasses import dataclass

from ghostlayers.errors import RecipeError
from ghostlayers.runtime.settings import documented, setting

TASKS = "Tasks"
"""The group of these settings in help."""


@documented
@dataclass(frozen=True)
class TaskRequest:
    """Tasks of lm-evaluation-harness.

    Raises:
        RecipeError: something is said of tasks, but none is named.
    """

    tasks: tuple[str, ...] = setting(
        (),
        "Zero-shot tasks of lm-evaluation-harness, comma-separated: arc_easy,piqa,... They need "
        "pip install 'ghostlayers[tasks]'.",
        TASKS,
        read="names",
    )
    tasks_path: str | None = setting(
        None,
        "A folder of task files (YAML), such as ones that read local data. They come before the "
        "harness's own, which read the hub. Files that can run code are refused without "
        "--trust-tasks; templates run in a sandbox.",
        TASKS,
        read="path",
    )
    trust_tasks: bool = setting(
        False,
        "Let task files run their code: functions, data sets, metrics, templates. Read them first.",
        TASKS,
        says="off",
    )
    limit: int | None = setting(
        None, "Answer the first so many documents of each task.", TASKS, least=1, says="all"
    )

    def __post_init__(self) -> None:
        if not self.tasks and (self.tasks_path, self.limit, self.trust_tasks) != (
            None,
            None,
            False,
        ):
            raise RecipeError(
                "--tasks-path, --trust-tasks and --limit mean nothing without --tasks."
            )
