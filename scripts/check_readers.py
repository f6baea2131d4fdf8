#!/usr/bin/env python3
"""Checks that other programs read what `bbb export` writes, as it reads it itself.

    scripts/check_readers.py --model MODEL --text FILE [--run RUN | --bits B] [CHECK ..]

gptq          GPTQModel's torch kernel on the CPU: perplexity within 0.5 % of `bbb ppl`
              (packages gptqmodel, torch, transformers)
gguf          gguf-py: every tensor equals the packed model's; llama.cpp: perplexity within 0.5 %,
              and greedy texts of 40 tokens, up to a token whose logit is within 2 % of our best
              (packages gguf, xllamacpp; torch and transformers where a text differs)
transformers  refuses the packed directory (packages torch, transformers)

Without names all three run. Nothing is installed; a missing package is named, and the exit code is
1. The exports come from a finished run, or from --model rounded to nearest.
"""
import argparse
import importlib.util
import json
import math
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
            "gguf": ["numpy", "safetensors", "gguf", "xllamacpp"],
            "transformers": ["torch", "transformers"]}


class Bbb:
    """The program, and the exports of one model."""

    def __init__(self, options, work):
        self.options, self.work, self.made = options, work, {}

    def run(self, *arguments):
        result = subprocess.run([self.options.bbb, *map(str, arguments), "--device", "cpu"],
                                capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"bbb {' '.join(map(str, arguments))}: {result.stderr.strip()}")
        return result.stdout

    def export(self, form):
        if form not in self.made:
            o, out = self.options, self.work / (form + (".gguf" if form == "gguf" else ""))
            source = (["--run", o.run, "--model", o.model] if o.run else
                      ["--model", o.model, "--rtn", "--bits", o.bits])
            self.run("export", *source, "--format", form, "--out", out)
            self.made[form] = out
        return self.made[form]

    def json(self, *arguments):
        out = self.work / "result.json"
        self.run(*arguments, "--json", out)
        return json.loads(out.read_text())

    def perplexity(self):
        o = self.options
        return self.json("ppl", "--model", self.export("bbb"), "--text", o.text, "--seq-len",
                         o.seq_len, "--max-windows", o.windows)["perplexity"]

    def ids(self, path):
        return self.json("tokenize", "--model", self.options.model, "--text-file", path)["ids"]

    def windows(self):
        o = self.options
        ids = self.ids(o.text)
        return [ids[i * o.seq_len : (i + 1) * o.seq_len] for i in range(o.windows)]


def close(name, theirs, ours):
    off = theirs / ours - 1
    print(f"{name}: perplexity {theirs:.4f}, bbb {ours:.4f}, {100 * off:+.3f} %")
    return abs(off) <= PERPLEXITY_MARGIN


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


def check_gptq(bbb):
    from gptqmodel import BACKEND, GPTQModel

    backend = getattr(BACKEND, "GPTQ_TORCH", None) or BACKEND.TORCH
    model = GPTQModel.load(str(bbb.export("gptq")), device="cpu", backend=backend)
    kernels = {type(m).__name__ for m in model.model.modules() if hasattr(m, "qzeros")}
    print(f"gptq: GPTQModel's kernels: {', '.join(sorted(kernels))}")
    return close("gptq", torch_perplexity(model.model, bbb.windows()), bbb.perplexity())


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
    types, worst = {}, 0.0
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if architecture == "llama" and ("attn_q." in tensor.name or "attn_k." in tensor.name):
            pairs = weight.reshape(-1, size // 2, 2, weight[0].size)  # a bias is a column
            weight = pairs.transpose(0, 2, 1, 3).reshape(weight.shape)
        worst = max(worst, float(np.abs(weight - packed.pop(hf_name(tensor.name))).max()))
    print(f"gguf: {types}, largest difference to the packed model {worst}; missing: {list(packed)}")
    return worst == 0 and not packed


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


def check_llama_perplexity(bbb, llama):
    total = count = 0
    for window in bbb.windows():
        for at in range(1, len(window)):
            total -= llama.logprob(window[:at], window[at])
            count += 1
    return close("gguf: llama.cpp", math.exp(total / count), bbb.perplexity())


def check_texts(bbb, llama):
    good = True
    for prompt in PROMPTS:
        ours = bbb.json("decode", "--model", bbb.export("bbb"), "--prompt", prompt, "--max-tokens",
                        TEXT_TOKENS)["text"]
        path = bbb.work / "prompt.txt"
        path.write_text(prompt)
        context = bbb.ids(path)
        made = llama.complete(context, TEXT_TOKENS)
        text, same = b"", 0
        for token in made:
            text += bytes(token["bytes"])
            if not ours.encode().startswith(text):
                break
            context.append(token["id"])
            same += 1
        if same == len(made) and text == ours.encode():
            print(f"gguf: llama.cpp: {prompt!r}: the same {same} tokens")
            continue
        if same == len(made):
            print(f"gguf: llama.cpp: {prompt!r}: ends after {same} tokens, bbb goes on")
            good = False
            continue
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(bbb.export("hf"), dtype=torch.float32)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([context])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        theirs = logits[made[same]["id"]].item()
        near = abs(best - second) <= LOGIT_MARGIN * abs(best) and theirs >= second
        print(f"gguf: llama.cpp: {prompt!r}: {same} equal tokens, then our logits {best:.4f} and "
              f"{second:.4f}; theirs has {theirs:.4f}: {'near' if near else 'TOO FAR'}")
        good = good and near
    return good


def check_gguf(bbb):
    good = check_tensors(bbb)
    llama = LlamaCpp(bbb.export("gguf"), max(2 * bbb.options.seq_len, 512),
                     bbb.options.threads)
    good = check_texts(bbb, llama) and good
    return check_llama_perplexity(bbb, llama) and good


def check_transformers(bbb):
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(bbb.export("bbb"))
    except Exception as error:  # whatever it raises, it does not load
        print(f"transformers: refuses the packed directory: {str(error).splitlines()[0][:150]}")
        return True
    print("transformers: LOADS the packed directory")
    return False


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
    print("every reader agrees" if good else "NOT every reader agrees")
    sys.exit(not good)


if __name__ == "__main__":
    main()
