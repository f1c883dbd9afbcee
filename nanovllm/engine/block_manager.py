"""BlockManager: owns the paged KV blocks: who holds them, which are free, and which prefixes they cache.

The key of a full block is the 128-bit xxh3 of the key of the block before it and of its own token ids. Hashes may collide, and
one request must never have another's KV: on a hit the token ids are compared, and the prefix before the block. Each prefix has
a number of its own, which is never used again.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

from xxhash import xxh3_128_digest

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class CachedBlock:
    """A block in the prefix cache, what determines its KV, and the number of the prefix that ends with it."""

    block: int
    hash: bytes
    token_ids: bytes  # int32
    parent_prefix_id: int  # of the prefix before it; 0 is none
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
        self.cached: dict[bytes, CachedBlock] = {}  # by their hashes
        self.contents: list[CachedBlock | None] = [None] * num_blocks  # by their blocks
        self._next_prefix_id = count(1)

    def match(self, seq: Sequence) -> list[int]:
        """The cached blocks that `seq` begins with. Its last token is left out: it must be computed for its logits."""
        blocks: list[int] = []
        if self.enable_prefix_caching and not seq.awaits_prompt_logprobs:
            parent_prefix_id = 0
            for i in range((len(seq.token_ids) - 1) // self.block_size):
                found = self._find(seq, i, parent_prefix_id)
                if found is None:
                    break
                blocks.append(found.block)
                parent_prefix_id = found.prefix_id
        return blocks

    def share(self, seq: Sequence, blocks: list[int]) -> None:
        """Let `seq`, which holds nothing yet, begin with the matched `blocks`."""
        seq.num_shared_blocks = 0
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self.free[block]
            else:
                seq.num_shared_blocks += 1
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
        """Cache each full block of `seq` whose tokens are known, once the step that computes its KV is planned."""
        if not self.enable_prefix_caching:
            return
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        for i in range(len(seq.prefix_ids), num_full):
            parent_prefix_id = seq.prefix_ids[-1] if seq.prefix_ids else 0
            found = self._find(seq, i, parent_prefix_id)
            if found is None:
                block, block_hash = seq.block_table[i], seq.block_hashes[i]
                if block_hash in self.cached:  # another block's, which collides
                    self._forget(self.cached[block_hash].block)
                found = CachedBlock(
                    block, block_hash, self._token_ids(seq, i), parent_prefix_id, next(self._next_prefix_id)
                )
                self.cached[block_hash] = self.contents[block] = found
            seq.prefix_ids.append(found.prefix_id)

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

    def _find(self, seq: Sequence, i: int, parent_prefix_id: int) -> CachedBlock | None:
        """The cached block that has the KV of block `i` of `seq`, whose predecessors are hashed."""
        token_ids, hashes = self._token_ids(seq, i), seq.block_hashes
        if i == len(hashes):  # computed once in the life of a sequence
            hashes.append(xxh3_128_digest(hashes[-1] + token_ids if hashes else token_ids))
        found = self.cached.get(hashes[i])
        if found is None or found.parent_prefix_id != parent_prefix_id or found.token_ids != token_ids:
            return None
        return found

    def _token_ids(self, seq: Sequence, i: int) -> bytes:
        return seq.token_ids[i * self.block_size : (i + 1) * self.block_size].tobytes()
