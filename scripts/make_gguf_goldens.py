#!/usr/bin/env python3
"""Makes tests/goldens/gguf_types.json and tests/goldens/tiny.gguf with the reference Python package.

usage: pip install gguf==0.19.0 numpy && scripts/make_gguf_goldens.py

gguf_types.json: for each ggml type, random blocks (hex) and the values that gguf.quants.dequantize
gives (hex of little-endian FP32). gguf_type_names.json: the number of every type that the package
knows. tiny.gguf: one metadata value of every kind and two tensors, written by gguf.GGUFWriter.
split-0000N-of-00003.gguf: three tensors, one per file, split by the same writer.
"""
import json
import pathlib

import gguf
import numpy as np
from gguf.quants import dequantize

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens"

# For each type, how many blocks to make, and the offsets of a block's half-precision scales: random
# bytes there could be NaN or infinite.
TYPES = {
    "F32": (8, []), "F16": (8, []), "BF16": (8, []),
    "Q8_0": (2, [0]), "Q4_0": (2, [0]), "Q4_1": (2, [0, 2]), "Q5_0": (2, [0]), "Q5_1": (2, [0, 2]),
    "Q4_K": (1, [0, 2]), "Q5_K": (1, [0, 2]), "Q6_K": (1, [208]),
    "Q2_K": (1, [80, 82]), "Q3_K": (1, [108]), "IQ4_NL": (2, [0]), "IQ4_XS": (1, [0]),
}


def types():
    rng = np.random.default_rng(7)
    out = {}
    for name, (count, halves) in TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
        values = rng.standard_normal(count).astype(np.float32)
        if name == "F32":
            blocks = values.view(np.uint8).reshape(count, 4)
        elif name == "F16":  # with a subnormal and a negative zero
            values[:2] = [3e-7, -0.0]
            blocks = values.astype(np.float16).view(np.uint8).reshape(count, 2)
        elif name == "BF16":
            blocks = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(count, 2)
        for at in halves:
            scale = (rng.standard_normal(count) / 16).astype(np.float16)
            blocks[:, at:at + 2] = scale.view(np.uint8).reshape(count, 2)
        stored = blocks.reshape(1, -1)
        if name == "F32":
            stored = stored.view(np.float32)
        elif name == "F16":
            stored = stored.view(np.float16)
        values = dequantize(stored, kind).astype("<f4").reshape(-1)
        assert values.size == count * elements and np.isfinite(values).all()
        out[name] = {"type": int(kind), "blocks": blocks.tobytes().hex(), "values": values.tobytes().hex()}
    return out


def tiny(path):
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint8("an.u8", 200)
    w.add_int8("an.i8", -100)
    w.add_uint16("an.u16", 60000)
    w.add_int16("an.i16", -30000)
    w.add_uint32("an.u32", 4000000000)
    w.add_int32("an.i32", -2000000000)
    w.add_uint64("an.u64", 1 << 40)
    w.add_int64("an.i64", -(1 << 40))
    w.add_float32("an.f32", 0.5)
    w.add_float64("an.f64", 1e300)
    w.add_bool("an.bool", True)
    w.add_string("an.string", "h\u00e9llo")
    w.add_array("integers", [1, -2, 3])
    w.add_array("reals", [0.5, 1.5])
    w.add_array("strings", ["a", "", "\u4e16"])
    w.add_array("nested", [[1, 2], [3]])
    w.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    w.add_tensor("second", np.full((4,), 0.25, dtype=np.float16))
    finish(w)


def split(path):
    w = gguf.GGUFWriter(path, "llama", split_max_tensors=1)
    w.add_string("a.string", "in the first part")
    for i, name in enumerate(["first", "second", "third"]):
        w.add_tensor(name, np.full((4,), i + 0.5, dtype=np.float32))
    finish(w)


def finish(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    (GOLDENS / "gguf_types.json").write_text(json.dumps(types(), indent=1) + "\n")
    names = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
    (GOLDENS / "gguf_type_names.json").write_text(json.dumps(names, indent=1) + "\n")
    tiny(GOLDENS / "tiny.gguf")
    split(GOLDENS / "split.gguf")
