"""Whatever is read, only our own errors come out; whatever is shown, nothing in it is live.

Inputs are generated: junk of every type, and good input of which one part was replaced by junk. Set
``GHOSTLAYERS_FUZZ`` to try more of them than the few of every run.
"""

import copy
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ghostlayers.calibration import journal
from ghostlayers.checkpoint import records
from ghostlayers.checkpoint.card import render_card
from ghostlayers.cli import options, run, saved_screen, screen
from ghostlayers.cli.compare import read_published
from ghostlayers.cli.compare import show as show_comparison
from ghostlayers.compare.files import write_report
from ghostlayers.compare.request import Comparison
from ghostlayers.compare.store import Store
from ghostlayers.errors import DistributedError, GhostlayersError, ModelError, RecipeError
from ghostlayers.model.config_file import TokenizerSettings, check_config, check_folder
from ghostlayers.model.gguf_file import GgufFile
from ghostlayers.model.loading import load_model
from ghostlayers.model.offload import parse_memory
from ghostlayers.modeling import guarded_key
from ghostlayers.presets import Preset, find_preset
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import ALL, METHODS, find_method
from ghostlayers.runtime import parallel
from ghostlayers.runtime.documents import check, parse_json, parse_yaml, strict, to_json
from ghostlayers.runtime.shown import clean, markdown, shared, without_folders
from ghostlayers.selection.choices import SELECTIONS, find_selection, parse_keep
from ghostlayers.spans import parse_layers
from test_report import full

MANY = int(os.environ.get("GHOSTLAYERS_FUZZ", "40"))
quick = settings(
    max_examples=MANY,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

HOSTILE = (
    "\x1b]0;owned\x07[red]x[/x] \r\x9b31m\u202e\u200b<b>`|*_![a](http://e.vil)\n# h\n---\nk: v"
)
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f]")

text = st.text(max_size=20) | st.sampled_from(["", HOSTILE, "/home/me/x", "9" * 5000, "\0", "nan"])
numbers = st.integers() | st.floats() | st.sampled_from([-1, 10**9, 10**12, 10**400, 1e308])
plain = st.none() | st.booleans() | numbers | text
junk = st.recursive(
    plain, lambda each: st.lists(each, max_size=3) | st.dictionaries(text, each, max_size=3),
    max_leaves=6,
)  # fmt: skip


def only_ours(call: Any, *arguments: Any) -> Any:
    """What a call returns; None where it raises an error of ours. Any other error is a fault."""
    try:
        return call(*arguments)
    except GhostlayersError:
        return None


def replaced(draw: Any, good: Any) -> Any:
    """A copy of some values in which one place holds junk, or is gone."""
    whole = {"": copy.deepcopy(good)}
    place, key = whole, ""
    while isinstance(place[key], dict | list) and len(place[key]) and draw(st.integers(0, 3)):
        place = place[key]
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    if isinstance(place, dict) and place is not whole and draw(st.booleans()):
        del place[key]
    else:
        place[key] = draw(junk)
    return whole[""]


# Documents


@pytest.mark.slow
@quick
@given(text=st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
@example(text="&a [*a]")
@example(text="!!int x")
@example(text="!!float ''")
@example(text="!!bool x")
@example(text="[" * 5000)
@example(text="{a: " * 2000)
@example(text="a: " + "9" * 5000)
@example(text="!!python/object/apply:os.system [x]")
@example(
    text="a: &a [x,x]\n"
    + "\n".join(
        f"b{i}: &{c} [*{d},*{d},*{d},*{d},*{d},*{d}]"
        for i, (d, c) in enumerate(zip("abcdefghij", "bcdefghijk", strict=True))
    )
)
def test_yaml_is_values_or_refused(text: str) -> None:
    only_ours(parse_yaml, text, "it", RecipeError)


def test_yaml_with_a_key_twice_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="the key 'layers' is given twice, near line 1"):
        parse_yaml("layers: 3\nlayers: 4", "it", RecipeError)


@quick
@given(text=st.text(max_size=60))
@example(text="[" * 100_000)
@example(text="9" * 5000)
def test_json_is_values_or_refused(text: str) -> None:
    only_ours(parse_json, text, "it", ModelError)


@quick
@given(content=junk)
def test_what_is_written_is_strict_json_and_read_again(content: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    try:
        written = to_json(content)
    except ValueError:  # a whole number of thousands of digits is no measurement
        return
    assert json.loads(written, parse_constant=refuse) == strict(content)
    assert written.isascii()


def test_older_files_hold_what_is_no_number() -> None:
    assert parse_json("[NaN, Infinity, -Infinity, 1e999, 1.5]", "it", ModelError) == [
        None, None, None, None, 1.5,
    ]  # fmt: skip


def test_a_huge_file_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.yaml", tmp_path / "pipe"
    large.write_bytes(b"a: 1\n" * 2**20)
    os.mkfifo(pipe)
    for path, reason in ((large, "it has 5.2 MB"), (pipe, "no ordinary file")):
        with pytest.raises(RecipeError, match=reason):
            run.read_recipe(path, {})


# Recipes


@quick
@given(data=st.data())
def test_recipes(data: Any, tmp_path: Path) -> None:
    good = {
        "command": "prune", "model": "m", "output": "o", "layers": 3, "data": "c4", "ridge": 1e-6,
        "iterative": False, "gguf": "x.gguf", "vary": {"seed": [1, 2]}, "dtype": "float32",
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    values = replaced(data.draw, good)
    try:
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
    except (ValueError, yaml.YAMLError):  # cannot be written down
        return
    runs = only_ours(run.read_recipe, path, {}) or []
    for each in runs:
        only_ours(run.describe, each.varied)


@quick
@given(values=st.dictionaries(st.sampled_from([*Recipe.__dataclass_fields__]), junk, max_size=3))
def test_recipes_in_memory(values: dict[str, Any]) -> None:
    recipe = only_ours(Recipe.from_dict, values)
    if recipe is not None:
        assert math.isfinite(recipe.ridge)
        assert math.isfinite(recipe.absolute_ridge)


@quick
@given(values=junk)
def test_presets(values: Any) -> None:
    only_ours(Preset.from_dict, values)
    only_ours(find_preset, values)


@quick
@given(data=st.data())
def test_published_cells(data: Any, tmp_path: Path) -> None:
    cell = {"source": "a", "layers": 3, "select": "s", "repair": "r", "metric": "ppl", "value": 1.5}
    path = tmp_path / "cells.yaml"
    try:
        path.write_text(yaml.safe_dump(replaced(data.draw, [cell, cell])), encoding="utf-8")
    except (ValueError, yaml.YAMLError):
        return
    for each in only_ours(read_published, path) or []:
        assert math.isfinite(each["value"])


# Words on the command line

pieces = st.sampled_from(
    [*METHODS, *SELECTIONS, ":", ",", "-", "=", "ridge", "inf", "nan", "auto", "rank", "first",
     "last", "0", "7", "-1", "1e400", "1000000000", "9" * 5000, "\u0663", "x", " ", "GiB", "\0"]
)  # fmt: skip
words = st.lists(pieces, max_size=6).map("".join) | st.text(max_size=12)


@quick
@given(name=words | st.sampled_from(ALL).flatmap(lambda a: pieces.map(lambda b: f"{a}:{b}")))
def test_names_of_repairs_and_selections(name: str) -> None:
    only_ours(find_method, name)
    only_ours(find_selection, name)


@pytest.mark.parametrize(
    "name",
    ["piecewise:1000000000", "ghost:rank=1000000000000", "refit:99999999", "ghost:ridge=inf",
     "ghost:ridge=nan", "ghost:rank=" + "9" * 5000, "joint:x+z:refit=200000"],
)  # fmt: skip
def test_numbers_beyond_use_are_refused_by_name(name: str) -> None:
    with pytest.raises(RecipeError, match="must be"):
        find_method(name)


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("name", ["ridge", "absolute_ridge"])
def test_ridges_are_finite(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' must"):
        Recipe(**{name: value})


@quick
@given(text=words)
@example(text="0-99999999999")
@example(text=",".join(["0-99999"] * 50))
@example(text="first:99999999999")
def test_lists_of_layers_and_sizes(text: str) -> None:
    assert len(only_ours(parse_layers, text) or []) <= 100_000
    only_ours(parse_keep, text)
    only_ours(options.numbers_in, text, "--layers", "3")
    assert (only_ours(parse_memory, text) or 1) > 0


# Comparisons and what interrupted runs keep


@quick
@given(data=st.data())
def test_requests_of_comparisons(data: Any) -> None:
    good = {"layers": [3], "eval_data": ["c4"], "data": "c4", "repair": ["ghost"], "limit": None,
            "calibration": {"windows": 8}, "tasks": [], "max_windows": 3}  # fmt: skip
    values = replaced(data.draw, good)
    if isinstance(values, dict):
        only_ours(Comparison.from_dict, values)


@quick
@given(content=junk.map(strict), cut=st.integers(0, 40))
def test_stores_with_anything_in_them(content: Any, cut: int, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = Store(folder, {"request": 1}, overwrite=True)
    store.put("part", {"losses": [1.0]})
    (part,) = (folder / "parts").glob("*.json")
    try:
        written = to_json(content)
    except ValueError:
        return
    for path in (part, folder / "request.json"):
        kept = path.read_text()
        for damaged in (written, kept[:cut], kept.replace('"part"', '"trap"')):
            path.write_text(damaged, encoding="utf-8")
            only_ours(store.get, "part")
            only_ours(Store, folder, {"request": 1})
        path.write_text(kept)


@quick
@given(content=junk.map(strict), cut=st.integers(0, 40))
def test_requests_of_interrupted_runs(content: Any, cut: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "a-of-process-0-1.safetensors").write_bytes(b"")
    try:
        written = to_json(content)
    except ValueError:
        return
    for damaged in (written, '{"layers": 3}'[:cut]):
        (folder / "request.json").write_text(damaged, encoding="utf-8")

        def go_on() -> None:
            with journal.keeping(folder, {"layers": 3}):
                pass

        only_ours(go_on)


# Models

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32",
    "num_hidden_layers": 5, "hidden_size": 64, "vocab_size": 512, "num_attention_heads": 8,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "text_config": {"hidden_size": 64},
}  # fmt: skip


@quick
@given(data=st.data())
def test_configs(data: Any) -> None:
    only_ours(check_config, replaced(data.draw, CONFIG), "it", 10**6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "int8"), ("torch_dtype", "auto"), ("torch_dtype", "torch.bfloat16"),
     ("num_hidden_layers", 10**9), ("num_hidden_layers", -1), ("num_hidden_layers", "5"),
     ("num_hidden_layers", 90_000), ("hidden_size", 10**9), ("vocab_size", 10**8),
     ("num_hidden_layers", True), ("vocab_size", 0), ("rms_norm_eps", "x")],
)  # fmt: skip
def test_configs_that_no_model_is_made_of(name: str, value: Any) -> None:
    flat = {key: each for key, each in CONFIG.items() if key != "text_config"}
    with pytest.raises(ModelError, match=r"expected|input should|speaks of"):
        check_config({**flat, name: value}, "it", 10**6)


@pytest.mark.parametrize("content", ["null", "[]", "5", '"x"', "{", '{"a": NaN}', "[" * 99999, ""])
def test_config_files_that_hold_no_settings(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        check_folder(tmp_path)


def small_gguf(path: Path, **changes: Any) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    entries = {"block_count": 1, "embedding_length": 8, "context_length": 64}
    for name, value in {**entries, **changes}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((16, 8), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@quick
@given(place=st.integers(0, 400), value=st.integers(0, 255), length=st.integers(0, 1000))
def test_headers_of_gguf_files(place: int, value: int, length: int, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    content = bytearray(small_gguf(path))
    assert GgufFile(path).sizes == {"token_embd.weight": 128, "blk.0.ffn_up.weight": 64}
    path.write_bytes(content[:length])
    only_ours(GgufFile, path)
    content[min(place, len(content) - 1)] = value
    path.write_bytes(content)
    only_ours(GgufFile, path)


@pytest.mark.parametrize("changes", [{"block_count": 10**6}, {"embedding_length": 10**9}])
def test_gguf_files_that_speak_of_another_model(changes: dict[str, int], tmp_path: Path) -> None:
    small_gguf(tmp_path / "small.gguf", **changes)
    with pytest.raises(ModelError, match="speaks of"):
        GgufFile(tmp_path / "small.gguf")


# Records

RECORD: dict[str, Any] = {
    "base_model": {"name": "a/b", "title": None, "on_hub": True, "revision": None,
                   "licence": "mit", "quantized": None},
    "cut": {"removed": [2], "kept": [0, 1, 3], "spans": [[2, 3]]},
    "repairs": [{"span": [2, 3], "method": "ghost", "num_tokens": 9, "relative_residual": 0.1,
                 "condition_number": 10.0, "ridge": 1e-6}],
    "evidence": [{"model": name, "loss_nats": 2.0, "perplexity": 7.4, "kl_nats": 0.1,
                  "greedy_agreement": 0.9} for name in ("dense", "cut", "repaired")],
    "evidence_text": {"corpus": "t", "windows": 4, "sequence_length": 8, "bos": "no BOS"},
    "scores": None,
    "recipe": {"remove": None, "select": "recoverable", "repair": "ghost", "iterative": False},
    "calibration": {"corpus": "t", "windows": 4, "fit_windows": 4, "sequence_length": 8,
                    "bos": "no BOS", "documents": ["0"]},
    "versions": {"ghostlayers": "0.1.0", "torch": "2"},
    "mode": "custom", "created": "2026-01-01",
    "verification": {"identical": True, "largest_difference": 0.0, "num_tokens": 32},
    "files": {"model.safetensors": "0" * 64},
}  # fmt: skip

CHOSEN: dict[str, Any] = {
    "budget": {"asked": "--fits 6GiB", "said": ["7 layers less."], "layers": 7,
               "quantising": {"type": "q8_0", "bytes": 9.0, "windows": 4, "loss_nats": 2.0,
                              "cut_loss_nats": 2.1}},
    "contest": {"winner": "ghost", "runner_up": "none", "reason": "it loses least",
                "dense_loss_nats": 2.0, "refused": {"magnitude": "too dear"},
                "contestants": [{"repair": name, "loss_nats": 2.0, "behind_nats": 0.0,
                                 "behind_error": 0.0, "windows": 8, "finished": True,
                                 "overhead": 0.01} for name in ("ghost", "none")]},
    "packed": {"method": "gptq", "weights": 9, "packed_bytes": 90, "plain": ["a"],
               "plain_bytes": 9},
    "loads_with": "AutoModelForImageTextToText",
}  # fmt: skip
"""What a record holds beside, where a budget, a contest or a packed model was asked for."""

TEXT = {"corpus": "u", "windows": 4, "sequence_length": 8, "bos": "no BOS"}

HEALING: dict[str, Any] = {
    "trained": ["operator", "norms"], "num_trained": 9, "tokens": 90, "steps": 3, "best_step": 2,
    "positions": 1.0, "seconds": 2.0, "processor": "a processor", "documents": ["1"],
    "corpora": [{"corpus": "u", "share": 1.0}], "held_out": {**TEXT, "of_another_text": True},
    "evidence": [{**row, "model": name} for row, name in
                 zip(RECORD["evidence"], ("dense", "before", "healed"), strict=True)],
    "recipe": {"minutes": 2.0}, "learning_rates": {"operator": 3e-4},
}  # fmt: skip

MERGED: dict[str, Any] = {
    "parents": [{"checkpoint": "one"}, {"checkpoint": "two"}], "kept": "merged", "t": 0.5,
    "merged_at": 0.5, "held_out": TEXT,
    "tried": [{"model": "merged", "t": 0.5, "kl_nats": 0.1}],
    "evidence": [{**RECORD["evidence"][0], "model": name} for name in ("dense", "merged")],
}  # fmt: skip

RECORDS = {
    "plain": RECORD,
    "chosen": RECORD | CHOSEN,
    "trained": RECORD | {"healing": HEALING, "healed_before": [HEALING]},
    "merged": RECORD | {"merged": MERGED},
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(screen, "out", Console(file=stream, highlight=False, width=200))
    monkeypatch.setattr(screen, "err", Console(file=stream, highlight=False, width=200))
    return stream


@pytest.mark.parametrize("kind", RECORDS)
@quick
@given(data=st.data())
def test_records(kind: str, data: Any, tmp_path: Path, shown: io.StringIO) -> None:
    try:
        written = json.dumps(replaced(data.draw, RECORDS[kind]))
    except ValueError:
        return
    (tmp_path / "ghostlayers.json").write_text(written)
    record = only_ours(records.inspect, tmp_path)
    only_ours(records.calibration_documents, tmp_path)
    if record is not None:  # whatever passed can be shown and shared
        saved_screen.show_record(record)
        card_is_clean(render_card(record))
        only_ours(records.check_files, tmp_path, record)
        assert not STEERING.search(shown.getvalue())


@pytest.mark.parametrize("kind", RECORDS)
def test_a_whole_record_passes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "ghostlayers.json").write_text(json.dumps(RECORDS[kind]))
    assert records.inspect(tmp_path) == RECORDS[kind]


def test_infinity_in_a_record_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "ghostlayers.json").write_text(
        json.dumps(RECORD).replace('"condition_number": 10.0', '"condition_number": Infinity')
    )
    assert records.inspect(tmp_path)["repairs"][0]["condition_number"] is None


def everywhere(values: Any, word: str) -> Any:
    """The same values with a word in place of every text, and before every key of ``versions``."""
    if isinstance(values, dict):
        return {key: everywhere(value, word) for key, value in values.items()}
    if isinstance(values, list):
        return [everywhere(each, word) for each in values]
    return word if isinstance(values, str) else values


def card_is_clean(card: str) -> None:
    assert not STEERING.search(card)
    _, header, body = card.split("---\n", 2)
    assert isinstance(yaml.safe_load(header), dict)
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", re.sub(r"\\.", "", body), flags=re.DOTALL)
    assert not re.search(r"<|\]\(|://|!\[", outside)


@pytest.mark.parametrize("kind", RECORDS)
def test_nothing_in_a_hostile_record_is_live(kind: str, tmp_path: Path, shown: io.StringIO) -> None:
    record = everywhere(RECORDS[kind], HOSTILE)
    record["files"] = {}
    record.pop("loads_with", None)
    (tmp_path / "ghostlayers.json").write_text(json.dumps(record))
    record = records.inspect(tmp_path)
    for mode in ("custom", "stock", "adapter", HOSTILE):
        card = render_card({**record, "mode": mode})
        card_is_clean(card)
        header = yaml.safe_load(card.split("---\n")[1])
        assert header["license"] == "other"
        assert "base_model" not in header
        assert re.sub("```.*?```", "", card, flags=re.DOTALL).count("\n# ") == 1
    saved_screen.show_record(record)
    assert "[red]x[/x]" in shown.getvalue()  # as it is, not as markup
    assert not STEERING.search(shown.getvalue())


@quick
@given(text=st.text(max_size=40) | st.just(HOSTILE))
def test_the_screen_shows_text_as_text(text: str, shown: io.StringIO) -> None:
    shown.seek(0)
    shown.truncate()
    screen.say(text, screen.bold(text), screen.dim(text))
    screen.warn(text)
    screen.fail(text)
    screen.table((text, text), [[text, screen.good(text)]], text)
    screen.prose([[text, text]])
    assert not STEERING.search(shown.getvalue())
    assert "".join(clean(text).split()) in "".join(shown.getvalue().split())


@quick
@given(name=st.text("ab \n\r\t\x0b\x85\u2028", min_size=1, max_size=12))
def test_a_name_stays_on_its_line(name: str, shown: io.StringIO) -> None:
    for show in (screen.say, screen.warn, screen.fail):
        shown.seek(0)
        shown.truncate()
        show(f"a{name}b")
        assert shown.getvalue().count("\n") == 1
    shown.seek(0)
    shown.truncate()
    screen.table(("corpus", "loss"), [[f"a{name}b", "1"]], f"a{name}b")
    assert shown.getvalue().count("\n") == 6  # the title, three lines of frame, head and row


def test_only_the_screen_knows_markup() -> None:
    import ghostlayers

    for path in Path(ghostlayers.__file__).parent.rglob("*.py"):
        assert "rich.markup" not in path.read_text(), path


# What is shared


@quick
@given(parts=st.lists(st.sampled_from("ab ./"), max_size=8).map("".join))
def test_no_absolute_path_is_left(parts: str) -> None:
    for path in (f"/home/me/{parts}", f"see /srv/{parts}x/y", f"--data=/a/b{parts}", "~/q/r"):
        told = without_folders(path)
        assert not re.search(r"(^|[\s=])[/~][\w.]+/", told), told


def test_shared_values_name_no_folders() -> None:
    values = {"a": ["/home/me/x.txt+/srv/b/y.txt", f"in {Path.home()}/z/f.txt"], "n": 1.5}
    assert shared(values) == {"a": ["x.txt+y.txt", "in f.txt"], "n": 1.5}
    assert shared("a/b, c/d") == "a/b, c/d"
    assert shared("https://a.b/c/d") == "https://a.b/c/d"
    assert shared("prune '/home/me/My Models/m' -o x") == "prune 'm' -o x"
    assert shared("file:///home/me/x.txt") == "x.txt"


@quick
@given(text=st.text(max_size=40) | st.just(HOSTILE))
def test_markdown_means_only_itself(text: str) -> None:
    told = markdown(text)
    assert "\n" not in told
    assert not re.search(r"(?<!\\)[`*\[\]<|]|://", told)


def hostile_results() -> Any:
    """Results in which every name that others choose is hostile, and names a folder."""
    word = f"{HOSTILE} /home/me/secret/x.txt"
    written = json.dumps(full())
    for name in (
        "LlamaForCausalLM", "one", "Example processor", "abc", "a paper, table 2", "several gaps",
        "recoverable", "nouns", "ghostlayers compare tiny --layers 2",
    ):  # fmt: skip
        assert json.dumps(name) in written
        written = written.replace(json.dumps(name), json.dumps(word))
    return json.loads(written)


@pytest.mark.slow
def test_nothing_in_hostile_results_is_live(tmp_path: Path, shown: io.StringIO) -> None:
    results = hostile_results()
    for path in write_report(results, tmp_path):
        content = path.read_text()
        assert not STEERING.search(content), path.name
        assert "secret/" not in content, path.name
        assert "/home" not in content, path.name
    page, table = (tmp_path / "report.html").read_text(), (tmp_path / "results.md").read_text()
    assert "<b>" not in page
    assert page.count("<script") == 1
    assert not re.search(r"<|\]\(|://", re.sub(r"\\.", "", table))
    show_comparison(results)
    assert not STEERING.search(shown.getvalue())


@pytest.mark.parametrize("value", ["abc", "", "1.5", "-2", "9" * 5000])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "MASTER_PORT", "GHOSTLAYERS_TIMEOUT"])
def test_places_that_no_launcher_gives(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, good in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, good)
    monkeypatch.setenv(name, value)
    if name == "GHOSTLAYERS_TIMEOUT":
        only_ours(parallel._timeout)
        return
    with pytest.raises(DistributedError, match=f"variable {name} must be a whole number"):
        parallel.launched()


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
def test_timeouts_that_are_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTLAYERS_TIMEOUT", value)
    with pytest.raises(DistributedError, match="GHOSTLAYERS_TIMEOUT must be"):
        parallel._timeout()


def test_a_model_that_does_not_fit_its_config_is_told_by_tensor(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), RunOptions(device="cpu"))
    assert "above report" not in str(caught.value)
    assert "mlp" in str(caught.value)


ENTRIES = [
    "rope_theta", "rope_parameters.rope_theta", "rope_scaling.factor", "rope_scaling.beta_fast",
    "rope_parameters.full_attention.rope_theta", "rope_scaling.long_factor.0", "id2label",
    "num_key_value_heads", "num_attention_heads", "rms_norm_eps", "num_labels",
]  # fmt: skip
NO_SIZE = st.text() | st.integers(max_value=-1) | st.floats(max_value=-1e-9) | st.booleans()


def nested(place: str, value: Any) -> dict[str, Any]:
    """A value at a place such as a.b.0, where a number stands for a list."""
    for part in reversed(place.split(".")):
        value = [value] if part == "0" else {part: value}
    return dict(value)


@pytest.mark.parametrize("place", ENTRIES)
@given(value=NO_SIZE)
def test_entries_that_are_computed_with_are_numbers(place: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"the config cannot be read: {place}"):
        check_config(nested(place, value), "the config")


@pytest.mark.parametrize("name", ["num_key_value_heads", "num_attention_heads", "rope_theta"])
def test_what_is_divided_by_is_not_zero(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: expected a number greater"):
        check_config({name: 0}, "the config")


@quick
@given(key=st.text().filter(lambda text: not text.isdecimal()))
def test_keys_that_stand_for_numbers_are_numbers(key: str) -> None:
    with pytest.raises(ModelError, match="expected a whole number for a key"):
        check_config({"id2label": {key: "x"}}, "the config")
    tokens = {"added_tokens_decoder": {key: {"content": "<s>"}}}
    with pytest.raises(ModelError, match="expected a whole number for a key"):
        check(tokens, TokenizerSettings, "the tokenizer's config", ModelError)


NO_FLAG = st.text() | st.floats(allow_nan=False).map(lambda x: x + 0.5) | st.just({})


@pytest.mark.parametrize(
    "name", ["return_dict", "use_cache", "output_hidden_states", "output_attentions"]
)
@given(value=NO_FLAG)
def test_flags_of_a_config_are_flags(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=name):
        check_config({"model_type": "llama", name: value}, "the config")


@pytest.mark.parametrize("name", ["model_max_length", "add_bos_token", "model_input_names"])
@given(value=st.text() | st.dictionaries(st.text(), st.integers()))
def test_entries_that_a_tokenizer_computes_with_are_of_their_type(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=name):
        check({name: value}, TokenizerSettings, "the tokenizer's config", ModelError)


@pytest.mark.slow  # every config class is imported
def test_the_entry_that_stands_guard_is_read_in_every_family() -> None:
    """A repaired checkpoint holds a mapping where its family has a number."""
    entries = {guarded_key(config) for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    assert {"n_layer", "n_layers", "num_hidden_layers", "hidden_size"} <= entries
    for entry in entries:
        check_config({"model_type": "ghostlayers_x", entry: {"value": 3, "note": "x"}}, "here")
