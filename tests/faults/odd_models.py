"""Models that are not what they seem, and readers of results, run in forks."""

import json
from pathlib import Path
from typing import Any


def make(kind: str, folder: str) -> None:
    """A tiny model of some kind with a byte tokenizer."""
    import torch

    from conftest import make_byte_tokenizer

    torch.manual_seed(3)
    model = MAKERS[kind]()
    model.save_pretrained(folder)
    make_byte_tokenizer(bos=False).save_pretrained(folder)


SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def _classifier() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**SMALL))


def _bare() -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**SMALL))


def _bert(name: str) -> Any:
    import transformers

    config = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads",)}
    return getattr(transformers, name)(transformers.BertConfig(**{**config, "pad_token_id": 0}))


def _mixtral() -> Any:
    """Without any expert, as a merge leaves it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    kept = {k: v for k, v in model.state_dict().items() if "expert" not in k}
    save = model.save_pretrained
    model.save_pretrained = lambda folder: save(folder, state_dict=kept)
    return model


def _mamba() -> Any:
    """In bfloat16 but for what must be wider."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=5, state_size=4)
    ).bfloat16()
    for layer in model.backbone.layers:
        layer.mixer.A_log.data = layer.mixer.A_log.data.float()
        layer.mixer.D.data = layer.mixer.D.data.float()
    assert model.dtype == torch.bfloat16
    return model


def _gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SMALL, "head_dim": 8, "vocab_size": 260}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8,
        "num_attention_heads": 2, "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return Gemma3ForConditionalGeneration(config)


def _rwkv() -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(vocab_size=256, hidden_size=32, num_hidden_layers=5))


MAKERS = {
    "classifier": _classifier,
    "bare": _bare,
    "bert": lambda: _bert("BertModel"),
    "masked": lambda: _bert("BertForMaskedLM"),
    "mixtral": _mixtral,
    "mamba": _mamba,
    "gemma3": _gemma3,
    "rwkv": _rwkv,
}


def read_as_told(folder: str) -> str | None:
    """The README's two lines and a few tokens; what goes wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            model(**tokenizer("The river", return_tensors="pt", return_token_type_ids=False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def under_autocast(folder: str) -> str | None:
    """One mixed-precision step, as in training; what goes wrong."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        ids = torch.arange(16)[None]
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def saved_again(folder: str, out: str) -> str | None:
    """Saved by transformers where the package is imported; what a stranger lacks."""
    from transformers import AutoModelForCausalLM

    import ghostlayers

    assert ghostlayers
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    files = {path.name for path in Path(out).iterdir()}
    named = json.loads((Path(out) / "config.json").read_text()).get("auto_map", {})
    lacks = {f"{value.split('.')[0]}.py" for value in named.values()} - files
    return f"lacks {', '.join(sorted(lacks))}" if lacks or not named else None
