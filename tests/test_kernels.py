"""Every Triton kernel gives what its PyTorch twin gives: in Triton's interpreter without a GPU, and on one.

The interpreter multiplies bfloat16 matrices wrongly: there float16 stands in for it.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton")

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.attention.triton import TritonAttention, split_chunks, split_decodes
from nanovllm.engine.batch import Batch, int32
from nanovllm.kernels.gumbel import gumbel_max
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RopeConfig, RotaryEmbedding
from nanovllm.layers.sampler import SamplingBatch, gumbel_noise, pack_sampling
from nanovllm.sampling_params import SamplingParams

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF = {"cpu": torch.float16, "cuda": torch.bfloat16}


def model(num_heads, num_kv_heads, head_dim, dtype):
    return SimpleNamespace(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)


def make_batch(config, device, block_size, context_lens, query_lens=None):
    """A batch of random block tables, (query, keys and values) for it in float32, and the caches' shape."""
    generator = torch.Generator().manual_seed(0)
    is_decode = query_lens is None
    lens = int32(context_lens)
    queries = np.ones_like(lens) if is_decode else int32(query_lens)
    per_row = -(-int(lens.max()) // block_size)
    num_rows = len(lens) + 2
    tables = torch.randperm(num_rows * per_row, generator=generator).int().view(num_rows, per_row)
    shape = (num_rows * per_row, block_size, config.num_kv_heads, config.head_dim)
    q = torch.randn(int(queries.sum()), config.num_heads, config.head_dim, generator=generator)
    k, v = torch.randn(2, *shape, generator=generator)
    rows = torch.randperm(num_rows, generator=generator)[: len(lens)].int()
    batch = Batch(
        is_decode=is_decode,
        input_ids=torch.zeros(len(q), dtype=torch.int32, device=device),
        positions=torch.zeros(0),
        slot_mapping=torch.zeros(0),
        rows=rows.to(device),
        context_lens=torch.from_numpy(lens).to(device),
        block_tables=tables.to(device),
        block_size=block_size,
        query_lens=queries,
        cpu_context_lens=lens,
        plan=[],
    )
    return batch, [x.to(device, config.dtype) for x in (q, k, v)]


def attend(backend, batch, tensors):
    plan = backend.plan(batch.is_decode, batch.query_lens, batch.cpu_context_lens)
    batch.plan = [torch.from_numpy(array).to(batch.rows.device) for array in plan]
    batch.attention = backend.prepare(batch)
    return backend.attend(*tensors, batch)


def assert_attention_is_the_references(config, device, block_size, context_lens, query_lens=None):
    batch, tensors = make_batch(config, device, block_size, context_lens, query_lens)
    out = attend(TritonAttention(config, torch.device(device)), batch, tensors)
    expected = attend(ReferenceAttention(), batch, [x.float() for x in tensors])
    tolerance = TOLERANCES[config.dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


CONTEXTS = [1, 300, 17, 64, 129, 5]
SHAPES = [(4, 2, 64), (6, 2, 80), (3, 1, 96), (2, 2, 128), (7, 1, 64), (2, 1, 256), (20, 1, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["float32", "half"])
def test_decode_attention(shape, precision, device):
    dtype = torch.float32 if precision == "float32" else HALF[device]
    assert_attention_is_the_references(model(*shape, dtype), device, 16, CONTEXTS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["float32", "half"])
def test_prefill_attention(shape, precision, device):
    """Chunks: whole prompts, the rest after a cached prefix, one token after it."""
    dtype = torch.float32 if precision == "float32" else HALF[device]
    assert_attention_is_the_references(model(*shape, dtype), device, 16, [70, 100, 33, 1], [70, 37, 1, 1])


@pytest.mark.parametrize("block_size", [1, 16, 48, 64, 256])
def test_block_sizes(block_size, device):
    config = model(4, 2, 64, torch.float32)
    assert_attention_is_the_references(config, device, block_size, CONTEXTS)
    assert_attention_is_the_references(config, device, block_size, [70, 100], [70, 37])


@pytest.mark.parametrize("context_lens", [[3000], [2000] + [1] * 9, [700] * 3, list(range(1, 60))], ids=str)
def test_uneven_contexts_and_rows_cut_into_many_parts(context_lens, device):
    assert_attention_is_the_references(model(2, 1, 64, torch.float32), device, 16, context_lens)


def test_a_layer_leaves_the_workspace_as_it_found_it(device):
    """Every layer of a step uses the same arrival counters: each must find zeros."""
    config = model(4, 2, 64, torch.float32)
    batch, tensors = make_batch(config, device, 16, CONTEXTS)
    backend = TritonAttention(config, torch.device(device))
    first = attend(backend, batch, tensors)
    torch.testing.assert_close(backend.attend(*tensors, batch), first, atol=0, rtol=0)
    assert not batch.attention.arrivals.any()


@settings(max_examples=200, deadline=None)
@given(
    lens=st.lists(st.integers(1, 2000), min_size=1, max_size=40),
    num_lists=st.integers(1, 50),
    tile=st.sampled_from([16, 64]),
)
def test_decode_lists_cover_every_token_once_and_are_equally_long(lens, num_lists, tile):
    bounds, items, members = split_decodes(int32(lens), num_lists, tile)
    assert len(items) == len(members) == len(lens) + num_lists
    assert len(bounds) == num_lists + 1
    assert bounds[0] == 0
    num_items = bounds[-1]
    covered = {row: [] for row in range(len(lens))}
    for start, end, first, count in items[:num_items].tolist():
        assert count == 1
        covered[members[first, 0]].append((start, end, *members[first, 1:].tolist()))
    for row, parts in covered.items():
        edges = [0, *(end for _, end, *_ in parts)]
        assert [start for start, *_ in parts] == edges[:-1]
        assert edges[-1] == lens[row]
        assert [part for _, _, part, *_ in parts] == list(range(parts[0][3], parts[0][3] + len(parts)))
        assert {(first, count) for *_, first, count in parts} == {(parts[0][3], len(parts))}
    work = [sum(-(-(e - s) // tile) for s, e, *_ in items[a:b].tolist()) for a, b in zip(bounds, bounds[1:])]
    assert max(work) == -(-sum(-(-n // tile) for n in lens) // num_lists)


@given(
    chunks=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 300)), min_size=1, max_size=10),
    tile=st.integers(1, 64),
)
def test_prefill_tiles_cover_every_token_once(chunks, tile):
    query_lens, cached = np.array(chunks, np.int32).T
    tiles = split_chunks(query_lens, query_lens + cached, tile)
    first = query_lens.cumsum() - query_lens
    seen = [
        (i, start + t - first[i], position + t - cached[i])
        for i, start, count, position in tiles.tolist()
        for t in range(count)
    ]
    assert all(count <= tile for _, _, count, _ in tiles.tolist())
    assert sorted(seen) == [(i, t, t) for i, n in enumerate(query_lens) for t in range(n)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 80), (16, 8, 128)])
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("precision", ["float32", "half"])
def test_norm_rotate_store(num_heads, num_kv_heads, head_dim, has_norm, precision, device):
    dtype = torch.float32 if precision == "float32" else HALF[device]
    torch.manual_seed(0)
    num_tokens = 5
    config = model(num_heads, num_kv_heads, head_dim, dtype)
    norms = None
    if has_norm:
        norms = tuple(RMSNorm(head_dim, 1e-6, torch.float32).to(device) for _ in range(2))
        for norm in norms:
            norm.weight.normal_(1.0, 0.2)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device)
    rotary = RotaryEmbedding(RopeConfig(), head_dim, 128).to(device)(torch.tensor([3, 0, 99, 7, 50], device=device))
    batch = SimpleNamespace(slot_mapping=torch.tensor([5, 0, 31, 16, 9], device=device))
    results = []
    for backend, to in ((AttentionBackend(), torch.float32), (TritonAttention(config, torch.device(device)), dtype)):
        caches = torch.zeros(2, 2, 16, num_kv_heads, head_dim, dtype=to, device=device)
        cast = norms and tuple(SimpleNamespace(weight=norm.weight.to(to), eps=norm.eps) for norm in norms)
        if to == torch.float32:
            cast = norms
        results.append((backend.store(qkv.to(to, copy=True), cast, rotary, *caches, batch), *caches))
    for ours, expected in zip(results[1], results[0]):
        torch.testing.assert_close(ours.float(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e-6, 30.0])
def test_gumbel_max(dtype, temperature, device):
    """The token has the highest noisy score, up to the rounding of the logarithms; greedy is exact, ties to the lowest."""
    torch.manual_seed(0)
    num_rows, vocab_size = 3, 5000
    logits = (torch.randn(num_rows, vocab_size) * 3).to(device, dtype)
    logits[:, 4000] = logits[:, 77] = logits.amax(-1)
    packed = [pack_sampling(SamplingParams(temperature=temperature), 2**40 + i, vocab_size) for i in range(5)]
    sampling = torch.from_numpy(np.array(packed)).to(device)
    rows = torch.tensor([4, 1, 2], dtype=torch.int32, device=device)
    positions = torch.tensor([0, 9, 1000], dtype=torch.int32, device=device)
    last_token = torch.full((5,), -1, dtype=torch.int32, device=device)
    drawn = gumbel_max(logits, rows, positions, sampling, last_token).long()
    batch = SamplingBatch.unpack(sampling[rows], positions, is_random=True, is_truncated=False)
    scores = logits.float() + gumbel_noise(batch.seeds, positions, vocab_size) * temperature
    best = scores.max(-1).values
    assert (scores.gather(1, drawn[:, None])[:, 0] >= best - 1e-5 * best.abs()).all()
    assert torch.equal(last_token[rows.long()].long(), drawn)
    assert (last_token[[0, 3]] == -1).all()
    if temperature == 0:
        assert drawn.tolist() == logits.float().max(-1).indices.tolist() == [77, 77, 77]
