"""Measure a model with EleutherAI's lm-eval (`pip install lm-eval`): its model interface, served by `LLM`.

python examples/lm_eval_harness.py                # three small tasks of examples/data, offline
python examples/lm_eval_harness.py --compare      # and lm-eval's own transformers model beside ours
python examples/lm_eval_harness.py --model Qwen/Qwen3-0.6B --dtype auto --tasks hellaswag gsm8k --limit 200
"""

import argparse
import time
from pathlib import Path
from typing import Any, cast

import lm_eval
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanovllm import LLM, Logprob, SamplingParams

DATA = Path(__file__).resolve().parent / "data"
DEMO_MODEL = DATA.parent.parent / "models" / "SmolLM2-135M-Instruct"
Scored = tuple[tuple[str, str], list[int], list[int]]  # texts; token ids of the context, of what follows


class NanoVLLM(TemplateLM):
    """An `LLM` as lm-eval knows models: log-likelihoods of continuations, and texts up to a stop string."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm, self.tokenizer = llm, llm.get_tokenizer()
        # lm-eval scores max_length + 1 tokens at most; the engine needs room for another one, which it draws
        self.max_length = llm.max_model_len - 2

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # a template may have written the first one already
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[Scored], **_: Any) -> list[tuple[float, bool]]:
        prompts = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        results = []
        for request, output in zip(requests, self.llm.generate(prompts, params), strict=True):
            continuation, rows = request[2], cast(list[dict[int, Logprob]], output.prompt_logprobs)
            scores = [row[i] for i, row in zip(continuation, rows[-len(continuation) :], strict=True)]
            results.append((sum(score.logprob for score in scores), all(score.rank == 1 for score in scores)))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        windows: list[list[Scored]] = []  # those of a text predict each of its tokens once
        for (text,) in (request.args for request in requests):
            token_ids = self.tok_encode(text)
            rolling = get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length, 1)
            windows.append([(("", text), *make_disjoint_window(window)) for window in rolling])
        scores = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        prompts, params = [], []
        for context, options in (request.args for request in requests):
            given = {"temperature": 0.0} | normalize_gen_kwargs(options)
            del given["do_sample"]  # the temperature says it
            num_tokens, stop = given.pop("max_gen_toks"), [text for text in given.pop("until") if text]
            if num_tokens >= self.max_length:
                raise ValueError(f"max_gen_toks must be below {self.max_length}, got {num_tokens}")
            prompts.append(self.tok_encode(context)[num_tokens - self.max_length :])
            params.append(SamplingParams(max_tokens=num_tokens, stop=stop or None, **given))
        return [output["text"] for output in self.llm.generate(prompts, params)]


def facts_tasks() -> list[dict[str, Any]]:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(DATA / "facts.jsonl")}}}
    return [task | data for task in yaml.safe_load((DATA / "facts.yaml").read_text())]


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", help="names of lm-eval's own (default: three made here)")
    parser.add_argument("--limit", type=int, help="so many items of each task")
    parser.add_argument("--compare", action="store_true", help="evaluate transformers too")
    args = parser.parse_args(argv)
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    ours = NanoVLLM(LLM(args.model, dtype=args.dtype))
    models: dict[str, TemplateLM] = {"nanovllm": ours}
    if args.compare:
        from lm_eval.models.huggingface import HFLM

        options = {"max_length": ours.max_length, "device": str(ours.llm.config.torch_device)}
        models["transformers"] = HFLM(str(args.model), dtype=args.dtype, batch_size=8, **options)
    manager = TaskManager(include_defaults=bool(args.tasks))  # reads thousands of files for lm-eval's own
    results = {}
    for name, model in models.items():
        start, tasks = time.perf_counter(), args.tasks or facts_tasks()
        results[name] = lm_eval.simple_evaluate(
            model, tasks=tasks, task_manager=manager, limit=args.limit, bootstrap_iters=0
        )
        results[name]["seconds"] = time.perf_counter() - start

    print(f"{'':30}", *(f"{name:>14}" for name in results))
    for task, scores in results["nanovllm"]["results"].items():
        for metric in (metric for metric, score in scores.items() if isinstance(score, float)):
            row = (f"{result['results'][task][metric]:14.4f}" for result in results.values())
            print(f"{task + ' ' + metric.removesuffix(',none'):30}", *row)
    print(f"{'seconds':30}", *(f"{result['seconds']:14.1f}" for result in results.values()))
    return results


if __name__ == "__main__":
    main()
