"""LLM: what users hold. Prompts in, RequestOutputs out; text, progress and errors are handled here."""

import os
import random
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import chain, count
from numbers import Integral
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nanovllm.checks import check_choice
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine, no_full_collections
from nanovllm.engine.sequence import Sequence
from nanovllm.models.loader import read_model, resolve_model
from nanovllm.outputs import CompletionOutput, Increment, RequestMetrics, RequestOutput
from nanovllm.progress import progress_bar
from nanovllm.prompts import Params, Prompt, Prompts, check_params, check_request, parse_requests
from nanovllm.sampling_params import SamplingParams
from nanovllm.text import CompletionText, Detokenizer, TokenTexts, load_tokenizer

if TYPE_CHECKING:
    from nanovllm.extras.new_weights import Weights

ShowProgress = bool | Callable[..., tqdm]
Conversations = Seq[Mapping[str, Any]] | Seq[Seq[Mapping[str, Any]]]


class LLM:
    """A model that completes batches of prompts.

    One call runs at a time: a call from another thread waits for its turn. While a stream is open, or requests of `add_request`
    are unfinished, any call may run. Every step advances all requests, and each caller gets its own.

    Args:
        model: a folder with safetensors, or the id of a Hub repository.
        options: the fields of `nanovllm.config.Config`, nano-vllm's and vLLM's names.

    Raises:
        TypeError, ValueError: an unknown option, a value that cannot be honoured, a checkpoint that is not supported or
            does not fit, or too little memory; each with what is allowed.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any):
        self.config = Config.from_options(model, options)
        self._turn = threading.RLock()  # one call at a time
        if hasattr(os, "register_at_fork"):  # another thread may be in a call when a process forks
            os.register_at_fork(after_in_child=self._turn._at_fork_reinit)  # type: ignore[attr-defined]
        other = self.config.tokenizer
        tokenizer_folder = None if other is None else resolve_model(other, option="tokenizer")
        folder = resolve_model(model, self.config.revision)
        model_config, tensors = read_model(self.config, folder)
        self._tokenizer_folder = tokenizer_folder or folder
        self._tokenizer = load_tokenizer(self._tokenizer_folder)
        self._token_texts = None if self._tokenizer is None else TokenTexts(self._tokenizer)
        self._ids = count()
        self._ended: dict[Sequence, None] = {}  # sequences of `add_request` that have ended and `step` has not returned
        self._random = random.Random(self.config.seed)
        end_ids = model_config.eos_token_ids | {getattr(self._tokenizer, "eos_token_id", None)}
        self._eos_token_ids = frozenset(i for i in end_ids if i is not None and 0 <= i < model_config.vocab_size)
        self.engine = LLMEngine(self.config, model_config, tensors)

    @no_full_collections()
    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: Params = None,
        use_tqdm: ShowProgress = True,
        *,
        prompt_token_ids: Prompts | None = None,
        lora_request: None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts; results in their order.

        A request aborted by its own logits processor is returned with the tokens it has so far.

        Args:
            prompts: one or a list of: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: one for all, or one for each prompt; the default is `SamplingParams()`.
            use_tqdm: show a progress bar; or what makes one, with tqdm's arguments.
            prompt_token_ids: another name of `prompts`.
            lora_request: only None: no adapter is loaded.

        Raises:
            TypeError, ValueError: before anything runs, naming the prompt that cannot be run.
            BaseException: whatever happens once it runs, Ctrl-C included. It has `outputs`: a list in the prompts' order of
                what had finished, None for the rest. If a step was interrupted, all unfinished requests are dropped, those of
                `add_request` and `stream` too, and the prefix cache is empty. The LLM can be used again, unless it has
                several ranks and one of them failed.
        """
        check_choice("lora_request", lora_request, (None,))
        if (prompts is None) == (prompt_token_ids is None):
            raise TypeError("generate() takes either prompts or prompt_token_ids")
        with self._turn:
            wanted: Any = prompt_token_ids if prompts is None else prompts
            requests = {request[0].request_id: request for request in self._make_requests(wanted, sampling_params)}
            return self._complete(requests, use_tqdm)

    def _complete(self, requests: dict[int, list[Sequence]], use_tqdm: ShowProgress) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        ended: dict[Sequence, None] = {}

        def collect(request_ids: Iterable[int]) -> None:
            """Make the outputs of those requests that are done."""
            for request_id in request_ids:
                request = requests[request_id]
                if request_id not in outputs and all(seq.is_finished for seq in request):
                    outputs[request_id] = self._make_output(request)

        try:
            self._add(requests.values(), ended)
            num_tokens: Counter[str] = Counter()
            with progress_bar(use_tqdm, total=len(requests), desc="Generating", unit="request") as bar:
                while len(outputs) < len(requests) and self.engine.scheduler.has_unfinished:
                    step = self.engine.step()
                    num_tokens.update(prefill=step.num_prefill_tokens, decode=step.num_decode_tokens)
                    collect({seq.request_id for seq in ended})
                    ended.clear()
                    if use_tqdm:
                        self._show(bar, len(outputs), num_tokens)
            return [outputs[request_id] for request_id in requests]
        except BaseException as error:
            try:
                collect(requests)
            finally:
                error.outputs = [outputs.get(request_id) for request_id in requests]  # type: ignore[attr-defined]
                self.engine.abort(requests)
            raise

    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        use_tqdm: ShowProgress = True,
        lora_request: None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one or a list of conversations.

        Args:
            messages: {"role": …, "content": …}, a list for each conversation.
            options: of the tokenizer's `apply_chat_template` and of the model's own chat template:
                `add_generation_prompt` (True), `continue_final_message`, `tools`, `chat_template`, `enable_thinking` …;
                vLLM's `chat_template_kwargs` is taken too; as in vLLM, names in it that the template lacks are ignored.

        Raises:
            TypeError, ValueError: as `generate`; no chat template, or one that refuses the conversation; an option known to
                neither.
        """
        from nanovllm.extras.chat import make_prompts

        with self._turn:
            prompts = make_prompts(self.tokenizer, messages, options)
        return self.generate(prompts, sampling_params, use_tqdm, lora_request=lora_request)

    def stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[Increment]:
        """As `generate`, step by step: an iterator of what is new. Leaving it drops what is not finished."""
        with self._turn:
            return self._increments(self._make_requests(prompts, sampling_params))

    def _increments(self, requests: list[list[Sequence]]) -> Iterator[Increment]:
        places = {seq: (i, j) for i, request in enumerate(requests) for j, seq in enumerate(request)}
        num_given = dict.fromkeys(places, 0)  # tokens, of the sequences that have more to give
        ended: dict[Sequence, None] = {}
        try:
            with self._turn:
                self._add(requests, ended)
            while num_given:
                with self._turn:
                    if not all(seq.is_finished for seq in ended):
                        raise RuntimeError("an error in another call has dropped this stream's requests")
                    self.engine.step()
                    changed = {*self.engine.scheduler.running, *ended} & num_given.keys()
                    ended.clear()
                    increments = []
                    for seq in sorted(changed, key=places.__getitem__):
                        start, num_given[seq] = num_given[seq], seq.num_completion_tokens
                        if seq.is_finished:
                            del num_given[seq]
                        if start < seq.num_completion_tokens or seq.is_finished:
                            prompt_index, index = places[seq]
                            new = self._completion(seq, index, start)
                            increments.append(Increment(**new, prompt_index=prompt_index))
                yield from increments
        finally:
            with self._turn:
                self.engine.abort([request[0].request_id for request in requests])

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt for `step()`; returns its request id. Errors as in `generate`."""
        if isinstance(prompt, Integral):
            raise TypeError(f"prompt must be text, token ids or a dict, got {prompt!r}")
        with self._turn:
            (request,) = requests = self._make_requests([prompt], sampling_params)
            self._add(requests, self._ended)
            return request[0].request_id

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """One turn of the engine: ([(request id, completion token ids) that finished], number of tokens).

        The number is the prompt tokens of the step whose results came in, or minus its decode tokens if it had no
        prompt tokens. An exception drops every unfinished request, and the LLM can be used again; where one in another
        call has done so, RuntimeError says which requests are lost.
        """
        with self._turn:
            if lost := self._take_lost():
                raise RuntimeError(f"an error in another call has dropped the requests {lost}")
            try:
                step = self.engine.step()
            except BaseException:
                self._take_lost()
                raise
            outputs = [(seq.request_id, seq.completion_token_ids) for seq in self._ended]
            self._ended.clear()
            return outputs, step.num_prefill_tokens or -step.num_decode_tokens

    def is_finished(self) -> bool:
        """Whether `step()` has nothing more to give."""
        with self._turn:
            return not (self.engine.scheduler.has_unfinished or self._ended)

    def abort(self, request_id: int) -> None:
        """Drop a request: `step()` will not return it. One that is finished or unknown is passed over."""
        with self._turn:
            for seq in self.engine.scheduler.requests.get(request_id, ()):
                if seq.ended is self._ended:
                    seq.ended = {}  # where nobody waits for it
            self.engine.abort([request_id])
            for seq in [seq for seq in self._ended if seq.request_id == request_id]:
                del self._ended[seq]

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of what the checkpoint's generation_config.json recommends."""
        return self.engine.model_config.default_sampling_params.clone()

    def reset_prefix_cache(self) -> None:
        """Forget what is cached, so that no later request shares it."""
        with self._turn:
            self.engine.scheduler.block_manager.forget_all()

    def load_weights(self, source: "Weights") -> None:
        """Replace the weights, or a part of them, and empty the prefix cache. No request may run.

        Args:
            source: a folder with safetensors, or an iterable of (name in a checkpoint, tensor); of the same model.

        Raises:
            TypeError, ValueError: what does not fit. If some weights were replaced by then, no call runs until all have been.
            RuntimeError: requests run or wait, or this LLM is closed.
        """
        from nanovllm.extras.new_weights import replace_weights

        with self._turn:
            replace_weights(self.engine, source)

    @property
    def max_model_len(self) -> int:
        """The most tokens that a prompt and its completion may have together."""
        return self.engine.max_model_len

    def stats(self) -> dict[str, Any]:
        """Size and use of the KV pool, and counts since the start, or the last error (prefix cache in tokens, preemptions)."""
        return self.engine.stats()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ValueError if the folder has none."""
        if self._tokenizer is None:
            raise ValueError(f"{str(self._tokenizer_folder)!r} has no tokenizer: pass token ids, or LLM(tokenizer=...)")
        return self._tokenizer

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """vLLM's name of `tokenizer`."""
        return self.tokenizer

    def close(self) -> None:
        """Free the weights and the KV pool. The LLM cannot be used afterwards."""
        with self._turn:
            self.engine.close()

    exit = close  # nano-vllm's name

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if "engine" in self.__dict__ and not is_finalizing():
            self.close()

    def _make_requests(self, prompts: Prompts, params: Params) -> list[list[Sequence]]:
        """Validate everything that a call asks for, before anything runs; the sequences of each request, `n` of them."""
        parsed = parse_requests(prompts, params)
        texts = [request.text for request in parsed if request.token_ids is None]
        tokenized = iter(self.tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        vocab_size, max_len = self.engine.model_config.vocab_size, self.engine.max_model_len
        grammars: dict[int, Any] = {}  # of structured outputs, by the parameters that ask for them
        requests = []
        for name, text, token_ids, params in parsed:
            token_ids = array("i", next(tokenized)) if token_ids is None else token_ids
            check_request(name, token_ids, vocab_size, max_len)
            if id(params) not in grammars:  # one object may serve all prompts
                check_params(name, params, vocab_size, self._eos_token_ids)
                grammars[id(params)] = None
                if params.bad_words or params.structured_outputs:
                    from nanovllm.extras.text_rules import read_texts

                    grammars[id(params)] = read_texts(params, self.tokenizer, vocab_size, self._eos_token_ids)
            if params.stop:
                self.get_tokenizer()  # there must be one
            requests.append(self._make_samples(text, token_ids, params, grammars[id(params)]))
        return requests

    def _make_samples(
        self, prompt: str | None, token_ids: "array[int]", params: SamplingParams, grammar: Any
    ) -> list[Sequence]:
        """The `n` sequences of a request."""
        others = replace(params, prompt_logprobs=None) if params.n > 1 else params
        seed = self._random.getrandbits(63) if params.seed in (None, -1) else params.seed
        room = self.max_model_len - len(token_ids)
        request_id = next(self._ids)
        token_texts = self._token_texts if params.detokenize else None
        samples = []
        for i in range(params.n):
            seq = Sequence(
                request_id=request_id,
                token_ids=token_ids[:],
                # one that does not depend on n, the same in every process
                seed=seed if i == 0 else random.Random(f"{seed}, sample {i}").getrandbits(63),
                params=params if i == 0 else others,
                max_tokens=min(params.max_tokens or room, room),
                eos_token_ids=self._eos_token_ids,
                prompt=prompt,
                grammar=grammar and grammar.copy(),
            )
            if token_texts is not None:
                seq.completion_text = CompletionText(token_texts, token_ids, params)
                if seq.params.prompt_logprobs is not None:
                    seq.prompt_detokenizer = Detokenizer(token_texts, token_ids[:1])
            samples.append(seq)
        return samples

    def _add(self, requests: Iterable[list[Sequence]], ended: dict[Sequence, None]) -> None:
        """Queue the sequences, which go to `ended` when they have ended."""
        for seq in chain.from_iterable(requests):
            seq.ended = ended
            self.engine.add(seq)

    def _take_lost(self) -> list[int]:
        """Forget the added requests that an error has dropped; their ids."""
        lost = [seq for seq in self._ended if not seq.is_finished]
        for seq in lost:
            del self._ended[seq]
        return sorted({seq.request_id for seq in lost})

    def _make_output(self, samples: list[Sequence]) -> RequestOutput:
        first = samples[0]
        return RequestOutput(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=list(first.token_ids[: first.num_prompt_tokens]),
            outputs=[CompletionOutput(**self._completion(seq, i)) for i, seq in enumerate(samples)],
            num_cached_tokens=first.num_cached_tokens or 0,
            prompt_logprobs=None if first.params.prompt_logprobs is None else first.prompt_logprobs,
            metrics=RequestMetrics(
                first.arrival_time,
                min((s.first_token_time for s in samples if s.num_completion_tokens), default=0.0),
                max(s.finished_time for s in samples),
            ),
        )

    def _completion(self, seq: Sequence, index: int, start: int | None = None) -> dict[str, Any]:
        """The fields of a CompletionOutput; with `start`, of what is new from this token on."""
        params, token_ids, text = seq.params, seq.completion_token_ids, ""
        if seq.completion_text is not None:
            text = seq.completion_text.text if start is None else seq.completion_text.take()
        return {
            "index": index,
            "text": text,
            "token_ids": token_ids[start:],
            "finish_reason": seq.finish_reason,
            "stop_reason": seq.stop_reason,
            "cumulative_logprob": None if params.logprobs is None else seq.cumulative_logprob,
            "logprobs": None if params.logprobs is None else seq.logprobs[start:],
        }

    def _show(self, bar: tqdm, num_finished: int, num_tokens: Counter[str]) -> None:
        """Finished requests, tokens per second since the start, and the KV pool's use."""
        seconds = max(bar.format_dict["elapsed"], 1e-3)  # some clocks tick in 16 ms
        rates = {name: f"{num / seconds:.0f}tok/s" for name, num in num_tokens.items()}
        bar.set_postfix(rates, KV=f"{self.stats()['kv_cache_usage']:.0%}", refresh=False)
        bar.update(num_finished - bar.n)
