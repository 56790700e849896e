"""Chat templates for tests, written for them: what those of the published families do, as short as it can be."""

# Qwen3's ways: tools in the system turn, results of tools as a user's, thoughts kept only after the last question.
QWEN3 = r"""
{%- set ns = namespace(asked=-1, open=true) -%}
{%- for m in messages[::-1] -%}
    {%- set at = messages | length - 1 - loop.index0 -%}
    {%- set result = m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') -%}
    {%- if ns.open and m.role == 'user' and not result -%}
        {%- set ns.open = false -%}
        {%- set ns.asked = at -%}
    {%- endif -%}
{%- endfor -%}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "Tools:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}{{ tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\nAnswer {\"name\": <name>}<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + m.role + '\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if not loop.first or content %}{{ '\n' }}{% endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""

LLAMA3 = r"""{% for m in messages %}{% set turn = '<|start_header_id|>' + m['role'] + '<|end_header_id|>

' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""

# Llama 3.2's ways: a date, tools in the first user's turn, a system turn always.
LLAMA3_TOOLS = r"""
{{- bos_token }}
{%- if not today is defined %}{% set today = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{ "Environment: ipython\n" }}{% endif %}
{{- "Today: " + today + "\n\n" + system + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length == 0 %}
        {{- raise_exception("no first user message for the tools") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ "\n\n" }}{% endfor %}
    {{- messages[0]['content'] | trim + "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception("a single call at once") }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif m.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {{- m.content | tojson if m.content is mapping or m.content is iterable else m.content }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

# SmolLM3's ways: flags in the system message, taken out of it; a system turn of its own; a date; what is generated is tagged.
SMOLLM3 = r"""
{# defaults #}
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system\n" -}}
{%- if messages[0].role == "system" -%}
    {%- set said = messages[0].content -%}
    {%- if "/no_think" in said -%}
        {%- set mode = "/no_think" -%}
    {%- elif "/think" in said -%}
        {%- set mode = "/think" -%}
    {%- endif -%}
    {%- set own = said.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{%- if "/system_override" in said -%}
    {{- own.replace("/system_override", "").rstrip() + "<|im_end|>\n" -}}
{%- else -%}
    {%- set today = strftime_now("%d %B %Y") -%}
    {{- "Today: " ~ today ~ "\nMode: " + mode + "\n\n" -}}
    {%- if own -%}
        {{- own + "\n\n" -}}
    {%- elif mode == "/think" -%}
        {{- "You think before you answer: <think> Thought </think> Solution.\n\n" -}}
    {%- else -%}
        {{- "You are helpful.\n\n" -}}
    {%- endif -%}
    {%- if tools -%}
        {%- set ns = namespace(listed="Tools:\n") -%}
        {%- for tool in tools[:] -%} {# a list #}
            {%- set ns.listed = ns.listed ~ (tool | string) ~ "\n" -%}
        {%- endfor -%}
        {{- ns.listed -}}
    {%- endif -%}
    {{- "<|im_end|>\n" -}}
{%- endif -%}
{%- for m in messages -%}
    {%- set content = m.content if m.content is string else "" -%}
    {%- if m.role == "user" -%}
        {{ "<|im_start|>" + m.role + "\n" + content + "<|im_end|>\n" }}
    {%- elif m.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif m.role == "tool" -%}
        {{ "<|im_start|>" + "user\n" + content + "<|im_end|>\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\n" + ("" if mode == "/think" else "<think>\n\n</think>\n") }}
{%- endif -%}
"""

# Phi's ways: control tokens made of a role, and the end token behind a whole conversation.
PHI = (
    "{% for m in messages %}{% if m['content'] %}{{ '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_WRITTEN_OUT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content ~ '<|end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# One whose last reply ends with another token than those before it, and a reply has parts with tokens of their own.
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Older ways: the system message inside a user's turn, words between brackets, turns that end with the end token alone.
FOLDED = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = BEFORE + messages[0]['content'] + AFTER %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% set last = rest | selectattr('role', 'eq', 'user') | list %}"
    "{% for m in rest %}{% set c = (system if WHERE else '') + m['content'] %}{% if m['role'] == 'user' %}{{ USER }}"
    "{% else %}{{ ASSISTANT }}{% endif %}{% endfor %}"
)


def folded(
    user: str, assistant: str, before: str = "''", after: str = "'\\n\\n'", where: str = "loop.index0 == 0"
) -> str:
    new = {"USER": user, "ASSISTANT": assistant, "BEFORE": before, "AFTER": after, "WHERE": where}
    text = FOLDED
    for name, value in new.items():
        text = text.replace(name, value)
    return text


NANOCHAT = (
    "{{ bos_token }}"
    + folded("'<|user_start|>' + c + '<|user_end|>'", "'<|assistant_start|>' + m['content'] + '<|assistant_end|>'")
    + "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)
LLAMA2 = folded(
    "bos_token + '[INST] ' + c.strip() + ' [/INST]'",
    "' ' + m['content'].strip() + ' ' + eos_token",
    "'<<SYS>>\\n'",
    "'\\n<</SYS>>\\n\\n'",
)
MISTRAL1 = "{{ bos_token }}" + folded('" [INST] " + c + " [/INST]"', '" " + m["content"] + eos_token')
MISTRAL3 = "{{ bos_token }}" + folded(
    '"[INST] " + c + "[/INST]"', '" " + m["content"] | trim + eos_token', where="loop.index0 == 2 * (last | length) - 2"
)
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# Name -> the template, the control tokens it needs beside ChatML's, the other tokens that texts may hold.
FAMILIES: dict[str, tuple[str, list[str], list[str]]] = {
    "qwen3": (QWEN3, [], ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "llama3": (LLAMA3, HEADERS, []),
    "llama3 with tools": (LLAMA3_TOOLS, HEADERS, []),
    "smollm3": (SMOLLM3, [], ["<think>", "</think>"]),
    "phi": (PHI, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], []),
    "phi written out": (PHI_WRITTEN_OUT, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], []),
    "plain chatml": (CHATML, [], []),
    "nanochat": (NANOCHAT, ["<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"], []),
    "llama2": (LLAMA2, [], []),
    "mistral-v1": (MISTRAL1, [], []),
    "mistral-v3": (MISTRAL3, ["[INST]", "[/INST]"], []),
    "olmo2": (OLMO2, [], []),
    "channels": (CHANNELS, [f"<|{name}|>" for name in ("start", "channel", "message", "end", "return")], []),
}
