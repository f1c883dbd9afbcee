"""What scripts for vLLM do, with the import changed."""

import io
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import tqdm
from helpers import PROMPTS, assert_nothing_leaks, greedy, make_llm, tokens

import nanovllm
from nanovllm import LLM, SamplingParams, TextPrompt, TokensPrompt


@pytest.fixture(scope="module")
def chat_llm(demo_model):
    return LLM(
        model=str(demo_model),
        dtype="float",
        trust_remote_code=True,
        max_model_len=256,
        max_num_seqs=None,
        disable_log_stats=True,
        device="cpu",
        num_kvcache_blocks=200,
    )


def test_a_basic_script(chat_llm):
    prompts = ["Hello, my name is", "The capital of France is", TextPrompt(prompt="The capital of France is")]
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=None, seed=3, max_tokens=5)
    outputs = chat_llm.generate(prompts, params, lora_request=None)
    assert [output.prompt for output in outputs] == prompts[:2] + [prompts[1]]
    assert all(output.outputs[0].text and len(output.outputs[0].token_ids) <= 5 for output in outputs)


def test_a_chat_with_the_models_own_sampling_that_is_changed(chat_llm):
    params = chat_llm.get_default_sampling_params()
    params.max_tokens, params.temperature = 6, 0
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = chat_llm.chat(conversation, params, use_tqdm=False, lora_request=None)
    assert len(output.outputs[0].token_ids) == 6
    assert chat_llm.get_default_sampling_params().max_tokens == 64
    with pytest.raises(ValueError, match=r"^lora_request must be None, got 'adapter'$"):
        chat_llm.chat(conversation, params, lora_request="adapter")


def test_parameters_that_are_changed_after_a_call_took_them_change_nothing_that_runs(tiny_model):
    llm = make_llm(tiny_model())
    params, expected = greedy(6), tokens(llm, [PROMPTS[3]], greedy(6))
    llm.add_request(PROMPTS[3], params)
    params.max_tokens, params.temperature = 2, 1.5
    found = []
    while not llm.is_finished():
        found += [token_ids for _, token_ids in llm.step()[0]]
    assert found == expected
    params.temperature = 0
    assert tokens(llm, [PROMPTS[3]], params) == [expected[0][:2]]
    params.top_p = 7
    with pytest.raises(ValueError, match=r"top_p must be .*, got 7"):
        llm.generate([PROMPTS[3]], params)
    assert_nothing_leaks(llm)


def test_every_way_to_pass_token_ids(tiny_model):
    llm, ids = make_llm(tiny_model()), [[5, 6, 7], [9, 8, 7]]
    expected = tokens(llm, ids, greedy(4))
    for prompts in np.array(ids), [np.array(i) for i in ids], [TokensPrompt(prompt_token_ids=i) for i in ids]:
        assert tokens(llm, prompts, greedy(4)) == expected
    outputs = llm.generate(prompt_token_ids=ids, sampling_params=greedy(4))
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert tokens(llm, np.array(ids[0]), greedy(4)) == expected[:1]
    for wrong in {}, {"prompts": ids, "prompt_token_ids": ids}:
        with pytest.raises(TypeError, match="either prompts or prompt_token_ids"):
            llm.generate(**wrong)
    with pytest.raises(TypeError, match=r"^prompts\[0\] must be text or a list of token ids, got 0.5"):
        llm.generate(np.array([0.5, 1.5]))


def test_a_bar_of_ones_own(tiny_model, capfd):
    llm, file = make_llm(tiny_model()), io.StringIO()
    capfd.readouterr()
    llm.generate([PROMPTS[3]] * 2, greedy(4), use_tqdm=partial(tqdm.tqdm, file=file))
    assert "2/2" in file.getvalue()
    assert capfd.readouterr().err == ""


def test_no_limit_goes_on_to_the_length(tiny_model):
    llm = make_llm(tiny_model(), max_model_len=40)
    (output,) = llm.generate([PROMPTS[3]], greedy(None, ignore_eos=True))
    assert len(output["token_ids"]) == 40 - len(PROMPTS[3])
    assert make_llm(tiny_model(), max_model_len=None).max_model_len == 256


def test_bad_words_are_not_in_the_text(chat_llm):
    prompt = "The capital of France is"
    (plain,) = chat_llm.generate(prompt, greedy(12))
    words = [" Paris", "and"] if "Paris" in plain["text"] else plain["text"].split()[:2]
    (output,) = chat_llm.generate(prompt, greedy(12, bad_words=words))
    assert not any(word.strip() in output["text"].split() for word in words)
    several = chat_llm.tokenizer.decode(plain["token_ids"][:3])  # its last token alone is still drawn
    (output,) = chat_llm.generate(prompt, greedy(12, bad_words=[several]))
    assert output["token_ids"][:2] == plain["token_ids"][:2]
    assert output["token_ids"][2] != plain["token_ids"][2]
    (last,) = chat_llm.generate(
        prompt, greedy(12, bad_words=[several, chat_llm.tokenizer.decode(plain["token_ids"][5:7])])
    )
    assert last["token_ids"][:3] == output["token_ids"][:3]


def test_the_version_is_the_packages():
    assert nanovllm.__version__ == version("nanovllm")
