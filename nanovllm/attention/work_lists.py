"""What the programs of the Triton backend's kernels do in a step, worked out on the CPU.

Decode is split over the KV (FlashDecoding, Dao et al. 2023; Stream-K, Osama et al., arXiv 2301.03598): all tiles of KV, laid
end to end, are cut into equally long lists, one for each program of a grid that just fills the GPU. A list is read from device
memory, so the grid, and a CUDA graph that holds it, does not depend on lengths. KV that several rows share is laid out once for
them (Hydragen, Juravsky et al., arXiv 2402.05099).
"""

import numpy as np

from nanovllm.engine.batch import INT, int32
from nanovllm.engine.shared_prefixes import MAX_PARTS_PER_ROW, SharedRuns


class DecodeLists:
    """`split_decodes` for one step after the other. Until a row joins, leaves or comes to its next tile, only ends change: with few
    rows, for many steps."""

    def __init__(self, num_lists: int, tile: int, few_rows: int, most_rows: int):
        self.sizes = num_lists, tile, few_rows, most_rows
        self._shared: SharedRuns | None = None  # of the last step
        self._num_tiles = self._last_items = self._last_rows = np.zeros(0, np.int32)
        self._lists: list[INT] = []

    def split(self, rows: INT, context_lens: INT, shared: SharedRuns) -> list[INT]:
        num_tiles = -(-context_lens // self.sizes[1])
        if shared is not self._shared or not np.array_equal(num_tiles, self._num_tiles):
            _, items, pairs, _ = self._lists = split_decodes(rows, context_lens, shared, *self.sizes)
            first_rows = pairs[items[:, 1], 0]
            self._last_items = (items[:, 4] == context_lens[first_rows]).nonzero()[0]  # what is shared ends before
            self._shared, self._num_tiles, self._last_rows = shared, num_tiles, first_rows[self._last_items]
        bounds, items, pairs, part_starts = self._lists
        items = items.copy()
        items[self._last_items, 4] = context_lens[self._last_rows]
        return [bounds, items, pairs, part_starts]


def split_decodes(
    rows: INT, context_lens: INT, shared: SharedRuns, num_lists: int, tile: int, few_rows: int, most_rows: int
) -> list[INT]:
    """Cut the KV of decode rows into `num_lists` lists of items that take equally long.

    An item is a run of KV, or a part of one, for at most `few_rows` rows; or, if more share it, for at most `most_rows`.

    Returns:
        bounds [num_lists + 2]: list p has the items bounds[p] … bounds[p+1]-1. bounds[-1] is the number of items of runs that more
            than `few_rows` share. They come first.
        items [n, 6]: a row of the block tables; the first of the item's pairs and how many; the tokens start … end-1 of KV; 1 if
            these are the whole context of one row.
        pairs [p, 2]: for each row of each item, its place in the batch, and the index of the part that the item writes for it.
        part_starts [B + 1]: row b has the parts part_starts[b] … part_starts[b+1]-1.

    The shapes depend on the number of rows alone. What is left over is zero.
    """
    order, runs, own_starts = shared
    num_rows = len(rows)
    is_tall = runs[:, 1] > few_rows
    tall, others = _limit_rows(runs[is_tall], most_rows), _limit_rows(runs[~is_tall], few_rows)
    own = np.ones((num_rows, 4), np.int32)
    own[:, 0], own[:, 2], own[:, 3] = np.arange(num_rows), own_starts, context_lens[order]
    firsts, counts, starts, ends = np.concatenate((tall, others, own)).T
    bounds, run_of, first_tiles = _cut(-(-(ends - starts) // tile), num_lists)
    bounds[-1] = run_of.searchsorted(len(tall))
    firsts, counts, ends = firsts[run_of], counts[run_of], ends[run_of]
    starts = starts[run_of] + first_tiles * tile
    goes_on = first_tiles[1:].nonzero()[0]  # the items whose runs go on in the next one
    ends[goes_on] = starts[goes_on + 1]
    pair_ends = counts.cumsum()
    num_items, num_pairs, places = len(run_of), int(pair_ends[-1]), order[firsts]
    pair_rows = order[np.repeat(firsts + counts - pair_ends, counts) + np.arange(num_pairs)]
    by_row = pair_rows.argsort(kind="stable")
    part_starts = int32(pair_rows[by_row].searchsorted(np.arange(num_rows + 1)))
    most_parts = num_rows * (MAX_PARTS_PER_ROW if most_rows > 1 else 1)
    items = np.zeros((most_parts + num_lists, 6), np.int32)
    is_whole = part_starts[places + 1] - part_starts[places] == 1
    items[:num_items].T[:] = rows[places], pair_ends - counts, counts, starts, ends, is_whole
    pairs = np.zeros((most_parts + num_lists * min(most_rows, num_rows), 2), np.int32)
    pairs[:num_pairs, 0] = pair_rows
    pairs[by_row, 1] = np.arange(num_pairs)
    return [bounds, items, pairs, part_starts]


def _limit_rows(runs: INT, most_rows: int) -> INT:
    """The runs [n, 4], those of more rows cut into several of at most `most_rows`."""
    if not len(runs):
        return runs
    firsts, counts, starts, ends = runs.T
    of, offsets, sizes = _pieces(counts, most_rows)
    return np.stack((firsts[of] + offsets, sizes, starts[of], ends[of]), axis=1)


def _pieces(lens: INT, most: int) -> tuple[INT, INT, INT]:
    """Cut lengths into pieces of at most `most`: for each piece the length it is of, where it begins there, and its size."""
    num_pieces = -(-lens // most)
    of = np.repeat(np.arange(len(lens)), num_pieces)
    offsets = (np.arange(len(of)) - (num_pieces.cumsum() - num_pieces)[of]) * most
    return int32(of), int32(offsets), int32(np.minimum(most, lens[of] - offsets))


def _cut(tiles: INT, num_lists: int) -> tuple[INT, INT, INT]:
    """Cut runs of so many tiles, laid end to end, into lists of pieces: bounds [num_lists + 2], the last one unused, and for each piece
    the run that it is of, and its first tile there. A run counts as one tile more: that long an item takes beside its tiles."""
    ends = (tiles + 1).cumsum()
    starts = ends - tiles - 1
    total = int(ends[-1])
    cuts = np.arange(0, total, -(-total // num_lists))
    # A cut between what a run takes beside its tiles and its first tile moves to the run's start.
    cuts -= cuts == starts[ends.searchsorted(cuts, side="right")] + 1
    is_start = np.zeros(total, bool)
    is_start[starts] = is_start[cuts] = True
    piece_starts = is_start.nonzero()[0]
    run_of = ends.searchsorted(piece_starts, side="right")
    bounds = np.full(num_lists + 2, len(run_of), np.int32)
    bounds[: len(cuts)] = piece_starts.searchsorted(cuts)
    return bounds, int32(run_of), int32(np.maximum(piece_starts - starts[run_of] - 1, 0))


def split_chunks(query_lens: INT, context_lens: INT, tile: int) -> INT:
    """Cut the tokens of chunks into tiles, those with the most KV first: items [n, 4], each the place of a sequence in the
    batch, the first of its tokens in the batch and how many, and the position of that first one."""
    sequences, offsets, counts = _pieces(query_lens, tile)
    tokens = (query_lens.cumsum() - query_lens)[sequences] + offsets
    positions = (context_lens - query_lens)[sequences] + offsets
    items = np.stack((sequences, tokens, counts, positions), axis=1).astype(np.int32)
    return items[np.argsort(-positions, kind="stable")]
