"""Everything that is checked and opened before the first layer runs.

A request that cannot work is refused here, by name, before anything is computed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ghostlayers.errors import (
    CorpusError,
    GhostlayersError,
    InputError,
    RecipeError,
    SpanError,
    UnsupportedModelError,
    WindowError,
)
from ghostlayers.model import multimodal
from ghostlayers.model.anatomy import Anatomy
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.families import check_config, check_tokenizer, family_of
from ghostlayers.model.loading import from_memory, load_model, read_config
from ghostlayers.presets import PRESETS, find_preset
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.selection.choices import (
    candidate_spans,
    check_eligible,
    eligible_layers,
)
from ghostlayers.spans import Span, check_count, check_layers, format_layers, merge_layers
from ghostlayers.surgery import removal
from ghostlayers.surgery.eligible import check_repair
from ghostlayers.text import corpora, tokens
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.raw import WHOLE
from ghostlayers.text.tokens import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Documents = str | Path | Sequence[str] | Corpus

ModelSource: TypeAlias = "str | Path | PreTrainedModel | DenseModel"
"""A folder, a hub id, a ``.gguf`` file, or a causal language model in memory, opened or not."""

Tokenizer: TypeAlias = "PreTrainedTokenizerBase | ProcessorMixin"
"""Of a model in memory; a vision-language one's may lie in its processor."""


def make_recipe(recipe: Recipe | None, choices: Mapping[str, Any]) -> Recipe:
    """A recipe with some fields replaced.

    Raises:
        RecipeError: an unknown field or value.
    """
    base = {} if recipe is None else recipe.to_dict()
    if choices.get("preset") is not None:  # what the recipe leaves open is the preset's to choose
        plain = Recipe().to_dict()
        base = {name: value for name, value in base.items() if value != plain[name]}
    return Recipe.from_dict({**base, **choices})


def open_model(
    model: ModelSource,
    tokenizer: "Tokenizer | None",
    options: RunOptions,
    revision: str | None = None,
    *,
    surgery_follows: bool = False,
    exact: bool = False,
) -> DenseModel:
    """Open a model by name, or wrap one that is in memory.

    With ``surgery_follows``, a family that cannot be cut is refused from its config alone, before
    gigabytes of weights are read, and quantised weights are expanded; with ``exact``, those of a
    GGUF file are not rounded to 16 bits.
    """
    if isinstance(model, DenseModel):
        return model
    if isinstance(model, (str, Path)):
        if surgery_follows:
            _check_config(str(model), revision)
        return load_model(str(model), options, revision, expand=surgery_follows, exact=exact)
    return from_memory(model, tokenizer)


def _check_config(name: str, revision: str | None) -> None:
    config = read_config(name, revision)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "model_type" in part:
            check_config(part)


def check_model(loaded: DenseModel, recipe: Recipe, *, surgery_follows: bool = True) -> None:
    """Refuse a model that cannot be cut at all, or that is too short for the windows.

    Raises:
        UnsupportedModelError: the family cannot be cut.
        WindowError: the windows are longer than the model's positions.
    """
    if surgery_follows:
        family_of(loaded.network)
        check_tokenizer(loaded.tokenizer)
        _refuse_quantized(multimodal.whole_of(loaded.network))
    tokens.check_sequence_length(loaded.config, recipe.sequence_length)


def check_asked(recipe: Recipe) -> None:
    """Refuse a recipe that does not say what goes.

    Raises:
        RecipeError: neither a number of layers nor their names nor a budget.
    """
    if recipe.layers is None and recipe.remove is None and recipe.wish is None:
        raise RecipeError(
            "say how many layers to remove (--layers) or which (--remove), or a budget: --smaller "
            "20%, --faster 1.25x, --fits 6GiB, --max-loss 0.1."
        )


def check_request(loaded: DenseModel, recipe: Recipe, *, surgery_follows: bool = True) -> None:
    """Refuse what cannot work with this model.

    Args:
        loaded: the model.
        recipe: the request.
        surgery_follows: layers will be removed, so the family must be one that can be cut.

    Raises:
        UnsupportedModelError: the family cannot be cut.
        SpanError: the layers do not exist, or are too many.
        WindowError: the windows are longer than the model's positions.
        InputError: the repair cannot handle the model's hidden size.
    """
    check_asked(recipe)
    check_model(loaded, recipe, surgery_follows=surgery_follows)
    try:
        _check(loaded, recipe, surgery_follows=surgery_follows)
    except (UnsupportedModelError, InputError) as error:
        ours = isinstance(error, (SpanError, RecipeError, WindowError, CorpusError))
        if recipe.preset is None or ours or recipe.layers is None:
            raise  # the request's fault, not the method's
        raise type(error)(_beside_preset(loaded, recipe, error)) from error


def check_result(loaded: DenseModel, recipe: Recipe) -> None:
    """`check_request`, where a checkpoint is to be made of what comes out.

    Raises:
        RecipeError: the model has no place for the repair.
    """
    if not recipe.contested:
        form, repair = recipe.method.form, str(recipe.repair)
        multimodal.check_recipe(loaded.network, form, recipe.export, repair)
    check_request(loaded, recipe)


def _check(loaded: DenseModel, recipe: Recipe, *, surgery_follows: bool = True) -> None:
    removed = recipe.removed()
    if removed is not None:
        gaps = check_layers(removed, loaded.num_layers)
        _check_kept(removed, recipe, loaded.num_layers)
        if surgery_follows:
            removal.check_cut(loaded, gaps)
    else:
        assert recipe.layers is not None
        check_count(recipe.layers, loaded.num_layers)
        if surgery_follows:
            check_selection(loaded, recipe, loaded.num_layers)
    if not recipe.contested:  # else those that cannot be are left out of the contest
        spans = () if removed is None else merge_layers(removed)
        check_repair(loaded, recipe, spans, saved=surgery_follows)


def _check_kept(removed: Sequence[int], recipe: Recipe, num_layers: int) -> None:
    first, last = recipe.kept_edges or (0, 0)
    both = [layer for layer in removed if layer < first or layer >= num_layers - last]
    if both:
        raise RecipeError(
            f"layers {format_layers(both)} are named to be removed, but --keep-layers "
            f"{recipe.keep_layers} keeps them; drop one of the two."
        )


def _beside_preset(loaded: DenseModel, recipe: Recipe, error: GhostlayersError) -> str:
    """What is wrong with a method on a model, and the nearest one that goes."""
    assert recipe.preset is not None
    mine = find_preset(recipe.preset)
    text = {name: getattr(recipe, name) for name in ("layers", "windows", "sequence_length")}
    for name in dict.fromkeys((mine.nearest, *PRESETS)):
        other = Recipe.from_dict({**text, "fit_windows": recipe.windows, "preset": name})
        try:
            _check(loaded, other)
        except GhostlayersError:
            continue
        return f"preset '{mine.name}': {error} The nearest that this model can: {name}."
    return f"preset '{mine.name}': {error}"


def check_moves(model: DenseModel, recipe: Recipe) -> None:
    """Refuse an iterated selection whose scores would stay as they are on this model.

    Raises:
        RecipeError: the repair changes only what the selection does not count.
    """
    choice, method = recipe.selection, recipe.method
    if not recipe.iterative or not (choice.scores_only_weights and method.scales):
        return
    anatomy = model.anatomy_or_reason
    if isinstance(anatomy, Anatomy) and anatomy.post_norms and "norms" not in choice.flags:
        raise RecipeError(
            f"'{recipe.select}' cannot be iterated with '{recipe.repair}' on this model: the scale "
            "goes into the gains of the norms that its layers write through, which that score does "
            f"not count. Take --select {choice.name}:norms, or leave out 'iterative'."
        )


def check_selection(model: DenseModel, recipe: Recipe, num_layers: int) -> None:
    """Refuse what a selection cannot choose, before anything is computed for it.

    Args:
        model: whose layers go.
        recipe: names the selection and the number of layers.
        num_layers: decoder layers of the model.

    Raises:
        SpanError: more layers than the selection may remove.
        UnsupportedModelError: layers one by one, where only runs of them can go.
    """
    check_moves(model, recipe)
    choice, keep_first = recipe.selection, recipe.method.reach > 0
    assert recipe.layers is not None
    if choice.contiguous and not recipe.iterative:
        candidate_spans(num_layers, recipe.layers, recipe.kept_edges)
        return
    eligible = eligible_layers(choice, num_layers, recipe.kept_edges, keep_first=keep_first)
    check_eligible(choice, eligible, recipe.layers, num_layers, recipe.kept_edges)
    multimodal.check_spans(model.network, (Span(eligible[0], eligible[0] + 1),))
    if removal.loses_any_layer(model, behind=multimodal.fed_layers(model.network)):
        return
    raise UnsupportedModelError(
        f"'{recipe.select}' chooses layers one by one, but models of type "
        f"'{model.config.model_type}' place their kinds of layers by a formula, so that only some "
        "runs can go. Take --select recoverable, streamline or angular, or name the layers with "
        "--remove."
    )


def _refuse_quantized(model: "PreTrainedModel") -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the model in memory has quantised weights, which cannot be cut; call "
            "model.dequantize() first, or give the folder's name instead, or start from the "
            "checkpoint that was quantised, and quantise the result."
        )


def read_calibration(
    loaded: DenseModel,
    recipe: Recipe,
    data: Documents | None = None,
    race_windows: int | None = None,
) -> tuple[Corpus, Windows, Windows]:
    """The calibration text, its windows for scores and fits, and held-out ones.

    Args:
        loaded: the model, for its tokenizer.
        recipe: how the text is cut.
        data: instead of the recipe's.
        race_windows: held-out windows that any race may use; the recipe's own if not given.

    Raises:
        CorpusError: the text cannot be read.
        WindowError: it is too short.
    """
    source = recipe.data if data is None else data
    if source is None:
        raise RecipeError("no calibration text: give --data a corpus name or a file.")
    wanted = recipe.num_race_windows if race_windows is None else race_windows
    spare = max(0, wanted - recipe.num_held_out_windows)
    needed = recipe.num_calibration_windows + recipe.num_held_out_windows + spare
    for characters in _budgets(source, needed * recipe.sequence_length):
        corpus = corpora.load_corpus(
            source,
            use="calibration",
            text_column=recipe.text_column,
            separator=recipe.separator,
            max_characters=characters,
            seed=recipe.seed,
            tokenizer=loaded.tokenizer,
        )
        given = isinstance(source, Corpus) or 4 * characters > corpora.MAX_CHARACTERS
        more = not (corpus.complete or given)
        try:
            drawn = tokens.draw_windows(
                corpus,
                loaded.tokenizer,
                sequence_length=recipe.sequence_length,
                count=recipe.num_calibration_windows,
                held_out=recipe.num_held_out_windows,
                spare=spare,
                bos=recipe.bos,
                seed=recipe.seed,
                sampling=recipe.sampling,
            )
        except WindowError:
            if more:
                continue
            raise
        if not more or sum(map(len, drawn)) >= needed:
            break
    tokens.check_tokens(loaded.network, loaded.tokenizer, *drawn)
    return corpus, *drawn


def _budgets(source: Documents, num_tokens: int) -> Iterator[int]:
    """Characters to read for so many tokens, and more where that is not enough."""
    characters = corpora.characters_for(source, num_tokens)
    while True:
        yield characters
        characters *= 4


def read_evaluation(
    source: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    separator: str,
    text_column: str | None,
    sequence_length: int,
    max_windows: int | None,
    bos: tokens.BosPolicy,
) -> tuple[Corpus, Windows]:
    """A corpus to evaluate on, and its first windows: of a large one, only what they need is read.

    Raises:
        CorpusError: the text cannot be read.
        WindowError: it is too short.
    """
    for characters in _budgets(source, (max_windows or 0) * sequence_length):
        limit = corpora.MAX_CHARACTERS
        if max_windows is not None:
            limit = min(characters, limit)
        corpus = _read_first(source, limit, separator, text_column, tokenizer)
        windows = tokens.make_windows(
            corpus,
            tokenizer,
            sequence_length=sequence_length,
            bos=bos,
            count=max_windows,
        )
        enough = max_windows is not None and len(windows) >= max_windows
        if enough or corpus.complete or corpus is source or limit == corpora.MAX_CHARACTERS:
            break
    return corpus, windows


def _read_first(
    source: Documents,
    characters: int,
    separator: str,
    text_column: str | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> Corpus:
    """The first text of a corpus; all of a small file, to tell how many windows it has."""

    def read(limit: int) -> Corpus:
        return corpora.load_corpus(
            source,
            use="evaluation",
            text_column=text_column,
            separator=separator,
            max_characters=limit,
            tokenizer=tokenizer,
        )

    if characters < WHOLE and corpora.hub_corpus(source) is None:
        whole = read(WHOLE)
        if whole.complete or whole is source:
            return whole
    return read(characters)
