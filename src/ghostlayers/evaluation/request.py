"""How tasks are asked for, wherever they are."""

from dataclasses import dataclass, fields

from ghostlayers.errors import RecipeError
from ghostlayers.runtime.settings import documented, setting

TASKS = "Tasks"
DRAFT = "As a draft"
"""Groups of these settings in help."""


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


@documented
@dataclass(frozen=True)
class DraftRequest:
    """A smaller model as the draft of the dense one, in speculative decoding.

    Raises:
        RecipeError: a number is too small, or something is said of a draft that is not asked for.
    """

    draft: bool = setting(
        False,
        "Measure it as a draft for speculative decoding: how often its tokens are kept, and how "
        "much faster the dense model writes with it. Needs --against.",
        DRAFT,
        says="off",
    )
    data: tuple[str, ...] = setting(
        (),
        "Texts whose stretches are continued, comma-separated: files, or corpora of the hub.",
        DRAFT,
        short="-d",
        says="the reference that comes with Python",
        read="corpora",
    )
    prompts: int = setting(8, "Stretches that are continued, one after the other.", DRAFT, least=1)
    draft_tokens: tuple[int, ...] = setting(
        (2, 4, 8),
        "Tokens that are drafted before each verification.",
        DRAFT,
        says="2,4,8",
        metavar="N,N",
        read="numbers",
    )
    sampled: bool = setting(
        False, "Draw from the model at temperature 1, not its likeliest token.", DRAFT, says="off"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_tokens", tuple(dict.fromkeys(self.draft_tokens)))
        if min(self.draft_tokens) < 1:
            raise RecipeError("--draft-tokens: at least one token is drafted, such as 2,4,8.")
        asked = any(getattr(self, member.name) != member.default for member in fields(self))
        if asked and not self.draft:
            raise RecipeError(
                "--data, --prompts, --draft-tokens and --sampled mean nothing without --draft."
            )
