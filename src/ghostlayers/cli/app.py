"""The commands."""

import contextlib
import dataclasses
import functools
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from ghostlayers.cli import options as o
from ghostlayers.cli.bench import bench as bench_command
from ghostlayers.cli.claims import claimed
from ghostlayers.cli.compare import compare as compare_command
from ghostlayers.cli.failures import explain
from ghostlayers.cli.methods import methods as methods_command
from ghostlayers.cli.run import make_run
from ghostlayers.errors import DistributedError, RecipeError
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime.allocator import keep_freed_memory
from ghostlayers.runtime.documents import to_json
from ghostlayers.runtime.files import at_home
from ghostlayers.runtime.interrupts import SAID, STATUS, raised
from ghostlayers.runtime.quiet import TALKATIVE
from ghostlayers.runtime.scratch import clear_scratch, tidied

app = typer.Typer(
    name="ghostlayers",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Remove decoder layers from a language model, and repair every cut in closed form.",
)

KEEPING = frozenset({"prune", "compare", "run"})
"""Commands that keep what an interrupted run has done."""

P = ParamSpec("P")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into one message and an exit code, and silence other libraries' chatter."""
    return _command(function, shared=False)


def shared_command(function: Callable[P, None]) -> Callable[P, None]:
    """A `command` that several processes can carry out together."""
    return _command(function, shared=True)


def _command(function: Callable[P, None], *, shared: bool) -> Callable[P, None]:
    @functools.wraps(function)
    def shell(*args: P.args, **kwargs: P.kwargs) -> None:
        with raised() as interrupts:
            done = False
            try:
                _check_interpreter()
                clear_scratch()
                quieten()
                _take_any_text()
                keep_freed_memory()
                _know_home(kwargs)
                name = function.__name__
                with _processes(shared, name), claimed(name, kwargs), tidied():
                    function(*args, **kwargs)
                    done = True
            except (typer.Exit, typer.Abort):
                raise
            except BaseException as error:
                if done and interrupts.received:  # too late: all is there
                    return
                # A library may have made something else of an interruption.
                found = KeyboardInterrupt() if interrupts.received else error
                if kwargs.get("debug") and isinstance(found, Exception):
                    raise
                raise typer.Exit(_explain(found, function)) from error

    return shell


def _take_any_text() -> None:
    """Write names in any script, escaped where the terminal's encoding has not got it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _know_home(arguments: dict[str, Any]) -> None:
    """Read ``~`` in paths where no shell did: behind an equals sign, and in recipes."""
    arguments |= {k: at_home(each) for k, each in arguments.items() if isinstance(each, Path)}


def _explain(error: BaseException, function: Callable[..., None]) -> int:
    """Say why a command ended; the exit status."""
    from ghostlayers.cli import screen

    if isinstance(error, KeyboardInterrupt):
        kept = " Repeat the command to go on." if function.__name__ in KEEPING else ""
        with contextlib.suppress(OSError):  # the terminal may be gone
            screen.fail(f"{SAID}{kept}")
        return STATUS
    if not isinstance(error, Exception):
        raise error
    told, status = explain(error, inspect.signature(function).parameters)
    screen.fail(told)
    return status


@contextlib.contextmanager
def _processes(shared: bool, name: str) -> Iterator[None]:
    """Join the processes that a launcher started, and let only the first one speak.

    Raises:
        DistributedError: the others cannot be reached, or the command is for one process.
    """
    from ghostlayers.cli import screen
    from ghostlayers.runtime import parallel

    joined = shared and parallel.world().size > 1  # a recipe's command, in `run`
    if joined or not parallel.launched():
        yield
        return
    if not shared:
        raise DistributedError(
            f"`ghostlayers {name}` runs in one process, but a launcher has started several; start "
            "it without one. Those that share their work: prune, score, eval."
        )
    screen.speak_for(parallel.join())
    try:
        yield
    finally:
        parallel.leave()


def _check_interpreter() -> None:
    """Refuse to run without docstrings, which transformers reads while it opens models."""
    if sys.flags.optimize > 1:
        raise RecipeError(
            "Python runs without docstrings (-OO, or PYTHONOPTIMIZE=2), which transformers needs; "
            "unset it."
        )


def quieten() -> None:
    """Keep loading bars and advice of the libraries below off the screen."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it is imported where it is needed
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # tells that weights are elsewhere
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        from importlib.metadata import version as installed

        typer.echo(f"ghostlayers {installed('ghostlayers')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Remove decoder layers from a language model, and repair every cut in closed form."""
    del show_version


@app.command()
@shared_command
def prune(
    model: o.Model,
    output: o.Out,
    layers: o.Layers = None,
    remove: o.Remove = None,
    select: o.Select = None,
    iterative: o.IterativeOption = None,
    repair: o.RepairOption = None,
    preset: o.PresetOption = None,
    cosine_axis: o.CosineAxisOption = None,
    keep_layers: o.KeepLayers = None,
    refit: o.RefitOption = None,
    overwrite: o.Overwrite = False,
    data: o.Data = None,
    text_column: o.TextColumn = None,
    separator: o.Separator = None,
    sampling: o.SamplingOption = None,
    windows: o.WindowsOption = None,
    fit_windows: o.FitWindows = None,
    search_windows: o.SearchWindows = None,
    held_out_windows: o.HeldOutWindows = None,
    race_windows: o.RaceWindows = None,
    sequence_length: o.SequenceLength = None,
    bos: o.Bos = None,
    seed: o.Seed = None,
    inputs: o.InputsOption = None,
    token_weight: o.TokenWeightOption = None,
    ridge: o.Ridge = None,
    absolute_ridge: o.AbsoluteRidge = None,
    export: o.ExportOption = None,
    save: o.SaveOption = "checkpoint",
    gguf: o.GgufOption = None,
    pre_tokenizer: o.PreTokenizer = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = 0,
    offload: o.OffloadOption = "auto",
    max_memory: o.MaxMemory = None,
    restart: o.Restart = False,
    plan: o.PlanOnly = False,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    debug: o.Debug = False,
) -> None:
    """Remove layers, repair every gap, write a checkpoint, and prove that it reloads."""
    del debug
    from ghostlayers import pipeline
    from ghostlayers.calibration import journal
    from ghostlayers.checkpoint import proof, saving
    from ghostlayers.checkpoint.adapter import check_precision
    from ghostlayers.cli import screen
    from ghostlayers.plan.saving import Output
    from ghostlayers.preparation import open_model
    from ghostlayers.runtime import parallel
    from ghostlayers.runtime.outputs import check_output

    recipe = o.recipe_from(
        preset,
        separator,
        layers=layers,
        remove=remove,
        select=select,
        iterative=iterative,
        repair=repair,
        cosine_axis=cosine_axis,
        keep_layers=keep_layers,
        refit=refit,
        data=data,
        text_column=text_column,
        windows=windows,
        fit_windows=fit_windows,
        sampling=sampling,
        search_windows=search_windows,
        held_out_windows=held_out_windows,
        race_windows=race_windows,
        sequence_length=sequence_length,
        bos=bos,
        seed=seed,
        inputs=inputs,
        token_weight=token_weight,
        ridge=ridge,
        absolute_ridge=absolute_ridge,
        export=export,
    )
    options = RunOptions(
        dtype, device, batch_size, trust_remote_code, offload, max_memory, recipe.preset
    )
    if not plan:
        check_output(output, overwrite=overwrite, needed_bytes=0)
    _check_gguf(gguf, pre_tokenizer, recipe, save, overwrite=overwrite)
    if not plan and save == "checkpoint" and parallel.world().leads:
        proof.be_ready()
    screen.step(f"Loading {model} ...")
    dense = open_model(model, None, options, revision, surgery_follows=True)
    screen.show_expanded(dense.base)
    screen.show_preset(recipe, dense.dtype)
    screen.show_basis(dense, recipe.repair)
    if gguf is not None:
        from ghostlayers.checkpoint.gguf_export import check_model
        from ghostlayers.model.multimodal import whole_of

        check_model(whole_of(dense.network).config, dense.base.name, pre_tokenizer)
    whole, leaves = save == "checkpoint", Output(save, gguf is not None, output)
    if not whole:
        check_precision(dense, dense.stored_dtype)
    if plan:
        screen.show_plan(pipeline.plan(dense, recipe, options=options, output=leaves))
        return
    needed = saving.checkpoint_bytes(dense.network, dense.stored_dtype) if whole else 0
    check_output(output, overwrite=overwrite, needed_bytes=needed)
    kept = _kept(output, restart=restart)
    pruned = pipeline.prune(
        dense,
        recipe,
        options=options,
        keep=kept,
        show_text=screen.show_text,
        show_plan=screen.show_plan,
        output=leaves,
        progress=screen.Bars(),
    )
    screen.show_pruned(pruned)
    # What is kept goes when all is written, so that a repetition has it until then.
    _save(dataclasses.replace(pruned, kept_in=None), output, save, overwrite=overwrite)
    if gguf is not None:
        parallel.by_first(
            lambda: _write_gguf(output, gguf, pre_tokenizer, options, overwrite=overwrite)
        )
    journal.finish(kept)


def _kept(output: Path, *, restart: bool) -> Path:
    """Where a run keeps its sums; what an interrupted one kept is used, or thrown away."""
    from ghostlayers.calibration import journal
    from ghostlayers.cli import screen
    from ghostlayers.runtime import parallel

    keep = journal.folder_for(output)
    if restart:
        journal.finish(keep)
        parallel.wait()
    elif keep.is_dir():
        screen.step(f"Going on with what an interrupted run kept in {keep} ...")
    return keep


def _save(pruned: PrunedModel, output: Path, save: str, *, overwrite: bool) -> None:
    from ghostlayers.cli import screen

    if save == "adapter":
        screen.step(f"Writing {output} and making the model of it again ...")
        screen.show_adapter(pruned, output, pruned.save_adapter(output, overwrite=overwrite))
    else:
        screen.step(f"Writing {output} and loading it again in a fresh process ...")
        screen.show_saved(pruned, output, pruned.save(output, overwrite=overwrite))


def _check_gguf(
    file: Path | None, pre_tokenizer: str | None, recipe: Recipe, save: str, *, overwrite: bool
) -> None:
    """Refuse a GGUF file that could not be made, before the model is opened."""
    if file is None and pre_tokenizer is not None:
        raise RecipeError("--pre-tokenizer is for a GGUF file, but no --gguf FILE is asked for.")
    if file is not None:
        from ghostlayers.checkpoint.gguf_export import check_exportable, check_target

        check_target(file, overwrite=overwrite)
        check_exportable(recipe, save)


def _write_gguf(
    checkpoint: Path,
    file: Path,
    pre_tokenizer: str | None,
    options: RunOptions,
    *,
    dtype: str = "auto",
    overwrite: bool,
) -> None:
    from ghostlayers.checkpoint.gguf_export import export_gguf
    from ghostlayers.cli import screen

    screen.step(f"Reading {checkpoint} and writing {file} ...")
    export_gguf(
        checkpoint,
        file,
        pre_tokenizer=pre_tokenizer,
        dtype=dtype,
        options=options,
        overwrite=overwrite,
        progress=screen.Bars(),
    )
    screen.show_exported(file)


@app.command()
@command
def materialize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of an adapter.")],
    output: o.Out,
    base: Annotated[
        str | None,
        o._option("--base", text="Where the base model is now. \\[default: where it was]"),
    ] = None,
    overwrite: o.Overwrite = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    debug: o.Debug = False,
) -> None:
    """Write the whole checkpoint that an adapter describes, and prove that it reloads."""
    del debug
    from ghostlayers.checkpoint.adapter import materialize as write
    from ghostlayers.cli import screen

    options = RunOptions(dtype, device)
    screen.step(f"Loading the base of {adapter}, writing {output} and loading it again ...")
    screen.show_materialized(output, write(adapter, output, base, options, overwrite=overwrite))


@app.command()
@command
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a stock checkpoint.")
    ],
    file: Annotated[
        Path, o._option("--gguf", metavar="FILE", text="The GGUF file to make, for llama.cpp.")
    ],
    pre_tokenizer: o.PreTokenizer = None,
    dtype: Annotated[
        o.TypeName,
        o._option(
            "--dtype",
            text="Type of the file's matrices. 'auto' is the checkpoint's. \\[default: auto]",
        ),
    ] = "auto",
    overwrite: o.OverwriteFile = False,
    offload: o.OffloadOption = "auto",
    max_memory: o.MaxMemory = None,
    debug: o.Debug = False,
) -> None:
    """Write a checkpoint as a GGUF file, and prove that it holds the same numbers."""
    del debug
    options = RunOptions(offload=offload, max_memory=max_memory)
    _write_gguf(checkpoint, file, pre_tokenizer, options, dtype=dtype, overwrite=overwrite)


@app.command()
@command
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A checkpoint or an adapter that was made here.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="The hub's model repository, such as name/model.")
    ],
    private: Annotated[
        bool, o._option("--private", text="Make the repository private, if it is made.")
    ] = False,
    message: Annotated[
        str | None, o._option("--message", "-m", text="Of the commit. \\[default: what was done]")
    ] = None,
    dry_run: Annotated[
        bool, o._option("--dry-run", text="Send nothing; show what would be sent.")
    ] = False,
    debug: o.Debug = False,
) -> None:
    """Share a checkpoint or an adapter on the Hugging Face Hub, with its model card."""
    del debug
    from ghostlayers.checkpoint.hub import push as send
    from ghostlayers.cli import screen

    screen.step(f"Checking {folder} ..." if dry_run else f"Sending {folder} to {repo} ...")
    screen.show_upload(send(folder, repo, private=private, message=message, dry_run=dry_run))


@app.command("eval")
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
    from ghostlayers import pipeline
    from ghostlayers.cli import screen, tasks_screen
    from ghostlayers.evaluation import TaskReport, open_tasks
    from ghostlayers.preparation import open_model
    from ghostlayers.runtime.files import check_can_write
    from ghostlayers.runtime.parallel import launched

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


@app.command()
@shared_command
def score(
    model: o.Model,
    layers: o.Layers = None,
    repair: o.RepairOption = None,
    cosine_axis: o.CosineAxisOption = None,
    data: o.Data = None,
    text_column: o.TextColumn = None,
    separator: o.Separator = None,
    windows: o.WindowsOption = None,
    held_out_windows: o.HeldOutWindows = None,
    sequence_length: o.SequenceLength = None,
    bos: o.Bos = None,
    seed: o.Seed = None,
    token_weight: o.TokenWeightOption = None,
    json_file: o.Json = None,
    png: Annotated[
        Path | None, o._option("--png", text="Also draw the heat map into this file.")
    ] = None,
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
    """Score every layer, and every span of N layers: cosine, residual, loss after repair."""
    del debug, overwrite  # see `claims`
    from ghostlayers import pipeline
    from ghostlayers.checkpoint.record import table_to_dict
    from ghostlayers.cli import screen
    from ghostlayers.report.heatmap import check_can_draw, draw_heatmap
    from ghostlayers.runtime.files import check_can_write
    from ghostlayers.runtime.parallel import world

    check_can_write(json_file)
    check_can_draw(png)
    if layers is None:
        raise RecipeError(
            "say how many layers to remove (--layers): every span of that length is scored."
        )
    recipe = o.recipe_from(
        None,
        separator,
        layers=layers,
        repair=repair,
        cosine_axis=cosine_axis,
        data=data,
        text_column=text_column,
        windows=windows,
        held_out_windows=held_out_windows,
        sequence_length=sequence_length,
        bos=bos,
        seed=seed,
        token_weight=token_weight,
    )
    screen.step(f"Loading {model} ...")
    table = pipeline.score(
        model,
        recipe,
        options=RunOptions(dtype, device, batch_size, trust_remote_code, offload, max_memory),
        revision=revision,
        show_text=screen.show_text,
        progress=screen.Bars(),
    )
    screen.show_block_influence(table)
    screen.show_spans(table.spans, table, f"Every span of {len(table.spans[0].span)} layers")
    screen.show_score_notes()
    if json_file is not None:
        write_json(json_file, table_to_dict(table))
    if png is not None and world().leads:
        draw_heatmap(table, png, title=model)
        screen.say(f"Heat map: {png}")


@app.command("inspect")
@command
def inspect_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that prune made.")],
    json_output: Annotated[
        bool, o._option("--json", text="Print the whole record as JSON instead.")
    ] = False,
    debug: o.Debug = False,
) -> None:
    """What was removed, kept and repaired in a checkpoint, and on what evidence."""
    del debug
    from ghostlayers.checkpoint import records
    from ghostlayers.cli import screen

    record = records.inspect(checkpoint)
    if json_output:
        typer.echo(to_json(record), nl=False)
    else:
        screen.show_record(record)


@app.command()
@command
def demo(
    output: Annotated[
        Path | None,
        o._option("--output", "-o", text="Keep the repaired checkpoint in this folder."),
    ] = None,
    overwrite: o.Overwrite = False,
    dtype: o.Dtype = "auto",
    debug: o.Debug = False,
) -> None:
    """The whole pipeline on a real language model (SmolLM2-135M), in about two minutes."""
    del debug
    from ghostlayers.cli.demo import run_demo

    run_demo(output, dtype=dtype, overwrite=overwrite)


methods = app.command()(command(methods_command))

compare = app.command()(command(compare_command))

bench = app.command()(command(bench_command))

run = app.command()(
    shared_command(
        make_run(
            {
                "prune": prune,
                "eval": evaluate,
                "score": score,
                "compare": compare,
                "bench": bench,
            }
        )
    )
)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file whole or not at all, in the first process."""
    from ghostlayers.runtime.files import write_whole
    from ghostlayers.runtime.parallel import world

    if world().leads:
        write_whole(path, to_json(content))


if __name__ == "__main__":
    app()
