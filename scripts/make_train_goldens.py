#!/usr/bin/env python3
"""Makes tests/goldens/train/: a tiny Llama, windows of tokens, and the losses of training its blocks.

usage: pip install autograd==1.8.0 numpy safetensors && scripts/make_train_goldens.py

An independent implementation of the method, in F64: two blocks, stages w4a16 and w2a16, by AdamW
through the fake quantizer. A batch holds all training windows, so their order does not matter.
Gradients come from the package autograd; none of bbb's code is used.

A run in F32 or bf16 differs by its roundings. The quantizer may magnify them: a weight near a
threshold may fall on its other side. So the training is repeated with a random relative error of up
to half an epsilon in every activation and gradient. The golden file holds, for both dtypes and each
stage of each block, the largest relative difference of these runs; the test allows a small multiple
of it. Weights have all digits of F32. With fewer digits, values would be on ties of the grid, where
any rounding decides.
"""
import json
import math
import pathlib

import autograd.numpy as np
import numpy
from autograd import grad
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "train"
VOCAB, D, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 40, 32, 64, 2, 4, 2, 16
SEQ_LEN, SAMPLES, VAL_SAMPLES, EPOCHS, GROUP = 16, 4, 2, 6, 32
STAGES = [(4, 1e-3), (2, 3e-3)]  # bits, peak learning rate
EPS, THETA = 1e-5, 1e4
RUNS = 8
HALF_EPSILON = {"f32": 2.0**-24, "bf16": 2.0**-9}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, D), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, D),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, D), "self_attn.o_proj": (D, HEADS * HEAD_DIM),
    "mlp.gate_proj": (HIDDEN, D), "mlp.up_proj": (HIDDEN, D), "mlp.down_proj": (D, HIDDEN)}
NORMS = ["input_layernorm", "post_attention_layernorm"]

# The positive finite E4M3 numbers, by their code.
E4M3 = numpy.array([m / 512 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
                    for e in range(16) for m in range(8)][:-1])


def nearest_e4m3(x):
    """Rounds to nearest, ties to the even code; saturates at the largest and smallest number."""
    above = numpy.clip(numpy.searchsorted(E4M3, x), 1, len(E4M3) - 1)
    below = above - 1
    low, high = x - E4M3[below], E4M3[above] - x
    code = numpy.where((low < high) | ((low == high) & (below % 2 == 0)), below, above)
    return E4M3[numpy.maximum(code, 1)]


def quantize(w, bits):
    """W^, and a mask of the weights whose code was not clipped."""
    x = w.reshape(w.shape[0], -1, GROUP)
    top = 2**bits - 1
    lowest = numpy.minimum(x.min(-1, keepdims=True), 0)
    scale = (numpy.maximum(x.max(-1, keepdims=True), 0) - lowest) / top
    master = 2.0 ** math.ceil(math.log2(scale.max() / 448))
    step = master * nearest_e4m3(scale / master)
    zero = numpy.clip(numpy.floor(-lowest / step + 0.5), 0, top)
    code = numpy.floor(x / step + 0.5) + zero
    levels = (numpy.clip(code, 0, top) - zero) * step
    return levels.reshape(w.shape), ((code >= 0) & (code <= top)).reshape(w.shape)


class Noise:
    """Multiplies by 1 + u, u uniform within half an epsilon; does nothing if half_epsilon is 0."""

    def __init__(self, half_epsilon, seed):
        self.half_epsilon, self.random = half_epsilon, numpy.random.default_rng(seed)

    def __call__(self, x):
        return self.of(x, self.half_epsilon)

    def master(self, x):  # F32 on every device
        return self.of(x, min(self.half_epsilon, HALF_EPSILON["f32"]))

    def of(self, x, half_epsilon):
        if half_epsilon == 0:
            return x
        return x * (1 + self.random.uniform(-half_epsilon, half_epsilon, x.shape))


def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def rope(x):  # (B, T, H, d): pairs (i, i + d/2)
    half = HEAD_DIM // 2
    angle = numpy.arange(x.shape[1])[:, None] * THETA ** (-numpy.arange(half) / half)
    cos, sin = numpy.cos(angle)[:, None, :], numpy.sin(angle)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(p, x, noise):
    t = x.shape[1]
    heads = lambda h, name: noise(np.dot(h, p[name].T)).reshape(x.shape[0], t, -1, HEAD_DIM)
    h = noise(rms_norm(x, p["input_layernorm"]))
    q, k = (noise(rope(heads(h, f"self_attn.{name}_proj"))) for name in "qk")
    v = heads(h, "self_attn.v_proj")
    k, v = (np.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(HEAD_DIM)
    scores = np.where(numpy.tril(numpy.ones((t, t), bool)), scores, -1e30)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    weights = noise(weights / np.sum(weights, axis=-1, keepdims=True))
    o = noise(np.einsum("bhts,bshd->bthd", weights, v)).reshape(x.shape[0], t, -1)
    x = noise(x + np.dot(o, p["self_attn.o_proj"].T))
    h = noise(rms_norm(x, p["post_attention_layernorm"]))
    gate, up = (noise(np.dot(h, p[f"mlp.{name}_proj"].T)) for name in ("gate", "up"))
    h = noise(gate / (1 + np.exp(-gate)) * up)
    return noise(x + np.dot(h, p["mlp.down_proj"].T))


def mean_square(y, target):
    return np.mean((y - target) ** 2)


class Trained:
    """One stage of one block: masters, moments, AdamW."""

    def __init__(self, masters, bits, peak_lr, noise):
        self.p = {name: w.copy() for name, w in masters.items()}
        self.m = {name: numpy.zeros_like(w) for name, w in masters.items()}
        self.v = {name: numpy.zeros_like(w) for name, w in masters.items()}
        self.bits, self.peak_lr, self.noise, self.steps = bits, peak_lr, noise, 0

    def quantized(self):
        made = {name: quantize(w, self.bits) if name in SHAPES else (w, numpy.ones(w.shape, bool))
                for name, w in self.p.items()}
        return {n: w for n, (w, _) in made.items()}, {n: kept for n, (_, kept) in made.items()}

    def forward(self, x):
        return block(self.quantized()[0], x, self.noise)

    def step(self, x, target):
        used, kept = self.quantized()
        values = []

        def loss(p):
            value = mean_square(block(p, x, self.noise), target)
            values.append(getattr(value, "_value", value))
            return value

        g = grad(loss)(used)  # straight through, except where a code was clipped
        g = {name: self.noise(g[name]) * kept[name] for name in g}
        norm = math.sqrt(sum(float((x * x).sum()) for x in g.values()))
        t, total = self.steps, EPOCHS
        lr = self.peak_lr * (0.05 + 0.95 * (1 + math.cos(math.pi * t / total)) / 2)
        self.steps += 1
        for name in g:
            d = g[name] * min(1.0, 1.0 / norm)
            self.m[name] = self.noise(0.9 * self.m[name] + 0.1 * d)
            self.v[name] = 0.999 * self.v[name] + 0.001 * d * d
            self.p[name] = self.noise.master(
                self.p[name] - lr * (self.m[name] / (1 - 0.9**self.steps)) / (
                    numpy.sqrt(self.v[name] / (1 - 0.999**self.steps)) + 1e-8))
        return {"loss": float(values[0]), "grad_norm": norm, "lr": lr}


def run(model, windows, noise):
    """The log: the values of every step, and the validation losses."""
    embedded = model["model.embed_tokens.weight"][windows]
    streams = [embedded] * (len(STAGES) + 1)
    steps, validation = [], []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        masters = {name: model[f"{prefix}{name}.weight"] for name in [*NORMS, *SHAPES]}
        teacher = {name: noise(w) if name in SHAPES else w for name, w in masters.items()}
        target = block(teacher, streams[0], noise)
        train, held_out = slice(0, SAMPLES), slice(SAMPLES, None)
        results = []
        for t, (bits, peak_lr) in enumerate(STAGES):
            x = streams[t + 1]
            stage = Trained(masters, bits, peak_lr, noise)
            best = math.inf
            for epoch in range(EPOCHS + 1):
                if epoch > 0:
                    steps.append(stage.step(x[train], target[train]))
                loss = float(mean_square(stage.forward(x[held_out]), target[held_out]))
                validation.append(loss)
                if loss < best:
                    best, masters = loss, {name: w.copy() for name, w in stage.p.items()}
            results.append(Trained(masters, bits, peak_lr, noise))
        streams = [target] + [r.forward(streams[t + 1]) for t, r in enumerate(results)]
    return {"loss": [s["loss"] for s in steps], "grad_norm": [s["grad_norm"] for s in steps],
            "lr": [s["lr"] for s in steps], "validation": validation}


def main():
    random = numpy.random.default_rng(1)

    def bf16(x):
        bits = x.astype(numpy.float32).view(numpy.uint32) & 0xFFFF0000
        return bits.view(numpy.float32)

    model = {"model.embed_tokens.weight": bf16(random.normal(0, 1, (VOCAB, D))),
             "model.norm.weight": numpy.ones(D, numpy.float32)}
    for layer in range(LAYERS):
        for name in NORMS:
            model[f"model.layers.{layer}.{name}.weight"] = bf16(1 + random.normal(0, 0.1, D))
        for name, shape in SHAPES.items():
            model[f"model.layers.{layer}.{name}.weight"] = random.normal(0, 0.2, shape).astype(
                numpy.float32)
    windows = random.integers(0, VOCAB, (SAMPLES + VAL_SAMPLES, SEQ_LEN))
    exact = {name: w.astype(numpy.float64) for name, w in model.items()}
    golden = run(exact, windows, Noise(0, 0))
    golden["windows"] = windows.tolist()
    golden["spread"] = {}
    for dtype, half_epsilon in HALF_EPSILON.items():
        runs = [run(exact, windows, Noise(half_epsilon, seed)) for seed in range(RUNS)]
        golden["spread"][dtype] = {
            key: [max(abs(a - b) / b for r in runs for a, b in zip(stage_of(r), stage_of(golden)))
                  for t in range(LAYERS * len(STAGES))
                  for stage_of in [lambda r: r[key][t * lines:(t + 1) * lines]]]
            for key, lines in (("loss", EPOCHS), ("grad_norm", EPOCHS), ("validation", EPOCHS + 1))}
    print(json.dumps(golden["spread"], indent=1))

    OUT.mkdir(parents=True, exist_ok=True)
    save_file(model, OUT / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": D, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "rms_norm_eps": EPS, "rope_theta": THETA, "max_position_embeddings": 64,
        "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32"}
    (OUT / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (OUT / "golden.json").write_text(json.dumps(golden) + "\n")


main()
