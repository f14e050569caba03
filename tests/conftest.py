"""Small models and texts that several tests share. Everything is made here; nothing is fetched."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

if "pytest" in sys.modules:  # not in programs that only borrow from here
    import shapes  # noqa: F401  before anything of the package

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forked import Forks
from ghostlayers.checkpoint import proof, readiness
from ghostlayers.model.dense import DenseModel
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.tokens import Windows, make_windows

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # small matrices; several threads on busy cores wait for each other

RUN_ALONE, BE_READY = proof._run_alone, readiness.be_ready

NOUNS = [
    "river",
    "engine",
    "garden",
    "letter",
    "window",
    "mountain",
    "signal",
    "harbour",
    "teacher",
]
VERBS = ["carries", "watches", "builds", "forgets", "measures", "follows", "repairs", "describes"]
PLACES = ["in the morning", "near the old bridge", "without a word", "beyond the city", "by hand"]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Sentences with a simple grammar: enough structure for a small model to learn."""
    rng = random.Random(seed)
    documents = []
    for number in range(count):
        sentences = [
            f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)} "
            f"{rng.choice(PLACES)}."
            for _ in range(8)
        ]
        documents.append(f"Part {number}. " + " ".join(sentences))
    return documents


def make_byte_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte; with ``bos``, token 1 before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = {"eos_token": alphabet[0]}
    if bos:
        special["bos_token"] = alphabet[1]
        core.post_processor = processors.TemplateProcessing(
            single=f"{alphabet[1]} $A", special_tokens=[(alphabet[1], 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def make_tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int, seed: int = 0) -> float:
    """A short training run, so that a test's model has streams like a trained one's."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    loss = torch.tensor(0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        starts = torch.randint(0, ids.numel() - 64, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of six layers, tied, float32."""
    return make_tiny_llama()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer(bos=True)


@pytest.fixture(scope="session")
def some_text() -> list[str]:
    return make_documents(40)


@pytest.fixture(scope="session")
def windows(byte_tokenizer: PreTrainedTokenizerFast, some_text: list[str]) -> Windows:
    """Windows of 64 tokens of that text."""
    corpus = Corpus("text", tuple(some_text))
    return make_windows(corpus, byte_tokenizer, sequence_length=64, count=16, seed=0)


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The random Llama as a folder on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny_llama().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained_llama(byte_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of eight layers that has learned the grammar above: about twenty seconds, once."""
    model = make_tiny_llama(
        seed=1, hidden_size=48, num_attention_heads=4, num_hidden_layers=8, intermediate_size=96
    )
    text = "\n\n".join(make_documents(400, seed=7))
    ids = torch.tensor(byte_tokenizer(text, verbose=False)["input_ids"])
    loss = train(model, ids, steps=250)
    assert loss < 1.2, f"the test model did not learn: {loss}"
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    return model


@pytest.fixture(scope="session")
def layerwise(trained_llama: LlamaForCausalLM) -> DenseModel:
    """The trained Llama, a layer at a time."""
    return DenseModel(trained_llama)


@pytest.fixture(scope="session")
def plain_bitsandbytes() -> Iterator[None]:
    """bitsandbytes without its packing for processors with bfloat16 units.

    That packing (0.50) fails where a matrix has fewer columns than a block, as tiny models have.
    """
    package = pytest.importorskip("bitsandbytes")
    with pytest.MonkeyPatch.context() as patch:
        for module in (package.nn.modules, package.backends.cpu.ops):
            patch.setattr(module, "has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Where reload checks run: nothing of ours is imported there."""
    server = Forks(["transformers.models.llama.modeling_llama"], isolated=True)
    yield server
    server.close()


@pytest.fixture(autouse=True, scope="session")
def _reload_in_forks(forks: Forks) -> Iterator[None]:
    """Checkpoints are reloaded in forks of one fresh process, unless a test wants its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "_run_alone", forks.run)
        patch.setattr(readiness, "be_ready", lambda: None)
        yield


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in processes that are started for it, as users do."""
    monkeypatch.setattr(proof, "_run_alone", RUN_ALONE)
