"""What fails, Ctrl-C too, loses nothing finished, leaks nothing, is told to all who wait, and leaves the LLM usable."""

import math
import shutil

import pytest
from helpers import (
    FEW,
    IN_RUNNER,
    assert_nothing_leaks,
    drain,
    fail_at,
    greedy,
    make_llm,
    num_unfinished,
    run_script,
    tokens,
)
from safetensors.torch import load_file, save_file

import nanovllm.llm
from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence


def assert_all_are_told(llm, increments, ids):
    """An open stream, and who added requests: once, and nothing is left."""
    assert not llm.is_finished()
    with pytest.raises(RuntimeError, match="an error in another call has dropped this stream's requests"):
        list(increments)
    with pytest.raises(RuntimeError, match=rf"an error in another call has dropped the requests \[{ids}\]"):
        llm.step()
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("stage", ["forward", "sample", "wait"])
@pytest.mark.parametrize("call", [1, 2, 6])
def test_an_exception_keeps_what_is_finished_and_is_told_to_all(call, stage, error, llm, monkeypatch):
    params = [greedy(30), greedy(3), greedy(30), greedy(2)]
    expected = tokens(llm, FEW, params)
    increments = llm.stream([[1], [2, 3]], greedy(30))
    next(increments)
    others = [llm.add_request([8, 8], greedy(30)) for _ in range(2)]
    with monkeypatch.context() as patch:
        fail_at(patch, *IN_RUNNER[stage], call, error)
        with pytest.raises(type(error)) as caught:
            llm.generate(FEW, params)
    found = [output and output["token_ids"] for output in caught.value.outputs]
    assert found == ([None, expected[1], None, expected[3]] if call == 6 else [None] * 4)
    assert_all_are_told(llm, increments, f"{others[0]}, {others[1]}")
    assert tokens(llm, FEW, params) == expected


@pytest.mark.parametrize("method", ["share", "release"])
def test_ctrl_c_while_a_sequence_changes_places_is_told_to_all(method, tiny_model, monkeypatch):
    """It is between waiting and running, or back: admitted late, and preempted."""
    llm = make_llm(tiny_model(), max_num_seqs=5, kvcache_block_size=4, num_kvcache_blocks=34)
    increments = llm.stream([[i] * 6 for i in range(4)], greedy(60))
    next(increments)
    other = llm.add_request([9] * 6, greedy(60))
    with monkeypatch.context() as patch:
        fail_at(patch, BlockManager, method, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[7] * 6], greedy(60))
    assert_all_are_told(llm, increments, other)


@pytest.mark.parametrize(("owner", "name", "call"), [(Sequence, "append", 4), (Scheduler, "_leave_row", 1)])
def test_ctrl_c_while_a_step_takes_its_tokens_loses_no_finished_result(owner, name, call, llm, monkeypatch):
    """The first of two requests has all of its tokens, or is just put away. Its result is given once."""
    ids = [llm.add_request(prompt, greedy(2)) for prompt in FEW[:2]]
    fail_at(monkeypatch, owner, name, call, KeyboardInterrupt())
    assert [llm.step()[0], llm.step()[0]] == [[], []]
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    assert [request_id for request_id, _ in llm.step()[0]] == ids[:1]
    assert_nothing_leaks(llm)


@pytest.mark.parametrize(
    ("owner", "name"), [(Scheduler, "_put_away"), (Scheduler, "_leave_row"), (BlockManager, "release")]
)
def test_ctrl_c_within_an_abort_drops_all_requests(owner, name, llm, monkeypatch):
    """A stream is left, and a processor aborts its own request."""
    increments = llm.stream([[1], [2]], greedy(9))
    next(increments)
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            increments.close()
    assert llm.is_finished()
    assert_nothing_leaks(llm)

    def abort(token_ids, logits):
        llm.abort(max(llm.engine.scheduler.requests))
        return logits

    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.generate([[1], [2]], greedy(9, logits_processors=[abort]))
    assert [output and output["finish_reason"] for output in caught.value.outputs] == [None, "abort"]
    assert llm.is_finished()
    assert_nothing_leaks(llm)


@pytest.mark.parametrize(
    ("owner", "name", "call", "finished"),
    [(LLM, "stats", 2, 0), (LLM, "stats", 3, 2), (nanovllm.llm, "RequestOutput", 2, 2)],
)
def test_ctrl_c_between_steps_drops_the_calls_requests_alone(owner, name, call, finished, llm, monkeypatch):
    """While the bar is drawn or a result is made; what was finished is kept."""
    other = llm.add_request([8, 8], greedy(9))
    fail_at(monkeypatch, owner, name, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        llm.generate([[1], [2], [3]], [greedy(2), greedy(2), greedy(30)])
    assert [output is not None for output in caught.value.outputs] == [True] * finished + [False] * (3 - finished)
    assert num_unfinished(llm) == 1
    assert [request_id for request_id, _ in drain(llm)] == [other]


INTERRUPTED = """
import signal, sys, threading
from nanovllm import LLM, SamplingParams

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
llm = LLM(sys.argv[1], max_model_len=250, device="cpu", use_tqdm=False)
started = threading.Event()

def tell(token_ids, logits):
    if len(token_ids) == 20:
        started.set()
    return logits

params = [SamplingParams(temperature=0, max_tokens=n, logits_processors=[tell]) for n in (3, 200)]
def generate():
    return llm.generate([[1], [2]], params, use_tqdm=False)

expected = generate()
for _ in range(3):
    started.clear()
    waiter = threading.Thread(target=lambda: (started.wait(), signal.raise_signal(signal.SIGINT)))
    waiter.start()
    try:
        while True:
            generate()
    except KeyboardInterrupt as interrupt:
        assert len(interrupt.outputs) == 2
    finally:
        waiter.join()
    assert [o["token_ids"] for o in generate()] == [o["token_ids"] for o in expected]
    assert llm.stats()["num_blocks_in_use"] == 0
print("usable after three interrupts")
"""


def test_a_real_interrupt_leaves_the_llm_usable(tiny_model):
    """SIGINT arrives between any two bytecodes, not only where a test raises it."""
    assert run_script(INTERRUPTED, tiny_model()) == "usable after three interrupts\n"


def test_an_error_of_step_itself_is_told_once(llm):
    def refuse(token_ids, logits):
        raise ZeroDivisionError

    llm.add_request([1], greedy(9))
    llm.add_request([2], greedy(9, logits_processors=[refuse]))
    with pytest.raises(ZeroDivisionError):
        llm.step()  # where the first step is sampled
    assert llm.is_finished()
    kept = llm.add_request([1], greedy(2))
    assert [request_id for request_id, _ in drain(llm)] == [kept]


def test_a_request_with_a_completion_missing_is_not_finished(llm):
    def fail_late(token_ids, logits):
        if len(token_ids) == 8 and len(llm.engine.scheduler.running) == 1:
            raise RuntimeError("no more")
        return logits

    params = [
        SamplingParams(n=2, max_tokens=4, seed=1),
        SamplingParams(n=2, max_tokens=20, seed=1, stop_token_ids=range(0, 128, 9), logits_processors=[fail_late]),
    ]
    with pytest.raises(RuntimeError, match="no more") as caught:
        llm.generate(FEW[:2], params)
    done, lost = caught.value.outputs
    assert (len(done.outputs), lost) == (2, None)
    assert_nothing_leaks(llm)
    assert len(llm.generate(FEW[:1], params[:1])[0].outputs) == 2


def test_a_processor_cannot_run_the_engine(llm):
    def nested(token_ids, logits):
        llm.generate([[1]], greedy(2))
        return logits

    with pytest.raises(RuntimeError, match="a logits processor cannot run the engine"):
        llm.generate([[1]], greedy(4, logits_processors=[nested]))
    assert_nothing_leaks(llm)
    assert len(tokens(llm, [[1]], greedy(4))[0]) == 4


def test_if_the_device_cannot_be_synchronised_the_llm_is_closed(llm, monkeypatch):
    for stage in "forward", "synchronize":
        fail_at(monkeypatch, *IN_RUNNER[stage], 1, RuntimeError("illegal memory access"))
    for message in "illegal", "closed":
        with pytest.raises(RuntimeError, match=message):
            llm.generate(FEW)


# --- requests without a token to draw --------------------------------------------------------------------------------


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
    expected = tokens(llm, healthy, greedy(12))
    mixed = llm.generate([[5] * 66, *healthy], greedy(12))
    assert [output["token_ids"] for output in mixed[1:]] == expected
    assert tokens(llm, healthy, greedy(12)) == expected
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
    samples = [sample for output in llm.generate(FEW[:3], params) for sample in output.outputs]
    assert [sample.finish_reason for sample in samples] == ["abort"] * 3 + ["length"]
    for sample, stand_in in zip(samples[:3], (70, 2, 2)):
        assert "no token can be drawn" in sample.stop_reason
        assert len(sample.token_ids) == len(sample.logprobs) == 4
        assert sample.token_ids[3] == stand_in
        assert math.isnan(sample.logprobs[3][stand_in].logprob)
    assert [samples[3].token_ids] == tokens(llm, [FEW[2]], greedy(9))
    assert caplog.text.count("are aborted") == 1
    assert_nothing_leaks(llm)


def test_what_stands_for_a_token_not_drawn_is_never_cached(tiny_model):
    """The next step has read another token in its place, and may have computed its KV."""
    prompt = [7, 8, 9, 10, 11, 12, 13]
    params = greedy(5, allowed_token_ids=[55, 60], logits_processors=[lambda token_ids, logits: logits * math.nan])
    llm, other = (make_llm(tiny_model(), kvcache_block_size=4) for _ in range(2))
    assert tokens(llm, [prompt], params) == [[55]]
    again = [[*prompt, 55, 3]]
    assert tokens(llm, again, greedy(5)) == tokens(other, again, greedy(5))
