"""SharedPrefixes: finds the decode rows whose block tables begin with the same blocks, so that their KV is read once for all."""

from typing import NamedTuple

import numpy as np

from nanovllm.engine.batch import INT, int32
from nanovllm.engine.scheduler import Step

MAX_PARTS_PER_ROW = 4  # on average, its own included: what the device's arrays have room for


class SharedRuns(NamedTuple):
    """Decode rows in an order in which those that share KV are neighbours, and what they share.

    Each token of a row is in one run, or in the row's own part, which is after its runs and has at least one.
    """

    order: INT  # [B] places in the batch
    runs: INT  # [n, 4]: the first of its rows, in that order, and how many; the tokens start … end-1, which they share
    own_starts: INT  # [B], in that order: where each row's own part begins


class SharedPrefixes:
    """The CPU's copy of the block tables, what they share, and how much KV was read."""

    def __init__(self, num_rows: int, blocks_per_row: int, block_size: int):
        self.block_size = block_size
        self.block_tables = np.zeros((num_rows, blocks_per_row), np.int32)
        self.num_shared_blocks = np.zeros(num_rows, np.int32)  # that others held already when the row was admitted
        self.num_tokens = 0  # of KV that decode rows have attended to
        self.num_tokens_read = 0  # the same, with what rows share counted once
        self._found: tuple[bytes, SharedRuns] | None = None  # the rows of the last search, and its result

    def update(self, step: Step) -> tuple[INT, INT]:
        """Learn what is new in a step; returns the places in the block tables that change, and the blocks there."""
        for seq in step.admitted:
            self.num_shared_blocks[seq.row] = seq.num_shared_blocks
            self._found = None
        rows, indices, blocks = int32(step.block_updates).reshape(-1, 3).T
        places = rows * self.block_tables.shape[1] + indices
        self.block_tables.reshape(-1)[places] = blocks
        return places, blocks

    def find(self, rows: INT, context_lens: INT, least_tokens: int) -> SharedRuns:
        """What the rows of a decode batch share, in runs of a multiple of `least_tokens`; with 0, nothing.

        It is the same object until a row joins or leaves: the blocks that a running row is given are its own.
        """
        key = rows.tobytes()
        if self._found is None or self._found[0] != key:
            self._found = key, self._search(rows, least_tokens)
        shared = self._found[1]
        counts, lens = shared.runs[:, 1], shared.runs[:, 3] - shared.runs[:, 2]
        num_tokens = int(context_lens[rows > 0].sum())  # row 0 is padding
        self.num_tokens += num_tokens
        self.num_tokens_read += num_tokens - int((counts - 1) @ lens.astype(np.int64))
        return shared

    def _search(self, rows: INT, least_tokens: int) -> SharedRuns:
        order, common = np.arange(len(rows)), np.zeros(len(rows) - 1, np.int64)
        # Of two rows that share blocks, the one that was admitted later found them there.
        num_blocks = int(self.num_shared_blocks[rows].max())
        if num_blocks and least_tokens:
            tables = self.block_tables[:, :num_blocks].take(rows, axis=0)
            order = tables.view(f"V{tables.itemsize * num_blocks}").ravel().argsort(kind="stable")
            tables = tables[order]
            # Block 0 is padding's. Every other row's last block is its own, so nothing that stands after it counts.
            is_same = (tables[1:] == tables[:-1]) & (tables[1:] > 0)
            common = np.logical_and.accumulate(is_same, axis=1).sum(axis=1) * self.block_size
        while True:
            common = common // max(1, least_tokens) * least_tokens
            runs = int32(nested_runs(common.tolist())).reshape(-1, 4)
            if runs[:, 1].sum() <= (MAX_PARTS_PER_ROW - 1) * len(rows):
                return SharedRuns(int32(order), runs, int32(np.maximum(np.append(common, 0), np.append(0, common))))
            least_tokens *= 2


def nested_runs(common: list[int]) -> list[tuple[int, int, int, int]]:
    """The runs of `SharedRuns`, where row i has common[i] tokens in common with row i + 1.

    They are a tree: a run begins where the one around it ends.
    """
    runs = []
    unfinished = [(0, 0)]  # their first rows and their ends, the innermost last
    for i, num_tokens in enumerate([*common, 0]):
        first = i
        while unfinished[-1][1] > num_tokens:
            first, end = unfinished.pop()
            runs.append((first, i + 1 - first, max(unfinished[-1][1], num_tokens), end))
        if unfinished[-1][1] < num_tokens:
            unfinished.append((first, num_tokens))
    return runs
