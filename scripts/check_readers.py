#!/usr/bin/env python3
"""Checks that other programs read what `bbb export` writes, as it reads it itself.

    scripts/check_readers.py --model MODEL --text FILE [--run RUN | --bits B] [CHECK ..]

gptq          GPTQModel's torch kernel on the CPU: perplexity; split channels are refused
              (packages gptqmodel, torch, transformers)
gguf          gguf-py: every tensor equals the packed model's. llama.cpp: perplexity and greedy
              texts, of the file and of its weights in F32
              (packages numpy, safetensors, gguf, xllamacpp, torch, transformers)
transformers  refuses the packed directory (packages torch, transformers)

Without names all three run, and a table follows. Nothing is installed; a missing package is named,
and the exit code is 1. The exports come from a finished run, or from --model rounded to nearest.

The verdict is by two rules alone. Perplexities are within 0.5 % of `bbb ppl`, over the same tokens.
A text of 40 tokens is that of `bbb decode`, or at the first different token our two best logits are
within 2 %, and so is llama.cpp's token. What breaks a rule fails, whatever explains it.

llama.cpp multiplies quantized weights by inputs that it rounds to 8 bits, in blocks of 32. Where a
rule is broken, a further line gives the same figure of a forward in transformers that rounds inputs
in this way: if that is close to llama.cpp's, the rounding explains the difference. Such a line
changes no verdict. The rows "llama.cpp, F32" are the file's weights in F32, whose inputs llama.cpp
does not round.
"""
import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
PROMPTS = ["The capital of France is", "Once upon a time there was a small dog",
           "To bake a cake you need"]
PERPLEXITY_MARGIN, LOGIT_MARGIN, TEXT_TOKENS = 0.005, 0.02, 40
PACKAGES = {"gptq": ["gptqmodel", "torch", "transformers"],
            "gguf": ["numpy", "safetensors", "gguf", "xllamacpp", "torch", "transformers"],
            "transformers": ["torch", "transformers"]}


TABLE = []  # rows: reader, what, result, whether it is good


def report(reader, what, result, good):
    TABLE.append((reader, what, result, "yes" if good else "NO"))
    print(f"{reader}: {what}: {result}{'' if good else '  <-- NOT GOOD'}", flush=True)
    return good


def explain(reader, what, result):
    """A line beside a broken rule, which stays broken."""
    print(f"{reader}: {what}: with inputs in 8 bits, transformers: {result}", flush=True)


class Bbb:
    """The program, and the exports of one model."""

    def __init__(self, options, work):
        self.options, self.work, self.made, self.measured = options, work, {}, None

    def start(self, *arguments):
        return subprocess.run([self.options.bbb, *map(str, arguments), "--device", "cpu"],
                              capture_output=True, text=True)

    def run(self, *arguments):
        result = self.start(*arguments)
        if result.returncode:
            sys.exit(f"bbb {' '.join(map(str, arguments))}: {result.stderr.strip()}")

    def source(self):
        o = self.options
        return (["--run", o.run, "--model", o.model] if o.run else
                ["--model", o.model, "--rtn", "--bits", o.bits])

    def export(self, form):
        if form not in self.made:
            out = self.work / (form + (".gguf" if form == "gguf" else ""))
            self.run("export", *self.source(), "--format", form, "--out", out)
            self.made[form] = out
        return self.made[form]

    def json(self, *arguments):
        out = self.work / "result.json"
        self.run(*arguments, "--json", out)
        return json.loads(out.read_text())

    def perplexity(self):
        o = self.options
        if self.measured is None:
            self.measured = self.json("ppl", "--model", self.export("bbb"), "--text", o.text,
                                      "--seq-len", o.seq_len, "--max-windows", o.windows)["perplexity"]
        return self.measured

    def ids(self, path):
        return self.json("tokenize", "--model", self.options.model, "--text-file", path)["ids"]

    def windows(self):
        o = self.options
        ids = self.ids(o.text)
        if len(ids) < o.windows * o.seq_len:
            sys.exit(f"{o.text}: {len(ids)} tokens are fewer than {o.windows} windows of {o.seq_len}")
        return [ids[i * o.seq_len : (i + 1) * o.seq_len] for i in range(o.windows)]


def is_close(theirs, ours):
    return abs(theirs / ours - 1) <= PERPLEXITY_MARGIN


def compared(theirs, ours, whose="bbb"):
    return f"{theirs:.3f}, {whose} {ours:.3f}, {100 * (theirs / ours - 1):+.2f} %"


def torch_perplexity(model, windows):
    import torch

    total = count = 0
    for window in windows:
        ids = torch.tensor([window])
        with torch.inference_mode():
            scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total -= scores.gather(1, ids[0, 1:, None]).sum().item()
        count += len(window) - 1
    return math.exp(total / count)


def dequantized(bbb):
    """The same model in transformers, in F32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bbb.export("hf"), dtype=torch.float32)


def check_gptq(bbb):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling costs more than it gains here
    from gptqmodel import BACKEND, GPTQModel

    backend = getattr(BACKEND, "GPTQ_TORCH", None) or BACKEND.TORCH
    model = GPTQModel.load(str(bbb.export("gptq")), device="cpu", backend=backend)
    kernels = {type(m).__name__ for m in model.model.modules() if hasattr(m, "qzeros")}
    theirs, ours = torch_perplexity(model.model, bbb.windows()), bbb.perplexity()
    good = report(f"GPTQModel, {', '.join(sorted(kernels))}", "perplexity", compared(theirs, ours),
                  is_close(theirs, ours))
    o = bbb.options
    split = bbb.start("export", "--model", o.model, "--rtn", "--bits", "4", "--ocs-ratio", "0.1",
                      "--data", o.text, "--samples", 2, "--seq-len", 64, "--format", "gptq",
                      "--out", bbb.work / "split")
    said = split.stderr.strip().splitlines()[-1:] or [""]
    refused = split.returncode == 1 and "splits or reorders channels" in said[0]
    return report("bbb", "GPTQ of split channels", said[0], refused) and good


def hf_name(name):
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
             "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = name.split(".")
    return (f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}" if parts[0] == "blk"
            else outer[parts[0]] + ".weight")


def check_tensors(bbb):
    import numpy as np
    from gguf import GGUFReader, dequantize

    from read_packed import weights

    reader = GGUFReader(bbb.export("gguf"))
    architecture = str(reader.fields["general.architecture"].contents())
    size = int(reader.fields[f"{architecture}.attention.key_length"].contents())
    packed = weights(bbb.export("bbb"))
    types, worst, equal = {}, 0.0, 0
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if architecture == "llama" and ("attn_q." in tensor.name or "attn_k." in tensor.name):
            pairs = weight.reshape(-1, size // 2, 2, weight[0].size)  # a bias is a column
            weight = pairs.transpose(0, 2, 1, 3).reshape(weight.shape)
        difference = float(np.abs(weight - packed.pop(hf_name(tensor.name))).max())
        worst, equal = max(worst, difference), equal + (difference == 0)
    kinds = ", ".join(f"{count} {name}" for name, count in types.items())
    result = f"{equal} of {sum(types.values())} equal ({kinds}), largest difference {worst}"
    if packed:
        result += f"; missing: {', '.join(packed)}"
    return report("gguf-py", "tensors", result, worst == 0 and not packed)


def write_f32(path, out):
    """The same GGUF with every weight in F32."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(path)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        is_array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0],
                             sub_type=field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        writer.add_tensor(tensor.name, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


class LlamaCpp:
    def __init__(self, path, context, threads):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity = context, 1, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def complete(self, prompt, tokens, **more):
        answer = self.server.handle_completions(
            {"prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": 1,
             "cache_prompt": True, **more})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in answer:
            sys.exit(f"llama.cpp answers {answer}")
        return answer["choices"][0]["logprobs"]["content"]

    def logprob(self, prompt, token):
        """Of a token behind the prompt: a bias forces it, and the model's own logits are reported."""
        [made] = self.complete(prompt, 1, logit_bias=[[token, 1e6]], ignore_eos=False)
        assert made["id"] == token, (made, token)
        return made["logprob"]


    def perplexity(self, windows):
        total = count = 0
        for window in windows:
            for at in range(1, len(window)):
                total -= self.logprob(window[:at], window[at])
                count += 1
        return math.exp(total / count)


def rounding(bbb):
    """The model in transformers, computing as llama.cpp does from quantized weights: the inputs of
    their linears are rounded to 8 bits, in blocks of 32."""
    import torch

    def round_input(_, arguments):
        blocks = arguments[0].unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = (blocks / scale.clamp(min=1e-30)).round()
        return ((codes * scale.half().float()).flatten(-2),)

    model = dequantized(bbb)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(round_input)
    return model


def logits_behind(model, context, token):
    """The two best logits and that of the token, and whether all three are within 2 %."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    theirs = logits[token].item()
    near = best - min(second, theirs) <= LOGIT_MARGIN * abs(best)
    return f"best logits {best:.3f} and {second:.3f}, of llama.cpp's token {theirs:.3f}", near


def check_text(bbb, llama, name, rounds, prompt):
    """Whether llama.cpp's text is ours, as far as our logits decide it."""
    what = f"text behind {prompt!r}"
    answer = bbb.json("decode", "--model", bbb.export("bbb"), "--prompt", prompt, "--max-tokens",
                      TEXT_TOKENS)
    ours = answer["text"].encode()
    path = bbb.work / "prompt.txt"
    path.write_text(prompt)
    context, text, same = bbb.ids(path), b"", 0
    made = llama.complete(context, TEXT_TOKENS)
    for token in made:
        piece = bytes(token["bytes"])  # empty for the token that ends the text
        ends = not piece and text == ours and answer["stopped"] != "max-tokens"
        if not ends and not (piece and ours.startswith(text + piece)):
            break
        text += piece
        context.append(token["id"])
        same += 1
    if same == len(made):
        ends = "" if text == ours else f"llama.cpp ends after {same} equal tokens, bbb does not"
        return report(name, what, ends or f"the same {same} tokens", not ends)
    result, near = logits_behind(dequantized(bbb), context, made[same]["id"])
    report(name, what, f"{same} equal tokens, then {result}", near)
    if not near and rounds:
        explain(name, what, logits_behind(rounding(bbb), context, made[same]["id"])[0])
    return near


def check_gguf(bbb):
    good = check_tensors(bbb)
    ours, context = bbb.perplexity(), max(2 * bbb.options.seq_len, 512)
    files = {"llama.cpp": bbb.export("gguf"),
             "llama.cpp, F32": write_f32(bbb.export("gguf"), bbb.work / "f32.gguf")}
    for name, path in files.items():
        llama = LlamaCpp(path, context, bbb.options.threads)
        theirs = llama.perplexity(bbb.windows())
        near = report(name, "perplexity", compared(theirs, ours), is_close(theirs, ours))
        rounds = name == "llama.cpp"
        if not near and rounds:
            rounded = torch_perplexity(rounding(bbb), bbb.windows())
            explain(name, "perplexity",
                    f"{rounded:.3f}, from which llama.cpp is {100 * (theirs / rounded - 1):+.2f} %")
        texts = [check_text(bbb, llama, name, rounds, prompt) for prompt in PROMPTS]
        good = good and near and all(texts)
    return good


def check_transformers(bbb):
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(bbb.export("bbb"))
    except OSError as error:  # it finds no file of weights
        said = str(error).split(", found in")[0]
        return report("transformers", "refuses the packed directory", said, "model.safetensors" in said)
    return report("transformers", "refuses the packed directory", "LOADS it", False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog=__doc__.split("\n\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    parser.add_argument("--bbb", default="build/bbb")
    parser.add_argument("--model", required=True, help="the full-precision model")
    parser.add_argument("--text", required=True, help="text for the perplexities")
    parser.add_argument("--run", help="a finished run of this model")
    parser.add_argument("--bits", default="4", help="without --run: 2, 4 (default) or 8")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp")
    options = parser.parse_args()
    checks = options.checks or list(PACKAGES)
    good = True
    with tempfile.TemporaryDirectory() as work:
        bbb = Bbb(options, Path(work))
        for check in checks:
            if check not in PACKAGES:
                sys.exit(f"no check {check!r}; there are {', '.join(PACKAGES)}")
            missing = [p for p in PACKAGES[check] if importlib.util.find_spec(p) is None]
            if missing:
                print(f"{check}: not checked, Python has no {', '.join(missing)}")
                good = False
                continue
            good = globals()["check_" + check](bbb) and good
    widths = [max(len(row[i]) for row in TABLE) for i in range(3)] if TABLE else []
    for row in TABLE:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + f" | {row[3]} |")
    print("every reader agrees" if good else "NOT every reader agrees")
    sys.exit(not good)


if __name__ == "__main__":
    main()
