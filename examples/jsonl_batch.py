"""Answer a file of prompts: JSON lines in, JSON lines out, and an interrupted run goes on where it was.

python examples/jsonl_batch.py prompts.jsonl answers.jsonl
python examples/jsonl_batch.py prompts.jsonl answers.jsonl --model Qwen/Qwen3-0.6B --temperature 0.6 --chunk 1024

A line has {"prompt": text} or {"messages": [{"role": "user", "content": text}]}, and whatever else: it comes back with
"index" (the number of its line, from 0), "text", "prompt_tokens", "completion_tokens" and "finish_reason", in the same
order. A row that cannot be run, such as one that is too long, has "error" instead.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovllm import LLM, RequestOutput, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
HEAD = b'{"index": '  # of every line that is written here
ANSWER_FIELDS = {"index", "text", "prompt_tokens", "completion_tokens", "finish_reason", "error"}
Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """The rows with their indices; whatever is wrong with one is said before anything runs."""
    rows = []
    with file.open(encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
                    raise ValueError("an object with either 'prompt' or 'messages' is needed")
                if not isinstance(row.get("prompt", ""), str) or not isinstance(row.get("messages", []), list):
                    raise ValueError("'prompt' must be a text, and 'messages' a list")
                if taken := row.keys() & ANSWER_FIELDS:
                    raise ValueError(f"the answer needs these names of fields: {sorted(taken)}")
            except ValueError as error:
                raise SystemExit(f"{file}, line {index + 1}: {error}") from None
            rows.append({"index": index} | row)
    return rows


def find_start(file: Path) -> int:
    """The index after the last row of the output, whose end is cut off if it is half a line."""
    if not file.exists():
        return 0
    size, last = 0, b""
    with file.open("r+b") as lines:
        for line in lines:
            if line[: len(HEAD)] != HEAD[: len(line)]:
                raise SystemExit(f"{file} is there, and was not written by this program")
            if line.endswith(b"\n"):
                size, last = size + len(line), line
        lines.truncate(size)
    return json.loads(last)["index"] + 1 if last else 0


def answer(call: Callable[..., list[RequestOutput]], prompts: list[Any], params: list[SamplingParams]) -> list[Row]:
    """What is new in each row. Halves are tried apart until a prompt that cannot be run is alone."""
    try:
        outputs = call(prompts, params, use_tqdm=False)
    except (TypeError, ValueError) as error:
        if len(prompts) == 1:
            return [{"error": str(error)}]
        half = len(prompts) // 2
        return answer(call, prompts[:half], params[:half]) + answer(call, prompts[half:], params[half:])
    return [
        {
            "text": output["text"],
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(output["token_ids"]),
            "finish_reason": output["finish_reason"],
        }
        for output in outputs
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--chunk", type=int, default=256, help="rows between two writes (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.chunk < 1:
        parser.error(f"--chunk must be at least 1, got {args.chunk}")
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    rows = read_rows(args.input)
    start = find_start(args.output)
    todo = [row for row in rows if row["index"] >= start]
    if not todo:
        return print("every row is answered")
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    with (
        LLM(args.model) as llm,
        # half a surrogate pair is no UTF-8; as a backslash sequence it is JSON still
        args.output.open("a", encoding="utf-8", errors="backslashreplace") as output,
        tqdm(total=len(rows), initial=len(rows) - len(todo), unit="row") as bar,
    ):
        for at in range(0, len(todo), args.chunk):
            chunk = todo[at : at + args.chunk]
            for call, field in (llm.generate, "prompt"), (llm.chat, "messages"):
                if some := [row for row in chunk if field in row]:
                    # a seed that depends on the row alone, so that a run that goes on draws the same tokens
                    seeded = [replace(params, seed=row["index"]) for row in some]
                    answers = answer(call, [row[field] for row in some], seeded)
                    for row, new in zip(some, answers, strict=True):
                        row |= new
            output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chunk)
            output.flush()
            bar.update(len(chunk))


if __name__ == "__main__":
    main()
