#!/usr/bin/env python3
"""Checks README.md and docs/*.md against the code: every path exists, every option is declared in
tools/, train/ or scripts/, every name in code style is a word of a source file, every link has its
heading. In docs/develop.md, `name` stands for the name of any op. Every option of a command is in
docs/reference.md. Then runs prepare_text.py.

usage: scripts/docs_test.py      (standard library only; exit code 1 and one line for each fault)
"""
import gzip
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "quant engine cuda autograd data models train tools tests scripts docs cmake".split()
SOURCES = {".h", ".cpp", ".cu", ".py", ".sh", ".txt", ".cmake"}
# Names of other programs' options, files and functions.
FOREIGN = set("""--build-arg --gpus --install --prefix --list-tags --list-tests --rm --pull
    config.json tokenizer.json tokenizer.model tokenizer_config.json generation_config.json""".split())


def sources(folders, files=()):
    files = [ROOT / name for name in files]
    for folder in folders:
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES and "goldens" not in p.parts]
    return "\n".join(p.read_text() for p in files)


def headings(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}


def is_declared(option, commands):
    """As "name" or "x,name" by cxxopts, as "--name" by argparse, or as the case --name) in a shell."""
    return re.search(rf'"(\w,|--)?{option[2:]}"|^\s*{option}\)', commands, re.M)


def faults_of(path, code, commands):
    text = path.read_text()
    for folder, rest in re.findall(rf"(?<![\w/.<$-])({'|'.join(FOLDERS)})/([\w./-]*\w)", text):
        name = f"{folder}/{rest}"
        if not (ROOT / name).exists() and not re.search(r"\bname(_test)?\.", name):  # of any op
            yield f"no file {name}"
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - FOREIGN:
        if not is_declared(option, commands):
            yield f"no option {option}"
    for span in re.findall(r"`([^`\n]+)`", text):
        names = re.findall(r"^(?:\w+::)*(\w+)(?:\(\))?$", span)
        is_code = names and (span.endswith("()") or "::" in span or re.search(r"[a-z][A-Z]|\w_\w", span))
        is_test = span.endswith("_test") and (ROOT / "tests" / f"{span}.cpp").exists()
        if is_code and not is_test and not re.search(rf"\b{names[0]}\b", code) and not span.endswith("_name"):
            yield f"no name {span}"
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        if not linked.exists() or anchor and anchor not in headings(linked):
            yield f"no target {target}"


def missing_options():
    """Options as cxxopts gets them, and fields of train/config_table.h that have a heading."""
    declared = re.findall(r'^\s*(?:line\.options\(\))?\("([a-z][a-z0-9-]+)",', sources(["tools"]), re.M)
    declared += re.findall(r'\{"([a-z0-9-]+)",\s*k[A-Z]', (ROOT / "train" / "config_table.h").read_text())
    reference = (ROOT / "docs" / "reference.md").read_text()
    for option in sorted(set(declared)):
        if not re.search(rf"--{option}(?![\w-])", reference):
            yield f"docs/reference.md: option --{option} is missing"


def prepared_text():
    """Two runs give the same bytes; documents are kept once, in one of the two files."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "source", "below")
        source.mkdir(parents=True)
        texts = [f"document {i} " * 40 for i in range(20)]
        (source / "a.txt").write_text(texts[0])
        (source / "again.md").write_text(texts[0])
        (source / "short.txt").write_text("short")
        with gzip.open(source / "rest.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": t}) + "\n" for t in texts[1:])
        results = []
        for out in ("one", "two"):
            subprocess.run([sys.executable, ROOT / "scripts" / "prepare_text.py", source.parent,
                            "--out", f"{work}/{out}", "--eval-share", "0.1"],
                           check=True, stdout=subprocess.DEVNULL)
            results.append([Path(work, out, f"{n}.jsonl").read_text() for n in ("train", "eval")])
        train, held_out = ([json.loads(line)["text"] for line in part.splitlines()]
                           for part in results[0])
        if results[0] != results[1] or len(held_out) != 2 or sorted(train + held_out) != sorted(texts):
            yield f"prepare_text.py: {len(train)} and {len(held_out)} documents of {len(texts)}"


def main():
    code = sources(FOLDERS, ["CMakeLists.txt", "Dockerfile"])
    commands = sources(["tools", "train", "scripts"])
    faults = [*prepared_text(), *missing_options()]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        faults += [f"{path.relative_to(ROOT)}: {fault}" for fault in faults_of(path, code, commands)]
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
