"""BlockManager: owns the paged KV blocks: who holds them, which are free, and which prefixes they cache.

A full block is found by its hash, the xxh3 of 128 bits of the hash of the block before it and of its own token ids. A hash
may collide, and one request must never have another's KV: on a hit the token ids are compared, and the prefix before the
block, which is named by a number that no other prefix ever had.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

from xxhash import xxh3_128_digest

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class CachedBlock:
    """A block in the prefix cache: what determines its KV, its hash, and the number of the prefix that ends with it."""

    parent_id: int  # number of the prefix before it; 0 is none
    token_ids: bytes  # int32
    hash: bytes
    prefix_id: int


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
        self.cached: dict[bytes, int] = {}  # blocks by their hashes
        self.contents: list[CachedBlock | None] = [None] * num_blocks
        self._next_prefix_id = count(1)

    def match(self, seq: Sequence) -> list[int]:
        """The cached blocks that `seq` begins with. Its last token is left out: it must be computed for its logits."""
        blocks: list[int] = []
        if self.enable_prefix_caching and not seq.awaits_prompt_logprobs:
            parent_id = 0
            for i in range((len(seq.token_ids) - 1) // self.block_size):
                token_ids = self._token_ids(seq, i)
                block = self.cached.get(self._hash(seq, i, token_ids), 0)
                content = self.contents[block]
                if content is None or content.parent_id != parent_id or content.token_ids != token_ids:
                    break
                blocks.append(block)
                parent_id = content.prefix_id
        return blocks

    def share(self, seq: Sequence, blocks: list[int]) -> None:
        """Let `seq`, which holds nothing yet, begin with the matched `blocks`."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self.free[block]
            self.ref_counts[block] += 1
        seq.block_table = list(blocks)
        seq.prefix_ids = [content.prefix_id for block in blocks if (content := self.contents[block])]

    def extend(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` room for `num_tokens` tokens in all; False, with nothing done, if too few blocks are free."""
        short = max(0, -(-num_tokens // self.block_size) - len(seq.block_table))
        if short > len(self.free):
            return False
        for _ in range(short):
            block, _none = self.free.popitem(last=False)
            self._forget(block)
            self.ref_counts[block] = 1
            seq.block_table.append(block)
        return True

    def register(self, seq: Sequence) -> None:
        """Cache the full blocks of `seq` whose tokens are known and whose KV a launched or planned step computes."""
        if not self.enable_prefix_caching:
            return
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        for i in range(len(seq.prefix_ids), num_full):
            parent_id = seq.prefix_ids[-1] if seq.prefix_ids else 0
            token_ids = self._token_ids(seq, i)
            block_hash = self._hash(seq, i, token_ids)
            other = self.cached.get(block_hash, 0)
            content = self.contents[other]
            if content is None or content.parent_id != parent_id or content.token_ids != token_ids:
                self._forget(other)  # whose hash collides, if there is one
                block = seq.block_table[i]
                content = CachedBlock(parent_id, token_ids, block_hash, next(self._next_prefix_id))
                self.cached[block_hash] = block
                self.contents[block] = content
            seq.prefix_ids.append(content.prefix_id)

    def release(self, seq: Sequence) -> None:
        """Take the blocks of `seq` back, its last one first, so that the ends of prefixes are evicted first."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
                if self.contents[block] is None:
                    self.free.move_to_end(block, last=False)
        seq.block_table = []
        seq.prefix_ids = []

    def forget_all(self) -> None:
        """Empty the prefix cache. Who holds blocks keeps them."""
        self.cached.clear()
        self.contents = [None] * self.num_blocks

    def _forget(self, block: int) -> None:
        content = self.contents[block]
        if content is not None:
            del self.cached[content.hash]
            self.contents[block] = None

    def _hash(self, seq: Sequence, i: int, token_ids: bytes) -> bytes:
        """The hash of block `i`, whose predecessors are hashed; it is computed once in the life of a sequence."""
        hashes = seq.block_hashes
        if i == len(hashes):
            hashes.append(xxh3_128_digest(hashes[-1] + token_ids if hashes else token_ids))
        return hashes[i]

    def _token_ids(self, seq: Sequence, i: int) -> bytes:
        return seq.token_ids[i * self.block_size : (i + 1) * self.block_size].tobytes()
