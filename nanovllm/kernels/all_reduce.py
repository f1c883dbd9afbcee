"""A sum over the GPUs of one host in one pass: every rank reads what the others wrote, at a few microseconds' cost.

The twin is `Group.all_reduce` over NCCL. Each rank's memory holds flags, int64 [PROGRAMS, ranks], and then room for two
inputs, used in turn: who writes an input knows that the others have read the one before the last, for they have since told
it that they began the last.
"""

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128  # that wait for each other: a GPU must hold them all at once
BLOCK = 8192


def memory_bytes(size: int, capacity: int) -> int:
    """What each of so many ranks needs for inputs of `capacity` bytes."""
    return PROGRAMS * size * 8 + 2 * capacity


def all_reduce(x: Tensor, memories: Tensor, turns: Tensor, stop: Tensor, rank: int, capacity: int) -> None:
    """Overwrite x, contiguous, with the sum of all ranks' x in their order: all get the same.

    Args:
        memories: int64 [ranks], the addresses of their memories, zero at first.
        turns: int64 [PROGRAMS], zero at first; how many sums there have been.
        stop: int32 [1] in pinned memory; 1 ends the waiting, and the sums mean nothing.
        capacity: bytes of an input at most, a multiple of 16.
    """
    all_reduce_kernel[(PROGRAMS,)](
        x, memories, turns, stop, x.numel(), capacity, RANK=rank, SIZE=len(memories), BLOCK=BLOCK, num_warps=16
    )


@triton.jit
def all_reduce_kernel(
    x, memories, turns, stop, n, capacity, RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    turn = tl.load(turns + program) + 1
    tl.debug_barrier()  # every thread has read it
    tl.store(turns + program, turn)
    share = tl.cdiv(tl.cdiv(n, BLOCK), tl.num_programs(0)) * BLOCK
    start = program * share
    end = tl.minimum(start + share, n)
    if start < end:
        offset = tl.num_programs(0) * SIZE * 8 + (turn & 1) * capacity
        own = data_of(memories, RANK, offset, x)
        for i in range(start, end, BLOCK):
            element = i + tl.arange(0, BLOCK)
            tl.store(own + element, tl.load(x + element, mask=element < end), mask=element < end)
        tl.debug_barrier()  # all of it is written before anyone is told
        for r in tl.static_range(SIZE):
            if r != RANK:
                tl.atomic_xchg(flag_of(memories, r, program * SIZE + RANK), turn, sem="release", scope="sys")
        for r in tl.static_range(SIZE):
            if r != RANK:
                wait_for(flag_of(memories, RANK, program * SIZE + r), turn, stop)
        tl.debug_barrier()
        for i in range(start, end, BLOCK):
            element = i + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for r in tl.static_range(SIZE):
                theirs = data_of(memories, r, offset, x)
                total += tl.load(theirs + element, mask=element < end).to(tl.float32)
            tl.store(x + element, total.to(x.dtype.element_ty), mask=element < end)


@triton.jit
def data_of(memories, r, offset, x):
    """The pointer is told to be aligned: else every element would be loaded by itself."""
    address = tl.load(memories + r) + offset
    return tl.multiple_of(address.to(x.dtype, bitcast=True), 16)


@triton.jit
def flag_of(memories, r, i):
    return tl.load(memories + r).to(tl.pointer_type(tl.int64), bitcast=True) + i


@triton.jit
def wait_for(flag, turn, stop):
    """A rank may be one turn ahead."""
    is_early = True
    spins = 0
    while is_early:
        is_early = tl.atomic_add(flag, 0, sem="acquire", scope="sys") < turn
        spins += 1
        # Not joined by "and", which would read the host's memory every time.
        if spins % 1024 == 0:  # noqa: SIM102
            if tl.load(stop, volatile=True) != 0:
                is_early = False
