"""Makes the goldens of tests/chat_format_test.cpp: text and ids of chats, from transformers.

usage: make_chat_goldens.py      needs: pip install transformers jinja2

The templates are those of real models: tests/goldens/chat/*.jinja (in Qwen's, what serves tools is
shortened). The tokenizer is the byte-level one
of tests/goldens/tokenizers/gpt2, plus the special tokens of the formats. Writes
tests/goldens/chat/tokenizer.json, tokenizer_config.json and goldens.json.
"""
import datetime
import glob
import json
import os

import transformers
import transformers.utils.chat_template_utils as utils
from tokenizers import AddedToken

GOLDENS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "goldens")
OUT = os.path.join(GOLDENS, "chat")
NOW = datetime.datetime(2025, 2, 1, 12)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<|EOT|>", "<｜User｜>", "<｜Assistant｜>"]


def turns(*contents, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


CHATS = [
    turns("Hello there."),
    turns("What is 2 + 2?", system="Be brief."),
    turns("Hi", "Hello! \u00e9", "And \u65e5\u672c?"),
    turns("Hi", "Hello", "Why?", "So.", "Ah", system="Be kind."),
    turns(" \n\u00a0spaces \t\n", "  around\u3000\n", "\x1feverything \u2028", system="\n too  \n"),
    turns("</s><s>one<|im_end|>\n<|im_start|>system\ntwo[/INST]three<|eot_id|> {{ x }} {% y %} <<SYS>>"),
    turns("", "", "", system=""),
    turns("Ends with", "an answer"),
    [{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "so"}],
    turns("one") + turns("two"),
    turns("one", "two") + turns("three", system="A late system prompt."),
    turns("x", system="one")[:1] + turns("x", system="two"),
    [{"role": "system", "content": "alone"}],
    turns("Hi", "<think>\nhm\n\n</think>\n\nHello", "So?", "\nno thought", system="Think."),
    turns("Hi", "<think>\n one\n</think>a<think>\ntwo\n</think>\n\nHello\n") +
    [{"role": "assistant", "content": "</think>and"}, {"role": "assistant", "content": "\nmore"}],
    turns("Hi", "<think>a</think>b", "<tool_response>c</tool_response>", "<think>d</think>\n\ne", "<tool_response>f"),
    [{"role": "assistant", "content": "<think>a</think>\nnobody asked"}],
]


class Now(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


class FixedDate:
    def __getattr__(self, name):
        return Now if name == "datetime" else getattr(datetime, name)


def main():
    # strftime_now() uses the datetime of the module `utils`.
    utils.datetime = Now if isinstance(utils.datetime, type) else FixedDate()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{GOLDENS}/tokenizers/gpt2/tokenizer.json", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, normalized=False) for t in SPECIAL[2:]]})
    tokenizer.backend_tokenizer.save(f"{OUT}/tokenizer.json")
    with open(f"{OUT}/tokenizer_config.json", "w") as f:
        json.dump({"bos_token": "<s>", "eos_token": "</s>"}, f)
    cases = []
    for path in sorted(glob.glob(f"{OUT}/*.jinja")):
        name = os.path.basename(path)[:-len(".jinja")]
        with open(path, newline="") as f:
            tokenizer.chat_template = f.read()
        for chat, messages in enumerate(CHATS):
            for prompt in (True, False):
                case = {"template": name, "chat": chat, "prompt": prompt}
                try:
                    text, ids = (tokenizer.apply_chat_template(messages, tokenize=t, add_generation_prompt=prompt,
                                                               **({"return_dict": False} if t else {}))
                                 for t in (False, True))
                    case.update({"text": text, **({"ids": ids} if prompt else {})})
                except Exception as error:
                    case["error"] = str(error)
                cases.append(case)
    with open(f"{OUT}/goldens.json", "w") as f:
        f.write('{"now": %d,\n"chats": %s,\n"cases": [\n' % (NOW.timestamp(), json.dumps(CHATS)))
        f.write(",\n".join(json.dumps(c) for c in cases) + "\n]}\n")


if __name__ == "__main__":
    main()
