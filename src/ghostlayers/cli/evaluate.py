"""`ghostlayers eval`."""

from typing import Annotated

from ghostlayers import pipeline
from ghostlayers.cli import options as o
from ghostlayers.cli import screen, tasks_screen
from ghostlayers.cli.shell import shared_command, write_json
from ghostlayers.errors import DistributedError, RecipeError
from ghostlayers.evaluation import TaskReport, open_tasks
from ghostlayers.preparation import open_model
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.files import check_can_write
from ghostlayers.runtime.parallel import launched


@shared_command
def evaluate(
    model: o.Model,
    data: o.EvaluationData = None,
    tasks: o.Tasks = None,
    tasks_path: o.TasksPath = None,
    trust_tasks: o.TrustTasks = False,
    limit: o.Limit = None,
    against: Annotated[
        str | None,
        o._option("--against", text="A dense model to compare with."),
    ] = None,
    sequence_length: Annotated[
        int,
        o._option(
            "--sequence-length", min=2, text="Tokens a window. \\[default: 2048]", panel="Text"
        ),
    ] = 2048,
    max_windows: Annotated[
        int | None,
        o._option(
            "--max-windows",
            min=1,
            text="Evaluate the first so many windows of each corpus. \\[default: all]",
            panel="Text",
        ),
    ] = None,
    separator: Annotated[
        list[str] | None,
        o._option(
            "--separator",
            text="Joins documents; \\n is a line break. Once for all corpora, or once for each in "
            "order. \\[default: a blank line]",
            panel="Text",
        ),
    ] = None,
    text_column: o.TextColumn = None,
    bos: o.Bos = None,
    json_file: o.Json = None,
    overwrite: o.OverwriteFile = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = 0,
    offload: o.OffloadOption = "auto",
    max_memory: o.MaxMemory = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    debug: o.Debug = False,
) -> None:
    """Perplexity of any causal language model, and its divergence from a dense one.

    With --tasks, its accuracy on tasks of lm-evaluation-harness.
    """
    del debug, overwrite  # see `claims`
    check_can_write(json_file)
    corpora, names = o.corpora_in(data, "--data"), o.names_in(tasks, "--tasks")
    if not corpora and not names:
        raise RecipeError("say what to evaluate on: --data for text, --tasks for tasks, or both.")
    if not names and (tasks_path, limit, trust_tasks) != (None, None, False):
        raise RecipeError("--tasks-path, --trust-tasks and --limit mean nothing without --tasks.")
    if names and launched():
        raise DistributedError(
            "--tasks run in one process; start the command without a launcher, or leave them out."
        )
    options = RunOptions(dtype, device, batch_size, trust_remote_code, offload, max_memory)
    found = None
    if names:
        found = open_tasks(names, tasks_path=tasks_path, trust_tasks=trust_tasks)
        tasks_screen.warn_of_code(found)
    screen.step(f"Loading {model} ...")
    opened = open_model(model, None, options, revision)
    dense = None if against is None else open_model(against, None, options)
    results, report = [], TaskReport(())
    if corpora:
        results = pipeline.evaluate(
            opened,
            data=corpora,
            against=dense,
            sequence_length=sequence_length,
            max_windows=max_windows,
            bos=bos or "auto",
            text_column=text_column,
            separators=[o.unescape(each) for each in separator or ["\n\n"]],
            options=options,
            progress=screen.Bars(),
        )
        screen.show_evaluation(results)
    if found is not None:
        report = pipeline.evaluate_on_tasks(
            opened, found, against=dense, limit=limit, options=options, progress=screen.Bars()
        )
        tasks_screen.show_tasks(report, model, against)
    if json_file is not None:
        content = {"results": [each.to_dict() for each in results], **report.to_dict()}
        write_json(json_file, {"model": model, "against": against, **content})
