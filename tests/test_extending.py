"""Repairs and selections of others: as objects, and by name from a package's entry point."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ghostlayers
from ghostlayers import repairs
from ghostlayers.cli import app
from ghostlayers.compare import Comparison, compare
from ghostlayers.errors import RecipeError, SpanError
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import METHODS, Ghost, Joint, Refit, RepairMethod, find_method
from ghostlayers.repairs.arguments import WithArguments, arguments_of
from ghostlayers.selection.methods import (
    SELECTIONS,
    Lorp,
    Recoverable,
    Selection,
    find_selection,
)
from ghostlayers.spans import Span

EXAMPLE = Path(__file__).parents[1] / "examples" / "your_own_repair.py"
SELECTION = '''
from dataclasses import dataclass
from ghostlayers.selection.methods import Selection
from ghostlayers.spans import Span

@dataclass(frozen=True)
class Last(Selection):
    """The last layers but some."""
    keyword = "last"
    needs = ("streams",)
    contiguous = True
    skip: int = 1
    def choose(self, table, layers, count):
        return (Span(table.num_layers - self.skip - count, table.num_layers - self.skip),)
'''
QUICK = {"windows": 8, "held_out_windows": 2, "sequence_length": 64}


def install(site: Path, package: str, modules: dict[str, str], groups: str) -> None:
    """A package as pip leaves it: its modules, and a folder that says what they are."""
    for name, code in modules.items():
        (site / f"{name}.py").write_text(code)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(groups)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, two of them sound."""
    found = tmp_path / "site"
    found.mkdir()
    modules = {"your_own_repair": EXAMPLE.read_text(), "your_own_selection": SELECTION}
    install(
        *(found, "own_methods", modules),
        "[ghostlayers.repairs]\nchannels = your_own_repair:Channels\n"
        "[ghostlayers.selections]\nlast = your_own_selection:Last\n",
    )
    monkeypatch.syspath_prepend(str(found))
    return found


@pytest.fixture
def text(tmp_path: Path, some_text: list[str]) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in some_text))
    return str(path)


def call(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


# Text and back


def objects(cls: type[WithArguments]) -> st.SearchStrategy[WithArguments]:
    """Objects of a class with any values that its arguments may have."""
    kinds: dict[Any, Any] = {
        bool: st.booleans(),
        int: st.integers(1, 4096),
        float: st.floats(0.0, allow_infinity=False, allow_nan=False),
        str: st.sets(st.sampled_from(sorted(repairs.base.FEATURES)), min_size=1).map("+".join),
        None: st.nothing(),
    }

    @st.composite
    def made(draw: st.DrawFn) -> WithArguments:
        values = {
            each.name: draw(
                st.just(each.default)
                | kinds[each.kind]
                | (st.sampled_from(each.words) if each.words else st.nothing())
            )
            for each in arguments_of(cls)
        }
        try:
            return cls(**values)
        except RecipeError:  # two that contradict each other
            return cls()

    return made()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", [*METHODS, *(f"--select {each}" for each in SELECTIONS)])
def test_text_leads_back_to_the_object(name: str, data: Any) -> None:
    select = name.removeprefix("--select ")
    cls = METHODS[name] if select == name else type(SELECTIONS[select])
    made = data.draw(objects(cls))
    find: Any = find_method if select == name else find_selection
    assert find(str(made)) == made
    assert str(find(str(made))) == str(made)
    assert find(made) is made


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("ghost:rank=3:affine", Ghost(affine=True, rank=3)),
        ("ghost:per=gap:ridge=1e-8", Ghost(ridge=1e-8)),
        ("joint", Joint("x+z")),
        ("joint: z + x :refit=2", Joint("x+z", refit=2)),
        ("refit", Refit(1)),
        ("piecewise:z:4:prior=auto", repairs.Piecewise(4, prior="auto", z=True)),
        ("replaceme:cosine:accurate", repairs.ReplaceMe("cosine", accurate=True)),
        ("lorp:k=3", Lorp(k=3)),
    ],
)
def test_what_a_text_means(text: str, same: WithArguments) -> None:
    find: Any = find_selection if isinstance(same, Selection) else find_method
    assert find(text) == same


@pytest.mark.parametrize("repair", [Ghost(rank=3), "ghost:rank=3"])
def test_a_recipe_takes_objects_and_texts_and_gives_both(repair: Any) -> None:
    recipe = Recipe(layers=2, repair=repair, select=Lorp(k=3))
    assert (recipe.repair, recipe.method) == ("ghost:rank=3", Ghost(rank=3))
    assert (recipe.select, recipe.selection) == ("lorp:k=3", Lorp(k=3))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ghost(rank=0), "'ghost:rank=0': rank must be a whole number from 1 to 100,000"),
        (lambda: Ghost(rank=True), "rank must be a whole number"),
        (lambda: Ghost(ridge="aut"), r"ridge must be auto or a number >= 0 \(and finite\)"),
        (lambda: Joint("x+q"), "'joint:x.q': unknown feature 'q'"),
        (lambda: Joint("x:z"), "terms must be text without ':' and '='"),
        (lambda: repairs.ReplaceMe("cosine", ridge=1.0), "cosine solves nothing, and takes no"),
        (lambda: repairs.ReplaceMe(accurate=True), "accurate is for the objective cosine alone"),
        (lambda: find_method(3), "a repair must be a name or an object of a RepairMethod, got 3"),
    ],
)
def test_objects_are_refused_as_their_text_is(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_a_recipe_holds_the_text_of_what_it_is_given() -> None:
    recipe = Recipe(layers=2, repair=Ghost(rank=4), select=Recoverable(greedy=True))
    assert recipe == Recipe(layers=2, repair="ghost:rank=4", select="recoverable:greedy")
    assert type(recipe.repair) is type(recipe.select) is str


# A class in a script


@dataclass(frozen=True)
class Half(RepairMethod):
    """Half of what Ghost does."""

    needs = repairs.Needs()
    part: float = 0.5

    def fit(self, evidence: repairs.Evidence, options: repairs.FitOptions) -> repairs.Repair:
        whole = Ghost().fit(evidence, options)
        assert whole.delta is not None
        return repairs.linear_repair(self.name, evidence, self.part * whole.delta)


@pytest.fixture
def prune(trained_llama: Any, byte_tokenizer: Any, some_text: list[str]) -> Any:
    """Prunes the small model in memory."""
    return partial(
        ghostlayers.prune, trained_llama, tokenizer=byte_tokenizer, data=some_text, **QUICK
    )


def test_a_study_fits_and_builds_by_an_object_of_a_script_s_class(
    tiny_folder: Path, text: str
) -> None:
    study = ghostlayers.Study.open(str(tiny_folder), data=text, fit_windows=4, **QUICK)
    cut = study.choose(remove="2-3")
    fitted = study.fit(cut, [Half(0.25), "ghost"])
    assert [*fitted] == ["Half:part=0.25", "ghost"]
    built = study.build(cut, fitted["Half:part=0.25"])
    assert built.record["recipe"]["repair"] == "Half:part=0.25"


def test_an_object_of_a_script_s_class_prunes_and_is_recorded(prune: Any, tmp_path: Path) -> None:
    pruned, whole = (prune(remove="2-3", repair=each) for each in (Half(0.25), Ghost()))
    (mine,), (theirs,) = pruned.repairs.values(), whole.repairs.values()
    torch.testing.assert_close(mine.delta, 0.25 * theirs.delta)
    pruned.save(tmp_path / "out")
    record = ghostlayers.inspect(tmp_path / "out")
    assert record["recipe"]["repair"] == "Half:part=0.25"
    with pytest.raises(RecipeError, match=r"unknown repair 'Half'.*give an object of it"):
        Recipe.from_dict(record["recipe"])


def test_a_class_of_a_script_may_not_take_the_name_of_another() -> None:
    @dataclass(frozen=True)
    class Mine(Half):
        keyword = "ghost"

    with pytest.raises(RecipeError, match=r"takes the keyword of another .*Ghost.; give it one of"):
        Recipe(repair=Mine())


# A package


@pytest.mark.usefixtures("site")
def test_a_package_s_methods_work_from_the_command_line_and_reload(
    tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--windows", 8, "--held-out-windows", 2, "--sequence-length", 64, "-d", text)
    method = ("--repair", "channels:share=0.5", "--select", "last:skip=2")
    call("prune", tiny_folder, "-o", out, "-n", 2, *options, *method)
    record = ghostlayers.inspect(out)
    assert record["recipe"]["repair"] == "channels:share=0.5"
    assert record["cut"]["removed"] == [2, 3]
    assert record["verification"]["identical"]

    from your_own_repair import Channels

    found = find_method("channels:share=0.5")
    assert found == Channels(share=0.5)
    pruned = ghostlayers.prune(
        str(tiny_folder), layers=2, data=text, repair=found, select="last:skip=2", **QUICK
    )
    assert type(pruned.recipe.repair) is str
    again = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, pruned.model(ids).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("site")
def test_a_package_s_repair_is_compared(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], text: str, tmp_path: Path
) -> None:
    from your_own_repair import Channels

    names = ["none", Channels(), Half(), Ghost()]
    asked = Comparison.from_dict(
        {"layers": 2, "repair": names, "select": ["last:skip=2"], "eval_data": [text],
         "max_windows": 3, "speed": False, "prompt": "", "yardstick": False, **QUICK}
    )  # fmt: skip
    found = compare(trained_llama, asked, tmp_path / "c", tokenizer=byte_tokenizer, data=some_text)
    losses = {each["repair"]: each["loss_nats"] for each in found["cells"]}
    assert set(losses) == {"dense", "none", "channels", "Half", "ghost"}
    assert losses["ghost"] < losses["none"]
    assert losses["dense"] < losses["channels"] != losses["none"]


BROKEN = {
    "absent = no_such_module:Thing": "cannot be loaded (No module named 'no_such_module')",
    "text = your_own_repair:dataclass": "is no RepairMethod",
    "other = your_own_repair:Channels": "has the keyword 'channels': its entry point must be",
    "ghost = your_own_repair:Channels": "'ghost' is a name of Ghostlayers",
}


def test_what_a_package_adds_is_listed_and_what_cannot_be_used_says_why(site: Path) -> None:
    install(site, "broken", {}, "[ghostlayers.repairs]\n" + "\n".join(BROKEN))
    shown = call("methods")
    assert "channels: a repair of own_methods 1.0 A slope and a shift for each channel" in shown
    assert "last: a selection of own_methods 1.0 The last layers but some." in shown
    for line, problem in BROKEN.items():
        name = line.split(" = ")[0]
        assert f"{name}: a repair of broken 1.0 cannot be used: " in shown
        assert problem in shown
        if name != "ghost":
            with pytest.raises(RecipeError, match=f"'{name}' comes from the package broken 1.0"):
                find_method(name)
    assert find_method("ghost") == Ghost()
    with pytest.raises(RecipeError, match=r"unknown repair 'chanels'\. Did you mean 'channels'\?"):
        find_method("chanels")


def test_two_packages_of_one_name_are_refused(site: Path) -> None:
    for package in ("one", "two"):
        install(site, package, {}, "[ghostlayers.repairs]\ntwice = your_own_repair:Channels\n")
    with pytest.raises(RecipeError, match=r"'twice' is in one 1\.0 and two 1\.0; uninstall one"):
        find_method("twice")


def test_a_package_is_asked_only_for_what_is_not_ours(site: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(repairs.registry, "entry_points", lambda **_: pytest.fail("asked"))
    for name in repairs.ALL:
        find_method(name)


def test_a_selection_of_a_script_is_used(prune: Any) -> None:
    @dataclass(frozen=True)
    class Second(Selection):
        """The layers from the second on."""

        needs = ("streams",)

        def choose(self, table: Any, layers: Any, count: int) -> tuple[Span, ...]:
            return (Span(layers[1], layers[1] + count),)

    pruned = prune(select=Second(), layers=2)
    assert pruned.spans == (Span(1, 3),)
    assert pruned.record["recipe"]["select"] == "Second"
    chosen = prune(select=Second(), layers=2, iterative=True)
    assert [step.layer for step in chosen.table.steps] == [1, 2]


@dataclass(frozen=True)
class Told(Selection):
    """The layers that a test names."""

    needs = ("weights",)
    taken: ClassVar[Any] = ()

    def choose(self, table: Any, layers: Any, count: int) -> Any:
        return self.taken


def test_a_selection_may_take_layers_by_their_numbers(prune: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Told, "taken", [4, 1, 2])
    assert prune(select=Told(), layers=3).spans == (Span(1, 3), Span(4, 5))


@pytest.mark.parametrize("taken", [[1], [1, 1], [1, 99], [-1, 2], ["1", 2], 1, None, [Span(1, 4)]])
def test_what_a_selection_takes_is_checked(taken: Any, prune: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Told, "taken", taken)
    with pytest.raises(SpanError, match="selection 'Told' must take 2 of"):
        prune(select=Told(), layers=2)
