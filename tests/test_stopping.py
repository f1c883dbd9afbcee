"""Where a completion ends: stop strings, and what its text has of them."""

import time

from helpers import STORY, greedy

from nanovllm import SamplingParams


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
