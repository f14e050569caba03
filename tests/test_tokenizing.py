"""Long texts in pieces: the tokens of the whole, for every kind of tokenizer."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import make_byte_tokenizer, make_documents
from ghostlayers.errors import CorpusError
from ghostlayers.text import tokenizing
from ghostlayers.text.tokenizing import tokenize_texts

TRAINING = [
    "\n\n".join(make_documents(60)),
    "  spaces   \n\n\n and lines\t été 三十 🙂🙂 don't 12345",
]


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)
    )
    return core


def without_words() -> Tokenizer:
    """As Llama's: nothing is split before the merges, which see the text as one long word."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trained.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"])
    )
    core = Tokenizer(trained.model)
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return core


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(
        TRAINING,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>"),
    )
    return core


def wordpiece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"])
    )
    return core


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "BPE without words": without_words,
    "Unigram": unigram,
    "WordPiece": wordpiece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param]())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "PIECE", 400)
    monkeypatch.setattr(tokenizing, "OVERLAP", 200)
    monkeypatch.setattr(tokenizing, "MAX_TOGETHER", 4000)


WORDS = [
    "the",
    "river",
    "engine",
    "unheard",
    "été",
    "ﬁne",
    "三十",
    "🙂",
    "don't",
    "x",
    "12345",
]
GAPS = [" ", "  ", "\n", "\n\n", ", ", ". ", "\t", "      ", "", "</s>"]
TEXT = st.lists(
    st.tuples(st.sampled_from(WORDS), st.sampled_from(GAPS)).map("".join), max_size=700
).map("".join)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)
@given(written=TEXT, cuts=st.lists(st.integers(0, 4000), max_size=4))
def test_pieces_give_the_tokens_of_the_whole(
    tokenizer: Any, small: None, written: str, cuts: list[int]
) -> None:
    places = [0, *sorted(cuts), len(written)]
    parts = [written[a:b] for a, b in pairwise(places)]
    whole = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = tokenize_texts(parts, tokenizer)
    assert tokens.ids.tolist() == whole["input_ids"]
    assert tokens.starts is not None
    assert tokens.starts.tolist() == [start for start, _ in whole["offset_mapping"]]


def test_long_documents_are_tokenised_as_a_whole_is(tokenizer: Any) -> None:
    written = "\n\n".join(make_documents(300))
    assert len(written) > tokenizing.PIECE * 4
    whole = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenize_texts([written], tokenizer).ids.tolist() == whole


@pytest.mark.parametrize("letter", ["a", "aab", " ", "三", "\n", "é", "🙂"])
def test_a_run_without_words_ends(tokenizer: Any, small: None, letter: str) -> None:
    written = letter * 20_000
    whole = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    ids = tokenize_texts([written], tokenizer).ids
    assert len(ids) == pytest.approx(len(whole), abs=20)


def test_what_a_tokenizer_is_given_is_bounded(small: None) -> None:
    core = make_byte_tokenizer(bos=False)
    longest = 0

    class Watched:
        is_fast = True

        def __call__(self, written: str, **more: Any) -> Any:
            nonlocal longest
            longest = max(longest, len(written))
            return core(written, **more)

    counted: list[int] = []
    tokens = tokenize_texts(["word and word " * 1000], Watched(), done=counted.append)
    assert tokens.ids.numel() == 14_000
    assert longest <= 800
    assert 10_000 < sum(counted) <= 14_000


class Slow:
    is_fast = False

    def __call__(self, written: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(written.encode())}


def test_without_places_the_text_is_tokenised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokenize_texts(["ab", "c"], Slow())
    assert tokens.starts is None
    assert torch.equal(tokens.ids, torch.tensor([97, 98, 99], dtype=torch.int32))
    monkeypatch.setattr(tokenizing, "MAX_WHOLE", 2)
    with pytest.raises(CorpusError, match="corpus 'c' has more than 2 characters"):
        tokenize_texts(["ab", "c"], Slow(), name="c")


def test_halves_of_characters_are_replaced(tokenizer: Any) -> None:
    whole = tokenizer("a \ufffd b", add_special_tokens=False)["input_ids"]
    assert tokenize_texts(["a \ud800 b"], tokenizer).ids.tolist() == whole


def test_no_text_has_no_tokens(tokenizer: Any) -> None:
    assert tokenize_texts([], tokenizer).ids.numel() == 0
    assert tokenize_texts(["", ""], tokenizer).ids.numel() == 0
