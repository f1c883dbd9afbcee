"""chat(): conversations through the chat template, content in parts, and its options."""

import pytest
from helpers import greedy, tokens

HI = {"role": "user", "content": "Hi"}


def rendered(demo, chat, template, **options):
    return demo.chat(chat, greedy(1), chat_template=template, **options)[0].prompt


def test_chat_is_generate_on_the_rendered_template(demo):
    """Special tokens of the template are not added a second time."""
    chats = [
        [{"role": "user", "content": "Hello!"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
    ]
    texts = [demo.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    token_ids = [demo.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    outputs = demo.chat(chats, greedy(8))
    assert [output.prompt for output in outputs] == texts
    assert [output.prompt_token_ids for output in outputs] == token_ids
    assert [output["token_ids"] for output in outputs] == tokens(demo, token_ids, greedy(8))
    assert demo.chat(chats[0], greedy(8))[0]["text"] == outputs[0]["text"]


def test_chat_passes_options_to_the_template(demo):
    template = "{{ messages[0].content }}|{{ enable_thinking }}|{{ tools }}|{{ add_generation_prompt }}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    options = {"enable_thinking": False, "add_generation_prompt": False, "tools": tools}
    assert rendered(demo, [HI], template, **options) == f"Hi|False|{tools}|False"
    assert rendered(demo, [HI], template, chat_template_kwargs={"enable_thinking": True}) == "Hi|True|None|True"


def test_an_option_that_nobody_knows_is_refused(demo):
    with pytest.raises(TypeError, match="unknown option 'lora_requst'"):
        demo.chat([HI], lora_requst=None)
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ lora_requst }}"
    assert rendered(demo, [HI], template, lora_requst=None) == "HiNone"
    demo.chat([HI], greedy(1), documents=None, continue_final_message=False)  # transformers' own


def second(content):
    return [[HI], [{"role": "user", "content": content}]]


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
REFUSED = [
    (TypeError, "Hello", "messages must be a list"),
    (ValueError, [[HI], [{"content": "no role"}]], r"messages\[1\] is refused by the chat template"),
    (ValueError, [{"role": "user", "content": "\ud800"}], r"messages\[0\] is refused"),  # half a surrogate pair
    (ValueError, second([IMAGE]), r"content of messages\[1\]\[0\] must"),
    (ValueError, second([{"type": "text"}]), r"content of messages\[1\]\[0\] must"),
    (ValueError, second([7]), r"content of messages\[1\]\[0\] must"),
    (TypeError, second(IMAGE), r"content of messages\[1\]\[0\] must"),
]


@pytest.mark.parametrize(("error", "messages", "message"), REFUSED, ids=str)
def test_wrong_conversations_are_refused_by_name(error, messages, message, demo):
    with pytest.raises(error, match=message):
        demo.chat(messages)


def test_without_a_tokenizer_there_is_no_chat(llm):
    with pytest.raises(ValueError, match="has no tokenizer"):
        llm.chat([HI])


QWEN_3 = """{% for message in messages %}<|im_start|>{{ message.role }}
{% set content = message.content if message.content is string else '' %}{{ content }}<|im_end|>
{% endfor %}"""
LLAMA_3 = "{% for message in messages %}<|{{ message.role }}|>{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
SMOLLM_2 = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% endfor %}"
LOOPS = """{% for message in messages %}<|{{ message.role }}|>{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{{ part.text }}{% if not loop.last %} + {% endif %}{% endfor %}{% endif %}
{%- endfor %}"""
MARKED = "{% for m in messages %}{% if m.content is string %}{{ m.content }}|{% else %}{% for p in m.content %}[T]{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
SHORT = "{% for m in messages %}{{ raise_exception('long') if m.content | length > 15 else m.content }}|{% endfor %}"
ONLY_PARTS = (
    "{% for message in messages %}{% for part in message.content %}<{{ part['text'] }}>{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN_3, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is\nthis?<|im_end|>\n"),
        (LLAMA_3, "<|system|>Be brief.<|eot_id|><|user|>What is\nthis?<|eot_id|>"),
        (SMOLLM_2, "<|im_start|>system\nBe brief.<|im_start|>user\nWhat is\nthis?"),
        (LOOPS, "<|system|>Be brief.<|user|>What is + this?"),
        (MARKED, "Be brief.|[T]What is[T]this?"),
        (SHORT, "Be brief.|What is\nthis?|"),
    ],
    ids=["Qwen 3", "Llama 3", "SmolLM 2", "loops", "marked", "short"],
)
def test_content_in_parts_is_what_the_template_takes(template, expected, demo):
    """A template that goes through the parts gets them, any other their texts, joined by newlines as in vLLM."""
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]
    for content in parts, tuple(parts), ["What is", parts[1]]:
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        assert rendered(demo, chat, template) == expected
    assert rendered(demo, [{"role": "user", "content": parts}], ONLY_PARTS) == "<What is><this?>"


def test_a_tool_call_may_have_no_content(demo):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = [{"role": "user", "content": [{"type": "text", "text": "Call f."}]}, call]
    template = (
        "{% for m in messages %}[{{ m.content if m.content is string else m.tool_calls[0].function.name }}]{% endfor %}"
    )
    assert rendered(demo, chat, template) == "[Call f.][f]"
    for template, end in (QWEN_3, "assistant\n<|im_end|>\n"), (LLAMA_3, "<|eot_id|>"), (SMOLLM_2, "assistant\n"):
        assert rendered(demo, chat, template).endswith(end)
