"""Training after a cut: the engine is a literal loop, nothing else changes, nothing gets worse."""

import copy
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import ghostlayers
from families import FAMILIES, PATTERNED, build
from ghostlayers.calibration import cuts, journal
from ghostlayers.cli import heal as heal_command_module
from ghostlayers.cli.app import app
from ghostlayers.errors import (
    ModelError,
    NoGainError,
    NonFiniteError,
    RecipeError,
    ResumeError,
    VerificationError,
    WindowError,
)
from ghostlayers.healing import parts as parts_module
from ghostlayers.healing import schedule
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.engine import Engine
from ghostlayers.healing.head import Head, LogitMap, logit_loss
from ghostlayers.healing.parts import default_parts, named_parts
from ghostlayers.healing.positions import draw_positions, positions_of
from ghostlayers.healing.rates import SHARE, WINDOWS, _longest, _noise, fitting_rates, work_of_trial
from ghostlayers.healing.state import BETAS, CLIP, State
from ghostlayers.healing.text import _shared_out, read_text
from ghostlayers.healing.trained import prepare, recording
from ghostlayers.healing.training import Training
from ghostlayers.model import dense as dense_module
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import text_view
from ghostlayers.recipe.healing import LEARNING_RATES, PARTS, HealingRecipe
from ghostlayers.recipe.healing_amounts import read_budget, read_mix
from ghostlayers.repairs.base import Operator, Repair
from ghostlayers.spans import Span
from ghostlayers.surgery import removal
from kills import killed_before
from oracles import CUTS

SMALL = {"sequence_length": 32, "held_out_windows": 3, "step_tokens": 64}
PRUNE = {"windows": 8, "sequence_length": 64, "held_out_windows": 2, "remove": "3-4"}
LOSSES = ["kl", "ce", "kl+ce"]


@pytest.fixture(scope="module")
def pruned(trained_llama: Any, byte_tokenizer: Any, some_text: list[str]) -> dict[str, Any]:
    """The trained Llama without two layers, by repair."""
    return {
        repair: ghostlayers.prune(
            trained_llama, tokenizer=byte_tokenizer, data=some_text, repair=repair, **PRUNE
        )
        for repair in ("ghost", "refit:2", "piecewise:2", "joint:x+z", "none")
    }


@pytest.fixture(scope="module")
def other_text() -> list[str]:
    from conftest import make_documents

    return make_documents(60, seed=3)


def cut_of(pruned: Any) -> CutModel:
    return CutModel.of(pruned.dense, text_view(pruned.model), pruned.spans, pruned.record)


def heal(pruned: Any, text: Any, **choices: Any) -> Any:
    return ghostlayers.heal(pruned, data=text, **{**SMALL, "tokens": "2000", **choices})


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in network.named_parameters()}


# The head


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("logits_of", [LogitMap(), LogitMap(0.25), LogitMap(1.0, 3.0)])
def test_the_gradient_of_the_head_is_autograds(
    kind: Any, logits_of: LogitMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "LOGITS_AT_ONCE", 40 * 7)  # chunks of seven positions
    torch.manual_seed(0)
    output = nn.Linear(8, 40)
    hidden = (3 * torch.randn(31, 8)).requires_grad_()
    teacher, targets = 3 * torch.randn(31, 8), torch.randint(0, 40, (31,))
    loss, gradient = Head(output, logits_of).loss(hidden.detach(), teacher, targets, kind)

    logits, wanted = logits_of(output(hidden)), logits_of(output(teacher)).detach()
    parts = {
        "kl": nn.functional.kl_div(
            logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True
        ),
        "ce": nn.functional.cross_entropy(logits, targets, reduction="sum"),
    }
    whole = sum(parts[each] for each in kind.split("+"))
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_the_student_has_no_gradient() -> None:
    logits = torch.randn(5, 11)
    loss, slope = logit_loss(logits, logits.clone(), torch.zeros(5, dtype=torch.long), "kl")
    assert loss == pytest.approx(0.0, abs=1e-5)
    assert float(slope.abs().max()) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_by_the_gradient_of_its_own_logits(name: str) -> None:
    """One lesson gives the gradients of a literal loss on logits of two whole models."""
    dense = DenseModel(build(name))
    allowed = PATTERNED.get(name, set(CUTS))
    (span,) = CUTS[next(cut for cut in ("middle", "last", "first") if cut in allowed)]
    torch.manual_seed(1)
    operator = Operator({"weight": 0.02 * torch.randn(dense.hidden_size, dense.hidden_size)})
    network = removal.prune_layers(dense, [span], {span: Repair("ghost", operator)})
    cut = CutModel.of(dense, network, (span,), {"recipe": {"repair": "ghost"}})
    trained = prepare(cut, HealingRecipe(), ("operator", "suffix"))
    ids = torch.randint(3, 90, (2, 9))
    positions = draw_positions(range(2), 9, 0.6, 0)
    with recording(trained):
        engine = Engine(trained, "kl+ce")
        loss = engine.learn(engine.teach(ids, positions), positions.numel())
    literal = copy.deepcopy(trained.network)
    for each in literal.parameters():
        each.requires_grad_(each.is_floating_point())
    wanted = literal_loss(literal, dense.network, ids, positions)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()) * positions.numel(), rel=2e-4)
    own = dict(literal.named_parameters())
    for each, parameter in trained.parameters.items():
        want = own[each].grad
        if want is not None and float(want.norm()) > 0:
            got = torch.zeros_like(want) if parameter.grad is None else parameter.grad
            assert float((got - want).norm()) <= 2e-3 * float(want.norm()) + 1e-7, each


def literal_loss(
    student: Any, teacher: Any, ids: torch.Tensor, positions: torch.Tensor, kind: str = "kl+ce"
) -> torch.Tensor:
    """The mean loss over some positions, from the logits of both whole models."""
    mine = student(input_ids=ids, use_cache=False).logits.float()
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits.float()
    total = torch.zeros(())
    for row, column in itertools.product(range(len(ids)), range(positions.shape[1])):
        place = positions[row, column]
        log_q, log_p = mine[row, place].log_softmax(-1), theirs[row, place].log_softmax(-1)
        if "kl" in kind:
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        if "ce" in kind:
            total = total - log_q[ids[row, place + 1]]
    return total / positions.numel()


# The engine


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    ("repair", "train"),
    [
        ("ghost", "operator"),
        ("ghost", "operator+norms+suffix"),
        ("piecewise:2", "operator+norms"),
        ("joint:x+z", "operator"),
        ("refit:2", "suffix"),
        ("none", "all"),
    ],
)
def test_the_engine_is_a_literal_loop_of_two_models(
    pruned: Any, other_text: list[str], repair: str, train: str, kind: Any
) -> None:
    cut = cut_of(pruned[repair])
    recipe = HealingRecipe(train=train, loss=kind, positions=0.5, tokens="256", **SMALL)
    text = read_text(cut.dense, recipe, 8, other_text)
    healed = heal(pruned[repair], other_text, train=train, loss=kind, positions=0.5, tokens="256")
    student = copy.deepcopy(prepare(cut, recipe, recipe.parts or ()).network)
    names = named_parts(cut, recipe.parts or ())
    own = dict(student.named_parameters())
    groups = [
        {"params": [own[n] for n, p in names.items() if p == part], "lr": 0.0, "part": part}
        for part in dict.fromkeys(names.values())
    ]
    for name, each in own.items():
        each.requires_grad_(name in names)
    optimiser = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    for step in range(4):
        numbers = range(2 * step, 2 * step + 2)
        positions = draw_positions(numbers, 32, 0.5, 0)
        for group in optimiser.param_groups:
            group["lr"] = healed.outcome.rates[group["part"]] * schedule.rate(step, 4)
        loss = literal_loss(
            student, cut.dense.network, text.input_ids[list(numbers)], positions, kind
        )
        loss.backward()
        nn.utils.clip_grad_norm_([own[name] for name in names], CLIP)
        optimiser.step()
        optimiser.zero_grad()
    assert healed.outcome.steps == 4
    if not healed.better:
        pytest.skip("the best state is the first one")
    last = healed.outcome.looks[-1].step == healed.outcome.best_step
    assert last
    got = dict(healed.model.named_parameters())
    moved = dict(cut.network.named_parameters())
    for name in names:
        want, start = own[name].detach(), moved[name].detach()
        far = float((want - start).norm())
        assert float((got[name] - want).norm()) <= 2e-2 * far + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize("train", PARTS)
def test_what_is_not_trained_is_left_alone(
    pruned: Any, other_text: list[str], train: str, trained_llama: Any
) -> None:
    before, flags = weights_of(trained_llama), [p.requires_grad for p in trained_llama.parameters()]
    cut_before = weights_of(pruned["ghost"].model)
    cut = cut_of(pruned["ghost"])
    healed = heal(pruned["ghost"], other_text, train=train)
    assert all(torch.equal(before[n], p) for n, p in trained_llama.named_parameters())
    assert [p.requires_grad for p in trained_llama.parameters()] == flags
    assert all(p.grad is None for p in trained_llama.parameters())
    assert all(torch.equal(cut_before[n], p) for n, p in pruned["ghost"].model.named_parameters())
    if train == "lora":
        names = {n for n in cut_before if cut.layer_of(n) is not None and "proj" in n}
    else:
        names = set(named_parts(cut, (train,)))
    after = weights_of(healed.model)
    assert after.keys() == cut_before.keys()
    changed = {n for n in after if not torch.equal(after[n], cut_before[n])}
    assert changed
    assert changed <= names
    if train in ("operator", "norms"):
        assert changed == names


@pytest.mark.slow
def test_a_text_that_is_gone_through_again_is_not_computed_again(
    pruned: Any, other_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dense model says is kept on disk, or made again: the same weights in the end."""
    taught: list[int] = []
    teach = Engine.teach

    def counted(self: Any, ids: Any, positions: Any) -> Any:
        taught.append(len(ids))
        return teach(self, ids, positions)

    monkeypatch.setattr(Engine, "teach", counted)
    found = []
    for cache in (None, "1KB"):
        taught.clear()
        healed = heal(
            pruned["ghost"],
            other_text[:3],
            tokens="3000",
            train="suffix",
            cache=cache,
            positions=0.5,
            learning_rate="1e-4",
        )
        found.append((healed, sum(taught)))
    (kept, few), (anew, many) = found
    assert kept.outcome.text.repeats[0] > 2
    assert many == kept.outcome.steps * 2
    assert few < many / 2
    for one, other in zip(kept.model.parameters(), anew.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["operator+norms", "suffix", "lora"])
def test_an_offloaded_model_heals_as_one_in_memory(
    other_text: list[str],
    tiny_dense: Path,
    tmp_path: Path,
    train: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ghostlayers.prune(str(tiny_dense), data=other_text, repair="joint:x+z", **PRUNE).save(
        tmp_path / "cut"
    )
    both = [
        ghostlayers.heal(
            tmp_path / "cut", against=tiny_dense, data=other_text, tokens="700", train=train,
            options=ghostlayers.RunOptions(offload=offload), **SMALL,
        )
        for offload in ("none", "disk")
    ]  # fmt: skip
    one, other = (each.outcome.looks[-1].losses for each in both)
    assert other.loss_nats == pytest.approx(one.loss_nats, rel=1e-5)
    assert other.kl_nats == pytest.approx(one.kl_nats, rel=1e-4)
    assert both[1].save(tmp_path / "healed").identical
    if train == "lora":
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert both[1].save_peft(tmp_path / "adapters").largest_difference < 1e-4
        assert not list(Path().iterdir())  # PEFT would write the whole model anew


def test_half_precision_is_trained_in_float32(pruned: Any, other_text: list[str]) -> None:
    """Updates smaller than the type's digits add up."""
    dense = DenseModel(copy.deepcopy(pruned["ghost"].dense.network).to(torch.bfloat16))
    dense.tokenizer = pruned["ghost"].dense.tokenizer
    span = pruned["ghost"].spans[0]
    network = removal.prune_layers(dense, [span], pruned["ghost"].repairs)
    cut = CutModel.of(dense, network, (span,), pruned["ghost"].record)
    trained = prepare(cut, HealingRecipe(), ("suffix",))
    state = State.begin(trained, {"suffix": 1e-6})
    name, master = next(iter(trained.masters.items()))
    before = master.detach().clone()
    for _ in range(20):
        for each in state.masters:
            each.grad = torch.ones_like(each)
        state.step(1.0)
    assert trained.parameters[name].dtype == torch.bfloat16
    torch.testing.assert_close(
        before - master.detach(), torch.full_like(before, 2e-5), rtol=0.1, atol=0
    )
    assert torch.equal(trained.parameters[name], master.to(torch.bfloat16))


@pytest.mark.slow
def test_a_planted_operator_is_found(
    trained_llama: Any, byte_tokenizer: Any, other_text: Any
) -> None:
    """Layers that do nothing are removed, and a wrong operator stands in their place."""
    network = copy.deepcopy(trained_llama)
    for layer in network.model.layers[3:5]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    dense = DenseModel(network, byte_tokenizer)
    span = Span(3, 5)
    torch.manual_seed(0)
    wrong = 0.1 * torch.randn(dense.hidden_size, dense.hidden_size)
    repair = Repair("ghost", Operator({"weight": wrong}))
    cut = CutModel.of(
        dense,
        removal.prune_layers(dense, [span], {span: repair}),
        (span,),
        {"recipe": {"repair": "ghost"}},
    )
    from ghostlayers.healed import heal_cut

    recipe = HealingRecipe(train="operator", tokens="20000", learning_rate="0.01", **SMALL)
    healed = heal_cut(cut, recipe, ghostlayers.RunOptions(), data=other_text)
    assert healed.outcome.end.kl_nats < 0.05 * healed.outcome.start.kl_nats


def test_what_is_trained_by_default_depends_on_the_memory(
    pruned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(name: str, rank: int = 16) -> tuple[str, ...]:
        return default_parts(cut_of(pruned[name]), HealingRecipe(rank=rank))

    assert chosen("ghost") == chosen("joint:x+z") == ("operator", "norms", "all")
    assert chosen("none") == ("norms", "all")
    cut = cut_of(pruned["none"])
    with monkeypatch.context() as patched:  # what is trained of it would stay in memory
        patched.setattr(cut.dense.residency, "offloaded", True)
        assert default_parts(cut, HealingRecipe()) == ("norms", "suffix")
    with monkeypatch.context() as patched:
        patched.setattr(cut.dense.residency.memory, "limit", 10_000)
        assert default_parts(cut, HealingRecipe()) == ("norms",)
    layers = sum(cut.network.get_parameter(name).numel() for name in named_parts(cut, ("all",)))
    enough = layers * parts_module.bytes_trained(cut.dense.dtype) / parts_module.SHARE_OF_MEMORY
    monkeypatch.setattr(dense_module, "memory_of", lambda _: enough)
    assert chosen("ghost", rank=1) == ("operator", "norms", "lora")
    assert chosen("none", rank=1) == ("norms", "lora")
    assert chosen("ghost", rank=64) == ("operator", "norms", "suffix")  # greater than the weights
    monkeypatch.setattr(parts_module, "has_peft", lambda: False)
    assert chosen("ghost", rank=1) == ("operator", "norms", "suffix")
    assert chosen("none", rank=1) == ("norms", "suffix")
    monkeypatch.setattr(dense_module, "memory_of", lambda _: 10_000)
    assert chosen("ghost") == ("operator", "norms")
    assert chosen("none") == ("norms",)


def test_positions_are_drawn_evenly_and_by_the_window_alone() -> None:
    length, share = 64, 0.25
    drawn = draw_positions(range(400), length, share, 5)
    assert drawn.shape == (400, positions_of(length, share)) == (400, 16)
    assert int(drawn.max()) == length - 2
    assert bool((drawn.diff(dim=1) > 0).all())
    counts = torch.bincount(drawn.flatten(), minlength=length - 1).float()
    assert float((counts - counts.mean()).abs().max()) < 5 * float(counts.mean() * 0.75) ** 0.5
    assert torch.equal(draw_positions([7], length, share, 5)[0], drawn[7])
    assert draw_positions(range(3), length, 1.0, 0).tolist() == [list(range(63))] * 3


def test_frugal_gradients_are_the_same(pruned: Any) -> None:
    ids, gradients = torch.randint(0, 200, (2, 32)), []
    for frugal in (False, True):
        trained = prepare(cut_of(pruned["ghost"]), HealingRecipe(), ("operator", "suffix"))
        with recording(trained):
            engine = Engine(trained, "kl", frugal=frugal)
            positions = draw_positions(range(2), 32, 1.0, 0)
            engine.learn(engine.teach(ids, positions), positions.numel())
        gradients.append([each.grad for each in trained.masters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# What it leaves


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repair", "train", "mode"),
    [
        ("ghost", "operator", "custom"),
        ("joint:x+z", "operator+norms+suffix", "custom"),
        ("refit:2", "suffix", "stock"),
        ("refit:2", "lora", "stock"),
        ("none", "suffix", "stock"),
    ],
)
def test_a_healed_model_is_saved_with_its_record(
    pruned: Any, other_text: list[str], repair: str, train: str, mode: str, tmp_path: Path
) -> None:
    healed = heal(pruned[repair], other_text, train=train)
    assert healed.better
    verification = healed.save(tmp_path / "healed")
    assert verification.identical
    record = ghostlayers.inspect(tmp_path / "healed")
    assert record["mode"] == mode
    row = record["healing"]
    assert row["trained"] == train.split("+")
    assert row["tokens"] == 2048
    dense, before, after = row["evidence"]
    assert dense["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert dense["loss_nats"] < before["loss_nats"]
    assert after["kl_nats"] < before["kl_nats"]
    card = (tmp_path / "healed" / "README.md").read_text()
    assert f"{row['num_trained']:,} numbers" in card
    assert f"--train {train}" in card


@pytest.mark.slow
def test_a_checkpoint_on_disk_heals_as_the_model_in_memory(
    pruned: Any, other_text: list[str], tmp_path: Path, trained_llama: Any, byte_tokenizer: Any
) -> None:
    trained_llama.save_pretrained(tmp_path / "dense")
    byte_tokenizer.save_pretrained(tmp_path / "dense")
    for repair in ("ghost", "refit:2"):
        pruned[repair].save(tmp_path / repair)
        saved = ghostlayers.heal(
            tmp_path / repair,
            against=tmp_path / "dense",
            data=other_text,
            tokens="1000",
            train="operator+norms",
            **SMALL,
        )
        memory = heal(pruned[repair], other_text, tokens="1000", train="operator+norms")
        for (name, one), other in zip(
            saved.model.named_parameters(), memory.model.parameters(), strict=True
        ):
            assert torch.equal(one, other), name
    shared = {each.data_ptr() for each in saved.cut.dense.network.parameters()}
    beside = [n for n, p in saved.cut.network.named_parameters() if p.data_ptr() not in shared]
    assert sorted(beside) == sorted(saved.cut.own)  # in memory once


@pytest.mark.slow
@pytest.mark.parametrize("train", ["operator", "operator+norms+suffix"])
def test_an_adapter_heals_into_an_adapter(
    pruned: Any, other_text: list[str], train: str, tmp_path: Path, tiny_dense: Path
) -> None:
    cut = ghostlayers.prune(str(tiny_dense), data=other_text, repair="joint:x+z", **PRUNE)
    cut.save_adapter(tmp_path / "adapter")
    healed = ghostlayers.heal(
        tmp_path / "adapter",
        against=tiny_dense,
        data=other_text,
        tokens="1000",
        train=train,
        **SMALL,
    )
    healed.save_adapter(tmp_path / "healed")
    again = ghostlayers.from_adapter(tmp_path / "healed")
    for (name, one), other in zip(
        healed.model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other[1]), name
    ghostlayers.materialize(tmp_path / "healed", tmp_path / "whole")
    assert ghostlayers.inspect(tmp_path / "whole")["healing"]["trained"] == train.split("+")


@pytest.fixture(scope="module")
def tiny_dense(
    tmp_path_factory: pytest.TempPathFactory, trained_llama: Any, byte_tokenizer: Any
) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    trained_llama.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses old names of transformers
def test_adapters_of_lora_are_kept_for_peft(
    pruned: Any, other_text: list[str], tiny_dense: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pruned["refit:2"].save(tmp_path / "cut")
    given = {"tokens": "1000", "learning_rate": "1e-3", **SMALL}
    choices = {"against": tiny_dense, "data": other_text, **given}
    healed = ghostlayers.heal(tmp_path / "cut", train="lora", **choices)
    healed.save_peft(tmp_path / "adapters")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    made = PeftModel.from_pretrained(cut, tmp_path / "adapters").eval()
    ids = torch.randint(0, 200, (1, 32))
    with torch.no_grad():
        got, want = made(input_ids=ids).logits, healed.model(input_ids=ids).logits
        bare = pruned["refit:2"].model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert float((bare - want).abs().max()) > 1e-3
    assert ghostlayers.inspect(tmp_path / "adapters")["mode"] == "peft"
    lost = {name: torch.zeros_like(each) for name, each in healed.outcome.adapters.items()}
    spoilt = replace(healed, outcome=replace(healed.outcome, adapters=lost))
    with pytest.raises(VerificationError, match="its logits differ"):
        spoilt.save_peft(tmp_path / "spoilt")
    assert not (tmp_path / "spoilt").exists()
    more = ghostlayers.heal(tmp_path / "cut", train="norms+lora", **choices)
    with pytest.raises(RecipeError, match="apart"):
        more.save_peft(tmp_path / "no")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_adapters_for_a_checkpoint_in_16_bits_are_proved(
    trained_llama: Any, byte_tokenizer: Any, other_text: list[str], tmp_path: Path, dtype: str
) -> None:
    """What is merged is rounded as it is stored; adapters are not."""
    copy.deepcopy(trained_llama).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    byte_tokenizer.save_pretrained(tmp_path / "dense")
    options = ghostlayers.RunOptions(dtype=dtype)
    ghostlayers.prune(
        str(tmp_path / "dense"), data=other_text, repair="ghost", options=options, **PRUNE
    ).save(tmp_path / "cut")
    healed = ghostlayers.heal(
        tmp_path / "cut", against=tmp_path / "dense", data=other_text, train="lora",
        tokens="1000", options=options, **SMALL,
    )  # fmt: skip
    assert healed.save_peft(tmp_path / "adapters").largest_difference > 0
    lost = {name: torch.zeros_like(each) for name, each in healed.outcome.adapters.items()}
    spoilt = replace(healed, outcome=replace(healed.outcome, adapters=lost))
    with pytest.raises(VerificationError, match="differs from the trained weight"):
        spoilt.save_peft(tmp_path / "spoilt")
    assert not (tmp_path / "spoilt").exists()


@pytest.mark.slow
def test_a_healed_checkpoint_heals_again(
    pruned: Any, other_text: list[str], tiny_dense: Path, tmp_path: Path
) -> None:
    heal(pruned["ghost"], other_text, train="suffix").save(tmp_path / "once")
    twice = ghostlayers.heal(
        tmp_path / "once",
        against=tiny_dense,
        data=other_text,
        tokens="1000",
        train="operator",
        **SMALL,
    )
    assert twice.outcome.start.kl_nats < heal(pruned["ghost"], other_text).outcome.start.kl_nats
    assert [row["trained"] for row in twice.record["healed_before"]] == [["suffix"]]
    assert twice.record["healing"]["trained"] == ["operator"]


def test_another_dense_model_is_refused(
    pruned: Any, other_text: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    pruned["ghost"].save(tmp_path / "cut")
    with pytest.raises(ModelError, match="was not made of"):
        ghostlayers.heal(tmp_path / "cut", against=tiny_folder, data=other_text, **SMALL)


# Nothing gets worse unnoticed


def test_what_gains_nothing_is_not_saved(
    pruned: Any, other_text: list[str], tmp_path: Path
) -> None:
    healed = heal(pruned["ghost"], other_text, learning_rate="5", tokens="300")
    assert not healed.better
    with pytest.raises(NoGainError, match="gained nothing"):
        healed.check_better()
    last = healed.outcome.looks[-1].losses
    assert healed.outcome.end == last
    assert last.kl_nats > healed.outcome.start.kl_nats


@pytest.mark.slow
def test_the_best_state_is_kept(pruned: Any, other_text: list[str]) -> None:
    hasty = {"learning_rate": "0.05", "train": "operator+norms"}
    healed = heal(pruned["ghost"], other_text, tokens="8000", **hasty)
    assert healed.better
    best = min(healed.outcome.looks, key=lambda look: look.losses.kl_nats)
    assert healed.outcome.best_step == best.step
    assert healed.outcome.end == best.losses


def test_one_token_repeated_gains_nothing(
    pruned: Any, other_text: list[str], tmp_path: Path
) -> None:
    held_out = tmp_path / "held.txt"
    held_out.write_text("\n\n".join(other_text))
    healed = heal(
        pruned["ghost"], ["a" * 20000], held_out=str(held_out), train="suffix", learning_rate="0.1"
    )
    assert not healed.better or healed.outcome.end.kl_nats < healed.outcome.start.kl_nats


@pytest.mark.parametrize("place", ["operator", "dense"])
def test_weights_that_are_no_numbers_stop_it(
    pruned: Any, other_text: list[str], place: str
) -> None:
    dense = DenseModel(copy.deepcopy(pruned["ghost"].dense.network), pruned["ghost"].tokenizer)
    span = pruned["ghost"].spans[0]
    network = removal.prune_layers(dense, [span], pruned["ghost"].repairs)
    name = "model.layers.2.repair_after_weight" if place == "operator" else "model.norm.weight"
    model = network if place == "operator" else dense.network
    model.get_parameter(name).data[0] = float("nan")
    cut = CutModel.of(dense, network, (span,), pruned["ghost"].record)
    from ghostlayers.healed import heal_cut

    with pytest.raises(NonFiniteError):
        heal_cut(
            cut, HealingRecipe(tokens="500", **SMALL), ghostlayers.RunOptions(), data=other_text
        )


# Interruptions


class Killed(BaseException):
    """Stands for the end of a process."""


@contextmanager
def killed_behind(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Runs that end behind a step, whose state is kept; how many steps each was to have."""
    note, planned = journal.KeptPass.note, []

    def stop(self: Any, done: int, tensors: Any, *given: Any) -> None:
        note(self, done, tensors, *given)
        if done == step:
            planned.append(int(tensors["notes"][4]))
            raise Killed

    monkeypatch.setattr(journal, "SECONDS_BETWEEN", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(journal.KeptPass, "note", stop)
        with pytest.raises(Killed):
            yield planned


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bits(
    pruned: Any, other_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {"train": "operator+norms+suffix", "tokens": "600", "positions": 0.5}
    whole = heal(pruned["joint:x+z"], other_text, **choices)
    for number in range(whole.outcome.steps):
        keep = tmp_path / f"kept-{number}"
        with killed_behind(number + 1, monkeypatch):
            heal(pruned["joint:x+z"], other_text, keep=keep, **choices)
        again = heal(pruned["joint:x+z"], other_text, keep=keep, **choices)
        for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert [look.losses for look in again.outcome.looks] == [
            look.losses for look in whole.outcome.looks
        ]
        again.save(tmp_path / f"out-{number}")
        assert not keep.exists()


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("train", ["operator", "all"])
def test_lessons_that_are_kept_are_those_computed_anew(
    pruned: Any, other_text: list[str], train: str, loss: str
) -> None:
    choices = {"train": train, "loss": loss, "tokens": "400", "learning_rate": "1e-3"}
    kept, anew = (
        heal(pruned["ghost"], other_text[:1], cache=cache, **choices) for cache in (None, "1KB")
    )
    assert kept.outcome.text.repeats[0] > 1
    for one, other in zip(kept.model.parameters(), anew.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["operator", "all"])
def test_killed_at_any_step_on_the_disk_it_ends_with_the_same_bits(
    pruned: Any,
    other_text: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: str,
) -> None:
    """A short text is gone through again, so that lessons lie on the disk beside the state."""
    monkeypatch.setattr(journal, "SECONDS_BETWEEN", 0.0)
    choices = {"train": train, "tokens": "400", "positions": 0.5}
    keep, text = tmp_path / "kept", other_text[:1]

    def work() -> Any:
        return heal(pruned["ghost"], text, keep=keep, **choices)

    whole, count = heal(pruned["ghost"], text, **choices), 0
    assert whole.outcome.text.repeats[0] > 1
    for number in itertools.count(0, 7):
        shutil.rmtree(keep, ignore_errors=True)
        if not killed_before(number, work):
            break
        count += 1
        again = work()
        for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, other)
    assert count > 4
    journal.finish(keep)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_best_state_of_an_interrupted_run_can_be_taken(
    pruned: Any, other_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "kept"
    with pytest.raises(ResumeError, match="nothing is kept"):
        heal(pruned["ghost"], other_text, keep=keep, take_kept=True)
    with killed_behind(20, monkeypatch):
        heal(pruned["ghost"], other_text, keep=keep)
    taken = heal(pruned["ghost"], other_text, keep=keep, take_kept=True)
    assert taken.better
    assert taken.outcome.steps == 20  # not those of the run: so do record and card
    assert taken.record["healing"]["tokens"] == 20 * taken.outcome.step_tokens
    assert taken.outcome.best_step <= 20
    assert taken.outcome.end.kl_nats < taken.outcome.start.kl_nats


def test_a_run_that_has_won_nothing_yet_can_still_go_on(
    pruned: Any, other_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "kept"
    with killed_behind(1, monkeypatch):
        heal(pruned["ghost"], other_text, keep=keep)
    taken = heal(pruned["ghost"], other_text, keep=keep, take_kept=True)
    with pytest.raises(NoGainError, match="Leave --keep away"):
        taken.check_better()
    assert heal(pruned["ghost"], other_text, keep=keep).outcome.looks[0] == taken.outcome.looks[0]


@pytest.mark.slow
def test_another_text_or_request_is_refused(
    pruned: Any, other_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SECONDS_BETWEEN", 0.0)
    keep = tmp_path / "kept"
    heal(pruned["ghost"], other_text, keep=keep, tokens="500")
    with pytest.raises(ResumeError, match="another"):
        heal(pruned["ghost"], other_text, keep=keep, tokens="500", train="suffix")
    with pytest.raises(ResumeError, match="training text is another"):
        heal(pruned["ghost"], other_text[::-1], keep=keep, tokens="500")


# Text


def test_shares_are_kept_and_short_texts_repeat(pruned: Any, tmp_path: Path) -> None:
    for name, letter, count in (("a", "a", 40000), ("b", "b", 400)):
        (tmp_path / f"{name}.txt").write_text(letter * count)
    data = f"{tmp_path}/a.txt:0.75,{tmp_path}/b.txt:0.25"
    recipe = HealingRecipe(data=data, **SMALL)
    text = read_text(pruned["ghost"].dense, recipe, 100)
    letters = [int(row[0]) for row in text.input_ids]
    counts = {letter: letters.count(letter) for letter in set(letters)}
    assert sorted(counts.values()) == [25, 75]
    assert text.repeats[0] < 1 < text.repeats[1]
    assert text.num_tokens == 3200
    order = "".join("a" if letter == letters[0] else "b" for letter in letters)
    assert "ab" in order
    assert "ba" in order


@settings(max_examples=300, deadline=None)
@given(
    count=st.integers(1, 5000),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
)
def test_a_mix_has_every_window_that_is_wanted(count: int, weights: list[float]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = _shared_out(count, shares)
    assert sum(max(0, n - 1) for n in counts) < count <= sum(counts)
    assert all(n == 1 or abs(n - count * s) < 1.001 for n, s in zip(counts, shares, strict=True))


def test_halves_of_an_odd_number_of_windows_train(pruned: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 4000)
    data = f"{tmp_path}/a.txt:0.5,{tmp_path}/b.txt:0.5"
    healed = heal(pruned["ghost"], data, tokens=str(5 * 32), step_tokens=32)
    assert healed.outcome.steps == 5
    assert healed.outcome.text.num_tokens == 5 * 32


def test_a_name_is_read_as_the_recipes_is(pruned: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 4000)
    data = f"{tmp_path}/a.txt:0.75,{tmp_path}/b.txt:0.25"
    healed = heal(pruned["ghost"], data, tokens="256")
    assert healed.outcome.text.shares == (0.75, 0.25)
    assert [each["share"] for each in healed.record["healing"]["corpora"]] == [0.75, 0.25]


def test_held_out_windows_are_not_trained_on(pruned: Any, other_text: list[str]) -> None:
    recipe = HealingRecipe(**SMALL)
    text = read_text(pruned["ghost"].dense, recipe, 50, other_text)
    trained = {tuple(row) for row in text.input_ids.tolist()}
    assert len(text.held_out) == 3
    assert not trained & {tuple(row) for row in text.held_out.input_ids.tolist()}
    assert not text.other


def test_too_short_a_text_is_refused(pruned: Any) -> None:
    with pytest.raises(WindowError, match="too short to hold"):
        read_text(pruned["ghost"].dense, HealingRecipe(**SMALL), 4, ["x" * 40])


# What is asked


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train": "suffixes"}, "did you mean|suffix"),
        ({"train": "all+lora"}, "leave one of the two out"),
        ({"train": "norms+norms"}, "twice"),
        ({"tokens": "many"}, "such as 25000"),
        ({"tokens": "0"}, "such as 25000"),
        ({"tokens": "1k", "minutes": 1.0}, "not both"),
        ({"minutes": -1.0}, "above 0 and below 1,000,000"),
        ({"minutes": 1e7}, "above 0 and below 1,000,000"),
        ({"minutes": float("nan")}, "above 0"),
        ({"tokens": "2000B"}, "from 1 to 1000B"),
        ({"learning_rate": "fast"}, "above 0 and below 10"),
        ({"learning_rate": "1e9"}, "above 0 and below 10"),
        ({"learning_rate": "suffixe=1e-4"}, "nothing is called"),
        ({"train": "norms", "learning_rate": "1e-3,all=1e-4"}, "what is trained is norms"),
        ({"train": "operator+all", "learning_rate": "lora=1e-4"}, "trained is operator"),
        ({"train": "suffix", "modules": "q_proj"}, "--modules is said of the adapters"),
        ({"train": "all", "rank": 8}, "--rank is said of the adapters"),
        ({"positions": 0.0}, "above 0"),
        ({"positions": 1.5}, "above 0"),
        ({"sequence_length": 1}, "between 2"),
        ({"held_out_windows": 0}, "between 1"),
        ({"rank": 0}, "between 1"),
        ({"data": "a:0.5,b"}, "or none"),
        ({"data": "a:0"}, "above 0 and below 1e9"),
        ({"data": "a:1e10,b:1"}, "above 0 and below 1e9"),
        ({"loss": "mse"}, "one of"),
        ({"seed": -1}, "seed"),
        ({"epochs": 3}, "unknown key"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        HealingRecipe.from_dict(given)


def test_a_number_stands_for_its_text() -> None:
    recipe = HealingRecipe.from_dict({"tokens": 25000, "learning_rate": 0.0001})
    assert recipe == HealingRecipe(tokens="25000", learning_rate="0.0001")
    assert recipe.rates["norms"] == 1e-4
    assert ghostlayers.Recipe(remove=12) == ghostlayers.Recipe(remove="12")
    for nothing in ({"tokens": True}, {"tokens": -5}, {"learning_rate": float("nan")}):
        with pytest.raises(RecipeError):
            HealingRecipe.from_dict(nothing)
    with pytest.raises(ghostlayers.GhostlayersError):
        ghostlayers.Recipe(remove=1.5).removed()


def test_amounts_shares_and_budgets_are_read() -> None:
    assert HealingRecipe(tokens="400k").num_tokens == 400_000
    assert HealingRecipe(tokens="1.5M").num_tokens == 1_500_000
    assert HealingRecipe(tokens="25,000").num_tokens == 25_000
    assert HealingRecipe().seconds == 300.0
    assert HealingRecipe(tokens="1k").seconds is None
    assert read_mix("c4:3,mine.jsonl:1") == (("c4", 0.75), ("mine.jsonl", 0.25))
    assert read_mix("c4,org/name:config:train") == (("c4", 0.5), ("org/name:config:train", 0.5))
    assert read_budget("5min") == {"minutes": 5.0}
    assert read_budget("90s") == {"minutes": 1.5}
    assert read_budget("1M") == {"tokens": "1M"}
    assert read_budget("1m") == {"minutes": 1.0}
    for text in ("", "fast", "5", "-1min", "5 parsecs"):
        with pytest.raises(RecipeError, match="budget"):
            read_budget(text)
    rates = HealingRecipe(learning_rate="operator=1e-5,norms=2e-3").rates
    assert (rates["operator"], rates["norms"]) == (1e-5, 2e-3)
    assert set(HealingRecipe(learning_rate="1e-5").rates.values()) == {1e-5}
    rates = HealingRecipe(learning_rate="norms=2e-3,1e-5").rates
    assert (rates["operator"], rates["norms"]) == (1e-5, 2e-3)


def test_the_schedule_rises_and_falls() -> None:
    for steps in (1, 2, 7, 100, 4000):
        rates = [schedule.rate(step, steps) for step in range(steps)]
        top = rates.index(max(rates))
        assert max(rates) == pytest.approx(1.0)
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert min(rates[top:]) >= schedule.LAST_RATE
        work = schedule.Work(30, 24, 12, 8, 0.25)
        looks = schedule.looks(steps, 1024, 8192, work)
        assert looks[-1] == steps
        assert len(looks) <= schedule.MOST_LOOKS


@settings(max_examples=300, deadline=None)
@given(
    seconds=st.floats(-10, 1000),
    step=st.floats(0.001, 100),
    look=st.floats(0, 100),
    bounds=st.lists(st.integers(1, 5000), min_size=2, max_size=2),
)
def test_a_time_is_for_training_and_for_looking(
    seconds: float, step: float, look: float, bounds: list[int]
) -> None:
    work = schedule.Work(teacher=30, student=24, forward=12, head=8, share=0.25)
    least, most = sorted(bounds)

    def looks(steps: int) -> int:
        return len(schedule.looks(steps, 256, 2048, work))

    def takes(steps: int) -> float:
        return steps * step + looks(steps) * look

    steps = schedule.steps_within(seconds, step, look, looks, (least, most))
    assert least <= steps <= most
    assert steps == least or takes(steps) <= seconds
    assert steps == most or takes(steps + 1) > seconds


def test_steps_are_timed_until_they_are_as_fast_as_those_of_a_run() -> None:
    least, most = schedule.TRIALS
    for seconds, steady in itertools.product((1.0, 120.0, 900.0), (0.01, 0.7, 5.0, 60.0)):
        slow = [1.9, 1.6, 1.35, 1.3]  # as measured
        count = schedule.trials(seconds, slow[0] * steady)
        assert least <= count <= most
        taken = [steady * factor for factor in [*slow, *[1.0] * most][:count]]
        assert count == least or sum(taken) <= schedule.SHARE_OF_TRIALS * seconds
        if count >= 8:  # a stray slow one is none's matter
            taken[-2] *= 3.0
            assert schedule.steady(taken) == pytest.approx(steady)


def test_measuring_takes_a_share_of_the_time_of_training() -> None:
    work = schedule.Work(teacher=30, student=24, forward=12, head=8, share=0.25)
    least, most = schedule.HELD_OUT
    counts = [schedule.held_out_windows(tokens, 256, work) for tokens in range(1000, 10**6, 7000)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (least, most)
    for tokens in (50_000, 100_000, 150_000):
        count = schedule.held_out_windows(tokens, 256, work)
        share = count * 256 * (30 + 2 * 28) / (tokens * 61)
        assert least < count < most
        assert share == pytest.approx(schedule.SHARE_OF_LOOKS, rel=0.05)


# The command


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, pruned: Any, other_text: list[str]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heal")
    (folder / "text.txt").write_text("\n\n".join(other_text))
    pruned["ghost"].save(folder / "cut")
    return {"cut": folder / "cut", "text": folder / "text.txt"}


def heal_command(files: dict[str, Path], dense: Path, out: Path, *more: Any) -> Any:
    return run(
        "heal", files["cut"], "--against", dense, "-o", out, "--data", files["text"],
        "--sequence-length", 32, "--held-out-windows", 3, "--step-tokens", 64, *more,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_a_healed_checkpoint(
    files: dict[str, Path], tiny_dense: Path, tmp_path: Path
) -> None:
    done = heal_command(files, tiny_dense, tmp_path / "out", "--tokens", "2k")
    assert done.exit_code == 0, done.output
    assert "Left of what was lost" in done.output
    assert "are of the training text" in done.output
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]
    shown = run("inspect", tmp_path / "out")
    assert "Trained operator + norms" in shown.output
    again = heal_command(files, tiny_dense, tmp_path / "out", "--tokens", "2k")
    assert again.exit_code == 1
    assert "exists" in again.output


@pytest.mark.slow
def test_the_command_leaves_nothing_that_is_worse(
    files: dict[str, Path], tiny_dense: Path, tmp_path: Path
) -> None:
    worse = ("--tokens", "300", "--learning-rate", "5")
    done = heal_command(files, tiny_dense, tmp_path / "out", *worse)
    assert done.exit_code == 1
    assert "gained nothing" in done.output
    assert not list(tmp_path.iterdir())
    done = heal_command(files, tiny_dense, tmp_path / "out", *worse, "--keep-worse")
    assert done.exit_code == 0, done.output
    evidence = json.loads((tmp_path / "out" / "ghostlayers.json").read_text())["healing"][
        "evidence"
    ]
    assert evidence[2]["kl_nats"] > evidence[1]["kl_nats"]


def test_the_command_says_what_it_will_take(
    files: dict[str, Path], tiny_dense: Path, tmp_path: Path
) -> None:
    done = heal_command(files, tiny_dense, tmp_path / "out", "--tokens", "2k", "--plan")
    assert done.exit_code == 0, done.output
    assert "Training operator + norms" in done.output
    assert not list(tmp_path.iterdir())


def test_the_command_needs_a_text(files: dict[str, Path], tiny_dense: Path, tmp_path: Path) -> None:
    done = run("heal", files["cut"], "--against", tiny_dense, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "no training text" in done.output


def test_timing_a_step_changes_nothing(pruned: Any) -> None:
    cut = cut_of(pruned["ghost"])
    trained = prepare(cut, HealingRecipe(**SMALL), ("operator", "suffix"))
    state = State.begin(trained, HealingRecipe().rates)
    before = {name: each.clone() for name, each in state.tensors().items()}
    ids = torch.randint(3, 90, (2, 9))
    positions = draw_positions(range(2), 9, 1.0, 0)
    with recording(trained):
        engine = Engine(trained, "kl")
        engine.learn(engine.teach(ids, positions), positions.numel())
        assert all(master.grad is not None for master in state.masters)
        state.rehearse()
        state.masters[0].grad = torch.full_like(state.masters[0], torch.nan)
        state.rehearse()
        state.forget()
    assert all(master.grad is None for master in state.masters)
    after = state.tensors()
    assert all(torch.equal(each, after[name]) for name, each in before.items())


@pytest.mark.parametrize("step_tokens", [32, 64, 128])
def test_a_run_has_as_many_steps_as_its_time_holds(
    pruned: Any, other_text: list[str], monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    monkeypatch.setattr(schedule, "steady", lambda taken: 0.1)
    choices = {"learning_rate": 1e-4, "step_tokens": step_tokens, "minutes": 0.05, "tokens": None}
    outcome = heal(pruned["ghost"], other_text, **choices).outcome
    assert outcome.step_tokens == step_tokens
    assert 15 <= outcome.steps <= 30  # three seconds, half of them at least for training


def test_time_that_is_spent_before_is_not_trained(
    pruned: Any, other_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer steps than text was read for; and as many in a run that goes on."""
    monkeypatch.setattr(schedule, "steady", lambda taken: 0.1)
    keep = tmp_path / "kept"

    def spend(self: Training, state: State, *given: Any) -> None:
        state.notes[3] += 1.0

    choices = {"tokens": None, "minutes": 0.05, "learning_rate": "1e-4", "keep": keep}
    with monkeypatch.context() as patch, killed_behind(1, monkeypatch) as steps:
        patch.setattr(Training, "_fit_rates", spend)
        heal(pruned["ghost"], other_text, **choices)
    outcome = heal(pruned["ghost"], other_text, **choices).outcome
    assert [outcome.steps] == steps
    assert 15 <= outcome.steps <= 20
    assert outcome.text.num_tokens == outcome.steps * outcome.step_tokens


@pytest.mark.slow
def test_a_budget_of_time_is_kept(pruned: Any, other_text: list[str]) -> None:
    healed = heal(pruned["ghost"], other_text, tokens=None, minutes=0.05)
    assert healed.outcome.steps > 3
    assert cuts.LOGITS_AT_ONCE  # the engine's chunks are those of losses


@pytest.mark.parametrize(
    ("made", "train", "save", "says"),
    [
        ({"--save": "adapter"}, "lora", "peft", "lies in no folder"),
        ({}, "operator+lora", "peft", "trained is operator + lora"),
        ({"--repair": "normed", "--export": "stock-layer"}, "norms", "adapter", "layer of its own"),
    ],
)
def test_a_form_that_there_is_not_is_refused_before_training(
    files: dict[str, Path],
    tiny_dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: dict[str, str],
    train: str,
    save: str,
    says: str,
) -> None:
    cut = tmp_path / "cut"
    options = [each for pair in made.items() for each in pair]
    assert prune_command(files, tiny_dense, cut, *options).exit_code == 0

    def never(*_: Any) -> None:
        raise AssertionError("it was opened for nothing")

    monkeypatch.setattr(heal_command_module, "open_model", never)
    asked = ("--train", train, "--save", save)
    done = heal_command({**files, "cut": cut}, tiny_dense, tmp_path / "out", *asked)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert [each.name for each in tmp_path.iterdir()] == ["cut"]


def prune_command(files: dict[str, Path], dense: Path, out: Path, *more: Any) -> Any:
    return run(
        "prune", dense, "-o", out, "--remove", "3-4", "--data", files["text"], "--windows", 8,
        "--held-out-windows", 2, "--sequence-length", 64, *more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("save", ["checkpoint", "adapter"])
def test_pruning_and_healing_in_one_command(
    files: dict[str, Path], tiny_dense: Path, tmp_path: Path, save: str
) -> None:
    """The windows are no longer than the recipe's: this model has positions for 128 tokens."""
    done = prune_command(files, tiny_dense, tmp_path / "out", "--heal", "2k", "--save", save)
    assert done.exit_code == 0, done.output
    assert "Left of what was lost" in done.output
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    record = ghostlayers.inspect(tmp_path / "out")
    assert record["healing"]["recipe"]["sequence_length"] == 64
    assert record["healing"]["tokens"] == 2048
    assert record["cut"]["removed"] == [3, 4]


def test_what_cannot_be_healed_in_one_command_is_refused_at_once(
    files: dict[str, Path], tiny_dense: Path, tmp_path: Path
) -> None:
    for out, budget, says in (
        ("out", "soon", "is no budget"), ("out.gguf", "2min", "writes a folder, not a GGUF file")
    ):  # fmt: skip
        done = prune_command(files, tiny_dense, tmp_path / out, "--heal", budget)
        assert done.exit_code == 2
        assert says in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("train", ["operator", "operator+norms+suffix", "lora", "operator+lora"])
def test_a_repair_that_is_a_layer_is_healed_as_one(
    trained_llama: Any, byte_tokenizer: Any, other_text: list[str], tmp_path: Path, train: str
) -> None:
    cut = ghostlayers.prune(
        trained_llama, tokenizer=byte_tokenizer, data=other_text, repair="normed",
        export="stock-layer", **PRUNE,
    )  # fmt: skip
    healed = heal(cut, other_text, train=train)
    assert healed.better
    before, after = weights_of(cut.model), weights_of(healed.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    if train == "operator":
        assert changed <= {f"model.layers.3.mlp.down_proj.{leaf}" for leaf in ("weight", "bias")}
    if train == "operator+lora":  # nothing is trained twice
        assert "model.layers.3.mlp.down_proj" not in healed.outcome.adapted
        assert "model.layers.3.mlp.down_proj.weight" in changed
    assert healed.save(tmp_path / "healed").identical
    assert ghostlayers.inspect(tmp_path / "healed")["mode"] == "stock-layer"
    saved = ghostlayers.heal(
        tmp_path / "healed", against=DenseModel(trained_llama, byte_tokenizer), data=other_text,
        tokens="300", train="norms", **SMALL,
    )  # fmt: skip
    assert saved.outcome.start.kl_nats == pytest.approx(healed.outcome.end.kl_nats, rel=1e-4)


def test_adapters_without_peft_are_refused_by_name(
    pruned: Any, other_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostlayers.healing.adapters.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="not installed: pip install peft"):
        heal(pruned["ghost"], other_text, train="operator+lora")


def test_rates_are_lowered_to_what_the_model_bears(
    pruned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostlayers.healing.rates.SHARE", 1.0)
    cut = cut_of(pruned["ghost"])
    trained = prepare(cut, HealingRecipe(**SMALL), ("operator", "suffix"))
    ids = torch.randint(3, 90, (4, 17), generator=torch.Generator().manual_seed(1))
    parts, high = ["operator", "suffix"], torch.tensor([0.3, 0.03], dtype=torch.float64)
    with recording(trained):
        engine = Engine(trained, "kl")
        before = {name: each.detach().clone() for name, each in trained.masters.items()}
        room = {name: torch.zeros_like(each) for name, each in before.items()}
        found = fitting_rates(engine, parts, high, ids, 1.0, room)
        again = fitting_rates(engine, parts, found, ids, 1.0, room)
        assert not any(each.any() for each in room.values())
        assert all(torch.equal(each, before[name]) for name, each in trained.masters.items())
        assert all(each.grad is None for each in trained.masters.values())
        for part, rate in zip(parts, found.tolist(), strict=True):
            losses = [literal_step(engine, part, step * rate, ids) for step in (3.0, 1.0)]
            assert losses[0] <= min(losses[1], literal_step(engine, part, 0.0, ids)) + 1e-9
            assert literal_step(engine, part, 9.0 * rate, ids) > losses[0]
    assert (found < high).all()
    assert torch.equal(again, found)


def literal_step(engine: Engine, part: str, rate: float, ids: torch.Tensor) -> float:
    """The loss of the last two windows, behind a step against the first two's gradient's signs."""
    trained = engine.trained
    for window in ids[:2].split(1):
        positions = draw_positions(range(1), 17, 1.0, 0)
        engine.learn(engine.teach(window, positions), positions.numel())
    held = {name: each.detach().clone() for name, each in trained.masters.items()}
    with torch.no_grad():
        for name, master in trained.masters.items():
            if trained.parts[name] == part:
                master -= rate * master.grad.sign()
            master.grad = None
    loss = 0.0
    for window in ids[2:].split(1):
        positions = draw_positions(range(1), 17, 1.0, 1)
        loss += engine.learn(engine.teach(window, positions), 1.0)
    for name, master in trained.masters.items():
        master.data.copy_(held[name])
        master.grad = None
    return loss


class Parabola:
    """The loss behind a step, of a slope and a curvature."""

    def __init__(self, slope: float, curvature: float) -> None:
        self.slope, self.curvature = slope, curvature

    def loss(self, rate: float) -> float:
        return 5.0 + self.slope * rate + self.curvature * rate**2


@pytest.mark.parametrize("fitting", [1.0, 0.4, 0.1, 0.02])
def test_a_rate_does_not_depend_on_which_way_a_draw_leads(fitting: float) -> None:
    # A step three times as long helps as much where 8 c r is at most 2 s.
    fits = [_longest(Parabola(s, 0.25 / fitting), 5.0, 1.0) for s in (-1.0, 1.0)]
    assert fits[0] == fits[1] <= fitting < 3 * fits[0]


@pytest.mark.parametrize("seed", range(20))
def test_rounding_does_not_lower_a_rate(seed: int) -> None:
    """What rounding adds is as large as what a step of the highest rate does."""
    draw = random.Random(seed)

    class Rounded(Parabola):
        def loss(self, rate: float) -> float:
            return super().loss(rate) + draw.uniform(-0.3, 0.3)

    steps = Rounded(-0.01, 0.01)
    start = steps.loss(0.0)
    noise = _noise(steps, start, 1e-3)
    assert 0 < noise <= 1.2
    assert _longest(steps, start, 1.0, lambda: noise) >= 3.0**-2
    steps = Rounded(-1.0, 100.0)
    assert _longest(steps, start, 1.0, lambda: noise) <= 3.0**-1


def test_harm_that_no_longer_grows_is_not_taken_for_a_slope() -> None:
    class Cliff(Parabola):
        def loss(self, rate: float) -> float:
            return min(super().loss(rate), 9.0)

    assert _longest(Cliff(-1.0, 100.0), 5.0, 1.0) == pytest.approx(3.0**-6)
    assert _longest(Cliff(1.0, 100.0), 5.0, 1.0) == pytest.approx(3.0**-6)


def test_rates_are_not_tried_on_windows_that_they_follow(
    pruned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a short text is gone through again, its windows are tried once."""
    given: list[torch.Tensor] = []

    def remembered(*arguments: Any) -> torch.Tensor:
        given.append(arguments[3])
        return fitting_rates(*arguments)

    monkeypatch.setattr("ghostlayers.healing.training.fitting_rates", remembered)
    heal(pruned["ghost"], ["one short text, which is gone through again. " * 6], tokens="2000")
    rows = {tuple(row) for row in given[0].tolist()}
    assert len(rows) == len(given[0]) < 2000 / 32


def test_a_trial_records_nothing(pruned: Any, other_text: list[str]) -> None:
    cut = cut_of(pruned["ghost"])
    trained = prepare(cut, HealingRecipe(**SMALL), ("norms",))
    text = read_text(cut.dense, HealingRecipe(**SMALL), 2, other_text).input_ids
    with recording(trained):
        engine = Engine(trained, "kl")
        lesson = engine.teach(text, draw_positions(range(2), 32, 1.0, 0))
        for head in (engine.head, None):
            engine.head = head
            engine.loss(engine.teach(text, lesson.positions))
            assert all(master.grad is None for master in trained.masters.values())


def test_the_work_of_a_trial_is_what_it_runs(
    pruned: Any, other_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rates fit: the dense model on all windows, steps on half, losses of the rest."""
    cut = cut_of(pruned["ghost"])
    parts = ("operator", "norms", "suffix")
    trained = prepare(cut, HealingRecipe(**SMALL), parts)
    text = read_text(cut.dense, HealingRecipe(**SMALL), 16, other_text).input_ids
    highest = torch.full((3,), 1e-6, dtype=torch.float64)
    ran = dict.fromkeys(("teach", "learn", "loss"), 0)
    for name in ran:
        real = getattr(Engine, name)

        def counted(self: Any, *given: Any, name: str = name, real: Any = real) -> Any:
            ran[name] += 1
            return 0.0 if name == "loss" else real(self, *given)

        monkeypatch.setattr(Engine, name, counted)
    with recording(trained):
        room = {name: torch.zeros_like(each) for name, each in trained.masters.items()}
        fitting_rates(Engine(trained, "kl"), parts, highest, text, 1.0, room)
    assert (ran["teach"], ran["learn"]) == (2 * WINDOWS, WINDOWS)
    work = schedule.Work(teacher=8.0, student=12.0, forward=4.0, head=2.0, share=1.0)
    head = schedule.HEADS * work.head * SHARE
    layers = ran["teach"] * work.teacher + ran["learn"] * (work.student + head)
    wanted = 32 * (layers + ran["loss"] * (work.forward + head)) / work.of_training
    assert work_of_trial(len(parts), 32, work) == pytest.approx(wanted)
    assert work_of_trial(0, 32, work) == 0.0


def test_rates_that_are_named_are_taken_as_they_are(pruned: Any, other_text: list[str]) -> None:
    told = {"learning_rate": "operator=0.3,norms=1e-9", "train": "operator+norms+suffix"}
    healed = heal(pruned["ghost"], other_text, tokens="64", **told)
    rates = healed.outcome.rates
    assert (rates["operator"], rates["norms"]) == (0.3, 1e-9)
    assert 0 < rates["suffix"] <= LEARNING_RATES["suffix"]
    assert healed.record["healing"]["learning_rates"] == rates
