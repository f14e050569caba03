"""Removing layers and inserting repairs, in every family that can be cut."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import build
from ghostlayers import modeling
from ghostlayers.calibration.cuts import Cut
from ghostlayers.errors import InputError, SpanError, UnsupportedModelError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.repairs import ALL, find_method
from ghostlayers.repairs.base import FROM_KEPT_LAYER, Repair
from ghostlayers.repairs.base import linear as linear_map
from ghostlayers.spans import Span, kept_layers
from ghostlayers.surgery import removal
from ghostlayers.surgery.features import check_method
from oracles import (
    CUTS,
    GENERATION,
    fitted,
    left_behind,
    literal_repaired,
    logits,
    operators,
    random_windows,
    token_ids,
)

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "bitnet", "gemma3_text")


def handmade(name: str, spans: tuple[Span, ...]) -> Any:
    """The same family built without the layers, filled with the kept layers' weights."""
    dense = build(name)
    kept = kept_layers(spans, 5)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if getattr(dense.config, "layer_types", None) is not None:
        changes["layer_types"] = [dense.config.layer_types[i] for i in kept]
    model = build(name, seed=99, **changes)
    state = {}
    for key, tensor in dense.state_dict().items():
        parts = key.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        state[".".join(parts)] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_bare_cut_is_the_handmade_model(name: str, cut: str) -> None:
    pruned = removal.prune_layers(DenseModel(build(name)), CUTS[cut])
    want = handmade(name, CUTS[cut])
    assert type(pruned) is type(want)
    assert torch.equal(logits(pruned, token_ids()), logits(want, token_ids()))
    layers = find_decoder_layers(pruned)
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(len(layers)))
    assert pruned.config.num_hidden_layers == len(layers)
    if getattr(want.config, "layer_types", None) is not None:
        assert pruned.config.layer_types == want.config.layer_types


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_empty_cut_is_the_identity(name: str) -> None:
    dense = build(name)
    pruned = removal.prune_layers(DenseModel(dense), ())
    assert torch.equal(logits(pruned, token_ids()), logits(dense, token_ids()))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_repaired_cut_is_the_dense_model_with_layers_skipped(name: str, cut: str) -> None:
    spans = CUTS[cut]
    dense = build(name)
    repaired = removal.prune_layers(DenseModel(dense), spans, operators(spans))
    want = literal_repaired(dense, spans, token_ids())
    assert torch.equal(logits(repaired, token_ids()), want)
    assert not torch.allclose(
        logits(removal.prune_layers(DenseModel(dense), spans), token_ids()), want
    )


@pytest.mark.parametrize("cut", CUTS)
def test_measuring_a_cut_without_building_it_is_the_built_model(cut: str) -> None:
    spans = CUTS[cut]
    dense = build("gemma3_text")
    layerwise = DenseModel(dense)
    batch, stream = layerwise.begin(token_ids())
    for layer in range(spans[0].start):
        stream = layerwise.run_layer(layer, batch, stream)
    end = Cut(layerwise, operators(spans)).run(batch, stream)
    built = removal.prune_layers(DenseModel(dense), spans, operators(spans))
    assert torch.equal(layerwise.logits(batch, end), logits(built, token_ids()))


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("repaired", [False, True])
def test_cached_generation_is_uncached_generation(name: str, repaired: bool) -> None:
    spans = CUTS["two gaps"]
    model = removal.prune_layers(
        DenseModel(build(name)), spans, operators(spans) if repaired else None
    )
    ids = token_ids(length=9)
    options = {"attention_mask": torch.ones_like(ids), **GENERATION}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    past = model(input_ids=ids, use_cache=True).past_key_values
    assert len(past.layers) == 3


def test_the_dense_model_is_unchanged_and_shares_its_weights() -> None:
    dense = build("llama")
    config, before = copy.deepcopy(dense.config.to_dict()), logits(dense, token_ids())
    spans = CUTS["middle"]
    pruned = removal.prune_layers(DenseModel(dense), spans, operators(spans))
    assert torch.equal(logits(dense, token_ids()), before)
    assert dense.config.to_dict() == config
    assert len(find_decoder_layers(dense)) == 5
    assert [x.self_attn.layer_idx for x in dense.model.layers] == [0, 1, 2, 3, 4]
    assert pruned.model.layers[1].mlp.up_proj.weight is dense.model.layers[3].mlp.up_proj.weight


@pytest.mark.parametrize("name", SUPPORTED)
def test_ties_are_kept(name: str) -> None:
    dense = build(name, tie_word_embeddings=True)
    pruned = removal.prune_layers(DenseModel(dense), CUTS["middle"], operators(CUTS["middle"]))
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


def test_removing_layers_that_write_nothing_changes_nothing() -> None:
    dense = build("llama")
    for index in (1, 2):
        dense.model.layers[index].self_attn.o_proj.weight.zero_()
        dense.model.layers[index].mlp.down_proj.weight.zero_()
    pruned = removal.prune_layers(DenseModel(dense), CUTS["middle"])
    assert torch.equal(logits(pruned, token_ids()), logits(dense, token_ids()))


def test_a_zero_repair_is_the_bare_cut_exactly_in_bfloat16() -> None:
    dense = build("llama").to(torch.bfloat16)
    span = Span(1, 3)
    zero = removal.prune_layers(
        DenseModel(dense), (span,), {span: Repair("ghost", linear_map(torch.zeros(32, 32)))}
    )
    bare = removal.prune_layers(DenseModel(dense), (span,))
    assert torch.equal(logits(zero, token_ids()), logits(bare, token_ids()))


def test_operators_are_bare_parameters() -> None:
    spans = CUTS["both ends"]
    repaired = removal.prune_layers(DenseModel(build("llama")), spans, operators(spans))
    names = [name for name, _ in repaired.named_parameters() if "repair" in name]
    assert names == [
        "model.layers.0.repair_before_weight",
        "model.layers.2.repair_after_weight",
    ]
    assert not any("repair" in name for name, _ in repaired.named_modules())
    assert repaired.config.repaired_boundaries == [0, 3]
    assert modeling.repair_place(0) == (0, "repair_before")


def test_models_that_transformers_does_not_build_so_are_refused() -> None:
    model = build("llama")
    model.config.model_type = "gemma3n_text"
    with pytest.raises(UnsupportedModelError, match="'gemma3n_text' cannot be cut: some of its"):
        removal.prune_layers(DenseModel(model), CUTS["middle"])
    model.config.model_type = "bert_of_my_own"
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .* as transformers itself"):
        removal.prune_layers(DenseModel(model), CUTS["middle"])


def test_a_repaired_model_is_not_cut_again() -> None:
    once = removal.prune_layers(
        DenseModel(build("llama")), CUTS["middle"], operators(CUTS["middle"])
    )
    with pytest.raises(UnsupportedModelError, match="removed and repaired before"):
        removal.prune_layers(DenseModel(once), (Span(0, 1),))


@pytest.mark.parametrize("spans", [(Span(0, 5),), (Span(4, 6),), (Span(1, 3), Span(2, 4))])
def test_impossible_spans_are_refused(spans: tuple[Span, ...]) -> None:
    with pytest.raises(SpanError):
        removal.prune_layers(DenseModel(build("llama")), spans)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (torch.zeros(31, 32), r"act on 32 channels, got 'weight' of shape \[32, 31\]"),
        (torch.full((32, 32), float("nan")), r"finite, got NaN or infinity in 'weight'"),
    ],
)
def test_impossible_operators_are_refused(delta: torch.Tensor, message: str) -> None:
    repair = Repair("ghost", linear_map(delta))
    with pytest.raises(InputError, match=message):
        removal.prune_layers(DenseModel(build("llama")), CUTS["middle"], {Span(1, 3): repair})


@pytest.mark.parametrize("cut", ["middle", "last", "two gaps"])
@pytest.mark.parametrize("repair", [name.replace("rank=64", "rank=4") for name in ALL])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_what_is_measured_is_what_is_built(name: str, repair: str, cut: str) -> None:
    dense, spans = build(name), CUTS[cut]
    method = find_method(repair)
    reads_kept_layer = bool(FROM_KEPT_LAYER & set(method.features))
    if name == "gemma3_text" and reads_kept_layer and not method.through_norm:
        with pytest.raises(InputError, match=r"reads [mzo] .* no linear map can be folded into it"):
            fitted(dense, repair, spans)
        return
    repairs = fitted(dense, repair, spans)
    built = removal.prune_layers(DenseModel(dense), spans, repairs)
    layerwise = DenseModel(dense)
    batch, stream = layerwise.begin(token_ids())
    ready = Cut(layerwise, repairs)
    for layer in range(ready.fork):
        stream = layerwise.run_layer(layer, batch, stream)
    want = layerwise.logits(batch, ready.run(batch, stream))
    got = logits(built, token_ids())
    if repair == "magnitude":  # the writes are divided, which later norms see up to their eps
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(got, want)
    bare = logits(removal.prune_layers(DenseModel(dense), spans), token_ids())
    # A scale of the whole stream behind the last layer is undone by the final norm.
    nothing = repair == "none" or (repair == "magnitude" and cut == "last")
    assert nothing == torch.equal(got, bare)
    assert find_method(repair).savable == all(
        repair.operator is None or not repair.operator.maps for repair in repairs.values()
    )
    stock = all(repair.operator is None or repair.operator.maps for repair in repairs.values())
    assert (type(built) is type(dense)) == stock


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["middle", "two gaps"])
@pytest.mark.parametrize(
    "repair", ["magnitude", "replaceme", "refit:2", "joint:x+z", "joint:x+o+z", "joint:x+phi"]
)
@pytest.mark.parametrize(
    "name",
    [
        *("granite", "gpt2", "gptj", "phi", "falcon", "opt", "gpt_neox", "falcon_h1", "lfm2"),
        *("mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3", "jamba"),
        *("granitemoeshared", "qwen3_next"),
    ],
)
def test_folds_are_exact_in_other_builds(name: str, repair: str, cut: str) -> None:
    """Scaled writes, transposed weights, parallel branches, projections without an MLP module,
    and sums over experts, packed in either order or beside an MLP that all tokens pass.
    """
    dense, spans = build(name), CUTS[cut]
    mixed = {"lfm2", "jamba", "qwen3_next"}
    experts = {name} if DenseModel(dense).anatomy.experts else set()
    lacking = {"joint:x+phi": {"opt"} | experts, "joint:x+o+z": mixed, "magnitude": mixed}
    if name in lacking.get(repair, set()):
        with pytest.raises(InputError, match=r"its MLP is not a module|not known through which"):
            fitted(dense, repair, spans)
        return
    if repair == "magnitude":  # norms undo a scale up to their eps, which a large stream drowns
        dense.get_input_embeddings().weight.mul_(300.0)
    repairs = fitted(dense, repair, spans)
    built = removal.prune_layers(DenseModel(dense), spans, repairs)
    layerwise = DenseModel(dense)
    batch, stream = layerwise.begin(token_ids())
    want = layerwise.logits(batch, Cut(layerwise, repairs).run(batch, stream, boundary=0))
    if repair == "magnitude":
        torch.testing.assert_close(logits(built, token_ids()), want, rtol=1e-3, atol=1e-4)
        assert all(repair.scale != 1.0 for repair in repairs.values())
        return
    assert torch.equal(logits(built, token_ids()), want)
    bare = logits(removal.prune_layers(DenseModel(dense), spans), token_ids())
    assert not torch.allclose(want, bare, atol=1e-4)


@pytest.mark.parametrize("name", ["afmoe", "jetmoe"])
@pytest.mark.parametrize("repair", ["refit:1", "joint:x+z", "magnitude"])
def test_experts_behind_a_norm_or_of_another_build_have_no_fold(name: str, repair: str) -> None:
    with pytest.raises(InputError, match=rf"'{re.escape(repair)}' .*that a repair could fold into"):
        fitted(build(name), repair, CUTS["middle"])


def test_a_fold_into_experts_is_the_fold_of_their_sum() -> None:
    """Four experts that hold a quarter of a dense MLP each, and all see every token."""
    dense = build("llama", intermediate_size=64)
    width = dense.config.intermediate_size // 4
    mixed = build(
        "mixtral", intermediate_size=width, num_local_experts=4, num_experts_per_tok=4,
        sliding_window=None, rms_norm_eps=dense.config.rms_norm_eps,
        rope_parameters=dense.config.rope_parameters,
    )  # fmt: skip
    weights = dense.state_dict()
    for index, layer in enumerate(mixed.model.layers):
        take = f"model.layers.{index}.mlp."
        gate, up, down = (weights.pop(f"{take}{n}_proj.weight") for n in ("gate", "up", "down"))
        layer.mlp.gate.weight.zero_()  # every expert gets a quarter
        packed = torch.cat([gate.view(4, width, -1), up.view(4, width, -1)], dim=1)
        layer.mlp.experts.gate_up_proj.copy_(packed)
        layer.mlp.experts.down_proj.copy_(4 * down.view(-1, 4, width).transpose(0, 1))
    missing, unexpected = mixed.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".mlp." in name for name in missing)
    want = logits(dense, token_ids())
    torch.testing.assert_close(logits(mixed, token_ids()), want, rtol=1e-4, atol=1e-5)
    spans = CUTS["two gaps"]
    one, other = (
        logits(
            removal.prune_layers(DenseModel(model), spans, fitted(model, "replaceme", spans)),
            token_ids(),
        )
        for model in (dense, mixed)
    )
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_a_write_is_scaled_as_the_stream_receives_it() -> None:
    """Granite halves what its projections write; a fold must write twice as much."""

    assert DenseModel(build("granite")).anatomy.write_scale == 0.5
    assert DenseModel(build("granite", residual_multiplier=1.0)).anatomy.write_scale == 1.0
    half = build("granite").to(torch.bfloat16)
    assert DenseModel(half).anatomy.write_scale == 0.5


@pytest.mark.parametrize("repair", ["ghost", "refit:2", "joint:x+z", "joint:x+o+z", "replaceme"])
def test_repairs_bring_the_stream_nearer(repair: str) -> None:
    """Random weights: on the fit windows the mean distance at the end of the gap shrinks."""
    dense, spans = build("llama"), CUTS["last"]
    repairs = fitted(dense, repair, spans)
    layerwise = DenseModel(dense)
    batch, stream = layerwise.begin(random_windows().input_ids)
    dense_end = stream
    for layer in range(layerwise.num_layers):
        dense_end = layerwise.run_layer(layer, batch, dense_end)

    def distance(repairs: dict[Span, Repair]) -> float:
        end = Cut(layerwise, repairs).run(batch, stream, boundary=0)
        return float((end - dense_end).square().sum())

    assert distance(repairs) < 0.98 * distance({spans[0]: Repair("none")})


def test_refit_two_takes_half_and_then_the_rest() -> None:
    """Against a literal transcription with hooks and stored activations."""
    dense, span = build("llama"), Span(3, 5)
    (repair,) = fitted(dense, "refit:2", (span,)).values()
    ids = random_windows().input_ids
    layers = dense.model.layers

    def record(model: Any) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _, args: seen.__setitem__(name, args[0].flatten(0, 1).double())

        handles = [layers[i].mlp.down_proj.register_forward_pre_hook(keep(f"z{i}")) for i in (1, 2)]
        handles.append(layers[3].register_forward_pre_hook(keep("x")))
        handles.append(model.model.norm.register_forward_pre_hook(keep("y")))
        logits(model, ids)
        for handle in handles:
            handle.remove()
        return seen

    def least_squares(z: torch.Tensor, target: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weighted = z / y.norm(dim=1, keepdim=True)
        scale = weighted.norm(dim=0)
        unit = weighted / scale
        gram = unit.T @ unit + 1e-4 * torch.eye(z.shape[1], dtype=torch.float64)
        right = unit.T @ (target / y.norm(dim=1, keepdim=True))
        return torch.linalg.solve(gram, right) / scale[:, None]

    before = record(dense)
    first = least_squares(before["z1"], (before["y"] - before["x"]) / 2, before["y"])
    changed = copy.deepcopy(dense)
    layers = changed.model.layers
    layers[1].mlp.down_proj.weight.data += first.T.float()
    middle = record(changed)
    second = least_squares(middle["z2"], before["y"] - middle["x"], before["y"])
    back = {fold.layers_back: fold.delta for fold in repair.folds}
    torch.testing.assert_close(back[2], first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(back[1], second, rtol=1e-3, atol=1e-5)
    weight = 1 / before["y"].square().sum(dim=1)
    left = before["y"] - middle["x"] - middle["z2"] @ second
    share = (left.square().sum(1) * weight).sum() / (
        (before["y"] - before["x"]).square().sum(1) * weight
    ).sum()
    assert repair.relative_residual == pytest.approx(float(share), rel=1e-3)


@pytest.mark.parametrize(
    "repair",
    ["ghost", "joint:x+z", "refit:2", "refit:3", "joint:x+z:refit=2", "piecewise:3:z:refit=2"],
)
def test_the_residual_told_is_what_the_repaired_stream_leaves(repair: str) -> None:
    """Stages act one after another; the residual of the last, as a share of the whole gap."""
    dense, span = build("llama"), Span(3, 5)
    (fit,) = (repairs := fitted(dense, repair, (span,))).values()
    left, fork = left_behind(dense, repairs, span)
    assert fit.relative_residual == pytest.approx(left, rel=1e-3)
    assert fork == 3 - (max((fold.layers_back for fold in fit.folds), default=0))


def test_a_repair_that_needs_a_layer_before_the_gap_refuses_a_cut_at_layer_0() -> None:
    with pytest.raises(InputError, match=r"'refit:1' .* before layer 0 there is none"):
        fitted(build("llama"), "refit:1", CUTS["first"])
    assert fitted(build("llama"), "joint:x+norm", CUTS["first"])


@pytest.mark.parametrize("repair", ["hadamard", "linearpatch-hadamard"])
def test_a_basis_that_the_model_has_not_is_refused_before_anything_is_computed(repair: str) -> None:
    model: Any = SimpleNamespace(hidden_size=92)
    with pytest.raises(InputError, match=r"order 92 .* such as 88 and 96"):
        check_method(model, find_method(repair))
    check_method(model, find_method("ghost"))


@pytest.mark.parametrize("repair", ["magnitude", "ghost"])
def test_magnitude_keeps_a_tied_head(repair: str) -> None:
    dense = build("gemma3_text", tie_word_embeddings=True)
    built = removal.prune_layers(
        DenseModel(dense), CUTS["two gaps"], fitted(dense, repair, CUTS["two gaps"])
    )
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert built.lm_head.weight is dense.lm_head.weight
