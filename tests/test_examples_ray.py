"""The example on Ray Data: every row once, whoever answers it and whoever dies, and nothing is left running."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from argparse import Namespace
from datetime import datetime

import psutil
import pytest
from helpers import ROOT, greedy, load_example

from nanovllm import LLM, SamplingParams

pytest.importorskip("ray.data", reason="needs ray[data]")
import pyarrow as pa
import pyarrow.parquet as pq

MARK = "NANOVLLM_TEST_RUN"  # in the environment of the example, which all of Ray's processes inherit


ray_batch = load_example("ray_batch")


def write_jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def written_lines(folder):
    """The whole lines so far."""
    return [line for file in folder.glob("*.jsonl") for line in file.read_bytes().split(b"\n")[:-1]]


# what is wrong is said before Ray starts


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(*options)`: the message of a run that must end before Ray starts."""

    def refuse(*options, source=tmp_path / "in.jsonl", output=tmp_path / "out"):
        monkeypatch.setattr(ray_batch.ray, "init", lambda **_: pytest.fail("Ray was started"))
        with pytest.raises(SystemExit) as exit:
            ray_batch.main(["--model", "unused", "--input", str(source), "--output", str(output), *options])
        assert exit.value.code == 2
        assert not (tmp_path / "out.partial").exists()
        return capsys.readouterr().err

    return refuse


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", [], "in.jsonl has no rows"),
        ("\n \n", [], "in.jsonl has no rows"),
        ("{", [], "in.jsonl, row 0: Expecting"),
        (GOOD + "\n[1]\n", [], "in.jsonl, row 1: 'list' object is not a mapping"),
        (GOOD + '{"text": "b", "id": 1}\n', [], "in.jsonl, row 1: there is no column 'prompt' among ['text', 'id']"),
        ('{"prompt": 5}', [], "in.jsonl, row 0: column 'prompt' must be a text, got 5"),
        (
            '{"prompt": "a", "row_id": 1, "answer": 2}',
            [],
            "row 0: the answer needs these names of columns: ['answer', 'row_id']",
        ),
        (GOOD, ["--actors", "0"], "--actors"),
        (GOOD, ["--batch-size", "-1"], "--batch-size"),
        (GOOD, ["--tensor-parallel-size", "x"], "--tensor-parallel-size"),
        (GOOD, ["--max-tokens", "0"], "max_tokens"),
        (GOOD, ["--temperature", "-1"], "temperature"),
        (GOOD, ["--llm-options", "{"], "--llm-options"),
        (GOOD, ["--llm-options", '{"dtipe": "float32"}'], "did you mean 'dtype'"),
        (GOOD, ["--llm-options", "5"], "not a mapping"),
        (GOOD, ["--answer-column", "error"], "columns must have names of their own"),
        (GOOD, ["--answer-column", "prompt"], "columns must have names of their own"),
    ],
)
def test_a_bad_row_or_option_is_named(content, options, message, refused, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    assert message in refused(*options)


def test_a_bad_parquet_file_is_named(refused, tmp_path):
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), file)
    assert "in.parquet, row 0: there is no column 'prompt' among ['text', 'n']" in refused(source=file)
    assert "in.parquet, row 0: column 'n' must be a text, got 1" in refused("--prompt-column", "n", source=file)
    pq.write_table(pa.table({"prompt": ["a", None]}), file)
    assert "in.parquet, row 1: column 'prompt' must be a text, got None" in refused(source=file)
    file.write_bytes(b"no Parquet")
    assert "in.parquet, row 0: " in refused(source=file)


def test_files_are_of_one_kind(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "mixed" / "a.jsonl", [{"prompt": "a"}])
    (tmp_path / "mixed" / "b.csv").touch()
    for name in "none.jsonl", "empty", "mixed", "mixed/b.csv":
        assert f"{tmp_path / name} must be a .jsonl or .parquet file" in refused(source=tmp_path / name)


@pytest.mark.parametrize("name", ["out", "out.partial", "out/a.jsonl", "out.partial/a.jsonl"])
def test_an_output_that_exists_or_has_files_is_left_alone(name, refused, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])
    file = write_jsonl(tmp_path / "elsewhere" / name, [{"a": 1}])
    assert f"{name.split('/')[0]} is there already" in refused(output=tmp_path / "elsewhere" / "out")
    assert file.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    ("gpus", "actors", "tensor_parallel_size", "expected"),
    [
        ([0, 0], None, 1, (1, 0)),
        ([0], 3, 1, (3, 0)),
        ([8, 0, 4], None, 1, (12, 1)),
        ([8, 3], None, 4, (2, 4)),
        ([8, 3], 1, 2, (1, 2)),
        ([8, 3], 3, 4, "--actors 3 with --tensor-parallel-size 4 do not fit: Ray's machines have [8, 3] GPUs"),
        ([2, 2], None, 4, "do not fit"),  # a group of GPUs is in one machine
        ([0], None, 2, "do not fit"),
    ],
)
def test_the_pool_fits_the_gpus(gpus, actors, tensor_parallel_size, expected, monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0} | ({"GPU": float(n)} if n else {})} for n in gpus]
    nodes.append({"Alive": False, "Resources": {"GPU": 8.0}})
    monkeypatch.setattr(ray_batch.ray, "nodes", lambda: nodes)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            ray_batch.choose_pool(actors, tensor_parallel_size)
    else:
        pool = ray_batch.choose_pool(actors, tensor_parallel_size)
        size = pool["compute"].min_size
        assert (size, pool["compute"].max_size, pool["num_gpus"]) == (expected[0], *expected)


# rows


def read(folder, rows):
    """The table that is read of a file with these rows."""
    file = write_jsonl(folder / "part" / "in.jsonl", rows)
    (table,) = ray_batch.read_rows(file, folder, "prompt", [])
    return table


def answer(model, *tables, temperature=0.8, seed=0, chat=False):
    """The rows that one engine makes of tables, one after the other."""
    args = Namespace(model=model, prompt_column="prompt", answer_column="said", seed=seed, chat=chat)
    params = SamplingParams(temperature=temperature, max_tokens=5)
    answerer = ray_batch.Answerer(args, params, {"use_tqdm": False})
    return [row for table in tables for row in ray_batch.rows_of(answerer(table))]


def test_an_answer_depends_on_its_row_alone(text_model, tmp_path):
    rows = [{"prompt": f"Number {i}", "extra": {"a": [i, None]}} for i in range(9)]
    rows[4]["prompt"] = "long " * 300
    table = read(tmp_path, rows)
    assert table["row_id"].to_pylist() == [f"part/in.jsonl:{i}" for i in range(9)]
    together = answer(text_model, table)
    assert answer(text_model, table[6:], table[:2], table[2:6]) == together[6:] + together[:6]
    for i, row in enumerate(together):
        new = {name: row.pop(name) for name in ("row_id", "said", "finish_reason", "error")}
        assert row == rows[i]
        assert (new["error"] is None) == (new["said"] is not None) == (new["finish_reason"] == "length") == (i != 4)
        row |= new
    assert "301 tokens" in together[4]["error"]
    others = answer(text_model, table, seed=1)
    assert all(row["said"] != other["said"] for row, other in zip(together, others) if row["said"] is not None)


def test_a_prompt_may_be_what_a_user_says(text_model, tmp_path):
    prompts = ["Hello", "What is the capital of France?"]
    table = read(tmp_path, [{"prompt": prompt} for prompt in prompts])
    answered = answer(text_model, table, temperature=0, chat=True)
    with LLM(text_model, use_tqdm=False) as llm:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        expected = [output["text"] for output in llm.chat(chats, greedy(5), use_tqdm=False)]
        assert expected != [output["text"] for output in llm.generate(prompts, greedy(5), use_tqdm=False)]
    assert [(row["prompt"], row["said"]) for row in answered] == list(zip(prompts, expected))


# runs


class Run:
    """The example in a process of its own, as a user starts it, and the processes of its Ray."""

    def __init__(self, folder, *options):
        self.log, self.mark = folder / "log", uuid.uuid4().hex
        # Paths of sockets must be short. A cluster that happens to be there is not this test's.
        self.ray_folder = tempfile.mkdtemp(prefix="ray")
        env = {"RAY_TMPDIR": self.ray_folder, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", MARK: self.mark}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, ray_batch.__file__, *map(str, options)]
        with self.log.open("w") as log:
            env = os.environ | env | {"PYTHONPATH": os.pathsep.join(paths)}
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def processes(self):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                pass  # another user's, or gone
        return found

    def engines(self):
        """Their process ids, with whether they are answering a batch: Ray says so in the title of a process."""
        engines = {}
        for process in self.processes():
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if title.startswith("ray::MapWorker(MapBatches(Answerer))"):
                engines[process.pid] = title.rstrip().endswith(".submit")
        return engines

    def wait(self, timeout):
        assert self.process.wait(timeout) == 0, self.log.read_text()
        deadline = time.monotonic() + 20
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)


@pytest.mark.slow
def test_parquet_keeps_its_columns_and_types(text_model, tmp_path):
    table = pa.table(
        {
            "question": pa.array([f"Number {i} is" for i in range(10)], pa.large_string()),
            "when": [datetime(2024, 1, 1 + i) for i in range(10)],
            "count": pa.array([None, *range(9)], pa.int32()),
            "tags": [[{"a": i}] for i in range(10)],
        }
    )
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    pq.write_table(table[:7], tmp_path / "in" / "a.parquet")
    pq.write_table(table[7:], tmp_path / "in" / "deeper" / "b.parquet")
    output = tmp_path / "out"
    options = ["--model", text_model, "--batch-size", 3, "--max-tokens", 4, "--temperature", 0.7]
    options += ["--prompt-column", "question", "--answer-column", "said"]
    with Run(tmp_path, "--input", tmp_path / "in", "--output", output, *options) as run:
        run.wait(timeout=300)
        assert "10 rows, each answered once, 0 of them with an error" in run.log.read_text()
    answers = pa.concat_tables(pq.read_table(file) for file in output.iterdir()).sort_by("row_id")
    ids = [f"a.parquet:{i}" for i in range(7)] + [f"deeper/b.parquet:{i}" for i in range(3)]
    assert answers["row_id"].to_pylist() == ids
    assert answers.select(table.column_names) == table
    assert answers.column_names == [*table.column_names, "row_id", "said", "finish_reason", "error"]
    assert all(answers["said"].to_pylist())
    assert not tmp_path.joinpath("out.partial").exists()


@pytest.mark.slow
def test_an_engine_that_is_killed_costs_no_answer(demo_model, tmp_path):
    """Two engines, 200 prompts, and a SIGKILL for an engine in the middle of a batch, when some are written."""
    rows = [{"prompt": f"The number {i} is", "id": i if i % 2 else f"№ {i}"} for i in range(200)]
    for i in range(2):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", rows[100 * i : 100 * i + 100])
    output = tmp_path / "out"
    options = ["--model", demo_model, "--actors", 2, "--batch-size", 8, "--max-tokens", 8]
    options += ["--llm-options", '{"dtype": "float32", "max_model_len": 512}']
    with Run(tmp_path, "--input", tmp_path / "in", "--output", output, *options) as run:
        deadline = time.monotonic() + 300
        while len(written := written_lines(tmp_path / "out.partial")) < 60 or not any(run.engines().values()):
            assert time.monotonic() < deadline, run.log.read_text()
            assert run.process.poll() is None, run.log.read_text()
            time.sleep(0.05)
        before = run.engines()
        victim = next(pid for pid, is_busy in before.items() if is_busy)
        os.kill(victim, signal.SIGKILL)
        assert 60 <= len(written) < 150
        assert len(before) == 2
        after = set()
        while run.process.poll() is None:
            after |= run.engines().keys()
            assert time.monotonic() < deadline + 120, run.log.read_text()
            time.sleep(0.2)
        run.wait(timeout=60)
        assert after - before.keys(), "no engine was started in place of the one that was killed"
        assert "200 rows, each answered once, 0 of them with an error" in run.log.read_text()

    found = [json.loads(line) for line in written_lines(output)]
    answers = {row["row_id"]: row for row in found}
    assert len(found) == len(answers) == 200
    with LLM(demo_model, device="cpu", dtype="float32", max_model_len=512, use_tqdm=False) as llm:
        expected = llm.generate([row["prompt"] for row in rows], greedy(8), use_tqdm=False)
    for i, (row, one) in enumerate(zip(rows, expected)):
        row_id = f"{i // 100}.jsonl:{i % 100}"
        new = {"row_id": row_id, "answer": one["text"], "finish_reason": one["finish_reason"], "error": None}
        assert answers[row_id] == row | new
