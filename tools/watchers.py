"""What watches a pass: how long the device works, and what each step does."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Step


class DeviceTimer:
    """How long the device takes for what each call launches, without waiting for it before `take`.

    That runs from when the device gets to the call until the call's last kernel ends; where the device waits for the CPU in
    between, that counts as well.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # used again after each `take`
        self.num_calls = 0

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.num_calls == len(self.events):
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        start, end = self.events[self.num_calls]
        self.num_calls += 1
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        result = function(*args)
        end.record(stream)
        return result

    def take(self) -> list[float]:
        """Seconds of each call since the last `take`."""
        torch.cuda.synchronize(self.device)
        calls = self.events[: self.num_calls]
        self.num_calls = 0
        return [start.elapsed_time(end) / 1000 for start, end in calls]


@contextmanager
def wrapped(owner: Any, method: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile, calls of the method are `wrapper(method, *args)`. Left there, it would keep a closed LLM's memory."""
    original = getattr(owner, method)
    setattr(owner, method, lambda *args: wrapper(original, *args))
    try:
        yield
    finally:
        delattr(owner, method)


class Turn(NamedTuple):
    """One turn of the loop, and the step whose tokens came in."""

    start: float
    end: float
    step: Step
    kv_usage: float


class Trace:
    """What the turns of an engine's loop did, and when."""

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.turns: list[Turn] = []

    def call(self, run: Callable[[], Step]) -> Step:
        start = time.perf_counter()
        step = run()
        end = time.perf_counter()
        self.turns.append(Turn(start, end, step, self.engine.stats()["kv_cache_usage"]))
        return step


@contextmanager
def watched(engine: LLMEngine, timer: DeviceTimer | None, trace: Trace | None) -> Iterator[None]:
    """Meanwhile, the timer gets what the engine launches, and the trace its steps."""
    with ExitStack() as watchers:
        if timer:
            watchers.enter_context(wrapped(engine.runner, "forward", timer.call))
            watchers.enter_context(wrapped(engine.runner, "sample", timer.call))
        if trace:
            watchers.enter_context(wrapped(engine, "step", trace.call))
        yield
