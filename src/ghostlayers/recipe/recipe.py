"""What to do: `Recipe`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ghostlayers.presets import PRESETS, find_preset
from ghostlayers.recipe import checks
from ghostlayers.recipe.wish import AT, CONTEXT, FLOATS, PACKED, Wish, check_wish, wish_of
from ghostlayers.repairs import METHODS, REPAIR_REGISTRY, RepairMethod, find_method
from ghostlayers.repairs.auto import AUTO, STAND_IN, STOCK_STAND_IN
from ghostlayers.runtime.settings import BUDGET, FIT, TEXT, WHAT, documented, setting, write_numbers
from ghostlayers.selection.choices import Selection, find_selection, parse_keep
from ghostlayers.selection.cosine import CosineAxis
from ghostlayers.selection.methods import SELECTION_REGISTRY, SELECTIONS
from ghostlayers.spans import parse_layers
from ghostlayers.text.tokens import BosPolicy, Sampling

Inputs = Literal["repaired", "original"]
Refit = Literal["all", "none"]
Export = Literal["auto", "fold", "stock-layer", "custom"]
Engine = Literal["any", "transformers", "vllm", "llama.cpp"]
Quantized = Literal["keep", "expand"]
Save = Literal["checkpoint", "adapter"]
Speed = Literal["decode", "prefill"]
TokenWeight = Literal["auto", "uniform", "balanced", "relative"]


CHOOSING = frozenset(
    {"select", "iterative", "refit", "keep_layers", "cosine_axis", "search_windows"}
)
"""Fields that say how layers are chosen."""

RACE_BUDGET = 4
RACE_WINDOWS = 32
"""Held-out windows that a race may use: so many times those of the losses, and at least so many.

Eight still take the wrong one of two close spans, 0.2 nats apart on other text
(``benchmarks/regret.py``); most candidates leave after the first four."""


OVERHEAD = "2%"
"""A matrix of hidden x hidden is 0.2 to 0.5 % of the layers that stay, a decoder layer 3 to 8 %."""

PAPER = PRESETS["ghosted"].choices
"""What the paper chooses."""


@documented
@dataclass(frozen=True)
class Recipe:
    """What is removed, how it is repaired, and on what text.

    ``select`` and ``repair`` are given as text or as objects; `selection` and `method` are the
    objects, and what the fields themselves hold is the text.
    """

    layers: int | None = setting(None, "How many decoder layers to remove.", WHAT, short="-n")
    remove: str | None = setting(
        None,
        "Which layers to remove instead, counted from 0, ends included: 10-12,14.",
        WHAT,
        number=True,
    )
    smaller: str | None = setting(
        None,
        "As few layers as make the model's bytes so much less, the repair counted: 20%.",
        BUDGET,
        metavar="SHARE",
    )
    faster: str | None = setting(
        None,
        "As few layers as make it so many times as fast on this machine, the repair counted: "
        "1.25x. Measured as --at and --speed say.",
        BUDGET,
        metavar="FACTOR",
    )
    at: str | None = setting(
        None,
        "Of --faster: sequences at a time, and tokens of each prompt.",
        BUDGET,
        metavar="BATCHxLENGTH",
        says=AT,
    )
    speed: Speed | None = setting(
        None,
        "Of --faster: 'decode', writing one token after another, or 'prefill', reading a prompt.",
        BUDGET,
        says="decode",
    )
    fits: str | None = setting(
        None,
        "As few layers as make weights, repair, caches of one sequence and the room to compute "
        "in fit into so much memory: 6GiB.",
        BUDGET,
        metavar="SIZE",
    )
    context: int | None = setting(
        None,
        "Of --fits: tokens in the caches.",
        BUDGET,
        least=1,
        says=f"{CONTEXT}, or the model's positions where these are fewer",
    )
    as_type: str | None = setting(
        None,
        f"Of --fits: the type of the weights, {', '.join((*FLOATS, *PACKED))}.",
        BUDGET,
        option="--as",
        metavar="TYPE",
        says="as the result is stored",
    )
    max_loss: float | None = setting(
        None,
        "As many layers as keep the repaired model within so many nats a token of the dense one, "
        "on held-out windows: 0.1.",
        BUDGET,
        metavar="NATS",
    )
    select: str | Selection = setting(
        "recoverable",
        f"How to choose them: {', '.join(SELECTIONS)}.",
        WHAT,
        metavar="NAME",
        read="name",
        paper=PAPER.get("select"),
    )
    iterative: bool = setting(
        False,
        "Choose one layer at a time, each on the model that is repaired so far.",
        WHAT,
        says="off",
        off="--no-iterative",
    )
    refit: Refit = setting(
        "all",
        "What --iterative does with its repairs: 'all' fits every gap anew after each layer, "
        "'none' fits one repair across each layer that goes and leaves it alone, as Prune&Comp "
        "does.",
        WHAT,
    )
    repair: str | RepairMethod = setting(
        "ghost",
        f"How to repair each gap: {', '.join(METHODS)}; or 'auto', the one that loses least on "
        "held-out windows of those that --for and --overhead allow.",
        WHAT,
        metavar="NAME",
        read="name",
        paper=PAPER.get("repair"),
    )
    engine: Engine = setting(
        "any",
        "What must load the result: 'transformers' or 'vllm', which run operators too, or "
        "'llama.cpp', for which a repair has to fold. Without --repair, --repair auto.",
        WHAT,
        option="--for",
        metavar="ENGINE",
        says="anything",
    )
    overhead: str | None = setting(
        None,
        "For --repair auto: what a repair may cost at run time, as a share of the arithmetic of "
        "the layers that stay.",
        WHAT,
        metavar="SHARE",
        says=OVERHEAD,
    )
    data: str | None = setting(
        None,
        "Calibration text: a .txt, .jsonl, .csv or .parquet file, a folder or a pattern of them, "
        "or text on the Hugging Face hub: c4, wikitext2, or name:config:split. Required, unless a "
        "preset names one.",
        TEXT,
        short="-d",
    )
    text_column: str | None = setting(
        None,
        "Column that holds the text.",
        TEXT,
        says="text, else a chat, else the only column of strings that are no identifiers",
    )
    separator: str = setting(
        "\n\n", r"Joins documents; \n is a line break.", TEXT, says="a blank line", read="separator"
    )
    sampling: Sampling = setting(
        "grid",
        "Where windows are drawn from: a 'grid' over the joined documents, 'random' offsets in "
        "them, or each from a 'single-document'.",
        TEXT,
        paper=PAPER.get("sampling"),
    )
    windows: int = setting(128, "Windows for the scores.", TEXT)
    fit_windows: int | None = setting(
        None,
        "Windows that the repair is fitted on.",
        TEXT,
        says="32",
        paper=PAPER.get("fit_windows"),
    )
    search_windows: int | None = setting(
        None,
        "Windows that perplexity, taylor and recoverable:greedy measure on.",
        TEXT,
        says="8",
        paper=PAPER.get("search_windows"),
    )
    held_out_windows: int | None = setting(
        None,
        "Further windows that losses are measured on; 0 measures none.",
        TEXT,
        says="one for every sixteen windows, at least 4",
    )
    race_windows: int | None = setting(
        None,
        "Held-out windows that 'recoverable' and '--repair auto' may measure their candidates on "
        "in all, as far as the text goes, before the lowest loss wins.",
        TEXT,
        says="four times --held-out-windows, at least 32",
    )
    sequence_length: int = setting(
        2048, "Tokens a window.", TEXT, paper=PAPER.get("sequence_length")
    )
    bos: BosPolicy = setting(
        "auto", "BOS before each window; 'auto' asks the tokenizer.", TEXT, paper=PAPER.get("bos")
    )
    seed: int = setting(0, "Chooses the windows.", TEXT, paper=PAPER.get("seed"))
    cosine_axis: CosineAxis = setting(
        "hidden",
        "Axis of the cosine; 'tokens' is what the released code computes.",
        WHAT,
        paper=PAPER.get("cosine_axis"),
    )
    keep_layers: str | None = setting(
        None,
        "Layers at the start and at the end that are never removed: first:4,last:2.",
        WHAT,
        metavar="EDGES",
        says="what the selection's paper protects",
        paper=PAPER.get("keep_layers"),
    )
    inputs: Inputs = setting(
        "repaired", "The stream that later gaps are fitted on.", FIT, paper=PAPER.get("inputs")
    )
    token_weight: TokenWeight = setting(
        "auto",
        "How much each token counts: 'relative' 1/||y||^2, 'balanced' 1/||y||; 'auto' is 'uniform' "
        "for replaceme, as published, else 'balanced'.",
        FIT,
        paper=PAPER.get("token_weight"),
    )
    ridge: float = setting(
        1e-6, "Relative ridge, on equilibrated columns.", FIT, paper=PAPER.get("ridge")
    )
    absolute_ridge: float = setting(
        0.0, "Ridge added to the Gram matrix as it is.", FIT, paper=PAPER.get("absolute_ridge")
    )
    export: Export = setting(
        "auto",
        "How the checkpoint holds the repair: 'fold' into existing weights (any engine loads it), "
        "'stock-layer' as one more decoder layer (any engine; repair normed), 'custom' with its "
        "own code. 'auto' is fold where the repair folds, else custom.",
        FIT,
    )
    quantized: Quantized = setting(
        "keep",
        "What a quantised model (gptq, awq, compressed-tensors, bitsandbytes, fp8, mxfp4) becomes: "
        "'keep' copies the packed weights of whatever a repair leaves alone, and writes the rest "
        "in 16 bits; 'expand' writes plain weights alone.",
        WHAT,
    )
    preset: str | None = setting(
        None,
        f"Makes every choice as a method's authors and their code do: {', '.join(PRESETS)} "
        "('ghostlayers methods' tells more; 'ghosted:' below says what that one sets). Options "
        "given explicitly still win.",
        WHAT,
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        write_numbers(self)
        object.__setattr__(self, "select", SELECTION_REGISTRY.text_of(self.select))
        object.__setattr__(self, "repair", REPAIR_REGISTRY.text_of(self.repair))
        if isinstance(self.as_type, str):  # Q4_K_M and q4_k_m are one type
            object.__setattr__(self, "as_type", self.as_type.lower())
        checks.check(self)
        check_wish(self)

    @property
    def wish(self) -> Wish | None:
        """The budget from which the number of layers follows, if there is one."""
        return wish_of(self)

    @property
    def selection(self) -> Selection:
        """How the layers are chosen."""
        return find_selection(self.select)

    @property
    def method(self) -> RepairMethod:
        """How each gap is repaired; before ``auto`` has chosen, by what layers are."""
        if not self.contested:
            return find_method(self.repair)
        folds = self.engine == "llama.cpp" or self.export == "fold"
        return find_method(STOCK_STAND_IN if folds else STAND_IN)

    @property
    def contested(self) -> bool:
        """Whether held-out windows choose the repair."""
        return self.repair == AUTO

    @property
    def most_overhead(self) -> float:
        """What a repair may cost at run time, as a share of the layers that stay."""
        return checks.read_share("overhead", self.overhead or OVERHEAD)

    def repaired_by(self, name: str) -> "Recipe":
        """The same with a repair that was chosen."""
        return dataclasses.replace(self, repair=name, overhead=None)

    @property
    def num_calibration_windows(self) -> int:
        """Windows that are scored, fitted or searched on, which all begin with the first."""
        return max(self.windows, self.num_fit_windows, self.num_search_windows)

    @property
    def num_fit_windows(self) -> int:
        """Windows that the repair is fitted on."""
        return min(32, self.windows) if self.fit_windows is None else self.fit_windows

    @property
    def num_search_windows(self) -> int:
        """Calibration windows that searches measure losses and gradients on."""
        return min(8, self.windows) if self.search_windows is None else self.search_windows

    @property
    def num_held_out_windows(self) -> int:
        """Windows that losses are measured on: more where a budget is settled on them."""
        if self.held_out_windows is not None:
            return self.held_out_windows
        usual = max(4, self.windows // 16)
        return usual if self.max_loss is None else max(RACE_WINDOWS, RACE_BUDGET * usual)

    @property
    def num_race_windows(self) -> int:
        """Held-out windows that candidates may be measured on, those of the losses included."""
        chooses = self.remove is None and "held-out losses" in self.selection.needs
        if self.race_windows is not None and (chooses or self.contested or self.remove is not None):
            return max(self.race_windows, self.num_held_out_windows)
        if self.max_loss is not None or not (chooses or self.contested):  # a loss decides with them
            return self.num_held_out_windows
        return max(RACE_WINDOWS, RACE_BUDGET * self.num_held_out_windows)

    @property
    def kept_edges(self) -> tuple[int, int] | None:
        """Layers at the start and at the end that are never removed; None for the method's own."""
        return None if self.keep_layers is None else parse_keep(self.keep_layers)

    def removed(self) -> list[int] | None:
        """The layers named by the caller, if any."""
        return None if self.remove is None else parse_layers(self.remove)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from a mapping such as a YAML file's; a ``preset`` fills in what is not given.

        Raises:
            RecipeError: an unknown key or preset; the message names near ones.
        """
        if values.get("preset") is not None:
            preset = find_preset(values["preset"])
            chosen = dict(preset.choices)
            if values.get("remove") is not None or values.get("iterative") is False:
                for key in ("iterative", "refit"):
                    chosen.pop(key, None)
            if values.get("remove") is not None:  # nothing is chosen
                chosen = {key: value for key, value in chosen.items() if key not in CHOOSING}
            values = {**chosen, **values, "preset": preset.name}
        checks.check_keys(cls, values, "in a recipe")
        asked = values.get("overhead") is not None or values.get("engine", "any") != "any"
        if asked and "repair" not in values:
            values = {**values, "repair": AUTO}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dataclasses.asdict(self)
