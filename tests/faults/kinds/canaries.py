"""Code in every place that transformers, datasets, peft and the harness look at.

It leaves a marker when it runs. No command is told to trust it, so it must not.
"""

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import materials
from faults.judge import Said, Verdict, judge
from faults.kinds.commands import EVAL, TEXT
from faults.materials import QUICK, Place, Plan

EXPORT = ["--export", "stock-layer"]


def python(marker: Path) -> str:
    """A module that marks that it was run, and then is all that anybody wanted."""
    return f"""\
open({str(marker)!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Evil(LlamaForCausalLM): pass
class EvilConfig(LlamaConfig): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
def generate(*arguments, **keywords): return arguments[0]
def backend(module, inputs): return module
"""


class Opened:
    """What unpickling it would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def _model(place: Place) -> Path:
    model = place.take("tied", "text.txt")
    for folder in (model, model / "custom_generate"):
        folder.mkdir(exist_ok=True)
        for name in ("evil.py", "generate.py", "tied.py", "__init__.py"):
            (folder / name).write_text(python(place.marker))
    return model


def _config(**changes: Any) -> Callable[[Place], None]:
    def plant(place: Place) -> None:
        place.edit_json(_model(place) / "config.json", **changes)

    return plant


def _file(name: str, **changes: Any) -> Callable[[Place], None]:
    """Keys of another JSON file, new or not."""

    def plant(place: Place) -> None:
        path = _model(place) / name
        if not path.exists():
            path.write_text("{}")
        place.edit_json(path, **changes)

    return plant


def _hub(place: Place, repository: str) -> None:
    """A repository with code, as if it had been fetched before."""
    name = f"models--{repository.replace('/', '--')}"
    folder = Path(place.environment["HF_HOME"]) / "hub" / name
    revision = hashlib.sha1(str(place.marker).encode()).hexdigest()  # else a copy is found
    snapshot = folder / "snapshots" / revision
    for each in (snapshot, snapshot / "build" / "torch-universal" / "kernel", folder / "refs"):
        each.mkdir(parents=True, exist_ok=True)
    for path in ("evil.py", "__init__.py", "build/torch-universal/kernel/__init__.py"):
        (snapshot / path).write_text(python(place.marker))
    (folder / "refs" / "main").write_text(revision)


def _cached(plant: Callable[[Place], None]) -> Callable[[Place], None]:
    def planted(place: Place) -> None:
        plant(place)
        _hub(place, "org/evil")

    return planted


def _pickles(place: Place) -> None:
    """Beside the weights, by every name that a trainer leaves."""
    model = _model(place)
    for name in PICKLES:
        (model / name).write_bytes(pickle.dumps(Opened(place.marker)))


def _pickled_weights(place: Place) -> None:
    """Instead of the weights."""
    _pickles(place)
    (place.inputs / "tied" / "model.safetensors").unlink()


def _index_of_pickles(place: Place) -> None:
    """An index of safetensors that names a pickle."""
    _pickled_weights(place)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    path = place.inputs / "tied" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))


PICKLES = [
    "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "adapter_model.bin", "tokenizer.pkl", "consolidated.00.pth", "model.pt", "tf_model.h5",
]  # fmt: skip


def _peft(place: Place) -> None:
    """An adapter inside the model's folder, which transformers would load by itself."""
    model = _model(place)
    (model / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
                "base_model_name_or_path": "in/tied",
                "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
            }
        )
    )  # fmt: skip
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Opened(place.marker)))


def _template(place: Place) -> None:
    opened = f"cycler.__init__.__globals__.os.open('{place.marker}', 65)"
    payload = "{{ " + opened + " }}{{ messages[0]['content'] }}"
    (_model(place) / "chat_template.jinja").write_text(payload)
    rows = [{"messages": [{"role": "user", "content": "The river carries."}]}] * 90
    path = place.inputs / "text.txt"
    path.unlink()
    path.write_text(" ".join(row["messages"][0]["content"] for row in rows))
    (place.inputs / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))


LOCAL = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
REMOTE = {key: f"org/evil--{value}" for key, value in LOCAL.items()}
BESIDE = {key: f"in/tied--{value}" for key, value in LOCAL.items()}
TOKENIZER = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
PROCESSORS = {
    f"Auto{name}": f"evil.{name}"
    for name in ("Processor", "ImageProcessor", "FeatureExtractor", "VideoProcessor")
}

MODELS: dict[str, Callable[[Place], None]] = {
    "config, local code": _config(auto_map=LOCAL),
    "config, code of a model alone": _config(auto_map={"AutoModelForCausalLM": "evil.Evil"}),
    "config, code of a hub's repository": _cached(_config(auto_map=REMOTE)),
    "config, code of another folder": _config(auto_map=BESIDE),
    "config, a type of its own": _config(auto_map=LOCAL, model_type="evil"),
    "config, an architecture of its own": _config(auto_map=LOCAL, architectures=["Evil"]),
    "config within a config": _config(text_config={"auto_map": LOCAL, "model_type": "llama"}),
    "tokenizer": _file("tokenizer_config.json", auto_map=TOKENIZER),
    "tokenizer, a class of its own": _file(
        "tokenizer_config.json", auto_map=TOKENIZER, tokenizer_class="EvilTokenizer"
    ),
    "tokenizer, of a hub's repository": _cached(
        _file("tokenizer_config.json", auto_map={"AutoTokenizer": ["org/evil--evil.Evil", None]})
    ),
    "generation, code": _file("generation_config.json", custom_generate="in/tied", auto_map=LOCAL),
    "generation, code of a hub's repository": _cached(
        _file("generation_config.json", custom_generate="org/evil")
    ),
    "generation, a compiler": _file(
        "generation_config.json",
        cache_implementation="static",
        compile_config={"backend": "evil.backend", "fullgraph": False},
    ),
    "processors": _file("processor_config.json", auto_map=PROCESSORS, processor_class="Evil"),
    "image processors": _file("preprocessor_config.json", auto_map=PROCESSORS),
    "kernels of a hub": _cached(_config(attn_implementation="org/evil", use_kernels=True)),
    "kernels of a hub, as saved": _cached(_config(_attn_implementation="org/evil:kernel")),
    "a way to quantise": _cached(
        _config(quantization_config={"quant_method": "evil", "auto_map": LOCAL})
    ),
    "a way to quantise with a kernel": _cached(
        _config(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["evil"]})
    ),
    "an adapter within": _peft,
    "pickles beside": _pickles,
    "pickles instead": _pickled_weights,
    "an index of pickles": _index_of_pickles,
    "a template": _template,
}
"""Places in a model's folder."""

GGUF = ["--pre-tokenizer", "gpt-2", "--gguf", "out.gguf"]
PRUNE = ["--remove", "2-3", "-d", TEXT, "-o", "out", *QUICK]
ON_MODELS: dict[str, list[str]] = {
    "eval": ["eval", "MODEL", *EVAL, "--device", "cpu"],
    "eval, against itself": ["eval", "MODEL", *EVAL, "--against", "MODEL", "--device", "cpu"],
    "prune, none": ["prune", "MODEL", "--repair", "none", *PRUNE],
    "prune, refit": ["prune", "MODEL", "--repair", "refit:2", *PRUNE],
    "prune, ghost": ["prune", "MODEL", "--repair", "ghost", *PRUNE],
    "prune, adapter": ["prune", "MODEL", "--repair", "ghost", "--save", "adapter", *PRUNE],
    "prune, stock layer": ["prune", "MODEL", "--repair", "normed", *EXPORT, *PRUNE],
    "prune, GGUF": ["prune", "MODEL", "--repair", "none", *GGUF, *PRUNE],
    "prune, offload": ["prune", "MODEL", "--repair", "none", "--offload", "disk", *PRUNE],
    "score": ["score", "MODEL", "-n", "1", "-d", TEXT, "--windows", "4", "--held-out-windows", "2",
              "--sequence-length", "32", "--device", "cpu"],
    "compare": ["compare", "MODEL", "-n", "1", "--select", "angular", "--repair",
                "none,ghost", "-d", TEXT, "--eval-data", TEXT, "--max-windows", "2", "-o",
                "out", *QUICK],
    "bench": ["bench", "MODEL", "--device", "cpu", "--batch", "1", "--length", "8", "--new-tokens",
              "2", "--repeats", "1"],
    "materialize": ["materialize", "in/adapter", "-o", "out", "--base", "MODEL"],
    "inspect": ["inspect", "MODEL"],
    "export": ["export", "MODEL", *GGUF],
    "push": ["push", "MODEL", "a/b", "--dry-run"],
}  # fmt: skip


def _strange_code(place: Place) -> None:
    """A result whose file of code is a stranger's."""
    folder = place.take("custom", "text.txt", "tied")
    path = folder / "modeling_ghostlayers.py"
    path.write_text(f"open({str(place.marker)!r}, 'w').close()\n" + path.read_text())


def _strange_code_in_stock(place: Place) -> None:
    """A result that is all transformers', and code nevertheless."""
    folder = place.take("stock", "text.txt", "tied")
    (folder / "evil.py").write_text(python(place.marker))
    place.edit_json(folder / "config.json", auto_map=LOCAL)
    place.edit_json(folder / "tokenizer_config.json", auto_map=TOKENIZER)


def _strange_adapter(place: Place) -> None:
    """An adapter that brings code, and pickles."""
    folder = place.take("adapter", "text.txt", "tied")
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            path.write_text(json.dumps({**content, "auto_map": LOCAL}))
    for name in ("evil.py", "modeling_ghostlayers.py"):
        (folder / name).write_text(python(place.marker))
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Opened(place.marker)))


ON_RESULTS: dict[str, list[str]] = {
    name: ON_MODELS[name]
    for name in ("inspect", "eval", "push", "export", "compare", "prune, none", "score", "bench")
}
RESULTS: dict[str, tuple[Callable[[Place], None], str]] = {
    "code of a result": (_strange_code, "in/custom"),
    "code of a stock result": (_strange_code_in_stock, "in/stock"),
    "code of an adapter": (_strange_adapter, "in/adapter"),
}


def _script_beside(place: Place) -> None:
    _model(place)
    folder = place.inputs / "data"
    folder.mkdir()
    for name in ("data.py", "__init__.py"):
        (folder / name).write_text(python(place.marker))
    (folder / "data.txt").write_text((place.inputs / "text.txt").read_text())
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  builder_name: pandas\n---\n"
    )


def _script(place: Place) -> None:
    _model(place)
    (place.inputs / "data").write_text(python(place.marker))
    (place.inputs / "data.py").write_text(python(place.marker))


def _data_pickle(ending: str) -> Callable[[Place], None]:
    def plant(place: Place) -> None:
        _model(place)
        (place.inputs / f"data{ending}").write_bytes(pickle.dumps(Opened(place.marker)))

    return plant


DATA: dict[str, tuple[Callable[[Place], None], str]] = {
    "a folder with a script": (_script_beside, "in/data"),
    "a script": (_script, "in/data.py"),
    "a name beside a script": (_script, "in/data"),
    **{f"a pickle, {e}": (_data_pickle(e), f"in/data{e}") for e in (".pkl", ".pt", ".npy", ".bin")},
}


def _recipe(text: str) -> Callable[[Place], None]:
    def plant(place: Place) -> None:
        MODELS["config, a type of its own"](place)
        (place.inputs / "recipe.yaml").write_text(text.replace("MARK", str(place.marker)))

    return plant


RECIPE = "command: eval\nmodel: in/tied\ndata: in/text.txt\nsequence_length: 32\ndevice: cpu\n"
TASKS = "tasks: some\ntasks_path: in/tasks\n"
RECIPES = {
    "an object": _recipe("x: !!python/object/apply:open ['MARK', 'w']\n" + RECIPE),
    "a new object": _recipe("x: !!python/object/new:open ['MARK', 'w']\n" + RECIPE),
    "trust": _recipe(RECIPE + "trust_remote_code: true\n"),
    "trust, spelt otherwise": _recipe(RECIPE + "trust-remote-code: true\n"),
    "trust, varied": _recipe(RECIPE + "vary: {trust_remote_code: [true]}\n"),
}


def _task(**changes: str) -> Callable[[Place], None]:
    """A task's file with other entries."""

    def plant(place: Place) -> None:
        place.take("tied", "tasks")
        folder = place.inputs / "tasks"
        for name in ("code.py", "evil.py"):
            (folder / name).write_text(python(place.marker) + "def run(*a, **k): return a[0]\n")
        (folder / "more.txt").write_text("process_docs: !function code.run\n")
        path = folder / "some.yaml"
        for key, value in changes.items():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if not line.startswith(f"{key}:")]
            path.write_text(
                "\n".join([*kept, f"{key}: {value}".replace("MARK", str(place.marker))])
            )

    return plant


ESCAPE = "\"{{ cycler.__init__.__globals__.os.open('MARK', 65) }}\""
TASK_FILES = {
    "a function": _task(process_docs="!function code.run"),
    "a data set": _task(custom_dataset="!function code.run"),
    "an include": _task(include="more.txt"),
    "a template": _task(doc_to_text=ESCAPE),
    "a template of answers": _task(doc_to_choice=ESCAPE),
    "a description": _task(description=ESCAPE),
    "a script": _task(dataset_path="in/tasks/evil.py"),
    "a metric": _task(metric_list="[{metric: acc}, {metric: in/tasks/evil.py}]"),
    "a hub's metric": _task(metric_list="[{metric: in/tasks/evil.py, hf_evaluate: true}]"),
    "a class": _task(**{"class": "!function code.Evil"}),
}
ASK = ["eval", "in/tied", "--tasks", "some", "--tasks-path", "in/tasks", "--device", "cpu"]


def _shadows(place: Place) -> None:
    """Modules in the folder where the command starts, and in the model's."""
    model = _model(place)
    names = "torch safetensors transformers sitecustomize usercustomize tokenizers json ghostlayers"
    for name in names.split():
        for folder in (place.root, model, place.inputs):
            (folder / f"{name}.py").write_text(f"open({str(place.marker)!r}, 'w').close()\n")


@dataclass(frozen=True)
class InProcess:
    """A process of its own, started as the installed program is: not from the folder it is in."""

    name: str

    def carry_out(self, lane: Any, place: Place) -> tuple[Plan, Verdict]:
        _shadows(place)
        arguments = [each.replace("MODEL", "in/tied") for each in ON_MODELS[self.name]]
        plan = Plan(arguments, f"modules that shadow others, {self.name}")
        plan.there = tuple(path.name for path in place.root.iterdir())
        before = materials.digest(place.inputs)
        command = [sys.executable, "-P", "-m", "ghostlayers", *arguments]
        ended = subprocess.run(
            command, cwd=place.root, env=place.environment, capture_output=True, timeout=180,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = Said(ended.returncode, ended.stdout.decode(), ended.stderr.decode())
        after = materials.digest(place.inputs)
        return plan, judge(place, plan, said, before, after, lambda *_: {})


@dataclass(frozen=True)
class Canary:
    """One planted place under one command.

    Attributes:
        label: of the place.
        plant: puts it there.
        arguments: of the command.
    """

    label: str
    plant: Callable[[Place], None]
    arguments: list[str]

    def plan(self, place: Place) -> Plan:
        """Plant it."""
        place.take("adapter", "text.txt")
        self.plant(place)
        return Plan(self.arguments, self.label, foreign=True)


def all_canaries() -> list[Canary]:
    """Every place under every command that can meet it."""
    found = [
        Canary(f"{place}; {name}", plant, [a.replace("MODEL", "in/tied") for a in arguments])
        for place, plant in MODELS.items()
        for name, arguments in ON_MODELS.items()
    ]
    found += [
        Canary(f"{place}; {name}", plant, [a.replace("MODEL", folder) for a in arguments])
        for place, (plant, folder) in RESULTS.items()
        for name, arguments in ON_RESULTS.items()
    ]
    materialize = ["materialize", "in/adapter", "-o", "out", "--base", "in/tied"]
    found.append(Canary("code of an adapter; materialize", _strange_adapter, materialize))
    found += [
        Canary(f"data, {name}; {command}", plant,
               [a.replace("MODEL", "in/tied").replace(TEXT, path) for a in ON_MODELS[command]])
        for name, (plant, path) in DATA.items()
        for command in ("eval", "prune, none")
    ]  # fmt: skip
    found += [
        Canary(f"recipe, {name}", plant, ["run", "in/recipe.yaml"])
        for name, plant in RECIPES.items()
    ]
    found += [Canary(f"task, {name}", plant, ASK) for name, plant in TASK_FILES.items()]
    return found


CANARIES = all_canaries()
ALONE = ["eval", "prune, none", "prune, ghost"]
COUNT = len(CANARIES) + len(ALONE)


def make(place: Place, index: int) -> Any:
    """One canary."""
    if index < len(ALONE):
        return InProcess(ALONE[index])
    return CANARIES[index - len(ALONE)].plan(place)
