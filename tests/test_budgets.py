"""Budgets: what is counted is what is there, and the fewest layers that meet it go."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import ghostlayers
from conftest import make_tiny_llama
from families import FAMILIES, build
from ghostlayers.budgets import decide, loss, speed, timing
from ghostlayers.budgets.budgets import budget_of
from ghostlayers.budgets.caches import caches_size, layer_caches
from ghostlayers.budgets.instead import TYPES, rounded, type_instead
from ghostlayers.budgets.size import Room, Weights
from ghostlayers.budgets.speed import Point, Seconds, time_operator, time_parts
from ghostlayers.budgets.timing import Timed
from ghostlayers.budgets.types import bytes_in_type
from ghostlayers.calibration.cuts import measure_cuts
from ghostlayers.calibration.passes import Runner
from ghostlayers.checkpoint.card import render_card
from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.checkpoint.output import Output
from ghostlayers.checkpoint.quantise import quantise
from ghostlayers.errors import InputError, RecipeError
from ghostlayers.evaluation.bench import tensors_in
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import METHODS, find_method
from ghostlayers.repairs.shapes import operator_shapes
from ghostlayers.spans import Span, removed_layers
from ghostlayers.study import Study

TEXT: dict[str, Any] = {"windows": 12, "sequence_length": 64}
CHECKPOINT = Output()
SPANS = (Span(1, 3), Span(4, 5))


# Bytes


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["ghost", "piecewise:2", "normed", "refit:1", "joint:x+z"])
def test_bytes_of_a_cut_are_those_of_its_file(
    repair: str, trained_llama: Any, byte_tokenizer: Any, some_text: list[str], tmp_path: Path
) -> None:
    pruned = ghostlayers.prune(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, remove="2-4", repair=repair, **TEXT
    )
    pruned.save(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    written = sum(each.numel() * each.element_size() for each in tensors)
    weights = Weights(pruned.dense, pruned.recipe, CHECKPOINT)
    assert weights.of(pruned.spans) == written
    assert weights.of(()) == sum(p.numel() * 4 for p in trained_llama.parameters())


@pytest.mark.parametrize("repair", [name for name in METHODS if find_method(name).savable])
def test_shapes_of_operators_are_those_of_fits(
    repair: str, trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    study = Study.open(trained_llama, tokenizer=byte_tokenizer, data=some_text, **TEXT)
    cut = study.choose(remove="3-4", repair=repair)
    (repairs,) = study.fit(cut).values()
    operator = repairs[Span(3, 5)].operator
    fitted = {} if operator is None else {n: tuple(p.shape) for n, p in operator.parameters.items()}
    assert operator_shapes(find_method(repair), study.dense.hidden_size) == fitted


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("context", [5, 40])
def test_caches_are_those_of_the_model(family: str, context: int) -> None:
    model = build(family)
    dense = DenseModel(model)
    ids = torch.arange(context)[None] % 90
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    there = sum(
        each.numel() * each.element_size() for each in tensors_in(cache) if each.is_floating_point()
    )
    caches = layer_caches(dense)
    counted = caches_size(caches, range(dense.num_layers), context, 4)
    # transformers drops the last place of a full window, which other engines keep.
    full = [each for each in caches if each.window is not None and context >= each.window]
    assert counted - sum(4 * each.per_token for each in full) == there
    one_less = caches_size(caches, range(1, dense.num_layers), context, 4)
    assert counted - one_less == caches[0].size(context, 4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_bytes_in_a_type_are_those_of_a_file_of_it(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    export_gguf(tiny_folder, tmp_path / "f16.gguf", pre_tokenizer="gpt-2", dtype="float16")
    made = quantise(tmp_path / "f16.gguf", tmp_path / "small.gguf", kind)
    tensors = gguf.GGUFReader(made.path).tensors
    own = {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in tensors}
    dense = DenseModel(make_tiny_llama())
    head = own.pop("token_embd.weight")[1]
    counted = bytes_in_type(dense, range(6), kind)
    tied = dense.network.get_output_embeddings().weight.numel()
    assert counted - sum(size for _, size in own.values()) == head == tied // 32 * 34


def test_rows_that_are_no_multiple_of_a_block_stay_in_16_bits() -> None:
    dense = DenseModel(make_tiny_llama(intermediate_size=40))
    layer = dense.layers[0]
    plain = sum(p.numel() for n, p in layer.named_parameters() if "down_proj" in n)
    norms = sum(p.numel() for p in layer.parameters() if p.ndim == 1)
    packed = sum(p.numel() for p in layer.parameters()) - plain - norms
    saved = bytes_in_type(dense, range(6), "q8_0") - bytes_in_type(dense, range(1, 6), "q8_0")
    assert saved == 2 * plain + 4 * norms + packed // 32 * 34


def test_k_quants_give_some_layers_more_bits() -> None:
    dense = DenseModel(
        make_tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=16)
    )
    whole = bytes_in_type(dense, range(16), "q4_k_m")
    alone = [whole - bytes_in_type(dense, [i for i in range(16) if i != 0], "q4_k_m")]
    less, more = (bytes_in_type(dense, range(16), kind) for kind in ("q4_k_s", "q5_k_m"))
    assert less < whole < more
    assert alone[0] > 0


def test_room_is_the_sum_of_its_parts() -> None:
    dense = DenseModel(build("gemma3_text"))
    weights = Weights(dense, Recipe(layers=1), CHECKPOINT)
    room = Room.of_model(weights, 40)
    assert room.of(SPANS) == weights.of(SPANS) + room.cached(SPANS) + room.allowance
    assert room.cached(()) - room.cached((Span(1, 2),)) == room.layers[1] - weights.layers[1]
    assert Room.of_model(weights).context == 64  # as many as the model has places for


# Seconds


class Ticks:
    """A clock that goes one second further at every look."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def __call__(self) -> float:
        return float(next(self._ticks))


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_layers_get_their_share_of_the_whole(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is looked at twice, the whole twice: of 2 L + 1 ticks every layer takes one."""
    dense = DenseModel(make_tiny_llama())
    real = speed.read_and_write

    def run(*given: Any) -> tuple[float, list[float], int]:
        real(*given)
        return 13.0, [13.0] * given[3], 0

    monkeypatch.setattr(speed, "read_and_write", run)
    parts = time_parts(dense, Point(what, 1, 8), clock=Ticks())
    assert parts.layers == pytest.approx([1.0] * 6)
    assert parts.rest == pytest.approx(7.0)
    assert all(not layer._forward_hooks for layer in dense.layers)


def test_seconds_of_a_cut_add_up() -> None:
    seconds = Seconds((1.0, 2.0, 4.0, 8.0, 16.0), 5.0, 0.5)
    assert seconds.of(()) == 36.0
    assert seconds.of(SPANS) == 5.0 + 1.0 + 8.0 + 2 * 0.5
    assert seconds.bare(SPANS) == 14.0
    assert seconds.share_of_a_layer == pytest.approx(0.5 / 6.2)


@pytest.mark.slow
def test_what_folds_takes_no_time_and_an_operator_takes_some() -> None:
    dense = DenseModel(make_tiny_llama())
    assert time_operator(dense, find_method("refit:1"), Point()) == 0.0
    assert time_operator(dense, find_method("ghost"), Point(), clock=Ticks()) == 1.0
    for name in ("piecewise:2", "normed", "ghost:rank=4"):
        assert time_operator(dense, find_method(name), Point("prefill", 2, 8), clock=Ticks()) == 1.0


def test_a_prompt_beyond_the_positions_is_refused() -> None:
    with pytest.raises(InputError, match="the longest that works is 1x112"):
        time_parts(DenseModel(make_tiny_llama()), Point("decode", 1, 200))


# The number of layers


@functools.cache
def tiny(depth: int) -> DenseModel:
    return DenseModel(make_tiny_llama(num_hidden_layers=depth))


def budget(limit: float, layers: Sequence[float], recipe: Recipe) -> decide.Budget:
    dense, recipe = tiny(len(layers)), dataclasses.replace(recipe, sequence_length=64)
    timed = Timed(Point(), Seconds(tuple(layers), 1.0, 0.25), "a clock")
    return decide.Budget(dense, recipe, CHECKPOINT, timed, limit)


costs = st.lists(st.integers(1, 9).map(float), min_size=3, max_size=6)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(costs, st.floats(1.05, 3.0), st.sampled_from(["streamline", "shortgpt"]))
def test_the_fewest_layers_that_can_meet_it(
    layers: list[float], factor: float, select: str
) -> None:
    recipe = Recipe(faster=f"{factor:.3f}x", select=select, repair="ghost")
    dense_seconds = sum(layers) + 1.0
    limit = dense_seconds / factor
    mine = budget(limit, layers, recipe)
    want = fewest_by_hand(mine, contiguous=select == "streamline")
    if want is None:
        with pytest.raises(InputError, match="is out of reach"):
            mine.fewest()
    else:
        assert mine.fewest() == want
        assert mine.foreseen(want).layers == want


def fewest_by_hand(mine: decide.Budget, *, contiguous: bool) -> int | None:
    """Every set of layers, or every run, with the repair of one gap."""
    depth = mine.dense.num_layers
    for count in range(1, depth):
        sets = list(itertools.combinations(range(depth), count))
        if contiguous:
            sets = [each for each in sets if each[-1] - each[0] == count - 1]
        for each in sets:
            gone = sum(mine.measure.layers[i] for i in each)
            if mine.measure.of(()) - gone + 0.25 <= mine.limit:
                return count
    return None


def test_one_more_goes_where_the_chosen_ones_gain_too_little() -> None:
    mine = budget(14.0, [1.0, 1.0, 1.0, 9.0, 3.0, 3.0], Recipe(faster="1.3x"))
    assert mine.fewest() == 1  # the fourth alone would do

    def choose(recipe: Recipe) -> Any:
        assert recipe.layers is not None
        assert recipe.wish is None
        return ghostlayers.study.ChosenCut(recipe, (Span(0, recipe.layers),))

    cut = decide.choose_within(mine, 1, choose)
    assert removed_layers(cut.spans) == [0, 1, 2, 3]
    assert cut.decision is not None
    assert cut.decision.layers == 4
    assert cut.decision.figures["predicted"] <= 14.0


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"faster": "9x"}, "5 layers are the most that may go. 5 layers less"),
        ({"faster": "9x", "keep_layers": "first:2"}, "4 layers are the most that may go"),
        ({"faster": "9x", "keep_layers": "first:4,last:2"}, "no layers of this model can go"),
    ],
)
def test_what_is_out_of_reach_says_what_is_not(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        budget(1.0, [1.0] * 6, Recipe(**choices)).fewest()
    assert said in str(caught.value)


def test_a_budget_that_is_met_already_is_refused() -> None:
    dense = DenseModel(make_tiny_llama())
    mine = budget_of(Runner(dense), Recipe(fits="1GiB", context=64), CHECKPOINT)
    with pytest.raises(InputError, match=r"--fits 1GiB: nothing has to go. The model takes"):
        mine.fewest()


# The whole way


@pytest.fixture(scope="module")
def study(trained_llama: Any, byte_tokenizer: Any, some_text: list[str]) -> Study:
    return Study.open(trained_llama, tokenizer=byte_tokenizer, data=some_text, **TEXT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {"smaller": "20%"},
        {"smaller": "20%", "select": "shortgpt", "repair": "refit:1"},
        {"fits": "250KiB", "context": 16},
        {"smaller": "15%", "select": "shortgpt", "iterative": True},
        {"smaller": "30%", "preset": "linearpatch", "windows": 12, "sequence_length": 64},
    ],
    ids=lambda each: "-".join(map(str, each.values())),
)
def test_a_cut_meets_its_budget_and_one_layer_less_does_not(
    choices: dict[str, Any], trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    choices = {**TEXT, **choices}
    pruned = ghostlayers.prune(trained_llama, tokenizer=byte_tokenizer, data=some_text, **choices)
    recipe = Recipe.from_dict(choices)
    mine = budget_of(Runner(pruned.dense), recipe, CHECKPOINT)
    assert mine.met(pruned.spans)
    assert mine.fewest() == len(pruned.removed)
    row = pruned.record["budget"]
    assert row["asked"] == str(recipe.wish)
    assert row["predicted"] == mine.measure.of(pruned.spans) <= row["limit"]
    assert pruned.record["recipe"]["layers"] == row["layers"] == len(pruned.removed)
    card = render_card({**pruned.record, "mode": "custom"})
    assert f"Asked for: `{recipe.wish}`" in card


@pytest.mark.slow
def test_study_takes_budgets_and_gives_them_up_again(study: Study) -> None:
    cut = study.choose("streamline", smaller="20%")
    assert cut.decision is not None
    assert study.with_choices(smaller="20%").settled().recipe.layers == cut.decision.layers
    changed = study.with_choices(smaller="20%").settled().with_choices(layers=1)
    assert changed.recipe.layers == 1
    assert changed.budget is None
    again = study.with_choices(smaller="20%").settled().with_choices(repair="none")
    assert again.recipe.smaller == "20%"
    assert study.scores(smaller="20%").spans[0].span == Span(0, cut.decision.layers)
    with pytest.raises(RecipeError, match="to look at scores, say how many"):
        study.scores(max_loss=0.1)


def test_speed_is_measured_once_in_a_run(study: Study, tmp_path: Path) -> None:
    recipe, asked = Recipe(faster="1.2x", at="1x8", **TEXT), []

    def measured(*_: Any) -> list[float]:
        asked.append(1)
        return [1.0, 0.25, *map(float, range(1, 9))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_measured", measured)
        found = []
        for _ in range(2):
            with study.with_choices(faster="1.2x", at="1x8").keeping(tmp_path / "kept") as kept:
                found.append(timing.timed(kept.runner, recipe))
    assert asked == [1]
    assert found[0] == found[1]
    assert found[0].seconds == Seconds(tuple(map(float, range(1, 9))), 1.0, 0.25)


# Losses


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_the_search_ends_at_the_last_that_is_within(count: int, good: int) -> None:
    tried: list[int] = []

    def within(place: int) -> bool:
        assert 0 <= place < count
        assert place not in tried
        tried.append(place)
        return place < good

    best = min(count, good)
    assert loss.last_within(count, within) == (None if best == 0 else best - 1)
    assert len(tried) <= max(1, loss.most_tries(count)) if count else not tried


@pytest.mark.slow
def test_the_deepest_cut_within_a_loss(
    study: Study, trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    limit = 0.5
    pruned = ghostlayers.prune(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, max_loss=limit, **TEXT
    )
    decision, losses = pruned.decision, pruned.evidence
    assert decision is not None
    more = losses["repaired"].loss_nats - losses["dense"].loss_nats
    assert decision.figures["predicted"] == pytest.approx(more, abs=1e-6)
    assert decision.figures["bound"] <= limit
    next_one = [row for row in decision.figures["tried"] if row["layers"] == decision.layers + 1]
    assert next_one == [] or next_one[0]["bound"] > limit
    by_hand = study.choose(layers=decision.layers, held_out_windows=32, race_windows=32)
    assert removed_layers(by_hand.spans) == pruned.removed


def test_a_loss_that_no_cut_keeps_is_refused(study: Study) -> None:
    with pytest.raises(InputError, match=r"out of reach: without 1 layer .* the fewest that may"):
        study.choose(max_loss=1e-6, held_out_windows=4)


# Quantising instead


def test_rounding_is_that_of_the_library() -> None:
    weight = torch.randn(48, 96)
    for kind in TYPES:
        target = gguf.GGMLQuantizationType[kind.upper()]
        want = gguf.dequantize(gguf.quantize(weight.numpy(), target), target)
        assert torch.equal(rounded(weight, kind), torch.from_numpy(want))
    assert torch.equal(rounded(weight[0], "q8_0"), weight[0])
    assert torch.equal(rounded(weight[:, :40], "q8_0"), weight[:, :40].half().float())


@pytest.fixture
def exportable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("ghostlayers.budgets.instead.check_model", lambda *_: None)
    return None


@pytest.mark.usefixtures("exportable")
def test_what_quantising_does_is_measured_and_said(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    pruned = ghostlayers.prune(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, smaller="40%", **TEXT
    )
    assert pruned.decision is not None
    other = pruned.decision.alternative
    assert other is not None
    mine = budget_of(Runner(pruned.dense), Recipe(smaller="40%", **TEXT), CHECKPOINT)
    assert type_instead(mine) == (other["type"], other["bytes"])
    assert other["bytes"] <= mine.limit
    copy = make_tiny_llama(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=8, intermediate_size=96
    )
    copy.load_state_dict(
        {n: rounded(w, other["type"]) for n, w in trained_llama.state_dict().items()}
    )
    held_out = pruned.held_out
    assert held_out is not None
    want = measure_cuts(Runner(DenseModel(copy)), held_out, {})["dense"].loss_nats
    assert other["loss_nats"] == pytest.approx(want, abs=1e-6)
    assert other["cut_loss_nats"] == pruned.evidence["repaired"].loss_nats
    said = pruned.decision.quantising
    assert said is None or other["loss_nats"] < other["cut_loss_nats"]
    assert said is not None
    assert "Q8_0" in said


@pytest.mark.slow
def test_a_contest_stays_within_a_budget_of_bytes(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    """A budget that Ghost just meets bars what adds more, and the count follows from Ghost's."""
    asked: dict[str, Any] = {"tokenizer": byte_tokenizer, "data": some_text, **TEXT}
    whole = Weights(DenseModel(trained_llama), Recipe(layers=3), CHECKPOINT)
    spans = (Span(2, 5),)
    smaller = f"{100 * (1 - (whole.of(spans) + 1) / whole.of(())):.9f}%"
    wide = {"repair": "auto", "overhead": "90%"}
    pruned = ghostlayers.prune(trained_llama, smaller=smaller, **wide, **asked)
    free = ghostlayers.prune(trained_llama, layers=3, **wide, **asked)
    bytes_of = {
        name: dataclasses.replace(whole, recipe=Recipe(layers=3, repair=name)).of(pruned.spans)
        for name in (row.repair for row in free.contest.contestants)
    }
    most = whole.of(spans) + 1
    raced = {row.repair for row in pruned.contest.contestants}
    assert raced == {name for name, size in bytes_of.items() if size <= most}
    barred = {n for n, why in pruned.contest.refused.items() if "budget" in why}
    assert barred == {name for name, size in bytes_of.items() if size > most} != set()
