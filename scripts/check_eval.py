#!/usr/bin/env python3
"""Checks `bbb eval` against the same questions asked and scored by transformers.

    scripts/check_eval.py --model DIR --data DIR [--limit N] [--bbb FILE] [--device cpu|cuda]

DIR of --model is one that both read: of Hugging Face, or `bbb export --format hf`. --data has the
files piqa_valid.jsonl with piqa_valid-labels.lst, arc_easy_test.jsonl, hellaswag_val_full.txt and
winogrande_dev.jsonl, as `bbb eval` reads them. Tasks whose file is absent are left out.

Prompts and scores are written here from lm-evaluation-harness's rules, apart from bbb's code. The
exit code is 1 if an accuracy differs by more than its standard error. Needs torch and transformers;
scores are those of F32.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    sys.exit(f"{error}; pip install torch transformers")


def answers(context, texts, gold):
    """An item: (context, continuation) of each choice, and the index of the right one."""
    return [(context, " " + text) for text in texts], gold


def lines_of(path):
    return path.read_bytes().decode().rstrip("\n").split("\n")


def piqa(path):
    labels = lines_of(path.with_name(path.stem + "-labels.lst"))
    for line, label in zip(lines_of(path), labels):
        row = json.loads(line)
        yield answers(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(label))


def arc_easy(path):
    for line in lines_of(path):
        row = json.loads(line)
        yield answers(row["query"], row["choices"], row["gold"])


def hellaswag(path):
    """Items of six lines: the text, the index of the right ending, four endings."""
    def cleaned(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    def prompt(text):  # its last sentence, if it is only begun, gets a capital letter
        text = text.strip()
        head, point, begun = text.rpartition(". ")
        return head + point + begun.capitalize() if point and text[-1] not in ".!?" else text

    lines = lines_of(path)
    for i in range(0, len(lines) - 5, 6):
        yield answers(cleaned(prompt(lines[i])), map(cleaned, lines[i + 2:i + 6]), int(lines[i + 1]))


def winogrande(path):
    """The contexts differ, the continuation is the same."""
    for line in lines_of(path):
        row = json.loads(line)
        rest = " " + row["continuation"].strip()
        yield [(context, rest) for context in row["context_options"]], row["gold"]


TASKS = {"piqa": (piqa, "piqa_valid.jsonl"), "arc_easy": (arc_easy, "arc_easy_test.jsonl"),
         "hellaswag": (hellaswag, "hellaswag_val_full.txt"),
         "winogrande": (winogrande, "winogrande_dev.jsonl")}


class Scorer:
    def __init__(self, directory, device):
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model = model.eval().to(device)
        bos, first = self.tokenizer.bos_token_id, self.tokenizer("a").input_ids[0]
        self.bos = [bos] if first == bos else []

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def log_likelihoods(self, choices):
        """Of each continuation behind its context. Padding behind a sequence changes nothing."""
        rows = [self.bos + self.tokens(context + rest) for context, rest in choices]
        begins = [len(self.bos) + len(self.tokens(context.rstrip())) for context, _ in choices]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        logs = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        of_token = logs.gather(2, ids[:, 1:, None])[..., 0]
        return [of_token[i, begin - 1:len(row) - 1].sum().item()
                for i, (row, begin) in enumerate(zip(rows, begins))]

    def accuracies(self, items):
        """acc and acc_norm: by log-likelihood, and by log-likelihood a character."""
        right = {"acc": 0, "acc_norm": 0}
        for choices, gold in items:
            plain = self.log_likelihoods(choices)
            normed = [value / (len(rest) - 1) for value, (_, rest) in zip(plain, choices)]
            for name, values in (("acc", plain), ("acc_norm", normed)):
                right[name] += values.index(max(values)) == gold
        return {name: count / len(items) for name, count in right.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, type=Path, help="directory of the tasks' files")
    parser.add_argument("--limit", type=int, default=0, help="first items of each task; 0: all")
    parser.add_argument("--bbb", default=Path(__file__).resolve().parent.parent / "build/bbb")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    names = [name for name, (_, file) in TASKS.items() if (options.data / file).exists()]
    if not names:
        sys.exit(f"{options.data}: no task's file")

    with tempfile.TemporaryDirectory() as work:
        result = Path(work) / "result.json"
        command = [options.bbb, "eval", "--model", options.model, "--data", options.data, "--tasks",
                   ",".join(names), "--limit", options.limit, "--device", options.device, "--json",
                   result]
        run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"bbb eval: {run.stderr.strip()}")
        ours = json.loads(result.read_text())["tasks"]

    scorer = Scorer(options.model, options.device)
    differ = False
    print(f"{'task':<12}{'items':>7}{'':>10}{'bbb':>9}{'transformers':>14}{'+-':>9}")
    for name in names:
        read, file = TASKS[name]
        items = list(read(options.data / file))
        items = items[:options.limit or len(items)]
        if len(items) != ours[name]["n"]:
            sys.exit(f"{name}: {len(items)} items, but bbb has {ours[name]['n']}")
        for kind, theirs in scorer.accuracies(items).items():
            own, error = ours[name][kind], ours[name][kind + "_stderr"]
            apart = abs(own - theirs) > error
            differ = differ or apart
            print(f"{name:<12}{len(items):>7}{kind:>10}{own:>9.4f}{theirs:>14.4f}{error:>9.4f}"
                  f"{'  differ' if apart else ''}", flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
