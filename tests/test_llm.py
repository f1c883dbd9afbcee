"""The interface: what users of nano-vllm and vLLM write works, wrong input is refused, errors leave the LLM usable."""

import gc
import logging
import math
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from helpers import assert_nothing_leaks, fail_at, greedy, make_llm
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.engine import startup
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner, StepInFlight
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

PROMPTS = [[5, 6, 7], [9] * 20, [1], [3, 4] * 10]


@pytest.fixture
def llm(tiny_model):
    return make_llm(tiny_model())


def test_nano_vllm_scripts_run_unchanged(demo_model):
    llm = LLM(str(demo_model), enforce_eager=True, tensor_parallel_size=1)
    prompts = ["The capital of France is", "One, two, three,"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=8))
    for prompt, output in zip(prompts, outputs):
        assert output.prompt == prompt
        assert llm.tokenizer.decode(output["token_ids"], skip_special_tokens=True).startswith(output["text"])
        assert len(output["token_ids"]) <= 8
    llm.generate(["Benchmark: "], SamplingParams())
    token_ids = [[7, 8, 9], [10] * 30]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in (3, 5)]
    outputs = llm.generate(token_ids, params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [3, 5]


def test_every_form_of_prompt_is_the_same_request(demo_model):
    llm = LLM(demo_model, use_tqdm=False, max_model_len=64, dtype="float32")
    text, token_ids = "The sky is", llm.tokenizer("The sky is")["input_ids"]
    forms = [
        text,
        token_ids,
        tuple(token_ids),
        [np.int64(t) for t in token_ids],
        {"prompt": text},
        {"prompt_token_ids": token_ids},
        {"prompt": text, "prompt_token_ids": token_ids},
    ]
    outputs = llm.generate(forms, greedy(6), use_tqdm=False)
    for form in forms:
        if not isinstance(form, tuple):
            outputs += llm.generate(form, greedy(6), use_tqdm=False)
    assert len(outputs) == 13
    assert {(tuple(o.prompt_token_ids), o["text"]) for o in outputs} == {(tuple(token_ids), outputs[0]["text"])}
    assert [o.prompt for o in outputs[:7]] == [text, None, None, None, text, None, text]


def test_results_are_vllms_and_read_as_nano_vllms(llm):
    params = [greedy(4, logprobs=2), greedy(3), greedy(5, logprobs=0), greedy(2, logprobs=-1)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for output, prompt, p in zip(outputs, PROMPTS, params):
        (completion,) = output.outputs
        assert (output.prompt, output.prompt_token_ids, output.finished) == (None, prompt, True)
        assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
        assert len(completion.token_ids) == p.max_tokens
        assert output["token_ids"] is completion.token_ids
        assert output["finish_reason"] == "length"
        assert dict(output)["text"] == output.get("text") == completion.text
        assert ("token_ids" in output, "request_id" in output) == (True, False)
        with pytest.raises(KeyError):
            output["request_id"]
        if p.logprobs is None:
            assert completion.logprobs is None
            assert completion.cumulative_logprob is None
            continue
        drawn = [candidates[t] for t, candidates in zip(completion.token_ids, completion.logprobs)]
        assert completion.cumulative_logprob == pytest.approx(sum(c.logprob for c in drawn))
        assert all(c.rank == 1 for c in drawn), "greedy tokens are the most likely"
        num_top = {0: 1, 2: 2, -1: 128}[p.logprobs]
        assert all(len(candidates) == num_top for candidates in completion.logprobs)
    everything = outputs[3]["logprobs"][0].values()
    assert sum(math.exp(c.logprob) for c in everything) == pytest.approx(1.0, abs=1e-4)
    assert sorted(c.rank for c in everything) == list(range(1, 129))


def test_logprobs_hold_the_drawn_token_beside_the_most_likely(llm):
    params = SamplingParams(temperature=3.0, max_tokens=30, seed=1, logprobs=2)
    (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    for token_id, candidates in zip(output["token_ids"], output["logprobs"]):
        assert token_id in candidates
        assert {1, 2} <= {c.rank for c in candidates.values()}
        assert len(candidates) == (2 if candidates[token_id].rank <= 2 else 3)


def test_decoded_tokens_are_in_the_logprobs(demo_model):
    llm = LLM(demo_model, use_tqdm=False, max_model_len=64)
    (output,) = llm.generate("The capital of France is", greedy(2, logprobs=1), use_tqdm=False)
    decoded = [candidates[t].decoded_token for t, candidates in zip(output["token_ids"], output["logprobs"])]
    assert "".join(decoded) == output["text"] == " Paris."


WRONG_CALLS = [
    ("prompts", lambda llm: llm.generate(7), TypeError, "prompts must be text"),
    (
        "no prompt type",
        lambda llm: llm.generate([[1], 3.5]),
        TypeError,
        r"prompts\[1\] must be text or a list of token ids",
    ),
    ("floats", lambda llm: llm.generate([[1, 2.0]]), TypeError, r"prompts\[0\].*2\.0"),
    ("bytes", lambda llm: llm.generate(b"12345678"), TypeError, "got bytes"),
    ("bytes in a list", lambda llm: llm.generate([b"hello"]), TypeError, r"prompts\[0\] must be text or.*hello"),
    ("mapping", lambda llm: llm.generate([{"prompt_token_ids": {5: 1}}]), TypeError, r"prompts\[0\] must be text or"),
    ("set", lambda llm: llm.generate([{3, 4}]), TypeError, r"prompts\[0\] must be text or a list"),
    ("bools", lambda llm: llm.generate([[1], [True]]), TypeError, r"prompts\[1\] must be text or.*True"),
    ("one number", lambda llm: llm.add_request(5), TypeError, "prompt must be text.*got 5"),
    (
        "64 bits",
        lambda llm: llm.generate([[2**70]]),
        ValueError,
        r"token ids of prompts\[0\] must be in the vocabulary",
    ),
    ("none", lambda llm: llm.generate([None]), TypeError, r"prompts\[0\]"),
    ("empty ids", lambda llm: llm.generate([[1], []]), ValueError, r"prompts\[1\] is empty"),
    ("empty dict", lambda llm: llm.generate([{}]), ValueError, r"prompts\[0\] must have 'prompt'"),
    (
        "other keys",
        lambda llm: llm.generate([{"prompt_token_ids": [1], "multi_modal_data": 1}]),
        ValueError,
        "multi_modal",
    ),
    ("text of ints", lambda llm: llm.generate([{"prompt": [1]}]), TypeError, r"prompts\[0\] must have text"),
    (
        "id too high",
        lambda llm: llm.generate([[1], [2, 128]]),
        ValueError,
        r"token ids of prompts\[1\] must be in \[0, 127\], got 128",
    ),
    (
        "negative id",
        lambda llm: llm.generate([[-1]]),
        ValueError,
        r"token ids of prompts\[0\] must be in \[0, 127\], got -1",
    ),
    (
        "too long",
        lambda llm: llm.generate([[1], [2] * 128]),
        ValueError,
        r"prompts\[1\] has 128 tokens.*max_model_len=128",
    ),
    ("no tokenizer", lambda llm: llm.generate("hello"), ValueError, "has no tokenizer"),
    ("params type", lambda llm: llm.generate([[1]], {"temperature": 1}), TypeError, "sampling_params must be"),
    ("params list type", lambda llm: llm.generate([[1]], [None]), TypeError, r"sampling_params\[0\] must be"),
    ("params count", lambda llm: llm.generate([[1], [2]], [greedy(1)]), ValueError, "1 entries for 2 prompts"),
    (
        "logprobs",
        lambda llm: llm.generate([[1]], greedy(1, logprobs=129)),
        ValueError,
        r"logprobs of prompts\[0\].*129",
    ),
    ("stop id", lambda llm: llm.generate([[1]], greedy(1, stop_token_ids=[128])), ValueError, r"stop_token_ids.*128"),
    ("request", lambda llm: llm.add_request([2] * 500), ValueError, "max_model_len=128"),
]


@pytest.mark.parametrize(("call", "error", "message"), [c[1:] for c in WRONG_CALLS], ids=[c[0] for c in WRONG_CALLS])
def test_wrong_calls_are_refused_before_anything_runs(call, error, message, llm):
    with pytest.raises(error, match=message):
        call(llm)
    assert llm.is_finished()
    assert llm.stats()["prefix_cache_queries"] == 0


def test_no_prompts_give_no_results(llm):
    assert llm.generate([], use_tqdm=False) == []


def test_a_completion_that_reaches_max_model_len_ends_with_length(llm):
    outputs = llm.generate([[2] * 127, [3] * 120], greedy(64), use_tqdm=False)
    assert [(len(o["token_ids"]), o["finish_reason"]) for o in outputs] == [(1, "length"), (8, "length")]


def test_a_length_up_to_what_linear_scaling_makes_is_honoured(tiny_model):
    """Vicuna's config says the length before scaling."""
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", max_position_embeddings=64, rope_parameters=rope)
    assert make_llm(model, max_model_len=250).max_model_len == 250
    assert make_llm(model, max_model_len=1000).max_model_len == 256


def test_max_model_len_is_lowered_to_the_models(tiny_model):
    llm = make_llm(tiny_model(), max_model_len=4096)
    with pytest.raises(ValueError, match="max_model_len=256"):
        llm.generate([[1] * 256])


def test_stop_token_ids_end_a_completion_and_are_its_reason(llm):
    (free,) = llm.generate([PROMPTS[0]], greedy(20), use_tqdm=False)
    token = free["token_ids"][6]
    (stopped,) = llm.generate([PROMPTS[0]], greedy(20, stop_token_ids=[token]), use_tqdm=False)
    first = free["token_ids"].index(token)
    assert stopped["token_ids"] == free["token_ids"][: first + 1]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", token)


def test_ignore_eos_and_min_tokens(tiny_model):
    plain = make_llm(tiny_model())
    (free,) = plain.generate([PROMPTS[0]], greedy(20), use_tqdm=False)
    eos = free["token_ids"][4]
    llm = make_llm(tiny_model(eos_token_id=eos))
    ignoring, waiting, plain_stop = llm.generate(
        [PROMPTS[0]] * 3, [greedy(20, ignore_eos=True), greedy(20, min_tokens=9), greedy(20)], use_tqdm=False
    )
    assert ignoring["token_ids"] == free["token_ids"]
    assert plain_stop["token_ids"] == free["token_ids"][: free["token_ids"].index(eos) + 1]
    assert eos not in waiting["token_ids"][:9]
    assert len(waiting["token_ids"]) > 9


def test_the_stop_token_is_no_part_of_the_text(demo_model):
    llm = LLM(demo_model, use_tqdm=False, max_model_len=64, dtype="float32")
    full, stopped = (
        llm.generate("The capital of France is", greedy(4, stop_token_ids=ids), use_tqdm=False)[0]
        for ids in (None, llm.tokenizer(" Paris")["input_ids"])
    )
    assert full["text"].startswith(" Paris")
    assert stopped["text"] == ""
    assert len(stopped["token_ids"]) == 1


def test_seeds_repeat_and_no_seed_does_not(tiny_model, llm):
    def draw(llm, **more):
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=12, **more), use_tqdm=False)
        return [output["token_ids"] for output in outputs]

    assert draw(llm, seed=5) == draw(llm, seed=5)
    assert draw(llm, seed=5) != draw(llm, seed=6)
    assert draw(llm) != draw(llm)
    assert draw(llm, seed=-1) != draw(llm, seed=-1), "-1 is no seed"
    assert draw(make_llm(tiny_model(), seed=3)) == draw(make_llm(tiny_model(), seed=3))
    assert draw(make_llm(tiny_model(), seed=3)) != draw(make_llm(tiny_model(), seed=4))


@pytest.mark.parametrize("overlapped", [True, False])
def test_add_request_and_step_follow_nano_vllm(overlapped, tiny_model):
    llm = make_llm(tiny_model(), async_scheduling=overlapped)
    expected = [o["token_ids"] for o in llm.generate(PROMPTS, greedy(5), use_tqdm=False)]
    llm = make_llm(tiny_model(), async_scheduling=overlapped)
    ids = [llm.add_request(prompt, greedy(5)) for prompt in PROMPTS]
    results, counts = {}, []
    while not llm.is_finished():
        outputs, num_tokens = llm.step()
        results.update(outputs)
        counts.append(num_tokens)
    assert [results[i] for i in ids] == expected
    cached = 16  # PROMPTS[3] begins like nothing else; PROMPTS[1] neither
    assert counts == [0] * overlapped + [sum(map(len, PROMPTS))] + [-4] * 4, cached
    assert llm.step() == ([], 0)


def test_generate_returns_its_own_requests_only(llm):
    mine = [llm.add_request(prompt, greedy(3)) for prompt in PROMPTS[:2]]
    late = llm.add_request(PROMPTS[2], greedy(60))
    (output,) = llm.generate([PROMPTS[3]], greedy(10), use_tqdm=False)
    assert output.prompt_token_ids == PROMPTS[3]
    assert output.request_id not in (*mine, late)
    assert not llm.is_finished()
    results = {}
    while not llm.is_finished():
        results.update(llm.step()[0])
    assert {i: len(token_ids) for i, token_ids in results.items()} == {mine[0]: 3, mine[1]: 3, late: 60}


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_an_aborted_request_frees_what_it_holds_and_is_not_returned(turns, llm):
    ids = [llm.add_request(prompt, greedy(20)) for prompt in PROMPTS]
    for _ in range(turns):
        assert llm.step()[0] == []
    llm.abort(ids[1])
    llm.abort(ids[1])
    llm.abort(12345)
    results = {}
    while not llm.is_finished():
        results.update(llm.step()[0])
    assert sorted(results) == [ids[0], ids[2], ids[3]]
    assert_nothing_leaks(llm)
    alone = llm.generate([PROMPTS[0]], greedy(20), use_tqdm=False)[0]
    assert results[ids[0]] == alone["token_ids"]


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("owner", "name"), [(ModelRunner, "forward"), (ModelRunner, "sample"), (StepInFlight, "wait")])
@pytest.mark.parametrize("call", [1, 2, 6])
def test_an_exception_keeps_what_is_finished_and_the_llm_usable(call, owner, name, error, llm, monkeypatch):
    params = [greedy(30), greedy(3), greedy(30), greedy(2)]
    expected = [o["token_ids"] for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    other = llm.add_request([8, 8], greedy(9))
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call, error)
        with pytest.raises(type(error)) as caught:
            llm.generate(PROMPTS, params, use_tqdm=False)
    outputs = caught.value.outputs
    finished = [1, 3] if call == 6 else []
    assert [i for i, output in enumerate(outputs) if output is not None] == finished
    assert all(outputs[i]["token_ids"] == expected[i] for i in finished)
    assert not llm.is_finished()
    with pytest.raises(RuntimeError, match=rf"an error in another call has dropped the requests \[{other}\]"):
        llm.step()
    assert_nothing_leaks(llm)
    again = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o["token_ids"] for o in again] == expected


def test_ctrl_c_while_tokens_come_in_loses_no_finished_result(llm, monkeypatch):
    ids = [llm.add_request(prompt, greedy(2)) for prompt in PROMPTS[:2]]
    fail_at(monkeypatch, Sequence, "append", 4, KeyboardInterrupt())  # when the first has its two tokens
    assert [llm.step()[0], llm.step()[0]] == [[], []]
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    (result,), _ = llm.step()
    assert result[0] == ids[0]
    assert llm.is_finished()
    assert_nothing_leaks(llm)


def test_a_request_that_a_processor_aborts_is_what_it_is_by_then(llm):
    """One of its samples has finished in the same step."""

    def abort(token_ids, logits):
        running = [seq for seq in llm.engine.scheduler.running if seq.params.n == 2]
        if len(running) == 1:
            llm.abort(running[0].request_id)
        return logits

    several = SamplingParams(max_tokens=40, n=2, seed=3, stop_token_ids=list(range(0, 128, 6)))
    aborting = greedy(40, logits_processors=[abort])
    outputs = llm.generate([[1, 2], [3]], [several, aborting], use_tqdm=False)
    assert [[c.finish_reason for c in output.outputs] for output in outputs] == [["stop", "abort"], ["length"]]
    assert 0 < len(outputs[0].outputs[1].token_ids) < 40
    assert_nothing_leaks(llm)


@pytest.mark.parametrize(("owner", "name"), [(BlockManager, "share"), (BlockManager, "release")])
def test_ctrl_c_while_a_sequence_changes_places_is_told_to_those_who_wait(owner, name, tiny_model, monkeypatch):
    """It is between waiting and running, or back: admitted late, and preempted."""
    llm = make_llm(tiny_model(), max_num_seqs=5, kvcache_block_size=4, num_kvcache_blocks=34)
    increments = llm.stream([[i] * 6 for i in range(4)], greedy(60))
    next(increments)
    other = llm.add_request([9] * 6, greedy(60))
    fail_at(monkeypatch, owner, name, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[7] * 6], greedy(60), use_tqdm=False)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="this stream's requests"):
        list(increments)
    with pytest.raises(RuntimeError, match=rf"dropped the requests \[{other}\]"):
        llm.step()
    assert_nothing_leaks(llm)


def test_ctrl_c_while_a_result_is_put_away_gives_it_once(llm, monkeypatch):
    request_id = llm.add_request([1], greedy(2))
    fail_at(monkeypatch, Scheduler, "_leave_row", 1, KeyboardInterrupt())
    llm.step()
    llm.step()
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    assert [found for found, _ in llm.step()[0]] == [request_id]
    assert_nothing_leaks(llm)


def test_a_stream_says_that_a_request_was_aborted(llm):
    increments = llm.stream([[1], [2]], greedy(9))
    assert next(increments).prompt_index == 0
    llm.abort(llm.engine.scheduler.running[0].request_id)
    reasons = [(new.prompt_index, new.finish_reason) for new in increments if new.finish_reason]
    assert sorted(reasons) == [(0, "abort"), (1, "length")]
    assert_nothing_leaks(llm)


def test_an_error_of_step_itself_is_told_once(llm):
    def refuse(token_ids, logits):
        raise ZeroDivisionError

    llm.add_request([1], greedy(9))
    llm.add_request([2], greedy(9, logits_processors=[refuse]))
    with pytest.raises(ZeroDivisionError):
        llm.step()  # where the first step is sampled
    assert llm.is_finished()
    kept = llm.add_request([1], greedy(2))
    results = {}
    while not llm.is_finished():
        results.update(llm.step()[0])
    assert list(results) == [kept]


def test_a_processor_is_not_called_after_the_end(llm):
    """The next step is launched before the token that ends a sequence is read."""
    stop_token_ids, seen = list(range(0, 128, 6)), []

    def processor(token_ids, logits):
        seen.append(list(token_ids))
        return logits

    params = SamplingParams(max_tokens=60, seed=3, stop_token_ids=stop_token_ids, logits_processors=[processor])
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert {output["finish_reason"] for output in outputs} == {"stop"}
    assert len(seen) == sum(len(output["token_ids"]) for output in outputs)
    assert not any(set(token_ids) & set(stop_token_ids) for token_ids in seen)


def test_the_highest_temperature_draws_only_what_is_kept(llm):
    hot = SamplingParams(temperature=1e30, max_tokens=20, top_k=1, ignore_eos=True)
    expected = llm.generate(PROMPTS, greedy(20), use_tqdm=False)
    outputs = llm.generate(PROMPTS, hot, use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in expected]


def test_a_tokenizer_that_is_not_there_is_refused_before_the_model_is_loaded(tiny_model, monkeypatch):
    monkeypatch.setattr("nanovllm.llm.LLMEngine", lambda *_: pytest.fail("loaded first"))
    with pytest.raises(ValueError, match=r"^tokenizer 'nowhere' is neither a folder nor a Hub id"):
        make_llm(tiny_model(), tokenizer="nowhere")


def test_ctrl_c_between_steps_drops_the_calls_requests(llm, monkeypatch):
    fail_at(monkeypatch, LLM, "_show", 3, KeyboardInterrupt())
    other = llm.add_request([8, 8], greedy(9))
    with pytest.raises(KeyboardInterrupt) as caught:
        llm.generate(PROMPTS, greedy(30))
    assert caught.value.outputs == [None] * 4
    results = {}
    while not llm.is_finished():
        results.update(llm.step()[0])
    assert list(results) == [other]
    assert_nothing_leaks(llm)


INTERRUPTED_SCRIPT = """
import signal, sys, threading, time
from nanovllm import LLM, SamplingParams

llm = LLM(sys.argv[1], max_model_len=250, device="cpu", use_tqdm=False)
params = [SamplingParams(temperature=0, max_tokens=n) for n in (3, 200)]
expected = llm.generate([[1], [2]], params, use_tqdm=False)
for _ in range(3):
    waiter = threading.Thread(target=lambda: (started.wait(), signal.raise_signal(signal.SIGINT)))
    started = threading.Event()
    waiter.start()
    step = llm.engine.step
    def counting_step(turns=[0]):
        turns[0] += 1
        if turns[0] == 20:
            started.set()
        return step()
    llm.engine.step = counting_step
    try:
        while True:
            llm.generate([[1], [2]], params, use_tqdm=False)
    except KeyboardInterrupt as interrupt:
        assert len(interrupt.outputs) == 2
    finally:
        llm.engine.step = step
        waiter.join()
    again = llm.generate([[1], [2]], params, use_tqdm=False)
    assert [o["token_ids"] for o in again] == [o["token_ids"] for o in expected]
    assert llm.stats()["num_blocks_in_use"] == 0
print("usable after three interrupts")
"""


def test_a_real_interrupt_leaves_the_llm_usable(tiny_model):
    """SIGINT arrives between any two bytecodes, not only where a test raises it."""
    command = [sys.executable, "-c", INTERRUPTED_SCRIPT, str(tiny_model())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "usable after three interrupts\n", result.stderr


def test_if_the_device_cannot_be_synchronised_the_llm_is_closed(llm, monkeypatch):
    fail_at(monkeypatch, ModelRunner, "forward", 1, RuntimeError("illegal memory access"))
    fail_at(monkeypatch, ModelRunner, "synchronize", 1, RuntimeError("illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        llm.generate(PROMPTS, use_tqdm=False)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate(PROMPTS, use_tqdm=False)


def test_progress_goes_to_stderr_and_can_be_turned_off(tiny_model, capfd):
    folder = tiny_model()  # transformers may show progress of its own
    capfd.readouterr()
    llm = make_llm(folder, use_tqdm=False)
    llm.generate(PROMPTS, greedy(4), use_tqdm=False)
    assert capfd.readouterr() == ("", "")
    llm = make_llm(folder, use_tqdm=True)
    llm.generate(PROMPTS, greedy(4))
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in ("Loading weights", "Generating", "4/4", "prefill=", "decode=", "tok/s"))


def test_the_log_says_how_memory_is_split(tiny_model, caplog):
    with caplog.at_level(logging.INFO, "nanovllm"):
        make_llm(tiny_model(), num_kvcache_blocks=77)
    assert "weights" in caplog.text
    assert "KV pool" in caplog.text
    assert "77 blocks of 16 tokens" in caplog.text


def test_stats_count_pool_use_hits_and_preemptions(llm):
    stats = llm.stats()
    assert (stats["num_kvcache_blocks"], stats["num_blocks_in_use"], stats["kv_cache_usage"]) == (399, 0, 0.0)
    llm.add_request([7] * 40, greedy(5))
    llm.step()
    stats = llm.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["num_blocks_in_use"]) == (1, 0, 3)
    llm.generate([[7] * 40], greedy(1), use_tqdm=False)
    assert (llm.stats()["prefix_cache_queries"], llm.stats()["prefix_cache_hits"]) == (80, 32)


def test_closing_frees_the_runner_and_refuses_more_work(tiny_model):
    with make_llm(tiny_model()) as llm:
        llm.generate(PROMPTS, greedy(2), use_tqdm=False)
        runner = weakref.ref(llm.engine.runner)
        assert runner() is not None
    assert runner() is None
    llm.close()
    for call in (lambda: llm.generate(PROMPTS, use_tqdm=False), lambda: llm.add_request([1]), llm.step):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_deleting_an_llm_frees_it_at_once(tiny_model):
    llm = make_llm(tiny_model())
    llm.generate(PROMPTS, greedy(2), use_tqdm=False)
    runner = weakref.ref(llm.engine.runner)
    gc.disable()
    try:
        del llm
        assert runner() is None, "no cycle keeps the weights until the next collection"
    finally:
        gc.enable()
    make_llm(tiny_model()).generate(PROMPTS, greedy(2), use_tqdm=False)


def test_several_llms_work_side_by_side(tiny_model):
    first, second = make_llm(tiny_model("qwen3")), make_llm(tiny_model("llama"), kvcache_block_size=4)
    expected = [llm.generate([PROMPTS[1]], greedy(9), use_tqdm=False)[0]["token_ids"] for llm in (first, second)]
    ids = [llm.add_request(PROMPTS[1], greedy(9)) for llm in (first, second)]
    results = [{}, {}]
    while not (first.is_finished() and second.is_finished()):
        for llm, result in zip((first, second), results):
            result.update(llm.step()[0])
    assert [result[i] for result, i in zip(results, ids)] == expected


@pytest.mark.parametrize("max_num_seqs", [1, 2, 7, 13, 100])
def test_any_max_num_seqs_works(max_num_seqs, tiny_model):
    outputs = make_llm(tiny_model(), max_num_seqs=max_num_seqs).generate(
        [[i] for i in range(30)], greedy(3), use_tqdm=False
    )
    assert len(outputs) == 30


def test_a_pool_too_small_for_one_sequence_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"8 blocks of 16 tokens.*max_model_len=128.*takes 9"):
        make_llm(tiny_model(), num_kvcache_blocks=8)
    llm = make_llm(tiny_model(), num_kvcache_blocks=9)
    assert len(llm.generate([[1]], greedy(127), use_tqdm=False)[0]["token_ids"]) == 127


def test_the_cpu_pool_takes_what_is_needed_or_a_quarter_of_the_memory(tiny_model, monkeypatch):
    llm = make_llm(tiny_model(), num_kvcache_blocks=-1, max_num_seqs=10)
    assert llm.engine.runner.num_blocks == 10 * 128 // 16 + 1
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, head size, float32
    monkeypatch.setattr(startup, "available_host_memory", lambda: 4 * 50 * block_bytes)
    assert make_llm(tiny_model(), num_kvcache_blocks=-1, max_num_seqs=10).engine.runner.num_blocks == 50


def test_a_tokenizer_may_be_elsewhere(tiny_model, demo_model):
    llm = LLM(tiny_model(vocab_size=49152), tokenizer=demo_model, max_model_len=64, use_tqdm=False)
    (output,) = llm.generate("Hello there", greedy(4), use_tqdm=False)
    assert output.prompt_token_ids == llm.tokenizer("Hello there")["input_ids"]
    assert output["text"]


# --- requests that touch nobody else ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing_model(tiny_model, tmp_path_factory):
    """A model in float16 that makes NaNs of token 5."""
    folder = shutil.copytree(tiny_model(), tmp_path_factory.mktemp("overflowing") / "model")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"][5] *= 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("options", [{}, {"attention_backend": "reference"}, {"kvcache_block_size": 64}], ids=str)
def test_a_request_of_nans_changes_no_other(options, overflowing_model, device, caplog):
    llm = make_llm(overflowing_model, dtype="float16", device=device, enable_prefix_caching=False, **options)
    healthy = [[(7 * i + j) % 100 + 6 for j in range(3 + 5 * i % 90)] for i in range(20)]
    expected = [output["token_ids"] for output in llm.generate(healthy, greedy(12), use_tqdm=False)]
    mixed = llm.generate([[5] * 66, *healthy], greedy(12), use_tqdm=False)
    after = llm.generate(healthy, greedy(12), use_tqdm=False)
    assert [output["token_ids"] for output in mixed[1:]] == expected
    assert [output["token_ids"] for output in after] == expected
    assert (mixed[0]["finish_reason"], len(mixed[0]["token_ids"])) == ("abort", 1)
    assert caplog.text.count(f"requests [{mixed[0].request_id}] are aborted: no token can be drawn") == 1


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_where_no_token_can_be_drawn_the_request_is_aborted(bad, tiny_model, device, caplog):
    """By a processor that bans every token, after three of them. An allowed one takes the place of the one not drawn."""
    llm = make_llm(tiny_model(), device=device)

    def give_up(token_ids, logits):
        return logits if len(token_ids) < 3 else logits.fill_(bad)

    stuck = {"max_tokens": 9, "logits_processors": [give_up], "logprobs": 2}
    params = [
        SamplingParams(temperature=0, allowed_token_ids=[70, 71], **stuck),
        SamplingParams(n=2, top_p=0.5, min_tokens=9, stop_token_ids=[0, 1], **stuck),
        greedy(9),
    ]
    outputs = llm.generate(PROMPTS[:3], params, use_tqdm=False)
    samples = [sample for output in outputs for sample in output.outputs]
    assert [sample.finish_reason for sample in samples] == ["abort"] * 3 + ["length"]
    for sample in samples[:3]:
        assert "no token can be drawn" in sample.stop_reason
        assert len(sample.token_ids) == len(sample.logprobs) == 4
        assert math.isnan(sample.logprobs[3][sample.token_ids[3]].logprob)
    assert samples[0].token_ids[3] == 70
    assert samples[1].token_ids[3] == samples[2].token_ids[3] == 2
    assert samples[3].token_ids == llm.generate([PROMPTS[2]], greedy(9), use_tqdm=False)[0]["token_ids"]
    assert caplog.text.count("are aborted") == 1
    assert_nothing_leaks(llm)


def test_what_stands_for_a_token_not_drawn_is_never_cached(tiny_model):
    """The next step has read another token in its place, and may have computed its KV."""
    prompt = [7, 8, 9, 10, 11, 12, 13]
    params = SamplingParams(
        temperature=0, max_tokens=5, allowed_token_ids=[55, 60], logits_processors=[lambda token_ids, x: x * math.nan]
    )
    llm, other = (make_llm(tiny_model(), kvcache_block_size=4) for _ in range(2))
    assert llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"] == [55]
    again = [[*prompt, 55, 3]]
    for results in zip(*(model.generate(again, greedy(5), use_tqdm=False) for model in (llm, other))):
        assert results[0]["token_ids"] == results[1]["token_ids"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callers_autocast_changes_nothing(dtype, tiny_model, device):
    llm = make_llm(tiny_model(), device=device)
    params = SamplingParams(max_tokens=9, seed=1, logprobs=3)

    def logprobs(llm):
        return [output["logprobs"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]

    expected = logprobs(llm)
    with torch.autocast(device, dtype=dtype):
        assert logprobs(llm) == expected
        assert logprobs(make_llm(tiny_model(), device=device)) == expected
        assert torch.is_autocast_enabled(device)


def test_nobody_reads_the_progress_bar(tiny_model):
    """python script.py 2>&1 | head"""
    script = f"""
import os, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 2)
from nanovllm import LLM, SamplingParams
llm = LLM({str(tiny_model())!r}, device="cpu", max_model_len=64, num_kvcache_blocks=50)
outputs = llm.generate([[1, 2], [3]] * 20, SamplingParams(max_tokens=9, ignore_eos=True))
print(sum(len(output["token_ids"]) for output in outputs))
"""
    process = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.strip() == str(40 * 9)


@pytest.mark.slow
def test_memory_on_a_cpu_is_level_after_a_while(tiny_model):
    """oneDNN keeps a kernel for every number of rows."""
    script = f"""
import os, psutil, random
from nanovllm import LLM, SamplingParams
llm = LLM({str(tiny_model())!r}, device="cpu", max_model_len=256, max_num_seqs=64, num_kvcache_blocks=2000, use_tqdm=False)
draw = random.Random(0)
for i in range(150):
    prompts = [[draw.randrange(128)] * draw.randint(1, 150) for _ in range(draw.randint(1, 40))]
    params = [SamplingParams(max_tokens=draw.randint(1, 20), ignore_eos=True) for _ in prompts]
    llm.generate(prompts, params, use_tqdm=False)
    if i in (69, 149):
        print(psutil.Process().memory_info().rss)
"""
    process = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    after_70, after_150 = map(int, process.stdout.split())
    assert after_150 - after_70 < 30 * 2**20
