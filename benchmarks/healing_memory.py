"""What training after a cut takes of memory, beside what its parts add up to.

usage: python benchmarks/healing_memory.py MODEL --remove 12-18 --data TEXT [--dtype float32]
       python benchmarks/healing_memory.py shapes
       torchrun --nproc-per-node 2 benchmarks/healing_memory.py shares FOLDER [--train all]

The first trains on 2,048 tokens, and compares the greatest memory of the process with that before
training. The second adds the same parts up for models of 8B and 70B. The third makes a Llama of
random weights in FOLDER, cuts it, and says the greatest memory of every process that heals it, and
how long a step took; with ACCELERATE_USE_FSDP=true FSDP_VERSION=2 in the environment they have
shares.
"""

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ghostlayers
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.parts import bytes_trained, default_parts, named_parts
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.runtime import parallel
from ghostlayers.study import Study

GIB = 2**30
SHAPES = {  # hidden, intermediate, layers, key-value width, vocabulary, removed, layers behind them
    "8B": (4096, 14336, 32, 1024, 128256, 7, 4),
    "70B": (8192, 28672, 80, 1024, 128256, 16, 8),
}


def main() -> None:
    """Measure, or add up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--remove", default="12-18")
    parser.add_argument("--data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train")
    given = parser.parse_args()
    if given.model == "shapes":
        shapes()
    elif given.model == "shares":
        shares(Path(given.folder), given.train)
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """One run."""
    study = Study.open(
        given.model, data=given.data, windows=8, sequence_length=256, held_out_windows=8,
        remove=given.remove, options=RunOptions(dtype=given.dtype),
    )  # fmt: skip
    cut = study.choose()
    (repairs,) = study.fit(cut, ["ghost"]).values()
    pruned = study.build(cut, repairs)
    model = CutModel.of(study.dense, pruned.model, pruned.spans, pruned.record)
    recipe = HealingRecipe(tokens="2k", train=given.train)
    names = named_parts(model, recipe.parts or default_parts(model, recipe))
    numbers = sum(model.network.get_parameter(name).numel() for name in names)
    with peak() as most:
        study.heal(pruned, recipe)
    expected = numbers * bytes_trained(study.dense.dtype)
    print(
        f"{given.model} {given.dtype}: trained {numbers:,} numbers, {expected / 1e6:,.0f} MB; "
        f"beside the weights at most {most[0] / 1e6:,.0f} MB"
    )


def shares(folder: Path, train: str | None) -> None:
    """One run of several processes."""
    here = parallel.join()
    if here.leads and not folder.exists():
        make_models(folder)
    parallel.wait()
    text = [f"Part {number}: {number * number} and {number**3}." * 9 for number in range(99)]
    with peak(files=False) as most:
        outcome = ghostlayers.heal(
            folder / "cut", against=folder / "dense", data=text, tokens="512", step_tokens=128,
            sequence_length=64, held_out_windows=2, train=train, learning_rate="1e-5",
        ).outcome  # fmt: skip
    print(
        f"process {here.rank} of {here.size}, {parallel.shards()} shares: trained "
        f"{outcome.num_trained:,} numbers; its own memory grew by at most {most[0] / 1e6:,.0f} MB; "
        f"{outcome.seconds / outcome.steps:.2f} s a step; loss {outcome.training_losses[-1]:.6f}"
    )
    parallel.leave()


def make_models(folder: Path) -> None:
    """A Llama of 87 million numbers, and the same without three layers."""
    sizes = {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 12}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, num_attention_heads=16, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder / "dense")
    study = Study.open(
        str(folder / "dense"), data=["A text of no matter." * 40] * 40, windows=8,
        sequence_length=128, held_out_windows=2, remove="6-8",
    )  # fmt: skip
    cut = study.choose()
    (repairs,) = study.fit(cut, ["ghost"]).values()
    study.build(cut, repairs).save(folder / "cut")


@contextmanager
def peak(*, files: bool = True) -> Iterator[list[int]]:
    """The greatest memory of this process beyond that at the start, every 20 milliseconds.

    Args:
        files: count pages of files, which the system may drop, as well.
    """
    process, done = psutil.Process(), threading.Event()

    def taken() -> int:
        now = process.memory_info()
        return int(now.rss if files else now.rss - now.shared)

    before, most = taken(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], taken() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield most
    done.set()
    watcher.join()


def shapes() -> None:
    """Weights in bfloat16, and what training takes beside them."""
    print(
        "| model | weights | operator + norms | and the layers behind the cut |\n|---|--:|--:|--:|"
    )
    for name, (hidden, inner, layers, narrow, vocabulary, removed, behind) in SHAPES.items():
        layer = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
        dense = layers * layer + 2 * vocabulary * hidden
        each = bytes_trained(torch.bfloat16)
        small, large = hidden * hidden * each, behind * layer * each
        print(
            f"| {name}, {removed} of {layers} layers | {2 * dense / GIB:.1f} GiB "
            f"| {small / GIB:.1f} GiB | {(small + large) / GIB:.1f} GiB |"
        )


if __name__ == "__main__":
    main()
