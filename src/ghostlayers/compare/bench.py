"""What all cells of a comparison share: the model, the windows, the protocol."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghostlayers.calibration.fingerprint import model_fingerprint
from ghostlayers.calibration.passes import Runner
from ghostlayers.compare.request import EVERY, Comparison
from ghostlayers.compare.store import Store
from ghostlayers.compare.types import Typed, check_asked, check_writable
from ghostlayers.errors import InputError
from ghostlayers.evaluation import LoadedTasks, open_tasks, tokens_to_answer
from ghostlayers.evaluation.task_files import listed
from ghostlayers.model import quantized
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import (
    Documents,
    check_request,
    check_selection,
    open_model,
    read_evaluation,
)
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs import find_method
from ghostlayers.report.results import SCHEMA
from ghostlayers.runtime.files import shown_name
from ghostlayers.runtime.machine import processor_name, versions
from ghostlayers.runtime.progress import Progress
from ghostlayers.spans import check_count
from ghostlayers.study import Study
from ghostlayers.surgery.features import basis_note, check_fit_tokens, check_method
from ghostlayers.text import corpora
from ghostlayers.text.tokens import Windows, check_sequence_length, check_tokens

WARNING_WINDOWS = 4
"""Held-out windows that tell whether a repair is worse than none."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """Everything that all cells share.

    Attributes:
        request: what is compared.
        study: the model and the calibration text; of presets, the first one's.
        corpora: evaluation windows by name, which is no path.
        repairs: names that the model has what they need for.
        skipped: the others, with the reason.
        tasks: opened once; None if none are asked for.
        task_tokens: about how many tokens a model reads to answer them.
        store: finished parts.
        say: told what is done and what comes next.
        files: measures models as GGUF files; None where no types are asked for.
        presets: the same model with the text of every preset, where methods are compared by their
            own choices.
    """

    request: Comparison
    study: Study
    corpora: dict[str, Windows]
    repairs: tuple[str, ...]
    skipped: tuple[dict[str, Any], ...]
    tasks: LoadedTasks | None
    task_tokens: int
    store: Store
    say: Say
    files: Typed | None = None
    presets: Mapping[str, Study] = dataclasses.field(default_factory=dict)

    @property
    def dense(self) -> DenseModel:
        """The dense model."""
        return self.study.dense

    @property
    def runner(self) -> Runner:
        """Runs it."""
        return self.study.runner

    def answers_tasks(self, repair: str) -> bool:
        """Whether the models of a repair answer the tasks."""
        return self.tasks is not None and repair in (self.request.task_repair or (repair,))

    @property
    def calibrated_on(self) -> set[str]:
        """Hashes of the documents that any repair was fitted on."""
        studies = list(self.presets.values()) or [self.study]
        return {document for study in studies for document in study.windows.documents}

    @property
    def fit_windows(self) -> Windows:
        """Windows that repairs are fitted on."""
        return self.study.windows.first(self.request.calibration.num_fit_windows)

    @contextlib.contextmanager
    def keeping(self, key: str, study: Study | None = None) -> "Iterator[Bench]":
        """The same bench, which keeps the passes of a part: see `Store.keeping`."""
        study = study or self.study
        how = {
            "dtype": str(self.dense.dtype),
            "device": str(self.dense.device),
            "batch_size": self.runner.batch_size,
            "versions": versions(),
        }
        with self.store.keeping(key, how) as journal:
            runner = dataclasses.replace(study.runner, journal=journal)
            yield dataclasses.replace(self, study=dataclasses.replace(study, runner=runner))

    @property
    def warning_windows(self) -> Windows:
        """Held-out windows that tell whether a repair is worse than none."""
        return self.study.held_out.first(WARNING_WINDOWS)


def _open_tasks(request: Comparison, say: Say | None, *, trust_tasks: bool) -> LoadedTasks:
    found = open_tasks(request.tasks, tasks_path=request.tasks_path, trust_tasks=trust_tasks)
    if found.code and say is not None:
        say(f"Code of task files runs: {listed(found.code)}")
    return found


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or as many as tell them apart."""
    longest = max((len(Path(path).parts) for path in paths), default=1)
    for count in range(1, longest):
        names = {path: "/".join(Path(path).parts[-count:]) for path in paths}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def prepare(
    model: Any,
    request: Comparison,
    out: Path,
    tokenizer: Any,
    data: Documents | None,
    eval_data: Mapping[str, Documents] | None,
    options: RunOptions | None,
    revision: str | None,
    overwrite: bool,
    progress: Progress | None,
    say: Say | None,
    trust_tasks: bool = False,
) -> Bench:
    """Open and check everything; arguments as `compare.compare`."""
    options = options or RunOptions()
    check_asked(request.types)
    opened = _open_tasks(request, say, trust_tasks=trust_tasks) if request.tasks else None
    dense = open_model(model, tokenizer, options, revision, surgery_follows=True)
    if dense.base.quantized and say is not None:
        say(f"The model's weights were {quantized.expanded(dense.base.quantized)}")
    check_sequence_length(dense.config, request.window_length, "--eval-length")
    check_writable(dense, request.types)
    kept: tuple[str, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    open_study = functools.partial(Study.open, dense, data=data, options=options, progress=progress)
    studies: dict[str, Study] = {}
    if request.presets:
        _check_presets(dense, request)
        for name in request.presets:
            recipe = request.preset_recipe(name, request.layers[0])
            studies[name] = open_study(recipe)
        study = next(iter(studies.values()))
    else:
        # The numbers of layers are checked with their selections.
        recipe = dataclasses.replace(request.calibration, layers=1, remove=None, repair="ghost")
        check_request(dense, recipe)
        _check_selections(dense, request, dense.num_layers)
        kept, skipped = _possible_repairs(dense, request)
        # Any of the selections may race on the held-out windows that one of them asks for.
        race = max(1, _race_windows(request))
        study = open_study(recipe, select="recoverable", race_windows=race)
    used = kept or [request.preset_recipe(each, request.layers[0]).repair for each in studies]
    for note in filter(None, (basis_note(dense, find_method(name)) for name in used)):
        if say is not None:
            say(note)
    texts = _read_corpora(dense, request, eval_data or {})
    check_tokens(dense.network, dense.tokenizer, *texts.values())
    identity = {
        "request": request.to_dict(),
        "model": model_fingerprint(dense),
        "calibration": [each.corpus.sha256() for each in studies.values()] or study.corpus.sha256(),
        "evaluation": {name: _hash_windows(each) for name, each in texts.items()},
    }
    store = Store(out, identity, overwrite=overwrite)
    files = Typed(dense, request.types, texts, store, study.runner.progress)
    return Bench(
        request, study, texts, kept, skipped, opened,
        0 if opened is None else tokens_to_answer(opened, dense.tokenizer, request.limit),
        store, say or _ignore, files if request.types else None, studies,
    )  # fmt: skip


def _race_windows(request: Comparison) -> int:
    """Held-out windows that any of the selections may race on."""
    asked = (
        request.cell_recipe(layers, select).num_race_windows
        for layers in request.layers
        for select in request.select
        if select != EVERY
    )
    return max(asked, default=0)


def _check_presets(dense: DenseModel, request: Comparison) -> None:
    """Refuse methods that this model cannot serve, before anything is computed."""
    for name in request.presets:
        for layers in request.layers:
            check_request(dense, request.preset_recipe(name, layers))


def _check_selections(dense: DenseModel, request: Comparison, num_layers: int) -> None:
    for layers in request.layers:
        check_count(layers, num_layers)
        for select in request.select:
            if select == EVERY:
                request.every_span(num_layers, layers)
            else:
                check_selection(dense, request.cell_recipe(layers, select), num_layers)


def _ignore(text: str) -> None:
    del text


def _possible_repairs(
    dense: DenseModel, request: Comparison
) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
    """Repairs whose features the model has; one that was asked for by name must be among them."""
    recipe = request.calibration
    num_tokens = recipe.num_fit_windows * recipe.sequence_length
    kept, skipped = [], []
    for name in request.repair_names():
        method = find_method(name)
        try:
            check_method(dense, method)
            check_fit_tokens(dense, method, num_tokens)
        except InputError as error:
            if request.named(name):
                raise
            skipped.append({"repair": name, "reason": str(error)})
            continue
        kept.append(name)
    return tuple(kept), tuple(skipped)


def _read_corpora(
    dense: DenseModel, request: Comparison, extra: Mapping[str, Documents]
) -> dict[str, Windows]:
    recipe = request.calibration
    separators = corpora.one_separator_each(request.eval_separators, len(request.eval_data))
    sources: dict[str, tuple[Documents, str]] = {
        source: (source, joined)
        for source, joined in zip(request.eval_data, separators, strict=True)
    }
    sources.update({name: (source, corpora.BLANK_LINE) for name, source in extra.items()})
    names = short_names(tuple(sources))
    return {
        names[name]: read_evaluation(
            source,
            dense.tokenizer,
            separator=separator,
            text_column=recipe.text_column,
            sequence_length=request.window_length,
            max_windows=request.max_windows,
            bos=recipe.bos,
        )[1]
        for name, (source, separator) in sources.items()
    }


def _hash_windows(windows: Windows) -> str:
    return hashlib.sha256(windows.input_ids.numpy().tobytes()).hexdigest()


def header(bench: Bench, command: str | None) -> dict[str, Any]:
    """Model, protocol and machine, as they stand at the head of the results."""
    model, config = bench.dense.network, bench.dense.network.config
    return {
        "schema": SCHEMA,
        "ghostlayers": versions()["ghostlayers"],
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": dict(versions()),
        "machine": {
            "processor": processor_name(bench.dense.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": str(bench.dense.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "model": {
            "name": bench.dense.base.title or Path(bench.dense.base.name).name,
            "num_layers": bench.dense.num_layers,
            "hidden_size": config.hidden_size,
            "num_parameters": sum(each.numel() for each in model.parameters()),
            "licence": bench.dense.base.licence,
        },
        "recipe": {**bench.request.calibration.to_dict(), "fit_windows": len(bench.fit_windows)},
        "comparison": {
            key: value for key, value in bench.request.to_dict().items() if key != "calibration"
        },
        "presets": {
            name: {
                **bench.request.preset_recipe(name, bench.request.layers[0]).to_dict(),
                "data": shown_name(bench.presets[name].corpus.name),
            }
            for name in bench.request.presets
        },
        "command": command,
        "prompt": bench.request.prompt,
        "corpora": [
            {
                "name": name,
                "num_windows": len(windows),
                "available_windows": windows.available,
                "sequence_length": windows.sequence_length,
                "bos": windows.bos,
                "calibration_overlap": len(set(windows.documents) & bench.calibrated_on),
            }
            for name, windows in bench.corpora.items()
        ],
        "skipped": list(bench.skipped),
    }
