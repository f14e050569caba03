"""`write_data`: a file of training text that the dense model writes."""

from pathlib import Path
from typing import Any

from ghostlayers.calibration import journal
from ghostlayers.errors import GhostlayersError
from ghostlayers.model.loading import leaves_models_alone
from ghostlayers.preparation import ModelSource, Tokenizer, open_model
from ghostlayers.recipe import RunOptions
from ghostlayers.recipe.writing import WritingRecipe
from ghostlayers.runtime import files, locks
from ghostlayers.runtime.places import check_apart
from ghostlayers.writing.authors import Author, author_in_memory, author_in_vllm, takes_vllm
from ghostlayers.writing.composing import Written, compose
from ghostlayers.writing.orders import read_orders


@leaves_models_alone
def write_data(
    model: ModelSource,
    out: str | Path,
    recipe: WritingRecipe | None = None,
    *,
    tokenizer: "Tokenizer | None" = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    **choices: Any,
) -> Written:
    """Write training text with the dense model: its own answers, or its own continuations.

    What is written lies beside the file as long as it is not complete, and the same call goes on
    with it after an interruption.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a model in memory.
        out: the file of JSON lines to make.
        recipe: what is written; fields can also be given by name.
        tokenizer: for a model in memory.
        options: how to run.
        revision: of a model on the hub.
        overwrite: replace an existing file.
        restart: forget what an interrupted run wrote.
        choices: fields of the recipe.

    Returns:
        The rows as they stand in the file, and what was not kept.

    Raises:
        GhostlayersError: bad input, or nothing that can be kept.
    """
    base = {} if recipe is None else recipe.to_dict()
    recipe, options, out = (
        WritingRecipe.from_dict({**base, **choices}),
        options or RunOptions(),
        Path(out),
    )
    read = [
        source
        for source in (model, recipe.prompts, recipe.prefixes)
        if isinstance(source, str | Path)
    ]
    check_apart({"input": read}, {"output": out})
    files.check_can_write(out)
    with locks.holding(out):
        if not overwrite and not locks.continues(out):
            files.check_new(out)
        draft = draft_for(out)
        if restart:
            draft.unlink(missing_ok=True)
        author = _open(model, tokenizer, recipe, options, revision)
        orders = read_orders(recipe, author.tokenizer)
        try:
            written = compose(
                author, recipe, orders, batch_size=options.batch_size, draft=draft,
            )  # fmt: skip
        except GhostlayersError as error:
            if journal.is_final(error):
                draft.unlink(missing_ok=True)
            raise
        files.write_whole(out, written.lines())
        draft.unlink(missing_ok=True)
    return written


def draft_for(out: Path) -> Path:
    """Where what is written so far lies."""
    return journal.folder_for(out)


def _open(
    model: ModelSource,
    tokenizer: "Tokenizer | None",
    recipe: WritingRecipe,
    options: RunOptions,
    revision: str | None,
) -> Author:
    name = str(model) if isinstance(model, str | Path) else None
    if name is not None and takes_vllm(recipe, name, options):
        return author_in_vllm(name, revision, options)
    return author_in_memory(open_model(model, tokenizer, options, revision))
