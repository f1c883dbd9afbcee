"""The ranks above 0: processes that compute the steps which rank 0 plans, sends to them as bytes, and samples.

Rank 0 starts them, or joins those that torchrun started. A rank that ends for any reason ends the model: rank 0 says which
one it was and why. A worker whose connection to rank 0 is closed exits at once.
"""

import json
import os
import pickle
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.scheduler import Step
from nanovllm.engine.startup import start_runner
from nanovllm.models.loader import read_model, resolve_model
from nanovllm.parallel.group import TIMEOUT, Group

CLOSE, EXIT = b"", b"exit"  # in place of a step, and of a model
GRACE_SECONDS = 10  # for workers to say why they failed, and to exit


class Workers:
    """Rank 0's side of the connections to the other ranks."""

    def __init__(self, store: dist.Store, connections: list[Connection], processes: list[subprocess.Popen[bytes]]):
        self.store = store
        self.connections = connections  # of rank 1, 2 …
        self.processes = processes  # those that rank 0 has started
        self.group = Group()
        self.failure = ""
        self.has_failed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, config: Config) -> Group:
        """Have every rank make this model's group and its runner."""
        for name in "model_class", "attention_backend":
            kind = getattr(config, name)
            kind = kind if isinstance(kind, type) else type(kind)
            if self.processes and kind.__module__ == "__main__":
                raise ValueError(
                    f"{name} must be in a module that other processes can import, got {kind!r}; or start with torchrun"
                )
        prefix = str(self.store.add("nanovllm", 1))
        self.group = Group(config.device_of(0), 0, config.tensor_parallel_size)
        store = dist.PrefixStore(prefix, self.store)
        with self.all_ranks(pickle.dumps((config, prefix)), is_step=False):
            self._connect(store)
        return self.group

    def check(self) -> None:
        """RuntimeError if a rank has failed, saying which one and why."""
        if self.has_failed.is_set():
            raise RuntimeError(self.failure)

    def blame(self, error: BaseException) -> None:
        """As `check`, but an error of the device may come before the news of the rank that caused it."""
        if isinstance(error, RuntimeError | OSError):
            self.has_failed.wait(GRACE_SECONDS)
        is_input = isinstance(error, ValueError | TypeError)  # which another rank may have refused as well
        if self.has_failed.is_set() and not is_input:
            raise RuntimeError(self.failure) from error

    @contextmanager
    def all_ranks(self, message: bytes = b"", is_step: bool = True) -> Iterator[None]:
        """Send a message, if there is one, and do on this rank what the others do then.

        Every rank must launch all its collectives, or the others deadlock: any error ends the model, and Ctrl-C waits until a
        step is launched. If a worker has failed, its error is raised.
        """
        with _interrupt_deferred() if is_step else nullcontext():
            try:
                for connection in self.connections if message else []:
                    connection.send_bytes(message)
                yield
            except BaseException as error:  # what another signal's handler raises too
                self.blame(error)
                self.failure = f"rank 0 failed: {error!r}"
                self.has_failed.set()
                self.group.abort()
                raise
            else:
                self.check()  # if a rank has failed, the abort may have ended this rank's waits without an error

    def close(self) -> None:
        """End the model; and the processes that rank 0 has started, within seconds."""
        for connection in self.connections:
            with suppress(OSError):  # where it is gone
                connection.send_bytes(CLOSE)
                if self.processes:
                    connection.send_bytes(EXIT)
        if self.processes:
            grace_seconds = 0 if self.has_failed.is_set() else GRACE_SECONDS  # for those that wait for another rank
            self.has_failed.set()  # that they are gone is no news
            deadline = time.monotonic() + grace_seconds
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, deadline - time.monotonic()))
                process.kill()  # does nothing to one that has ended
                process.wait()
        self.group.close()

    def disconnect(self) -> None:
        """In a forked child: close its copies of the connections, by whose end workers see that rank 0 is gone."""
        for connection in self.connections:
            connection.close()

    def _connect(self, store: dist.Store) -> None:
        """Join the other ranks, or raise if one fails first. NCCL's and gloo's rendezvous
        cannot be cancelled, so it begins when all are there, in a daemon thread that can be abandoned."""
        while not store.check([f"rank {rank}" for rank in range(1, self.group.size)]):
            self.check()
            time.sleep(0.01)
        connected: Future[None] = Future()

        def connect() -> None:
            try:
                self.group.connect(store)
                connected.set_result(None)
            except BaseException as error:
                connected.set_exception(error)

        threading.Thread(target=connect, daemon=True).start()
        while not futures.wait([connected], 0.1).done:
            self.check()
        connected.result()

    def _watch(self) -> None:
        """Workers send nothing unless they fail."""
        connection = wait(self.connections)[0]
        assert isinstance(connection, Connection)
        index = self.connections.index(connection)
        try:
            reason = connection.recv_bytes().decode()
        except (EOFError, OSError):
            reason = "it is gone"
            if self.processes:
                reason = f"its process ended with exit code {self.processes[index].wait()}"
        if not self.has_failed.is_set():
            self.failure = f"rank {index + 1} failed: {reason}"
            self.has_failed.set()
            self.group.abort()


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:  # None: not Python's
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def start_workers(config: Config) -> Workers:
    """The other ranks of a model: processes on this machine, or those that torchrun started.

    Does not return on torchrun's ranks above 0, which work until rank 0 is done.
    """
    if dist.is_torchelastic_launched():
        workers = _join_torchrun(config.tensor_parallel_size)
        workers.check()
        if workers.group.is_connected:
            raise RuntimeError("torchrun's ranks run one LLM at a time: close the other one first")
        return workers
    size = config.tensor_parallel_size
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if config.torch_device.type == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    connections, processes = [], []
    for rank in range(1, size):
        ours, theirs = socket.socketpair()
        arguments = [str(number) for number in (rank, size, store.port, theirs.fileno())]
        process = subprocess.Popen(
            [sys.executable, "-c", "from nanovllm.parallel.workers import main; main()", *arguments],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for rank 0
        )
        theirs.close()
        connections.append(Connection(ours.detach()))
        processes.append(process)
    return Workers(store, connections, processes)


@cache
def _join_torchrun(size: int) -> Workers:
    """torchrun's ranks serve one LLM after the other, over the same connections."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    if world_size != size:
        raise ValueError(f"tensor_parallel_size must be torchrun's number of ranks, {world_size}, got {size}")
    if rank > 0:
        host, port, key = json.loads(store.get("nanovllm address"))
        store.set(f"nanovllm rank {rank}", "connects")
        connection = Client((host, port), authkey=key.encode())
        set_tcp_options(connection)
        connection.send(rank)
        serve(connection, new_inbox(connection), store, rank, int(os.environ["LOCAL_RANK"]), size)
        os._exit(0)
    host, key = os.environ["MASTER_ADDR"], secrets.token_hex()
    with Listener(("", 0), authkey=key.encode()) as listener:  # a host may know itself by an address that others do not
        store.set("nanovllm address", json.dumps([host, listener.address[1], key]))
        store.wait([f"nanovllm rank {rank}" for rank in range(1, size)], TIMEOUT)
        connections = sorted([listener.accept() for _ in range(size - 1)], key=Connection.recv)  # by rank
    for connection in connections:
        set_tcp_options(connection)
    return Workers(store, connections, [])


def set_tcp_options(connection: Connection) -> None:
    """TCP would keep the end of a message until the other side has confirmed what came before it, and wait for ever for a
    host that is gone without a word: one that confirms nothing for 20 seconds is gone."""
    options = {"TCP_NODELAY": 1, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 20_000}
    options |= {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10}  # Linux's name, and macOS's
    with socket.socket(fileno=os.dup(connection.fileno())) as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


Inbox = queue.SimpleQueue[bytes]


def serve(connection: Connection, inbox: Inbox, store: dist.Store, rank: int, local_rank: int, size: int) -> None:
    """A worker's whole life: for one model after another, steps until it is closed. Ends with the process."""
    try:
        while (message := inbox.get()) != EXIT:
            config, prefix = pickle.loads(message)
            group = Group(config.device_of(local_rank), rank, size)
            if group.device.type == "cuda":
                torch.cuda.set_device(group.device)
            model_config, tensors = read_model(config, resolve_model(config.model, config.revision))
            model_store = dist.PrefixStore(prefix, store)
            model_store.set(f"rank {rank}", "is here")
            group.connect(model_store)
            runner = start_runner(config, model_config, tensors, group)
            while (message := inbox.get()) != CLOSE:
                work = pickle.loads(message)
                if isinstance(work, Path):
                    from nanovllm.extras.new_weights import fill_from_folder

                    fill_from_folder(runner, work)
                else:
                    runner.forward(work, Step())
            runner.close()
            del runner
            group.close()
    except BaseException as error:
        reason = "".join(traceback.format_exception_only(error)) + traceback.format_exc()
        connection.send_bytes(reason.encode())
        os._exit(1)


def new_inbox(connection: Connection) -> Inbox:
    """Where rank 0's messages come in. When rank 0 is gone, the process ends, whatever it waits for."""
    inbox: Inbox = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    return inbox


def main() -> None:
    """What rank 0 starts."""
    rank, size, port, fileno = map(int, sys.argv[1:])
    connection = Connection(fileno)
    inbox = new_inbox(connection)  # first: rank 0 may be gone before it is joined
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    serve(connection, inbox, store, rank, rank, size)
