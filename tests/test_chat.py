"""chat(): conversations through the chat template, content in parts, and its options."""

import pytest
from helpers import greedy, make_llm


@pytest.fixture
def llm(tiny_model):
    return make_llm(tiny_model())


def test_chat_is_generate_on_the_rendered_template(demo):
    """Special tokens of the template are not added a second time."""
    chats = [
        [{"role": "user", "content": "Hello!"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
    ]
    rendered = [demo.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    token_ids = [demo.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    outputs = demo.chat(chats, greedy(8), use_tqdm=False)
    assert [output.prompt for output in outputs] == rendered
    assert [output.prompt_token_ids for output in outputs] == token_ids
    assert [o["token_ids"] for o in outputs] == [
        o["token_ids"] for o in demo.generate(token_ids, greedy(8), use_tqdm=False)
    ]
    assert demo.chat(chats[0], greedy(8), use_tqdm=False)[0]["text"] == outputs[0]["text"]


def test_chat_passes_options_to_the_template(demo):
    chat = [{"role": "user", "content": "Hi"}]
    template = "{{ messages[0].content }}|{{ enable_thinking }}|{{ tools }}|{{ add_generation_prompt }}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    options = {"chat_template": template, "enable_thinking": False, "add_generation_prompt": False, "tools": tools}
    (output,) = demo.chat(chat, greedy(1), use_tqdm=False, **options)
    assert output.prompt == f"Hi|False|{tools}|False"
    options = {"chat_template": template, "chat_template_kwargs": {"enable_thinking": True}}
    (output,) = demo.chat(chat, greedy(1), use_tqdm=False, **options)
    assert output.prompt == "Hi|True|None|True"


def test_wrong_conversations_are_refused_by_name(demo, llm):
    with pytest.raises(TypeError, match="messages must be a list"):
        demo.chat("Hello")
    with pytest.raises(ValueError, match=r"messages\[1\] is refused by the chat template"):
        demo.chat([[{"role": "user", "content": "a"}], [{"content": "no role"}]])
    with pytest.raises(ValueError, match="has no tokenizer"):
        llm.chat([{"role": "user", "content": "a"}])


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
        (output,) = demo.chat(chat, greedy(1), use_tqdm=False, chat_template=template)
        assert output.prompt == expected


def test_a_template_that_takes_parts_alone_gets_them(demo):
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert demo.chat(chat, greedy(1), use_tqdm=False, chat_template=ONLY_PARTS)[0].prompt == "<a><b>"


def test_content_that_is_no_text_is_refused(demo):
    image = {"type": "image_url", "image_url": {"url": "x.png"}}
    for wrong, error in ([image], ValueError), ([{"type": "text"}], ValueError), ([7], ValueError), (image, TypeError):
        with pytest.raises(error, match=r"content of messages\[1\]\[0\] must"):
            demo.chat([[{"role": "user", "content": "a"}], [{"role": "user", "content": wrong}]])


def test_a_tool_call_may_have_no_content(demo):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = [{"role": "user", "content": [{"type": "text", "text": "Call f."}]}, call]
    template = (
        "{% for m in messages %}[{{ m.content if m.content is string else m.tool_calls[0].function.name }}]{% endfor %}"
    )
    assert demo.chat(chat, greedy(1), use_tqdm=False, chat_template=template)[0].prompt == "[Call f.][f]"
    for template, end in (QWEN_3, "assistant\n<|im_end|>\n"), (LLAMA_3, "<|eot_id|>"), (SMOLLM_2, "assistant\n"):
        assert demo.chat(chat, greedy(1), use_tqdm=False, chat_template=template)[0].prompt.endswith(end)


def test_an_option_that_nobody_knows_is_refused(demo):
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TypeError, match="unknown option 'lora_requst'"):
        demo.chat(chat, lora_requst=None)
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ lora_requst }}"
    assert demo.chat(chat, greedy(1), use_tqdm=False, chat_template=template, lora_requst=None)[0].prompt == "HiNone"
    demo.chat(chat, greedy(1), use_tqdm=False, documents=None, continue_final_message=False)  # transformers' own
