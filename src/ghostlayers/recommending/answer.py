"""`recommend`: the comparison is run, and its answer is read off for every engine."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostlayers.checkpoint.gguf_cuts import GgufCuts
from ghostlayers.compare import compare
from ghostlayers.compare.experiment import Say
from ghostlayers.compare.files import write_report
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import whole_of
from ghostlayers.plan.units import Plan
from ghostlayers.preparation import ModelSource, Tokenizer, open_model
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.recommending.commands import out_name, prune_command
from ghostlayers.recommending.wish import ENGINES, Wish
from ghostlayers.report.results import Recommended, Results, read_results
from ghostlayers.report.summary import Entry, summarise
from ghostlayers.runtime.scratch import Scratch
from ghostlayers.spans import merge_layers, parse_layers


@dataclass(frozen=True)
class Recommendation:
    """The best cuts of a model.

    Attributes:
        rows: one a share and engine, with the command that makes it.
        dense: the dense model in the same figures, for the sake of comparison.
        results: of the comparison behind them, `rows` among them.
        written: the files that tell of it.
    """

    rows: tuple[Recommended, ...]
    dense: Recommended
    results: Results
    written: tuple[Path, ...] = ()


def recommend(
    model: ModelSource,
    wish: Wish | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: "Tokenizer | None" = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
    say: Say | None = None,
    show_plan: Callable[[Plan], bool] | None = None,
    **choices: Any,
) -> Recommendation | None:
    """The best cut of a model for every engine, at 10, 20 and 30 % fewer layers.

    Layers are chosen by ``recoverable``, repairs by held-out windows among those that the engine
    runs, and what is told of them is measured on other text.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a causal language model in memory.
        wish: how much less, on what text; its fields and those of a `Comparison` can also be given
            by name, such as ``data="c4", less=("20%",)``.
        out: a folder for the page and the results, in which an interrupted run goes on.
        tokenizer: for a model in memory.
        options: how to run.
        revision: of a model on the hub.
        overwrite: replace another comparison's results.
        command: that asked for it, for the page.
        say: told what is done and what comes next.
        show_plan: told before anything is computed what it will take; if it gives False, nothing
            is.
        choices: fields of the wish.

    Returns:
        The recommendation; None if nothing was to be computed.

    Raises:
        GhostlayersError: bad input or numbers; see `ghostlayers.errors`.
    """
    wish, options = wish or Wish.of(**choices), options or RunOptions()
    dense = open_model(model, tokenizer, options, revision, surgery_follows=True)
    request = wish.comparison(dense.num_layers)
    with Scratch("recommend") as elsewhere:
        folder = Path(elsewhere) / "comparison" if out is None else Path(out)
        comparison = compare(
            dense,
            request,
            folder,
            options=options,
            overwrite=overwrite,
            say=say,
            show_plan=show_plan,
        )
        if not comparison:
            return None
        name = str(model) if isinstance(model, (str, Path)) else "MODEL"
        reading = _Reading(dense, name, wish, request.calibration, options)
        rows = tuple(reading.rows(read_results(comparison)))
        comparison |= {"command": command, "recommended": [_named(row) for row in rows]}
        written = () if out is None else tuple(write_report(comparison, folder))
    results = read_results(comparison)
    plain = summarise(results)[0]
    return Recommendation(rows, _figures(results, plain, less="0%", engine=""), results, written)


@dataclass(frozen=True)
class _Reading:
    """What reads the rows off a comparison."""

    dense: DenseModel
    name: str
    wish: Wish
    recipe: Recipe
    options: RunOptions

    def rows(self, results: Results) -> Iterator[Recommended]:
        """One a share and engine."""
        shares = self.wish.layers(self.dense.num_layers)
        for layers, share in sorted(shares.items()):
            for entry in summarise(results):
                engine = ENGINES.get(entry.key.repair)
                if entry.key.layers == layers and engine is not None:
                    yield self._row(_figures(results, entry, less=share, engine=engine))

    def _row(self, row: Recommended) -> Recommended:
        """With the command, or why there is none."""
        file = row.repair == "auto:llama.cpp"
        problem = self._problem(row.removed) if file else None
        if problem is not None:
            return row.model_copy(update={"problem": problem})
        out = out_name(self.name, row.layers, file=file)
        recipe = dataclasses.replace(self.recipe, race_windows=self._race_windows())
        revision = self.dense.base.revision if self.dense.base.on_hub else None
        command = prune_command(
            self.name, recipe, row.removed, row.method, out, self.options, revision
        )
        return row.model_copy(update={"command": command})

    def _race_windows(self) -> int:
        """Held-out windows that were read, so that the same calibration windows are drawn again."""
        return dataclasses.replace(self.recipe, layers=1, repair="auto").num_race_windows

    def _problem(self, removed: str) -> str | None:
        """Why a cut cannot be a GGUF file; None if it can."""
        copied = self.dense.base.file is not None
        if whole_of(self.dense.network) is not self.dense.network:
            return "a vision-language model is two GGUF files; llama.cpp's converter makes them"
        try:
            GgufCuts(self.dense, copied).check(merge_layers(parse_layers(removed)))
        except UnsupportedModelError as error:
            return str(error)
        return None


def _figures(results: Results, entry: Entry, *, less: str, engine: str) -> Recommended:
    """What was measured of one model."""
    model, key = entry.model, entry.key
    greedy = (w for w in results.writing if w.key == key and w.manner == "greedy")
    loops = next((row.loops for row in greedy), None)
    return Recommended(
        layers=key.layers,
        select=key.select,
        repair=key.repair,
        removed=entry.removed,
        less=less,
        engine=engine,
        method=model.method or "",
        loss_nats=entry.loss,
        excess_nats=entry.excess,
        kl_nats=entry.kl,
        loops=loops,
        num_parameters=model.num_parameters,
        kv_bytes_per_token=model.kv_bytes_per_token,
        prefill_ms=model.prefill_ms,
    )


def _named(row: Recommended) -> dict[str, Any]:
    """As it is shared: without the folders of this machine."""
    command = row.command and " ".join(
        word.rsplit("/", 1)[-1] if word.startswith(("/", ".", "~")) else word
        for word in row.command.split(" ")
    )
    return {**row.to_dict(), "command": command}
