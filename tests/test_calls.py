"""One call at a time: what other threads, open streams and unfinished requests of `add_request` mean for a call."""

import threading

import pytest
from helpers import PROMPTS, assert_nothing_leaks, fail_at, greedy, make_llm

from nanovllm import SamplingParams
from nanovllm.engine.model_runner import ModelRunner


@pytest.fixture
def llm(tiny_model):
    return make_llm(tiny_model(), max_num_seqs=4)


def tokens(llm, prompts, params):
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def in_threads(*calls):
    """The results of calls in threads of their own, or their exceptions."""
    results = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


def test_calls_of_several_threads_wait_for_their_turn_and_are_right(llm):
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    shares = [PROMPTS[i::4] for i in range(4)]
    expected = [tokens(llm, share, params) for share in shares]

    def stream(share):
        found = {i: [] for i in range(len(share))}
        for new in llm.stream(share, params):
            found[new.prompt_index] += new.token_ids
        return list(found.values())

    def by_hand(share):
        ids = [llm.add_request(prompt, params) for prompt in share]
        found = {}
        while len(found) < len(ids):
            found.update(llm.step()[0])
        return [found[i] for i in ids]

    calls = [lambda: tokens(llm, shares[0], params), lambda: tokens(llm, shares[1], params)]
    calls += [lambda: stream(shares[2]), lambda: by_hand(shares[3])]
    for _ in range(3):
        assert in_threads(*calls) == expected
    assert_nothing_leaks(llm)


def test_an_error_in_one_thread_is_not_anothers(llm):
    def fail(token_ids, logits):
        raise ValueError("a processor's own")

    expected = tokens(llm, PROMPTS, greedy(8))
    failing = greedy(8, logits_processors=[fail])
    results = in_threads(*[lambda: tokens(llm, PROMPTS, greedy(8)), lambda: tokens(llm, PROMPTS, failing)] * 3)
    assert results[::2] == [expected] * 3
    assert all("a processor's own" in str(error) for error in results[1::2])
    assert_nothing_leaks(llm)


def test_calls_beside_an_open_stream(llm):
    """Of the same thread and of another one. The stream's requests go on meanwhile, and what they got is given out next."""
    expected = tokens(llm, PROMPTS[:2], greedy(20))
    stream = llm.stream(PROMPTS[:2], greedy(20))
    found = {0: [], 1: []}
    first = next(stream)
    found[first.prompt_index] += first.token_ids
    assert tokens(llm, PROMPTS[2:4], greedy(5)) == in_threads(lambda: tokens(llm, PROMPTS[2:4], greedy(5)))[0]
    request_id = llm.add_request(PROMPTS[4], greedy(30))
    for new in stream:
        found[new.prompt_index] += new.token_ids
    assert list(found.values()) == expected
    finished = []
    while not llm.is_finished():
        finished += llm.step()[0]
    assert [i for i, _ in finished] == [request_id]
    assert_nothing_leaks(llm)


def test_generate_beside_unfinished_requests_returns_its_own_and_keeps_theirs(llm):
    expected = tokens(llm, PROMPTS[:3], greedy(6))
    ids = [llm.add_request(prompt, greedy(6)) for prompt in PROMPTS[:3]]
    llm.step()
    assert len(tokens(llm, PROMPTS[3:5], greedy(40))) == 2
    found = {}
    while not llm.is_finished():
        found.update(llm.step()[0])
    assert [found[i] for i in ids] == expected
    assert_nothing_leaks(llm)


def test_a_stream_that_is_left_in_another_thread_ends(llm):
    stream = llm.stream(PROMPTS[:1], greedy(50))
    next(stream)
    in_threads(stream.close)
    assert_nothing_leaks(llm)


def test_an_error_beside_added_requests_is_told_by_the_next_step(llm, monkeypatch):
    ids = [llm.add_request(prompt, greedy(6)) for prompt in PROMPTS[:2]]
    fail_at(monkeypatch, ModelRunner, "forward", 2, RuntimeError("the device's own"))
    with pytest.raises(RuntimeError, match="the device's own"):
        llm.generate(PROMPTS[:2], greedy(9), use_tqdm=False)
    assert not llm.is_finished()
    with pytest.raises(RuntimeError, match=rf"has dropped the requests \[{ids[0]}, {ids[1]}\]"):
        llm.step()
    assert llm.is_finished()
    assert len(tokens(llm, PROMPTS, greedy(3))) == len(PROMPTS)
