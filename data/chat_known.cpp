#include "data/chat_known.h"

namespace bbb::data {

namespace {

std::string generation(const std::string& text) {
  return "{%if add_generation_prompt%}" + text + "{%endif%}";
}

// The check "user and assistant must alternate", in the loop over the turns.
const std::string kAlternate =
    "{%if(message.role=='user')!=(loop.index0%2==0)%}{{raise_exception('{1}')}}{%endif%}";

const std::string kSystemAside =
    "{%if messages[0].role=='system'%}{%set system_message=messages[0].content%}"
    "{%set loop_messages=messages[1:]%}{%else%}{%set loop_messages=messages%}{%endif%}";

std::string chatml(const std::string& first, const std::string& content) {
  return "{%for message in messages%}" + first + "<|im_start|>{{message.role}}\n{{" + content +
         "}}<|im_end|>{1}{%endfor%}" + generation("<|im_start|>assistant\n");
}
const std::string kChatmlDefault =
    "{%if loop.first and messages[0].role!='system'%}<|im_start|>system\n{2}{%endif%}";

// `more`: a branch after "there is a system prompt" and before "there is none".
std::string llama2(const std::string& more, const std::string& system_turn) {
  return "{%if messages[0].role=='system'%}{%set loop_messages=messages[1:]%}"
         "{%set system_message=messages[0].content%}" +
         more +
         "{%else%}{%set loop_messages=messages%}{%set system_message=false%}{%endif%}"
         "{%for message in loop_messages%}" +
         kAlternate +
         "{%if loop.first and system_message!=false%}{%set content='<<SYS>>\n'+system_message+"
         "'\n<</SYS>>\n\n'+message.content%}{%else%}{%set content=message.content%}{%endif%}"
         "{%if message.role=='user'%}{{bos_token}}[INST] {{content|trim}} [/INST]" +
         system_turn +
         "{%elif message.role=='assistant'%} {{content|trim}} {{eos_token}}{%endif%}{%endfor%}";
}
std::string llama2_default(const std::string& condition) {
  return "{%elif " + condition +
         "==true and not '<<SYS>>' in messages[0].content%}{%set loop_messages=messages%}"
         "{%set system_message='{2}'%}";
}
const std::string kLlama2System =
    "{%elif message.role=='system'%}<<SYS>>\n{{content|trim}}\n<</SYS>>\n\n";

const std::string kLlama3 =
    "{%set loop_messages=messages%}{%for message in loop_messages%}{%set content="
    "'<|start_header_id|>'+message.role+'<|end_header_id|>\n\n'+message.content|trim+'<|eot_id|>'%}"
    "{%if loop.first%}{%set content=bos_token+content%}{%endif%}{{content}}{%endfor%}";
const std::string kLlama3Answer = "<|start_header_id|>assistant<|end_header_id|>\n\n";

std::string llama31(const std::string& date, const std::string& tools) {
  return "{%if custom_tools is defined%}{..}{%endif%}{%if not tools_in_user_message is defined%}"
         "{%set tools_in_user_message=true%}{%endif%}{%if not date_string is defined%}" +
         date +
         "{%endif%}{%if not tools is defined%}{%set tools=none%}{%endif%}"
         "{%if messages[0].role=='system'%}{%set system_message=messages[0].content|trim%}"
         "{%set messages=messages[1:]%}{%else%}{%set system_message=''%}{%endif%}"
         "<|start_header_id|>system<|end_header_id|>\n\n" +
         tools +
         "Cutting Knowledge Date: {2}\nToday Date: {{date_string}}\n\n"
         "{%if tools is not none and not tools_in_user_message%}{..}{%endif%}"
         "{{system_message}}<|eot_id|>{%if tools_in_user_message and not tools is none%}{..}"
         "{%endif%}{%for message in messages%}{%if not(message.role=='ipython' or "
         "message.role=='tool' or 'tool_calls' in message)%}<|start_header_id|>{{message.role}}"
         "<|end_header_id|>\n\n{{message.content|trim}}<|eot_id|>{%elif 'tool_calls' in message%}"
         "{..}{%elif message.role=='tool' or message.role=='ipython'%}{..}{%endif%}{%endfor%}" +
         generation(kLlama3Answer);
}

std::string mistral_v3(const std::string& inst, const std::string& calls_tools,
                       const std::string& answer) {
  return kSystemAside +
         "{%if not tools is defined%}{%set tools=none%}{%endif%}"
         "{%set user_messages=loop_messages|selectattr('role','equalto','user')|list%}"
         "{%set ns=namespace()%}{%set ns.index=0%}{%for message in loop_messages%}"
         "{%if not(message.role=='tool' or message.role=='tool_results' or"
         "(message.tool_calls is defined and message.tool_calls is not none))%}"
         "{%if(message.role=='user')!=(ns.index%2==0)%}{{raise_exception('{1}')}}{%endif%}"
         "{%set ns.index=ns.index+1%}{%endif%}{%endfor%}{{bos_token}}"
         "{%for message in loop_messages%}{%if message.role=='user'%}"
         "{%if tools is not none and(message==user_messages[-1])%}{..}{%endif%}"
         "{%if loop.last and system_message is defined%}" +
         inst + "{{system_message}}\n\n{{message.content}}[/INST]{%else%}" + inst +
         "{{message.content}}[/INST]{%endif%}{%elif" + calls_tools +
         "%}{..}{%elif message.role=='assistant'%}" + answer +
         "{{eos_token}}{%elif message.role=='tool_results' or message.role=='tool'%}{..}"
         "{%else%}{{raise_exception('{2}')}}{%endif%}{%endfor%}";
}

// The else branch is for contents that are lists; bbb's never are.
std::string if_string(const std::string& object, const std::string& body) {
  return "{%if " + object + ".content is string%}" + body + "{%else%}{..}{%endif%}";
}

// The system prompt of Qwen's templates, which stands outside the loop over the turns.
std::string qwen_system(const std::string& otherwise) {
  return "{%if tools%}{..}{%else%}{%if messages[0].role=='system'%}<|im_start|>system\n"
         "{{messages[0].content}}<|im_end|>\n" +
         otherwise + "{%endif%}{%endif%}";
}
const std::string kQwenTool = "{%elif message.role=='tool'%}{..}{%endif%}{%endfor%}";
const std::string kQwenAnswer = "<|im_start|>{{message.role}}\n{{content}}";
const std::string kQwenCalls = "{%if message.tool_calls%}{..}{%endif%}<|im_end|>\n";

enum class Content { Text, TextOrList };

// From the start of the turns' loop to an assistant's turn. `content`: how the template names the
// text of a message before an assistant's turn renames it.
std::string qwen3_loop(Content kind, const std::string& content) {
  const std::string text_or_empty =
      "{%if message.content is string%}{%set content=message.content%}{%else%}{%set content=''%}"
      "{%endif%}";
  return "{%for message in messages%}" + (kind == Content::Text ? "" : text_or_empty) +
         "{%if(message.role=='user')or(message.role=='system' and not loop.first)%}"
         "<|im_start|>{{message.role}}\n{{" +
         content + "}}<|im_end|>\n{%elif message.role=='assistant'%}";
}

// Qwen3, which keeps thoughts behind the last question alone. `condition`: of keeping one.
std::string qwen3(Content kind, const std::string& condition) {
  const bool text = kind == Content::Text;
  const std::string content = text ? "message.content" : "content";
  const std::string answer = "{%set content=" + content + ".split('</think>')[-1].lstrip('\n')%}";
  const std::string thought = "{%set reasoning_content=" + content +
                              ".split('</think>')[0].rstrip('\n').split('<think>')[-1]"
                              ".lstrip('\n')%}";
  const std::string is_text =
      text ? " is defined and message.reasoning_content is not none" : " is string";
  return qwen_system("") +
         "{%set ns=namespace(multi_step_tool=true,last_query_index=messages|length-1)%}"
         "{%for message in messages[::-1]%}{%set index=(messages|length-1)-loop.index0%}"
         "{%if ns.multi_step_tool and message.role=='user'" +
         (text ? "" : " and message.content is string") +
         " and not(message.content.startswith('<tool_response>')and message.content.endswith("
         "'</tool_response>'))%}{%set ns.multi_step_tool=false%}{%set ns.last_query_index=index%}"
         "{%endif%}{%endfor%}" +
         qwen3_loop(kind, content) + (text ? "{%set content=message.content%}" : "") +
         "{%set reasoning_content=''%}{%if message.reasoning_content" + is_text +
         "%}{%set reasoning_content=message.reasoning_content%}{%else%}{%if '</think>' in " +
         content + "%}" + (text ? answer + thought : thought + answer) +
         "{%endif%}{%endif%}{%if loop.index0>ns.last_query_index%}{%if " + condition +
         "%}<|im_start|>{{message.role}}\n<think>\n{{reasoning_content.strip('\n')}}\n</think>\n\n"
         "{{content.lstrip('\n')}}{%else%}" +
         kQwenAnswer + "{%endif%}{%else%}" + kQwenAnswer + "{%endif%}" + kQwenCalls + kQwenTool;
}

std::vector<KnownChat> make_known_chats() {
  std::vector<KnownChat> all;
  KnownChat chat{.name = "ChatML", .generation = "<|im_start|>assistant\n"};
  const auto add = [&](const std::string& pattern) {
    chat.pattern = pattern;
    all.push_back(chat);
  };
  chat.turn = "<|im_start|>{role}\n{content}<|im_end|>{1}";
  add(chatml("", "message.content"));  // SmolLM
  chat.no_system = "<|im_start|>system\n{2}";
  add(chatml(kChatmlDefault, "message.content"));  // SmolLM2, Hermes 3
  chat.turn = "<|im_start|>{role}\n{trimmed}<|im_end|>{1}";
  add(chatml(kChatmlDefault, "message.content|trim"));
  chat.no_system = nullptr;
  add(chatml("", "message.content|trim"));

  chat = {.name = "Qwen2.5",
          .turn = "<|im_start|>{role}\n{content}<|im_end|>\n",
          .no_system = "<|im_start|>system\n{1}<|im_end|>\n",
          .generation = "<|im_start|>assistant\n"};
  add(qwen_system("{%else%}<|im_start|>system\n{1}<|im_end|>\n") +
      "{%for message in messages%}{%if(message.role=='user')or(message.role=='system' and not "
      "loop.first)or(message.role=='assistant' and not message.tool_calls)%}<|im_start|>"
      "{{message.role}}\n{{message.content}}<|im_end|>\n{%elif message.role=='assistant'%}{..}" +
      kQwenTool + generation(chat.generation));
  chat.name = "Qwen3";
  chat.no_system = nullptr;
  add(qwen_system("") + qwen3_loop(Content::TextOrList, "content") + kQwenAnswer + kQwenCalls +
      kQwenTool + generation(chat.generation));
  chat.assistant = "<|im_start|>assistant\n{reply}<|im_end|>\n";
  chat.thinking = "<|im_start|>assistant\n<think>\n{thought}\n</think>\n\n{reply}<|im_end|>\n";
  add(qwen3(Content::TextOrList, "reasoning_content") + generation(chat.generation));
  chat.thinking_ends = true;
  const std::string ends = "loop.last or(not loop.last and reasoning_content)";
  for (const Content kind : {Content::Text, Content::TextOrList})
    add(qwen3(kind, ends) +
        generation(std::string(chat.generation) +
                   "{%if enable_thinking is defined and enable_thinking is false%}{..}{%endif%}"));
  chat.generation = "<|im_start|>assistant\n<think>\n";
  add(qwen3(Content::TextOrList, ends) + generation(chat.generation));

  chat = {.name = "Llama-2",
          .user = "{bos}[INST] {trimmed} [/INST]",
          .assistant = " {trimmed} {eos}",
          .system_in = SystemIn::FirstTurn,
          .content_with_system = "<<SYS>>\n{system}\n<</SYS>>\n\n{content}",
          .alternate = "{1}"};
  add(llama2("", ""));
  chat.system = "<<SYS>>\n{trimmed}\n<</SYS>>\n\n";
  add(llama2(llama2_default("false"), kLlama2System));
  add(llama2(llama2_default("USE_DEFAULT_PROMPT"), kLlama2System));  // undefined, so false
  chat.no_system = "{2}";
  chat.no_system_unless = "<<SYS>>";
  add(llama2(llama2_default("true"), kLlama2System));

  chat = {.name = "Llama-3",
          .start = "{bos}",
          .turn = "<|start_header_id|>{role}<|end_header_id|>\n\n{trimmed}<|eot_id|>",
          .generation = "<|start_header_id|>assistant<|end_header_id|>\n\n"};
  add(kLlama3 + generation(kLlama3Answer));
  chat.end = chat.generation;  // the first release ends every chat with the generation prompt
  chat.generation = "";
  add(kLlama3 + kLlama3Answer);

  chat = {.name = "Llama-3.1",
          .turn = "<|start_header_id|>{role}<|end_header_id|>\n\n{trimmed}<|eot_id|>",
          .first_system =
              "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: {2}"
              "\nToday Date: {1}\n\n{trimmed}<|eot_id|>",
          .no_system =
              "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: {2}\n"
              "Today Date: {1}\n\n<|eot_id|>",
          .generation = "<|start_header_id|>assistant<|end_header_id|>\n\n"};
  add(llama31("{%set date_string='{1}'%}",
              "{%if builtin_tools is defined or tools is not none%}{..}{%endif%}"
              "{%if builtin_tools is defined%}{..}{%endif%}"));
  chat.name = "Llama-3.2";
  chat.date = 1;
  add(
      llama31("{%if strftime_now is defined%}{%set date_string=strftime_now('{1}')%}"
              "{%else%}{..}{%endif%}",
              "{%if tools is not none%}{..}{%endif%}"));

  chat = {.name = "Mistral v1",
          .user = "[INST]{3}{content}{4}[/INST]",
          .assistant = "{5}{content}{eos}{6}",
          .alternate = "{1}",
          .refusal = "{2}"};
  add("{%for message in messages%}" + kAlternate +
      "{%if message.role=='user'%}[INST]{3}{{message.content}}{4}[/INST]"
      "{%elif message.role=='assistant'%}{5}{{message.content}}{{eos_token}}{6}"
      "{%else%}{{raise_exception('{2}')}}{%endif%}{%endfor%}");
  chat.alternate = chat.refusal = nullptr;
  // A system message is refused: the template would write it as if it were the assistant's.
  add("{%for message in messages%}"
      "{%if message.role=='user'%}[INST]{3}{{message.content}}{4}[/INST]"
      "{%else%}{5}{{message.content}}{{eos_token}}{6}{%endif%}{%endfor%}");
  chat = {.name = "Mistral v1",
          .start = "{bos}",
          .user = " [INST] {content} [/INST]",
          .assistant = " {content}{eos}",
          .system_in = SystemIn::FirstTurn,
          .content_with_system = "{system}\n\n{content}",
          .alternate = "{1}",
          .refusal = "{2}"};
  add(kSystemAside + "{{bos_token}}{%for message in loop_messages%}" + kAlternate +
      "{%if message.role=='user'%}{%if loop.first and system_message is defined%} [INST] "
      "{{system_message}}\n\n{{message.content}} [/INST]{%else%} [INST] {{message.content}} [/INST]"
      "{%endif%}{%elif message.role=='assistant'%} {{message.content}}{{eos_token}}"
      "{%else%}{{raise_exception('{2}')}}{%endif%}{%endfor%}");
  chat.name = "Mistral v3";
  chat.user = "[INST] {content}[/INST]";
  chat.assistant = " {trimmed}{eos}";
  chat.system_in = SystemIn::LastTurn;
  add(mistral_v3("[INST] ", " message.tool_calls is defined and message.tool_calls is not none",
                 " {{message.content|trim}}"));
  chat.name = "Mistral Nemo";
  chat.user = "[INST]{content}[/INST]";
  chat.assistant = "{content}{eos}";
  add(mistral_v3("[INST]", "(message.tool_calls is defined and message.tool_calls is not none)",
                 "{{message.content}}"));
  chat = {.name = "Mistral v7",
          .system = "[SYSTEM_PROMPT]{2}{content}[/SYSTEM_PROMPT]",
          .user = "[INST]{3}{content}[/INST]",
          .assistant = "{4}{content}{eos}",
          .refusal = "{1}"};
  add("{%for message in messages%}{%if message.role=='user'%}[INST]{3}{{message.content}}[/INST]"
      "{%elif message.role=='system'%}[SYSTEM_PROMPT]{2}{{message.content}}[/SYSTEM_PROMPT]"
      "{%elif message.role=='assistant'%}{4}{{message.content}}{{eos_token}}"
      "{%else%}{{raise_exception('{1}')}}{%endif%}{%endfor%}");
  chat = {.name = "Mistral Small",
          .start = "{bos}",
          .system = "[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
          .user = "[INST]{content}[/INST]",
          .assistant = "{content}{eos}",
          .no_system = "[SYSTEM_PROMPT]{2}{1}{3}[/SYSTEM_PROMPT]",
          .refusal = "{4}",
          .date = 1};
  add("{%set today=strftime_now('{1}')%}{%set default_system_message='{2}'+today+'{3}'%}"
      "{{bos_token}}{%if messages[0].role=='system'%}" +
      if_string("messages[0]", "{%set system_message=messages[0].content%}") +
      "{%set loop_messages=messages[1:]%}{%else%}{%set system_message=default_system_message%}"
      "{%set loop_messages=messages%}{%endif%}[SYSTEM_PROMPT]{{system_message}}[/SYSTEM_PROMPT]"
      "{%for message in loop_messages%}{%if message.role=='user'%}" +
      if_string("message", "[INST]{{message.content}}[/INST]") + "{%elif message.role=='system'%}" +
      if_string("message", "[SYSTEM_PROMPT]{{message.content}}[/SYSTEM_PROMPT]") +
      "{%elif message.role=='assistant'%}" +
      if_string("message", "{{message.content}}{{eos_token}}") +
      "{%else%}{{raise_exception('{4}')}}{%endif%}{%endfor%}");

  chat = {.name = "Zephyr",
          .system = "<|system|>\n{content}{eos}{2}",
          .user = "<|user|>\n{content}{eos}{1}",
          .assistant = "<|assistant|>\n{content}{eos}{3}",
          .generation = "<|assistant|>{4}"};
  add("{%for message in messages%}"
      "{%if message.role=='user'%}<|user|>\n{{message.content}}{{eos_token}}{1}"
      "{%elif message.role=='system'%}<|system|>\n{{message.content}}{{eos_token}}{2}"
      "{%elif message.role=='assistant'%}<|assistant|>\n{{message.content}}{{eos_token}}{3}"
      "{%endif%}"
      "{%if loop.last and add_generation_prompt%}<|assistant|>{4}{%endif%}{%endfor%}");
  chat = {
      .name = "Zephyr", .turn = "<|{role}|>\n{content}{eos}{1}", .generation = "<|assistant|>{2}"};
  add("{%for message in messages%}<|{{message.role}}|>\n{{message.content}}{{eos_token}}{1}"
      "{%endfor%}" +
      generation("<|assistant|>{2}"));
  chat = {.name = "Tulu-3 and Falcon-3",
          .system = "<|system|>\n{content}\n",
          .user = "<|user|>\n{content}\n",
          .assistant = "<|assistant|>\n{content}{eos}\n",
          .last_assistant = "<|assistant|>\n{content}{eos}",
          .generation = "<|assistant|>\n"};
  add("{%for message in messages%}{%if message.role=='system'%}<|system|>\n{{message.content}}\n"
      "{%elif message.role=='user'%}<|user|>\n{{message.content}}\n"
      "{%elif message.role=='assistant'%}{%if not loop.last%}<|assistant|>\n{{message.content}}"
      "{{eos_token}}\n{%else%}<|assistant|>\n{{message.content}}{{eos_token}}{%endif%}{%endif%}"
      "{%if loop.last and add_generation_prompt%}<|assistant|>\n{%endif%}{%endfor%}");

  chat = {.name = "DeepSeek LLM",
          .system = "{content}\n\n",
          .user = "User: {content}\n\n",
          .assistant = "Assistant: {content}{eos}",
          .generation = "Assistant:"};
  add("{%for message in messages%}{%if message.role=='user'%}User: {{message.content}}\n\n"
      "{%elif message.role=='assistant'%}Assistant: {{message.content}}{{eos_token}}"
      "{%elif message.role=='system'%}{{message.content}}\n\n{%endif%}{%endfor%}" +
      generation("Assistant:"));
  chat = {.name = "DeepSeek Coder",
          .start = "{bos}",
          .system = "{content}",
          .user = "### Instruction:\n{content}\n",
          .assistant = "### Response:\n{content}\n<|EOT|>\n",
          .no_system = "{1}",
          .no_system_at_all = true,
          .generation = "### Response:{2}"};
  add("{%set ns=namespace(found=false)%}{%for message in messages%}{%if message.role=='system'%}"
      "{%set ns.found=true%}{%endif%}{%endfor%}{{bos_token}}{%if not ns.found%}{1}{%endif%}"
      "{%for message in messages%}{%if message.role=='system'%}{{message.content}}{%else%}"
      "{%if message.role=='user'%}### Instruction:\n{{message.content}}\n{%else%}### Response:\n"
      "{{message.content}}\n<|EOT|>\n{%endif%}{%endif%}{%endfor%}" +
      generation("### Response:{2}"));
  // The template writes the last system message first. Here only the first message may be one.
  chat = {.name = "DeepSeek R1",
          .start = "{bos}",
          .user = "<｜User｜>{content}",
          .assistant = "<｜Assistant｜>{answer}<｜end▁of▁sentence｜>",
          .first_system = "{content}",
          .generation = "<｜Assistant｜>{1}"};
  add("{%set ns=namespace(is_first=false,is_tool=false,is_output_first=true,system_prompt='')%}"
      "{%for message in messages%}{%if message.role=='system'%}"
      "{%set ns.system_prompt=message.content%}{%endif%}{%endfor%}{{bos_token}}{{ns.system_prompt}}"
      "{%for message in messages%}{%if message.role=='user'%}{%set ns.is_tool=false%}<｜User｜>"
      "{{message.content}}{%endif%}{%if message.role=='assistant' and message.content is none%}{..}"
      "{%endif%}{%if message.role=='assistant' and message.content is not none%}{%if ns.is_tool%}"
      "{..}{%else%}{%set content=message.content%}{%if '</think>' in content%}"
      "{%set content=content.split('</think>')[-1]%}{%endif%}<｜Assistant｜>{{content}}"
      "<｜end▁of▁sentence｜>{%endif%}{%endif%}{%if message.role=='tool'%}{..}{%endif%}{%endfor%}"
      "{%if ns.is_tool%}{..}{%endif%}"
      "{%if add_generation_prompt and not ns.is_tool%}<｜Assistant｜>{1}{%endif%}");
  return all;
}

}  // namespace

const std::vector<KnownChat>& known_chats() {
  static const std::vector<KnownChat> chats = make_known_chats();
  return chats;
}

}  // namespace bbb::data
