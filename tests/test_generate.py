"""What a request may ask of generate(), chat() and stream(): completions, texts, log-probabilities, in float32."""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm import greedy
from test_modes import EXTRAS, PROMPTS, assert_nothing_leaks, make_llm, run

from nanovllm import LLM, SamplingParams


@pytest.fixture
def llm(tiny_model):
    return make_llm(tiny_model())


@pytest.fixture(scope="module")
def demo(demo_model):
    return LLM(demo_model, dtype="float32", max_model_len=256, max_num_seqs=16, device="cpu", use_tqdm=False)


def completions(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


# --- n completions ---------------------------------------------------------------------------------------------------


def test_n_completions_share_the_prompts_blocks_and_differ(llm):
    llm = make_llm(llm.config.model, kvcache_block_size=4)
    prompt = PROMPTS[-1]
    params = SamplingParams(n=5, max_tokens=8, seed=3)
    most_blocks = 0
    request_id = llm.add_request(prompt, params)
    finished = []
    while not llm.is_finished():
        finished += llm.step()[0]
        most_blocks = max(most_blocks, llm.stats()["num_blocks_in_use"])
    assert [i for i, _ in finished] == [request_id] * 5
    alone = -(-len(prompt) // 4)
    assert most_blocks <= alone + 5 * 3, "the prompt's full blocks are there once"
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert [sample.index for sample in output.outputs] == list(range(5))
    assert sorted(sample.token_ids for sample in output.outputs) == sorted(ids for _, ids in finished)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 5
    assert_nothing_leaks(llm)


def test_a_sample_does_not_depend_on_how_many_there_are(llm):
    """The first is that of n=1, the others are those of a smaller n; alone, in a batch, in fewer rows."""
    by_n = [completions(llm, [PROMPTS[5]], SamplingParams(n=n, max_tokens=9, seed=7))[0] for n in (1, 2, 6)]
    assert by_n[0] == by_n[2][:1]
    assert by_n[1] == by_n[2][:2]
    few = make_llm(llm.config.model, max_num_seqs=2)
    params = [SamplingParams(n=1 + i % 3, max_tokens=9, seed=7) for i in range(len(PROMPTS))]
    assert completions(few, PROMPTS, params)[5] == by_n[2][: params[5].n]


def test_some_samples_that_are_finished_make_no_result(llm):
    """A request is done when all of its completions are; an abort drops the ones that are done as well."""
    request_id = llm.add_request([1, 2], SamplingParams(n=3, max_tokens=20, seed=0, stop_token_ids=range(64)))
    finished = []
    while not finished:
        finished += llm.step()[0]
    llm.abort(request_id)
    while not llm.is_finished():
        assert llm.step()[0] == []
    assert_nothing_leaks(llm)


def test_an_error_in_the_middle_gives_no_request_with_a_completion_missing(llm):
    calls = []

    def fail_late(token_ids, logits):
        calls.append(token_ids)
        if len(token_ids) == 8:
            raise RuntimeError("no more")
        return logits

    params = [
        SamplingParams(n=2, max_tokens=4, seed=1),
        SamplingParams(n=2, max_tokens=9, seed=1, logits_processors=[fail_late]),
    ]
    with pytest.raises(RuntimeError, match="no more") as caught:
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
    done, lost = caught.value.outputs
    assert len(done.outputs) == 2
    assert lost is None
    assert_nothing_leaks(llm)
    assert len(llm.generate(PROMPTS[:1], params[:1], use_tqdm=False)[0].outputs) == 2


# --- seeds -----------------------------------------------------------------------------------------------------------


SCRIPT = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", max_model_len=64, use_tqdm=False, num_kvcache_blocks=50)
params = SamplingParams(n=3, seed=11, max_tokens=10, top_p=0.9, presence_penalty=0.5)
(output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
print([sample.token_ids for sample in output.outputs])
"""


def test_a_seed_gives_the_same_tokens_in_another_process(llm):
    params = SamplingParams(n=3, seed=11, max_tokens=10, top_p=0.9, presence_penalty=0.5)
    script = [sys.executable, "-c", SCRIPT, str(llm.config.model)]
    printed = subprocess.run(script, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(completions(llm, [[1, 2, 3]], params)[0])


def test_without_a_seed_two_calls_differ(llm):
    params = SamplingParams(max_tokens=20)
    assert completions(llm, PROMPTS, params) != completions(llm, PROMPTS, params)


# --- penalties -------------------------------------------------------------------------------------------------------


def test_greedy_with_repetition_penalty_is_that_of_transformers(demo):
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.config.model, dtype=torch.float32)
    prompts = [demo.tokenizer(text)["input_ids"] for text in ("The capital of France is", "One two one two one")]
    outputs = demo.generate(prompts, greedy(40, repetition_penalty=1.2), use_tqdm=False)
    for prompt, output in zip(prompts, outputs):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        assert output["token_ids"] == expected[0, len(prompt) :].tolist()


def test_allowed_tokens_and_bias_hold_in_every_token(llm):
    allowed = [5, 17, 90]
    (some,) = completions(llm, [[1]], SamplingParams(max_tokens=30, allowed_token_ids=allowed, seed=1))[0]
    assert set(some) == set(allowed)
    (one,) = completions(llm, [[1]], SamplingParams(max_tokens=9, logit_bias={42: 100.0}, seed=1))[0]
    assert one == [42] * 9


# --- log-probabilities of prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [16384, 5])
def test_prompt_logprobs_are_those_of_transformers(budget, tiny_model):
    """Also where the prompt is in the prefix cache, and where it is cut into chunks."""
    folder = tiny_model()
    llm = make_llm(folder, max_num_batched_tokens=budget, kvcache_block_size=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [p for p in PROMPTS if len(p) > 1][:6]
    llm.generate(prompts, greedy(3), use_tqdm=False)
    params = [greedy(3, prompt_logprobs=n) for n in (0, 3, -1)] * 2
    for prompt, p, output in zip(prompts, params, llm.generate(prompts, params, use_tqdm=False)):
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.num_cached_tokens == 0
        first, *rest = output.prompt_logprobs
        assert first is None
        assert len(rest) == len(prompt) - 1
        for i, (token_id, candidates) in enumerate(zip(prompt[1:], rest)):
            top = expected[i].argsort(descending=True).tolist()
            num_top = 128 if p.prompt_logprobs == -1 else p.prompt_logprobs
            assert set(candidates) == {token_id, *top[:num_top]}
            for candidate, value in candidates.items():
                assert value.logprob == pytest.approx(expected[i, candidate].item(), abs=1e-4)
                assert value.rank == top.index(candidate) + 1


def test_prompt_logprobs_survive_a_preemption(tiny_model):
    params = [greedy(30, prompt_logprobs=1)] * 6
    expected = [o.prompt_logprobs for o in make_llm(tiny_model()).generate(PROMPTS[6:12], params, use_tqdm=False)]
    llm = make_llm(tiny_model(), kvcache_block_size=4, num_kvcache_blocks=34, max_num_batched_tokens=30)
    outputs = llm.generate(PROMPTS[6:12], params, use_tqdm=False)
    assert llm.stats()["num_preemptions"] > 0
    for output, wanted in zip(outputs, expected):
        assert len(output.prompt_logprobs) == len(wanted)
        for ours, theirs in zip(output.prompt_logprobs[1:], wanted[1:]):
            assert ours.keys() == theirs.keys()
            assert all(ours[t].logprob == pytest.approx(theirs[t].logprob, abs=1e-4) for t in ours)


def test_prompt_logprobs_of_n_completions_are_computed_once(llm):
    (output,) = llm.generate([PROMPTS[9]], SamplingParams(n=3, max_tokens=2, prompt_logprobs=0), use_tqdm=False)
    assert len(output.prompt_logprobs) == len(PROMPTS[9])
    assert len(output.outputs) == 3


# --- texts -----------------------------------------------------------------------------------------------------------

STORY = "Once upon a time"


def test_a_stop_string_is_found_across_tokens_and_cut_off(demo):
    (whole,) = demo.generate(STORY, greedy(40), use_tqdm=False)
    text = whole["text"]
    for start, length in ((10, 9), (25, 1), (31, 12)):
        stop = text[start : start + length]
        first = text.index(stop)
        params = [greedy(40, stop=stop), greedy(40, stop=["no such text", stop], include_stop_str_in_output=True)]
        cut, kept = demo.generate([STORY] * 2, params, use_tqdm=False)
        assert cut["text"] == text[:first]
        assert kept["text"] == text[: first + length]
        for output in (cut, kept):
            assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
            token_ids = output["token_ids"]
            assert token_ids == whole["token_ids"][: len(token_ids)]
            decode = demo.tokenizer.decode
            assert stop in decode(token_ids)
            assert stop not in decode(token_ids[:-1]), "it ends with the token that completes the string"


def test_of_several_stop_strings_the_first_in_the_text_counts(demo):
    text = demo.generate(STORY, greedy(40), use_tqdm=False)[0]["text"]
    params = greedy(40, stop=[text[30:36], text[12:20], "no such text"])
    (output,) = demo.generate(STORY, params, use_tqdm=False)
    assert output["stop_reason"] == text[12:20]
    assert output["text"] == text[: text.index(text[12:20])]


def test_no_stop_string_counts_before_min_tokens(demo):
    text = demo.generate(STORY, greedy(40), use_tqdm=False)[0]["text"]
    (output,) = demo.generate(STORY, greedy(40, stop=text[:3], min_tokens=20), use_tqdm=False)
    assert len(output["token_ids"]) > 20
    assert output["text"].startswith(text[:20])


def test_a_stop_string_in_the_last_token_is_the_reason(demo):
    (whole,) = demo.generate(STORY, greedy(10), use_tqdm=False)
    last = demo.tokenizer.decode(whole["token_ids"][-1:])
    (output,) = demo.generate(STORY, greedy(10, stop=last), use_tqdm=False)
    if output["token_ids"] == whole["token_ids"]:
        assert output["finish_reason"] == "stop"
    assert output["text"] + last == demo.tokenizer.decode(output["token_ids"])


def test_detokenize_and_skip_special_tokens(demo):
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    params = [
        greedy(40),
        greedy(40, detokenize=False),
        greedy(40, skip_special_tokens=False, include_stop_str_in_output=True),
    ]
    plain, none, special = (demo.chat(chat, p, use_tqdm=False)[0] for p in params)
    assert plain["text"] == "The capital of France is Paris."
    assert none["text"] == ""
    assert none["token_ids"] == plain["token_ids"]
    assert special["text"] == "The capital of France is Paris.<|im_end|>"


def test_logprobs_carry_the_tokens_texts(demo):
    (output,) = demo.generate(STORY, greedy(5, logprobs=2, prompt_logprobs=0), use_tqdm=False)
    for token_id, candidates in zip(output["token_ids"], output["logprobs"]):
        assert candidates[token_id].decoded_token == demo.tokenizer.decode([token_id])
        assert candidates[token_id].rank == 1
        assert len(candidates) == 2
    assert [c and next(iter(c.values())).decoded_token for c in output.prompt_logprobs][1:] == [
        demo.tokenizer.decode([t]) for t in output.prompt_token_ids[1:]
    ]


def test_timings_are_in_order(demo):
    before = time.time()
    outputs = demo.generate([STORY, "The"], SamplingParams(n=2, max_tokens=6, ignore_eos=True), use_tqdm=False)
    for metrics in (output.metrics for output in outputs):
        assert before <= metrics.arrival_time <= metrics.first_token_time < metrics.finished_time <= time.time()


# --- chat ------------------------------------------------------------------------------------------------------------


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


# --- streams ---------------------------------------------------------------------------------------------------------


def collect(increments):
    """{(prompt, sample): (text, token ids, finish reason)} of a stream."""
    collected = {}
    for new in increments:
        text, token_ids, reason = collected.get((new.prompt_index, new.index), ("", [], None))
        assert reason is None, "nothing comes after the end"
        assert not new.text.endswith("\ufffd") or new.finish_reason
        collected[new.prompt_index, new.index] = text + new.text, token_ids + new.token_ids, new.finish_reason
    return collected


def test_a_stream_adds_up_to_what_generate_returns(demo):
    prompts = [STORY, "Emoji: 😀 🎉 你好 😀 🎉", "The quick brown fox"]
    params = [
        greedy(30, logprobs=1),
        SamplingParams(n=3, max_tokens=30, seed=5, temperature=1.5, stop=["e t", "."]),
        greedy(30, stop="no such text", skip_special_tokens=False),
    ]
    streamed = collect(demo.stream(prompts, params))
    for i, output in enumerate(demo.generate(prompts, params, use_tqdm=False)):
        for sample in output.outputs:
            assert streamed[i, sample.index] == (sample.text, sample.token_ids, sample.finish_reason)
    assert_nothing_leaks(demo)


def test_a_stream_comes_token_by_token_and_never_shows_what_a_stop_string_takes_away(demo):
    text = demo.generate(STORY, greedy(40), use_tqdm=False)[0]["text"]
    stop = text[20:32]
    increments = list(demo.stream(STORY, greedy(40, stop=stop)))
    assert all(len(new.token_ids) == 1 for new in increments)
    assert "".join(new.text for new in increments) == text[: text.index(stop)]
    assert len([new for new in increments if new.text]) > 2
    assert (increments[-1].finish_reason, increments[-1].stop_reason) == ("stop", stop)


def test_a_stream_never_splits_a_character(demo):
    """Emoji take several tokens."""
    emoji = demo.tokenizer("😀🎉你", add_special_tokens=False)["input_ids"]
    forced = iter(emoji)

    def force(token_ids, logits):
        only = torch.full_like(logits, -torch.inf)
        only[next(forced)] = 0.0
        return only

    params = greedy(len(emoji), logits_processors=[force])
    texts = [new.text for new in demo.stream(STORY, params)]
    assert len(texts) == len(emoji) > 3
    assert "".join(texts) == "😀🎉你"
    assert "\ufffd" not in "".join(texts)


def test_leaving_a_stream_drops_its_requests_and_no_other(demo):
    other = demo.add_request("The", greedy(12))
    for i, _ in enumerate(demo.stream([STORY, "A", "B"], greedy(100, ignore_eos=True))):
        if i == 7:
            break
    results = []
    while not demo.is_finished():
        results += demo.step()[0]
    assert [request_id for request_id, _ in results] == [other]
    assert_nothing_leaks(demo)


def test_other_calls_may_come_between_the_increments_of_a_stream(llm):
    alone = collect(llm.stream([[1], [2, 3]], greedy(9)))
    increments = llm.stream([[1], [2, 3]], greedy(9))
    first = next(increments)
    other = llm.add_request([5], greedy(3))
    assert len(llm.generate([[4]], greedy(30), use_tqdm=False)[0]["token_ids"]) == 30
    assert [request_id for request_id, _ in llm.step()[0]] == [other], "not the stream's, which are finished too"
    assert collect([first, *increments]) == alone


def test_steps_end_beside_a_stream_that_another_call_finished(llm):
    increments = llm.stream([[1], [2, 3]], greedy(9))
    next(increments)
    params = SamplingParams(n=2, max_tokens=30, ignore_eos=True)
    other = llm.add_request([5], params)
    results = []
    for _ in range(100):
        if llm.is_finished():
            break
        results += llm.step()[0]
    assert [request_id for request_id, _ in results] == [other, other], "the stream's are waited for, but not given"
    assert llm.is_finished()
    collect(increments)
    assert_nothing_leaks(llm)


def test_a_stream_whose_requests_an_error_dropped_says_so(llm):
    increments = llm.stream([[1], [2, 3]], greedy(9))
    next(increments)
    with pytest.raises(TypeError):
        llm.generate([[4]], greedy(5, logits_processors=[lambda token_ids, logits: None]), use_tqdm=False)
    with pytest.raises(RuntimeError, match="has dropped this stream's requests"):
        list(increments)
    assert_nothing_leaks(llm)


def test_a_stream_checks_its_prompts_at_once(llm):
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        llm.stream([[1], []])
    streamed = collect(llm.stream([[1], [2, 3]], greedy(4)))  # without a tokenizer
    assert [text for text, _, _ in streamed.values()] == ["", ""]
    assert [token_ids for _, token_ids, _ in streamed.values()] == [
        ids for (ids,) in completions(llm, [[1], [2, 3]], greedy(4))
    ]


# --- the rest of the interface ---------------------------------------------------------------------------------------


def test_reset_prefix_cache_forgets_also_while_requests_run(llm):
    llm.generate([PROMPTS[11]], greedy(2), use_tqdm=False)
    llm.add_request(PROMPTS[11], greedy(30))
    llm.step()
    llm.reset_prefix_cache()
    (output,) = llm.generate([PROMPTS[11]], greedy(30), use_tqdm=False)
    assert output.num_cached_tokens == 0
    while not llm.is_finished():
        for _, token_ids in llm.step()[0]:
            assert token_ids == output["token_ids"]
    assert_nothing_leaks(llm)
    assert llm.generate([PROMPTS[11]], greedy(2), use_tqdm=False)[0].num_cached_tokens > 0


def test_default_sampling_params_are_the_checkpoints(tiny_model, tmp_path):
    llm = make_llm(tiny_model())
    assert llm.get_default_sampling_params() == SamplingParams()
    for file in Path(tiny_model()).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    assert make_llm(tmp_path).get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20)


def test_half_a_surrogate_pair_is_refused_by_name(demo):
    """JSON can hold one."""
    with pytest.raises(ValueError, match=r"prompts\[1\] must be text in Unicode"):
        demo.generate(["fine", "\ud800"], greedy(1))
    with pytest.raises(ValueError, match=r"messages\[0\] is refused"):
        demo.chat([{"role": "user", "content": "\ud800"}], greedy(1))


def test_a_prompt_fits_that_leaves_room_for_one_token(llm):
    assert llm.max_model_len == 128
    assert llm.generate([[1] * 127], greedy(5), use_tqdm=False)[0]["finish_reason"] == "length"
    with pytest.raises(ValueError, match="leaves no room"):
        llm.generate([[1] * 128], greedy(5))


def test_the_tokenizer_has_vllms_name_too(demo):
    assert demo.get_tokenizer() is demo.tokenizer


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_token_ids": [128]}, r"allowed_token_ids of prompts\[2\] must be in \[0, 127\], got 128"),
        ({"logit_bias": {500: 1.0}}, r"logit_bias of prompts\[2\] must be in \[0, 127\], got 500"),
        ({"stop_token_ids": [128]}, r"stop_token_ids of prompts\[2\] must be in \[0, 127\], got 128"),
        ({"prompt_logprobs": 129}, r"prompt_logprobs of prompts\[2\] must be in \[-1, 128\], got 129"),
        ({"logprobs": 129}, r"logprobs of prompts\[2\] must be in \[-1, 128\], got 129"),
        ({"stop": "x"}, "has no tokenizer"),
        (
            {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1},
            r"min_tokens of prompts\[2\] must be 0 where every token that is allowed is a stop token, got 1",
        ),
        (
            {"stop_token_ids": range(128), "min_tokens": 2, "max_tokens": 4},
            r"min_tokens of prompts\[2\] must be 0 where every token that is allowed is a stop token, got 2",
        ),
    ],
)
def test_one_bad_request_is_refused_before_any_work(params, message, llm):
    every = [SamplingParams()] * 4
    every[2] = SamplingParams(**params)
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPTS[:4], every, use_tqdm=False)
    assert llm.is_finished()
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("eos_token_id", [128, -1])
def test_end_tokens_outside_the_vocabulary_are_passed_over(eos_token_id, tiny_model, tmp_path):
    """Shrunken checkpoints have them, or -1 for none; a ban of one must not reach another row."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    llm = make_llm(folder)
    alone = llm.generate([[2]], greedy(3, logit_bias={0: 100.0}), use_tqdm=False)[0]["token_ids"]
    params = [greedy(3, min_tokens=3), greedy(3, logit_bias={0: 100.0}), greedy(3)]
    assert llm.generate([[1], [2], [3]], params, use_tqdm=False)[1]["token_ids"] == alone == [0] * 3


def test_small_numpy_integers_are_token_ids_as_well(llm):
    few = np.array([5, 6], np.uint8)
    params = SamplingParams(
        max_tokens=4,
        allowed_token_ids=list(few),
        logit_bias={few[0]: np.float16(1)},
        min_tokens=1,
        stop_token_ids=[few[1]],
    )
    for output in llm.generate([[1], [2], [3]], params, use_tqdm=False):
        assert set(output["token_ids"]) <= {5, 6}


def test_a_processor_may_have_parameters_of_its_own(llm):
    def only(token_ids, logits, token_id=7):
        return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([token_id]), 0.0)

    params = [greedy(2, logits_processors=[f]) for f in (only, partial(only, token_id=9))]
    assert completions(llm, [[1], [1]], params) == [[[7, 7]], [[9, 9]]]
    early = greedy(6, min_tokens=3, stop_token_ids=[7], logits_processors=[only])
    assert completions(llm, [[1]], early) == [[[7] * 4]], "what a processor forces does not stop too early either"


def test_a_processor_cannot_run_the_engine(llm):
    def nested(token_ids, logits):
        llm.generate([[1]], greedy(2), use_tqdm=False)
        return logits

    with pytest.raises(RuntimeError, match="a logits processor cannot run the engine"):
        llm.generate([[1]], greedy(4, logits_processors=[nested]), use_tqdm=False)
    assert_nothing_leaks(llm)
    assert len(llm.generate([[1]], greedy(4), use_tqdm=False)[0]["token_ids"]) == 4


def test_a_request_keeps_no_more_logprobs_than_it_asks_for(llm):
    requests = llm._make_requests([[1], [2]], [greedy(5, logprobs=1), greedy(5, logprobs=-1)])
    llm._add(requests)
    while llm.engine.scheduler.has_unfinished:
        llm.engine.step()
    assert [[len(candidates) for candidates in seq.logprobs] for (seq,) in requests] == [[1] * 5, [128] * 5]


def test_an_interrupt_while_results_are_made_loses_none(llm, monkeypatch):
    """Also a second one, in the middle of handling the first: no request goes on running."""
    make, calls = LLM._make_output, []

    def interrupted(self, samples):
        calls.append(samples)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(self, samples)

    monkeypatch.setattr(LLM, "_make_output", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        llm.generate([[1], [2], [3]], [greedy(2), greedy(2), greedy(30)], use_tqdm=False)
    assert [output is not None for output in caught.value.outputs] == [True, True, False]
    assert_nothing_leaks(llm)


# --- every promise, on random parameters -----------------------------------------------------------------------------

parameters = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12), "temperature": st.sampled_from([0.0, 1e-6, 0.7, 3.0])},
    optional={
        "top_k": st.sampled_from([-1, 1, 5, 1000]),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop_token_ids": st.lists(st.integers(0, 127), max_size=40),
        "logprobs": st.integers(-1, 4),
        "prompt_logprobs": st.integers(-1, 4),
        "repetition_penalty": st.floats(0.1, 3.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 127), st.floats(-100.0, 100.0), max_size=5),
        "allowed_token_ids": st.lists(st.integers(0, 127), min_size=1, max_size=9),
        "ignore_eos": st.booleans(),
        "n": st.integers(1, 3),
        "min_tokens": st.integers(0, 4),
    },
)


def check_promises(prompt, params, output):
    assert output.prompt_token_ids == prompt
    assert len(output.outputs) == params.n
    assert (output.prompt_logprobs is None) == (params.prompt_logprobs is None)
    if output.prompt_logprobs is not None:
        assert [token_id in c for token_id, c in zip(prompt[1:], output.prompt_logprobs[1:])] == [True] * (
            len(prompt) - 1
        )
    stops = set(params.stop_token_ids or ())
    for sample in output.outputs:
        token_ids = sample.token_ids
        assert params.min_tokens <= len(token_ids) <= params.max_tokens
        if sample.finish_reason == "stop":
            assert sample.stop_reason == token_ids[-1]
            assert len(token_ids) > params.min_tokens
        else:
            assert sample.finish_reason == "length"
            assert len(token_ids) == params.max_tokens
        assert [t for t in token_ids if t in stops] == ([token_ids[-1]] if sample.finish_reason == "stop" else [])
        if params.allowed_token_ids:
            assert set(token_ids) <= set(params.allowed_token_ids)
        if params.logprobs is None:
            assert sample.logprobs is None
            continue
        num_top = 128 if params.logprobs == -1 else params.logprobs
        assert len(sample.logprobs) == len(token_ids)
        for token_id, candidates in zip(token_ids, sample.logprobs):
            assert token_id in candidates
            assert num_top <= len(candidates) <= num_top + 1
            assert sorted(c.rank for c in candidates.values())[:num_top] == list(range(1, num_top + 1))
        assert sample.cumulative_logprob == pytest.approx(sum(c[t].logprob for t, c in zip(token_ids, sample.logprobs)))


@pytest.fixture(scope="module")
def small(tiny_model):
    return make_llm(
        tiny_model(), kvcache_block_size=4, num_kvcache_blocks=40, max_num_seqs=5, max_num_batched_tokens=37
    )


@settings(max_examples=100, deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from(PROMPTS), parameters), min_size=1, max_size=6))
def test_every_promise_of_every_parameter_holds(small, requests):
    prompts, params = [], []
    for prompt, asked in requests:
        if asked["temperature"] == 0:
            asked = asked | {"n": 1}
        asked["max_tokens"] = max(asked["max_tokens"], asked.get("min_tokens", 0))
        if asked.get("min_tokens") and set(asked.get("allowed_token_ids", ())) <= set(asked.get("stop_token_ids", ())):
            asked.pop("allowed_token_ids", None)
        prompts.append(prompt)
        params.append(SamplingParams(**asked))
    outputs = small.generate(prompts, params, use_tqdm=False)
    assert_nothing_leaks(small)
    for prompt, p, output in zip(prompts, params, outputs):
        check_promises(prompt, p, output)


def test_requests_that_ask_for_nothing_are_not_changed_by_those_that_do(llm):
    plain = SamplingParams(max_tokens=20, seed=1)
    alone = run(llm, PROMPTS[:4], [plain] * 4)
    beside = [plain] * 4 + [SamplingParams(max_tokens=20, seed=2, **extras) for extras in EXTRAS]
    assert run(llm, PROMPTS[:4] + PROMPTS[: len(EXTRAS)], beside)[:4] == alone
