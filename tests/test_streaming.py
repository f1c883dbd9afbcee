"""stream(): increments add up to what generate() returns, and leaving a stream drops its requests alone."""

import pytest
import torch
from helpers import STORY, assert_nothing_leaks, completions, greedy, make_llm

from nanovllm import SamplingParams


@pytest.fixture
def llm(tiny_model):
    return make_llm(tiny_model())


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
