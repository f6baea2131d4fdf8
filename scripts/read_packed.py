#!/usr/bin/env python3
"""Reads a directory in bbb's packed format with numpy and safetensors alone.

    scripts/read_packed.py DIR                     lists the linears and their bits per weight
    scripts/read_packed.py DIR --out FILE          writes every weight in F32 (safetensors)
    scripts/read_packed.py DIR --compare FILE      compares every weight with F32 tensors in FILE

`--bits L` reads the top L bits of nested codes. As a module, weights(directory) gives the same
arrays by name. The program shares no code with bbb, so that two authors read one format.
"""
import argparse
import json
import sys
from pathlib import Path

try:
    import numpy as np
    from safetensors import deserialize
    from safetensors.numpy import load_file, save_file
except ImportError as error:
    sys.exit(f"read_packed.py needs the Python packages numpy and safetensors: {error}")

KNOWN = {"quant_method", "format_version", "bits", "group_size", "scale_dtype", "symmetric",
         "activation_bits", "activation_range", "rotate", "nested", "nested_dequant",
         "modules_to_not_convert", "overrides"}
METHODS = {"bbb", "bbb-lc"}
PLAIN = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "U8": "u1", "F8_E4M3": "u1"}


def files(directory):
    for stem in ("bbb", "model"):
        if (directory / f"{stem}.safetensors").exists():
            return [directory / f"{stem}.safetensors"]
        index = directory / f"{stem}.safetensors.index.json"
        if index.exists():
            shards = json.loads(index.read_text())["weight_map"].values()
            return [directory / name for name in sorted(set(shards))]
    raise ValueError(f"{directory}: no bbb.safetensors and no index of shards")


def tensors(directory):
    """Every tensor as stored; BF16 as F32, E4M3 as bytes."""
    out = {}
    for path in files(directory):
        for name, tensor in deserialize(path.read_bytes()):
            dtype, data = tensor["dtype"], tensor["data"]
            if dtype == "BF16":
                values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
            elif dtype in PLAIN:
                values = np.frombuffer(data, PLAIN[dtype])
            else:
                raise ValueError(f"{path}: {name} is {dtype}")
            out[name] = values.reshape(tensor["shape"])
    return out


def e4m3(codes):
    exponent, mantissa = (codes >> 3).astype(int) & 15, (codes & 7).astype(np.float32)
    scale = np.ldexp(np.float32(1), np.maximum(exponent, 1) - 7).astype(np.float32)
    return scale * (mantissa / 8 + (exponent > 0))


def stream(rows, bits, count):
    """(N, bytes) to (N, count) codes: code k is bits [k b, k b + b), bit 0 of a byte first."""
    flat = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * bits]
    return flat.reshape(len(rows), count, bits).astype(int) @ (1 << np.arange(bits))


def unrotated(groups):
    """2^-i H x of the last axis, by butterflies from stride 1 up; i = ceil(log2(G) / 2)."""
    g = groups.shape[-1]
    stride = 1
    while stride < g:
        x = groups.reshape(*groups.shape[:-1], g // (2 * stride), 2, stride)
        u, v = x[..., 0, :], x[..., 1, :]
        groups = np.stack([u + v, u - v], axis=-2).reshape(groups.shape)
        stride *= 2
    return groups * np.float32(0.5 ** ((g.bit_length()) // 2))


def transformed(x):
    """x times H on its last axis: orthonormal Hadamard blocks of 128, 64 or 32."""
    block = next(b for b in (128, 64, 32) if x.shape[-1] % b == 0)
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return (x.reshape(-1, block) @ (h / np.sqrt(block))).reshape(x.shape)


class Packed:
    def __init__(self, directory, bits=None):
        self.directory = Path(directory)
        self.config = json.loads((self.directory / "config.json").read_text())
        self.settings = self.config.get("quantization_config", {})
        method = self.settings.get("quant_method")
        if method not in METHODS or self.settings["format_version"] != 1:
            raise ValueError(f"{directory}: not bbb's packed format, version 1")
        unknown = set(self.settings) - KNOWN
        if unknown:
            raise ValueError(f"{directory}: unknown keys in quantization_config: {unknown}")
        self.lc = method == "bbb-lc"
        self.tensors = tensors(self.directory)
        self.nested = self.settings.get("nested", False)
        self.load_bits = bits or 8
        if bits and not self.nested:
            raise ValueError(f"{directory}: its codes are not nested")

    def is_table(self, linear):
        """Head or embedding: groups of 32, and of the settings only its own bits."""
        return not linear.startswith("model.layers.")

    def linears(self):
        return [name[: -len(".qweight")] for name in self.tensors if name.endswith(".qweight")]

    def setting(self, linear, key, default=None):
        own = self.settings.get("overrides", {}).get(linear, {})
        return own.get(key, self.settings.get(key, default))

    def inputs(self, linear):
        c = self.config
        if linear.endswith(".o_proj"):
            heads = c["num_attention_heads"]
            return heads * (c.get("head_dim") or c["hidden_size"] // heads)
        return c["intermediate_size" if linear.endswith(".down_proj") else "hidden_size"]

    def stored_weight(self, linear):
        """(N, K') in stored positions: S e (q - z)."""
        scales = e4m3(self.tensors[linear + ".scales"])
        n, groups = scales.shape
        group = 32 if self.is_table(linear) else self.settings["group_size"]
        k = groups * group
        bits = self.setting(linear, "bits")
        codes = self.tensors[linear + ".qweight"]
        offset = 0.0
        if self.nested and not self.is_table(linear):
            planes = np.unpackbits(codes[: self.load_bits], axis=2, bitorder="little").astype(int)
            weights = 1 << np.arange(self.load_bits - 1, -1, -1)
            shift = 8 - self.load_bits
            q = np.tensordot(weights, planes, axes=1) << shift
            if self.settings.get("nested_dequant", "middle") == "middle":
                offset = (2**shift - 1) / 2
        else:
            q = stream(codes, bits, k)
        if self.settings.get("symmetric", False) and not self.is_table(linear):
            z = np.full((n, groups), 2 ** (bits - 1) - 0.5)
        else:
            z = stream(self.tensors[linear + ".zeros"], bits, groups)
        levels = q.reshape(n, groups, group) + offset - z[:, :, None]
        scales = self.tensors[linear + ".master_scale"][0] * scales
        return (levels.astype(np.float32) * scales[:, :, None]).reshape(n, k)

    def lc_weight(self, linear):
        """(N, K): diag(v) H (A q + c) H diag(u), computed in F64."""
        part = {name: self.tensors[f"{linear}.{name}"].astype(float) for name in ("u", "v", "map")}
        q = stream(self.tensors[linear + ".qweight"], 2, len(part["u"]))
        vectors = q.reshape(-1, 4) @ part["map"][:, :4].T + part["map"][:, 4]
        levels = transformed(transformed(vectors.reshape(q.shape)).T).T
        return (part["v"][:, None] * levels * part["u"]).astype(np.float32)

    def weight(self, linear):
        """(N, K) F32: rotations undone, pairs summed or averaged, channels in their order."""
        if self.lc and not self.is_table(linear):
            return self.lc_weight(linear)
        stored = self.stored_weight(linear)
        if self.is_table(linear):
            return stored
        k, group = self.inputs(linear), self.settings["group_size"]
        none = np.zeros(0, int)
        outliers = self.tensors.get(linear + ".outlier_channels", none)
        split = self.tensors.get(linear + ".split_channels", none)
        singles = np.setdiff1d(np.arange(k), np.concatenate([outliers, split]))
        pairs_end = len(outliers) + 2 * len(split)
        used = pairs_end + len(singles)
        if stored.shape[1] != -(-used // group) * group:
            raise ValueError(f"{linear}: {stored.shape[1]} positions for {used} channels and copies")
        if self.setting(linear, "rotate") == "group":
            begin, end = -(-pairs_end // group) * group, used // group * group
            if begin < end:
                part = stored[:, begin:end].reshape(len(stored), -1, group)
                stored[:, begin:end] = unrotated(part).reshape(len(stored), -1)
        weight = np.empty((len(stored), k), np.float32)
        pairs = stored[:, len(outliers) : pairs_end]
        factor = 0.5 if self.setting(linear, "split_side") == "activation" else 1
        weight[:, outliers] = stored[:, : len(outliers)]
        weight[:, split] = (pairs[:, 0::2] + pairs[:, 1::2]) * np.float32(factor)
        weight[:, singles] = stored[:, pairs_end:used]
        return weight

    def bits_per_weight(self):
        stored = size = 0
        for linear in self.linears():
            if self.is_table(linear):
                continue
            parts = [t for name, t in self.tensors.items() if name.rpartition(".")[0] == linear]
            stored += 8 * sum(t.nbytes for t in parts)
            rows = self.tensors[linear + (".qweight" if self.lc else ".scales")]
            size += len(rows) * self.inputs(linear)
        return stored / size


def weights(directory, bits=None):
    """Every weight of the model by its Hugging Face name, as F32 arrays."""
    packed = Packed(directory, bits)
    linears = packed.linears()
    out = {linear + ".weight": packed.weight(linear) for linear in linears}
    for name, tensor in packed.tensors.items():
        if name.rpartition(".")[0] not in linears:
            out[name] = tensor.astype(np.float32)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--bits", type=int, help="of nested codes, the top bits to read")
    parser.add_argument("--out", help="write all weights in F32")
    parser.add_argument("--compare", help="compare with F32 weights in a safetensors file")
    options = parser.parse_args()
    try:
        packed = Packed(options.directory, options.bits)
        if options.out or options.compare:
            read = weights(options.directory, options.bits)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"read_packed.py: {error}")
    if options.out:
        save_file(read, options.out)
    if options.compare:
        wanted = load_file(options.compare)
        if set(wanted) != set(read):
            sys.exit(f"{options.directory}: other tensors: {sorted(set(wanted) ^ set(read))[:5]}")
        different = [name for name in wanted if not np.array_equal(wanted[name], read[name])]
        for name in different[:5]:
            print(f"{name}: largest difference {np.abs(wanted[name] - read[name]).max()}")
        if different:
            sys.exit(f"{len(different)} of {len(wanted)} tensors differ")
        print(f"{len(wanted)} tensors are equal")
    if not (options.out or options.compare):
        print(f"{len(packed.linears())} packed linears, {packed.bits_per_weight():.4f} bits per weight")


if __name__ == "__main__":
    main()
