"""In float32 every way to schedule the same requests gives the same tokens, greedy and sampled, and leaks nothing."""

from functools import partial

import pytest
from helpers import (
    EXTRAS,
    IN_RUNNER,
    PARAMS,
    PROMPTS,
    SHARED,
    assert_nothing_leaks,
    completions,
    fail_at,
    make_llm,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine import llm_engine
from nanovllm.engine.cuda_graphs import DecodeGraphs, graph_sizes

SMALL_POOL = {"kvcache_block_size": 4, "num_kvcache_blocks": 34}
MODES = {
    "synchronous": {"async_scheduling": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "chunks of 1": {"max_num_batched_tokens": 1},
    "chunks of 3": {"max_num_batched_tokens": 3},
    "chunks of 17, synchronous": {"max_num_batched_tokens": 17, "async_scheduling": False},
    "eager": {"enforce_eager": True},
    "reference attention": {"attention_backend": "reference"},
    "reference attention, eager": {"attention_backend": "reference", "enforce_eager": True},
    "one sequence at a time": {"max_num_seqs": 1},
    "three sequences at a time": {"max_num_seqs": 3},
    "blocks of 1": {"kvcache_block_size": 1},
    "blocks of 5": {"kvcache_block_size": 5},
    "blocks of 256": {"kvcache_block_size": 256},
    "a pool that preempts": SMALL_POOL,
    "a pool that preempts, no prefix cache": SMALL_POOL | {"enable_prefix_caching": False},
    "a pool that preempts, synchronous, chunks": SMALL_POOL | {"async_scheduling": False, "max_num_batched_tokens": 13},
}


@pytest.fixture(scope="module")
def expected(tiny_model, device):
    """Each request alone, in one piece, synchronously, in a fresh cache."""
    llm = make_llm(tiny_model(), device=device, async_scheduling=False, enable_prefix_caching=False)
    return [run(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, PARAMS)]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_tokens(mode, tiny_model, expected, device):
    llm = make_llm(tiny_model(), device=device, **MODES[mode])
    assert run(llm) == expected
    assert run(llm) == expected, "with what the first run left in the prefix cache"
    if "preempts" in mode:
        assert llm.stats()["num_preemptions"] > 0


@pytest.fixture
def triton_llm(device):
    """Makes an LLM whose kernels run in Triton's interpreter: the backend of GPUs where there is none."""
    pytest.importorskip("triton", reason="needs triton")
    if device != "cpu":
        pytest.skip("without a GPU")
    return partial(make_llm, attention_backend="triton")


def run_some(llm, chosen):
    return run(llm, [PROMPTS[i] for i in chosen], [PARAMS[i] for i in chosen])


def test_triton_in_the_interpreter_gives_the_same_tokens(tiny_model, expected, triton_llm):
    llm = triton_llm(tiny_model(), max_num_batched_tokens=25)
    assert run_some(llm, [1, 6, 11]) == [expected[i] for i in (1, 6, 11)]


def test_the_numbers_of_the_largest_step_fit(tiny_model, triton_llm, monkeypatch):
    """One head's group fills a tile with one token, and each token's log-probability is a read of its own."""
    monkeypatch.setattr(llm_engine, "CPU_STEP_TOKENS", 10**6)
    folder = tiny_model(num_attention_heads=64, num_key_value_heads=1, max_position_embeddings=33000)
    sizes = {"max_num_batched_tokens": 32000, "max_model_len": 32010, "max_num_seqs": 1, "num_kvcache_blocks": 600}
    llm = triton_llm(folder, kvcache_block_size=64, **sizes)
    fail_at(monkeypatch, *IN_RUNNER["_compute"], 1, NotImplementedError("the step has been sent"))
    with pytest.raises(NotImplementedError, match="has been sent"):
        llm.generate([[1] * 32000], SamplingParams(max_tokens=1, prompt_logprobs=0))


class RepeatedSteps(DecodeGraphs):
    """Stands in for CUDA graphs: what a graph would have recorded is run again, on what has arrived meanwhile."""

    def capture(self, size, decode):
        self.graphs[size] = decode
        self.sizes.insert(0, size)

    def replay(self, size):
        return self.graphs[size]()

    def close(self):
        pass


def test_padded_steps_find_their_numbers_where_graphs_look_for_them(tiny_model, expected, triton_llm):
    """Decode rows are padded to the graphs' sizes, chunks to a multiple of 8; here without a GPU."""
    llm = triton_llm(tiny_model(), max_num_batched_tokens=25, max_num_seqs=20)
    runner = llm.engine.runner
    runner.graphs, runner.model.is_compiled = RepeatedSteps(), True
    for size in reversed(graph_sizes(1, 20)):
        runner.graphs.capture(size, runner.upload_trash_decode(size))
    assert run_some(llm, [0, 1, 4, 8, 10]) == [expected[i] for i in (0, 1, 4, 8, 10)]


def test_identical_prompts_in_one_step_share_their_blocks(tiny_model, expected, device):
    llm = make_llm(tiny_model(), device=device, kvcache_block_size=16)
    outputs = llm.generate([PROMPTS[11]] * 4, PARAMS[11])
    assert [o["token_ids"] for o in outputs] == [expected[11][0]] * 4
    assert [o.num_cached_tokens for o in outputs] == [0, 48, 48, 48]  # of 62, in blocks of 16


POOL = {"num_kvcache_blocks": 36, "max_model_len": 96}


@pytest.mark.parametrize("pool", [{}, POOL], ids=["", "a pool that preempts"])
def test_rows_that_share_prefixes_read_them_once(pool, tiny_model, device):
    """Two levels of prefixes, samples of one prompt, and prompts that share nothing: the tokens are those of each alone."""
    pytest.importorskip("triton", reason="needs triton")
    if pool and device == "cpu":
        pytest.skip("takes long where kernels are interpreted")
    prompts = [SHARED + SHARED[i % 2 : 32] + [i] * (1 + i) for i in range(4)] + [[7] * 30, PROMPTS[2]]
    params = [
        SamplingParams(max_tokens=(5 if pool else 3) + i % 3, seed=i, ignore_eos=True, n=1 + 2 * (i == 0))
        for i in range(6)
    ]
    llm = make_llm(tiny_model(), device=device, attention_backend="triton", kvcache_block_size=4, **pool)
    alone = make_llm(tiny_model(), device=device, enable_prefix_caching=False)
    expected = [completions(alone, [prompt], [p])[0] for prompt, p in zip(prompts, params)]
    assert completions(llm, prompts, params) == expected
    assert_nothing_leaks(llm)
    stats = llm.stats()
    assert stats["kv_tokens_read"] < 0.7 * stats["kv_tokens_attended"]
    assert (stats["num_preemptions"] > 0) == bool(pool)


requests = st.tuples(
    st.integers(0, 40),  # shared tokens
    st.integers(1, 12),  # own tokens
    st.integers(1, 20),  # max_tokens
    st.integers(0, 3),  # seed
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([None, [3], list(range(0, 128, 9))]),  # stop_token_ids
    st.integers(0, 5),  # min_tokens
    st.sampled_from(EXTRAS[:6] + EXTRAS[7:]),
)


@settings(max_examples=40, deadline=None)
@given(
    workload=st.lists(requests, min_size=1, max_size=10),
    rows=st.integers(1, 6),
    budget=st.integers(1, 40),
    spare_blocks=st.integers(0, 12),
    overlapped=st.booleans(),
    caching=st.booleans(),
)
def test_random_workloads_give_the_tokens_of_each_request_alone(
    tiny_model, oracle, device, workload, rows, budget, spare_blocks, overlapped, caching
):
    """Shared prefixes, stops, chunks, tiny pools, few rows: same tokens, no leaked block or row."""
    prompts = [SHARED[:shared] + [(7 * i + own) % 128 for i in range(own)] for shared, own, *_ in workload]
    params = [
        SamplingParams(temperature=t, max_tokens=max(n, m), seed=s, stop_token_ids=stops, min_tokens=m, **extras)
        for _, _, n, s, t, stops, m, extras in workload
    ]
    sizes = {"max_model_len": 80, "kvcache_block_size": 4, "num_kvcache_blocks": 21 + spare_blocks}
    sizes |= {"max_num_seqs": rows, "max_num_batched_tokens": budget}
    modes = {"async_scheduling": overlapped, "enable_prefix_caching": caching}
    llm = make_llm(tiny_model(), device=device, **sizes, **modes)
    outputs = run(llm, prompts, params)
    assert outputs == [run(oracle, [prompt], [p])[0] for prompt, p in zip(prompts, params)]
    for (token_ids, reason), p in zip(outputs, params):
        stopped = p.stop_token_ids is not None and token_ids[-1] in p.stop_token_ids
        assert reason == ("stop" if stopped else "length")
        assert len(token_ids) == p.max_tokens or (stopped and len(token_ids) > p.min_tokens)


@pytest.fixture(scope="module")
def oracle(tiny_model, device):
    return make_llm(tiny_model(), device=device, max_model_len=80, async_scheduling=False, enable_prefix_caching=False)
