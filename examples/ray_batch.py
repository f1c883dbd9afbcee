"""Answer a dataset with a pool of engines, on one machine or on a Ray cluster; an engine that dies is started again.

python examples/ray_batch.py --input prompts.jsonl --output answers
python examples/ray_batch.py --input prompts --output answers --model Qwen/Qwen3-32B --tensor-parallel-size 4 --chat

The input is a JSONL or Parquet file, or a folder of files of one kind. The output is a folder of files of that kind, one
for each batch, in no order; on a cluster both must be where every machine sees them. A row keeps what it has and gets
"row_id" (its file, and its place there from 0), the answer, "finish_reason", and "error" if it cannot be run, such as
one that is too long. What is drawn for a row depends on its id and --seed, not on the engine, and a batch that runs
again replaces its file. The folder is called "….partial" until every row has been found in it exactly once.

RAY_ADDRESS, or a cluster that runs on this machine, is used if there is one; else Ray runs here for as long as this does.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.datasource import BlockBasedFileDatasink

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.config import Config

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
LINE = "line of JSON"  # the column of a JSONL row as it came: Arrow would give a field one type in all rows
Row = dict[str, Any]
Read = Callable[[Path], Iterator[pa.Table]]


def find_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if {file.suffix for file in files} not in ({".jsonl"}, {".parquet"}):
        raise ValueError(f"{path} must be a .jsonl or .parquet file, or a folder of one of these kinds")
    return files


def read_tables(file: Path) -> Iterator[pa.Table]:
    """A file, some rows at a time."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            yield from (pa.Table.from_batches([batch]) for batch in parquet.iter_batches(1024))
    else:
        with file.open(encoding="utf-8") as lines:
            rows = filter(str.strip, lines)
            while some := list(itertools.islice(rows, 1024)):
                yield pa.table({LINE: some})


def rows_of(table: pa.Table) -> Iterator[Row]:
    for row in table.to_pylist():
        yield {**json.loads(row.pop(LINE)), **row} if LINE in row else row


def read_rows(file: Path, root: Path, prompt: str, added: list[str]) -> Iterator[pa.Table]:
    """The rows of a file with their ids; a ValueError names one that cannot be answered."""
    name = file.relative_to(root if root.is_dir() else root.parent).as_posix()
    place = 0
    try:
        for table in read_tables(file):
            row_ids = []
            for row in rows_of(table):
                if prompt not in row:
                    raise ValueError(f"there is no column {prompt!r} among {list(row)}")
                if not isinstance(row[prompt], str):
                    raise ValueError(f"column {prompt!r} must be a text, got {row[prompt]!r}")
                if taken := sorted(row.keys() & added):
                    raise ValueError(f"the answer needs these names of columns: {taken}")
                row_ids.append(f"{name}:{place}")
                place += 1
            yield table.append_column("row_id", pa.array(row_ids))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}, row {place}: {error}") from None


def to_number(text: str) -> int:
    """63 bits that are the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def count_rows(files: list[Path], read: Read) -> dict[str, int]:
    """Read files on all machines: how many rows and errors they have, and a sum that tells which rows those are."""

    def count(item: Row) -> Row:
        rows = errors = checksum = 0
        try:
            for row in itertools.chain.from_iterable(map(rows_of, read(Path(item["file"])))):
                rows, errors = rows + 1, errors + (row.get("error") is not None)
                checksum = (checksum + to_number(row["row_id"])) % 2**63
        except ValueError as error:
            return {"refused": str(error)}
        return {"rows": rows, "errors": errors, "checksum": checksum}

    counts = ray.data.from_items([{"file": str(file)} for file in files]).map(count).take_all()
    if refused := [count["refused"] for count in counts if count.get("refused")]:
        raise ValueError("\n".join(refused[:10]))
    return {name: sum(count[name] for count in counts) % 2**63 for name in ("rows", "errors", "checksum")}


def choose_pool(actors: int | None, tensor_parallel_size: int) -> Row:
    """How many engines, and what Ray sets aside for each. Cores it does not: reading and writing need some."""
    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    num_gpus = 0 if tensor_parallel_size == 1 and not any(gpus) else tensor_parallel_size
    room = sum(num // num_gpus for num in gpus) if num_gpus else actors or 1
    if room < (actors or 1):
        raise ValueError(
            f"--actors {actors or 1} with --tensor-parallel-size {tensor_parallel_size} do not fit: "
            f"Ray's machines have {gpus} GPUs"
        )
    return {"num_cpus": 0, "num_gpus": num_gpus, "compute": ray.data.ActorPoolStrategy(size=actors or room)}


class Answerer:
    """One engine of the pool."""

    def __init__(self, args: argparse.Namespace, params: SamplingParams, options: dict[str, Any]):
        self.args, self.params = args, params
        self.llm = LLM(args.model, **options)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = list(rows_of(table))
        params = [replace(self.params, seed=to_number(f"{self.args.seed} {row['row_id']}")) for row in rows]
        answers = self.answer([row[self.args.prompt_column] for row in rows], params)
        for name, *values in zip((self.args.answer_column, "finish_reason", "error"), *answers, strict=True):
            table = table.append_column(name, pa.array(values, pa.string()))
        return table

    def answer(self, prompts: list[str], params: list[SamplingParams]) -> list[tuple[str | None, ...]]:
        """Text, finish reason and error of each. Halves are tried apart until what cannot be run is alone."""
        try:
            outputs = self.complete(prompts, params)
        except (TypeError, ValueError) as error:
            if len(prompts) == 1:
                return [(None, None, str(error))]
            half = len(prompts) // 2
            return self.answer(prompts[:half], params[:half]) + self.answer(prompts[half:], params[half:])
        return [(output["text"], output["finish_reason"], None) for output in outputs]

    def complete(self, prompts: list[str], params: list[SamplingParams]) -> list[RequestOutput]:
        if not self.args.chat:
            return self.llm.generate(prompts, params, use_tqdm=False)
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.llm.chat(conversations, params, use_tqdm=False)


class JsonLines(BlockBasedFileDatasink):
    """Ray's own writer goes through pandas, which changes types."""

    def write_block_to_file(self, block: Any, file: Any) -> None:
        for row in rows_of(block.to_arrow()):
            # half a surrogate pair is no UTF-8; as a backslash sequence it is JSON still
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hub id (default: the demo model)")
    parser.add_argument("--actors", type=positive, help="engines (default: all that the GPUs have room for)")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="GPUs of each (default: 1)")
    parser.add_argument("--batch-size", type=positive, default=512, help="rows (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other answers (default: 0)")
    parser.add_argument("--prompt-column", default="prompt", help="(default: %(default)s)")
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is what a user says; the model's template is used"
    )
    parser.add_argument("--answer-column", default="answer", help="(default: %(default)s)")
    parser.add_argument("--llm-options", type=json.loads, default={}, help='more options of LLM: {"dtype": "float32"}')
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = new_parser()
    args = parser.parse_args(argv)
    if args.model == str(DEMO_MODEL) and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")
    args.input, args.output = args.input.absolute(), args.output.absolute()
    unfinished = args.output.with_name(args.output.name + ".partial")
    added = ["row_id", args.answer_column, "finish_reason", "error"]
    read = partial(read_rows, root=args.input, prompt=args.prompt_column, added=added)
    try:  # what can be said before anything starts
        if len({*added, args.prompt_column}) <= len(added):
            raise ValueError(f"columns must have names of their own: {[args.prompt_column, *added]}")
        for folder in args.output, unfinished:
            if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
                raise ValueError(f"{folder} is there already")
        files = find_files(args.input)
        if next(itertools.chain.from_iterable(map(read, files)), None) is None:
            raise ValueError(f"{args.input} has no rows")
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        options = {"use_tqdm": False, **args.llm_options}
        Config.from_options(args.model, options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        pool = choose_pool(args.actors, args.tensor_parallel_size)
        rows = count_rows(files, read)
        options |= {"tensor_parallel_size": args.tensor_parallel_size}
        dataset = (
            ray.data.from_items([{"file": str(file)} for file in files])
            .map_batches(lambda item: read(Path(item["file"][0])), batch_size=1)
            .repartition(target_num_rows_per_block=args.batch_size)
            .map_batches(
                Answerer,
                fn_constructor_args=(args, params, options),
                batch_size=args.batch_size,
                batch_format="pyarrow",
                # Ray Data restarts actors that die; a batch that kills them again and again ends the run.
                ray_remote_args_fn=lambda: {"max_task_retries": 3},
                **pool,
            )
        )
        if files[0].suffix == ".parquet":
            dataset.write_parquet(str(unfinished))
        else:
            dataset.write_datasink(JsonLines(str(unfinished), file_format="jsonl"))
        answers = count_rows(find_files(unfinished), read_tables)
    finally:
        ray.shutdown()
    if answers | {"errors": 0} != rows:
        raise RuntimeError(f"{unfinished} does not have every row once: {answers} of {rows}")
    unfinished.rename(args.output)
    print(f"{rows['rows']} rows, each answered once, {answers['errors']} of them with an error: {args.output}")


if __name__ == "__main__":
    main()
