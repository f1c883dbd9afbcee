"""Log-probabilities of tokens drawn and of prompts: the numbers, their ranks, and what scheduling must not change.

How many candidates there are, test_api.py asserts of random parameters; the values of those drawn are compared to
transformers' in test_vs_transformers.py, and texts are in test_text.py.
"""

import pytest
import torch
import transformers
from helpers import PROMPTS, greedy, make_llm

from nanovllm.extras.logprobs import largest_by_groups


@pytest.mark.parametrize("num", [0, 1, 5, 40, 1280])
def test_largest_by_groups_is_topk(num):
    torch.manual_seed(0)
    logits = torch.randn(6, 2560).bfloat16()[:, :1280]  # ties, and rows that are not adjacent
    logits[1] = 0.0
    logits[2, 100:] = -torch.inf
    values, ids = largest_by_groups(logits, num)
    assert torch.equal(values, logits.topk(num).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == num for row in ids.tolist())


@pytest.mark.parametrize("budget", [16384, 5])
def test_prompt_logprobs_are_those_of_transformers(budget, tiny_model):
    """Also where the prompt is in the prefix cache, and where it is cut into chunks."""
    folder = tiny_model()
    llm = make_llm(folder, max_num_batched_tokens=budget, kvcache_block_size=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [p for p in PROMPTS if len(p) > 1][:6]
    llm.generate(prompts, greedy(3))
    nums = [0, 3, -1] * 2
    outputs = llm.generate(prompts, [greedy(3, prompt_logprobs=n) for n in nums])
    for prompt, num_top, output in zip(prompts, nums, outputs):
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.num_cached_tokens == 0
        first, *rest = output.prompt_logprobs
        assert first is None
        assert len(rest) == len(prompt) - 1
        for row, token_id, candidates in zip(expected, prompt[1:], rest):
            order = row.argsort(descending=True).tolist()
            assert set(candidates) == {token_id, *order[: 128 if num_top == -1 else num_top]}
            for candidate, value in candidates.items():
                assert value.logprob == pytest.approx(row[candidate].item(), abs=1e-4)
                assert value.rank == order.index(candidate) + 1


def test_prompt_logprobs_survive_a_preemption(tiny_model):
    params = [greedy(30, prompt_logprobs=1)] * 6
    expected = make_llm(tiny_model()).generate(PROMPTS[6:12], params)
    llm = make_llm(tiny_model(), kvcache_block_size=4, num_kvcache_blocks=34, max_num_batched_tokens=30)
    outputs = llm.generate(PROMPTS[6:12], params)
    assert llm.stats()["num_preemptions"] > 0
    for output, wanted in zip(outputs, expected):
        assert len(output.prompt_logprobs) == len(wanted.prompt_logprobs)
        for ours, theirs in zip(output.prompt_logprobs[1:], wanted.prompt_logprobs[1:]):
            assert {t: c.logprob for t, c in ours.items()} == pytest.approx(
                {t: c.logprob for t, c in theirs.items()}, abs=1e-4
            )
