"""Bases whose config or tokenizer asks for something else than plain answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghostlayers
from families import build
from ghostlayers.errors import ModelError, UnsupportedModelError, WindowError
from ghostlayers.recipe import RunOptions

CHOICES: dict[str, Any] = {
    "remove": "2", "windows": 4, "fit_windows": 4, "held_out_windows": 2, "sequence_length": 32,
}  # fmt: skip
FLAGS: dict[str, Any] = {
    "return_dict": False, "output_hidden_states": True, "output_attentions": True,
    "use_cache": False, "torchscript": True,
}  # fmt: skip


def base(name: str, folder: Path, tokenizer: Any, **entries: Any) -> str:
    """A tiny model's folder with further entries in its config."""
    build(name, vocab_size=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_what_a_base_hands_out_changes_nothing(
    name: str, flag: str, byte_tokenizer: Any, some_text: list[str], tmp_path: Path
) -> None:
    losses = []
    for place, entries in (("plain", {}), ("odd", {flag: FLAGS[flag]})):
        folder = base(name, tmp_path / place, byte_tokenizer, **entries)
        pruned = ghostlayers.prune(folder, data=some_text, repair="ghost", **CHOICES)
        losses.append(pruned.evidence["repaired"])
    assert losses[0] == losses[1]
    assert pruned.save(tmp_path / "out").largest_difference < 1e-4


def test_a_model_in_memory_that_answers_in_tuples_is_refused(
    byte_tokenizer: Any, some_text: list[str]
) -> None:
    model = build("llama", vocab_size=256)
    model.config.return_dict = False
    with pytest.raises(ModelError, match=r"set model\.config\.return_dict = True"):
        ghostlayers.prune(model, tokenizer=byte_tokenizer, data=some_text, **CHOICES)


@pytest.mark.parametrize("command", ["prune", "score", "evaluate"])
def test_a_token_without_an_embedding_is_named(
    command: str, byte_tokenizer: Any, some_text: list[str]
) -> None:
    model = build("llama", vocab_size=100)  # letters of small size lie beyond
    call: Any = getattr(ghostlayers, command)
    choices = {"prune": CHOICES, "score": CHOICES, "evaluate": {"sequence_length": 32}}[command]
    message = r"makes token \d+ \('.+'\) of the text, but .* has 100 rows, and the tokenizer 256"
    data: Any = [some_text] if command == "evaluate" else some_text
    with pytest.raises(WindowError, match=message):
        call(model, tokenizer=byte_tokenizer, data=data, **choices)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class MyConfig(LlamaConfig):
    model_type = "{kind}"


class MyModel(LlamaForCausalLM):
    config_class = MyConfig


class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("llama", "transformers has that family itself: leave out --trust-remote-code"),
        ("my_own", "results carry no such code"),
    ],
)
def test_a_base_that_runs_on_its_own_code_is_refused(
    kind: str, reason: str, byte_tokenizer: Any, some_text: list[str], tmp_path: Path
) -> None:
    named = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    folder = base("llama", tmp_path / kind, byte_tokenizer, model_type=kind, auto_map=named)
    (tmp_path / kind / "modeling_my.py").write_text(CODE.format(kind=kind))
    allowed = RunOptions(trust_remote_code=True)
    with pytest.raises(UnsupportedModelError, match=reason):
        ghostlayers.prune(folder, data=some_text, options=allowed, **CHOICES)


def test_a_tokenizer_that_runs_on_its_own_code_is_refused(
    byte_tokenizer: Any, some_text: list[str], tmp_path: Path
) -> None:
    folder = base("llama", tmp_path / "base", byte_tokenizer)
    path = tmp_path / "base" / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": [None, "modeling_my.MyTokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    (tmp_path / "base" / "modeling_my.py").write_text(CODE.format(kind="my_own"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.raises(UnsupportedModelError, match=r"tokenizer \(MyTokenizer\) runs on code"):
        ghostlayers.prune(model, tokenizer=tokenizer, data=some_text, **CHOICES)
