"""Whether a model reads from left to right."""

import torch

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.dense import DenseModel

CAUSAL_TOKENS = 8
"""Of two texts that differ in the last."""

CAUSAL_TOLERANCE = {torch.float32: 1e-4}
"""Share of the largest logit that rounding may change; in shorter types a hundred times more."""


@torch.no_grad()
def check_causal(loaded: DenseModel) -> None:
    """Refuse a model in which later tokens change what is predicted before them.

    An encoder has decoder layers' names and gives logits, too, and a perplexity that means nothing.
    One look at a few tokens tells; of an offloaded model, through its first decoder layer only.

    Raises:
        UnsupportedModelError: the model does not read from left to right.
    """
    model = loaded.network
    first = torch.arange(CAUSAL_TOKENS) % model.config.get_text_config().vocab_size
    other = first.clone()
    other[-1] = first[0]
    seen = _seen(loaded, torch.stack([first, other]))[:, :-1].double()
    off = float((seen[0] - seen[1]).abs().max())
    allowed = CAUSAL_TOLERANCE.get(model.dtype, 1e-2) * float(seen.abs().max())
    if off > allowed:
        raise UnsupportedModelError(
            f"'{loaded.base.name}' ({type(model).__name__}) is no causal language model: a later "
            "token changes what it gives for those before it, as in an encoder such as BERT, so "
            "that it has no perplexity. Expected a decoder such as Llama, Qwen or Gemma."
        )


def _seen(model: DenseModel, ids: torch.Tensor) -> torch.Tensor:
    if model.residency.offloaded:
        batch, stream = model.begin(ids)
        return model.run_layer(0, batch, stream)
    ids = ids.to(model.device)
    logits: torch.Tensor = model.network(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits
