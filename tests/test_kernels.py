"""Every Triton kernel gives what its PyTorch twin gives: in Triton's interpreter without a GPU, and on one.

The interpreter multiplies bfloat16 matrices wrongly: there float16 stands in for it.
"""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton")

from nanovllm.attention.reference import ReferenceAttention
from nanovllm.attention.triton import TritonAttention
from nanovllm.attention.work_lists import DecodeLists, split_chunks, split_decodes
from nanovllm.engine.batch import Batch, DeviceTables, int32
from nanovllm.engine.shared_prefixes import MAX_PARTS_PER_ROW, SharedPrefixes, SharedRuns, nested_runs
from nanovllm.extras import logprobs, logprobs_kernel, truncation, truncation_kernel
from nanovllm.kernels.decode_inputs import decode_inputs
from nanovllm.kernels.few_rows import most_rows as most_rows_of_product
from nanovllm.kernels.gumbel import gumbel_max
from nanovllm.layers.linear import Linear
from nanovllm.layers.rotary import RopeConfig, RotaryEmbedding
from nanovllm.layers.sampler import SamplingBatch, gumbel_noise, pack_sampling
from nanovllm.parallel.all_reduce import PROGRAMS, all_reduce, memory_bytes
from nanovllm.sampling_params import SamplingParams

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF = {"cpu": torch.float16, "cuda": torch.bfloat16}
precisions = pytest.mark.parametrize("is_half", [False, True], ids=["float32", "half"])


def model(num_heads, num_kv_heads, head_dim, dtype):
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    return SimpleNamespace(**sizes, dtype=dtype)


def make_case(config, device, block_size, context_lens, query_lens=None, has_norm=True, shared=()):
    """A batch on random block tables, and for it in float32: qkv, norms, rotary, and caches [2, ...] with a past, which have
    NaN wherever no token of the batch is. `shared` are (places in the batch, how many blocks their tables begin with in common).
    """
    generator = torch.Generator().manual_seed(0)
    is_decode = query_lens is None
    lens = int32(context_lens)
    queries = np.ones_like(lens) if is_decode else int32(query_lens)
    per_row = -(-int(lens.max()) // block_size)
    num_rows = len(lens) + 2
    num_blocks = 1 + num_rows * per_row  # block 0 is nobody's
    tables = 1 + torch.randperm(num_blocks - 1, generator=generator).int().view(num_rows, per_row)
    rows = torch.randperm(num_rows, generator=generator)[: len(lens)].int()
    for places, num_shared in shared:
        tables[rows[places], :num_shared] = tables[rows[places[0]], :num_shared]
    pairs = list(zip(rows.tolist(), lens.tolist(), queries.tolist()))
    positions = torch.tensor([p for _, end, n in pairs for p in range(end - n, end)])
    token_rows = torch.tensor([row for row, _, n in pairs for _ in range(n)])
    slots = tables[token_rows, positions // block_size] * block_size + positions % block_size
    num_heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = torch.randn(len(positions), num_heads + 2 * kv_heads, head_dim, generator=generator)
    caches = torch.full((2, num_blocks, block_size, kv_heads, head_dim), torch.nan)
    for row, end, _ in pairs:
        past = tables[row].repeat_interleave(block_size)[:end] * block_size + torch.arange(end) % block_size
        caches.flatten(1, 2)[:, past] = torch.randn(2, end, kv_heads, head_dim, generator=generator)
    norms = tuple(torch.nn.RMSNorm(head_dim, 1e-6).requires_grad_(False) for _ in range(2)) if has_norm else None
    for norm in norms or ():
        norm.weight.normal_(1.0, 0.2, generator=generator)
        norm.to(device)
    rotary = RotaryEmbedding(RopeConfig(), head_dim, int(lens.max()))(positions)
    batch = Batch(
        is_decode=is_decode,
        input_ids=torch.zeros(len(positions), dtype=torch.int32, device=device),
        positions=positions.int().to(device),
        slot_mapping=slots.long().to(device),
        rows=rows.to(device),
        context_lens=torch.from_numpy(lens).to(device),
        block_tables=tables.to(device),
        block_size=block_size,
        query_lens=queries,
        cpu_context_lens=lens,
        work_list=[],
    )
    return batch, qkv.to(device), norms, tuple(x.to(device) for x in rotary), caches.to(device)


def forward(backend, dtype, batch, qkv, norms, rotary, caches):
    """Attention in `dtype`, the queries that it is of, and the caches that it leaves."""
    tables, rows = batch.block_tables.cpu().numpy(), batch.rows.cpu().numpy()
    prefixes = SharedPrefixes(*tables.shape, batch.block_size)
    prefixes.block_tables[:], prefixes.num_shared_blocks[:] = tables, tables.shape[1]
    shared = prefixes.find(rows, batch.cpu_context_lens, backend.shared_tokens) if batch.is_decode else None
    packed = SimpleNamespace(
        is_decode=batch.is_decode, rows=rows, query_lens=batch.query_lens, context_lens=batch.cpu_context_lens
    )
    plan = backend.plan(packed, shared)
    batch.work_list = [torch.from_numpy(array).to(batch.rows.device) for array in plan]
    batch.attn_metadata = backend.prepare(batch)
    if norms is not None and dtype != torch.float32:
        norms = tuple(SimpleNamespace(weight=norm.weight.to(dtype), eps=norm.eps) for norm in norms)
    caches = caches.to(dtype, copy=True)
    q = backend.store(qkv.to(dtype, copy=True), norms, rotary, *caches, batch)
    return backend.attend(q, *caches, batch), q, caches


def assert_attention_is_the_references(config, device, block_size, *lens, backend=None, **options):
    case = make_case(config, device, block_size, *lens, **options)
    ours = forward(backend or TritonAttention(config, torch.device(device), block_size), config.dtype, *case)
    expected = forward(ReferenceAttention(), torch.float32, *case)
    tolerance = TOLERANCES[config.dtype]
    assert expected[0].isfinite().all()
    for tensor, reference in zip(ours, expected):
        used = ~reference.isnan()
        torch.testing.assert_close(tensor.float()[used], reference[used], atol=tolerance, rtol=tolerance)


CONTEXTS = [1, 300, 17, 64, 129, 5]
SHAPES = [(4, 2, 64), (4, 2, 8), (6, 2, 80), (3, 1, 96), (2, 2, 128), (7, 1, 64), (2, 1, 256), (20, 1, 64)]


CHUNKS = [70, 200, 33, 1], [70, 20, 1, 1]  # whole prompts, the rest after a cached prefix, one token after it
decode_and_prefill = pytest.mark.parametrize("lens", [(CONTEXTS, None), CHUNKS], ids=["decode", "prefill"])


@pytest.mark.parametrize(("shape", "has_norm"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)], ids=str)
@decode_and_prefill
@precisions
def test_attention(shape, has_norm, lens, is_half, device):
    config = model(*shape, HALF[device] if is_half else torch.float32)
    assert_attention_is_the_references(config, device, 64, *lens, has_norm=has_norm)


@pytest.mark.parametrize("block_size", [1, 16, 48, 64, 256])
@precisions
def test_block_sizes(block_size, is_half, device):
    config = model(4, 2, 64, HALF[device] if is_half else torch.float32)
    assert_attention_is_the_references(config, device, block_size, CONTEXTS)
    assert_attention_is_the_references(config, device, block_size, [70, 100], [70, 37])


@pytest.mark.parametrize("context_lens", [[3000], [2000] + [1] * 9, [700] * 3, list(range(1, 60))], ids=str)
def test_uneven_contexts_and_rows_cut_into_many_parts(context_lens, device):
    assert_attention_is_the_references(model(2, 1, 64, torch.float32), device, 16, context_lens)


SHARED_LENS = [140 + 7 * i for i in range(20)] + [
    33,
    64,
    200,
]  # two blocks of 64 for 20, a third for 9, two more for 3; 3 alone
SHARED = [(range(20), 2), (range(3, 12), 3), (range(17, 20), 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@precisions
def test_rows_that_share_blocks(shape, is_half, device):
    config = model(*shape, HALF[device] if is_half else torch.float32)
    lens = [max(n, 65 * most) for n, most in zip(SHARED_LENS, [2] * 3 + [3] * 9 + [2] * 5 + [4] * 3 + [0] * 3)]
    assert_attention_is_the_references(config, device, 64, lens, shared=SHARED)
    assert_attention_is_the_references(config, device, 16, lens, shared=[(r, 4 * n) for r, n in SHARED])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 2, 64), (6, 2, 80), (3, 1, 96), (2, 2, 128), (8, 1, 128), (2, 1, 256)], ids=str)
@decode_and_prefill
def test_flash_attn(shape, lens):
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    from nanovllm.attention.flash import FlashAttention

    config = model(*shape, torch.bfloat16)
    backend = FlashAttention(config, torch.device("cuda"))
    assert_attention_is_the_references(config, "cuda", backend.block_size, *lens, backend=backend)


def test_a_layer_leaves_the_workspace_as_it_found_it(device):
    """Every layer of a step uses the same arrival counters: each must find zeros."""
    config = model(4, 2, 64, torch.float32)
    batch, qkv, norms, rotary, caches = make_case(config, device, 16, CONTEXTS)
    backend = TritonAttention(config, torch.device(device), 16)
    first, q, caches = forward(backend, torch.float32, batch, qkv, norms, rotary, caches)
    assert not batch.attn_metadata.arrivals.any()
    again = backend.attend(q, *caches, batch)
    torch.testing.assert_close(again, first, atol=0, rtol=0)


@settings(max_examples=300, deadline=None)
@given(
    common=st.lists(st.sampled_from([0, 0, 1, 1, 2, 5, 40]), max_size=39),
    own_lens=st.lists(st.integers(1, 900), min_size=40, max_size=40),
    num_lists=st.integers(1, 50),
    tile=st.sampled_from([16, 64]),
    limits=st.sampled_from([(1, 1), (1, 2), (2, 4), (8, 16), (3, 32)]),
    seed=st.integers(0, 99),
)
def test_decode_lists_cover_every_token_once_and_take_equally_long(common, own_lens, num_lists, tile, limits, seed):
    """Of random trees of prefixes, of so many tiles."""
    num_rows, (few_rows, most_rows) = len(common) + 1, limits
    common = int32(common) * tile
    runs = int32(nested_runs(common.tolist())).reshape(-1, 4)
    if runs[:, 1].sum() > (MAX_PARTS_PER_ROW - 1) * num_rows or most_rows == 1:
        common, runs = common * 0, runs[:0]
    order = np.random.default_rng(seed).permutation(num_rows)
    own_starts = np.maximum(np.append(common, 0), np.append(0, common))
    lens = np.empty(num_rows, np.int32)
    lens[order] = own_starts + own_lens[:num_rows]
    rows = int32(range(7, 7 + num_rows))
    shared = SharedRuns(order, runs, own_starts)
    (*bounds, num_tall), items, pairs, part_starts = split_decodes(
        rows, lens, shared, num_lists, tile, few_rows, most_rows
    )
    most_parts = num_rows * (1 if most_rows == 1 else MAX_PARTS_PER_ROW)
    assert len(items) == most_parts + num_lists
    assert len(pairs) == most_parts + num_lists * min(most_rows, num_rows)
    assert (len(bounds), len(part_starts), bounds[0]) == (num_lists + 1, num_rows + 1, 0)
    covered, numbers = [[] for _ in rows], []
    for i, (table, first, num, start, end, is_whole) in enumerate(items[: bounds[-1]].tolist()):
        assert start < end
        assert start % tile == 0
        assert num <= (most_rows if i < num_tall else few_rows)
        assert table == rows[pairs[first][0]]
        for row, part in pairs[first : first + num].tolist():
            covered[row].append((start, end))
            numbers.append(part)
            assert part_starts[row] <= part < part_starts[row + 1]
            assert is_whole == (part_starts[row + 1] - part_starts[row] == 1)
    assert sorted(numbers) == list(range(part_starts[-1]))
    for parts, length in zip(covered, lens):
        starts, ends = zip(*sorted(parts))
        assert (*starts, length) == (0, *ends)
    work = [sum(-(-(end - start) // tile) for *_, start, end, _ in items[a:b].tolist()) for a, b in pairwise(bounds)]
    assert max(work) <= -(-(sum(work) + bounds[-1]) // num_lists), "an item counts as one tile more than it has"
    lists = DecodeLists(num_lists, tile, few_rows, most_rows)
    for later in lens, lens + 1, lens + 2:
        arrays = split_decodes(rows, later, shared, num_lists, tile, few_rows, most_rows)
        for array, kept in zip(arrays, lists.split(rows, later, shared), strict=True):
            np.testing.assert_array_equal(kept, array)


@given(
    chunks=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 300)), min_size=1, max_size=10),
    tile=st.integers(1, 64),
)
def test_prefill_tiles_cover_every_token_once(chunks, tile):
    query_lens, cached = np.array(chunks, np.int32).T
    items = split_chunks(query_lens, query_lens + cached, tile)
    first = query_lens.cumsum() - query_lens
    seen = []
    for i, start, count, position in items.tolist():
        assert count <= tile
        seen += [(i, start + t - first[i], position + t - cached[i]) for t in range(count)]
    assert sorted(seen) == [(i, t, t) for i, n in enumerate(query_lens) for t in range(n)]


def pack(params, vocab_size, device, first_seed=0):
    """The parameters of rows, as a device has them, and the rows' numbers."""
    packed = [pack_sampling(SamplingParams(**p), first_seed + i, vocab_size) for i, p in enumerate(params)]
    return torch.from_numpy(np.array(packed)).to(device), torch.arange(len(params), dtype=torch.int32, device=device)


@pytest.mark.parametrize("num_rows", [1, 130])
@pytest.mark.parametrize("block_size", [16, 24])
def test_decode_inputs(num_rows, block_size, device):
    sizes = SimpleNamespace(max_num_seqs=200, max_num_batched_tokens=256)
    tables = DeviceTables(sizes, 1000, block_size, torch.device("cpu"))
    rng = np.random.default_rng(num_rows)
    for table in tables.block_tables, tables.last_token:
        table.copy_(torch.from_numpy(rng.integers(0, 10**6, table.shape)))
    rows = torch.from_numpy(rng.permutation(200)[:num_rows].astype(np.int32) + 1)
    context_lens = torch.from_numpy(rng.integers(1, 1001, num_rows, dtype=np.int32))
    given = (tensor.to(device) for tensor in (rows, context_lens, tables.last_token, tables.block_tables))
    for ours, theirs in zip(decode_inputs(*given, block_size), tables.decode_inputs(rows, context_lens), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features", "is_gated"),
    [(1, 96, 48, True), (1, 1000, 37, False), (1, 2048, 130, True), (1, 4096, 37, False), (2, 96, 48, False), (8, 1000, 74, True), (9, 96, 37, False),
     (16, 2048, 130, True)],
)  # fmt: skip
@precisions
def test_products_of_few_rows(num_rows, in_features, out_features, is_gated, is_half, device):
    """With and without what is added to a product: a bias, a norm before it, a residual before that."""
    dtype = HALF[device] if is_half else torch.float32
    if device == "cuda" and num_rows > most_rows_of_product(in_features, dtype):
        pytest.skip("the libraries take so many rows")
    generator = torch.Generator().manual_seed(num_rows)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    norm = torch.nn.RMSNorm(in_features, 1e-5, device=device, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(1 + random(in_features) / 5)
    for has_bias, residual in (True, random(num_rows, in_features)), (False, None):
        linear = Linear(in_features, out_features, has_bias, dtype, is_gated).to(device)
        linear.weight.copy_(random(out_features, in_features) * in_features**-0.5)
        if has_bias:
            linear.bias.copy_(random(out_features))
        x = random(num_rows, in_features)
        expected = *linear.after_norm(norm, x, residual), linear(x)
        linear.max_few_rows = 16
        for ours, theirs in zip((*linear.after_norm(norm, x, residual), linear(x)), expected, strict=True):
            tolerance = TOLERANCES[dtype]
            torch.testing.assert_close(ours, theirs, atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e-6, 30.0])
def test_gumbel_max(dtype, temperature, device):
    """The token has the highest noisy score, up to the rounding of the logarithms; greedy is exact, ties to the lowest."""
    torch.manual_seed(0)
    num_rows, vocab_size = 3, 5000
    logits = (torch.randn(num_rows, vocab_size) * 3).to(device, dtype)
    logits[:, 4000] = logits[:, 77] = logits.amax(-1)
    sampling, _ = pack([{"temperature": temperature}] * 5, vocab_size, device, 2**40)
    rows = torch.tensor([4, 1, 2], dtype=torch.int32, device=device)
    positions = torch.tensor([0, 9, 1000], dtype=torch.int32, device=device)
    last_token = torch.full((6,), 7, dtype=torch.int32, device=device)
    drawn = gumbel_max(logits, None, rows, positions, sampling, last_token).long()
    assert last_token.tolist() == [7, drawn[1], drawn[2], 7, drawn[0], 7]
    seeds = SamplingBatch(sampling, rows, positions, True, False).unpack()[-1]
    scores = logits.float() + gumbel_noise(seeds, positions, vocab_size) * temperature
    best = scores.max(-1).values
    assert (scores.gather(1, drawn[:, None])[:, 0] >= best - 1e-5 * best.abs()).all()
    if temperature == 0:
        assert drawn.tolist() == logits.float().max(-1).indices.tolist() == [77, 77, 77]


def test_gumbel_max_passes_over_what_is_below_the_least(device):
    logits = torch.tensor([[1.0, 9.0, 2.0, 3.0]], device=device).repeat(50, 1)
    sampling, rows = pack([{"temperature": 5.0}] * 50, 4, device)
    least = torch.full((50,), 2.0, device=device)
    drawn = gumbel_max(logits, least, rows, rows, sampling, torch.zeros_like(rows))
    assert set(drawn.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 7, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_gumbel_max_marks_rows_from_which_no_token_can_be_drawn(params, device):
    """All logits are -inf, or all or one are NaN, in whichever program's columns."""
    logits = torch.randn(5, 5000, device=device)
    logits[1] = -torch.inf
    logits[2] = torch.nan
    logits[3, 4321] = torch.nan
    sampling, rows = pack([params] * 5, 5000, device)
    least = truncation_kernel.least_kept(logits, rows, sampling) if "top_k" in params else None
    last_token = torch.full_like(rows, 7)
    drawn = gumbel_max(logits, least, rows, rows, sampling, last_token).tolist()
    assert drawn[1:4] == [-1, -1, -1]
    assert min(drawn[0], drawn[4]) >= 0
    assert last_token.tolist() == [drawn[0], 0, 0, 0, drawn[4]]


TRUNCATIONS = [
    {},
    {"temperature": 0.0, "top_k": 3},
    {"top_k": 1},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 4999},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.9999, "temperature": 3.0},
    {"min_p": 0.2},
    {"min_p": 1.0, "top_k": 7},
    {"temperature": 1e-40, "top_p": 0.5},
    {"temperature": 0.6, "min_p": 0.01, "top_k": 20, "top_p": 0.8},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 3.0, 1000.0])
def test_least_kept(dtype, spread, device):
    """The threshold keeps what the twin's keeps, ties with the last one included."""
    if dtype == torch.float16 and spread == 1000.0:
        spread = 100.0
    torch.manual_seed(0)
    vocab_size = 5000
    logits = (torch.randn(len(TRUNCATIONS), vocab_size) * spread).to(device, dtype)
    logits[:, 100:120] = -torch.inf  # banned
    sampling, rows = pack(TRUNCATIONS, vocab_size, device)
    ours = truncation_kernel.least_kept(logits, rows, sampling)
    twin = truncation.least_kept_by_sorting(logits, SamplingBatch(sampling, rows, rows, True, True))
    uses = torch.tensor([SamplingParams(**params).is_truncated for params in TRUNCATIONS], device=device)
    assert torch.equal((logits >= ours[:, None])[uses], (logits >= twin[:, None])[uses])
    assert (ours[~uses] == -torch.inf).all()


@pytest.mark.parametrize("vocab_size", [3, 8192, 20011])
@precisions
def test_norm_and_rank(is_half, vocab_size, device):
    dtype = HALF[device] if is_half else torch.float32
    torch.manual_seed(0)
    logits = (torch.randn(7, 2 * vocab_size) * 5).to(device, dtype)[:, :vocab_size]  # rows need not be adjacent
    logits[1, ::2] = -torch.inf
    logits[2] = 0.0
    logits[3] += 30000.0
    drawn = logits.gather(1, torch.randint(vocab_size, (7, 1), device=device))
    norm, rank = logprobs_kernel.norm_and_rank(logits, drawn)
    twin_norm, twin_rank = logprobs.norm_and_rank(logits, drawn)
    torch.testing.assert_close(norm, twin_norm, atol=1e-5, rtol=1e-6)
    assert torch.equal(rank.long(), twin_rank)


RANK_OF_SUMS = """
import os, signal, sys
os.environ["TRITON_INTERPRET"] = "1"
signal.alarm(300)  # it would wait for ever for one that has failed
import torch
from nanovllm.parallel import all_reduce as kernel
from nanovllm.parallel.all_reduce import PROGRAMS, all_reduce, memory_bytes
kernel.ONE_PASS_BYTES = 1000
rank, paths, capacity = int(sys.argv[1]), sys.argv[2:], 2**13
size = memory_bytes(len(paths), capacity)
memories = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]
addresses = torch.tensor([memory.data_ptr() for memory in memories])
turns, stop = torch.zeros(PROGRAMS, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
for turn in range(4):
    dtype = (torch.float32, torch.float16)[turn % 2]
    inputs = torch.randn(len(paths), (64, 2048, 1000, 40)[turn], generator=torch.Generator().manual_seed(turn)).to(dtype)
    x = inputs[rank].clone()
    all_reduce(x, addresses, turns, stop, rank, capacity)
    assert torch.equal(x, sum(inputs.float()).to(dtype)), turn
"""


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_reduce_of_processes(num_ranks, tmp_path):
    """They wait for each other in the interpreter, and share files in place of GPUs' memory."""
    paths = [str(tmp_path / str(rank)) for rank in range(num_ranks)]
    for path in paths:
        Path(path).write_bytes(bytes(memory_bytes(num_ranks, 2**13)))
    ranks = [subprocess.Popen([sys.executable, "-c", RANK_OF_SUMS, str(rank), *paths]) for rank in range(num_ranks)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * num_ranks
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_reduce_of_streams(num_ranks, dtype):
    """They are ranks that wait for each other on one GPU."""
    capacity = 2**20
    sizes = [64, capacity // dtype.itemsize, 40, 5000] * 25
    memories = torch.zeros(num_ranks, memory_bytes(num_ranks, capacity), dtype=torch.uint8, device="cuda")
    addresses = torch.tensor([memory.data_ptr() for memory in memories], device="cuda")
    turns = torch.zeros(num_ranks, PROGRAMS, dtype=torch.int64, device="cuda")
    stop = torch.ones(1, dtype=torch.int32, pin_memory=True)
    streams = [torch.cuda.Stream() for _ in range(num_ranks)]

    def run(sums):
        """All of them on their way at once, so that a rank can be ahead."""
        torch.cuda.synchronize()
        for inputs in sums:
            for rank, (x, stream) in enumerate(zip(inputs, streams)):
                with torch.cuda.stream(stream):
                    all_reduce(x, addresses, turns[rank], stop, rank, capacity)
        torch.cuda.synchronize()

    # stopped at once: a kernel is not loaded while another one waits for it
    run(torch.zeros(num_ranks, size, device="cuda", dtype=dtype) for size in sizes[:4])
    for written in memories, turns, stop:
        written.zero_()
    sums = [torch.randn(num_ranks, size, device="cuda").to(dtype) for size in sizes]
    expected = [sum(inputs.float()).to(dtype) for inputs in sums]
    run(sums)
    assert all(torch.equal(x, total) for inputs, total in zip(sums, expected) for x in inputs)
    assert turns.eq(len(sizes)).all()


@pytest.mark.gpu
def test_all_reduce_can_be_stopped():
    memories = torch.zeros(2, memory_bytes(2, 1024), dtype=torch.uint8, device="cuda")
    addresses = torch.tensor([memory.data_ptr() for memory in memories], device="cuda")
    turns = torch.zeros(PROGRAMS, dtype=torch.int64, device="cuda")
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    all_reduce(torch.zeros(64, device="cuda"), addresses, turns, stop, 0, 1024)
    done = torch.cuda.Event()
    done.record()
    assert not done.query(), "the other rank never comes"
    stop[0] = 1
    done.synchronize()
