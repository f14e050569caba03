"""Vision-language models: cut in their text part, saved whole, asked about an image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil
from transformers import LlavaProcessor as Processor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

import ghostlayers
import seeing
from asker import logits_of
from conftest import make_byte_tokenizer
from forked import Forks
from ghostlayers import modeling
from ghostlayers.checkpoint import hub, proof
from ghostlayers.cli.app import app
from ghostlayers.errors import GhostlayersError, ModelError, RecipeError, UnsupportedModelError
from ghostlayers.healing.parts import default_parts
from ghostlayers.model import multimodal
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import RunOptions
from ghostlayers.spans import Span
from ghostlayers.surgery.removal import prune_layers

CUT = [name for name in seeing.FAMILIES if name != "paligemma"]
PLANTED = (3, 4)
"""Layers that write nothing."""

WRITERS = ("o_proj", "out_proj", "down_proj", "feed_forward.experts.down_proj")
FEW: dict[str, Any] = {
    "windows": 4,
    "fit_windows": 4,
    "held_out_windows": 2,
    "sequence_length": 48,
}


def planted(name: str, **text: Any) -> Any:
    """A model two of whose decoder layers hand the stream on as it is."""
    model = seeing.build(name, **text)
    layers = multimodal.text_view(model).text_part
    for path, parameter in layers.named_parameters():
        number = next((int(part) for part in path.split(".") if part.isdigit()), None)
        if number in PLANTED and any(f"{writer}" in path for writer in WRITERS):
            parameter.zero_()
    return model


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


KINDS = [*(name.split()[0] for name in CUT), "siglip", "clip", "pixtral", "qwen2", "cohere2"]


@pytest.fixture(autouse=True, scope="module")
def asked() -> Iterator[Forks]:
    """Importing a family takes longer than loading one of these models."""
    modules = [f"transformers.models.{kind}.modeling_{kind}" for kind in dict.fromkeys(KINDS)]
    forks = Forks(modules, isolated=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "_run_alone", forks.run)
        yield forks
    forks.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_byte_tokenizer(bos=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Every family, saved with its tokenizer and a processor's files."""
    place = tmp_path_factory.mktemp("dense")
    for name in CUT:
        planted(name).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        settings = {
            "image_processor_type": "CLIPImageProcessor",
            "auto_map": {"AutoProcessor": "x.Y"},
        }
        (place / name / "preprocessor_config.json").write_text(json.dumps(settings))
        (place / name / "chat_template.jinja").write_text("{{ messages }}")
    return place


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, folders: Path, some_text: list[str]
) -> tuple[Path, dict[str, Any]]:
    """Every family without its planted layers, and the models in memory."""
    place, models = tmp_path_factory.mktemp("cut"), {}
    for name in CUT:
        pruned = ghostlayers.prune(
            folders / name, remove="3-4", repair="none", data=some_text, **FEW
        )
        assert pruned.save(place / name).identical
        models[name] = pruned
    return place, models


@pytest.fixture(scope="module")
def answers(
    saved: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, asked: Forks
) -> dict[str, Any]:
    """What one fresh process gets of all of them."""
    scratch = tmp_path_factory.mktemp("asked")
    return ask(asked, saved[0], {name: seeing.question(name) for name in CUT}, scratch)


def ask(forks: Forks, folder: Path, questions: dict[str, Any], scratch: Path) -> dict[str, Any]:
    torch.save(questions, scratch / "request.pt")
    program = str(Path(__file__).parent / "asker.py")
    places = [str(path) for path in (folder, scratch / "request.pt", scratch / "answers.pt")]
    done = forks.run(program, places, {})
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = torch.load(scratch / "answers.pt", weights_only=False)
    return answers


@pytest.mark.parametrize("name", CUT)
def test_the_sweep_is_the_whole_model(name: str) -> None:
    """On text: a layer at a time, and not through the tower, which has as many layers."""
    model = seeing.build(name)
    layerwise = DenseModel(multimodal.text_view(model))
    ids = torch.arange(10, 40)[None]
    batch, stream = layerwise.begin(ids)
    for layer in range(layerwise.num_layers):
        stream = layerwise.run_layer(layer, batch, stream)
    whole = logits_of(model, {"input_ids": ids})
    assert torch.equal(layerwise.logits(batch, stream), whole)


@pytest.mark.parametrize("name", CUT)
def test_a_cut_model_answers_about_an_image(
    name: str, folders: Path, saved: tuple[Path, dict[str, Any]], answers: dict[str, Any]
) -> None:
    """In a fresh process, as in memory, and as the dense model where nothing was lost."""
    question = seeing.question(name)
    model = saved[1][name].model
    here = logits_of(model, question)
    assert torch.equal(answers[name]["logits"], here)
    dense = AutoModelForImageTextToText.from_pretrained(folders / name).eval()
    assert torch.allclose(here, logits_of(dense, question), atol=1e-5)
    changed = {**question, "pixel_values": question["pixel_values"] + 1}
    assert (logits_of(model, changed) - here).abs().max() > 1e-4, "it does not see the image"


@pytest.mark.parametrize("name", CUT)
def test_a_cut_model_writes_with_a_cache_what_it_writes_without(
    name: str, answers: dict[str, Any]
) -> None:
    assert torch.equal(answers[name]["cached"], answers[name]["uncached"])


@pytest.mark.parametrize("name", CUT)
def test_all_but_the_text_layers_stays(
    name: str, folders: Path, saved: tuple[Path, dict[str, Any]]
) -> None:
    before = AutoModelForImageTextToText.from_pretrained(folders / name)
    after = AutoModelForImageTextToText.from_pretrained(saved[0] / name)
    assert type(after) is type(before)
    layers = next(
        path
        for path, module in before.named_modules()
        if module is multimodal.text_view(before).text_part
    )
    old, new = before.state_dict(), after.state_dict()
    names = {path: path for path in old if not _layer_of(path, layers)}
    for path in old:
        if (number := _layer_of(path, layers)) is not None and number not in PLANTED:
            to = number if number < PLANTED[0] else number - len(PLANTED)
            names[path] = path.replace(f"layers.{number}.", f"layers.{to}.")
    names = {path: to for path, to in names.items() if _layer_of(path, layers) not in PLANTED}
    assert set(names.values()) == set(new)
    assert all(torch.equal(old[path], new[to]) for path, to in names.items())
    in_files = [set(load_file(place / name / "model.safetensors")) for place in (folders, saved[0])]
    assert in_files[1] < in_files[0], "tensors are called as the base's files call them"


def _layer_of(path: str, part: str) -> int | None:
    inside = path.removeprefix(f"{part}.").removeprefix("model.")
    inside = inside if path.startswith(f"{part}.") else ""
    return int(inside.split(".")[1]) if inside.startswith("layers.") else None


def without_old_spellings(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """What older readers call some entries is written beside them."""
    for part, base in ((new, old), (new["text_config"], old["text_config"])):
        for name in modeling.old_spellings({**part, "dtype": "float32"}):
            if name not in base:
                part.pop(name, None)
    return new


@pytest.mark.parametrize("name", CUT)
def test_the_config_is_the_base_models_but_for_the_layers(
    name: str, folders: Path, saved: tuple[Path, dict[str, Any]]
) -> None:
    old, new = (
        json.loads((place / name / "config.json").read_text()) for place in (folders, saved[0])
    )
    for part in ("text_config", "vision_config"):  # the type of the weights, where nothing was said
        assert new[part].pop("dtype") == old[part].pop("dtype", "float32")
    assert new["text_config"].pop("num_hidden_layers") == 4
    assert old["text_config"].pop("num_hidden_layers") == 6
    for key in [key for key in old["text_config"] if isinstance(old["text_config"][key], list)]:
        if len(old["text_config"][key]) == 6:
            values = [
                value for at, value in enumerate(old["text_config"].pop(key)) if at < 3 or at > 4
            ]
            assert new["text_config"].pop(key) == values
    if name == "llama4":  # which layers have experts: their numbers
        assert old["text_config"].pop("moe_layers") == [1, 3, 5]
        assert new["text_config"].pop("moe_layers") == [1, 3]
    if "max_window_layers" in old["text_config"]:  # layers before those that slide, if any do
        assert old["text_config"].pop("max_window_layers") >= 6
        assert new["text_config"].pop("max_window_layers") == 4
    assert without_old_spellings(new, old) == old


def test_the_dense_model_stays_as_it_was(tokenizer: Any, some_text: list[str]) -> None:
    model = seeing.build("gemma3")
    config, weights = model.config.to_dict(), tensors_of(model)
    question = seeing.question("gemma3")
    before = logits_of(model, question)
    pruned = ghostlayers.prune(
        model, tokenizer=tokenizer, remove="1-2", repair="refit:1", data=some_text, **FEW
    )
    assert type(pruned.model) is type(model)
    assert pruned.model.config.text_config.num_hidden_layers == 4
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, question), before)


def test_the_processors_files_travel_without_code(saved: tuple[Path, dict[str, Any]]) -> None:
    for name in CUT:
        settings = json.loads((saved[0] / name / "preprocessor_config.json").read_text())
        assert settings == {"image_processor_type": "CLIPImageProcessor"}
        assert (saved[0] / name / "chat_template.jinja").read_text() == "{{ messages }}"
        card = (saved[0] / name / "README.md").read_text()
        assert "AutoModelForImageTextToText" in card
        assert "AutoProcessor" in card


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_of_the_processor_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ModelError, match="preprocessor_config"):
        multimodal.read_processor(tmp_path)


@pytest.mark.slow
def test_a_picture_goes_through_the_saved_processor(
    tmp_path: Path, some_text: list[str], asked: Forks
) -> None:
    """From a model and a processor in memory, folded repair and all."""
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    place = tokenizer.convert_tokens_to_ids("<image>")
    model = seeing.build("llava", vocab_size=260)
    model.config.image_token_id = place
    size = {"height": 16, "width": 16}
    processor = Processor(
        CLIPImageProcessorPil(size=size, crop_size=size), tokenizer,
        patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    pruned = ghostlayers.prune(
        model, tokenizer=processor, remove="2-3", repair="refit:2:ridge=auto", data=some_text, **FEW
    )
    pruned.save(tmp_path / "out")
    question = {
        "images": Image.effect_noise((20, 24), 80).convert("RGB"),
        "text": "What is in <image> here?",
    }
    answer = ask(asked, tmp_path, {"out": question}, tmp_path)["out"]
    inputs = dict(processor(**question, return_tensors="pt"))
    assert torch.equal(answer["logits"], logits_of(pruned.model, inputs))
    assert torch.equal(answer["cached"], answer["uncached"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "llama4"])
def test_repairs_fold_into_the_whole_model(
    name: str, folders: Path, tmp_path: Path, some_text: list[str]
) -> None:
    pruned = ghostlayers.prune(
        folders / name, layers=2, select="angular", repair="refit:1", data=some_text, **FEW
    )
    assert pruned.save(tmp_path / "out").identical
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    question = seeing.question(name)
    assert torch.equal(logits_of(again, question), logits_of(pruned.model, question))


@pytest.mark.slow
def test_weights_are_stored_in_the_type_they_had(
    tmp_path: Path, tokenizer: Any, some_text: list[str]
) -> None:
    seeing.build("llava").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    pruned = ghostlayers.prune(
        tmp_path / "base", remove="2", repair="none", data=some_text,
        options=RunOptions(dtype="float32"), **FEW,
    )  # fmt: skip
    pruned.save(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {config["dtype"], *(config[p]["dtype"] for p in ("text_config", "vision_config"))} == {
        "bfloat16"
    }
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_an_adapter_makes_the_whole_model_again(
    folders: Path, tmp_path: Path, some_text: list[str]
) -> None:
    pruned = ghostlayers.prune(
        folders / "llava", remove="2", repair="refit:1", data=some_text, **FEW
    )
    pruned.save_adapter(tmp_path / "adapter")
    model = ghostlayers.from_adapter(tmp_path / "adapter")
    assert type(model) is type(pruned.model)
    question = seeing.question("llava")
    assert torch.equal(logits_of(model, question), logits_of(pruned.model, question))
    ghostlayers.materialize(tmp_path / "adapter", tmp_path / "whole")
    assert (tmp_path / "whole/preprocessor_config.json").is_file()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits_of(again, question), logits_of(pruned.model, question))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "llama4", "mistral3"])
def test_a_model_larger_than_memory(
    name: str, folders: Path, tmp_path: Path, saved: tuple[Path, dict[str, Any]],
    some_text: list[str],
) -> None:  # fmt: skip
    pruned = ghostlayers.prune(
        folders / name, remove="3-4", repair="none", data=some_text,
        options=RunOptions(offload="disk"), **FEW,
    )  # fmt: skip
    pruned.save(tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    question = seeing.question(name)
    expected = logits_of(saved[1][name].model, question)
    assert torch.equal(logits_of(again, question), expected)


def test_layers_that_get_image_features_stay(tokenizer: Any, some_text: list[str]) -> None:
    """Qwen 3-VL adds features of its tower behind the first layers, by their numbers."""
    model = seeing.build("qwen3_vl")
    asked: dict[str, Any] = {
        "tokenizer": tokenizer,
        "repair": "refit:1",
        "data": some_text,
        **FEW,
    }
    with pytest.raises(UnsupportedModelError, match=r"layers 1 cannot go.*first 2"):
        ghostlayers.prune(model, remove="1", **asked)
    pruned = ghostlayers.prune(model, layers=3, select="recoverable", **asked)
    assert min(pruned.removed) >= 2
    with pytest.raises(UnsupportedModelError, match="--keep-layers first:2"):
        ghostlayers.prune(model, layers=1, select="magnitude:unprotected", **asked)
    pruned = ghostlayers.prune(
        model, layers=1, select="magnitude:unprotected", keep_layers="first:2", **asked
    )
    assert min(pruned.removed) >= 2


@pytest.mark.parametrize("repair", ["ghost", "normed", "joint:x+norm", "piecewise:2"])
def test_operators_are_refused_before_anything_is_computed(
    repair: str, tokenizer: Any, some_text: list[str]
) -> None:
    model = seeing.build("llava")
    with pytest.raises(RecipeError, match=r"vision-language model.*refit:3:ridge=auto"):
        ghostlayers.prune(
            model, tokenizer=tokenizer, remove="2", repair=repair, data=some_text, **FEW
        )


def test_operators_act_in_memory() -> None:
    """`compare` measures them, even if no checkpoint can hold them."""
    from ghostlayers.repairs.base import Repair, linear

    view = multimodal.text_view(seeing.build("llava"))
    span = Span(2, 3)
    plain = prune_layers(DenseModel(view), (span,))
    repaired = prune_layers(
        DenseModel(view), (span,), {span: Repair("test", linear(0.5 * torch.eye(32)))}
    )
    ids = torch.arange(10, 20)[None]
    assert not torch.equal(repaired(input_ids=ids).logits, plain(input_ids=ids).logits)


REFUSED = {
    "paligemma": "both directions",
    "florence2": "an encoder and a decoder",
    "blip-2": "an encoder and a decoder",
    "mllama": "attend to the image alone",
    "gemma3n": "attention cache of others",
    "qwen2_audio": "neither a causal language model of that type",
    "idefics": "neither a causal language model of that type",
    "clip": "neither a causal language model of that type",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_by_its_config(
    name: str, tmp_path: Path, tokenizer: Any, some_text: list[str]
) -> None:
    """In one sentence, and before weights are read: there are none here."""
    changes: dict[str, Any] = {"text_config": {"model_type": "t5"}} if name == "blip-2" else {}
    CONFIG_MAPPING[name](**changes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]) as refused:
        ghostlayers.prune(tmp_path, remove="2", repair="none", data=some_text, **FEW)
    assert len(str(refused.value)) < 300


def test_a_whole_model_without_a_head_is_refused(tokenizer: Any, some_text: list[str]) -> None:
    with pytest.raises(GhostlayersError, match="LlavaModel"):
        ghostlayers.prune(
            seeing.build("llava").model, tokenizer=tokenizer, remove="2", data=some_text, **FEW
        )


@pytest.mark.slow
def test_the_command_line(
    folders: Path, tmp_path: Path, some_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prune, eval against the base, score, inspect, push and export of one folder."""
    monkeypatch.setenv("COLUMNS", "200")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_text))
    base, out = str(folders / "llava"), str(tmp_path / "out")
    few = ["--data", str(text), "--sequence-length", "48", "--windows", "4"]
    cut = ["prune", base, "--layers", "2", "--repair", "refit:1", "-o", out, *few]
    run = CliRunner().invoke
    refused = run(app, [*cut, "--gguf", str(tmp_path / "out.gguf")])
    assert refused.exit_code == 1
    assert "convert_hf_to_gguf.py" in refused.output
    done = run(app, cut)
    assert done.exit_code == 0, done.output
    assert "AutoModelForImageTextToText" in done.output
    measured = run(
        app,
        ["eval", out, "--against", base, "--data", str(text), "--sequence-length", "48",
         "--max-windows", "2"],
    )  # fmt: skip
    assert measured.exit_code == 0, measured.output
    scored = run(app, ["score", base, "--layers", "2", *few])
    assert scored.exit_code == 0, scored.output
    assert run(app, ["inspect", out]).exit_code == 0
    planned = hub.push(out, "name/model", dry_run=True)
    assert "preprocessor_config.json" in planned.files
    exported = run(app, ["export", out, "--gguf", str(tmp_path / "out.gguf")])
    assert exported.exit_code == 1
    assert "convert_hf_to_gguf.py" in exported.output


def test_the_text_part_alone_is_no_whole_model(tmp_path: Path) -> None:
    """A Llama 4 saved as a causal language model, and a config that names no class."""
    config = AutoConfig.for_model("llama4")
    assert multimodal.is_whole(config)
    config.architectures = ["Llama4ForCausalLM"]
    assert not multimodal.is_whole(config)
    assert not multimodal.is_whole(AutoConfig.for_model("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "llava"])
def test_a_cut_model_heals_whole(
    name: str, folders: Path, some_text: list[str], tmp_path: Path
) -> None:
    """Its text layers are trained; towers and processor stay, and it sees as the one in memory."""
    cut = ghostlayers.prune(folders / name, remove="1-2", repair="none", data=some_text, **FEW)
    cut.save(tmp_path / "cut")
    healed = ghostlayers.heal(
        tmp_path / "cut", against=folders / name, data=some_text, tokens="1000", train="suffix",
        sequence_length=32, held_out_windows=2, step_tokens=64,
    )  # fmt: skip
    assert type(healed.model) is type(cut.model)
    assert healed.better
    assert healed.save(tmp_path / "healed").identical
    assert (tmp_path / "healed" / "preprocessor_config.json").is_file()
    before, after = tensors_of(cut.model), tensors_of(healed.model)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed
    assert not [key for key in changed if "vision" in key or "visual" in key or "project" in key]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses old names of transformers
@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_adapters_of_a_whole_model_fit_its_files(
    name: str, folders: Path, some_text: list[str], tmp_path: Path
) -> None:
    """By its own names, that is, and not by those of the view that was trained."""
    from peft import PeftModel

    ghostlayers.prune(folders / name, remove="1-2", repair="none", data=some_text, **FEW).save(
        tmp_path / "cut"
    )
    healed = ghostlayers.heal(
        tmp_path / "cut", against=folders / name, data=some_text, tokens="1000", train="lora",
        sequence_length=32, held_out_windows=2, step_tokens=64,
    )  # fmt: skip
    healed.save_peft(tmp_path / "adapters")
    cut = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut").eval()
    ids = torch.randint(10, 60, (1, 16))
    with torch.no_grad():
        bare = cut(input_ids=ids).logits
        want = multimodal.whole_of(healed.model)(input_ids=ids).logits
        got = PeftModel.from_pretrained(cut, tmp_path / "adapters").eval()(input_ids=ids).logits
    assert float((bare - want).abs().max()) > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    parts = default_parts(healed.cut, ghostlayers.HealingRecipe())
    assert parts == ("norms", "suffix")  # no text shows what images say
