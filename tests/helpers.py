"""What several test modules need: small LLMs, requests of every kind, faults, and what must hold after a call."""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner, StepInFlight

ROOT = Path(__file__).parent.parent
STORY = "Once upon a time"
FEW = [[5, 6, 7], [9] * 20, [1], [3, 4] * 10]
SHARED = [(5 * i + 3) % 128 for i in range(40)]
PROMPTS = [SHARED[:n] + [(11 * i + n) % 128 for i in range(m)] for n in (0, 7, 16, 40) for m in (1, 5, 22)] * 2

# Where a step may fail, for `fail_at`.
IN_RUNNER = {name: (ModelRunner, name) for name in ("forward", "sample", "synchronize", "_compute")}
IN_RUNNER["wait"] = (StepInFlight, "wait")


def discourage_repeats(token_ids, logits):
    """A logits processor that looks at the history."""
    logits[token_ids[-3:]] -= 4.0
    return logits


EXTRAS = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": {3: 2.0, 7: -5.0}, "min_p": 0.02},
    {"allowed_token_ids": range(0, 128, 3)},
    {"logits_processors": [discourage_repeats]},
    {"min_tokens": 4, "stop_token_ids": range(0, 128, 5)},
    {"logprobs": 2, "repetition_penalty": 0.9},
    {"prompt_logprobs": 1},
]
PARAMS = [
    SamplingParams(
        temperature=0.0 if i % 2 else 0.8,
        max_tokens=5 + 7 * (i % 6),
        seed=i,
        top_k=20 * (i % 3),
        top_p=0.9,
        **EXTRAS[i % len(EXTRAS)],
    )
    for i in range(len(PROMPTS))
]


def greedy(n, **more):
    return SamplingParams(temperature=0, max_tokens=n, **more)


def force(*token_ids):
    """Parameters with which exactly these tokens are drawn."""

    def processor(drawn, logits):
        return torch.full_like(logits, -100.0).index_fill(0, torch.tensor(token_ids[len(drawn)]), 0.0)

    return {"temperature": 0, "max_tokens": len(token_ids), "logits_processors": [processor]}


def make_llm(folder, **options):
    """An LLM with small defaults; on the CPU unless the options say otherwise."""
    return LLM(
        folder, **({"max_model_len": 128, "device": "cpu", "use_tqdm": False, "num_kvcache_blocks": 400} | options)
    )


def run(llm, prompts=PROMPTS, params=PARAMS):
    outputs = [(o["token_ids"], o["finish_reason"]) for o in llm.generate(prompts, params, use_tqdm=False)]
    assert_nothing_leaks(llm)
    return outputs


def tokens(llm, prompts, params):
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def completions(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def drain(llm):
    """Step until nothing is unfinished; the (request id, token ids) that came out, in order."""
    results = []
    for _ in range(1000):
        if llm.is_finished():
            assert_nothing_leaks(llm)
            return results
        results += llm.step()[0]
    raise AssertionError("the steps never end")


def num_unfinished(llm):
    stats = llm.stats()
    return stats["num_running"] + stats["num_waiting"]


def assert_nothing_leaks(llm):
    scheduler = llm.engine.scheduler
    manager = scheduler.block_manager
    assert len(manager.free) == manager.num_blocks - 1
    assert not any(manager.ref_counts)
    assert sorted(scheduler.free_rows) == list(range(1, scheduler.max_num_seqs + 1))
    assert not scheduler.waiting
    assert not scheduler.running
    assert llm.is_finished()


def fail_at(monkeypatch, owner, name, call, error):
    """Let the `call`-th call of owner.name raise; what a kernel, an allocation or Ctrl-C would do."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def run_script(code, *args):
    """What a Python process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as in conftest.py
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@cache
def load_example(name):
    """The module of a script in examples/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collect(increments):
    """{(prompt, sample): (text, token ids, finish reason)} of a stream."""
    collected = {}
    for new in increments:
        text, token_ids, reason = collected.get((new.prompt_index, new.index), ("", [], None))
        assert reason is None, "nothing comes after the end"
        assert not new.text.endswith("\ufffd") or new.finish_reason
        collected[new.prompt_index, new.index] = text + new.text, token_ids + new.token_ids, new.finish_reason
    return collected
