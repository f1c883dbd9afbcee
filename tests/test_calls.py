"""Calls beside each other, of threads, open streams and `add_request`: one at a time, and each gets its own."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import FEW, PROMPTS, assert_nothing_leaks, collect, drain, greedy, make_llm, num_unfinished, tokens

from nanovllm import SamplingParams
from nanovllm.engine.llm_engine import no_full_collections


def in_threads(*calls):
    """The results of calls in threads of their own, or their exceptions."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception(timeout=120) or future.result() for future in futures]


@pytest.mark.parametrize("overlapped", [True, False])
def test_add_request_and_step_follow_nano_vllm(overlapped, tiny_model):
    expected = tokens(make_llm(tiny_model()), FEW, greedy(5))
    llm = make_llm(tiny_model(), async_scheduling=overlapped)
    ids = [llm.add_request(prompt, greedy(5)) for prompt in FEW]
    results, counts = {}, []
    while not llm.is_finished():
        outputs, num_tokens = llm.step()
        results.update(outputs)
        counts.append(num_tokens)
    assert [results[i] for i in ids] == expected
    assert counts == [0] * overlapped + [sum(map(len, FEW))] + [-4] * 4
    assert llm.step() == ([], 0)


def test_generate_beside_added_requests_returns_its_own_and_keeps_theirs(llm):
    params = [greedy(3), greedy(60), greedy(3)]
    expected = tokens(llm, PROMPTS[:3], params)
    ids = [llm.add_request(prompt, p) for prompt, p in zip(PROMPTS, params)]
    llm.step()
    (output,) = llm.generate([PROMPTS[3]], greedy(10))
    assert output.prompt_token_ids == PROMPTS[3]
    assert output.request_id not in ids
    assert not llm.is_finished()
    results = dict(drain(llm))
    assert [results[i] for i in ids] == expected


def test_several_llms_work_side_by_side(tiny_model):
    llms = make_llm(tiny_model("qwen3")), make_llm(tiny_model("llama"), kvcache_block_size=4)
    expected = [tokens(llm, [FEW[1]], greedy(9)) for llm in llms]
    for llm in llms:
        llm.add_request(FEW[1], greedy(9))
    results = [[], []]
    while not all(llm.is_finished() for llm in llms):
        for llm, result in zip(llms, results):
            result += [token_ids for _, token_ids in llm.step()[0]]
    assert results == expected


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_an_aborted_request_frees_what_it_holds_and_is_not_returned(turns, llm):
    ids = [llm.add_request(prompt, greedy(20)) for prompt in FEW]
    for _ in range(turns):
        assert llm.step()[0] == []
    for request_id in ids[1], ids[1], 12345:
        llm.abort(request_id)
    assert num_unfinished(llm) == 3
    results = dict(drain(llm))
    assert sorted(results) == [ids[0], ids[2], ids[3]]
    assert [results[ids[0]]] == tokens(llm, [FEW[0]], greedy(20))


def test_an_abort_drops_what_is_finished_as_well(llm):
    """Some samples of a request, which is done when all of them are; and one that another call has finished."""
    request_id = llm.add_request([1, 2], SamplingParams(n=3, max_tokens=20, seed=0, stop_token_ids=range(64)))
    finished = []
    while not finished:
        finished += llm.step()[0]
    llm.abort(request_id)
    assert drain(llm) == []
    request_id = llm.add_request([1], greedy(2))
    llm.generate([[2]], greedy(9))
    llm.abort(request_id)
    assert llm.step() == ([], 0)
    assert llm.is_finished()


def test_a_request_that_a_processor_aborts_is_returned_as_it_is_by_then(llm):
    """One of its samples has finished in the same step."""

    def abort(token_ids, logits):
        running = [seq for seq in llm.engine.scheduler.running if seq.params.n == 2]
        if len(running) == 1:
            llm.abort(running[0].request_id)
        return logits

    several = SamplingParams(max_tokens=40, n=2, seed=3, stop_token_ids=list(range(0, 128, 6)))
    outputs = llm.generate([[1, 2], [3]], [several, greedy(40, logits_processors=[abort])])
    assert [[c.finish_reason for c in output.outputs] for output in outputs] == [["stop", "abort"], ["length"]]
    assert 0 < len(outputs[0].outputs[1].token_ids) < 40
    assert_nothing_leaks(llm)


def test_an_added_request_that_another_calls_processor_aborts_is_not_returned(llm):
    request_id = llm.add_request([5], greedy(60))

    def abort(token_ids, logits):
        llm.abort(request_id)
        return logits

    llm.generate([[3]], greedy(4, logits_processors=[abort]))
    assert llm.is_finished()
    assert llm.step() == ([], 0)


def test_calls_of_several_threads_wait_for_their_turn_and_are_right(tiny_model):
    llm = make_llm(tiny_model(), max_num_seqs=4)
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    shares = [PROMPTS[i::4] for i in range(4)]
    expected = [tokens(llm, share, params) for share in shares]

    def stream(share):
        found = collect(llm.stream(share, params))
        return [found[i, 0][1] for i in range(len(share))]

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


def test_calls_that_overlap_leave_the_garbage_collector_as_it_was():
    thresholds = gc.get_threshold()
    first, second = no_full_collections(), no_full_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == thresholds


@pytest.mark.parametrize("more", [{}, {"logprobs": 2, "prompt_logprobs": 1}, {"presence_penalty": 1.0}], ids=str)
def test_steps_leave_nothing_to_the_garbage_collector(more, llm):
    """A cycle would keep the memory from which a step was sent, so that every step would take more of it."""
    llm.generate(FEW, greedy(3, **more))
    gc.collect()
    gc.disable()
    try:
        llm.generate(FEW, greedy(60, **more))
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_an_error_in_one_thread_is_not_anothers(llm):
    def fail(token_ids, logits):
        raise ValueError("a processor's own")

    expected = tokens(llm, PROMPTS, greedy(8))
    failing = greedy(8, logits_processors=[fail])
    results = in_threads(*[lambda: tokens(llm, PROMPTS, greedy(8)), lambda: tokens(llm, PROMPTS, failing)] * 3)
    assert results[::2] == [expected] * 3
    assert all("a processor's own" in str(error) for error in results[1::2])
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("num_tokens", [3, 30])
def test_other_calls_may_come_between_the_increments_of_a_stream(num_tokens, llm):
    """Of its thread and of another. Its requests go on, or are finished, meanwhile, and what they got is given out next."""
    alone = collect(llm.stream([[1], [2, 3]], greedy(15)))
    expected = tokens(llm, [[4]], greedy(num_tokens))
    increments = llm.stream([[1], [2, 3]], greedy(15))
    first = next(increments)
    other = llm.add_request([5], SamplingParams(n=2, max_tokens=90, ignore_eos=True))
    assert [tokens(llm, [[4]], greedy(num_tokens))] == in_threads(lambda: tokens(llm, [[4]], greedy(num_tokens)))
    assert tokens(llm, [[4]], greedy(num_tokens)) == expected
    second = next(increments)
    assert [i for i, _ in drain(llm)] == [other, other], "the stream's are waited for, but not given"
    assert collect([first, second, *increments]) == alone
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: in_threads(stream.close)])
def test_leaving_a_stream_drops_its_requests_and_no_other(leave, llm):
    other = llm.add_request([7], greedy(12))
    stream = llm.stream(PROMPTS[:3], greedy(50))
    for _ in range(7):
        next(stream)
    leave(stream)
    assert num_unfinished(llm) == 1
    assert [request_id for request_id, _ in drain(llm)] == [other]


def test_a_stream_that_ends_within_a_step_is_dropped_after_it(tiny_model, monkeypatch):
    """The garbage collector may end it while the scheduler looks at one of its requests."""
    llm = make_llm(tiny_model(), max_num_seqs=1)
    expected = tokens(llm, [[7]], greedy(5))
    stream = llm.stream([[1], [2]], greedy(4))
    next(stream)
    manager = llm.engine.scheduler.block_manager
    match = manager.match
    monkeypatch.setattr(manager, "match", lambda seq: stream.close() or match(seq))
    assert tokens(llm, [[7]], greedy(5)) == expected
    assert_nothing_leaks(llm)


def test_a_stream_says_that_a_request_was_aborted(llm):
    increments = llm.stream([[1], [2]], greedy(9))
    assert next(increments).prompt_index == 0
    llm.abort(llm.engine.scheduler.running[0].request_id)
    reasons = [(new.prompt_index, new.finish_reason) for new in increments if new.finish_reason]
    assert sorted(reasons) == [(0, "abort"), (1, "length")]
    assert_nothing_leaks(llm)
