"""Options that commands share and that are no fields, and how values are typed in them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ghostlayers.errors import RecipeError
from ghostlayers.presets import find_preset
from ghostlayers.recipe import Recipe, Save
from ghostlayers.recipe.wish import is_packed
from ghostlayers.repairs.auto import AUTO
from ghostlayers.runtime.settings import HOW, WHAT
from ghostlayers.spans import small_number
from ghostlayers.text.corpora import split_names


def option(
    *names: str, text: str, panel: str = HOW, show_default: bool = False, **more: Any
) -> Any:
    """An option of the command line; brackets in its text are brackets."""
    text = text.replace("[", "\\[")
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=show_default, **more)


REPAIR_OF_FILES = "refit:3:ridge=auto"
"""Nearest to ghost of those that leave nothing but stock layers, the only ones that GGUF has."""

RUN = "dtype device batch_size offload max_memory"
"""Run options, as help shows them; what lets code run comes last."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model's folder, a hub id such as Qwen/Qwen3-0.6B, or a .gguf file."
    ),
]
GgufOption = Annotated[
    Path | None,
    option(
        "--gguf",
        metavar="FILE",
        text="Write the result as a GGUF file too, for llama.cpp. Needs a stock checkpoint: "
        "--repair refit:3:ridge=auto, or --repair normed --export stock-layer.",
        panel=WHAT,
    ),
]
PreTokenizer = Annotated[
    str | None,
    option(
        "--pre-tokenizer",
        text="For --gguf: llama.cpp's name for how the tokenizer splits text. [default: found out]",
        panel=WHAT,
    ),
]
SaveOption = Annotated[
    Save,
    option(
        "--save",
        text="Write the whole model, or only what distinguishes it from its base (megabytes). "
        "[default: checkpoint]",
        panel=WHAT,
    ),
]
Revision = Annotated[
    str | None, option("--revision", text="Branch, tag or commit of a model on the hub.")
]
Debug = Annotated[bool, option("--debug", text="Show a traceback on errors.")]
"""Every command has it; see `shell`."""
Json = Annotated[Path | None, option("--json", text="Also write the result to this file.")]
Out = Annotated[Path, option("--output", "-o", text="The folder to make.", panel=WHAT)]
OutOrFile = Annotated[
    Path,
    option(
        "--output",
        "-o",
        text="The folder to make, or a .gguf file: of a .gguf file, what is quantised stays so.",
        panel=WHAT,
    ),
]
Overwrite = Annotated[
    bool,
    option(
        "--overwrite",
        text="Replace the output if Ghostlayers made all of it. [default: off]",
        panel=WHAT,
    ),
]
OverwriteFile = Annotated[
    bool, option("--overwrite", text="Replace an existing file. [default: off]")
]
PlanOnly = Annotated[
    bool,
    option(
        "--plan",
        text="Only say what it will take: time, memory, disk. [default: say it, and go on]",
    ),
]
Restart = Annotated[
    bool,
    option(
        "--restart",
        text="Forget what an interrupted run of the same output kept. [default: go on with it]",
    ),
]


def recipe_from(**values: Any) -> Recipe:
    """A recipe from a preset and the options that were given.

    Raises:
        RecipeError: options that contradict each other, or no text is named.
    """
    preset = values.get("preset")
    if "layers" in values and "remove" in values:
        raise RecipeError("give either --layers or --remove, not both.")
    if is_packed(values.get("as_type")) and not {"repair", "preset"} & values.keys():
        values["repair"] = REPAIR_OF_FILES
    chosen = {} if preset is None else find_preset(preset).choices
    if values.get("data") is None and chosen.get("data") is None:
        raise RecipeError(
            "no calibration text: give --data a file of yours, or the name of a corpus on the hub "
            "(c4, wikitext2)."
        )
    return Recipe.from_dict(values)


def recipe_to(output: Path, gguf: Path | None = None, **values: Any) -> Recipe:
    """`recipe_from`, with a repair that the output has a place for unless another one is named.

    Raises:
        RecipeError: see `recipe_from`; or a GGUF file is to be made for another engine.
    """
    file = output if output.suffix == ".gguf" else gguf
    chosen = {"repair", "engine", "overhead", "preset"} & values.keys()
    if file is None:
        return recipe_from(**values)
    if values.get("engine", "llama.cpp") != "llama.cpp":
        raise RecipeError(
            f"{file} is a file for llama.cpp, but --for {values['engine']} is asked for; drop one."
        )
    if file is output and not chosen:
        values["repair"] = REPAIR_OF_FILES
    elif values.get("repair", AUTO) == AUTO and "preset" not in values and chosen:
        values["engine"] = "llama.cpp"
    return recipe_from(**values)


def names_in(listed: str | None, option: str) -> list[str]:
    """The names of a comma-separated option; none where it is not given.

    Raises:
        RecipeError: it is given and names nothing.
    """
    if listed is None:
        return []
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"{option} names nothing.")
    return names


def corpora_in(listed: str | None, option: str) -> list[str]:
    """The corpora of a comma-separated option, among them files with commas in their names."""
    names_in(listed, option)
    return [] if listed is None else [name for name in split_names(listed, ",") if name]


def numbers_in(listed: str, option: str, example: str, *, least: int = 0) -> list[int]:
    """The whole numbers of a comma-separated option.

    Raises:
        RecipeError: something else is in it, or a number below the least; shows the example.
    """
    numbers = [small_number(text) for text in names_in(listed or None, option)]
    valid = [number for number in numbers if number is not None and number >= least]
    if not valid or len(valid) < len(numbers):
        raise RecipeError(
            f"{option}: expected whole numbers such as {example}, got '{listed[:60]}'."
        )
    return valid


def unescape(separator: str) -> str:
    """Read the two escapes that a shell makes hard to type."""
    return separator.replace("\\n", "\n").replace("\\t", "\t")
