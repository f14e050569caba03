"""Whether two models can be compared on the same token ids."""

from ghostlayers.errors import InputError
from ghostlayers.model.dense import DenseModel


def check_same_tokens(model: DenseModel, other: DenseModel) -> None:
    """Refuse two models to which one token id is two different tokens.

    A token that only one of them has is no difference. Tokenizers made of GGUF files are passed
    over: they may spell a token in another way.

    Raises:
        InputError: with the first of these ids.
    """
    if model.base.file is not None or other.base.file is not None:
        return
    mine, theirs = _tokens(model), _tokens(other)
    differing = [number for number in mine if theirs.get(number, mine[number]) != mine[number]]
    if differing:
        number = min(differing)
        raise InputError(
            f"'{model.base.name}' and '{other.base.name}' have tokenizers that number their tokens "
            f"differently ({len(differing):,} of them; {number} is {mine[number][:40]!r} and "
            f"{theirs[number][:40]!r}), so neither can be measured on the other's text. Give two "
            "models with the same tokenizer."
        )


def _tokens(model: DenseModel) -> dict[int, str]:
    """Tokens by their ids; none where the tokenizer does not list them."""
    try:
        vocabulary = model.tokenizer.get_vocab()
    except (AttributeError, NotImplementedError):
        return {}
    return {number: token for token, number in vocabulary.items()}
