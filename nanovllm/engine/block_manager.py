"""BlockManager: owns the paged KV blocks: who holds them, which are free, and which prefixes they cache.

A full block is cached under what determines its KV: the prefix that it continues, named by a number that no other
prefix ever had, and its own token ids. The dictionary compares both, so a hit can never be another request's KV,
whatever its hash; a separate digest would have to be checked against the same facts.
"""

from collections import OrderedDict
from itertools import count

from nanovllm.engine.sequence import Sequence

PrefixKey = tuple[int, tuple[int, ...]]  # (number of the prefix before this block, the block's token ids)


class BlockManager:
    """Blocks 1 … num_blocks-1 are handed out; block 0 is trash, where padding writes.

    A block that is released stays cached until it is needed again. Blocks that cache nothing are taken first,
    then the least recently used ones.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.ref_counts = [0] * num_blocks
        self.cached: dict[PrefixKey, int] = {}
        self.keys: list[PrefixKey | None] = [None] * num_blocks
        self.prefix_ids = [0] * num_blocks  # of each cached block: the number of the prefix that ends with it
        self._next_prefix_id = count(1)

    def match(self, seq: Sequence) -> list[int]:
        """The cached blocks that `seq` begins with. Its last token is left out: it must be computed for its logits."""
        blocks: list[int] = []
        if self.enable_prefix_caching and not seq.awaits_prompt_logprobs:
            parent = 0
            for i in range((len(seq.token_ids) - 1) // self.block_size):
                block = self.cached.get(self._key(seq, i, parent))
                if block is None:
                    break
                blocks.append(block)
                parent = self.prefix_ids[block]
        return blocks

    def share(self, seq: Sequence, blocks: list[int]) -> None:
        """Let `seq`, which holds nothing yet, begin with the matched `blocks`."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self.free[block]
            self.ref_counts[block] += 1
        seq.block_table = list(blocks)
        seq.prefix_ids = [self.prefix_ids[block] for block in blocks]

    def extend(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` room for `num_tokens` tokens in all; False, with nothing done, if too few blocks are free."""
        short = max(0, -(-num_tokens // self.block_size) - len(seq.block_table))
        if short > len(self.free):
            return False
        for _ in range(short):
            block, _none = self.free.popitem(last=False)
            if key := self.keys[block]:
                del self.cached[key]
                self.keys[block] = None
            self.ref_counts[block] = 1
            seq.block_table.append(block)
        return True

    def register(self, seq: Sequence) -> None:
        """Cache the full blocks of `seq` whose tokens are known and whose KV a launched or planned step computes."""
        if not self.enable_prefix_caching:
            return
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        for i in range(len(seq.prefix_ids), num_full):
            key = self._key(seq, i, seq.prefix_ids[-1] if seq.prefix_ids else 0)
            block = self.cached.get(key)
            if block is None:
                block = seq.block_table[i]
                self.cached[key] = block
                self.keys[block] = key
                self.prefix_ids[block] = next(self._next_prefix_id)
            seq.prefix_ids.append(self.prefix_ids[block])

    def release(self, seq: Sequence) -> None:
        """Take the blocks of `seq` back, its last one first, so that the ends of prefixes are evicted first."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
                if self.keys[block] is None:
                    self.free.move_to_end(block, last=False)
        seq.block_table = []
        seq.prefix_ids = []

    def forget_all(self) -> None:
        """Empty the prefix cache. Who holds blocks keeps them."""
        self.cached.clear()
        self.keys = [None] * self.num_blocks

    def _key(self, seq: Sequence, i: int, parent: int) -> PrefixKey:
        return parent, tuple(seq.token_ids[i * self.block_size : (i + 1) * self.block_size])
