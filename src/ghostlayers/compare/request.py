"""What a comparison compares, under one protocol."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from ghostlayers.checkpoint.quantise import types_named
from ghostlayers.compare.auto import method_named
from ghostlayers.errors import RecipeError, suggest
from ghostlayers.evaluation.request import TASKS, TaskRequest
from ghostlayers.evaluation.written import CONTINUATIONS
from ghostlayers.presets import PRESETS, find_preset
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.healing_amounts import read_budget
from ghostlayers.repairs import ALL, REPAIR_REGISTRY
from ghostlayers.repairs.arguments import WithArguments
from ghostlayers.repairs.registry import Registry
from ghostlayers.runtime.documents import brief, check, shape_of
from ghostlayers.runtime.settings import documented, required, same_as, setting
from ghostlayers.selection.choices import candidate_spans, find_selection
from ghostlayers.selection.methods import SELECTION_REGISTRY
from ghostlayers.spans import Span
from ghostlayers.text.corpora import BLANK_LINE, one_separator_each

EVERY = "every"
"""In place of a selection: each contiguous span, a choice of its own."""

ITERATIVE = ":iterative"
"""Behind a selection's name: it chooses one layer at a time, on the model repaired so far."""

EACH_ITS_OWN = "streamline"
"""In the shared recipe, for the sake of a name that asks for nothing; see `recipe_for`."""

PROMPT = "The capital of France is Paris. The city is known for"


Number = Annotated[int, Field(ge=0, le=10**9)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=10_000, pattern=r"^[^\x00]*$")]

_WHAT = "What to compare"
_TEXT = "Evaluation"
FILES = "GGUF files"


@documented
@dataclass(frozen=True)
class Comparison:
    """Every number of layers, times every selection, times every repair.

    Beside what can be asked for: ``new_tokens``, how far every model continues the prompt;
    ``given``, fields of a recipe that every preset takes from the caller instead; ``calibration``,
    the text, windows and damping that all models share. ``every`` among the selections stands for
    each contiguous span, ``all`` among the repairs for `repairs.ALL` as far as the model has what
    they need.
    """

    layers: tuple[Number, ...] = required(
        "How many decoder layers to remove: 3,5,7.", _WHAT, short="-n", read="numbers"
    )
    select: tuple[Word, ...] = setting(
        ("streamline", "recoverable"),
        "Selections, comma-separated; ':iterative' behind a name chooses one layer at a time, "
        "'every' takes each contiguous span.",
        _WHAT,
        metavar="NAMES",
        read="names",
        says="streamline,recoverable",
    )
    repair: tuple[Word, ...] = setting(
        ("none", "linearpatch-diag", "replaceme", "refit:3", "ghost"),
        "Repairs, comma-separated, arguments behind colons: ghost,joint:x+z,piecewise:8; 'all' for "
        "every one that the model has what it needs for; 'auto' and 'auto:llama.cpp' for the one "
        "that held-out windows choose on each cut.",
        _WHAT,
        metavar="NAMES",
        read="names",
        says="none,linearpatch-diag,replaceme,refit:3,ghost",
    )
    eval_data: tuple[Word, ...] = setting(
        (),
        "Corpora, comma-separated: c4, wikitext2 (from the hub), or files.",
        _TEXT,
        read="corpora or none",
    )
    eval_separators: tuple[str, ...] = setting(
        (BLANK_LINE,),
        "Joins the documents of each; once for all corpora, or once for each in order.",
        _TEXT,
        option="--eval-separator",
        read="separators",
        says="a blank line",
    )
    max_windows: Number | None = setting(
        None, "Evaluate the first so many windows of each corpus.", _TEXT, least=1, says="all"
    )
    tasks: tuple[Word, ...] = same_as(TaskRequest, "tasks", read="names or none")
    tasks_path: Word | None = same_as(TaskRequest, "tasks_path")
    trust_tasks: bool = same_as(TaskRequest, "trust_tasks")
    limit: Number | None = same_as(TaskRequest, "limit")
    task_repair: tuple[Word, ...] = setting(
        (),
        "Repairs whose models answer the tasks, comma-separated.",
        TASKS,
        metavar="NAMES",
        read="names or none",
        says="all",
    )
    prompt: str = setting(PROMPT, "Continued by every model; '' for none.", _TEXT, says="")
    new_tokens: Number = 24
    continuations: Number = setting(
        CONTINUATIONS // 2,
        "Have every model continue so many stretches of the texts, and measure what it writes; 0 "
        "for none.",
        _TEXT,
        least=0,
    )
    speed: bool = setting(
        True, "Measure the time to read a prompt.", _TEXT, off="--no-speed", says="on"
    )
    yardstick: bool = setting(
        True,
        "Also measure Ghost with one layer less removed.",
        _WHAT,
        off="--no-yardstick",
        says="on",
    )
    eval_length: Number | None = setting(
        None, "Tokens of an evaluation window.", _TEXT, least=2, says="--sequence-length, or 2048"
    )
    types: tuple[Word, ...] = setting(
        (),
        "Also measure the dense and every stock model as GGUF files of these types, as "
        "llama-quantize names them: f16,q8_0,q6_k,q5_k_m,q4_k_m.",
        FILES,
        metavar="NAMES",
        read="names",
    )
    engine: Literal["llama.cpp"] = setting(
        "llama.cpp",
        "What reads those files: 'llama.cpp', through llama-cpp-python.",
        FILES,
        metavar="NAME",
    )
    heal: Word | None = setting(
        None,
        "Also train the model of every repair that can be saved, each for this budget: 2min, or "
        "100k tokens ('ghostlayers heal').",
        _WHAT,
        metavar="BUDGET",
    )
    heal_repair: tuple[Word, ...] = setting(
        (),
        "Repairs whose models are trained, comma-separated.",
        _WHAT,
        metavar="NAMES",
        read="names or none",
        says="all",
    )
    presets: tuple[Word, ...] = setting(
        (),
        "Instead of selections and repairs: published methods, comma-separated, or 'all', each by "
        "its own choices ('ghostlayers methods'). Options given here win over every method's.",
        _WHAT,
        metavar="NAMES",
        read="names",
    )
    given: Mapping[str, Any] = field(default_factory=dict)
    calibration: Recipe = field(default_factory=lambda: Recipe(select=EACH_ITS_OWN))

    def __post_init__(self) -> None:
        for key, registry in METHODS_IN.items():
            object.__setattr__(self, key, tuple(map(registry.text_of, getattr(self, key))))
        if not self.layers or any(count < 1 for count in self.layers):
            raise RecipeError("'layers' must name at least one number of layers, each at least 1.")
        for name in self.presets:
            self.preset_recipe(name, self.layers[0])
        if not self.select or not self.repair:
            raise RecipeError("name at least one selection and one repair.")
        for name in self.repair_names():
            method_named(name)
        self._check_tasks()
        self._check_healing()
        for name in self.selections:
            self.recipe_for(self.layers[0], name)  # refuses an unknown one
        if self.calibration.num_held_out_windows < 1:
            raise RecipeError(
                "'held_out_windows' must be at least 1: a comparison measures on them whether a "
                "repair is worse than none."
            )
        if self.max_windows is not None and self.max_windows < 1:
            raise RecipeError(f"'max_windows' must be at least 1, got {self.max_windows}.")
        if self.new_tokens < 1:
            raise RecipeError(f"'new_tokens' must be at least 1, got {self.new_tokens}.")
        if not self.eval_data and not self.tasks:
            raise RecipeError(
                "nothing to evaluate on: give --eval-data corpora or files, or --tasks."
            )
        one_separator_each(self.eval_separators, len(self.eval_data))
        object.__setattr__(self, "types", types_named(self.types))

    def _check_tasks(self) -> None:
        asked = {
            "tasks_path": self.tasks_path,
            "limit": self.limit,
            "task_repair": self.task_repair,
        }
        idle = [name for name, value in asked.items() if value]
        if idle and not self.tasks:
            raise RecipeError(f"'{', '.join(idle)}' mean nothing without 'tasks'.")
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"'limit' must be at least 1, got {self.limit}.")
        for name in self.task_repair:
            method_named(name)
            if name not in self.repair_names():
                raise RecipeError(
                    f"'task_repair' names '{name}', which is not among the repairs compared: "
                    f"{', '.join(self.repair_names())}."
                )

    def _check_healing(self) -> None:
        if self.heal is not None:
            read_budget(self.heal)
        elif self.heal_repair:
            raise RecipeError("'heal_repair' means nothing without 'heal'.")
        for name in self.heal_repair:
            if name not in self.repair_names():
                raise RecipeError(
                    f"'heal_repair' names '{name}', which is not among the repairs compared: "
                    f"{', '.join(self.repair_names())}."
                )

    @property
    def window_length(self) -> int:
        """Tokens of an evaluation window."""
        return self.eval_length or self.calibration.sequence_length

    def preset_recipe(self, name: str, layers: int) -> Recipe:
        """Every choice of a method, but for those that the caller has made."""
        return Recipe.from_dict({**self.given, "preset": name, "layers": layers, "remove": None})

    @property
    def yardsticks(self) -> tuple[int, ...]:
        """One layer less than asked for, where that is not asked for itself."""
        if not self.yardstick or self.presets:
            return ()
        return tuple(sorted({count - 1 for count in self.layers if count > 1} - set(self.layers)))

    def every_span(self, num_layers: int, layers: int) -> list[Span]:
        """The cuts that ``every`` stands for: each contiguous span of so many layers that may go.

        Raises:
            SpanError: there is none.
        """
        return candidate_spans(num_layers, layers, self.calibration.kept_edges)

    def repair_names(self) -> tuple[str, ...]:
        """The repairs, ``all`` spelled out, each once."""
        names = [repair for name in self.repair for repair in (ALL if name == "all" else (name,))]
        return tuple(dict.fromkeys(names))

    def named(self, repair: str) -> bool:
        """Whether the caller asked for this repair by name, and not by ``all``."""
        return repair in self.repair

    @property
    def selections(self) -> tuple[str, ...]:
        """The selections among what chooses layers: all but ``every``."""
        return tuple(select for select in self.select if select != EVERY)

    def recipe_for(self, layers: int, select: str) -> Recipe:
        """The recipe by which a selection chooses so many layers."""
        alone = not select.endswith(ITERATIVE)
        name = select if alone else select.removesuffix(ITERATIVE)
        iterative = self.calibration.iterative or not alone
        repair = self.calibration.repair
        if iterative and find_selection(name).scores_only_weights:
            moves = [
                repair for repair in self.repair_names() if method_named(repair).writes_weights
            ]
            repair = next(iter(moves), repair)
        return dataclasses.replace(
            self.calibration,
            layers=layers,
            remove=None,
            select=name,
            iterative=iterative,
            repair=repair,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; who may run code is no part of what is measured, and not among them."""
        values = dataclasses.asdict(self)
        del values["trust_tasks"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """From plain values; fields of the calibration recipe may stand beside the others.

        Raises:
            RecipeError: an unknown key; the message names near ones.
        """
        mine, recipe = _parted(values)
        said = {key: value for key, value in mine.items() if value is not None}
        check(said, shape_of(cls, "calibration"), WHAT, RecipeError)
        for key in ("layers", "remove", "repair"):
            recipe.pop(key, None)
        if mine.get("presets"):
            _check_no_choices(mine, recipe)
            names = PRESETS if mine["presets"] == ("all",) else mine["presets"]
            mine["presets"] = tuple(dict.fromkeys(find_preset(name).name for name in names))
            mine.setdefault("given", {k: v for k, v in recipe.items() if k != "preset"})
        recipe["select"] = EACH_ITS_OWN
        if recipe.get("preset") is not None:  # its text and fit, not how it chooses
            recipe = {"iterative": False, "refit": "all", **recipe}
        return cls(**mine, calibration=Recipe.from_dict(recipe))


def _parted(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A comparison's own fields, and those of the recipe that all models share."""
    recipe = dict(
        check(values.get("calibration", {}), dict[str, Any], "'calibration'", RecipeError)
    )
    own = {member.name for member in dataclasses.fields(Comparison)} - {"calibration"}
    shared = {member.name for member in dataclasses.fields(Recipe)} - own - {"remove", "overhead"}
    mine: dict[str, Any] = {}
    for key, value in values.items():
        if key in own:
            mine[key] = _tuple(value) if key in LISTS else value
            if key in METHODS_IN:
                mine[key] = tuple(map(METHODS_IN[key].text_of, mine[key]))
        elif key in shared:
            recipe[key] = value
        elif key != "calibration":
            raise RecipeError(
                f"unknown key '{key}' in a comparison. {suggest(str(key), own | shared)}"
            )
    return mine, recipe


def _check_no_choices(mine: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Refuse choices beside methods that are compared by their own."""
    if recipe.get("preset") is not None:
        raise RecipeError("'preset' and 'presets' mean different things; give one of them.")
    plain = {member.name: member.default for member in dataclasses.fields(Comparison)}
    if any(mine.get(key, plain[key]) != plain[key] for key in ("select", "repair")):
        raise RecipeError("'presets' choose and repair by themselves; drop 'select'/'repair'.")


WHAT = "the comparison"

LISTS = frozenset(
    {
        *("layers", "select", "repair", "eval_data", "eval_separators"),
        *("tasks", "task_repair", "presets", "types"),
        *("heal_repair",),
    }
)


METHODS_IN: Mapping[str, Registry[Any]] = {
    "select": SELECTION_REGISTRY,
    "repair": REPAIR_REGISTRY,
    "task_repair": REPAIR_REGISTRY,
    "heal_repair": REPAIR_REGISTRY,
}
"""Keys that take objects, too, whose text the request holds."""


def _tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, int, WithArguments)):
        return (value,)
    if isinstance(value, Sequence):
        return tuple(value)
    raise RecipeError(f"expected a list, got {brief(value)}.")
