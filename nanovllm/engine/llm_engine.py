"""LLMEngine: the loop that joins the scheduler and the model runner. It knows token ids, no text.

    CPU     | commit N | plan N+2 | launch sampling N+1 | launch forward N+2 | commit N+1 | …
    device  | forward N+1 ………………………………………………………………… | sample N+1 | forward N+2 …

Step N+2 is planned from counts before the tokens of step N+1 are drawn: the device need not wait for the CPU, as long as the CPU
has committed N, planned N+2 and launched the sampling of N+1 before the device ends the forward of N+1.
N is committed before N+1 is sampled, so that the CPU knows every sampled sequence's history.
"""

import atexit
import ctypes
import gc
import os
import pickle
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.batch import PackedStep
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner, StepInFlight
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.startup import start_runner
from nanovllm.models.loader import Tensors
from nanovllm.parallel.group import Group

if TYPE_CHECKING:
    from nanovllm.parallel.workers import Workers

# More tokens in a step only leave a CPU's caches: prompts of 16 to 256 tokens ran 10 % faster than in one large step.
CPU_STEP_TOKENS = 1024

_collecting = threading.Lock()
_thresholds: list[tuple[int, int, int]] = []  # the collector's, as each that changes them found them


class LLMEngine:
    """Owns one model's scheduler and runner."""

    def __init__(self, config: Config, model_config: ModelConfig, tensors: Tensors):
        self.config = config
        self.model_config = model_config
        self.model_config.check_ranks(config.tensor_parallel_size)
        self.workers: Workers | None = None
        if config.tensor_parallel_size > 1:
            from nanovllm.parallel.workers import start_workers

            self.workers = start_workers(config)
        self.runner: ModelRunner | None = None
        device = config.device_of(0)
        try:
            with _on_device(device), no_full_collections():
                group = self.workers.begin(config) if self.workers else Group(device)
                with self.workers.all_ranks(is_step=False) if self.workers else nullcontext():
                    self.runner = start_runner(config, self.model_config, tensors, group)
        except BaseException:
            self.close()
            raise
        self.max_model_len = self.runner.max_len
        gc.collect()  # or it would happen in the middle of the first call, and take 0.3 s of it
        self.launched: StepInFlight | None = None  # up to its logits
        self.in_flight: StepInFlight | None = None  # the one before it, which is sampled
        self.to_abort: list[int] | None = None  # at the end of the step, in the middle of one
        self.why_closed = "this LLM is closed"
        self.why_refused = ""  # no request is taken; see extras.new_weights
        self.scheduler = self._new_scheduler()
        atexit.register(self.close)
        if self.workers is not None:
            os.register_at_fork(after_in_child=partial(_leave_to_parent, weakref.ref(self)))

    def add(self, seq: Sequence) -> None:
        self._runner()
        if self.why_refused:
            raise RuntimeError(self.why_refused)
        seq.arrival_time = time.time()
        self.scheduler.add(seq)

    def step(self) -> Step:
        """One turn of the loop: commit step N, plan N+2, sample N+1, launch N+2; returns N, or an empty step. Without
        async_scheduling: plan, launch, sample and commit one step.

        On any exception, Ctrl-C included, the sequences that are unfinished end as they are, and the engine is empty.
        """
        runner = self._runner()
        if self.to_abort is not None:
            raise RuntimeError("a logits processor cannot run the engine that runs it")
        self.to_abort = []
        try:
            with _on_device(runner.device):
                committed = self._commit()
                if self.launched is None:  # at the start, or after a turn in which there was nothing to plan
                    self.launched = self._launch(self._plan())
                if not self.config.async_scheduling:
                    self._sample()
                    return self._commit()
                planned = self._plan()
                self._sample()  # before the next launch, which writes where this step's rows and logits are
                self.launched = self._launch(planned)
                return committed
        except Exception:
            self._reset()
            raise
        except BaseException:  # what ends the call or the process, whatever a worker says
            with suppress(RuntimeError):
                self._reset()
            raise
        finally:
            to_abort, self.to_abort = self.to_abort, None
            self.abort(to_abort)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Drop requests that are unfinished. What is dropped in the middle of a step, by a logits processor or by the garbage
        collector that ends a stream, is dropped at its end. Ctrl-C in the middle of it empties the engine."""
        if self.to_abort is not None:
            self.to_abort += request_ids
            return
        try:
            self.scheduler.abort(request_ids)
        except BaseException:
            self._reset()
            raise
        if not self.scheduler.has_unfinished:
            self.launched = self.in_flight = None

    def stats(self) -> dict[str, Any]:
        manager, prefixes = self.scheduler.block_manager, self._runner().prefixes
        num_blocks = manager.num_blocks - 1
        in_use = num_blocks - len(manager.free)
        return {
            "num_kvcache_blocks": num_blocks,
            "kvcache_block_size": manager.block_size,
            "num_blocks_in_use": in_use,
            "num_blocks_cached": len(manager.cached),
            "kv_cache_usage": in_use / num_blocks,
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "prefix_cache_queries": self.scheduler.num_prefix_queries,
            "prefix_cache_hits": self.scheduler.num_prefix_hits,
            "num_preemptions": self.scheduler.num_preemptions,
            "kv_tokens_attended": prefixes.num_tokens,
            "kv_tokens_read": prefixes.num_tokens_read,
        }

    def close(self) -> None:
        """Give the devices' memory back, and end the workers. The engine cannot be used afterwards."""
        atexit.unregister(self.close)
        runner, workers = self.runner, self.workers
        self.runner = self.workers = self.launched = self.in_flight = None
        try:
            if runner is not None:
                runner.close()
        finally:  # Ctrl-C may come meanwhile
            if workers is not None:
                workers.close()
        del runner
        torch.cuda.empty_cache()  # does nothing where CUDA was not used

    def _runner(self) -> ModelRunner:
        if self.runner is None:
            raise RuntimeError(self.why_closed)
        return self.runner

    def _new_scheduler(self) -> Scheduler:
        config = self.config
        manager = BlockManager(self._runner().num_blocks, self._runner().block_size, config.enable_prefix_caching)
        budget = config.max_num_batched_tokens
        if config.torch_device.type == "cpu":
            budget = min(budget, CPU_STEP_TOKENS)
        return Scheduler(manager, config.max_num_seqs, budget)

    def _plan(self) -> tuple[PackedStep, Step] | None:
        step = self.scheduler.schedule()
        return (self._runner().pack(step), step) if step else None

    def _launch(self, planned: tuple[PackedStep, Step] | None) -> StepInFlight | None:
        """Launch a step up to its logits on every rank."""
        if planned is None:
            return None
        packed, step = planned
        with self.workers.all_ranks(pickle.dumps(packed)) if self.workers else nullcontext():
            return self._runner().forward(packed, step)

    def _sample(self) -> None:
        """Draw the tokens of the step that was launched, unless nobody waits for them any more."""
        launched, self.launched = self.launched, None
        if launched is not None and self.scheduler.has_unfinished:
            self.in_flight = self._runner().sample(launched)

    def _commit(self) -> Step:
        in_flight, self.in_flight = self.in_flight, None
        if in_flight is None:
            return Step()
        results = in_flight.wait()
        if self.workers is not None:
            self.workers.check()
        if in_flight.has_grammars:
            from nanovllm.extras.structured_outputs import take_tokens

            take_tokens([chunk.seq for chunk in in_flight.step.sampled], results[0])
        self.scheduler.commit(in_flight.step, *results)
        return in_flight.step

    def _reset(self) -> None:
        """Start over after an exception: a planned block may be in the prefix cache without its KV."""
        self.launched = self.in_flight = None
        try:
            self._runner().synchronize()
            if self.workers is not None:
                self.workers.check()
            for seq in (*self.scheduler.running, *self.scheduler.waiting):
                seq.ended[seq] = None
            self.scheduler = self._new_scheduler()
        except BaseException as error:
            with closing(self):
                if self.workers is not None:
                    self.workers.blame(error)
                raise


def _leave_to_parent(reference: "weakref.ref[LLMEngine]") -> None:
    """In a forked child, which owns nothing of several ranks: let go of the workers. The rest is leaked on purpose, as its
    destructors would wait for threads that a fork does not copy."""
    engine = reference()
    if engine is not None and engine.workers is not None:
        engine.workers.disconnect()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((engine.runner, engine.workers, engine.launched, engine.in_flight)))
        engine.runner = engine.workers = engine.launched = engine.in_flight = None
        engine.why_closed = "this LLM is the parent process's, and not its forked child's"


@contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Make the engine's device the current one, on which kernels, graphs and events are made. Turn the caller's autocast off,
    which would change the model's data type."""
    is_cast = torch.is_autocast_enabled(device.type)
    with (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        torch.autocast(device.type, enabled=False) if is_cast else nullcontext(),
    ):
        yield


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Meanwhile the garbage collector looks at new objects only, in all threads. With millions of live objects, as of compilers
    and log-probabilities, a full collection takes 0.1 to 0.3 s."""
    with _collecting:
        _thresholds.append(gc.get_threshold())
        gc.set_threshold(*_thresholds[-1][:2], 10**9)
    try:
        yield
    finally:
        # Calls of several threads overlap: the one that ends last takes back what the first one found.
        with _collecting:
            gc.set_threshold(*_thresholds.pop())
