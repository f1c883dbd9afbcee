"""What users of nano-vllm and vLLM write works: prompts, results, samples, seeds, options; what is wrong is refused."""

import gc
import logging
import shutil
import time
import weakref

import numpy as np
import pytest
import torch
from helpers import FEW, PROMPTS, assert_nothing_leaks, completions, drain, greedy, make_llm, run_script, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams
from nanovllm.engine import startup


def test_nano_vllm_scripts_run_unchanged(demo_model):
    llm = LLM(str(demo_model), enforce_eager=True, tensor_parallel_size=1)
    prompts = ["The capital of France is", "One, two, three,"]
    for prompt, output in zip(prompts, llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=8))):
        assert output.prompt == prompt
        assert llm.tokenizer.decode(output["token_ids"], skip_special_tokens=True).startswith(output["text"])
        assert len(output["token_ids"]) <= 8
    llm.generate(["Benchmark: "], SamplingParams())
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in (3, 5)]
    outputs = llm.generate([[7, 8, 9], [10] * 30], params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [3, 5]
    assert llm.get_tokenizer() is llm.tokenizer, "vLLM's name of it"


def test_every_form_of_prompt_is_the_same_request(demo):
    text, token_ids = "The sky is", demo.tokenizer("The sky is")["input_ids"]
    lists = [token_ids, tuple(token_ids), [np.int64(t) for t in token_ids]]
    dicts = [{"prompt": text}, {"prompt_token_ids": token_ids}, {"prompt": text, "prompt_token_ids": token_ids}]
    forms = [text, *lists, *dicts]
    outputs = demo.generate(forms, greedy(6))
    for form in forms:
        outputs += demo.generate(form, greedy(6))
    assert {(tuple(o.prompt_token_ids), o["text"]) for o in outputs} == {(tuple(token_ids), outputs[0]["text"])}
    assert [o.prompt for o in outputs] == [text, None, None, None, text, None, text] * 2
    assert demo.generate([]) == []


def test_a_result_is_vllms_and_reads_as_nano_vllms(llm):
    params = [greedy(4, logprobs=2), greedy(3)]
    for output, prompt, p in zip(llm.generate(FEW[:2], params), FEW, params):
        (completion,) = output.outputs
        assert (output.prompt, output.prompt_token_ids, output.finished) == (None, prompt, True)
        assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
        assert len(completion.token_ids) == p.max_tokens
        assert output["token_ids"] is completion.token_ids
        assert output["finish_reason"] == "length"
        assert dict(output)["text"] == output.get("text") == completion.text == ""
        assert ("token_ids" in output, "request_id" in output) == (True, False)
        with pytest.raises(KeyError):
            output["request_id"]


def test_timings_are_in_order(llm):
    before = time.time()
    for output in llm.generate(FEW, SamplingParams(n=2, max_tokens=6)):
        metrics = output.metrics
        assert before <= metrics.arrival_time <= metrics.first_token_time < metrics.finished_time <= time.time()


def third(**params):
    """Three requests, of which the last one asks for this."""
    return [[1]] * 3, [greedy(1), greedy(1), SamplingParams(**params)]


REFUSED = [
    (TypeError, (7,), "prompts must be text"),
    (TypeError, ([[1], 3.5],), r"prompts\[1\] must be text or a list of token ids"),
    (TypeError, ([[1, 2.0]],), r"prompts\[0\].*2\.0"),
    (TypeError, (b"12345678",), "got bytes"),
    (TypeError, ([b"hello"],), r"prompts\[0\] must be text or.*hello"),
    (TypeError, ([{"prompt_token_ids": {5: 1}}],), r"prompts\[0\] must be text or"),
    (TypeError, ([{3, 4}],), r"prompts\[0\] must be text or a list"),
    (TypeError, ([[1], [True]],), r"prompts\[1\] must be text or.*True"),
    (TypeError, ([None],), r"prompts\[0\]"),
    (TypeError, ([{"prompt": [1]}],), r"prompts\[0\] must have text"),
    (ValueError, (["fine", "\ud800"],), r"prompts\[1\] must be text in Unicode"),  # half a pair, as JSON may hold
    (TypeError, ([iter([5, 6])],), r"prompts\[0\] must be text or a list"),
    (TypeError, ([[1], torch.tensor([True])],), r"prompts\[1\] must be text or.*True"),
    (TypeError, ([torch.tensor([[1], [2]])],), r"prompts\[0\] must be text or a list"),
    (TypeError, ([torch.zeros(3, dtype=torch.int32, device="meta")],), r"prompts\[0\] must be text or a list"),
    (ValueError, ([[1], [5, 2**40, "a"]],), r"token ids of prompts\[1\] must be below 2\*\*31, got 0x10000000000"),
    (ValueError, ([[10**5000]],), r"token ids of prompts\[0\] must be below 2\*\*31"),
    (ValueError, ([[1], []],), r"prompts\[1\] is empty"),
    (ValueError, ([{}],), r"prompts\[0\] must have 'prompt'"),
    (ValueError, ([{"prompt_token_ids": [1], "multi_modal_data": 1}],), "multi_modal"),
    (ValueError, ([[1], [2, 128]],), r"token ids of prompts\[1\] must be in \[0, 127\], got 128"),
    (ValueError, ([[-1]],), r"token ids of prompts\[0\] must be in \[0, 127\], got -1"),
    (ValueError, ([[1], [2] * 128],), r"prompts\[1\] has 128 tokens.*max_model_len=128 leaves no room"),
    (ValueError, ("hello",), "has no tokenizer"),
    (ValueError, third(stop="x"), "has no tokenizer"),
    (TypeError, ([[1]], {"temperature": 1}), "sampling_params must be"),
    (TypeError, ([[1]], [None]), r"sampling_params\[0\] must be"),
    (ValueError, ([[1], [2]], [greedy(1)]), "1 entries for 2 prompts"),
    (ValueError, third(allowed_token_ids=[128]), r"allowed_token_ids of prompts\[2\] must be in \[0, 127\], got 128"),
    (ValueError, third(logit_bias={500: 1.0}), r"logit_bias of prompts\[2\] must be in \[0, 127\], got 500"),
    (ValueError, third(stop_token_ids=[128]), r"stop_token_ids of prompts\[2\] must be in \[0, 127\], got 128"),
    (ValueError, third(prompt_logprobs=129), r"prompt_logprobs of prompts\[2\] must be in \[-1, 128\], got 129"),
    (ValueError, third(logprobs=129), r"logprobs of prompts\[2\] must be in \[-1, 128\], got 129"),
    (
        ValueError,
        third(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=1),
        r"min_tokens of prompts\[2\] must be 0 where every token that is allowed is a stop token, got 1",
    ),
    (ValueError, third(stop_token_ids=range(128), min_tokens=2), r"min_tokens of prompts\[2\] must be 0 .* got 2"),
]


@pytest.mark.parametrize(("error", "args", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_wrong_requests_are_refused_at_once_before_anything_runs(error, args, message, llm):
    for call in llm.generate, llm.stream:
        with pytest.raises(error, match=message):
            call(*args)
    assert llm.stats()["prefix_cache_queries"] == 0
    assert_nothing_leaks(llm)


def test_a_number_is_no_prompt_for_add_request(llm):
    with pytest.raises(TypeError, match=r"prompt must be text.*got 5"):
        llm.add_request(5)
    assert_nothing_leaks(llm)


def test_max_model_len_is_up_to_the_models_scaled_as_in_vicunas_config(tiny_model):
    llm = make_llm(tiny_model(), max_model_len=4096)
    with pytest.raises(ValueError, match="max_model_len=256"):
        llm.generate([[1] * 256])
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", max_position_embeddings=64, rope_parameters=rope)
    assert [make_llm(model, max_model_len=n).max_model_len for n in (250, 1000)] == [250, 256]


def test_small_numpy_integers_are_token_ids_as_well(llm):
    few = np.array([5, 6], np.uint8)
    bias = {few[0]: np.float16(1)}
    params = SamplingParams(
        max_tokens=4, allowed_token_ids=list(few), logit_bias=bias, min_tokens=1, stop_token_ids=[few[1]]
    )
    assert {t for token_ids in tokens(llm, [[1], [2], [3]], params) for t in token_ids} <= {5, 6}


def test_default_sampling_params_are_the_checkpoints(tiny_model, tmp_path):
    assert make_llm(tiny_model()).get_default_sampling_params() == SamplingParams()
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    assert make_llm(folder).get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20)


# --- samples and seeds -----------------------------------------------------------------------------------------------


def test_n_completions_share_the_prompts_blocks_and_differ(tiny_model):
    llm, prompt = make_llm(tiny_model(), kvcache_block_size=4), PROMPTS[-1]
    params = SamplingParams(n=5, max_tokens=8, seed=3)
    request_id, finished, most_blocks = llm.add_request(prompt, params), [], 0
    while not llm.is_finished():
        finished += llm.step()[0]
        most_blocks = max(most_blocks, llm.stats()["num_blocks_in_use"])
    assert [i for i, _ in finished] == [request_id] * 5
    assert most_blocks <= -(-len(prompt) // 4) + 5 * 3, "the prompt's full blocks are there once"
    (output,) = llm.generate([prompt], params)
    assert [sample.index for sample in output.outputs] == list(range(5))
    assert sorted(sample.token_ids for sample in output.outputs) == sorted(ids for _, ids in finished)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 5
    assert_nothing_leaks(llm)


def test_a_sample_does_not_depend_on_how_many_there_are(llm, tiny_model):
    """The first is that of n=1, the others are those of a smaller n; alone, in a batch, in fewer rows."""
    by_n = [completions(llm, [PROMPTS[5]], SamplingParams(n=n, max_tokens=9, seed=7))[0] for n in (1, 2, 6)]
    assert by_n[0] == by_n[2][:1]
    assert by_n[1] == by_n[2][:2]
    few = make_llm(tiny_model(), max_num_seqs=2)
    params = [SamplingParams(n=1 + i % 3, max_tokens=9, seed=7) for i in range(len(PROMPTS))]
    assert completions(few, PROMPTS, params)[5] == by_n[2][: params[5].n]


def test_seeds_repeat_and_no_seed_does_not(tiny_model, llm):
    def draw(llm, **more):
        return tokens(llm, FEW, SamplingParams(max_tokens=12, **more))

    assert draw(llm, seed=5) == draw(llm, seed=5)
    assert draw(llm, seed=5) != draw(llm, seed=6)
    assert draw(llm) != draw(llm)
    assert draw(llm, seed=-1) != draw(llm, seed=-1), "-1 is no seed"
    assert draw(make_llm(tiny_model(), seed=3)) == draw(make_llm(tiny_model(), seed=3))
    assert draw(make_llm(tiny_model(), seed=3)) != draw(make_llm(tiny_model(), seed=4))


SEEDED = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", max_model_len=64, use_tqdm=False, num_kvcache_blocks=50)
params = SamplingParams(n=3, seed=11, max_tokens=10, top_p=0.9, presence_penalty=0.5)
(output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
print([sample.token_ids for sample in output.outputs])
"""


def test_a_seed_gives_the_same_tokens_in_another_process(llm, tiny_model):
    params = SamplingParams(n=3, seed=11, max_tokens=10, top_p=0.9, presence_penalty=0.5)
    assert run_script(SEEDED, tiny_model()).strip() == str(completions(llm, [[1, 2, 3]], params)[0])


# --- every promise, on random parameters -----------------------------------------------------------------------------

parameters = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12), "temperature": st.sampled_from([0.0, 1e-6, 0.7, 3.0])},
    optional={
        "top_k": st.sampled_from([-1, 1, 5, 1000]),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop_token_ids": st.lists(st.integers(0, 127), max_size=40),
        "logprobs": st.integers(-1, 4),
        "prompt_logprobs": st.integers(-1, 4),
        "repetition_penalty": st.floats(0.1, 3.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 127), st.floats(-100.0, 100.0), max_size=5),
        "allowed_token_ids": st.lists(st.integers(0, 127), min_size=1, max_size=9),
        "ignore_eos": st.booleans(),
        "n": st.integers(1, 3),
        "min_tokens": st.integers(0, 4),
    },
)


def check_promises(prompt, params, output):
    assert output.prompt_token_ids == prompt
    assert len(output.outputs) == params.n
    assert (output.prompt_logprobs is None) == (params.prompt_logprobs is None)
    if output.prompt_logprobs is not None:
        assert len(output.prompt_logprobs) == len(prompt)
        assert all(token_id in c for token_id, c in zip(prompt[1:], output.prompt_logprobs[1:]))
    stops = set(params.stop_token_ids or ())
    for sample in output.outputs:
        token_ids = sample.token_ids
        assert params.min_tokens <= len(token_ids) <= params.max_tokens
        if sample.finish_reason == "stop":
            assert sample.stop_reason == token_ids[-1]
            assert len(token_ids) > params.min_tokens
        else:
            assert sample.finish_reason == "length"
            assert len(token_ids) == params.max_tokens
        assert [t for t in token_ids if t in stops] == ([token_ids[-1]] if sample.finish_reason == "stop" else [])
        assert not params.allowed_token_ids or set(token_ids) <= set(params.allowed_token_ids)
        if params.logprobs is None:
            assert sample.logprobs is sample.cumulative_logprob is None
            continue
        num_top = 128 if params.logprobs == -1 else params.logprobs
        assert len(sample.logprobs) == len(token_ids)
        for token_id, candidates in zip(token_ids, sample.logprobs):
            assert len(candidates) == num_top + (candidates[token_id].rank > num_top)
            assert sorted(c.rank for c in candidates.values())[:num_top] == list(range(1, num_top + 1))
        assert sample.cumulative_logprob == pytest.approx(sum(c[t].logprob for t, c in zip(token_ids, sample.logprobs)))


@pytest.fixture(scope="module")
def small(tiny_model):
    sizes = {"kvcache_block_size": 4, "num_kvcache_blocks": 40, "max_num_seqs": 5, "max_num_batched_tokens": 37}
    return make_llm(tiny_model(), **sizes)


@settings(max_examples=100, deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from(PROMPTS), parameters), min_size=1, max_size=6))
def test_every_promise_of_every_parameter_holds(small, requests):
    params = []
    for _, asked in requests:
        if asked["temperature"] == 0:
            asked = asked | {"n": 1}
        asked["max_tokens"] = max(asked["max_tokens"], asked.get("min_tokens", 0))
        if asked.get("min_tokens") and set(asked.get("allowed_token_ids", ())) <= set(asked.get("stop_token_ids", ())):
            asked.pop("allowed_token_ids", None)
        params.append(SamplingParams(**asked))
    prompts = [prompt for prompt, _ in requests]
    outputs = small.generate(prompts, params, use_tqdm=False)
    assert_nothing_leaks(small)
    for prompt, p, output in zip(prompts, params, outputs):
        check_promises(prompt, p, output)


# --- the process: memory, messages, the caller's settings ------------------------------------------------------------


def test_a_pool_takes_what_is_asked_or_needed_or_a_quarter_of_the_memory(tiny_model, monkeypatch):
    with pytest.raises(ValueError, match=r"8 blocks of 16 tokens.*max_model_len=128.*takes 9"):
        make_llm(tiny_model(), num_kvcache_blocks=8)
    assert len(tokens(make_llm(tiny_model(), num_kvcache_blocks=9), [[1]], greedy(127))[0]) == 127

    def num_blocks():
        return make_llm(tiny_model(), num_kvcache_blocks=-1, max_num_seqs=10).stats()["num_kvcache_blocks"]

    assert num_blocks() == 10 * 128 // 16
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, head size, float32
    monkeypatch.setattr(startup, "available_host_memory", lambda: 4 * 50 * block_bytes)
    assert num_blocks() == 50 - 1, "one is for padding"


def test_stats_count_pool_use_and_hits(llm):
    stats = llm.stats()
    assert (stats["num_kvcache_blocks"], stats["num_blocks_in_use"], stats["kv_cache_usage"]) == (399, 0, 0.0)
    llm.add_request([7] * 40, greedy(5))
    llm.step()
    stats = llm.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["num_blocks_in_use"]) == (1, 0, 3)
    llm.generate([[7] * 40], greedy(1))
    assert (llm.stats()["prefix_cache_queries"], llm.stats()["prefix_cache_hits"]) == (80, 32)


def test_reset_prefix_cache_forgets_also_while_requests_run(llm):
    llm.generate([PROMPTS[11]], greedy(2))
    llm.add_request(PROMPTS[11], greedy(30))
    llm.step()
    llm.reset_prefix_cache()
    (output,) = llm.generate([PROMPTS[11]], greedy(30))
    assert output.num_cached_tokens == 0
    assert [token_ids for _, token_ids in drain(llm)] == [output["token_ids"]]
    assert llm.generate([PROMPTS[11]], greedy(2))[0].num_cached_tokens > 0


def test_progress_goes_to_stderr_and_can_be_turned_off(tiny_model, capfd):
    folder = tiny_model()  # transformers may show progress of its own
    capfd.readouterr()
    make_llm(folder, use_tqdm=False).generate(FEW, greedy(4), use_tqdm=False)
    assert capfd.readouterr() == ("", "")
    make_llm(folder, use_tqdm=True).generate(FEW, greedy(4))
    out, err = capfd.readouterr()
    assert out == ""
    assert all(
        word in err for word in ("Loading weights", "25/25", "Generating", "4/4", "prefill=", "decode=", "tok/s")
    )


def test_nobody_reads_the_progress_bar(tiny_model):
    """python script.py 2>&1 | head"""
    script = """
import os, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 2)
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", max_model_len=64, num_kvcache_blocks=50)
outputs = llm.generate([[1, 2], [3]] * 20, SamplingParams(max_tokens=9, ignore_eos=True))
print(sum(len(output["token_ids"]) for output in outputs))
"""
    assert run_script(script, tiny_model()).strip() == str(40 * 9)


def test_the_log_says_how_memory_is_split(tiny_model, caplog):
    with caplog.at_level(logging.INFO, "nanovllm"):
        make_llm(tiny_model(), num_kvcache_blocks=77)
    assert all(words in caplog.text for words in ("weights", "KV pool", "77 blocks of 16 tokens"))


def test_closing_frees_the_runner_and_refuses_more_work(tiny_model):
    with make_llm(tiny_model()) as llm:
        llm.generate(FEW, greedy(2))
        runner = weakref.ref(llm.engine.runner)
        assert runner() is not None
    assert runner() is None
    llm.close()
    for call in (lambda: llm.generate(FEW), lambda: llm.add_request([1]), llm.step):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_deleting_an_llm_frees_it_at_once(tiny_model):
    llm = make_llm(tiny_model())
    llm.generate(FEW, greedy(2))
    runner = weakref.ref(llm.engine.runner)
    gc.disable()
    try:
        del llm
        assert runner() is None, "no cycle keeps the weights until the next collection"
    finally:
        gc.enable()
    make_llm(tiny_model()).generate(FEW, greedy(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callers_autocast_changes_nothing(dtype, tiny_model, device):
    llm = make_llm(tiny_model(), device=device)
    params = SamplingParams(max_tokens=9, seed=1, logprobs=3)

    def logprobs(llm):
        return [output["logprobs"] for output in llm.generate(FEW, params)]

    expected = logprobs(llm)
    with torch.autocast(device, dtype=dtype):
        assert logprobs(llm) == expected
        assert logprobs(make_llm(tiny_model(), device=device)) == expected
        assert torch.is_autocast_enabled(device)


@pytest.mark.slow
def test_memory_on_a_cpu_is_level_after_a_while(tiny_model):
    """oneDNN keeps a kernel for every number of rows."""
    script = """
import psutil, random, sys
from nanovllm import LLM, SamplingParams
sizes = {"max_model_len": 256, "max_num_seqs": 64, "num_kvcache_blocks": 2000}
llm = LLM(sys.argv[1], device="cpu", use_tqdm=False, **sizes)
draw = random.Random(0)
for i in range(150):
    prompts = [[draw.randrange(128)] * draw.randint(1, 150) for _ in range(draw.randint(1, 40))]
    params = [SamplingParams(max_tokens=draw.randint(1, 20), ignore_eos=True) for _ in prompts]
    llm.generate(prompts, params, use_tqdm=False)
    if i in (69, 149):
        print(psutil.Process().memory_info().rss)
"""
    after_70, after_150 = map(int, run_script(script, tiny_model()).split())
    assert after_150 - after_70 < 30 * 2**20
