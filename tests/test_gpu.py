"""What only a GPU can show: memory shares, launches that never wait, and the CPU's tokens."""

import math
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import PARAMS, PROMPTS, assert_nothing_leaks, completions, greedy, make_llm, run
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.startup import run_largest_steps

pytestmark = pytest.mark.gpu
GIB = 2**30
HOLD_4_GIB = (
    "import torch; x = torch.empty(2**32, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"
)


def free_memory():
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def gpu_llm(folder, **options):
    return make_llm(folder, **({"device": "cuda", "num_kvcache_blocks": -1, "gpu_memory_utilization": 0.1} | options))


def pool_bytes(llm):
    return sum(cache.k.nbytes + cache.v.nbytes for cache in llm.engine.runner.kv_cache)


def test_the_tokens_are_the_cpus(tiny_model):
    assert run(make_llm(tiny_model(), device="cuda")) == run(make_llm(tiny_model()))


@pytest.mark.parametrize("options", [{}, {"attention_backend": "reference", "enforce_eager": True}], ids=str)
def test_nothing_synchronises_between_planning_and_sampling(options, tiny_model):
    """Only reading the tokens back may wait; every kind of step and of sampling is launched without."""
    llm = gpu_llm(tiny_model(), max_num_batched_tokens=30, **options)
    params = [
        SamplingParams(max_tokens=9, top_p=0.9, logprobs=2, min_tokens=3, stop_token_ids=[5]),
        *(replace(p, logits_processors=None) for p in PARAMS[1:]),  # what users write may wait
    ]
    llm.generate(PROMPTS, params, use_tqdm=False)  # lazy initialisation may wait
    engine = llm.engine
    ended = {}
    llm._add(llm._make_requests(PROMPTS, params), ended)
    while engine.scheduler.has_unfinished:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = engine.scheduler.schedule()
            launched = engine.runner.forward(engine.runner.pack(step), step) if step else None
            sampled = engine.runner.sample(launched) if step else None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.scheduler.commit(step, *sampled.wait())
    assert len(ended) == len(PROMPTS)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_few_rows_have_the_log_probabilities_of_eager_steps(family, dtype, tolerance, tiny_model):
    """Of the same tokens, as in bfloat16 others may be drawn; the mean of the differences."""
    options = {"dtype": dtype, "num_kvcache_blocks": 200, "max_num_seqs": 20}
    graphs, eager = (gpu_llm(tiny_model(family), **options, enforce_eager=is_eager) for is_eager in (False, True))
    for num_rows in range(1, 18):
        prompts = [[i + 1, 2, 3] for i in range(num_rows)]
        params = [SamplingParams(max_tokens=5, allowed_token_ids=[3 + i], logprobs=0) for i in range(num_rows)]
        ours, theirs = (
            torch.tensor([o.outputs[0].cumulative_logprob for o in llm.generate(prompts, params)]) / 5
            for llm in (graphs, eager)
        )
        assert (ours - theirs).abs().mean() < tolerance, num_rows


def test_the_process_stays_within_its_share(tiny_model):
    total = torch.cuda.get_device_properties(0).total_memory
    before = free_memory()
    llm = gpu_llm(tiny_model())
    used = before - torch.cuda.mem_get_info()[0]
    assert abs(used - 0.1 * total) < 0.01 * total
    run(llm)
    assert before - torch.cuda.mem_get_info()[0] < 0.11 * total


def test_closing_and_deleting_free_the_memory(tiny_model):
    """At once: a compiled layer must not keep its weights alive until somebody collects garbage."""
    before = free_memory()
    for close in (LLM.close, lambda llm: llm.__exit__(), None):
        llm = gpu_llm(tiny_model())
        run(llm)
        weights = weakref.ref(llm.engine.runner.model.layers[0].mlp.down_proj.weight)
        assert before - free_memory() > 5 * GIB
        if close is not None:
            close(llm)
            assert weights() is None
        del llm
        assert before - free_memory() < 0.2 * GIB


def test_a_second_llm_shares_what_the_first_has_left(tiny_model):
    """What this process holds counts: the second one's utilisation is for both together."""
    gpu_llm(tiny_model()).close()  # a process's first work on a GPU takes memory of its own
    first = gpu_llm(tiny_model())
    second = gpu_llm(tiny_model(), gpu_memory_utilization=0.15)
    assert pool_bytes(second) == pytest.approx(pool_bytes(first) / 2, rel=0.1)
    assert run(first) == run(second)
    with pytest.raises(ValueError, match="no memory is left"):
        gpu_llm(tiny_model())


def test_other_processes_memory_is_not_counted_as_ours(tiny_model):
    alone = pool_bytes(gpu_llm(tiny_model()))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", HOLD_4_GIB], **pipes)
    try:
        assert other.stdout.readline() == "held\n"
        assert pool_bytes(gpu_llm(tiny_model())) == pytest.approx(alone, rel=0.02)
        with pytest.raises(ValueError, match=r"only .* GiB are free.*other processes hold"):
            gpu_llm(tiny_model(), gpu_memory_utilization=0.999)
    finally:
        other.communicate("\n")


def test_more_blocks_than_fit_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"would take .* GiB, but only .* are free: .*; lower num_kvcache_blocks"):
        gpu_llm(tiny_model(), num_kvcache_blocks=10**9)


def test_running_out_of_memory_in_a_step_leaves_the_llm_usable(tiny_model, monkeypatch):
    llm = gpu_llm(tiny_model())
    expected = run(llm)
    forward = ModelRunner.forward
    calls = []

    def exhaust(*args):
        calls.append(args)
        if len(calls) == 5:
            torch.empty(10**15, device="cuda")
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "forward", exhaust)
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert len(caught.value.outputs) == len(PROMPTS)
    del caught  # its traceback holds the LLM in a cycle, and the next test needs the memory
    assert_nothing_leaks(llm)
    assert run(llm) == expected


@pytest.mark.parametrize("max_num_seqs", [1, 3, 100, 1000])
def test_any_number_of_rows_has_its_graphs(max_num_seqs, tiny_model):
    llm = gpu_llm(tiny_model(), max_num_seqs=max_num_seqs)
    sizes = llm.engine.runner.graphs.sizes
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, max_num_seqs)
    assert all(b <= max(a + 8, a * 9 // 8) for a, b in pairwise(sizes))
    outputs = run(llm)
    llm.close()
    assert outputs == run(gpu_llm(tiny_model(), max_num_seqs=max_num_seqs, enforce_eager=True))


def test_twenty_passes_take_no_more_memory_than_two(tiny_model):
    llm = gpu_llm(tiny_model(), max_num_seqs=32)
    taken = []
    for _ in range(20):
        run(llm)
        torch.cuda.synchronize()
        taken.append((torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]))
    assert taken[2:] == taken[1:2] * 18


def test_a_model_is_compiled_for_any_number_of_tokens_at_once(tiny_model, monkeypatch):
    """A layer is two graphs, around attention; another number of tokens, of rows or of blocks compiles nothing."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.utils.counters.clear()
    for options in ({}, {"max_num_seqs": 7, "kvcache_block_size": 32}, {"max_num_batched_tokens": 30}):
        run(gpu_llm(tiny_model(), **options))
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


LONG = {"max_position_embeddings": 33000, "hidden_size": 128, "head_dim": 64, "num_hidden_layers": 4}


@pytest.mark.parametrize("backend", ["triton", "flash-attn"])
def test_bfloat16_stays_close_to_the_reference_up_to_32000_tokens(backend, tiny_model):
    if backend == "flash-attn":
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    prompts = [[(7 * i + i * i // 9) % 128 for i in range(n)] for n in (10, 1000, 8000, 32000)]
    params = greedy(2, logprobs=-1)
    results = []
    for options in (
        {"attention_backend": backend, "dtype": "bfloat16", "max_num_batched_tokens": 1024},
        {"attention_backend": "reference", "dtype": "float32", "enforce_eager": True},
    ):
        with gpu_llm(tiny_model(**LONG), max_model_len=33000, max_num_seqs=4, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([[output["logprobs"][0][t].logprob for t in range(128)] for output in outputs])
    ours, reference = torch.tensor(results)
    assert (ours - reference).abs().mean(dim=1).max() <= 0.05


def test_flash_attn_keeps_a_request_of_nans_apart(tiny_model, tmp_path):
    """In bfloat16, where tokens depend on the batch: no other request has a NaN, in the same call or the next one."""
    pytest.importorskip("flash_attn")
    folder = shutil.copytree(tiny_model("qwen3", head_dim=64), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llm = make_llm(folder, device="cuda", dtype="bfloat16", attention_backend="flash-attn", num_kvcache_blocks=60)
    healthy = [[(7 * i + j) % 100 + 6 for j in range(3 + 5 * i % 90)] for i in range(20)]
    params = greedy(12, logprobs=0, logit_bias={5: -100.0})  # nobody else has that token
    sick, *mixed = llm.generate([[5] * 66, *healthy], params, use_tqdm=False)
    after = llm.generate([*healthy, *healthy, *healthy], params, use_tqdm=False)
    assert sick["finish_reason"] == "abort"
    for output in mixed + after:
        assert output["finish_reason"] == "length"
        assert math.isfinite(output["cumulative_logprob"])


def test_what_the_largest_step_takes_is_left_free(tiny_model):
    """Its peak is not forgotten when the graphs are measured."""
    sizes = {"max_num_batched_tokens": 16384, "max_num_seqs": 256, "max_model_len": 128}
    llm = gpu_llm(tiny_model(intermediate_size=8192, hidden_size=1024), **sizes)
    before = torch.cuda.mem_get_info()[0]
    run_largest_steps(llm.engine.runner, llm.config)
    total = torch.cuda.get_device_properties(0).total_memory
    assert before - torch.cuda.mem_get_info()[0] > 2**29, "the step takes so much that the test can fail"
    assert torch.cuda.memory_reserved() < 0.101 * total


@pytest.mark.parametrize("block_size", [1, 16])
def test_sequences_shorter_than_the_padding(block_size, tiny_model):
    options = {"max_model_len": 5, "kvcache_block_size": block_size}
    llms = [make_llm(tiny_model(), device=device, **options) for device in ("cpu", "cuda")]
    expected, ours = (completions(llm, [[1], [2, 3, 4], [5, 6]], greedy(4)) for llm in llms)
    assert ours == expected


@pytest.mark.gpu(2)
def test_a_device_that_is_not_the_current_one(tiny_model):
    """Beside an LLM on the current one: what the process makes once must not be of one device."""
    llms = [gpu_llm(tiny_model(), device=device) for device in ("cuda:0", "cuda:1")]
    expected = run(make_llm(tiny_model()))
    assert [run(llm) for llm in llms] == [expected, expected]
