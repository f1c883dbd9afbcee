"""LLM: what users hold. Prompts in, RequestOutputs out; text, progress and errors are handled here."""

import random
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.config import Config, token_id_set
from nanovllm.engine.llm_engine import LLMEngine, StepCounts
from nanovllm.engine.sequence import Sequence
from nanovllm.models.loader import resolve_model
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.prompts import Prompt, check_request, parse_requests
from nanovllm.sampling_params import SamplingParams

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class LLM:
    """A model that completes batches of prompts.

    Args:
        model: a folder with safetensors, or the id of a Hub repository.
        options: the fields of `nanovllm.config.Config`, nano-vllm's and vLLM's names.

    Raises:
        TypeError, ValueError: an unknown option, a value that cannot be honoured, a checkpoint that is not supported or
            does not fit, or too little memory; each with what is allowed.
    """

    def __init__(self, model: str | PathLike[str], **options: Any):
        self.config = Config.from_options(model, options)
        self.engine = LLMEngine(self.config)
        self._ids = count()
        self._random = random.Random(self.config.seed)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos_token_ids: frozenset[int] | None = None

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts; results in their order.

        Args:
            prompts: one or a list of: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: one for all, or one for each prompt; the default is `SamplingParams()`.
            use_tqdm: show a progress bar.

        Raises:
            TypeError, ValueError: before anything runs, naming the prompt that cannot be run.
            BaseException: whatever happens in the middle, Ctrl-C included, with `outputs` on it: a list in the
                prompts' order of what had finished, None for the rest. The LLM can be used again.
        """
        requests = self._make_sequences(prompts, sampling_params)
        places = {seq.seq_id: i for i, seq in enumerate(requests)}
        outputs: list[RequestOutput | None] = [None] * len(requests)
        try:
            for seq in requests:
                self.engine.add(seq)
            num_done = 0
            with _ProgressBar(len(requests), use_tqdm) as bar:
                while num_done < len(requests) and not self.engine.is_idle:
                    counts = self.engine.step()
                    num_finished = self._collect(places, outputs)
                    num_done += num_finished
                    bar.update(num_finished, counts, self.engine)
        except BaseException as error:
            self._collect(places, outputs)
            self.engine.abort(set(places))
            error.outputs = outputs  # type: ignore[attr-defined]
            raise
        return [output for output in outputs if output is not None]

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt for `step()`; returns its request id. Errors as in `generate`."""
        (seq,) = self._make_sequences([prompt], sampling_params)
        self.engine.add(seq)
        return seq.seq_id

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """One turn of the engine: ([(request id, completion token ids) that finished], number of tokens).

        The number is the prompt tokens of the step whose results came in, or minus its decode tokens if it had no
        prompt tokens. An exception drops every unfinished request, and the LLM can be used again.
        """
        counts = self.engine.step()
        outputs = [(seq_id, seq.completion_token_ids) for seq_id, seq in self.engine.finished.items()]
        self.engine.finished.clear()
        return outputs, counts.num_prefill_tokens or -counts.num_decode_tokens

    def is_finished(self) -> bool:
        """Whether `step()` has nothing more to give."""
        return self.engine.is_idle and not self.engine.finished

    def abort(self, request_id: int) -> None:
        """Drop a request: `step()` will not return it. One that is finished or unknown is passed over."""
        self.engine.abort({request_id})

    def stats(self) -> dict[str, Any]:
        """Size and use of the KV pool, and counts since the start (prefix cache in tokens, preemptions)."""
        return self.engine.stats()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded when it is first asked for; ValueError if the folder has none."""
        if self._tokenizer is None:
            folder = self._tokenizer_folder()
            if not _has_tokenizer(folder):
                raise ValueError(
                    f"{str(folder)!r} has no tokenizer: pass prompts as token ids, or LLM(tokenizer=...)"
                )
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return self._tokenizer

    def close(self) -> None:
        """Free the weights and the KV pool. The LLM cannot be used afterwards."""
        self.engine.close()

    exit = close  # nano-vllm's name

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if "engine" in self.__dict__ and not sys.is_finalizing():
            self.close()

    def _make_sequences(
        self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None
    ) -> list[Sequence]:
        """Validate everything that a call asks for, before anything runs."""
        requests = parse_requests(prompts, sampling_params)
        texts = [request.text for request in requests if request.token_ids is None]
        tokenized = iter(self.tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        eos_token_ids = self._find_eos_token_ids() if requests else frozenset()
        vocab_size, max_len = self.engine.model_config.vocab_size, self.engine.max_model_len
        sequences = []
        for name, text, token_ids, params in requests:
            token_ids = next(tokenized) if token_ids is None else token_ids
            check_request(name, token_ids, params, vocab_size, max_len)
            seed = self._random.getrandbits(63) if params.seed in (None, -1) else params.seed
            max_tokens = min(params.max_tokens, max_len - len(token_ids))
            sequences.append(
                Sequence(next(self._ids), token_ids, params, seed, max_tokens, eos_token_ids, text)
            )
        return sequences

    def _tokenizer_folder(self) -> Path:
        return self.engine.folder if self.config.tokenizer is None else resolve_model(self.config.tokenizer)

    def _find_eos_token_ids(self) -> frozenset[int]:
        """Every end-of-sequence token: the checkpoint's, and the tokenizer's where there is one."""
        if self._eos_token_ids is None:
            ids = self.engine.model_config.eos_token_ids
            if _has_tokenizer(self._tokenizer_folder()):
                ids |= token_id_set(self.tokenizer.eos_token_id)
            self._eos_token_ids = ids
        return self._eos_token_ids

    def _collect(self, places: dict[int, int], outputs: list[RequestOutput | None]) -> int:
        """Move the finished sequences that have a place into `outputs`; returns how many. Others stay for `step()`."""
        finished = [seq_id for seq_id in self.engine.finished if seq_id in places]
        for seq_id in finished:
            outputs[places[seq_id]] = self._make_output(self.engine.finished.pop(seq_id))
        return len(finished)

    def _make_output(self, seq: Sequence) -> RequestOutput:
        token_ids = seq.completion_token_ids
        logprobs = None
        if seq.params.logprobs is not None:
            logprobs = [
                {
                    token_id: replace(p, decoded_token=self._decode([token_id]))
                    for token_id, p in candidates.items()
                }
                for candidates in seq.logprobs
            ]
        completion = CompletionOutput(
            index=0,
            text=self._decode(
                token_ids[:-1] if seq.finish_reason == "stop" else token_ids, skip_special_tokens=True
            ),
            token_ids=token_ids,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            cumulative_logprob=seq.cumulative_logprob if logprobs is not None else None,
            logprobs=logprobs,
        )
        prompt_token_ids = seq.token_ids[: seq.num_prompt_tokens]
        return RequestOutput(
            seq.seq_id, seq.prompt, prompt_token_ids, [completion], seq.num_cached_tokens or 0
        )

    def _decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """Their text; empty if there is no tokenizer."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class _ProgressBar:
    """Finished requests, tokens per second of the last half second (at the end: of the whole), and KV use."""

    def __init__(self, num_requests: int, show: bool):
        self.bar = tqdm(total=num_requests, desc="Generating", unit="request", disable=not show)
        self.start = self.window_start = time.perf_counter()
        self.total = self.window_total = StepCounts()

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._show(self.total, time.perf_counter() - self.start)
        self.bar.close()

    def update(self, num_finished: int, counts: StepCounts, engine: LLMEngine) -> None:
        self.bar.update(num_finished)
        self.total = self.total.plus(counts)
        self.window_total = self.window_total.plus(counts)
        now = time.perf_counter()
        if not self.bar.disable and now - self.window_start > 0.5:
            self._show(
                self.window_total, now - self.window_start, KV=f"{engine.stats()['kv_cache_usage']:.0%}"
            )
            self.window_start, self.window_total = now, StepCounts()

    def _show(self, counts: StepCounts, seconds: float, **more: str) -> None:
        prefill, decode = counts.num_prefill_tokens / seconds, counts.num_decode_tokens / seconds
        self.bar.set_postfix(prefill=f"{prefill:.0f}tok/s", decode=f"{decode:.0f}tok/s", **more)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
