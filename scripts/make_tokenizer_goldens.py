"""Makes fixtures and goldens of tests/tokenizer_test.cpp, with the reference implementations.

usage: make_tokenizer_goldens.py [MODEL.gguf WIKI.test.raw]
needs: pip install tokenizers==0.20.3 sentencepiece==0.2.0 gguf

Writes to tests/goldens/tokenizers/:
  three small vocabularies, trained on generated text: byte-level BPE with GPT-2's and Llama-3's
  pre-tokenizer, and a sentencepiece BPE model; the latter two also as GGUFs without tensors
  goldens.json: the ids of a nasty set of texts with each vocabulary; if the demo model and the text
  are given, also their ids with SmolLM2's vocabulary
"""
import io
import json
import os
import random
import sys

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

OUT = os.path.join(os.path.dirname(__file__), "..", "tests", "goldens", "tokenizers")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
NASTY = [
    "", " ", "  ", "a", " a", "a ", "Hello, world!", "it's we'll THEY'RE I'D o'clock 'S",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \ufb01ne stra\u00dfe",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \u2764\ufe0f \U0001f1e9\U0001f1ea",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002\u4e2d\u6587\u6d4b\u8bd5\uff0c\ud55c\uad6d\uc5b4",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u0000\u0001\u0002 \u0007\u001b[0m\u007f \u0080\u0085\u009f", "nul\u0000inside",
    " " * 37 + "x" + " " * 64, "\t\ttabs\t \tmixed \t", "line\nline\n\n\nline\r\nline\r\r\n  \n end\n",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 \u0663\u0664\u0665 \u00bd\u00b2\u2167",
    "a\u0300\u0301\u0302\u0303b\u20dd \u0e01\u0e33\u0e31 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u00a0\u1680\u180e\u2000\u2009\u2028\u2029\u202f\u205f\u3000\u200b\ufeff x\u00a0y\u3000\u3000z\u180e w",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|end_of_text|><s></s>",
    "\u2581\u2581under \u2581score \u0120gpt\u010a", "!!!???...---___***###", "foo_bar.baz(qux)[0]->x::y //c++ `z`",
    "https://example.org/a?b=c&d=%20#e", "\ufffd\uffff\U0010ffff\ue000", "ABCdefGHI123jkl\u0431\u0443\u043a\u0432\u044b",
    "x" * 300, "ab" * 150, "\n" * 50, "The quick brown fox jumps over the lazy dog. " * 4,
]


def training_text():
    """Sentences of made-up words with some digits and accents; the same in every run."""
    rng = random.Random(1)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"] + ["th", "ing", "er", "st", "on", "\u00e9"]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 3))) for _ in range(150)]
    words += "the of and to in is it's we'll quick brown fox over lazy dog Hello world line".split()
    lines = []
    for _ in range(400):
        line = [rng.choice(words) for _ in range(rng.randint(4, 12))]
        line.insert(rng.randrange(len(line)), str(rng.randint(0, 9999)))
        lines.append(" ".join(line).capitalize() + rng.choice([".", "!", "?", ",\n"]))
    return lines


def fnv(ids):
    h = 0xCBF29CE484222325
    for byte in b"".join(i.to_bytes(4, "little") for i in ids):
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return str(h)


def encode(tokenizer, text, as_text):
    tokenizer.encode_special_tokens = as_text
    return tokenizer.encode(text, add_special_tokens=False).ids


def goldens_of(tokenizer):
    return {"as_text": [encode(tokenizer, text, True) for text in NASTY],
            "parsed": [encode(tokenizer, text, False) for text in NASTY]}


def byte_level(name, pre_tokenizer, specials, size, config, pairs):
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(training_text(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([AddedToken("-> x", special=False, lstrip=True, normalized=False)])
    if config.get("bos_token"):
        bos = config["bos_token"]
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))])])
    root = json.loads(tokenizer.to_str())
    root["model"]["merges"] = [m if not pairs else m.split(" ") for m in
                               (" ".join(m) if isinstance(m, list) else m for m in root["model"]["merges"])]
    os.makedirs(f"{OUT}/{name}", exist_ok=True)
    dump = lambda value, file: json.dump(value, open(f"{OUT}/{name}/{file}", "w"), ensure_ascii=True, separators=(",", ":"))
    dump(root, "tokenizer.json")
    dump(config, "tokenizer_config.json")
    return root, goldens_of(Tokenizer.from_file(f"{OUT}/{name}/tokenizer.json"))


def write_gguf(path, model, tokens, types, more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in more.items():
        {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)](
            f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def gguf_of_bpe(name, root, pre):
    added = {token["id"]: token for token in root["added_tokens"]}
    vocabulary = {**root["model"]["vocab"], **{token["content"]: i for i, token in added.items()}}
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [(3 if added[i]["special"] else 4) if i in added else 1 for i in range(len(tokens))]
    merges = [" ".join(m) if isinstance(m, list) else m for m in root["model"]["merges"]]
    write_gguf(f"{OUT}/{name}.gguf", "gpt2", tokens, types,
               {"pre": pre, "merges": merges, "bos_token_id": 0, "eos_token_id": 1})


def sentencepiece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()), model_writer=model, model_type="bpe", vocab_size=480,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, user_defined_symbols=["<sep>"], minloglevel=2)
    os.makedirs(f"{OUT}/sentencepiece", exist_ok=True)
    open(f"{OUT}/sentencepiece/tokenizer.model", "wb").write(model.getvalue())
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    types = [2 if sp.IsUnknown(i) else 3 if sp.IsControl(i) else 6 if sp.IsByte(i) else 4 if sp.IdToPiece(i) == "<sep>" else 1
             for i in range(len(sp))]
    write_gguf(f"{OUT}/sentencepiece.gguf", "llama", [sp.IdToPiece(i) for i in range(len(sp))], types,
               {"scores": [sp.GetScore(i) for i in range(len(sp))], "bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id(),
                "unknown_token_id": sp.unk_id()})
    ids = [sp.EncodeAsIds(text) for text in NASTY]
    return {"as_text": ids, "decoded": [sp.DecodeIds(i) for i in ids]}


def smollm(model, wiki):
    fields = gguf.GGUFReader(model).fields
    get = lambda key: fields["tokenizer.ggml." + key].contents()
    tokens = get("tokens")
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)},
                                     merges=[tuple(m.split(" ")) for m in get("merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t, kind in zip(tokens, get("token_type")) if kind == 3])
    ids = encode(tokenizer, open(wiki, encoding="utf-8", newline="").read(), True)
    return {**goldens_of(tokenizer), "wiki_count": len(ids), "wiki_fnv": fnv(ids)}


def main():
    path = f"{OUT}/goldens.json"
    os.makedirs(OUT, exist_ok=True)
    old = json.load(open(path)) if os.path.exists(path) else {}
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    _, gpt2 = byte_level("gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                         420, {"bos_token": None, "eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages[0].content }}"}, False)
    root, llama3 = byte_level("llama3", split, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], 420,
                              {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, True)
    gguf_of_bpe("llama3", root, "llama-bpe")
    goldens = {"nasty": NASTY, "gpt2": gpt2, "llama3": llama3, "sentencepiece": sentencepiece_model(),
               "smollm": smollm(*sys.argv[1:3]) if len(sys.argv) == 3 else old.get("smollm")}
    with open(path, "w") as file:
        json.dump(goldens, file, separators=(",", ":"))


main()
