"""Where a completion ends: end tokens, stop tokens, stop strings and length; and what its text has of them."""

import json
import shutil

import pytest
from helpers import FEW, SHARED, STORY, assert_nothing_leaks, greedy, make_llm, tokens

from nanovllm import SamplingParams


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("position", [0, 3, 10])
def test_every_end_token_and_stop_token_ends_a_completion_and_is_kept(position, overlapped, tiny_model, device):
    """After `min_tokens`, and an end token not where it is ignored. A stop token is the reason that is given."""
    plain = make_llm(tiny_model(), device=device, async_scheduling=overlapped)
    (free,) = tokens(plain, [SHARED], greedy(30))
    token = free[position]
    cut = free[: free.index(token) + 1]
    params = [greedy(30, stop_token_ids=[token])]
    outputs = plain.generate([SHARED], params)
    ends = tiny_model(eos_token_id=[127, token] if token != 127 else [0, token])
    llm = make_llm(ends, device=device, async_scheduling=overlapped)
    more = {"ignore_eos": True}, {"min_tokens": 12}, {"min_tokens": 12, "ignore_eos": True}
    outputs += llm.generate([SHARED] * 4, [greedy(30), *(greedy(30, **options) for options in more)])
    assert [(o["token_ids"], o["finish_reason"], o["stop_reason"]) for o in outputs[:3]] == [
        (cut, "stop", token),
        (cut, "stop", None),
        (free, "length", None),
    ]
    for late in outputs[3:]:
        assert token not in late["token_ids"][:12]
        assert len(late["token_ids"]) > 12
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("eos_token_id", [128, -1])
def test_end_tokens_outside_the_vocabulary_are_passed_over(eos_token_id, tiny_model, tmp_path):
    """Shrunken checkpoints have them, or -1 for none; a ban of one must not reach another row."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    llm = make_llm(folder)
    assert tokens(llm, [[2]], greedy(3, logit_bias={0: 100.0})) == [[0] * 3]
    params = [greedy(3, min_tokens=3), greedy(3, logit_bias={0: 100.0}), greedy(3)]
    assert tokens(llm, [[1], [2], [3]], params)[1] == [0] * 3


def test_a_completion_that_reaches_max_model_len_ends_with_length(llm):
    outputs = llm.generate([[2] * 127, [3] * 120], greedy(64))
    assert [(len(o["token_ids"]), o["finish_reason"]) for o in outputs] == [(1, "length"), (8, "length")]


def test_a_processor_is_not_called_after_the_end(llm):
    """The next step is launched before the token that ends a sequence is read."""
    stop_token_ids, seen = list(range(0, 128, 6)), []

    def processor(token_ids, logits):
        seen.append(list(token_ids))
        return logits

    params = SamplingParams(max_tokens=60, seed=3, stop_token_ids=stop_token_ids, logits_processors=[processor])
    outputs = llm.generate(FEW, params)
    assert {output["finish_reason"] for output in outputs} == {"stop"}
    assert len(seen) == sum(len(output["token_ids"]) for output in outputs)
    assert not any(set(token_ids) & set(stop_token_ids) for token_ids in seen)


@pytest.fixture(scope="module")
def story(demo):
    """What is made of STORY when nothing stops it."""
    return demo.generate(STORY, greedy(40))[0]


@pytest.mark.parametrize(("start", "length"), [(10, 9), (25, 1), (31, 12)])
def test_a_stop_string_is_found_across_tokens_and_cut_off(start, length, demo, story):
    text, decode = story["text"], demo.tokenizer.decode
    stop = text[start : start + length]
    first = text.index(stop)
    params = [greedy(40, stop=stop), greedy(40, stop=["no such text", stop], include_stop_str_in_output=True)]
    cut, kept = demo.generate([STORY] * 2, params)
    assert (cut["text"], kept["text"]) == (text[:first], text[: first + length])
    for output in (cut, kept):
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
        token_ids = output["token_ids"]
        assert token_ids == story["token_ids"][: len(token_ids)]
        assert stop in decode(token_ids)
        assert stop not in decode(token_ids[:-1]), "it ends with the token that completes the string"


def test_of_several_stop_strings_the_first_in_the_text_counts_and_none_before_min_tokens(demo, story):
    text = story["text"]
    params = [greedy(40, stop=[text[30:36], text[12:20], "no such text"]), greedy(40, stop=text[:3], min_tokens=20)]
    first, late = demo.generate([STORY] * 2, params)
    assert (first["stop_reason"], first["text"]) == (text[12:20], text[: text.index(text[12:20])])
    assert len(late["token_ids"]) > 20
    assert late["text"].startswith(text[:20])


def test_a_stop_string_in_the_last_token_is_the_reason(demo, story):
    token_ids = story["token_ids"][:10]
    last = demo.tokenizer.decode(token_ids[-1:])
    (output,) = demo.generate(STORY, greedy(10, stop=last))
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", last)
    assert output["text"] + last == demo.tokenizer.decode(output["token_ids"])


def test_the_text_has_no_stop_token_and_special_ones_only_if_asked(demo):
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    params = [
        greedy(40),
        greedy(40, skip_special_tokens=False, include_stop_str_in_output=True),
        greedy(40, stop_token_ids=demo.tokenizer("The")["input_ids"]),
    ]
    plain, special, stopped = (demo.chat(chat, p)[0] for p in params)
    assert plain["text"] == "The capital of France is Paris."
    assert special["text"] == "The capital of France is Paris.<|im_end|>"
    assert (stopped["text"], stopped["token_ids"]) == ("", plain["token_ids"][:1])
