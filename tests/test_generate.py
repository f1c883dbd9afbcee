"""What a request may ask of generate(): completions, seeds, penalties, log-probabilities of prompts, in float32."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import EXTRAS, PROMPTS, assert_nothing_leaks, completions, greedy, make_llm, run
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams


@pytest.fixture
def llm(tiny_model):
    return make_llm(tiny_model())


# --- n completions ---------------------------------------------------------------------------------------------------


def test_n_completions_share_the_prompts_blocks_and_differ(llm):
    llm = make_llm(llm.config.model, kvcache_block_size=4)
    prompt = PROMPTS[-1]
    params = SamplingParams(n=5, max_tokens=8, seed=3)
    most_blocks = 0
    request_id = llm.add_request(prompt, params)
    finished = []
    while not llm.is_finished():
        finished += llm.step()[0]
        most_blocks = max(most_blocks, llm.stats()["num_blocks_in_use"])
    assert [i for i, _ in finished] == [request_id] * 5
    alone = -(-len(prompt) // 4)
    assert most_blocks <= alone + 5 * 3, "the prompt's full blocks are there once"
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert [sample.index for sample in output.outputs] == list(range(5))
    assert sorted(sample.token_ids for sample in output.outputs) == sorted(ids for _, ids in finished)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 5
    assert_nothing_leaks(llm)


def test_a_sample_does_not_depend_on_how_many_there_are(llm):
    """The first is that of n=1, the others are those of a smaller n; alone, in a batch, in fewer rows."""
    by_n = [completions(llm, [PROMPTS[5]], SamplingParams(n=n, max_tokens=9, seed=7))[0] for n in (1, 2, 6)]
    assert by_n[0] == by_n[2][:1]
    assert by_n[1] == by_n[2][:2]
    few = make_llm(llm.config.model, max_num_seqs=2)
    params = [SamplingParams(n=1 + i % 3, max_tokens=9, seed=7) for i in range(len(PROMPTS))]
    assert completions(few, PROMPTS, params)[5] == by_n[2][: params[5].n]


def test_some_samples_that_are_finished_make_no_result(llm):
    """A request is done when all of its completions are; an abort drops the ones that are done as well."""
    request_id = llm.add_request([1, 2], SamplingParams(n=3, max_tokens=20, seed=0, stop_token_ids=range(64)))
    finished = []
    while not finished:
        finished += llm.step()[0]
    llm.abort(request_id)
    while not llm.is_finished():
        assert llm.step()[0] == []
    assert_nothing_leaks(llm)


def test_an_error_in_the_middle_gives_no_request_with_a_completion_missing(llm):
    calls = []

    def fail_late(token_ids, logits):
        calls.append(token_ids)
        if len(token_ids) == 8:
            raise RuntimeError("no more")
        return logits

    params = [
        SamplingParams(n=2, max_tokens=4, seed=1),
        SamplingParams(n=2, max_tokens=9, seed=1, logits_processors=[fail_late]),
    ]
    with pytest.raises(RuntimeError, match="no more") as caught:
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
    done, lost = caught.value.outputs
    assert len(done.outputs) == 2
    assert lost is None
    assert_nothing_leaks(llm)
    assert len(llm.generate(PROMPTS[:1], params[:1], use_tqdm=False)[0].outputs) == 2


# --- seeds -----------------------------------------------------------------------------------------------------------


SCRIPT = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", max_model_len=64, use_tqdm=False, num_kvcache_blocks=50)
params = SamplingParams(n=3, seed=11, max_tokens=10, top_p=0.9, presence_penalty=0.5)
(output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
print([sample.token_ids for sample in output.outputs])
"""


def test_a_seed_gives_the_same_tokens_in_another_process(llm):
    params = SamplingParams(n=3, seed=11, max_tokens=10, top_p=0.9, presence_penalty=0.5)
    script = [sys.executable, "-c", SCRIPT, str(llm.config.model)]
    printed = subprocess.run(script, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(completions(llm, [[1, 2, 3]], params)[0])


def test_without_a_seed_two_calls_differ(llm):
    params = SamplingParams(max_tokens=20)
    assert completions(llm, PROMPTS, params) != completions(llm, PROMPTS, params)


# --- penalties -------------------------------------------------------------------------------------------------------


def test_greedy_with_repetition_penalty_is_that_of_transformers(demo):
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.config.model, dtype=torch.float32)
    prompts = [demo.tokenizer(text)["input_ids"] for text in ("The capital of France is", "One two one two one")]
    outputs = demo.generate(prompts, greedy(40, repetition_penalty=1.2), use_tqdm=False)
    for prompt, output in zip(prompts, outputs):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        assert output["token_ids"] == expected[0, len(prompt) :].tolist()


def test_allowed_tokens_and_bias_hold_in_every_token(llm):
    allowed = [5, 17, 90]
    (some,) = completions(llm, [[1]], SamplingParams(max_tokens=30, allowed_token_ids=allowed, seed=1))[0]
    assert set(some) == set(allowed)
    (one,) = completions(llm, [[1]], SamplingParams(max_tokens=9, logit_bias={42: 100.0}, seed=1))[0]
    assert one == [42] * 9


# --- log-probabilities of prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [16384, 5])
def test_prompt_logprobs_are_those_of_transformers(budget, tiny_model):
    """Also where the prompt is in the prefix cache, and where it is cut into chunks."""
    folder = tiny_model()
    llm = make_llm(folder, max_num_batched_tokens=budget, kvcache_block_size=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [p for p in PROMPTS if len(p) > 1][:6]
    llm.generate(prompts, greedy(3), use_tqdm=False)
    params = [greedy(3, prompt_logprobs=n) for n in (0, 3, -1)] * 2
    for prompt, p, output in zip(prompts, params, llm.generate(prompts, params, use_tqdm=False)):
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.num_cached_tokens == 0
        first, *rest = output.prompt_logprobs
        assert first is None
        assert len(rest) == len(prompt) - 1
        for i, (token_id, candidates) in enumerate(zip(prompt[1:], rest)):
            top = expected[i].argsort(descending=True).tolist()
            num_top = 128 if p.prompt_logprobs == -1 else p.prompt_logprobs
            assert set(candidates) == {token_id, *top[:num_top]}
            for candidate, value in candidates.items():
                assert value.logprob == pytest.approx(expected[i, candidate].item(), abs=1e-4)
                assert value.rank == top.index(candidate) + 1


def test_prompt_logprobs_survive_a_preemption(tiny_model):
    params = [greedy(30, prompt_logprobs=1)] * 6
    expected = [o.prompt_logprobs for o in make_llm(tiny_model()).generate(PROMPTS[6:12], params, use_tqdm=False)]
    llm = make_llm(tiny_model(), kvcache_block_size=4, num_kvcache_blocks=34, max_num_batched_tokens=30)
    outputs = llm.generate(PROMPTS[6:12], params, use_tqdm=False)
    assert llm.stats()["num_preemptions"] > 0
    for output, wanted in zip(outputs, expected):
        assert len(output.prompt_logprobs) == len(wanted)
        for ours, theirs in zip(output.prompt_logprobs[1:], wanted[1:]):
            assert ours.keys() == theirs.keys()
            assert all(ours[t].logprob == pytest.approx(theirs[t].logprob, abs=1e-4) for t in ours)


def test_prompt_logprobs_of_n_completions_are_computed_once(llm):
    (output,) = llm.generate([PROMPTS[9]], SamplingParams(n=3, max_tokens=2, prompt_logprobs=0), use_tqdm=False)
    assert len(output.prompt_logprobs) == len(PROMPTS[9])
    assert len(output.outputs) == 3


# --- the rest of the interface ---------------------------------------------------------------------------------------


def test_reset_prefix_cache_forgets_also_while_requests_run(llm):
    llm.generate([PROMPTS[11]], greedy(2), use_tqdm=False)
    llm.add_request(PROMPTS[11], greedy(30))
    llm.step()
    llm.reset_prefix_cache()
    (output,) = llm.generate([PROMPTS[11]], greedy(30), use_tqdm=False)
    assert output.num_cached_tokens == 0
    while not llm.is_finished():
        for _, token_ids in llm.step()[0]:
            assert token_ids == output["token_ids"]
    assert_nothing_leaks(llm)
    assert llm.generate([PROMPTS[11]], greedy(2), use_tqdm=False)[0].num_cached_tokens > 0


def test_default_sampling_params_are_the_checkpoints(tiny_model, tmp_path):
    llm = make_llm(tiny_model())
    assert llm.get_default_sampling_params() == SamplingParams()
    for file in Path(tiny_model()).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    assert make_llm(tmp_path).get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20)


def test_half_a_surrogate_pair_is_refused_by_name(demo):
    """JSON can hold one."""
    with pytest.raises(ValueError, match=r"prompts\[1\] must be text in Unicode"):
        demo.generate(["fine", "\ud800"], greedy(1))
    with pytest.raises(ValueError, match=r"messages\[0\] is refused"):
        demo.chat([{"role": "user", "content": "\ud800"}], greedy(1))


def test_a_prompt_fits_that_leaves_room_for_one_token(llm):
    assert llm.max_model_len == 128
    assert llm.generate([[1] * 127], greedy(5), use_tqdm=False)[0]["finish_reason"] == "length"
    with pytest.raises(ValueError, match="leaves no room"):
        llm.generate([[1] * 128], greedy(5))


def test_the_tokenizer_has_vllms_name_too(demo):
    assert demo.get_tokenizer() is demo.tokenizer


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_token_ids": [128]}, r"allowed_token_ids of prompts\[2\] must be in \[0, 127\], got 128"),
        ({"logit_bias": {500: 1.0}}, r"logit_bias of prompts\[2\] must be in \[0, 127\], got 500"),
        ({"stop_token_ids": [128]}, r"stop_token_ids of prompts\[2\] must be in \[0, 127\], got 128"),
        ({"prompt_logprobs": 129}, r"prompt_logprobs of prompts\[2\] must be in \[-1, 128\], got 129"),
        ({"logprobs": 129}, r"logprobs of prompts\[2\] must be in \[-1, 128\], got 129"),
        ({"stop": "x"}, "has no tokenizer"),
        (
            {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1},
            r"min_tokens of prompts\[2\] must be 0 where every token that is allowed is a stop token, got 1",
        ),
        (
            {"stop_token_ids": range(128), "min_tokens": 2, "max_tokens": 4},
            r"min_tokens of prompts\[2\] must be 0 where every token that is allowed is a stop token, got 2",
        ),
    ],
)
def test_one_bad_request_is_refused_before_any_work(params, message, llm):
    every = [SamplingParams()] * 4
    every[2] = SamplingParams(**params)
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPTS[:4], every, use_tqdm=False)
    assert llm.is_finished()
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("eos_token_id", [128, -1])
def test_end_tokens_outside_the_vocabulary_are_passed_over(eos_token_id, tiny_model, tmp_path):
    """Shrunken checkpoints have them, or -1 for none; a ban of one must not reach another row."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    llm = make_llm(folder)
    alone = llm.generate([[2]], greedy(3, logit_bias={0: 100.0}), use_tqdm=False)[0]["token_ids"]
    params = [greedy(3, min_tokens=3), greedy(3, logit_bias={0: 100.0}), greedy(3)]
    assert llm.generate([[1], [2], [3]], params, use_tqdm=False)[1]["token_ids"] == alone == [0] * 3


def test_small_numpy_integers_are_token_ids_as_well(llm):
    few = np.array([5, 6], np.uint8)
    params = SamplingParams(
        max_tokens=4,
        allowed_token_ids=list(few),
        logit_bias={few[0]: np.float16(1)},
        min_tokens=1,
        stop_token_ids=[few[1]],
    )
    for output in llm.generate([[1], [2], [3]], params, use_tqdm=False):
        assert set(output["token_ids"]) <= {5, 6}


def test_a_processor_may_have_parameters_of_its_own(llm):
    def only(token_ids, logits, token_id=7):
        return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([token_id]), 0.0)

    params = [greedy(2, logits_processors=[f]) for f in (only, partial(only, token_id=9))]
    assert completions(llm, [[1], [1]], params) == [[[7, 7]], [[9, 9]]]
    early = greedy(6, min_tokens=3, stop_token_ids=[7], logits_processors=[only])
    assert completions(llm, [[1]], early) == [[[7] * 4]], "what a processor forces does not stop too early either"


def test_a_processor_cannot_run_the_engine(llm):
    def nested(token_ids, logits):
        llm.generate([[1]], greedy(2), use_tqdm=False)
        return logits

    with pytest.raises(RuntimeError, match="a logits processor cannot run the engine"):
        llm.generate([[1]], greedy(4, logits_processors=[nested]), use_tqdm=False)
    assert_nothing_leaks(llm)
    assert len(llm.generate([[1]], greedy(4), use_tqdm=False)[0]["token_ids"]) == 4


def test_a_request_keeps_no_more_logprobs_than_it_asks_for(llm):
    requests = llm._make_requests([[1], [2]], [greedy(5, logprobs=1), greedy(5, logprobs=-1)])
    llm._add(requests)
    while llm.engine.scheduler.has_unfinished:
        llm.engine.step()
    assert [[len(candidates) for candidates in seq.logprobs] for (seq,) in requests] == [[1] * 5, [128] * 5]


def test_an_interrupt_while_results_are_made_loses_none(llm, monkeypatch):
    """Also a second one, in the middle of handling the first: no request goes on running."""
    make, calls = LLM._make_output, []

    def interrupted(self, samples):
        calls.append(samples)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(self, samples)

    monkeypatch.setattr(LLM, "_make_output", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        llm.generate([[1], [2], [3]], [greedy(2), greedy(2), greedy(30)], use_tqdm=False)
    assert [output is not None for output in caught.value.outputs] == [True, True, False]
    assert_nothing_leaks(llm)


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
        assert [token_id in c for token_id, c in zip(prompt[1:], output.prompt_logprobs[1:])] == [True] * (
            len(prompt) - 1
        )
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
        if params.allowed_token_ids:
            assert set(token_ids) <= set(params.allowed_token_ids)
        if params.logprobs is None:
            assert sample.logprobs is None
            continue
        num_top = 128 if params.logprobs == -1 else params.logprobs
        assert len(sample.logprobs) == len(token_ids)
        for token_id, candidates in zip(token_ids, sample.logprobs):
            assert token_id in candidates
            assert num_top <= len(candidates) <= num_top + 1
            assert sorted(c.rank for c in candidates.values())[:num_top] == list(range(1, num_top + 1))
        assert sample.cumulative_logprob == pytest.approx(sum(c[t].logprob for t, c in zip(token_ids, sample.logprobs)))


@pytest.fixture(scope="module")
def small(tiny_model):
    return make_llm(
        tiny_model(), kvcache_block_size=4, num_kvcache_blocks=40, max_num_seqs=5, max_num_batched_tokens=37
    )


@settings(max_examples=100, deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from(PROMPTS), parameters), min_size=1, max_size=6))
def test_every_promise_of_every_parameter_holds(small, requests):
    prompts, params = [], []
    for prompt, asked in requests:
        if asked["temperature"] == 0:
            asked = asked | {"n": 1}
        asked["max_tokens"] = max(asked["max_tokens"], asked.get("min_tokens", 0))
        if asked.get("min_tokens") and set(asked.get("allowed_token_ids", ())) <= set(asked.get("stop_token_ids", ())):
            asked.pop("allowed_token_ids", None)
        prompts.append(prompt)
        params.append(SamplingParams(**asked))
    outputs = small.generate(prompts, params, use_tqdm=False)
    assert_nothing_leaks(small)
    for prompt, p, output in zip(prompts, params, outputs):
        check_promises(prompt, p, output)


def test_requests_that_ask_for_nothing_are_not_changed_by_those_that_do(llm):
    plain = SamplingParams(max_tokens=20, seed=1)
    alone = run(llm, PROMPTS[:4], [plain] * 4)
    beside = [plain] * 4 + [SamplingParams(max_tokens=20, seed=2, **extras) for extras in EXTRAS]
    assert run(llm, PROMPTS[:4] + PROMPTS[: len(EXTRAS)], beside)[:4] == alone
