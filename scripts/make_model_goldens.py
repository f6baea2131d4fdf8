#!/usr/bin/env python3
"""Makes tests/goldens/models/: tiny random models of every family and rope scaling that bbb reads,
and the negative log-likelihood that transformers gives them.

usage: pip install torch transformers==5.17.0 numpy safetensors && scripts/make_model_goldens.py

All models share the tensors of weights.safetensors; goldens.json has for each its config.json, the
biases and norms of heads that it has beside the tensors of a plain Llama (`extras`), and `nll`: for
a number of tokens T, the mean over two windows of T tokens each. transformers runs in F64, except
for the angles of the rotations, which it computes in F32.
"""
import json
import pathlib
import shutil
import tempfile

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "models"
VOCAB, D, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 48, 32, 96, 2, 4, 2, 16, 64
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, D), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, D),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, D), "self_attn.o_proj": (D, HEADS * HEAD_DIM),
    "mlp.gate_proj": (HIDDEN, D), "mlp.up_proj": (HIDDEN, D), "mlp.down_proj": (D, HIDDEN)}
NORMS = {"input_layernorm": D, "post_attention_layernorm": D,
         "self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
QKV = [f"self_attn.{x}_proj.bias" for x in "qkv"]
ATTENTION = QKV + ["self_attn.o_proj.bias"]
MLP = [f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")]
HEAD_NORMS = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]


def rope(kind, **more):
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0, **more}}


# Name: changes to config.json, extras, lengths of the windows.
MODELS = {
    "llama": ({}, [], [48]),
    "linear": (rope("linear"), [], [48]),
    "dynamic": (rope("dynamic"), [], [48, 65, 100]),
    "llama3": (rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=32), [], [48]),
    "yarn": (rope("yarn", original_max_position_embeddings=16), [], [48]),
    "yarn_positions": (rope("yarn"), [], [48]),
    "yarn_factor": (rope("yarn", original_max_position_embeddings=16, attention_factor=1.5), [], [48]),
    "yarn_betas": (rope("yarn", original_max_position_embeddings=16, beta_fast=4, beta_slow=0.5,
                        truncate=False), [], [48]),
    "yarn_mscale": (rope("yarn", original_max_position_embeddings=16, mscale=4.0, mscale_all_dim=0.25),
                    [], [48]),
    "attention_bias": ({"attention_bias": True}, ATTENTION, [48]),
    "mlp_bias": ({"mlp_bias": True}, MLP, [48]),
    "qwen2": ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8,
               "max_window_layers": 1}, QKV, [48]),
    "qwen2_window": ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8,
                      "max_window_layers": 0}, QKV, [48]),
    "qwen3": ({"model_type": "qwen3"}, HEAD_NORMS, [48]),
    "qwen3_bias_yarn": ({"model_type": "qwen3", "attention_bias": True,
                         **rope("yarn", original_max_position_embeddings=16)},
                        ATTENTION + HEAD_NORMS, [48]),
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def weights():
    rng = np.random.default_rng(5)
    tensors = {}

    def add(name, values):
        tensors[name] = torch.tensor(values).to(torch.bfloat16)

    add("model.embed_tokens.weight", rng.standard_normal((VOCAB, D)))
    add("lm_head.weight", 0.3 * rng.standard_normal((VOCAB, D)))
    add("model.norm.weight", 1 + 0.3 * rng.standard_normal(D))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in LINEARS.items():
            add(prefix + name + ".weight", 1.5 * rng.standard_normal(shape) / shape[1] ** 0.5)
            add(prefix + name + ".bias", 0.5 * rng.standard_normal(shape[0]))
        for name, size in NORMS.items():
            add(prefix + name + ".weight", 1 + 0.3 * rng.standard_normal(size))
    return tensors


def is_extra(name):
    return name.endswith(".bias") or "_norm.weight" in name and "self_attn" in name


def config_of(changes):
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
    config.update(changes)
    return {"architectures": [CLASSES[config["model_type"]]], **config}


def nll(folder, ids):
    # A new model for each length: dynamic scaling remembers the longest sequence so far.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits[:, :-1]
    picked = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, 1:, None])
    return -picked.mean().item()


def main():
    OUT.mkdir(exist_ok=True)
    tensors = weights()
    save_file(tensors, OUT / "weights.safetensors", {"format": "pt"})
    (OUT / "weights.safetensors").chmod(0o644)
    rng = np.random.default_rng(6)
    goldens = {"tokens": {}, "models": {}}
    for length in sorted({n for _, _, lengths in MODELS.values() for n in lengths}):
        goldens["tokens"][str(length)] = rng.integers(0, VOCAB, (2, length)).tolist()
    for name, (changes, extras, lengths) in MODELS.items():
        config = config_of(changes)
        folder = pathlib.Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(config))
        own = {k: v for k, v in tensors.items()
               if not is_extra(k) or k.split(".", 3)[-1] in extras}
        save_file(own, folder / "model.safetensors", {"format": "pt"})
        values = {str(n): nll(folder, goldens["tokens"][str(n)]) for n in lengths}
        goldens["models"][name] = {"config": config, "extras": extras, "nll": values}
        shutil.rmtree(folder)
        print(name, values)
    (OUT / "goldens.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
