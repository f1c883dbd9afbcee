"""The sampler draws from exactly the distribution that the parameters describe, and noise depends on nothing else."""

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import nanovllm.layers.sampler
from nanovllm import SamplingParams
from nanovllm.extras.truncation import least_kept
from nanovllm.layers.sampler import SamplingBatch, gumbel_noise, pack_sampling

COMBINATIONS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.15},
    "top-k and top-p": {"top_k": 8, "top_p": 0.8},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.85, "min_p": 0.05},
}


# For (seed, position) (1, 0) and (2**62, 1000), tokens 0 to 2; also computed with Python's integers.
FROZEN_NOISE = [[2.972445, 3.022993, -0.253061], [-0.061819, -1.091792, -0.328843]]


def make_batch(params, vocab_size):
    """A sampling batch of one row for each of `params`, each at position 1."""
    packed = torch.from_numpy(np.array([pack_sampling(p, p.seed or 0, vocab_size) for p in params]))
    return SamplingBatch(
        packed,
        torch.arange(len(params), dtype=torch.int32),
        torch.ones(len(params), dtype=torch.int32),
        is_random=any(p.temperature > 0 for p in params),
        is_truncated=any(p.is_truncated for p in params),
    )


def sample(logits, batch):
    last_token = torch.full((len(batch.sampling),), -1, dtype=torch.int32)
    token_ids = nanovllm.layers.sampler.sample(logits, batch, last_token)
    assert (last_token[batch.rows.long()] == token_ids).all() or len(set(batch.rows.tolist())) < len(batch.rows)
    return token_ids


def expected_probabilities(logits, params):
    """transformers' processors composed in our order: temperature, min-p, top-k, top-p."""
    scores = logits.clone()
    if params.temperature != 1:
        scores = TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_frequencies_match_the_exact_distribution(combination):
    """Chi-square over 40,000 draws, each at its own position."""
    num_draws = 40000
    params = SamplingParams(**COMBINATIONS[combination], seed=11)
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(3)) * 2
    expected = expected_probabilities(logits, params)[0].double()
    batch = make_batch([params], 24)
    batch.rows = torch.zeros(num_draws, dtype=torch.int32)
    batch.positions = torch.arange(num_draws)
    counts = torch.bincount(sample(logits.expand(num_draws, -1), batch), minlength=24).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert scipy.stats.chisquare(counts[kept], expected[kept] / expected[kept].sum() * num_draws).pvalue > 1e-4


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_kept_tokens_are_those_of_transformers(combination):
    params = SamplingParams(**COMBINATIONS[combination])
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(5)) * 3
    kept = logits.masked_fill(logits < least_kept(logits, make_batch([params] * 64, 1000))[:, None], -torch.inf)
    probabilities = (kept / params.temperature).softmax(-1)
    torch.testing.assert_close(probabilities, expected_probabilities(logits, params))


def test_top_p_keeps_the_token_that_crosses_the_boundary():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, num_kept in ((0.4, 1), (0.5, 1), (0.6, 2), (0.79, 2), (0.9, 3), (1.0, 3)):
        least = least_kept(logits, make_batch([SamplingParams(top_p=top_p)], 3))
        assert (logits >= least).sum() == num_kept


def test_ties_with_the_last_one_are_kept_and_everything_where_a_row_is_greedy_or_leaves_nothing_out():
    params = [{"temperature": 0, "top_k": 1}, {"top_k": 1}, {"top_k": 2}, {}]
    logits = torch.tensor([[3.0, 1.0, -torch.inf, 1.0]]).expand(4, -1)
    least = least_kept(logits, make_batch([SamplingParams(**p) for p in params], 4))
    assert least.tolist() == [-torch.inf, 3.0, 1.0, 1.0]


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("bad", [[-torch.inf] * 4, [torch.nan] * 4, [1.0, torch.nan, 2.0, 3.0]], ids=str)
def test_a_row_from_which_no_token_can_be_drawn_is_marked(params, bad):
    """A processor may have banned them all, or an overflow made them NaN. The next step reads a token all the same."""
    logits = torch.tensor([[0.0, 9.0, -torch.inf, 0.0], bad])
    batch = make_batch([SamplingParams(**params)] * 2, 4)
    last_token = torch.full((len(batch.sampling),), 7, dtype=torch.int32)
    token_ids = nanovllm.layers.sampler.sample(logits, batch, last_token)
    assert token_ids[1] == -1
    assert last_token[batch.rows].tolist() == [token_ids[0], 0]


def test_greedy_takes_the_lowest_of_tied_tokens_also_beside_random_rows():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]]).repeat(2, 1).bfloat16()
    greedy = SamplingParams(temperature=0)
    assert sample(logits, make_batch([greedy, greedy], 4)).tolist() == [1, 1]
    for seed in range(20):
        batch = make_batch([greedy, SamplingParams(seed=seed, top_p=0.5)], 4)
        assert sample(logits, batch)[0] == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-300, 1e30])
def test_tiny_temperatures_are_greedy_and_the_highest_draws_only_what_is_kept(temperature):
    logits = torch.tensor([[5.0, 80.0, 79.0, -100.0]]).expand(20, -1)
    params = [SamplingParams(temperature=temperature, seed=i, top_k=int(temperature > 1)) for i in range(20)]
    assert sample(logits, make_batch(params, 4)).tolist() == [1] * 20


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    """A neighbour that truncates must not cut the tail of a row that keeps everything."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)).expand(300, -1)
    plain = [SamplingParams(seed=i) for i in range(299)]
    alone = sample(logits[:299], make_batch(plain, 5000))
    beside = sample(logits, make_batch([*plain, SamplingParams(seed=0, top_k=1, min_p=0.5, top_p=0.1)], 5000))
    assert alone.tolist() == beside[:299].tolist()


def test_noise_is_a_pure_function_of_seed_position_and_token():
    seeds, positions = torch.tensor([1, 2, 1, -(2**63)]), torch.tensor([5, 5, 6, 5])
    noise = gumbel_noise(seeds, positions, 1000)
    for i in range(4):
        assert torch.equal(gumbel_noise(seeds[i : i + 1], positions[i : i + 1], 500)[0], noise[i, :500])
    assert len(torch.unique(noise)) > 3990, "seeds and positions give different noise"


def test_noise_is_gumbel_and_always_finite():
    noise = gumbel_noise(torch.arange(40), torch.arange(40) * 7, 152000)
    assert noise.isfinite().all()
    assert scipy.stats.kstest(noise[:, ::97].flatten().numpy(), "gumbel_r").pvalue > 1e-3
    columns = noise[:, :2000].double()
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 0.12, "rows are independent"
    assert torch.corrcoef(noise.double()[:, :400].t()).fill_diagonal_(0).abs().mean() < 0.15, "columns are too"


def test_noise_never_changes():
    """Seeded results must survive a new version: these values are part of what a seed means."""
    noise = gumbel_noise(torch.tensor([1, 2**62]), torch.tensor([0, 1000]), 3)
    torch.testing.assert_close(noise, torch.tensor(FROZEN_NOISE), atol=1e-5, rtol=0)
