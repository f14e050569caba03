"""The command that makes what is recommended, and makes it as it was measured."""

import shlex
from pathlib import Path

from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime.settings import KEY, fields_of

TOLD = (
    "data text_column separator sampling windows fit_windows held_out_windows race_windows "
    "sequence_length bos seed inputs token_weight ridge absolute_ridge"
)
"""Fields of the recipe by which text is drawn and repairs are fitted."""


def prune_command(
    model: str,
    recipe: Recipe,
    removed: str,
    repair: str,
    out: str,
    options: RunOptions,
    revision: str | None = None,
) -> str:
    """The command, as one types it.

    Args:
        model: its name.
        recipe: by which the repair was fitted.
        removed: the layers that go.
        repair: the one that was taken.
        out: the folder or file to make.
        options: how the model was opened.
        revision: of a model on the hub.
    """
    words = ["ghostlayers", "prune", model, "-o", out, "--remove", removed, "--repair", repair]
    plain = Recipe()
    for name in TOLD.split():
        value, how = getattr(recipe, name), fields_of(Recipe)[name].metadata[KEY]
        if value != getattr(plain, name):
            words += [how.option or f"--{name.replace('_', '-')}", _typed(value)]
    if options.dtype != RunOptions().dtype:
        words += ["--dtype", options.dtype]
    if revision is not None:
        words += ["--revision", revision]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    return shlex.join(words)


def _typed(value: object) -> str:
    """As the command line reads it: line breaks and tabs by their escapes."""
    return str(value).replace("\n", "\\n").replace("\t", "\\t")


def out_name(model: str, layers: int, *, file: bool) -> str:
    """A name for the result, of the model's own."""
    return f"{Path(model).stem}-{layers}-layers-less{'.gguf' if file else ''}"
