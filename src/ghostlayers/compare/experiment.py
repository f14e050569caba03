"""What all parts of a comparison share beside a `Study`: the texts, the repairs, the tasks."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostlayers.calibration.fingerprint import model_fingerprint
from ghostlayers.compare.auto import contested, is_auto, method_named
from ghostlayers.compare.request import EVERY, Comparison
from ghostlayers.compare.store import Store
from ghostlayers.compare.types import Typed, check_writable
from ghostlayers.errors import InputError
from ghostlayers.evaluation import LoadedTasks, open_tasks, tokens_to_answer
from ghostlayers.evaluation.task_files import listed
from ghostlayers.model import quantized
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import Documents, check_request, check_selection, read_evaluation
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import find_method
from ghostlayers.runtime.machine import versions
from ghostlayers.spans import check_count
from ghostlayers.study import Study
from ghostlayers.surgery.features import basis_note, check_fit_tokens, check_method
from ghostlayers.text import corpora
from ghostlayers.text.tokens import Windows, check_sequence_length, check_tokens

Say = Callable[[str], None]


@dataclass(frozen=True)
class Repairs:
    """The repairs of a request, as far as the model has what they need.

    Attributes:
        names: of those that it has.
        skipped: the others, with the reason.
    """

    names: tuple[str, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A request, and what it is carried out on.

    Attributes:
        request: what is compared.
        studies: the model with a calibration text: one for all choices, or one a preset, by name.
        texts: evaluation windows by name, which is no path.
        repairs: that can be compared; none where methods are, by their own choices.
        tasks: opened once; None if none are asked for.
        store: finished parts.
        say: told what is done and what comes next.
        files: measures models as GGUF files of the types that are asked for.
    """

    request: Comparison
    studies: Mapping[str, Study]
    texts: Mapping[str, Windows]
    repairs: Repairs
    tasks: LoadedTasks | None
    store: Store
    say: Say
    files: Typed

    @property
    def study(self) -> Study:
        """The model and its calibration text; of presets, the first one's."""
        return next(iter(self.studies.values()))

    @property
    def writes(self) -> bool:
        """Whether the models continue stretches of the texts."""
        return self.request.continuations > 0 and len(self.texts) > 0

    @functools.cached_property
    def task_tokens(self) -> int:
        """About how many tokens a model reads to answer the tasks."""
        if self.tasks is None:
            return 0
        return tokens_to_answer(self.tasks, self.study.dense.tokenizer, self.request.limit)

    def answers_tasks(self, repair: str) -> bool:
        """Whether the models of a repair answer the tasks."""
        return self.tasks is not None and repair in (self.request.task_repair or (repair,))

    @contextlib.contextmanager
    def keeping(self, key: str, study: Study) -> Iterator[Study]:
        """The same study, which keeps the passes of a part: see `Store.keeping`."""
        how = {
            "dtype": str(study.dense.dtype),
            "device": str(study.dense.device),
            "batch_size": study.runner.batch_size,
            "versions": versions(),
        }
        with self.store.keeping(key, how) as journal:
            runner = dataclasses.replace(study.runner, journal=journal)
            yield dataclasses.replace(study, runner=runner)


def find_tasks(request: Comparison, say: Say) -> LoadedTasks | None:
    """The tasks that are asked for, before a model is opened for them."""
    if not request.tasks:
        return None
    tasks = open_tasks(
        request.tasks, tasks_path=request.tasks_path, trust_tasks=request.trust_tasks
    )
    if tasks.code:
        say(f"Code of task files runs: {listed(tasks.code)}")
    return tasks


def shared_recipe(request: Comparison) -> Recipe:
    """The recipe by which the text of all choices is read."""
    # The numbers of layers are checked with their selections.
    return dataclasses.replace(request.calibration, layers=1, remove=None, repair="ghost")


def check(dense: DenseModel, request: Comparison, say: Say) -> Repairs:
    """Refuse what cannot work with a model, before any text is read.

    Returns:
        The repairs that can be compared.
    """
    if dense.base.quantized:
        say(f"The model's weights were {quantized.expanded(dense.base.quantized)}")
    check_sequence_length(dense.config, request.window_length, "--eval-length")
    check_writable(dense, request.types)
    if request.presets:
        recipes = [
            request.preset_recipe(name, layers)
            for name in request.presets
            for layers in request.layers
        ]
        for recipe in recipes:
            check_request(dense, recipe)
        repairs, methods = Repairs(), [*dict.fromkeys(recipe.method for recipe in recipes)]
    else:
        check_request(dense, shared_recipe(request))
        _check_selections(dense, request)
        repairs = _possible_repairs(dense, request)
        methods = [method_named(name) for name in repairs.names]
    for note in filter(None, (basis_note(dense, method) for method in methods)):
        say(note)
    return repairs


def open_studies(dense: DenseModel, request: Comparison, **how: Any) -> dict[str, Study]:
    """The model with every calibration text; ``how`` is told to `Study.open`."""
    if request.presets:
        return {
            name: Study.open(dense, request.preset_recipe(name, request.layers[0]), **how)
            for name in request.presets
        }
    # Any of the selections may race on the held-out windows that one of them asks for.
    recipe = dataclasses.replace(
        shared_recipe(request), select="recoverable", race_windows=max(1, _race_windows(request))
    )
    return {"": Study.open(dense, recipe, **how)}


def identity(
    request: Comparison, studies: Mapping[str, Study], texts: Mapping[str, Windows]
) -> dict[str, Any]:
    """What the results depend on, by which a folder knows its comparison."""
    calibration = [study.corpus.sha256() for study in studies.values()]
    return {
        "request": request.to_dict(),
        "model": model_fingerprint(next(iter(studies.values())).dense),
        "calibration": calibration if request.presets else calibration[0],
        "evaluation": {name: windows.digest for name, windows in texts.items()},
    }


def _race_windows(request: Comparison) -> int:
    """Held-out windows that any of the selections may race on."""
    asked = (
        request.recipe_for(layers, select).num_race_windows
        for layers in request.layers
        for select in request.selections
    )
    races = (
        contested(request.calibration, name).num_race_windows
        for name in request.repair_names()
        if is_auto(name)
    )
    return max([*asked, *races], default=0)


def _check_selections(dense: DenseModel, request: Comparison) -> None:
    for layers in request.layers:
        check_count(layers, dense.num_layers)
        for select in request.select:
            if select == EVERY:
                request.every_span(dense.num_layers, layers)
            else:
                check_selection(dense, request.recipe_for(layers, select), dense.num_layers)


def _possible_repairs(dense: DenseModel, request: Comparison) -> Repairs:
    """Repairs whose features the model has; one that was asked for by name must be among them."""
    recipe = request.calibration
    num_tokens = recipe.num_fit_windows * recipe.sequence_length
    names, skipped = [], []
    for name in request.repair_names():
        if is_auto(name):
            names.append(name)
            continue
        method = find_method(name)
        try:
            check_method(dense, method)
            check_fit_tokens(dense, method, num_tokens)
        except InputError as error:
            if request.named(name):
                raise
            skipped.append({"repair": name, "reason": str(error)})
            continue
        names.append(name)
    return Repairs(tuple(names), tuple(skipped))


def read_texts(
    dense: DenseModel, request: Comparison, extra: Mapping[str, Documents]
) -> dict[str, Windows]:
    """Evaluation windows by name: of the request, and of what is given beside it."""
    separators = corpora.one_separator_each(request.eval_separators, len(request.eval_data))
    sources: dict[str, tuple[Documents, str]] = {
        source: (source, joined)
        for source, joined in zip(request.eval_data, separators, strict=True)
    }
    sources.update({name: (source, corpora.BLANK_LINE) for name, source in extra.items()})
    names = short_names(tuple(sources))
    texts = {
        names[name]: read_evaluation(
            source,
            dense.tokenizer,
            separator=separator,
            text_column=request.calibration.text_column,
            sequence_length=request.window_length,
            max_windows=request.max_windows,
            bos=request.calibration.bos,
        )[1]
        for name, (source, separator) in sources.items()
    }
    check_tokens(dense.network, dense.tokenizer, *texts.values())
    return texts


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or as many as tell them apart."""
    longest = max((len(Path(path).parts) for path in paths), default=1)
    for count in range(1, longest):
        names = {path: "/".join(Path(path).parts[-count:]) for path in paths}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}
