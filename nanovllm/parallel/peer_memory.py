"""Memory of the GPUs of one host that all of them read and write, through the CUDA driver's inter-process handles.

torch has two ways to share memory, which do not serve here. Its symmetric memory counts meetings by the process, so that a new
worker never meets a rank 0 that had others before. Its shared tensors leave a file behind when a process is killed.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.parallel.all_reduce import ONE_PASS_BYTES, PROGRAMS, all_reduce, memory_bytes

NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: over NVLink
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
MOVED_BYTES = 2**24  # that reach a rank in one sum, at most: NCCL moves more of them faster


class Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("data", ctypes.c_char * 64),)


class PeerMemory:
    """This rank's memory, and the others' once it is opened."""

    def __init__(self, device: torch.device, rank: int, size: int):
        self.device = device
        self.rank = rank
        self.size = size
        self.capacity = MOVED_BYTES * size // (2 * size - 2) // 16 * 16  # bytes of a sum at most
        self.driver: Any = None
        self.own = ctypes.c_uint64()
        self.opened: list[ctypes.c_uint64] = []
        self.addresses: Tensor | None = None  # int64 [size]
        self.turns = torch.zeros(PROGRAMS, dtype=torch.int64, device=device)
        self.stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def open(self, store: dist.Store) -> None:
        """Meet the other ranks; OSError if the driver refuses, here or there."""
        exported = ""
        try:
            exported = self._export()
        finally:  # the others wait for it
            store.set(f"memory {self.rank}", exported)
        addresses = []
        for rank in range(self.size):
            theirs = store.get(f"memory {rank}")
            addresses.append(self.own.value if rank == self.rank else self._import(theirs))
        self.addresses = torch.tensor(addresses, device=self.device)

    def fits(self, x: Tensor) -> bool:
        return 0 < x.nbytes <= self.capacity and x.nbytes % 16 == 0

    def all_reduce(self, x: Tensor) -> None:
        assert self.addresses is not None
        all_reduce(x, self.addresses, self.turns, self.stop, self.rank, self.capacity)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Load the kernels of small and of large sums before a call waits for them."""
        for num_bytes in 256, ONE_PASS_BYTES + 256:
            self.all_reduce(torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=self.device))

    def close(self) -> None:
        """Whatever the driver says: after a failure it refuses everything."""
        if self.driver is not None:
            with torch.cuda.device(self.device):
                for address in self.opened:
                    self.driver.cuIpcCloseMemHandle(address)
                self.driver.cuMemFree_v2(self.own)

    def _export(self) -> str:
        self.driver = ctypes.CDLL("libcuda.so.1")
        num_bytes = ctypes.c_size_t(memory_bytes(self.size, self.capacity))
        self._call("cuMemAlloc_v2", ctypes.byref(self.own), num_bytes)
        self._call("cuMemsetD8_v2", self.own, ctypes.c_ubyte(0), num_bytes)
        handle = Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), self.own)
        return json.dumps([_host(), self.device.index or 0, bytes(handle).hex()])

    def _import(self, exported: bytes) -> int:
        host, device, handle = json.loads(exported) if exported else ("", 0, "")
        if host != _host():
            raise OSError("a rank has no memory on this host")
        has_atomics, address = ctypes.c_int(), ctypes.c_uint64()
        devices = ctypes.c_int(self.device.index or 0), ctypes.c_int(device)
        self._call("cuDeviceGetP2PAttribute", ctypes.byref(has_atomics), NATIVE_ATOMICS, *devices)
        if not has_atomics.value:
            raise OSError("NVLink does not join the GPUs")
        theirs = Handle.from_buffer_copy(bytes.fromhex(handle))
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), theirs, ctypes.c_uint(LAZY_PEER_ACCESS))
        self.opened.append(address)
        return address.value

    def _call(self, function: str, *arguments: Any) -> None:
        if error := getattr(self.driver, function)(*arguments):
            raise OSError(f"{function} failed with CUDA's error {error}")


def _host() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()
