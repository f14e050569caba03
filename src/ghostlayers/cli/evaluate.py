"""`ghostlayers eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ghostlayers import pipeline
from ghostlayers.cli import options as o
from ghostlayers.cli import screen, tasks_screen, writing_screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import shared_command, write_json
from ghostlayers.errors import DistributedError, RecipeError
from ghostlayers.evaluation import EvaluationResult, LoadedTasks, TaskReport, open_tasks
from ghostlayers.evaluation.request import TaskRequest
from ghostlayers.evaluation.written import CONTINUATIONS, WritingReport
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import open_model
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime.parallel import launched
from ghostlayers.runtime.settings import same_as, setting
from ghostlayers.text.corpora import BLANK_LINE
from ghostlayers.text.tokens import BosPolicy

_TEXT = "Text"


@dataclass(frozen=True)
class EvaluationRequest(TaskRequest):
    """Text to read, tasks to do, or both.

    Raises:
        RecipeError: neither is named.
    """

    data: tuple[str, ...] = setting(
        (),
        "Corpora, comma-separated: c4, wikitext2 (from the hub), or files.",
        _TEXT,
        short="-d",
        read="corpora",
    )
    sequence_length: int = same_as(Recipe, "sequence_length", panel=_TEXT, least=2)
    max_windows: int | None = setting(
        None, "Evaluate the first so many windows of each corpus.", _TEXT, least=1, says="all"
    )
    separator: tuple[str, ...] = setting(
        (BLANK_LINE,),
        r"Joins documents; \n is a line break. Once for all corpora, or once for each in order.",
        _TEXT,
        read="separators",
        says="a blank line",
    )
    text_column: str | None = same_as(Recipe, "text_column")
    bos: BosPolicy = same_as(Recipe, "bos")

    continuations: int = setting(
        CONTINUATIONS,
        "With --against, have both models continue so many stretches of the texts, and measure "
        "what they write; 0 for none.",
        _TEXT,
        least=0,
    )

    def __post_init__(self) -> None:
        if not self.data and not self.tasks:
            raise RecipeError(
                "say what to evaluate on: --data for text, --tasks for tasks, or both."
            )
        super().__post_init__()


@shared_command
def evaluate(
    model: o.Model,
    request: Annotated[
        EvaluationRequest,
        Fields(
            "data tasks tasks_path trust_tasks limit against sequence_length max_windows separator "
            "text_column bos continuations"
        ),
    ],
    options: Annotated[
        RunOptions, Fields(f"json_file overwrite {o.RUN} revision trust_remote_code")
    ],
    against: Annotated[
        str | None, o.option("--against", text="A dense model to compare with.")
    ] = None,
    json_file: o.Json = None,
    overwrite: o.OverwriteFile = False,
    revision: o.Revision = None,
) -> None:
    """Perplexity of any causal language model, and its divergence from a dense one.

    With --against, what both write, too. With --tasks, its accuracy on tasks of
    lm-evaluation-harness.
    """
    del overwrite  # see `claims`
    if request.tasks and launched():
        raise DistributedError(
            "--tasks run in one process; start the command without a launcher, or leave them out."
        )
    tasks = _open_tasks(request)
    screen.step(f"Loading {model} ...")
    opened = open_model(model, None, options, revision)
    dense = None if against is None else open_model(against, None, options)
    results, report, written = [], TaskReport(()), None
    if request.data:
        results = _measure_losses(request, opened, dense, options)
        screen.show_evaluation(results)
        written = _write(request, results, opened, dense, options)
    if tasks is not None:
        report = pipeline.evaluate_on_tasks(
            opened,
            tasks,
            against=dense,
            limit=request.limit,
            options=options,
        )
        tasks_screen.show_tasks(report, model, against)
    if json_file is not None:
        content = {"results": [result.to_dict() for result in results], **report.to_dict()}
        content |= {} if written is None else written.to_dict()
        write_json(json_file, {"model": model, "against": against, **content})


def _open_tasks(request: EvaluationRequest) -> LoadedTasks | None:
    """The tasks, before a model is opened for them; None if none are named."""
    if not request.tasks:
        return None
    folder = None if request.tasks_path is None else Path(request.tasks_path)
    tasks = open_tasks(request.tasks, tasks_path=folder, trust_tasks=request.trust_tasks)
    tasks_screen.warn_of_code(tasks)
    return tasks


def _write(
    request: EvaluationRequest,
    results: list[EvaluationResult],
    model: DenseModel,
    dense: DenseModel | None,
    options: RunOptions,
) -> WritingReport | None:
    """What both models write; None if that is not asked for, or there is nothing beside it."""
    if dense is None or request.continuations == 0:
        return None
    report = pipeline.continue_texts(
        model,
        results,
        against=dense,
        continuations=request.continuations,
        options=options,
    )
    writing_screen.show_writing(report)
    return report


def _measure_losses(
    request: EvaluationRequest,
    model: DenseModel,
    dense: DenseModel | None,
    options: RunOptions,
) -> list[EvaluationResult]:
    return pipeline.evaluate(
        model,
        data=request.data,
        against=dense,
        sequence_length=request.sequence_length,
        max_windows=request.max_windows,
        bos=request.bos,
        text_column=request.text_column,
        separators=request.separator,
        options=options,
    )
