"""A real model with experts, of a small dense one: the same function, in Mixtral's build.

experts.py MODEL OUT [--experts 4]

Each expert holds a share of every MLP and all of them see every token, so that what the new model
computes is what the old one computes, and whatever is said of one can be checked on the other.
MODEL is a Llama without biases, SmolLM2 for instance.
"""

import argparse

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
)

SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def with_experts(dense: torch.nn.Module, experts: int) -> torch.nn.Module:
    """The model whose layers sum ``experts`` MLPs, each a share of the dense one."""
    width = dense.config.intermediate_size // experts
    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in SHARED},
        intermediate_size=width,
        num_local_experts=experts,
        num_experts_per_tok=experts,
        sliding_window=None,
        dtype=dense.dtype,
    )
    mixed = MixtralForCausalLM(config).to(dense.dtype)
    weights = dense.state_dict()
    with torch.no_grad():
        for index, layer in enumerate(mixed.model.layers):
            mlp = f"model.layers.{index}.mlp."
            gate, up, down = (
                weights.pop(f"{mlp}{name}_proj.weight") for name in ("gate", "up", "down")
            )
            layer.mlp.gate.weight.zero_()  # so that all experts weigh the same
            packed = [each.view(experts, width, -1) for each in (gate, up)]
            layer.mlp.experts.gate_up_proj.copy_(torch.cat(packed, dim=1))
            layer.mlp.experts.down_proj.copy_(
                experts * down.view(-1, experts, width).transpose(0, 1)
            )
    mixed.load_state_dict(weights, strict=False)
    return mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--experts", type=int, default=4)
    given = parser.parse_args()
    stored = AutoConfig.from_pretrained(given.model).dtype
    dense = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    mixed = with_experts(dense, given.experts)
    ids = torch.arange(40)[None] * 37 % dense.config.vocab_size
    with torch.no_grad():
        one, other = dense(ids).logits, mixed(ids).logits
    worst = (one - other).abs().max() / one.abs().max()
    print(f"largest difference of a logit, of the largest: {worst:.1e}")
    mixed.to(stored).config.dtype = stored
    mixed.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.out)


if __name__ == "__main__":
    main()
