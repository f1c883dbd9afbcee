"""A sum over the GPUs of one host, a few microseconds long: the ranks read from and write to each other's memory.

The twin is `Group.all_reduce` over NCCL. In one pass every rank reads all that the others wrote. In two
passes, which more than two ranks take for more than ONE_PASS_BYTES, each sums its slice of all inputs, and writes the sum over that slice in all of them: no
other rank reads it there before the ranks have met again.

Each rank's memory holds flags, int64 [2 meetings, PROGRAMS, ranks], and then room for two inputs, used in turn. A rank's sums
run one after the other. A rank uses a room again two turns later. By then it has seen every rank's flag of the turn between, so
that all have read what was there.
"""

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128  # that wait for each other: a GPU must hold them all at once
BLOCK = 4096
ALIGNED = tl.constexpr(8)  # elements that are moved at once
ONE_PASS_BYTES = 2**19


def flag_bytes(size: int) -> int:
    """What the flags of so many ranks take, at the beginning of each one's memory."""
    return 2 * PROGRAMS * size * 8


def memory_bytes(size: int, capacity: int) -> int:
    """What each of so many ranks needs for inputs of `capacity` bytes."""
    return flag_bytes(size) + 2 * capacity


def all_reduce(x: Tensor, memories: Tensor, turns: Tensor, stop: Tensor, rank: int, capacity: int) -> None:
    """Overwrite x, contiguous, with the sum of all ranks' x in their order: all get the same.

    Args:
        memories: int64 [ranks], the addresses of their memories, zero at first.
        turns: int64 [PROGRAMS], zero at first; how many sums there have been.
        stop: int32 [1] in pinned memory; 1 ends the waiting, and the sums mean nothing.
        capacity: bytes of an input at most, a multiple of 16.
    """
    size = len(memories)
    num_passes = 2 if size > 2 and x.nbytes > ONE_PASS_BYTES else 1
    all_reduce_kernel[(PROGRAMS,)](
        x, memories, turns, stop, x.numel(), flag_bytes(size), capacity,
        RANK=rank, SIZE=size, LANES=triton.next_power_of_2(size), NUM_PASSES=num_passes, BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip


@triton.jit
def all_reduce_kernel(
    x, memories, turns, stop, n, data_start, capacity,
    RANK: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr, NUM_PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    turn = tl.load(turns + program) + 1
    tl.debug_barrier()  # every thread has read it
    tl.store(turns + program, turn)
    slice_size = tl.cdiv(n, num_programs * SIZE * ALIGNED) * ALIGNED
    start = program * slice_size * SIZE
    end = tl.minimum(start + slice_size * SIZE, n)
    if start < end:
        offset = data_start + (turn & 1) * capacity
        own = data_of(memories, RANK, offset, x)
        for i in range(start, end, BLOCK):
            element = i + tl.arange(0, BLOCK)
            tl.store(own + element, tl.load(x + element, mask=element < end), mask=element < end)
        meet(memories, program, turn, stop, RANK, SIZE, LANES)
        if NUM_PASSES == 1:
            for i in range(start, end, BLOCK):
                element = i + tl.arange(0, BLOCK)
                tl.store(x + element, sum_of(memories, element, end, offset, x, SIZE), mask=element < end)
        else:
            slice_end = tl.minimum(start + (RANK + 1) * slice_size, end)
            for i in range(start + RANK * slice_size, slice_end, BLOCK):
                element = i + tl.arange(0, BLOCK)
                total = sum_of(memories, element, slice_end, offset, x, SIZE)
                for r in tl.static_range(SIZE):
                    tl.store(data_of(memories, r, offset, x) + element, total, mask=element < slice_end)
            meet(memories, num_programs + program, turn, stop, RANK, SIZE, LANES)
            for i in range(start, end, BLOCK):
                element = i + tl.arange(0, BLOCK)
                tl.store(x + element, tl.load(own + element, mask=element < end), mask=element < end)


@triton.jit
def sum_of(memories, element, end, offset, x, SIZE: tl.constexpr):
    """Of all ranks' inputs, at `element`, in x's type."""
    total = tl.zeros(element.shape, tl.float32)
    for r in tl.static_range(SIZE):
        total += tl.load(data_of(memories, r, offset, x) + element, mask=element < end).to(tl.float32)
    return total.to(x.dtype.element_ty)


@triton.jit
def data_of(memories, r, offset, x):
    """The pointer is told to be aligned: else every element would be loaded by itself."""
    address = tl.load(memories + r) + offset
    return tl.multiple_of(address.to(x.dtype, bitcast=True), 16)


@triton.jit
def meet(memories, place, turn, stop, RANK: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Tell the others that what was written for this turn is there, and wait for what they write."""
    tl.debug_barrier()  # all threads have written theirs
    ranks = tl.arange(0, LANES)  # told at once: one after the other would wait for each
    theirs = flags_of(tl.load(memories + ranks, mask=ranks < SIZE), place, SIZE)
    tl.atomic_xchg(theirs + RANK, turn, mask=ranks < SIZE, sem="release", scope="sys")
    own = flags_of(tl.load(memories + RANK), place, SIZE)
    for r in tl.static_range(SIZE):
        if r != RANK:
            wait_for(own + r, turn, stop)
    tl.debug_barrier()


@triton.jit
def flags_of(address, place, SIZE: tl.constexpr):
    """Those of one meeting of one program, a flag for each rank."""
    return address.to(tl.pointer_type(tl.int64), bitcast=True) + place * SIZE


@triton.jit
def wait_for(flag, turn, stop):
    """A rank may be one turn ahead."""
    is_early = True
    spins = 0
    while is_early:
        is_early = tl.atomic_add(flag, 0, sem="acquire", scope="sys") < turn
        spins += 1
        # One thread reads it. If all did, reading the host's memory would take longer than these spins, and make this rank
        # late for the next sum.
        if spins % 1024 == 0:
            first = tl.arange(0, 1024)
            if tl.max(tl.load(stop + first, mask=first == 0, other=0, volatile=True)) != 0:
                is_early = False
