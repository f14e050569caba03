"""The options that commands share; their help quotes the real defaults and the paper's choices."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ghostlayers.errors import RecipeError
from ghostlayers.presets import PRESETS, find_preset
from ghostlayers.recipe import Inputs, Offload, Recipe, Refit, Save, TokenWeight
from ghostlayers.repairs import METHODS
from ghostlayers.selection.choices import SELECTIONS, Selection
from ghostlayers.selection.cosine import CosineAxis
from ghostlayers.spans import small_number
from ghostlayers.text.tokens import BosPolicy, Sampling

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Recipe)}
_PANEL_WHAT = "What to do"
_PANEL_TEXT = "Calibration text"
_PANEL_FIT = "Fit"
_PANEL_HOW = "How to run"


def _say(text: str, field: str, default: str | None = None) -> str:
    """Help that states the default and, where it differs, what --preset ghosted sets."""
    ours = _DEFAULTS[field] if default is None else default
    paper = PRESETS["ghosted"].choices.get(field, ours)
    other = "" if paper == _DEFAULTS[field] or str(paper) == str(ours) else f"; ghosted: {paper}"
    return f"{text} \\[default: {ours}{other}]"


def _option(
    *names: str,
    text: str,
    panel: str = _PANEL_HOW,
    show_default: bool = False,
    **more: Any,
) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=show_default, **more)


def _describe_selection(name: str, selection: Selection) -> str:
    """A selection and its arguments in half a sentence."""
    arguments = [
        f"{name}:{word}{'N' if word.endswith('=') else ''} {what}"
        for word, what in selection.arguments.items()
    ]
    return f"{name}, {selection.what}" + (f" ({', '.join(arguments)})" if arguments else "")


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model's folder, a hub id such as Qwen/Qwen3-0.6B, or a .gguf file."
    ),
]
Layers = Annotated[
    int | None,
    _option("--layers", "-n", text="How many decoder layers to remove.", panel=_PANEL_WHAT),
]
Remove = Annotated[
    str | None,
    _option(
        "--remove",
        text="Which layers to remove instead, counted from 0, ends included: 10-12,14.",
        panel=_PANEL_WHAT,
    ),
]
Select = Annotated[
    str | None,
    _option(
        "--select",
        metavar="NAME",
        text=_say(
            "How to choose them: "
            + "; ".join(_describe_selection(name, row) for name, row in SELECTIONS.items())
            + ".",
            "select",
        ),
        panel=_PANEL_WHAT,
    ),
]
IterativeOption = Annotated[
    bool | None,
    _option(
        "--iterative/--no-iterative",
        text="Choose one layer at a time, each on the model that is repaired so far. "
        "\\[default: off]",
        panel=_PANEL_WHAT,
    ),
]
RepairOption = Annotated[
    str | None,
    _option(
        "--repair",
        metavar="NAME",
        text=_say(f"How to repair each gap: {', '.join(METHODS)}.", "repair"),
        panel=_PANEL_WHAT,
    ),
]
PresetOption = Annotated[
    str | None,
    _option(
        "--preset",
        metavar="NAME",
        text="Makes every choice as a method's authors and their code do: "
        + ", ".join(PRESETS)
        + " ('ghostlayers methods' tells more; 'ghosted:' below says what that one sets). Options "
        "given explicitly still win.",
        panel=_PANEL_WHAT,
    ),
]
CosineAxisOption = Annotated[
    CosineAxis | None,
    _option(
        "--cosine-axis",
        text=_say(
            "Axis of the cosine; 'tokens' is what the released code computes.", "cosine_axis"
        ),
        panel=_PANEL_WHAT,
    ),
]
KeepLayers = Annotated[
    str | None,
    _option(
        "--keep-layers",
        metavar="EDGES",
        text=_say(
            "Layers at the start and at the end that are never removed: first:4,last:2.",
            "keep_layers",
            "what the selection's paper protects",
        ),
        panel=_PANEL_WHAT,
    ),
]
RefitOption = Annotated[
    Refit | None,
    _option(
        "--refit",
        text=_say(
            "What --iterative does with its repairs: 'all' fits every gap anew after each layer, "
            "'none' fits one repair across each layer that goes and leaves it alone, as Prune&Comp "
            "does.",
            "refit",
        ),
        panel=_PANEL_WHAT,
    ),
]
Data = Annotated[
    str | None,
    _option(
        "--data",
        "-d",
        text="Calibration text: a .txt, .jsonl, .csv or .parquet file, a folder or a pattern of "
        "them, or text on the Hugging Face hub: c4, wikitext2, or name:config:split. Required, "
        "unless a preset names one.",
        panel=_PANEL_TEXT,
    ),
]
TextColumn = Annotated[
    str | None,
    _option(
        "--text-column",
        text="Column that holds the text. \\[default: text, else a chat, else the only column of "
        "strings that are no identifiers]",
        panel=_PANEL_TEXT,
    ),
]
Separator = Annotated[
    str | None,
    _option(
        "--separator",
        text=r"Joins documents; \n is a line break. \[default: a blank line]",
        panel=_PANEL_TEXT,
    ),
]
SamplingOption = Annotated[
    Sampling | None,
    _option(
        "--sampling",
        text=_say(
            "Where windows are drawn from: a 'grid' over the joined documents, 'random' offsets in "
            "them, or each from a 'single-document'.",
            "sampling",
        ),
        panel=_PANEL_TEXT,
    ),
]
WindowsOption = Annotated[
    int | None,
    _option("--windows", text=_say("Windows for the scores.", "windows"), panel=_PANEL_TEXT),
]
FitWindows = Annotated[
    int | None,
    _option(
        "--fit-windows",
        text=_say("Windows that the repair is fitted on.", "fit_windows", "32"),
        panel=_PANEL_TEXT,
    ),
]
SearchWindows = Annotated[
    int | None,
    _option(
        "--search-windows",
        text=_say(
            "Windows that perplexity, taylor and recoverable:greedy measure on.",
            "search_windows",
            "8",
        ),
        panel=_PANEL_TEXT,
    ),
]
HeldOutWindows = Annotated[
    int | None,
    _option(
        "--held-out-windows",
        text="Further windows that losses are measured on; 0 measures none. \\[default: one for "
        "every sixteen windows, at least 4]",
        panel=_PANEL_TEXT,
    ),
]
RaceWindows = Annotated[
    int | None,
    _option(
        "--race-windows",
        text="Held-out windows that 'recoverable' may measure its candidates on in all, as far as "
        "the text goes, before the lowest loss wins. "
        "\\[default: four times --held-out-windows, at least 32]",
        panel=_PANEL_TEXT,
    ),
]
SequenceLength = Annotated[
    int | None,
    _option(
        "--sequence-length", text=_say("Tokens a window.", "sequence_length"), panel=_PANEL_TEXT
    ),
]
Bos = Annotated[
    BosPolicy | None,
    _option(
        "--bos",
        text=_say("BOS before each window; 'auto' asks the tokenizer.", "bos"),
        panel=_PANEL_TEXT,
    ),
]
Seed = Annotated[
    int | None, _option("--seed", text=_say("Chooses the windows.", "seed"), panel=_PANEL_TEXT)
]
InputsOption = Annotated[
    Inputs | None,
    _option(
        "--inputs",
        text=_say("The stream that later gaps are fitted on.", "inputs"),
        panel=_PANEL_FIT,
    ),
]
TokenWeightOption = Annotated[
    TokenWeight | None,
    _option(
        "--token-weight",
        text=_say(
            "How much each token counts: 'relative' 1/||y||^2, 'balanced' 1/||y||; 'auto' is "
            "'uniform' for replaceme, as published, else 'balanced'.",
            "token_weight",
        ),
        panel=_PANEL_FIT,
    ),
]
Ridge = Annotated[
    float | None,
    _option(
        "--ridge", text=_say("Relative ridge, on equilibrated columns.", "ridge"), panel=_PANEL_FIT
    ),
]
AbsoluteRidge = Annotated[
    float | None,
    _option(
        "--absolute-ridge",
        text=_say("Ridge added to the Gram matrix as it is.", "absolute_ridge"),
        panel=_PANEL_FIT,
    ),
]
GgufOption = Annotated[
    Path | None,
    _option(
        "--gguf",
        metavar="FILE",
        text="Write the result as a GGUF file too, for llama.cpp. Needs a stock checkpoint: "
        "--repair refit:3:ridge=auto, or --repair normed --export stock-layer.",
        panel=_PANEL_WHAT,
    ),
]
PreTokenizer = Annotated[
    str | None,
    _option(
        "--pre-tokenizer",
        text="For --gguf: llama.cpp's name for how the tokenizer splits text. "
        "\\[default: found out]",
        panel=_PANEL_WHAT,
    ),
]
SaveOption = Annotated[
    Save,
    _option(
        "--save",
        text="Write the whole model, or only what distinguishes it from its base (megabytes). "
        "\\[default: checkpoint]",
        panel=_PANEL_WHAT,
    ),
]
ExportOption = Annotated[
    Literal["auto", "fold", "stock-layer", "custom"] | None,
    _option(
        "--export",
        text=_say(
            "How the checkpoint holds the repair: 'fold' into existing weights (any engine loads "
            "it), 'stock-layer' as one more decoder layer (any engine; repair normed), 'custom' "
            "with its own code. 'auto' is fold where the repair folds, else custom.",
            "export",
        ),
        panel=_PANEL_FIT,
    ),
]
TypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[
    TypeName,
    _option(
        "--dtype",
        text="Type to compute in; what is written keeps the base model's. 'auto' is the base "
        "model's own, or float32 where a processor multiplies that slowly. \\[default: auto]",
    ),
]
Device = Annotated[str, _option("--device", text="cpu, cuda, cuda:1, xpu, ... \\[default: auto]")]
BatchSize = Annotated[
    int,
    _option(
        "--batch-size",
        min=0,
        text="Windows at a time. \\[default: about 1,024 tokens; 8,192 on an accelerator]",
    ),
]
Revision = Annotated[
    str | None, _option("--revision", text="Branch, tag or commit of a model on the hub.")
]
TrustRemoteCode = Annotated[
    bool,
    _option(
        "--trust-remote-code",
        text="Let the model's own code run. Read it first. \\[default: off]",
    ),
]
OffloadOption = Annotated[
    Offload,
    _option(
        "--offload",
        text="Where decoder layers lie while they are not needed: 'disk', 'cpu' (beside an "
        "accelerator) or 'none'; 'auto' moves them only if they do not fit. \\[default: auto]",
    ),
]
MaxMemory = Annotated[
    str | None,
    _option(
        "--max-memory",
        metavar="SIZE",
        text="How much memory the run may take where it computes: 4GiB. \\[default: what is free]",
    ),
]
Debug = Annotated[bool, _option("--debug", text="Show a traceback on errors.")]
Json = Annotated[Path | None, _option("--json", text="Also write the result to this file.")]
EvaluationData = Annotated[
    str | None,
    _option(
        "--data",
        "-d",
        text="Corpora, comma-separated: c4, wikitext2 (from the hub), or files.",
        panel="Text",
    ),
]
Tasks = Annotated[
    str | None,
    _option(
        "--tasks",
        text="Zero-shot tasks of lm-evaluation-harness, comma-separated: arc_easy,piqa,... They "
        "need pip install 'ghostlayers\\[tasks]'.",
        panel="Tasks",
    ),
]
TasksPath = Annotated[
    Path | None,
    _option(
        "--tasks-path",
        text="A folder of task files (YAML), such as ones that read local data. They come before "
        "the harness's own, which read the hub. Files that can run code are refused without "
        "--trust-tasks; templates run in a sandbox.",
        panel="Tasks",
    ),
]
TrustTasks = Annotated[
    bool,
    _option(
        "--trust-tasks",
        text="Let task files run their code: functions, data sets, metrics, templates. Read them "
        "first. \\[default: off]",
        panel="Tasks",
    ),
]
Limit = Annotated[
    int | None,
    _option(
        "--limit",
        min=1,
        text="Answer the first so many documents of each task. \\[default: all]",
        panel="Tasks",
    ),
]
Out = Annotated[Path, _option("--output", "-o", text="The folder to make.", panel=_PANEL_WHAT)]
Overwrite = Annotated[
    bool,
    _option(
        "--overwrite",
        text="Replace the output if Ghostlayers made all of it. \\[default: off]",
        panel=_PANEL_WHAT,
    ),
]
OverwriteFile = Annotated[
    bool, _option("--overwrite", text="Replace an existing file. \\[default: off]")
]
PlanOnly = Annotated[
    bool,
    _option(
        "--plan",
        text="Only say what it will take: time, memory, disk. \\[default: say it, and go on]",
    ),
]
Restart = Annotated[
    bool,
    _option(
        "--restart",
        text="Forget what an interrupted run of the same output kept. \\[default: go on with it]",
    ),
]


def recipe_from(preset: Any, separator: str | None, **given: Any) -> Recipe:
    """A recipe from a preset and the options that were given."""
    values = {name: value for name, value in given.items() if value is not None}
    if separator is not None:
        values["separator"] = unescape(separator)
    if "layers" in values and "remove" in values:
        raise RecipeError("give either --layers or --remove, not both.")
    chosen = {} if preset is None else find_preset(preset).choices
    if preset is not None:
        values["preset"] = preset
    if values.get("data") is None and chosen.get("data") is None:
        raise RecipeError(
            "no calibration text: give --data a file of yours, or the name of a corpus on the hub "
            "(c4, wikitext2)."
        )
    return Recipe.from_dict(values)


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
    from ghostlayers.text.corpora import split_names

    names_in(listed, option)
    return [] if listed is None else [name for name in split_names(listed, ",") if name]


def numbers_in(listed: str, option: str, example: str, *, least: int = 0) -> list[int]:
    """The whole numbers of a comma-separated option.

    Raises:
        RecipeError: something else is in it, or a number below the least; shows the example.
    """
    numbers = [small_number(each) for each in names_in(listed or None, option)]
    found = [each for each in numbers if each is not None and each >= least]
    if not found or len(found) < len(numbers):
        raise RecipeError(
            f"{option}: expected whole numbers such as {example}, got '{listed[:60]}'."
        )
    return found


def unescape(separator: str) -> str:
    """Read the two escapes that a shell makes hard to type."""
    return separator.replace("\\n", "\n").replace("\\t", "\t")
