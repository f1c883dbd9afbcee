"""bench.py: the workloads are what they say, the limit is right, and the last line is JSON."""

import json
from dataclasses import replace

import pytest
import torch

import bench
from nanovllm import LLM
from nanovllm.config import ModelConfig
from tools.bench_args import parse_args
from tools.ceiling import Ceilings, least_work
from tools.shapes import SHAPES, Shape
from tools.watchers import Trace
from tools.workloads import OPTIONS_FOR_ALL, WORKLOADS, Workload

BILLION = {
    "qwen3-0.6b": 0.60,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "qwen2.5-7b": 7.62,
    "llama-3.1-8b": 8.03,
}
SMALL = {"vocab_size": 10001}  # the prompts' ids have to be in the vocabulary


def read(shape, folder):
    shape.save(folder)
    return ModelConfig.from_folder(folder, ModelConfig.from_hf)


def lens(workload):
    prompts, output_lens = workload.requests(0)
    return [len(prompt) for prompt in prompts], output_lens


def run(capsys, *args):
    """main()'s report, from the last line of stdout; and what it printed before."""
    bench.main([str(arg) for arg in args])
    *table, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(table)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_keeps_to_its_lengths_and_shares_only_its_prefixes(name):
    workload = WORKLOADS[name]
    prompts, output_lens = workload.requests(0)
    assert len(prompts) == len(output_lens) == workload.num_seqs
    num_shared = sum(num_tokens for _, num_tokens in workload.shared)
    low, high = (n + num_shared for n in workload.input_len)
    assert all(low <= len(prompt) <= high for prompt in prompts)
    assert all(workload.output_len[0] <= n <= workload.output_len[1] for n in output_lens)
    assert all(0 <= token <= 10_000 for prompt in prompts for token in prompt)
    for start, end, requests in workload.prefixes:
        assert len({tuple(prompts[i][:end]) for i in requests}) == 1
        others = set(range(workload.num_seqs)) - set(requests)
        assert all(prompts[i][start : start + 16] != prompts[requests[0]][start : start + 16] for i in others)
    own = [tuple(prompt[num_shared:][:16]) for prompt in prompts]
    assert len(set(own)) == len(own), "two prompts would share a block"


@pytest.mark.parametrize("name", ["classic", "single", "eight", "prefix", "tree"])
def test_passes_repeat_in_another_run_and_are_fresh_within_one(name):
    """Only lengths recur: a prefix cache that is kept between passes must find nothing."""
    workload = WORKLOADS[name]
    passes = [workload.requests(number) for number in range(3)]
    assert passes == [replace(workload).requests(number) for number in range(3)]
    assert len({tuple(map(len, prompts)) for prompts, _ in passes}) == 1
    assert passes[0][1] == passes[1][1] == passes[2][1]
    beginnings = [{tuple(prompt[:16]) for prompt in prompts} for prompts, _ in passes]
    assert set.isdisjoint(*beginnings[:2])
    assert set.isdisjoint(*beginnings[1:])
    assert beginnings[0].isdisjoint(beginnings[2])


def test_workloads_in_one_run_share_nothing():
    beginnings = [tuple(workload.requests(0)[0][0][:16]) for workload in WORKLOADS.values()]
    assert len(set(beginnings)) == len(beginnings)


def test_classic_stays_the_workload_that_earlier_figures_are_of():
    prompts, output_lens = WORKLOADS["classic"].requests(0)
    assert sum(output_lens) == 133_966
    assert sum(map(len, prompts)) == 142_827


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_its_model(name, tmp_path):
    config = read(SHAPES[name], tmp_path)
    one_pass = least_work(config, Workload(1, (1, 1), (1, 1)))  # reads every layer and the output head, two bytes each
    parameters = one_pass.weight_bytes / 2
    if not config.tie_word_embeddings:
        parameters += config.vocab_size * config.hidden_size
    assert parameters / 1e9 == pytest.approx(BILLION[name], rel=0.01)
    assert config.head_dim == 128
    assert config.dtype is torch.bfloat16
    assert config.rope.theta == (5e5 if name == "llama-3.1-8b" else 1e6)


@pytest.fixture
def tiny(tmp_path):
    """3 layers of 8 wide, with 4 heads, 2 of them for keys and values, and 10 in the middle; 100 tokens."""
    return read(Shape(SHAPES["qwen3-0.6b"].config_class, 3, 8, 4, 2, 10, True, vocab_size=100), tmp_path)


LAYERS = 3 * (8 * (4 + 2 + 2) * 128 + 4 * 128 * 8 + 3 * 8 * 10)  # q, k, v; o; gate, up and down
KV_BYTES = 3 * 2 * 2 * 128 * 2  # layers, k and v, heads, head size, bytes


class Requests(Workload):
    """A workload of given lengths."""

    def __init__(self, prompt_lens, output_lens, **options):
        super().__init__(len(prompt_lens), (0, 0), (0, 0), **options)
        object.__setattr__(self, "lens", (prompt_lens, output_lens))

    def requests(self, pass_number):
        return [[0] * n for n in self.lens[0]], self.lens[1]


def test_the_least_work_is_what_one_counts_by_hand(tiny):
    work = least_work(tiny, Requests([4, 6], [3, 1]))
    assert work.kv_bytes == (5 + 6) * KV_BYTES  # tokens 2 and 3 of the first request; the second one decodes nothing
    assert work.weight_bytes == 3 * (LAYERS + 100 * 8) * 2
    assert work.prompt_flops == 2 * LAYERS * (4 + 6) + 3 * 2 * 2 * 4 * 128 * (4**2 + 6**2) // 2
    ceilings = Ceilings(bytes_per_s=10.0, flop_per_s=100.0)
    bytes_read = work.kv_bytes + work.weight_bytes
    assert ceilings.limit_seconds(work) == pytest.approx(bytes_read / 10 + work.prompt_flops / 100)


def test_a_shared_prefix_is_computed_once_and_read_once_a_step(tiny):
    """Counted for each request, an engine that shares its reads would beat the limit."""
    work = least_work(tiny, Requests([6, 7], [3, 2], shared=((1, 4),)))
    assert work.kv_bytes == (2 * 4 + (3 + 4) + 4) * KV_BYTES
    pairs = 4**2 // 2 + (6**2 - 4**2) // 2 + (7**2 - 4**2) // 2
    assert work.prompt_flops == 2 * LAYERS * (4 + 2 + 3) + 3 * 2 * 2 * 4 * 128 * pairs


def test_samples_share_their_prompt_and_nested_prefixes_count_once_each(tiny):
    work = least_work(tiny, Requests([9, 9, 9, 9], [3, 3, 3, 2], shared=((2, 4), (2, 3)), num_samples=5))
    prefixes = 2 * 2 * 4 + (3 * 2 + 1) * 3  # twice each, but that of the last request alone
    assert work.kv_bytes == (prefixes + (3 * 2 + 1) * 2 + 5 * (3 * (1 + 2) + 1)) * KV_BYTES
    assert work.prompt_flops == 2 * LAYERS * (2 * 4 + 4 * 3 + 4 * 2) + 3 * 2 * 2 * 4 * 128 * (
        2 * (4**2 // 2) + 4 * ((7**2 - 4**2) // 2) + 4 * ((9**2 - 7**2) // 2)
    )


def test_a_custom_run_ends_in_one_line_of_json(tiny_model, device, capsys):
    sizes = ["--num-seqs", 3, "--input-len", 4, 9, "--output-len", 2, 6, "--temperature", 0.5]
    options = ["--device", device, "--gpu-memory-utilization", 0.1, "--max-num-seqs", 2, "--max-model-len", 32]
    report, table = run(capsys, "--model", tiny_model(**SMALL), *sizes, *options)
    assert {"settings", "hardware", "versions", "startup_seconds", "workloads"} <= report.keys()
    assert report["settings"]["max_num_seqs"] == 2
    assert report["settings"]["max_model_len"] == 32
    custom = report["workloads"]["custom"]
    assert (custom["num_seqs"], custom["input_len"], custom["temperature"]) == (3, [4, 9], 0.5)
    workload = Workload(3, (4, 9), (2, 6))
    assert custom["output_tokens"] == sum(lens(workload)[1])
    assert custom["prompt_tokens"] == sum(lens(workload)[0])
    assert custom["best"]["seconds"] == custom["passes"]["seconds"][1], "the first of two passes is no headline"
    columns = {"seconds", "output_tok_per_s", "prompt_tok_per_s"}
    if device == "cuda":
        columns |= {"share_of_limit", "gpu_busy_share"}
        assert 0 < custom["best"]["share_of_limit"] < 1
        assert 0 < custom["best"]["gpu_busy_share"] < 1.1
        assert report["peak_memory_gib"] > 0
        assert 0 < report["device_used_share"] < 1
    assert custom["passes"].keys() == columns
    assert all(len(figures) == 2 for figures in custom["passes"].values())
    assert "custom" in table


def test_named_workloads_share_one_llm(tiny_model, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "single", Workload(1, (5, 5), (3, 3)))
    monkeypatch.setitem(WORKLOADS, "prefix", Workload(2, (5, 5), (3, 3), shared=((1, 40),)))
    made = []
    monkeypatch.setattr(bench, "LLM", lambda **options: made.append(options) or LLM(**options))
    args = ["--workload", "prefix", "single", "--passes", 1, "--device", "cpu"]
    report, _ = run(capsys, "--model", tiny_model(**SMALL), *args)
    assert len(made) == 1
    assert {name: made[0][name] for name in OPTIONS_FOR_ALL} == OPTIONS_FOR_ALL
    assert not {"attention_backend", "kvcache_block_size"} & made[0].keys(), "left to LLM unless they are given"
    assert list(report["workloads"]) == ["prefix", "single"]
    assert report["workloads"]["prefix"]["prompt_tokens"] == 2 * 45
    assert len(report["workloads"]["single"]["passes"]["seconds"]) == 1


def test_an_output_of_another_length_is_an_error(tiny_model, capsys):
    """Else a cap on the model's length would look like speed."""
    sizes = ["--num-seqs", 1, "--input-len", 8, 8, "--output-len", 20, 20, "--max-model-len", 16]
    with pytest.raises(RuntimeError, match=r"asked for 20 tokens and gave \[8\]"):
        run(capsys, "--model", tiny_model(**SMALL), "--device", "cpu", *sizes)


def test_what_watches_a_pass_leaves_the_llm_as_it_was(tiny_model):
    """A wrapper left on a closed LLM would keep its memory."""
    llm = LLM(tiny_model(**SMALL), device="cpu", use_tqdm=False)
    before = dict(vars(llm.engine)), dict(vars(llm.engine.runner))
    trace = Trace(llm.engine)
    bench.run_pass(llm, Workload(2, (4, 4), (3, 3)), 0, None, trace)
    assert vars(llm.engine).keys() == before[0].keys()
    assert vars(llm.engine.runner).keys() == before[1].keys()
    assert sum(turn.step.num_prefill_tokens for turn in trace.turns) == 8
    assert sum(turn.step.num_decode_tokens for turn in trace.turns) == 2 * (3 - 1)


@pytest.mark.parametrize("args", [["--passes", "0"], ["--workload", "single", "--num-seqs", "2"], ["--workload", "x"]])
def test_arguments_that_cannot_be_honoured_are_refused(args, capsys):
    with pytest.raises(SystemExit):
        parse_args(args, None)
    assert "error:" in capsys.readouterr().err
