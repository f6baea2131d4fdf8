"""Makes fixtures and goldens of tests/tokenizer_kinds_test.cpp, with the reference implementations.

usage: make_tokenizer_kinds.py
needs: pip install tokenizers==0.23.3 sentencepiece==0.2.3 gguf==0.19.0

Writes tests/goldens/tokenizers/kinds.json, pieces.gguf and pre-NAME.gguf. It starts from files that
make_tokenizer_goldens.py wrote: a byte-level tokenizer.json and a sentencepiece model. Each kind is
a change (RFC 7386) to a base tokenizer.json, with the ids of every text (special tokens parsed), and
the decoded text if the base has a decoder that is more than bytes.
"""

import copy
import json
import os
import re

import gguf
import sentencepiece
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

OUT = os.path.join(os.path.dirname(__file__), "..", "tests", "goldens", "tokenizers")
SPACE = "\u2581"
TEXTS = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "  two  spaces ",
    "\n",
    "tab\tand\r\nline\n\n",
    "Hello, world!",
    "it's we'LL 'tis",
    "0 12 123 12345 \u0663\u00bd",
    "caf\u00e9 cafe\u0301 \u212b \u1100\u1161 \u0958",
    "\ufb01ne \u2460 \uff21",
    "e\u0323\u0301 e\u0301\u0323",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\ud55c\uad6d",
    "\U0001f469\u200d\U0001f680 \u2764\ufe0f",
    "\u2581under \u2581 score",
    "\u00a0no\u3000break\u00a0",
    "nul\0in",
    "<0x41> <0x>",
    'f(x)[i] = {y: "z"}; // a--b $4.50+<3>^~|',
    "  \n \n  x",
    "zz" * 20,
    "b,c.d?\u00a1\u3001(e)",
    "{A}",
    "{A}{B}",
    "one{A}two",
    "one {A} two{B} three",
    "{A}one",
    "{A} one",
    "{A}  one{B}",
    " {A}",
    "{A}\n{B}\n",
    "{A}\u00e9{B}\u4f60",
    "{B}  {A} end {B}",
    "{A}{A} a",
]


def texts(a, b):
    return [text.replace("{A}", a).replace("{B}", b) for text in TEXTS]


def ids_of(tokenizer, cases):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in cases]


def patched(base, change):
    """A merge patch (RFC 7386) that removes no keys: a null stays a null, as in tokenizer.json."""
    out = copy.deepcopy(base)
    for key, value in change.items():
        out[key] = (
            patched(out[key], value)
            if isinstance(value, dict) and isinstance(out.get(key), dict) and "type" not in value
            else value
        )
    return out


def pieces_base(model):
    """A sentencepiece BPE model as a tokenizer.json; merges are ordered by their piece's score."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {sp.id_to_piece(i): i for i in range(len(sp))}
    merges = []
    for i in range(len(sp)):
        if sp.is_unknown(i) or sp.is_control(i) or sp.is_byte(i):
            continue
        piece = sp.id_to_piece(i)
        for cut in range(1, len(piece)):
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary:
                merges.append((-sp.get_score(i), vocabulary[piece[:cut]], piece[:cut], piece[cut:]))
    special = [i for i in range(len(sp)) if sp.is_unknown(i) or sp.is_control(i)]
    token = lambda i, kind: {
        "id": i,
        "content": sp.id_to_piece(i),
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(i, True) for i in special] + [token(vocabulary["<sep>"], False)],
        "normalizer": None,
        "pre_tokenizer": metaspace("first"),
        "post_processor": None,
        "decoder": pieces_decoder(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [f"{a} {b}" for _, _, a, b in sorted(merges)],
        },
    }


def metaspace(scheme, split=False):
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def pieces_decoder(strip=True):
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "type": "Sequence",
        "decoders": steps + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * strip,
    }


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


PREPEND = sequence(
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
)
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def added(index, content, **more):
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
        **more,
    }


def kinds(pieces, size):
    """(name, base, change)"""
    more = pieces["added_tokens"] + [
        added(size, "<norm>", normalized=True),
        added(size + 1, "<strip>", lstrip=True, rstrip=True),
        added(size + 2, "<se", special=True),
    ]
    old = {"normalizer": PREPEND, "pre_tokenizer": None}
    yield "Metaspace first", "pieces", {}
    yield "Metaspace always", "pieces", {"pre_tokenizer": metaspace("always")}
    yield "Metaspace always, by the old key", "pieces", {
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True}
    }
    yield "Metaspace never, split", "pieces", {
        "pre_tokenizer": metaspace("never", True),
        "decoder": pieces_decoder(False),
    }
    yield "Metaspace behind Digits", "pieces", {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, metaspace("first", True)]}
    }
    yield "Metaspace's own decoder", "pieces", {
        "decoder": metaspace("always"),
        "model": {"byte_fallback": False},
    }
    yield "Prepend and Replace", "pieces", old
    yield "no byte fallback, unknown ones fused", "pieces", {
        **old,
        "model": {"byte_fallback": False},
    }
    yield "no byte fallback, unknown ones apart", "pieces", {
        **old,
        "model": {"byte_fallback": False, "fuse_unk": False},
    }
    yield "no byte fallback, nothing unknown", "pieces", {
        **old,
        "model": {"byte_fallback": False, "unk_token": None},
    }
    yield "merges ignored for whole words", "pieces", {
        "pre_tokenizer": metaspace("first", True),
        "model": {"ignore_merges": True},
    }
    yield "NFKC before Metaspace", "pieces", {"normalizer": sequence({"type": "NFKC"})}
    yield "added tokens of every kind", "pieces", {"added_tokens": more}
    yield "added tokens of every kind, normalized", "pieces", {**old, "added_tokens": more}
    yield "an empty Sequence", "gpt2", {"normalizer": sequence()}
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        yield form, "gpt2", {"normalizer": {"type": form}}
    yield "NFC in a Sequence", "gpt2", {"normalizer": sequence({"type": "NFC"})}
    yield "white space at the end of a line", "gpt2", {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"\s+$|^\p{L}"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                BYTES,
            ],
        }
    }
    yield "prefix space", "gpt2", {"pre_tokenizer": BYTES}
    yield "prefix space behind Digits", "gpt2", {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}
    }


def by_sentencepiece(model, specials, text, legacy):
    """Splits at special tokens, leftmost and longest first; encodes each text between by itself."""
    # If a message has a field twice, the later one counts: append a normalizer_spec (field 3) whose
    # add_dummy_prefix (field 3) is false.
    plain, bare = (
        sentencepiece.SentencePieceProcessor(model_proto=model + more)
        for more in (b"", b"\x1a\x02\x18\x00")
    )
    ids, begin, i = [], 0, 0

    def flush():
        if i > begin:
            ids.extend((plain if legacy or begin == 0 else bare).encode(text[begin:i]))

    while i < len(text):
        name = max((s for s in specials if text.startswith(s, i)), key=len, default=None)
        if name is None:
            i += 1
            continue
        flush()
        ids.append(specials[name])
        begin = i = i + len(name)
    flush()
    return ids


def write_gguf(name, model, tokens, types, **more):
    writer = gguf.GGUFWriter(f"{OUT}/{name}.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in more.items():
        add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def padded_pieces(model):
    """A GGUF with the padding that converters write: of type unknown, one text repeated, or empty.
    <unk> is a control token, and a user-defined token is among the padding."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    kind = lambda i: (
        3
        if sp.is_unknown(i) or sp.is_control(i)
        else 6 if sp.is_byte(i) else 4 if sp.id_to_piece(i) == "<sep>" else 1
    )
    tokens = [sp.id_to_piece(i) for i in range(len(sp))]
    types = [kind(i) for i in range(len(sp))]
    more = [
        ("<|user|>", 4),
        ("<|end|>", 3),
        ("<pad>", 5),
        ("<pad>", 5),
        ("<pad>", 3),
        ("", 1),
        ("", 5),
        ("<pad2>", 2),
        ("<pad2>", 2),
    ]
    scores = [sp.get_score(i) for i in range(len(sp))] + [-1000.0] * len(more)
    write_gguf(
        "pieces",
        "llama",
        tokens + [t for t, _ in more],
        types + [k for _, k in more],
        scores=scores,
        bos_token_id=1,
        eos_token_id=2,
    )
    specials = {t: i for i, (t, k) in enumerate(zip(tokens, types)) if k in (3, 4)}
    specials.update({"<|user|>": len(sp), "<|end|>": len(sp) + 1, "<pad2>": len(sp) + 7})
    cases = texts("<|user|>", "<|end|>") + ["<pad>a<pad2>", "<unk> <sep>b"]
    return {
        "texts": cases,
        "ids": [by_sentencepiece(model, specials, text, True) for text in cases],
        "size": len(sp) + len(more),
    }


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
POINTS = [c for c in range(0x20000) if not 0xD800 <= c < 0xE000]
# The letters of deepseek-llm's pattern, as hexadecimal code points: most letters with upper and
# lower case. No Unicode property selects exactly these.
CASED = """
    41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386
    388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba
    1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57
    1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb
    1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d
    212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3
    a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a
    ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df
    1e900-1e943
"""
CASED = "".join(re.sub("[0-9a-f]+", lambda point: chr(int(point[0], 16)), CASED).split())
# A letter, an "ideograph" and a sign by deepseek-llm's classes. Together they show the class of any
# character that follows one of them. No text contains them.
PROBES = "\u00d0\u0e01#"
# How llama.cpp interprets tokenizer.ggml.pre; tekken's pattern is Mistral's own.
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a token is not merged
MORE = {
    "tekken": [
        "camelCase HTTPServer iOS aB",
        "\u01c5a\u02b0B\u0301c \u4f60A\u597db",
        "a//\n/b /x/\r\n",
    ]
}
PRE = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "qwen2": [QWEN2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, r"\p{N}"],
    "deepseek-llm": [
        r"[\r\n]",
        r"\s?[" + CASED + "]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        IDEOGRAPHS,
        r"\p{N}+",
    ],
}


def pre_tokenizer(name):
    """A vocabulary whose merges cross every boundary, so that the ids show where text was split."""
    more = MORE.get(name, [])
    cases = texts("<|a|>", "<|b|>") + more
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in WHOLE_WORDS))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 2 + 260,
        special_tokens=["<|a|>", "<|b|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([text for text in TEXTS + more if "{" not in text] * 2, trainer)
    root = json.loads(tokenizer.to_str())
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in PRE[name]
    ]
    root["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": splits + [{**BYTES, "add_prefix_space": False, "use_regex": False}],
    }
    vocabulary = root["model"]["vocab"]
    if name == "deepseek-llm":
        # A probe's bytes merge first, then the probe with the first byte that follows in its word.
        to_text = lambda c: tokenizer.pre_tokenizer.pre_tokenize_str(c)[0][0]
        firsts = {to_text(chr(c))[0] for c in POINTS}
        merges = []
        for probe in map(to_text, PROBES):
            starts = [probe[:end] for end in range(1, len(probe) + 1)]
            merges += [[start, probe[len(start)]] for start in starts[:-1]]
            merges += [[probe, first] for first in sorted(firsts.union(starts))]
        for left, right in merges:
            vocabulary.setdefault(left + right, len(vocabulary))
        root["model"]["merges"][:0] = merges
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in root["model"]["merges"]]
    # Padding after the tokens: unused, empty, repeated.
    types = [3, 3] + [1] * (len(tokens) - 2) + [5, 5, 1, 5]
    write_gguf(
        f"pre-{name}",
        "gpt2",
        tokens + ["[PAD518]", "", "", "[PAD518]"],
        types,
        pre=name,
        merges=merges,
        eos_token_id=0,
    )
    tokenizer = Tokenizer.from_str(json.dumps(root))
    golden = {"texts": cases, "ids": ids_of(tokenizer, cases), "size": len(tokens)}
    if name == "deepseek-llm":
        golden["joined"] = {probe: joined(tokenizer, probe) for probe in PROBES}
    return golden


def joined(tokenizer, probe):
    """The ranges of code points that stay in one word with the probe before them."""
    alone = tokenizer.encode(probe).ids[0]
    ranges = []
    for c, encoding in zip(POINTS, tokenizer.encode_batch([probe + chr(c) for c in POINTS])):
        if encoding.ids[0] == alone:
            continue
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return ranges


def main():
    model = open(f"{OUT}/sentencepiece/tokenizer.model", "rb").read()
    pieces = pieces_base(model)
    bases = {"pieces": pieces, "gpt2": json.load(open(f"{OUT}/gpt2/tokenizer.json"))}
    cases = {
        "pieces": texts("<s>", "<sep>") + ["a <norm>b<norm> c", "x <strip> \n y<se<sep>"],
        "gpt2": texts("<|im_start|>", "<|im_end|>"),
    }
    size = len(pieces["model"]["vocab"])
    out = {"pieces": pieces, "texts": cases, "kinds": []}
    for name, base, change in kinds(pieces, size):
        tokenizer = Tokenizer.from_str(json.dumps(patched(bases[base], change)))
        kind = {"name": name, "base": base, "change": change, "ids": ids_of(tokenizer, cases[base])}
        if base == "pieces":
            kind["decoded"] = [
                tokenizer.decode(ids, skip_special_tokens=True) for ids in kind["ids"]
            ]
        out["kinds"].append(kind)
    specials = {t["content"]: t["id"] for t in pieces["added_tokens"] if t["special"]}
    specials["<extra>"] = size
    out["sentencepiece"] = [
        {
            "legacy": legacy,
            "texts": texts("<s>", "<extra>"),
            "ids": [
                by_sentencepiece(model, specials, text, legacy) for text in texts("<s>", "<extra>")
            ],
        }
        for legacy in (True, False)
    ]
    out["padded"] = padded_pieces(model)
    out["pre"] = {name: pre_tokenizer(name) for name in PRE}
    with open(f"{OUT}/kinds.json", "w") as file:
        json.dump(out, file, separators=(",", ":"))


main()
