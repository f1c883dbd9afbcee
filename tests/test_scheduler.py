"""Scheduler and block manager alone, against a fake device that checks every KV slot that a step reads."""

import random
from array import array
from collections import Counter
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine.batch import int32
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.shared_prefixes import MAX_PARTS_PER_ROW, SharedPrefixes


def sequence(token_ids, request_id=0, max_tokens=1, is_scored=False, **fields):
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if is_scored else None)
    return Sequence(request_id, array("i", token_ids), params, 0, max_tokens, **fields)


def next_token(token_ids):
    """A fake model: the next token is a hash of all that came before."""
    return random.Random(str(token_ids)).randrange(23)


def scheduled(step):
    """(sequence, start, number of tokens, is it a decode row, is it sampled) in the order of the launch."""
    batches = (True, step.decodes), (False, step.chunks)
    return [(c.seq, c.start, c.num_tokens, is_decode, c.is_sampled) for is_decode, batch in batches for c in batch]


def found_in(prefixes, rows, lens, tables, least_blocks):
    """What is found is all that rows share, by their whole `tables` without what is their own for sure."""
    least = least_blocks * prefixes.block_size
    before = prefixes.num_tokens - prefixes.num_tokens_read
    found = prefixes.find(rows, lens, least)
    beginnings = [tuple(table[:n]) for table in tables for n in range(least_blocks, len(table) + 1, least_blocks)]
    shared = [num for num in Counter(beginnings).values() if num > 1]
    if sum(shared) <= (MAX_PARTS_PER_ROW - 1) * len(rows):  # else there may be too many runs
        saved = prefixes.num_tokens - prefixes.num_tokens_read - before
        assert saved == sum(num - 1 for num in shared) * least
    return found


class FakeDevice:
    """Runs steps in launch order and sees only what the real one would: rows, tables, slots, sent tokens."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.slots = {}  # slot -> (position, token)
        self.tables = {}  # (row, index) -> block
        self.last_token = {}
        self.prefixes = SharedPrefixes(100, 20_000, block_size)

    def slot(self, row, position):
        return self.tables[row, position // self.block_size] * self.block_size + position % self.block_size

    def forward(self, step):
        for row, index, block in step.block_updates:
            self.tables[row, index] = block
        self.prefixes.update(step)
        if step.decodes:
            self.check_sharing(step.decodes)
        for seq, start, num_tokens, is_decode, _ in scheduled(step):
            for position in range(start, start + num_tokens):
                token = self.last_token[seq.row] if is_decode else seq.token_ids[position]
                self.slots[self.slot(seq.row, position)] = (position, token)
        contexts = []
        for seq, start, num_tokens, _, is_sampled in scheduled(step):
            entries = [self.slots[self.slot(seq.row, p)] for p in range(start + num_tokens)]
            assert [p for p, _ in entries] == list(range(start + num_tokens)), "a slot holds another position's KV"
            if is_sampled:
                contexts.append((seq.row, [token for _, token in entries]))
        return contexts

    def check_sharing(self, decodes):
        """Each token of a row is in one run or in its own part; and what a run says that rows share, they do."""
        rows, lens = int32([chunk.seq.row for chunk in decodes]), int32([chunk.end for chunk in decodes])
        least = 2 * self.block_size
        tables = [
            [self.tables[row, i] for i in range((length - 1) // self.block_size)] for row, length in zip(rows, lens)
        ]
        order, runs, own_starts = found_in(self.prefixes, rows, lens, tables, least_blocks=2)
        assert sorted(order) == list(range(len(rows)))
        parts = [[(own_starts[i], lens[place])] for i, place in enumerate(order)]
        for first, num, start, end in runs:
            assert num > 1
            assert start < end
            assert start % least == end % least == 0
            shared = [[self.slot(rows[place], p) for p in range(start, end)] for place in order[first : first + num]]
            assert all(slots == shared[0] for slots in shared)
            for i in range(first, first + num):
                parts[i].append((start, end))
        for (own_start, length), *shared in parts:
            starts, ends = zip(*sorted([*shared, (own_start, length)]))
            assert (*starts, length) == (0, *ends)
            assert own_start < length
        assert sum(map(len, parts)) <= MAX_PARTS_PER_ROW * len(rows)

    def sample(self, step, contexts):
        drawn = []
        for chunk, (row, context) in zip(step.sampled, contexts):
            self.last_token[row] = next_token(context)
            drawn.append(self.last_token[row])
            if not chunk.seq.is_finished:
                assert context == list(chunk.seq.token_ids), "the history is known, and the KV is this sequence's"
        scores = [(position, 1, [], []) for chunk in step.chunks for position in chunk.scored]
        return step, drawn, (), scores


def check_invariants(scheduler):
    manager = scheduler.block_manager
    held = [block for seq in scheduler.running for block in seq.block_table]
    assert all(manager.ref_counts[block] == held.count(block) for block in range(manager.num_blocks))
    assert set(manager.free) == {b for b in range(1, manager.num_blocks) if manager.ref_counts[b] == 0}
    rows = [seq.row for seq in scheduler.running]
    assert sorted(rows + scheduler.free_rows) == list(range(1, scheduler.max_num_seqs + 1))
    assert all(seq.row == 0 and not seq.block_table for seq in scheduler.waiting)
    cached = [(block, content) for block, content in enumerate(manager.contents) if content is not None]
    assert all(content.block == block for block, content in cached)
    assert manager.cached == {content.hash: content for _, content in cached}


def run(sequences, scheduler, overlapped, aborts=()):
    """The engine's loop on the fake device; `aborts` are (turn, request_id)."""
    device = FakeDevice(scheduler.block_manager.block_size)
    for seq in sequences:
        scheduler.add(seq)
    launched, in_flight, num_steps = None, (Step(), []), 0  # and what each gave

    def plan():
        step = scheduler.schedule()
        assert not step or step.num_decode_tokens + step.num_prefill_tokens <= scheduler.max_num_batched_tokens
        check_invariants(scheduler)
        return step

    def commit():
        scheduler.commit(*in_flight)
        check_invariants(scheduler)

    while scheduler.has_unfinished:
        scheduler.abort({request_id for turn, request_id in aborts if turn == num_steps})
        if not scheduler.has_unfinished:
            break
        if overlapped:
            commit()
        if launched is None and (step := plan()):
            launched = step, device.forward(step)
        assert launched or in_flight[1], "stuck"
        if overlapped:
            step = plan()
        in_flight = device.sample(*launched) if launched else (Step(), [])
        if overlapped:
            launched = (step, device.forward(step)) if step else None
        else:
            launched = None
            commit()
        num_steps += 1
    assert len(scheduler.block_manager.free) == scheduler.block_manager.num_blocks - 1
    return num_steps


def completion_alone(prompt, max_tokens, eos):
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < max_tokens:
        token_ids.append(next_token(token_ids))
        if token_ids[-1] == eos:
            break
    return token_ids[len(prompt) :]


# With a prefix of others', or of two tokens, so that equal blocks stand after unequal ones.
sharing = st.builds(
    lambda num_shared, num_own: (
        [i * i % 23 for i in range(num_shared)] + [(3 * j + num_own) % 23 for j in range(num_own)]
    ),
    st.integers(0, 20),
    st.integers(1, 12),
)
prompts = sharing | st.lists(st.integers(0, 1), min_size=1, max_size=12)
request = st.tuples(prompts, st.integers(1, 20), st.sampled_from([0, 1, -1]), st.booleans())


@settings(max_examples=300, deadline=None)
@example(  # a prompt is preempted while the log-probabilities of its first chunk are on their way, and nothing else runs
    requests=[([16, 17], 2, -1, False), ([3, 3, 7, 1, 6, 10, 21], 2, -1, True)],
    aborts=[],
    rows=2,
    budget=5,
    spare_blocks=1,
    block_size=1,
    overlapped=True,
    caching=False,
)
@given(
    requests=st.lists(request, min_size=1, max_size=12),
    aborts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 11)), max_size=3),
    rows=st.integers(1, 8),
    budget=st.integers(1, 30),
    spare_blocks=st.integers(0, 20),
    block_size=st.integers(1, 6),
    overlapped=st.booleans(),
    caching=st.booleans(),
)
def test_random_workloads_read_only_their_own_kv_score_prompts_once_and_leak_nothing(
    requests, aborts, rows, budget, spare_blocks, block_size, overlapped, caching
):
    sequences, expected = [], []
    for i, (prompt, max_tokens, eos, is_scored) in enumerate(requests):
        sequences.append(sequence(prompt, i, max_tokens, is_scored, eos_token_ids=frozenset({eos})))
        expected.append(completion_alone(prompt, max_tokens, eos))
    needed = max(-(-(len(s.token_ids) + s.max_tokens) // block_size) for s in sequences)
    manager = BlockManager(needed + 1 + spare_blocks, block_size, caching)
    run(sequences, Scheduler(manager, rows, budget), overlapped, aborts)
    aborted = {request_id for _, request_id in aborts}
    for seq, completion in zip(sequences, expected):
        if seq.request_id in aborted and seq.finish_reason == "abort":
            assert seq.completion_token_ids == completion[: seq.num_completion_tokens]
        else:
            assert seq.completion_token_ids == completion
            scored = [candidate.logprob for found in seq.prompt_logprobs[1:] for candidate in found.values()]
            assert scored == list(range(1, seq.num_prompt_tokens) if seq.params.prompt_logprobs == 0 else [])


def test_what_rows_share_is_found_anew_for_new_sequences():
    """They may have the rows of those before, in the same order."""
    prefixes = SharedPrefixes(3, 4, block_size=2)
    for other_block, num_saved in (5, 2), (6, 0):
        first, second = sequence([1]), sequence([2])
        first.row, second.row, second.num_shared_blocks = 1, 2, 1
        blocks = [(1, 0, 5), (1, 1, 7), (2, 0, other_block), (2, 1, 8)]
        prefixes.update(Step(admitted=[first, second], block_updates=blocks))
        before = prefixes.num_tokens - prefixes.num_tokens_read
        prefixes.find(int32([1, 2, 0]), int32([3, 4, 1]), least_tokens=2)
        assert prefixes.num_tokens - prefixes.num_tokens_read - before == num_saved
    assert prefixes.num_tokens == 2 * (3 + 4), "padding counts as nothing"


@settings(max_examples=300, deadline=None)
@given(
    tree=st.recursive(
        st.just([]), lambda children: st.lists(st.tuples(st.integers(0, 6), children), max_size=4), max_leaves=30
    ),
    block_size=st.integers(1, 4),
    least_blocks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_rows_share_all_that_a_tree_of_prefixes_lets_them(tree, block_size, least_blocks, seed):
    """Of random trees, each block below a node that has two rows or more is read once, in whole multiples; unless runs are too many."""
    tables, blocks = [], count(1)

    def grow(nodes, table):
        for num_blocks, children in nodes:
            grow(children, table + [next(blocks) for _ in range(num_blocks)])
        if not nodes:
            tables.append([*table, next(blocks)])

    grow(tree, [])
    random.Random(seed).shuffle(tables)
    prefixes = SharedPrefixes(len(tables) + 1, 100, block_size)
    for row, table in enumerate(tables, start=1):
        prefixes.block_tables[row, : len(table)] = table
        prefixes.num_shared_blocks[row] = len(table) - 1
    lens = int32([len(table) * block_size for table in tables])
    found_in(prefixes, int32(range(1, len(tables) + 1)), lens, [table[:-1] for table in tables], least_blocks)


def make_sequences(count, prompt_len, max_tokens):
    return [sequence([(i + j * (i + 1)) % 23 for j in range(prompt_len)], i, max_tokens) for i in range(count)]


def test_overlap_costs_no_steps_when_nothing_stops_early():
    """A sequence that must stop by length is not planned again while its last token is on its way."""
    for overlapped, num_steps in (False, 14), (True, 15):  # one more turn, to commit the last step
        assert run(make_sequences(6, 9, 14), Scheduler(BlockManager(100, 4), 6, 100), overlapped) == num_steps


def test_admission_comes_in_bunches():
    """Admitting single requests whenever a row is free would make every step of a long run a mixed one."""
    scheduler = Scheduler(BlockManager(8000, 4), max_num_seqs=64, max_num_batched_tokens=1000)
    device, num_steps, num_mixed = FakeDevice(4), 0, 0
    for i in range(400):
        scheduler.add(sequence([i % 23], i, 1 + 13 * i % 199))
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        scheduler.commit(*device.sample(step, device.forward(step)))
        num_steps += 1
        num_mixed += step.num_decode_tokens > 0 and step.num_prefill_tokens > 0
    assert num_mixed < num_steps / 4


@pytest.mark.parametrize("caching", [False, True])
def test_the_newest_is_preempted_and_resumes_and_cached_tokens_count_once(caching):
    """num_cached_tokens says what the first admission found, not what a resumed sequence finds of itself."""
    sequences = make_sequences(3, 8, 12)
    scheduler = Scheduler(BlockManager(12, 4, caching), 3, 100)
    run(sequences, scheduler, overlapped=True)
    assert scheduler.num_preemptions > 0
    assert (scheduler.num_prefix_hits > 0) == caching
    for seq in sequences:
        assert seq.completion_token_ids == completion_alone(seq.token_ids[: seq.num_prompt_tokens], 12, None)
        assert seq.num_cached_tokens == 0


def cache_prompt(manager, token_ids):
    """Compute a prompt and let it go: its full blocks stay cached."""
    seq = sequence(token_ids)
    manager.share(seq, manager.match(seq))
    assert manager.extend(seq, len(token_ids))
    seq.num_computed_tokens = len(token_ids)
    manager.register(seq)
    blocks = seq.block_table
    manager.release(seq)
    return blocks


def match(manager, token_ids):
    return manager.match(sequence(token_ids))


def test_a_block_whose_prefix_was_evicted_never_matches_another_prefix():
    """The number of a block's prefix is never used again, even where its block is."""
    manager = BlockManager(4, 2)
    first = cache_prompt(manager, [1, 1, 2, 2])
    holder = sequence([7, 7, 7])
    assert manager.extend(holder, 2)  # the uncached block
    seq = sequence([1, 1, 2, 2, 3])
    manager.share(seq, manager.match(seq))
    assert seq.block_table == first
    manager.release(seq)
    manager.free.move_to_end(first[0], last=False)  # evict the parent before its child
    cache_prompt(manager, [9, 9])
    assert match(manager, [9, 9, 2, 2, 5]) == [first[0]]
    assert match(manager, [1, 1, 2, 2, 5]) == []


def test_a_collision_of_hashes_is_no_hit(monkeypatch):
    """With one hash for all, blocks are told apart by their tokens and their parents."""
    monkeypatch.setattr("nanovllm.engine.block_manager.xxh3_128_digest", lambda data: bytes([len(data)]))
    manager = BlockManager(9, 2)
    first = cache_prompt(manager, [1, 1, 2, 2])
    assert match(manager, [1, 1, 2, 2, 3]) == first
    assert match(manager, [1, 2, 2, 2, 3]) == []
    second = cache_prompt(manager, [3, 3, 2, 2])  # takes the places of the first
    assert match(manager, [3, 3, 2, 2, 3]) == second
    assert match(manager, [1, 1, 2, 2, 3]) == []


def test_uncached_blocks_are_taken_first_then_the_least_recently_used():
    manager = BlockManager(6, 2)
    old, new = cache_prompt(manager, [1, 1]), cache_prompt(manager, [2, 2])
    match_again = sequence([1, 1, 5])
    manager.share(match_again, manager.match(match_again))
    manager.release(match_again)  # now `old` was used last
    seq = sequence([0] * 10)
    assert manager.extend(seq, 10)
    assert set(seq.block_table[:3]).isdisjoint(old + new)
    assert seq.block_table[3:] == new + old
    assert manager.cached == {}


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    manager = BlockManager(4, 2)
    blocks = cache_prompt(manager, [1, 1, 2, 2, 3, 3])
    seq = sequence([0, 0])
    assert manager.extend(seq, 2)
    assert seq.block_table == blocks[-1:]
    assert match(manager, [1, 1, 2, 2, 3, 3, 4]) == blocks[:2]


def test_extend_takes_nothing_when_too_few_blocks_are_free():
    manager = BlockManager(4, 2)
    seq = sequence([0] * 9)
    assert not manager.extend(seq, 9)
    assert (seq.block_table, len(manager.free)) == ([], 3)
