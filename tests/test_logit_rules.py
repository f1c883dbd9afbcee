"""Penalties, bias, bans and processors: the numbers are transformers' or the formula's, and rows do not mix."""

from array import array
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from helpers import completions, greedy

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.extras.logit_rules import apply_rules

VOCAB_SIZE = 50
PROMPT, COMPLETION = [3, 4, 4, 9], [9, 9, 1]


def make_sequence(completion=COMPLETION, **params):
    seq = Sequence(0, array("i", PROMPT), SamplingParams(**params), seed=0, max_tokens=64)
    for token_id in completion:
        seq.append(token_id, None, 0.0)
    return seq


def adjusted(logits, *sequences):
    before = logits.clone()
    asking = [(i, seq) for i, seq in enumerate(sequences) if seq.has_logit_rules]
    after = apply_rules(logits, asking, lambda values: torch.as_tensor(np.asarray(values)))
    assert torch.equal(logits, before), "the raw logits are still needed"
    assert after.dtype == torch.float32
    return after


@pytest.fixture
def logits():
    return torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty, logits):
    """Over prompt and completion; a token that is there twice counts once."""
    plain, seq = make_sequence(), make_sequence(repetition_penalty=penalty)
    after = adjusted(logits, plain, seq, plain)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    torch.testing.assert_close(after[1:2], processor(torch.tensor([seq.token_ids]), logits[1:2].clone()))
    assert torch.equal(after[[0, 2]], logits[[0, 2]])


def test_greedy_with_repetition_penalty_is_that_of_transformers(demo):
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.config.model, dtype=torch.float32)
    for output in demo.generate(
        ["The capital of France is", "One two one two one"], greedy(40, repetition_penalty=1.2)
    ):
        ids = torch.tensor([output.prompt_token_ids])
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        assert output["token_ids"] == expected[0, ids.shape[1] :].tolist()


def test_presence_and_frequency_penalties_are_the_formulas_over_the_completion_as_it_grows(logits):
    seq, counts = make_sequence([], presence_penalty=0.5, frequency_penalty=-0.25), torch.zeros(VOCAB_SIZE)
    for token_id in [9, 1, 9, 9, 7]:  # some of which are in the prompt too
        torch.testing.assert_close(adjusted(logits[:1], seq)[0], logits[0] - 0.5 * (counts > 0) + 0.25 * counts)
        seq.append(token_id, None, 0.0)
        counts[token_id] += 1


def test_each_row_has_its_own_penalties_and_counts():
    rows = 133
    plain = make_sequence()
    penalized = [make_sequence([i % VOCAB_SIZE] * (i % 7), frequency_penalty=i % 3 - 0.5) for i in range(rows)]
    expected = torch.zeros(2 * rows, VOCAB_SIZE)
    for i in range(rows):
        expected[2 * i + 1, i % VOCAB_SIZE] = -(i % 7) * (i % 3 - 0.5)
    after = adjusted(torch.zeros(2 * rows, VOCAB_SIZE), *(seq for pair in penalized for seq in (plain, pair)))
    assert torch.equal(after, expected)


def test_bias_is_added_and_bans_and_allowed_tokens_leave_the_rest(logits):
    biased = make_sequence(logit_bias={2: 3.5, 49: -100.0})
    early = make_sequence([1], min_tokens=2, stop_token_ids=[7, 8], logit_bias={7: 100.0})
    few = make_sequence(allowed_token_ids=[10, 3], logit_bias={3: 1.0, 4: 1.0})
    expected = logits.clone()
    expected[0, 2] += 3.5
    expected[0, 49] -= 100.0
    expected[1, [7, 8]] = expected[2] = -torch.inf
    expected[2, [10, 3]] = logits[2, [10, 3]] + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(adjusted(logits, biased, early, few), expected)


@pytest.mark.parametrize("more", [{}, {"logit_bias": {9: 1.0}}], ids=str)
def test_stop_tokens_are_banned_until_there_are_min_tokens(more, logits):
    seq = make_sequence([], min_tokens=3, stop_token_ids=[1, 2], **more)
    for num_tokens in range(5):
        banned = adjusted(logits[:1], seq)[0].isinf().nonzero().flatten().tolist()
        assert banned == ([1, 2] if num_tokens < 3 else [])
        seq.append(5, None, 0.0)


def test_processors_come_in_order_after_the_rest_and_see_their_own_request(logits):
    calls = []

    def two(token_ids, row):
        calls.append((list(token_ids), row.clone()))
        return row + 1

    def three(prompt_ids, token_ids, row):
        calls.append((list(prompt_ids), list(token_ids), row.clone()))
        row[0] = 77.0  # in place
        return row

    after = adjusted(logits, make_sequence(), make_sequence(logits_processors=[two, three], logit_bias={2: 1.0}))
    assert calls[0][0] == COMPLETION
    assert calls[1][:2] == (PROMPT, COMPLETION)
    biased = logits[1].clone()
    biased[2] += 1
    torch.testing.assert_close(calls[0][1], biased)
    torch.testing.assert_close(calls[1][2], biased + 1)
    biased[0] = 76.0
    torch.testing.assert_close(after[1], biased + 1)
    assert torch.equal(after[0], logits[0])


def test_a_processor_may_have_parameters_of_its_own(llm):
    def only(token_ids, logits, token_id=7):
        return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([token_id]), 0.0)

    params = [greedy(2, logits_processors=[f]) for f in (only, partial(only, token_id=9))]
    assert completions(llm, [[1], [1]], params) == [[[7, 7]], [[9, 9]]]
    early = greedy(6, min_tokens=3, stop_token_ids=[7], logits_processors=[only])
    assert completions(llm, [[1]], early) == [[[7] * 4]], "what a processor forces does not stop too early either"


@pytest.mark.parametrize("returned", [None, torch.zeros(3)], ids=str)
def test_a_processor_that_returns_no_logits_is_named(returned, logits):
    with pytest.raises(TypeError, match=r"logits_processors: .*lambda.* must return logits \[50\]"):
        adjusted(logits[:1], make_sequence(logits_processors=[lambda ids, row: returned]))
