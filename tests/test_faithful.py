"""Each published method against a slow literal transcription of what its authors' code does."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

import families
import ghostlayers
from conftest import make_tiny_llama, train
from ghostlayers.calibration import measuring, search
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps, fit_many
from ghostlayers.calibration.passes import Runner
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.errors import InputError, RecipeError, SpanError
from ghostlayers.model.anatomy import Anatomy
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.preparation import check_moves, check_request, make_recipe
from ghostlayers.presets import PRESETS, Preset, find_preset
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import FitOptions, find_method
from ghostlayers.repairs.base import Repair, linear
from ghostlayers.repairs.hadamard import TABLES, construction, hadamard
from ghostlayers.repairs.stack import stack
from ghostlayers.selection.choices import SELECTIONS, find_selection
from ghostlayers.spans import Span, merge_layers
from ghostlayers.surgery.features import check_method
from ghostlayers.surgery.removal import prune_layers
from ghostlayers.text.tokens import Windows
from oracles import literal_streams, study_of

PUBLISHED = FitOptions(ridge=0.0, absolute_ridge=1e-6)


@pytest.fixture(scope="module", params=["tied", "untied"])
def dense(request: Any, trained_llama: Any, byte_tokenizer: Any, some_text: list[str]) -> Any:
    if request.param == "tied":
        return without_eps(copy.deepcopy(trained_llama))
    model = make_tiny_llama(
        seed=2, hidden_size=48, num_hidden_layers=8, intermediate_size=96,
        tie_word_embeddings=False,
    )  # fmt: skip
    ids = torch.tensor(byte_tokenizer("\n\n".join(some_text), verbose=False)["input_ids"])
    train(model, ids, steps=60)
    return without_eps(model.requires_grad_(requires_grad=False))


def without_eps(model: Any) -> Any:
    """Norms that cannot tell a stream from a multiple of it, in which two ways of folding differ.

    A tiny model's stream is so small that the usual 1e-6 is a few thousandths of its square.
    """
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-14
    model.config.rms_norm_eps = 1e-14
    return model


def choose(model: Any, windows: Windows, **choices: Any) -> ChosenCut:
    """What is removed of eight windows, four of them held out."""
    recipe = Recipe(
        windows=8, fit_windows=8, search_windows=8, sequence_length=64, ridge=0.0,
        absolute_ridge=1e-6, token_weight="uniform", inputs="original", **choices,
    )  # fmt: skip
    runner = Runner(DenseModel(model), batch_size=3)
    return search.choose(study_of(runner, recipe, *windows.split_at(8)))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


# LinearPatch: bases and scales


def tables() -> Any:
    place = ghostlayers.__path__[0] + "/repairs/hadamard_cores.npz"
    return np.load(place)


@pytest.mark.parametrize("size", [192, 576, 640, 896, 960, 1536, 2560, 3072, 3584])
def test_the_basis_is_the_kronecker_product_of_core_and_sylvester(size: int) -> None:
    order = next(n for n in (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12) if size % n == 0)
    bits = np.unpackbits(tables()[f"order_{order}"])[: order * order].reshape(order, order)
    sylvester = np.ones((1, 1))
    while len(sylvester) < size // order:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    want = np.kron(2.0 * bits - 1.0, sylvester).T / size**0.5
    assert construction(size) == "tables"
    assert np.array_equal(hadamard(size).numpy(), want)


@pytest.mark.parametrize("order", TABLES)
def test_every_tabulated_core_is_a_hadamard_matrix(order: int) -> None:
    bits = np.unpackbits(tables()[f"order_{order}"])[: order * order].reshape(order, order)
    core = 2 * bits.astype(np.int64) - 1
    assert np.array_equal(core @ core.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("size", [1, 2, 64, 4096])
def test_powers_of_two_take_sylvesters_matrix_alone(size: int) -> None:
    assert construction(size) == "Sylvester"
    first = hadamard(size)[0] * size**0.5
    assert torch.equal(first, torch.ones(size, dtype=torch.float64))


def test_paleys_matrices_stand_in_where_the_tables_reach_nothing() -> None:
    assert construction(44) == "Paley"
    assert construction(92) is None
    whole = hadamard(44)
    torch.testing.assert_close(whole @ whole.T, torch.eye(44, dtype=torch.float64))


@torch.no_grad()
def literal_patch(x: Tensor, y: Tensor, *, rotated: bool) -> Tensor:
    """The mean over windows of each one's ratio, a channel of the basis; B diag(d) B'."""
    basis = hadamard(x.shape[-1]) if rotated else torch.eye(x.shape[-1], dtype=torch.float64)
    total = torch.zeros(x.shape[-1], dtype=torch.float64)
    for before, after in zip(x.double() @ basis, y.double() @ basis, strict=True):
        total += after.abs().mean(dim=0) / before.abs().mean(dim=0)
    return basis @ torch.diag(total / len(x)) @ basis.T


@pytest.mark.parametrize("name", ["linearpatch-diag", "linearpatch-hadamard"])
def test_linearpatch_averages_the_ratios_of_windows(
    dense: Any, windows: Windows, name: str
) -> None:
    span = Span(3, 6)
    fitting = Fitting(find_method(f"{name}:mean=ratios"))
    repair = fit_gaps(Runner(DenseModel(dense), 5), windows, [span], fitting)[span]
    h = literal_streams(dense, windows.input_ids)
    want = literal_patch(h[span.start], h[span.stop], rotated=name.endswith("hadamard"))
    assert repair.delta is not None
    torch.testing.assert_close(
        repair.delta.double(), want - torch.eye(len(want)), rtol=1e-5, atol=1e-6
    )
    totals = fit_gaps(Runner(DenseModel(dense)), windows, [span], Fitting(find_method(name)))[span]
    assert totals.delta is not None
    assert not torch.allclose(totals.delta, repair.delta, atol=1e-6)


# Ghosted Layers: an operator for every removed layer, in hooks


@torch.no_grad()
def literal_ghosts(model: Any, ids: Tensor, removed: Sequence[int]) -> Any:
    """The model without layers, W of each as the code solves it on the dense stream, in hooks."""
    h = literal_streams(model, ids).flatten(1, 2).double()
    eye = torch.eye(h.shape[-1], dtype=torch.float64)
    cut = copy.deepcopy(model)
    for layer, module in enumerate(cut.model.layers):
        if layer in removed:
            x, d = h[layer], h[layer + 1] - h[layer]
            whole = eye + torch.linalg.solve(x.T @ x + 1e-6 * eye, x.T @ d)
            module.register_forward_hook(
                lambda _, args, output, whole=whole: (args[0].double() @ whole).float()
            )
    return cut


def test_the_official_stack_is_one_operator_after_the_other(dense: Any, windows: Windows) -> None:
    removed, ids = [1, 3, 4, 5], windows.input_ids
    gaps = merge_layers(removed)
    how = Fitting(
        find_method("ghost:per=layer"), PUBLISHED, token_weight="uniform", repaired_inputs=False
    )
    repairs = fit_gaps(Runner(DenseModel(dense)), windows, gaps, how)
    assert tuple(repairs) == gaps
    mine = logits_of(prune_layers(DenseModel(dense), gaps, repairs), ids)
    torch.testing.assert_close(
        mine, logits_of(literal_ghosts(dense, ids, removed), ids), rtol=1e-3, atol=2e-3
    )
    text = Fitting(find_method("ghost"), PUBLISHED, token_weight="uniform", repaired_inputs=False)
    one = fit_gaps(Runner(DenseModel(dense)), windows, gaps, text)
    torch.testing.assert_close(one[Span(1, 2)].delta, repairs[Span(1, 2)].delta)
    assert not torch.allclose(one[Span(3, 6)].delta, repairs[Span(3, 6)].delta, atol=1e-3)


def test_one_run_of_layers_gets_one_operator_in_the_code_too(dense: Any, windows: Windows) -> None:
    span = Span(3, 6)
    both = {name: Fitting(find_method(name), PUBLISHED) for name in ("ghost", "ghost:per=layer")}
    repairs = fit_many(Runner(DenseModel(dense)), windows, [span], both)
    text, code = (repair[span].delta for repair in repairs.values())
    assert text is not None
    assert torch.equal(text, code)


def test_stacked_operators_act_as_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = {
        Span(2, 3): Repair("a", linear(random(4, 4), random(4)), scale=1.5),
        Span(3, 4): Repair("b", scale=0.5),
        Span(4, 5): Repair("c", linear(random(4, 4), random(4)), scale=2.0),
        Span(5, 6): Repair("d", linear(random(4, 4))),
        Span(7, 8): Repair("e", scale=3.0),
    }
    x = random(10, 4)

    def act(repair: Repair, stream: Tensor) -> Tensor:
        return measuring.cuts.act(repair, stream)

    want = x
    for span in (Span(2, 3), Span(3, 4), Span(4, 5), Span(5, 6)):
        want = act(parts[span], want)
    stacked = stack(parts)
    assert list(stacked) == [Span(2, 6), Span(7, 8)]
    torch.testing.assert_close(act(stacked[Span(2, 6)], x), want)
    assert stacked[Span(7, 8)] is parts[Span(7, 8)]


# Prune&Comp's loop


class Folded:
    """A model as their code makes it: layers deleted, scales folded into what lies before."""

    def __init__(self, dense: Any) -> None:
        self.model = copy.deepcopy(dense)
        if dense.config.tie_word_embeddings:  # their fold would scale the head; ours never does
            head = self.model.lm_head.weight.detach().clone()
            self.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
            embedding = self.model.model.embed_tokens.weight.detach().clone()
            self.model.model.embed_tokens.weight = torch.nn.Parameter(
                embedding, requires_grad=False
            )
        self.names = list(range(dense.config.num_hidden_layers))
        self.scales: list[float] = []

    @property
    def layers(self) -> Any:
        return self.model.model.layers

    @torch.no_grad()
    def remove(self, layer: int, ids: Tensor) -> None:
        place = self.names.index(layer)
        h = literal_streams(self.model, ids)
        ratios = torch.stack(
            [
                after.double().abs().mean(dim=0) / before.double().abs().mean(dim=0)
                for before, after in zip(h[place], h[place + 1], strict=True)
            ]
        )
        scale = float(ratios.mean(dim=0).mean())
        self.scales.append(scale)
        del self.layers[place], self.names[place]
        self.model.model.embed_tokens.weight *= scale
        for module in self.layers[:place]:
            module.self_attn.o_proj.weight *= scale
            module.mlp.down_proj.weight *= scale


def influence(folded: Folded, ids: Tensor) -> dict[int, float]:
    h = literal_streams(folded.model, ids)
    return {
        layer: 1.0 - float(cosine_similarity(h[i].double(), h[i + 1].double(), dim=-1).mean())
        for i, layer in enumerate(folded.names)
    }


def magnitude(folded: Folded, ids: Tensor) -> dict[int, float]:
    return {
        layer: sum(float(w.detach().double().abs().sum()) for w in folded.layers[i].parameters())
        for i, layer in enumerate(folded.names)
    }


def taylor(folded: Folded, ids: Tensor) -> dict[int, float]:
    model = folded.model
    for parameter in model.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    for window in ids:
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
    importance = {
        layer: sum(
            float((w.detach().double() * w.grad.double()).abs().sum())
            for w in folded.layers[i].parameters()
        )
        for i, layer in enumerate(folded.names)
    }
    model.requires_grad_(requires_grad=False)
    return importance


def perplexity(folded: Folded, ids: Tensor) -> dict[int, float]:
    losses = {}
    for i, layer in enumerate(folded.names):
        handle = folded.layers[i].register_forward_hook(lambda _, args, output: args[0])
        logits = logits_of(folded.model, ids)[:, :-1]
        losses[layer] = float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        handle.remove()
    return losses


LOOPS: dict[str, Callable[[Folded, Tensor], dict[int, float]]] = {
    "shortgpt": influence,
    "magnitude:norms": magnitude,
    "taylor:norms": taylor,
    "perplexity:one-shot": perplexity,
}


@pytest.mark.slow
@pytest.mark.parametrize("select", LOOPS)
def test_prune_and_comps_loop_is_theirs(dense: Any, windows: Windows, select: str) -> None:
    ids, count = windows.first(8).input_ids, 5
    theirs, order = Folded(dense), []
    for _ in range(count):
        scores = LOOPS[select](theirs, ids)
        allowed = [layer for layer in theirs.names if 1 <= layer < 7]
        order.append(min(allowed, key=lambda layer: scores[layer]))
        theirs.remove(order[-1], ids)
    cut = choose(
        dense, windows, layers=count, select=select, iterative=True, refit="none",
        repair="magnitude:mean=ratios", keep_layers="first:1,last:1",
    )  # fmt: skip
    assert cut.table is not None
    assert [step.layer for step in cut.table.steps] == order
    assert cut.repairs is not None
    scales = dict(zip(order, theirs.scales, strict=True))
    for span, repair in cut.repairs.items():
        want = np.prod([scales[layer] for layer in span.layers])
        assert repair.scale == pytest.approx(want, rel=1e-5)
    mine = prune_layers(DenseModel(dense), cut.spans, cut.repairs)
    torch.testing.assert_close(
        logits_of(mine, ids), logits_of(theirs.model, ids), rtol=1e-3, atol=1e-3
    )


def test_iterated_magnitude_follows_the_scales(dense: Any, windows: Windows) -> None:
    """Without them every step would rank the layers as the first did."""
    cut = choose(
        dense, windows, layers=4, select="magnitude:norms:unprotected", iterative=True,
        refit="none", repair="magnitude:mean=ratios",
    )  # fmt: skip
    assert cut.table is not None
    model, first = DenseModel(dense), cut.table.steps[0].layer
    recipe = Recipe(layers=1, select="magnitude:norms:unprotected")
    study = study_of(Runner(model), recipe, windows, windows)
    gap = {Span(first, first + 1): Repair("magnitude", scale=2.0)}
    bare = measuring.measure_importance(study, Cut(model, {}))
    scaled = measuring.measure_importance(study, Cut(model, gap))
    before = [layer for layer in range(8) if layer < first]
    assert all(scaled[layer] > bare[layer] for layer in before)
    assert all(scaled[layer] == bare[layer] for layer in range(first + 1, 8))


@pytest.mark.parametrize("repair", ["none", "ghost", "linearpatch-diag", "joint:x+norm"])
def test_a_score_of_weights_is_not_iterated_with_a_repair_of_the_stream(repair: str) -> None:
    with pytest.raises(RecipeError, match="every step would rank the layers as the first did"):
        Recipe(layers=2, select="magnitude", iterative=True, repair=repair)


def test_what_leaves_each_layer_its_repair_must_stack() -> None:
    with pytest.raises(RecipeError, match="cannot stand one behind the other"):
        Recipe(layers=2, select="shortgpt", iterative=True, refit="none", repair="refit:2")
    with pytest.raises(RecipeError, match="nothing is iterated"):
        Recipe(layers=2, refit="none")


SCORED = [
    name
    for name in (*SELECTIONS, "magnitude:norms", "taylor:norms", "perplexity:one-shot")
    if not find_selection(name).not_iterated
]
CHANGES = ["magnitude", "ghost", "replaceme", "refit:1"]


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_scores_change_with_the_repair_or_are_refused(family: str) -> None:
    """Every score, on every family, after one removed layer: repaired and not."""
    model = families.build(family)
    layers = len(find_decoder_layers(model))
    layerwise, gap = DenseModel(model), Span(layers - 2, layers - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (2, 16), generator=generator)
    some = Windows(ids, False, 2, ())
    for name in CHANGES:
        method = find_method(name)
        try:
            check_method(DenseModel(model), method, [gap])
            repair = planted(model, name, gap)
        except InputError:
            continue
        if repair is None:
            continue
        for select in ("magnitude", "magnitude:norms"):
            try:
                recipe = Recipe(layers=2, select=select, iterative=True, repair=name)
                check_moves(layerwise, recipe)
            except RecipeError:
                continue
            study = study_of(Runner(layerwise), recipe, some, some)
            cuts = [Cut(layerwise, {gap: how}) for how in (Repair("none"), repair)]
            bare, repaired = (measuring.measure_importance(study, cut) for cut in cuts)
            assert repaired != bare, (family, name, select)


def planted(model: Any, name: str, gap: Span) -> Repair | None:
    """A repair of the kind that a method gives, with plainly other numbers than none."""
    if name == "magnitude":
        return Repair(name, scale=1.25)
    if name == "ghost":
        return Repair(name, linear(0.1 * torch.ones(32, 32, dtype=torch.float64)))
    anatomy = DenseModel(model).anatomy_or_reason
    if not isinstance(anatomy, Anatomy):
        return None
    ids = torch.randint(3, 96, (32, 16), generator=torch.Generator().manual_seed(1))
    windows = Windows(ids, False, 32, ())
    return fit_gaps(Runner(DenseModel(model)), windows, [gap], Fitting(find_method(name)))[gap]


# ReplaceMe


@torch.no_grad()
def mlp_outputs(model: Any, ids: Tensor, layer: int) -> Tensor:
    seen: list[Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_hook(lambda _, a, o: seen.append(o))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, 1)


def literal_cosine(m: Tensor, x: Tensor, y: Tensor, *, accurate: bool) -> Tensor:
    """Adam from the identity, ten epochs of shuffled batches of 1,024 tokens, rate 1e-4."""
    whole = torch.eye(m.shape[1], requires_grad=True)
    adam = torch.optim.Adam([whole], lr=1e-4)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(10):
        for rows in torch.randperm(len(m), generator=shuffle).split(1024):
            rest = (x - m)[rows]
            if accurate:
                similar = cosine_similarity(m[rows] @ whole + rest, y[rows], dim=1)
            else:
                similar = cosine_similarity(m[rows] @ whole, (y[rows] - rest), dim=1)
            loss = 1 - similar.mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return whole.detach()


@pytest.mark.parametrize(
    "name", ["replaceme:ridge=0", "replaceme:cosine", "replaceme:cosine:accurate"]
)
def test_replaceme_is_theirs(dense: Any, windows: Windows, name: str) -> None:
    span, ids = Span(3, 6), windows.input_ids
    h = literal_streams(dense, ids).flatten(1, 2)
    m, x, y = mlp_outputs(dense, ids, span.start - 1), h[span.start], h[span.stop]
    if name == "replaceme:ridge=0":
        target = (y - (x - m)).double()
        transform = torch.linalg.solve(m.double().T @ m.double(), m.double().T @ target).float()
    else:
        transform = literal_cosine(m, x, y, accurate=name.endswith("accurate"))
    theirs = copy.deepcopy(dense)
    projection = theirs.model.layers[span.start - 1].mlp.down_proj
    projection.weight.data = transform.T @ projection.weight
    del theirs.model.layers[span.start : span.stop]
    repairs = fit_gaps(Runner(DenseModel(dense)), windows, [span], Fitting(find_method(name)))
    mine = prune_layers(DenseModel(dense), [span], repairs)
    torch.testing.assert_close(logits_of(mine, ids), logits_of(theirs, ids), rtol=2e-3, atol=2e-3)


def test_more_text_means_more_steps_of_a_descent() -> None:
    from ghostlayers.repairs.replaceme import FROM_LEAST_SQUARES, PUBLISHED, _batches

    for how in (PUBLISHED, FROM_LEAST_SQUARES):
        few, many = (len(list(_batches(n, how.epochs))) for n in (4096, 16_384))
        assert (few, many) == (4 * how.epochs, 16 * how.epochs)
    seen = torch.cat(list(_batches(2500, 1)))
    assert sorted(seen.tolist()) == list(range(2500))


def test_a_fit_is_the_same_alone_and_beside_others(dense: Any, windows: Windows) -> None:
    names = [f"{n}{m}" for n in ("magnitude", "linearpatch-diag", "linearpatch-hadamard")
             for m in ("", ":mean=ratios")]  # fmt: skip
    for spans in ([Span(3, 5)], [Span(2, 3), Span(5, 6)]):
        model = DenseModel(dense)
        together = fit_many(
            Runner(model), windows, spans, {n: Fitting(find_method(n)) for n in names}
        )
        for name in names:
            alone = fit_gaps(Runner(model), windows, spans, Fitting(find_method(name)))
            for span in spans:
                assert together[name][span].scale == alone[span].scale
                both = together[name][span].delta, alone[span].delta
                assert both == (None, None) or torch.equal(*both)  # type: ignore[arg-type]


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_comes_from(name: str) -> None:
    preset = find_preset(name)
    assert re.fullmatch(r"\d{4}\.\d{5}", preset.paper)
    assert "/" in preset.code
    assert {"select", "repair", "data", "windows", "sequence_length", "sampling", "bos"} <= {
        *preset.choices
    }
    assert preset.nearest in PRESETS


def test_the_ten_methods_are_there() -> None:
    assert set(PRESETS) == {
        *("ghosted", "linearpatch", "prune-and-comp", "replaceme", "llm-streamline"),
        *("shortgpt", "pruneme", "sleb", "shortened-llama", "lorp"),
    }


def test_an_unknown_preset_lists_them() -> None:
    with pytest.raises(RecipeError, match=r"unknown preset 'slebb'.*'sleb'.*Known: ghosted"):
        Recipe.from_dict({"preset": "slebb"})


def test_whatever_is_chosen_otherwise_wins_over_a_preset() -> None:
    for name, preset in PRESETS.items():
        recipe = Recipe.from_dict({"preset": name, "layers": 3, "windows": 7, "seed": 99})
        assert (recipe.windows, recipe.seed, recipe.preset) == (7, 99, name)
        others = {k: v for k, v in preset.choices.items() if k not in {"windows", "seed"}}
        assert {key: getattr(recipe, key) for key in others} == others
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_preset_fills_what_a_recipe_leaves_open() -> None:
    made = make_recipe(Recipe(layers=5, seed=7), {"preset": "sleb"})
    assert (made.layers, made.seed, made.select, made.preset) == (5, 7, "perplexity", "sleb")
    with pytest.raises(RecipeError, match="unknown preset 'nonsense'"):
        Recipe(layers=5, preset="nonsense")


def test_layers_that_are_named_are_not_chosen_as_a_preset_does() -> None:
    named = Recipe.from_dict({"preset": "prune-and-comp", "remove": "3,4"})
    assert (named.iterative, named.refit, named.repair) == (False, "all", "magnitude:mean=ratios")
    assert Recipe.from_dict({"preset": "sleb", "remove": "0"}).keep_layers is None
    once = Recipe.from_dict({"preset": "prune-and-comp", "layers": 2, "iterative": False})
    assert (once.iterative, once.refit) == (False, "all")


def test_layers_that_stay_cannot_be_named(trained_llama: Any, byte_tokenizer: Any) -> None:
    loaded = ghostlayers.model.loading.from_memory(trained_llama, byte_tokenizer)
    text = {"sequence_length": 64, "windows": 8}
    with pytest.raises(RecipeError, match=r"layers 0,6-7 are .* --keep-layers first:1,last:2"):
        check_request(loaded, Recipe(remove="0,3,6-7", keep_layers="first:1,last:2", **text))
    with pytest.raises(SpanError, match=r"only 1 of .* --keep-layers keeps the first 4 and"):
        check_request(
            loaded, Recipe(layers=2, select="shortgpt", keep_layers="first:4,last:3", **text)
        )


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ("text", "a preset has the keys"),
        ({"name": "x", "colour": "red"}, "a preset has the keys"),
        ({"name": "x"}, "a preset lacks choices, code, dtype, paper, title"),
        (
            {"name": "x", "title": 3, "paper": "", "code": "", "dtype": "", "choices": {}},
            "title: expected a valid string",
        ),
        (
            {"name": "x", "title": "", "paper": "", "code": "", "dtype": "", "choices": []},
            "choices: expected a valid dictionary",
        ),
    ],
)
def test_a_file_that_is_no_preset_is_refused(values: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        Preset.from_dict(values)


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("gemma3_text", {}, "replaceme"),  # a norm stands behind the MLP
        ("llama", {"hidden_size": 100}, "linearpatch"),  # there is no such Hadamard matrix
    ],
)
def test_a_preset_that_a_model_cannot_be_served_with_names_the_nearest(
    family: str, changes: dict[str, int], name: str, byte_tokenizer: Any
) -> None:
    model = families.build(family, **changes)
    loaded = ghostlayers.model.loading.from_memory(model, byte_tokenizer)
    recipe = Recipe.from_dict({"preset": name, "layers": 2, "sequence_length": 32, "windows": 40})
    with pytest.raises(InputError, match=rf"preset '{name}'.*nearest that this model can: ghosted"):
        check_request(loaded, recipe)
