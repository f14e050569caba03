"""What a comparison compares, under one protocol."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.presets import PRESETS, find_preset
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import ALL, REPAIR_REGISTRY, find_method
from ghostlayers.repairs.arguments import WithArguments
from ghostlayers.repairs.registry import Registry
from ghostlayers.runtime.documents import Checked, brief, check
from ghostlayers.selection.choices import candidate_spans, find_selection
from ghostlayers.selection.methods import SELECTION_REGISTRY
from ghostlayers.spans import Span
from ghostlayers.text.corpora import BLANK_LINE, one_separator_each

EVERY = "every"
"""In place of a selection: each contiguous span, a cell of its own."""

ITERATIVE = ":iterative"
"""Behind a selection's name: it chooses one layer at a time, on the model repaired so far."""

EACH_CELL_ITS_OWN = "streamline"
"""In the shared recipe, for the sake of a name that asks for nothing; see `cell_recipe`."""

PROMPT = "The capital of France is Paris. The city is known for"


@dataclass(frozen=True)
class Comparison:
    """Every number of layers, times every selection, times every repair.

    Attributes:
        layers: how many decoder layers to remove.
        select: selections by name, with ``:iterative`` behind it to choose one layer at a time;
            ``every`` stands for each contiguous span.
        repair: repairs by name, arguments included; ``all`` stands for `repairs.ALL` as far as
            the model has what they need.
        eval_data: corpora that losses are measured on.
        eval_separators: joins their documents: one for all, or one each.
        max_windows: the first so many windows of each; all if not given.
        tasks: of lm-evaluation-harness.
        tasks_path: folder of local task files.
        limit: documents of each task.
        task_repair: the repairs whose models answer tasks; all if not given.
        prompt: continued by every model; empty for none.
        new_tokens: how far.
        speed: also measure how long each model takes to read a prompt.
        yardstick: also measure Ghost with one layer less removed, which a repair that costs most
            of a layer has to beat.
        eval_length: tokens of an evaluation window; those of the calibration's if not given.
        presets: methods to set side by side instead, each by its own choices (`presets`): how it
            chooses, repairs, and calibrates. Selections and repairs then mean nothing.
        given: fields of a recipe that every preset takes from the caller instead.
        calibration: text, windows and damping, shared by all cells.
    """

    layers: tuple[int, ...]
    select: tuple[str, ...] = ("streamline", "recoverable")
    repair: tuple[str, ...] = ("none", "linearpatch-diag", "replaceme", "refit:3", "ghost")
    eval_data: tuple[str, ...] = ()
    eval_separators: tuple[str, ...] = (BLANK_LINE,)
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    tasks_path: str | None = None
    limit: int | None = None
    task_repair: tuple[str, ...] = ()
    prompt: str = PROMPT
    new_tokens: int = 24
    speed: bool = True
    yardstick: bool = True
    eval_length: int | None = None
    presets: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    calibration: Recipe = field(default_factory=lambda: Recipe(select=EACH_CELL_ITS_OWN))

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
            find_method(name)
        self._check_tasks()
        for name in set(self.select) - {EVERY}:
            self.cell_recipe(self.layers[0], name)  # refuses an unknown one
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
            find_method(name)
            if name not in self.repair_names():
                raise RecipeError(
                    f"'task_repair' names '{name}', which is not among the repairs compared: "
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
        names = [each for name in self.repair for each in (ALL if name == "all" else (name,))]
        return tuple(dict.fromkeys(names))

    def named(self, repair: str) -> bool:
        """Whether the caller asked for this repair by name, and not by ``all``."""
        return repair in self.repair

    def cell_recipe(self, layers: int, select: str) -> Recipe:
        """The recipe that chooses the layers of a cell."""
        alone = not select.endswith(ITERATIVE)
        name = select if alone else select.removesuffix(ITERATIVE)
        iterative = self.calibration.iterative or not alone
        repair = self.calibration.repair
        if iterative and find_selection(name).scores_only_weights:
            moves = [each for each in self.repair_names() if find_method(each).writes_weights]
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
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """From plain values; fields of the calibration recipe may stand beside the others.

        Raises:
            RecipeError: an unknown key; the message names near ones.
        """
        check(values.get("calibration", {}), dict[str, Any], "'calibration'", RecipeError)
        own = {each.name for each in dataclasses.fields(cls)} - {"calibration"}
        shared = {each.name for each in dataclasses.fields(Recipe)} - own - {"remove"}
        mine: dict[str, Any] = {}
        recipe: dict[str, Any] = dict(values.get("calibration", {}))
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
        check(
            {key: each for key, each in mine.items() if each is not None}, _Shape, WHAT, RecipeError
        )
        for key in ("layers", "remove", "repair"):
            recipe.pop(key, None)
        if mine.get("presets"):
            if recipe.get("preset") is not None:
                raise RecipeError("'preset' and 'presets' mean different things; give one of them.")
            plain = {each.name: each.default for each in dataclasses.fields(cls)}
            if any(mine.get(key, plain[key]) != plain[key] for key in ("select", "repair")):
                raise RecipeError(
                    "'presets' choose and repair by themselves; drop 'select'/'repair'."
                )
            names = PRESETS if mine["presets"] == ("all",) else mine["presets"]
            mine["presets"] = tuple(dict.fromkeys(find_preset(name).name for name in names))
            mine.setdefault("given", {k: v for k, v in recipe.items() if k != "preset"})
        recipe["select"] = EACH_CELL_ITS_OWN
        if recipe.get("preset") is not None:  # its text and fit, not how it chooses
            recipe = {"iterative": False, "refit": "all", **recipe}
        return cls(**mine, calibration=Recipe.from_dict(recipe))


Number = Annotated[int, Field(ge=0, le=10**9)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=10_000, pattern=r"^[^\x00]*$")]
WHAT = "the comparison"


class _Shape(Checked):
    """Of a request's own keys."""

    layers: tuple[Number, ...]
    select: tuple[Word, ...] = ()
    repair: tuple[Word, ...] = ()
    eval_data: tuple[Word, ...] = ()
    eval_separators: tuple[str, ...] = ()
    max_windows: Number | None = None
    tasks: tuple[Word, ...] = ()
    tasks_path: Word | None = None
    limit: Number | None = None
    task_repair: tuple[Word, ...] = ()
    prompt: str = ""
    new_tokens: Number = 1
    speed: bool = True
    yardstick: bool = True
    eval_length: Number | None = None
    presets: tuple[Word, ...] = ()
    given: dict[str, Any] = Field(default_factory=dict)


LISTS = frozenset(
    {
        *("layers", "select", "repair", "eval_data", "eval_separators"),
        *("tasks", "task_repair", "presets"),
    }
)


METHODS_IN: Mapping[str, Registry[Any]] = {
    "select": SELECTION_REGISTRY,
    "repair": REPAIR_REGISTRY,
    "task_repair": REPAIR_REGISTRY,
}
"""Keys that take objects, too, whose text the request holds."""


def _tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, int, WithArguments)):
        return (value,)
    if isinstance(value, Sequence):
        return tuple(value)
    raise RecipeError(f"expected a list, got {brief(value)}.")
