"""Entries of config.json: other types, other values, none at all."""

import json

from faults.kinds.commands import any_of
from faults.materials import Place, Plan

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**30, 0.5, -0.5, 1e300, "", "x", "auto",
    "gelu", "torch.bfloat16", "int8", "\x1b[31mred\x07", "[/x]", [], [1], [[1]], {}, {"a": 1},
    {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "x"},
]  # fmt: skip
WHOLE = ["null", "[]", "3", '"x"', "{}", "", "{", '{"model_type": "llama"}', "\ufeff{}", "[" * 9000]
EDITS = {
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-2,
    "hidden_act": "gelu",
    "num_hidden_layers": 4,
    "vocab_size": 300,
    "num_key_value_heads": 4,
    "num_attention_heads": 8,
    "head_dim": 4,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "dtype": "bfloat16",
    "torch_dtype": "torch.bfloat16",
    "return_dict": False,
    "use_cache": False,
    "max_position_embeddings": 16,
    "architectures": ["LlamaForSequenceClassification"],
    "model_type": "mistral",
    "pad_token_id": 999,
    "sliding_window": 4,
    "quantization_config": {"quant_method": "x"},
    "layer_types": ["full_attention"] * 5,
    "output_hidden_states": True,
    "is_encoder_decoder": True,
    "num_labels": 3,
    "attn_implementation": "x",
    "partial_rotary_factor": 0.5,
}
"""Values that a person could have written; the oracle says what they make of the model."""


def make(place: Place, index: int) -> Plan:
    """A config with one entry changed, or another file altogether."""
    rng = place.rng
    model = place.take("tied", "text.txt")
    path = model / "config.json"
    if index < len(EDITS):
        key = list(EDITS)[index]
        place.edit_json(path, **{key: EDITS[key]})
        return any_of(place, "in/tied", f"config {key}={EDITS[key]}")
    if index < len(EDITS) + len(WHOLE):
        text = WHOLE[index - len(EDITS)]
        path.write_text(text, encoding="utf-8")
        plan = any_of(place, "in/tied", f"config is {text[:40]!r}")
        plan.must = "refuse"
        return plan
    keys = sorted(json.loads(path.read_text()))
    key = keys[index % len(keys)] if rng.random() < 0.8 else rng.choice(sorted(EDITS))
    value = rng.choice([..., *VALUES])
    place.edit_json(path, **{key: value})
    shown = "removed" if value is ... else repr(value)[:40]
    return any_of(place, "in/tied", f"config {key}={shown}")
