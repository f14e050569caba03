"""What a model folder is worth, worked out without a line of the package.

Files are read with safetensors, the class comes from transformers by the name of the model type,
and a tensor too many, too few or of another shape means that there is no right answer.
"""

import json
import math
from pathlib import Path
from typing import Any

HARMLESS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def loss_of(folder: str, text: str, length: int, windows: int, drop: list[int]) -> dict[str, Any]:
    """Mean loss in nats over the first windows of a text, or why there is none.

    Args:
        folder: of a model and its tokenizer; or a GGUF file, a Llama's.
        text: a file.
        length: tokens of a window.
        windows: how many.
        drop: decoder layers left out.
    """
    try:
        model = _load_gguf(Path(folder)) if folder.endswith(".gguf") else _load(Path(folder))
    except Exception as error:
        return {"refuse": f"{type(error).__name__}: {error}"[:300]}
    return _measure(model, folder, text, length, windows, drop)


def _load(folder: Path) -> Any:
    import torch
    import transformers
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    state: dict[str, Any] = {}
    for path in _files(folder):
        for name, value in load_file(path).items():
            if name in state:
                raise ValueError(f"{name} twice")
            state[name] = value
    model = model_class._from_config(config, dtype=torch.float32)
    state = {k: v.float() for k, v in state.items() if not k.endswith(HARMLESS)}
    if not any(name.startswith("model.") for name in state):  # saved from the model within
        state = {k if k == "lm_head.weight" else f"model.{k}": v for k, v in state.items()}
    if "lm_head.weight" not in state and config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    elif config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"].clone())
    model.load_state_dict(state, strict=True)
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"not finite: {bad[0]}")
    return model.eval()


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "token_embd": "model.embed_tokens",
    "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip


def _load_gguf(path: Path) -> Any:
    """A Llama, weight by weight, with what llama.cpp asks for and what it takes for granted."""
    import gguf
    import torch
    import transformers

    parts = sorted(path.parent.glob("whole-*.gguf")) if "-of-" in path.name else [path]
    readers = [gguf.GGUFReader(part) for part in parts]
    said = {key: field.contents() for key, field in readers[0].fields.items()}
    if said["general.architecture"] != "llama":
        raise ValueError("another family")
    said = {k.removeprefix("llama."): v for k, v in said.items() if k.startswith("llama.")}
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    held = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in tensors}
    heads = said["attention.head_count"]
    config = transformers.LlamaConfig(
        vocab_size=held["token_embd.weight"].shape[0],
        hidden_size=said["embedding_length"],
        num_hidden_layers=said["block_count"],
        intermediate_size=said["feed_forward_length"],
        num_attention_heads=heads,
        num_key_value_heads=said.get("attention.head_count_kv", heads),
        head_dim=said.get("attention.key_length", said["embedding_length"] // heads),
        rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": said.get("rope.freq_base", 1e4)},
        max_position_embeddings=said["context_length"],
        tie_word_embeddings="output.weight" not in held,
    )
    state = {}
    for name, tensor in held.items():
        stem, _, end = name.rpartition(".")
        before, _, part = stem.rpartition(".")
        count = {"attn_q": heads, "attn_k": config.num_key_value_heads}.get(part)
        if count is not None:  # neighbouring rows in llama.cpp, halves here
            tensor = (
                tensor.view(count, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            )
        layer = before.replace("blk.", "model.layers.")
        state[".".join(each for each in (layer, NAMES[part], end) if each)] = tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.float32)
    model.load_state_dict(state, strict=True)
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"not finite: {bad[0]}")
    return model.eval()


def _files(folder: Path) -> list[Path]:
    """The one file, or those that the index names."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.exists() or not index.exists():
        return [one]
    return [
        folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})
    ]


def _measure(
    model: Any, folder: str, text: str, length: int, windows: int, drop: list[int]
) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    model.config.return_dict = True  # how a model answers is no matter of what
    if drop:
        kept = [each for i, each in enumerate(model.model.layers) if i not in drop]
        model.model.layers = torch.nn.ModuleList(kept)
    try:
        where, name = Path(folder), {}
        if where.suffix == ".gguf":
            where, name = where.parent, {"gguf_file": where.name}
        tokenizer = AutoTokenizer.from_pretrained(where, **name)
        content = Path(text).read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"])
        ids = ids[: windows * length].view(windows, length)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.double()
    except Exception as error:
        return {"refuse": f"{type(error).__name__}: {error}"[:300]}
    picked = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    loss = -float(picked.mean())
    return {"loss": loss} if math.isfinite(loss) else {"refuse": "the loss is not finite"}
