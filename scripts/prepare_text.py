#!/usr/bin/env python3
"""Makes calibration and evaluation text from folders or files of text.

    scripts/prepare_text.py SOURCE .. --out DIR [--eval-share 0.02] [--min-chars 200] [--seed 0]

Reads .txt, .md and .rst files (a document each) and .jsonl files ({"text": ..} a line), also below
folders and with .gz behind the name. Drops documents that are short or that came before, shuffles
the others by the seed, and writes DIR/train.jsonl (for bbb train --data) and DIR/eval.jsonl (for
bbb ppl --text). A document is in one of the two alone. The same sources and seed give the same
bytes.
"""
import argparse
import gzip
import hashlib
import json
import random
import sys
from pathlib import Path

KINDS = {".txt", ".md", ".rst", ".jsonl"}


def kind_of(path):
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def files_of(sources):
    for source in map(Path, sources):
        if source.is_dir():
            yield from sorted(p for p in source.rglob("*") if p.is_file() and kind_of(p) in KINDS)
        elif kind_of(source) in KINDS:
            yield source
        else:
            sys.exit(f"{source}: is no folder and no file of {', '.join(sorted(KINDS))}")


def documents_of(path):
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            if kind_of(path) != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    sys.exit(f'{path}:{number}: is not {{"text": ..}}')
                yield text
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: {error}")


def write(path, documents):
    with open(path, "w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    characters = sum(map(len, documents))
    print(f"{path}: {len(documents)} documents, {characters} characters, about "
          f"{characters // 4} tokens of English")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--eval-share", type=float, default=0.02, help="of the documents")
    parser.add_argument("--min-chars", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seen, kept, dropped = set(), [], 0
    for path in files_of(options.sources):
        for text in documents_of(path):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            if len(text) < options.min_chars or digest in seen:
                dropped += 1
                continue
            seen.add(digest)
            kept.append(text)
    held_out = max(1, round(len(kept) * options.eval_share))
    if len(kept) <= held_out:
        sys.exit(f"{len(kept)} documents of {options.min_chars} characters are too few to hold some out")
    random.Random(options.seed).shuffle(kept)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{dropped} documents dropped: short, or there already")
    write(options.out / "train.jsonl", kept[held_out:])
    write(options.out / "eval.jsonl", kept[:held_out])


if __name__ == "__main__":
    main()
