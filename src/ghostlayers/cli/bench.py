"""`ghostlayers bench`: how much faster a smaller model is, and what its repair costs."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ghostlayers.checkpoint import records
from ghostlayers.cli import options as o
from ghostlayers.cli import screen
from ghostlayers.cli.drafts import Drafting, open_pair, run_drafts
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.errors import GhostlayersError, InputError, RecipeError
from ghostlayers.evaluation.bench import Point, Timing, measure_grid, operator_share
from ghostlayers.evaluation.drafting import NEW_TOKENS, PROMPT_TOKENS, REPEATS
from ghostlayers.evaluation.request import DraftRequest
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import open_model
from ghostlayers.recipe import RunOptions
from ghostlayers.report.heatmap import check_can_draw
from ghostlayers.report.speed_plot import draw_drafts, draw_speed
from ghostlayers.runtime.documents import to_json
from ghostlayers.runtime.files import write_whole
from ghostlayers.runtime.machine import processor_name, versions
from ghostlayers.spans import merge_layers
from ghostlayers.surgery import removal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE, CUT = "dense", "cut"

LEAST_SHARE = 0.001
"""Below it, the running time of a repair is noise."""

_GRID = "Grid"
Batches = Annotated[
    str | None,
    o.option("--batch", text="Sequences at a time. [default: 1,4]", metavar="N,N", panel=_GRID),
]
Lengths = Annotated[
    str | None,
    o.option(
        "--length",
        text="Tokens of a prompt. [default: 128,512; 64 with --draft]",
        metavar="N,N",
        panel=_GRID,
    ),
]
NewTokens = Annotated[
    int | None,
    o.option(
        "--new-tokens",
        min=1,
        text="Written behind each prompt. [default: 16; 64 with --draft]",
        panel=_GRID,
    ),
]
Repeats = Annotated[
    int | None,
    o.option(
        "--repeats", min=1, text="Of each measurement. [default: 5; 3 with --draft]", panel=_GRID
    ),
]


@command
def bench(
    model: Annotated[
        str,
        typer.Argument(metavar="OUT", help="The smaller model: a checkpoint, or any folder or id."),
    ],
    options: Annotated[
        RunOptions,
        Fields(
            "against batch length new_tokens repeats json_file png overwrite dtype device revision "
            "trust_remote_code"
        ),
    ],
    request: Annotated[DraftRequest, Fields("draft data prompts draft_tokens sampled")],
    against: Annotated[
        str | None, o.option("--against", text="The dense model it was made from.")
    ] = None,
    batch: Batches = None,
    length: Lengths = None,
    new_tokens: NewTokens = None,
    repeats: Repeats = None,
    json_file: o.Json = None,
    png: Annotated[
        Path | None, o.option("--png", text="Also draw the speeds into this file.")
    ] = None,
    overwrite: o.OverwriteFile = False,
    revision: o.Revision = None,
) -> None:
    """Latency, throughput and memory of a model beside the dense one and the bare cut."""
    del overwrite  # see `claims`
    check_can_draw(png)
    if request.draft:
        asked = drafting_of(request, batch, length, new_tokens, repeats)
        _bench_draft(model, against, asked, options, revision, json_file, png)
        return
    new_tokens, repeats = new_tokens or 16, repeats or 5
    batches, lengths = (
        [*dict.fromkeys(o.numbers_in(given, option, "1,4,16", least=1))]
        for given, option in ((batch or "1,4", "--batch"), (length or "128,512", "--length"))
    )
    screen.step(f"Loading {model} ...")
    opened = open_model(model, None, options, revision)
    check_lengths(opened, lengths, new_tokens)
    dense = None if against is None else open_model(against, None, options)
    models = models_to_time(opened, dense)
    points = measure_grid(
        models,
        batches=batches,
        lengths=lengths,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    name = next(reversed(models))
    show(points)
    where = machine(opened)
    screen.say(screen.dim(f"{where['dtype']}, {where['threads']} threads, {where['processor']}."))
    share = operator_share(points, DENSE, CUT, name)
    if share is not None:
        screen.say(
            f"The repair takes {share:.1%} of the time of the layers that it replaced."
            if share >= LEAST_SHARE
            else "The repair takes less time than can be measured here."
        )
    if json_file is not None:
        content = {"points": [point.to_dict() for point in points], "operator_share": share}
        measured = {"model": model, "against": against, **where, **content}
        write_whole(json_file, to_json(measured))
    if png is not None:
        draw_speed(points, png, title=f"{Path(model).name} on {where['processor']}")
        screen.say(f"Drawn: {png}")


def drafting_of(
    request: DraftRequest,
    batch: str | None,
    length: str | None,
    new_tokens: int | None,
    repeats: int | None,
) -> Drafting:
    """What ``--draft`` measures.

    Raises:
        RecipeError: several texts at a time, or prompts of several lengths.
    """
    if batch is not None:
        raise RecipeError("--draft writes one text at a time; leave --batch out.")
    lengths = o.numbers_in(length or str(PROMPT_TOKENS), "--length", str(PROMPT_TOKENS), least=2)
    if len(lengths) > 1:
        raise RecipeError(f"--draft continues prompts of one length, such as {PROMPT_TOKENS}.")
    return Drafting(request, lengths[0], new_tokens or NEW_TOKENS, repeats or REPEATS)


def _bench_draft(
    model: str,
    against: str | None,
    asked: Drafting,
    options: RunOptions,
    revision: str | None,
    json_file: Path | None,
    png: Path | None,
) -> None:
    dense, draft = open_pair(model, against, options, revision)
    for one in (dense, DenseModel(draft)):
        check_lengths(one, [asked.length], asked.new_tokens)
    points, content = run_drafts(dense, draft, asked)
    where = machine(dense)
    screen.say(screen.dim(f"{where['dtype']}, {where['threads']} threads, {where['processor']}."))
    if json_file is not None:
        write_whole(json_file, to_json({"model": model, "against": against, **where, **content}))
    if png is not None:
        draw_drafts(points, png, title=f"{Path(model).name} on {where['processor']}")
        screen.say(f"Drawn: {png}")


def check_lengths(opened: DenseModel, lengths: Sequence[int], new_tokens: int) -> None:
    """Refuse prompts that the model's positions do not hold.

    Raises:
        InputError: a prompt and what is written behind it are longer than they.
    """
    limit, longest = getattr(opened.network.config, "max_position_embeddings", None), max(lengths)
    if limit is not None and longest + new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {new_tokens} behind it exceed the model's {limit} "
            f"positions; the longest prompt that works is --length {max(1, limit - new_tokens)}."
        )


def models_to_time(opened: DenseModel, dense: DenseModel | None) -> "dict[str, PreTrainedModel]":
    """By name: the dense model, it without the layers that went, and the model asked for.

    The bare cut shares the dense model's weights. It is left out where nothing says which layers
    went, or where the repair left no operator, so that it would be the model itself.
    """
    if dense is None:
        return {"model": opened.network}
    models = {DENSE: dense.network}
    cut = bare_cut(opened, dense)
    if cut is not None:
        models[CUT] = cut
    return {**models, "repaired": opened.network}


def bare_cut(opened: DenseModel, dense: DenseModel) -> "PreTrainedModel | None":
    """The dense model without the removed layers; None where that is not known, or costs the same.

    A repair that is folded into weights leaves the architecture of the bare cut.
    """
    try:
        record = records.inspect(opened.base.name)
    except GhostlayersError:
        return None
    removed, kept = record["cut"]["removed"], record["cut"]["kept"]
    depth = len(removed) + len(kept)
    if depth != dense.network.config.num_hidden_layers:
        raise InputError(
            f"'{dense.base.name}' has {dense.network.config.num_hidden_layers} decoder layers, but "
            f"'{opened.base.name}' was made from a model of {depth}. Give --against the model that "
            "it was made from."
        )
    if record["mode"] == "stock" and opened.network.config.num_hidden_layers == len(kept):
        return None
    bare: PreTrainedModel = removal.prune_layers(dense, merge_layers(removed))
    return bare


def machine(opened: DenseModel) -> dict[str, Any]:
    """Where it was measured."""
    return {
        "processor": processor_name(opened.device),
        "threads": torch.get_num_threads(),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
    }


def show(points: Sequence[Point]) -> None:
    """A table a batch and length."""
    columns = ("", "prefill, ms", "x", "decode, ms", "x", "KV, MB", "peak, MB")
    for batch, length in dict.fromkeys((p.batch, p.length) for p in points):
        here = [p for p in points if (p.batch, p.length) == (batch, length)]
        first = here[0]
        rows = [
            [
                point.model,
                _time(point.prefill),
                f"{point.prefill.median / first.prefill.median:.2f}",
                _time(point.decode),
                f"{point.decode.median / first.decode.median:.2f}",
                f"{point.cache_bytes / 1e6:,.1f}",
                f"{point.peak_bytes / 1e6:,.0f}",
            ]
            for point in here
        ]
        screen.table(columns, rows, f"batch {batch}, prompts of {length} tokens")
    screen.say(
        screen.dim(
            "Medians ± the spread between quartiles; x: time as a share of the first row's, less "
            "is quicker. Prefill reads the prompts, decode writes one token behind each. Peak: "
            "memory beyond the weights while prompts are read and a token is written."
        )
    )


def _time(timing: Timing) -> str:
    return f"{1e3 * timing.median:.1f} ± {1e3 * timing.spread:.1f}"
