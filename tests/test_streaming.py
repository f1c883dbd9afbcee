"""stream(): increments come token by token, in whole characters, and add up to what generate() returns."""

from helpers import STORY, assert_nothing_leaks, collect, completions, force, greedy

from nanovllm import SamplingParams


def test_a_stream_adds_up_to_what_generate_returns_and_never_splits_a_character(demo):
    prompts = [STORY, "Emoji: 😀 🎉 你好 😀 🎉", "The quick brown fox", STORY]
    emoji = demo.tokenizer("😀🎉你", add_special_tokens=False)["input_ids"]
    assert len(emoji) > 3
    params = [
        greedy(30, logprobs=1),
        SamplingParams(n=3, max_tokens=30, seed=5, temperature=1.5, stop=["e t", "."]),
        greedy(30, stop="no such text", skip_special_tokens=False),
        SamplingParams(**force(*emoji)),
    ]
    increments = list(demo.stream(prompts, params))
    assert not any("\ufffd" in new.text for new in increments if new.prompt_index == 3)
    streamed = collect(increments)
    assert streamed[3, 0] == ("😀🎉你", emoji, "length")
    for i, output in enumerate(demo.generate(prompts, params)):
        for sample in output.outputs:
            assert streamed[i, sample.index] == (sample.text, sample.token_ids, sample.finish_reason)
    assert_nothing_leaks(demo)


def test_a_stream_comes_token_by_token_and_never_shows_what_a_stop_string_takes_away(demo):
    text = demo.generate(STORY, greedy(40))[0]["text"]
    stop = text[20:32]
    increments = list(demo.stream(STORY, greedy(40, stop=stop)))
    assert all(len(new.token_ids) == 1 for new in increments)
    assert "".join(new.text for new in increments) == text[: text.index(stop)]
    assert len([new for new in increments if new.text]) > 2
    assert (increments[-1].finish_reason, increments[-1].stop_reason) == ("stop", stop)


def test_without_a_tokenizer_a_stream_has_tokens_alone(llm):
    streamed = collect(llm.stream([[1], [2, 3]], greedy(4)))
    expected = [("", token_ids, "length") for (token_ids,) in completions(llm, [[1], [2, 3]], greedy(4))]
    assert list(streamed.values()) == expected
