"""Goldens of tests/chat_template_test.cpp: templates and what Python's jinja2 renders from them, set
up as Hugging Face sets it up.

usage: make_chat_goldens.py [MODEL.gguf]      needs: pip install jinja2 gguf

The templates are written here, each with the constructs that its family's use; SmolLM2's is the one
in the demo model. Writes tests/goldens/chat_templates.json.
"""
import json
import os
import sys

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUT = os.path.join(os.path.dirname(__file__), "..", "tests", "goldens", "chat_templates.json")
TEMPLATES = {
    "llama-2": """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}\
{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}\
{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama-3": """\
{% for m in messages %}{% set block = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set block = bos_token + block %}{% endif %}{{ block }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "llama-3.2": """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message is cut off first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One tool call a message") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral-0.1": """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Unknown role: ' ~ message.role) }}{% endif %}{% endfor %}""",
    "mistral-0.3": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "white space": "a\n  {% if true %}  b\n{% endif %}\n  {%+ if true %}c {% endif +%}\n d {%- if true -%}  e\n {% endif -%} \n {{ 1 }}  {#- x -#}  f\n {# y #}\ng {{- 2 -}} h\n\n",
    "operators": """{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 + 3 * 4 }} {{ (2 + 3) * 4 }} {{ 1 < 2 <= 2 }} {{ 'a' ~ 1 ~ true ~ none }} \
{{ not false and 1 == 1.0 }} {{ 'x' if 0 else 'y' }} {{ 'b' in 'abc' }} {{ 4 not in [1, 2, 3] }} {{ missing is defined }} {{ missing }} \
{{ messages | length }} {{ 'Ab' | upper | lower }} {{ '  s ' | trim ~ '|' }} {{ [1, 2, 3][-1] }} {{ {'k': 'v'}['k'] }} {{ {'k': 'v'}.k }} \
{{ 'a,b'.split(',') | join('-') }} {{ 'abc'.startswith('ab') }} {{ 'it\\'s' }} {{ "\\"" }} {{ 'a' 'b' }} {{ 3 is odd }} {{ none is none }} \
{{ missing | default('d') }} {{ 'aXb'.replace('X', 'y') }} {{ - 1 }} {{ 1 - 1 }} {{ 'x'.upper() }} {{ (1, 2) | last }} {{ '}}' }} {{ 3 - 2 - 1 }}""",
    "loops": """{% for i in range(3) %}{{ i }}{% if not loop.last %}, {% endif %}{% else %}none{% endfor %};{% for i in [] %}x{% else %}empty{% endfor %};\
{% for i in [1, 2, 3, 4] if i % 2 == 0 %}{{ loop.index }}:{{ i }}/{{ loop.length }} {% endfor %};{% for a, b in [[1, 2], [3, 4]] %}{{ a + b }} {% endfor %};\
{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }};{% if true %}{% set x = 3 %}{% endif %}{{ x }};\
{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% for j in [1, 2] %}{% set ns.n = ns.n + loop.index0 %}{% endfor %}{% endfor %}{{ ns.n }};\
{% set block %}text {{ x }}{% endset %}{{ block }};{% for k in {'a': 1} %}{{ k }}{% endfor %};{{ loop is defined }}""",
}
CHATS = {
    "user": [{"role": "user", "content": "Hello there.  "}],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "What is 2 + 2?"}],
    "turns": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello! \u00e9"}, {"role": "user", "content": "\u65e5\u672c {{ x }}\n"}],
    "wrong": [{"role": "assistant", "content": "I begin"}, {"role": "assistant", "content": "again"}],
}


class Raised(Exception):
    pass


def raise_exception(message):
    raise Raised(message)


def render(source, messages, date, prompt):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    if date:
        environment.globals["strftime_now"] = lambda form: date
    try:
        return {"text": environment.from_string(source).render(
            messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")}
    except Raised as error:
        return {"error": str(error)}


old = json.load(open(OUT))["templates"] if os.path.exists(OUT) else {}
if len(sys.argv) == 2:
    import gguf
    TEMPLATES["smollm2"] = gguf.GGUFReader(sys.argv[1]).fields["tokenizer.chat_template"].contents()
elif "smollm2" in old:
    TEMPLATES["smollm2"] = old["smollm2"]
cases = []
for name, source in TEMPLATES.items():
    for chat, messages in CHATS.items():
        for date, prompt in [("", True), ("01 Feb 2025", False)]:
            cases.append({"template": name, "chat": chat, "date": date, "prompt": prompt,
                          **render(source, messages, date, prompt)})
with open(OUT, "w") as file:
    json.dump({"templates": TEMPLATES, "chats": CHATS, "cases": cases}, file, indent=1)
    file.write("\n")
