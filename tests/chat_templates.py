"""Chat templates in the shapes that people train with, and a byte-level tokenizer for each."""

from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dposhift_trl.data.chat_template import PLAIN_CHAT_TEMPLATE


TEXTS = ("What is two plus three?", "The answer is five.", "Be brief.", "system user assistant tool", "think")


@dataclass(frozen=True)
class ChatTemplate:
    """
    A chat template, the special tokens of its tokenizer, and what it makes of an answer.

    `answer` and `call` are the tokens that are scored of an answer and of a call of the tool `add`, with `{}` for the
    text or the arguments. `adds_bos` is whether the tokenizer adds BOS to text, and `writes_bos` whether the template
    writes it. `system` is whether the template takes a system prompt.
    """

    source: str
    eos: str
    answer: str
    call: str | None = None
    bos: str | None = None
    pad: str | None = None
    others: tuple[str, ...] = ()
    adds_bos: bool = False
    writes_bos: bool = True
    system: bool = True

    @cache  # noqa: B019 - the templates live as long as the process
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer that splits all text between special tokens into bytes and a few merges."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        specials = [token for token in (self.bos, self.eos, self.pad, *self.others) if token is not None]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=alphabet,
            special_tokens=list(dict.fromkeys(specials)),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        if self.adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.token_to_id(self.bos))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=self.bos,
            eos_token=self.eos,
            pad_token=self.pad,
            chat_template=self.source,
        )


LLAMA_3 = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
"""

QWEN_3 = """
{%- set last = namespace(query=-1) %}
{%- for message in messages if message.role == 'user' %}{% set last.query = messages.index(message) %}{% endfor %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
    {{- '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""

PHI_3_5 = """
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}
"""

GPT_OSS = """
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role == 'system' or tools %}
    {{- '<|start|>developer<|message|>' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
    {%- for tool in tools or [] %}{{ '\n' + (tool | tojson) }}{% endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'tool' %}
        {{- '<|start|>functions.' + message.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content + '<|end|>' }}
    {%- elif message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
        {{- call.arguments | tojson }}{{ '<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

MISTRAL = """
{%- set start = 1 if messages[0].role == 'system' else 0 %}
{%- set turns = messages[start:] %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}{% if start and message == users[-1] %}{{ messages[0].content + '\n\n' }}{% endif %}
        {{- message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('roles are user, assistant and tool') }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') or (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
    {{- (message.content | trim) + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""

R1_DISTILL = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|User|>' + message.content }}
    {%- elif message.role == 'assistant' and message.content is none %}
        {{- '<|Assistant|><|tool_call|>' + message.tool_calls[0].function.name + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1].lstrip() + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '<|tool_output|>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}
"""

TEMPLATES = {
    "plain": ChatTemplate(PLAIN_CHAT_TEMPLATE, "<eos>", " {}<eos>", ' {"name": "add", "arguments": {}}<eos>'),
    # Behind the answer and its end, another answer is opened, and scored
    "llama-3": ChatTemplate(
        LLAMA_3,
        "<|eot_id|>",
        "{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        bos="<|begin_of_text|>",
        others=("<|start_header_id|>", "<|end_header_id|>"),
        adds_bos=True,
    ),
    "qwen-3": ChatTemplate(
        QWEN_3,
        "<|im_end|>",
        "<think>\n\n</think>\n\n{}<|im_end|>\n",
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>\n',
        pad="<|endoftext|>",
        others=("<|im_start|>",),
    ),
    "phi-3.5": ChatTemplate(
        PHI_3_5,
        "<|endoftext|>",
        "{}<|end|>\n<|endoftext|>",
        pad="<|endoftext|>",
        others=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "gpt-oss": ChatTemplate(
        GPT_OSS,
        "<|return|>",
        "<|channel|>final<|message|>{}<|return|>",
        " to=functions.add<|channel|>commentary json<|message|>{}<|call|>",
        pad="<|endoftext|>",
        others=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
    ),
    "mistral": ChatTemplate(
        MISTRAL,
        "</s>",
        " {}</s>",
        '[TOOL_CALLS][{"name": "add", "arguments": {}}]</s>',
        bos="<s>",
        others=("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        adds_bos=True,
        writes_bos=False,
    ),
    # The turn has an end of its own, and EOS is never written
    "gemma": ChatTemplate(
        GEMMA,
        "<eos>",
        "{}<end_of_turn>\n",
        bos="<bos>",
        pad="<pad>",
        others=("<start_of_turn>", "<end_of_turn>"),
        adds_bos=True,
        system=False,
    ),
    # A call is told by null content, which transformers removes
    "r1-distill": ChatTemplate(
        R1_DISTILL,
        "<|end_of_sentence|>",
        "{}<|end_of_sentence|>",
        bos="<|begin_of_sentence|>",
        others=("<|User|>", "<|Assistant|>", "<think>", "</think>", "<|tool_call|>"),
        adds_bos=True,
    ),
}
