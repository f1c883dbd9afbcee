"""Tensor parallelism over processes on the CPU (gloo): the tokens of one rank, and an end without orphans for every failure."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from helpers import SHARED, greedy, make_llm, tokens
from hypothesis import given
from hypothesis import strategies as st
from parallel_models import FailsAtStart, FailsInTheMiddle

from nanovllm import LLM, SamplingParams
from nanovllm.engine.memory import GIB, check_weights_fit
from nanovllm.layers.linear import vocabulary_share
from nanovllm.parallel.group import Group
from nanovllm.parallel.workers import Workers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers are joined by socket pairs")

PROMPTS = [SHARED[:n] + [(11 * i + n) % 128 for i in range(m)] for n in (0, 7, 40) for m in (1, 22)] * 2
PARAMS = [
    greedy(12, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True, top_k=20, top_p=0.9),
    SamplingParams(temperature=1, seed=4, max_tokens=9, logprobs=2, prompt_logprobs=1, n=2),
    greedy(30, repetition_penalty=1.3, logit_bias={3: 1.0}),
]
PREEMPTS = {"kvcache_block_size": 4, "num_kvcache_blocks": 34, "max_num_batched_tokens": 13}
START = """
import json, sys
from nanovllm import LLM, SamplingParams
options = {"max_model_len": 128, "max_num_seqs": 8, "num_kvcache_blocks": 40, "use_tqdm": False}
llm = LLM(sys.argv[1], tensor_parallel_size=2, device=sys.argv[2], **options)
def generate(max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [o.outputs[0].token_ids for o in llm.generate([[1, 2, 3], [4]], params, use_tqdm=False)]
"""
GENERATE = """
try:
    print("ready", flush=True)
    sys.stdin.readline()
    while len(sys.argv) > 3:
        generate(100)
except KeyboardInterrupt:
    pass
print(json.dumps(generate(5)), flush=True)
"""
FORK = """
import os, signal, time
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    for call in generate, lambda n: llm.add_request([1]), lambda n: llm.step():
        try:
            call(5)
        except RuntimeError as error:
            assert "is the parent process's" in str(error), error
        else:
            os._exit(3)
    if len(sys.argv) > 3:
        time.sleep(50)
    llm.close()
    del llm
    sys.exit(0)
assert len(sys.argv) > 3 or os.waitpid(pid, 0)[1] == 0
"""
SECOND = """
try:
    LLM(sys.argv[1], tensor_parallel_size=2, device=sys.argv[2], **options)
    print("a second one runs beside the first")
except RuntimeError as error:
    assert "one LLM at a time: close the other one first" in str(error)
    llm.close()
"""
SENDS_AT_ONCE_AND_NOTICES_A_HOST_THAT_IS_GONE = """
import os, socket
(connection,) = llm.engine.workers.connections
with socket.socket(fileno=os.dup(connection.fileno())) as tcp:
    assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    if sys.platform == "linux":
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
"""


def is_ours(process: psutil.Process) -> bool:
    """A compiler may keep processes of its own."""
    try:
        return "nanovllm" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def assert_ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process.cmdline() for process in alive] == []


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert_ended([child for child in psutil.Process().children(recursive=True) if is_ours(child)])


def new_llm(folder: Path, size: int, **options) -> LLM:
    return make_llm(str(folder), tensor_parallel_size=size, **{"num_kvcache_blocks": 100} | options)


def workers_of(llm: LLM) -> list[psutil.Process]:
    return [psutil.Process(process.pid) for process in llm.engine.workers.processes]


def run_all(llm: LLM) -> list:
    """Tokens and log-probabilities of everything that can be asked, and what the prefix cache found."""
    params = [PARAMS[i % len(PARAMS)] for i in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    found = [[completion.token_ids for completion in output.outputs] for output in outputs]
    tables = [t for output in outputs for t in output.prompt_logprobs or [] if t]
    tables += [t for o in outputs for completion in o.outputs for t in completion.logprobs or []]
    logprobs = [candidate.logprob for table in tables for candidate in table.values()]
    streamed: dict[int, list[int]] = {}
    for new in llm.stream(PROMPTS[:3], PARAMS[1]):
        streamed.setdefault(new.prompt_index, []).extend(new.token_ids)
    left = llm.add_request(PROMPTS[4], PARAMS[0])
    kept = llm.add_request(PROMPTS[5], PARAMS[0])
    llm.step()
    llm.abort(left)
    stepped = []
    while not llm.is_finished():
        stepped += llm.step()[0]
    assert [request_id for request_id, _ in stepped] == [kept]
    hits = llm.stats()["prefix_cache_hits"]
    llm.reset_prefix_cache()
    again = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:2], PARAMS[0], use_tqdm=False)]
    assert llm.stats()["kv_cache_usage"] == 0
    return [found, streamed, stepped[0][1], again, hits, llm.stats()["num_preemptions"], logprobs]


def assert_same(found: list, expected: list, tolerance: float) -> None:
    assert found[:-1] == expected[:-1]
    assert found[-1] == pytest.approx(expected[-1], abs=tolerance), "log-probabilities"


def test_new_weights_reach_every_rank(tiny_model):
    params, other = greedy(12, ignore_eos=True), tiny_model(seed=5)
    llm = new_llm(tiny_model(), 2)
    llm.load_weights(other)
    assert tokens(llm, PROMPTS, params) == tokens(new_llm(other, 1), PROMPTS, params)
    with pytest.raises(ValueError, match="source must be a folder, which each rank reads"):
        llm.load_weights([])
    llm.close()


@pytest.mark.parametrize(
    ("family", "size", "changes", "options"),
    [
        ("qwen3", 2, {}, PREEMPTS),
        # 2 key-value heads, each on two ranks; a vocabulary that 4 does not divide; biases, which one rank adds.
        ("llama", 4, {"vocab_size": 129, "attention_bias": True, "mlp_bias": True}, {}),
        ("qwen2", 2, {"num_key_value_heads": 4, "tie_word_embeddings": True}, {"async_scheduling": False}),
        pytest.param("qwen3", 4, {}, PREEMPTS, marks=pytest.mark.slow),
        pytest.param("llama", 2, {"attention_bias": True, "mlp_bias": True}, PREEMPTS, marks=pytest.mark.slow),
        pytest.param("qwen2", 4, {}, PREEMPTS, marks=pytest.mark.slow),
    ],
)
def test_the_tokens_of_one_rank(family, size, changes, options, tiny_model):
    folder = tiny_model(family, **changes)
    with new_llm(folder, 1, **options) as llm:
        expected = run_all(llm)
    with new_llm(folder, size, **options) as llm:
        processes = workers_of(llm)
        found = run_all(llm)
    assert len(processes) == size - 1
    assert not any(process.is_running() for process in processes), "closing an LLM ends its workers"
    assert_same(found, expected, tolerance=1e-4)
    assert bool(found[-2]) == (options is PREEMPTS)


on_gpus = pytest.param("cuda", marks=pytest.mark.gpu(2))
on_both = pytest.mark.parametrize("device", ["cpu", on_gpus])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.gpu(size)) for size in (2, 4, 8)])
@pytest.mark.parametrize("options", [PREEMPTS, {}, {"enforce_eager": True}], ids=["preempts", "graphs", "eager"])
def test_gpus_give_the_tokens_of_one(family, size, options, tiny_model):
    """Of more than two, some share key-value heads."""
    folder = tiny_model(family, num_attention_heads=8)
    found = []
    for num_ranks in (size, 1):
        with new_llm(folder, num_ranks, device="cuda", max_num_seqs=8, **options) as llm:
            found.append(run_all(llm))
    assert_same(*found, tolerance=1e-3)


@pytest.mark.parametrize("device", [on_gpus])
def test_a_rank_with_less_memory(device, tiny_model):
    """What others hold is no part of our share; where it leaves too little of it, the rank says so."""
    options = {"device": device, "num_kvcache_blocks": -1, "enforce_eager": True}
    _, total = torch.cuda.mem_get_info(1)
    held = torch.empty(total // 2, dtype=torch.uint8, device="cuda:1")
    with new_llm(tiny_model("qwen3"), 2, gpu_memory_utilization=0.3, **options) as llm:
        assert len(llm.generate([[1, 2]], PARAMS[0], use_tqdm=False)[0]["token_ids"]) == 12
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed: ValueError: the KV cache would take .* are free"):
        new_llm(tiny_model("qwen3"), 2, gpu_memory_utilization=0.9, **options)
    del held


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
def test_a_world_of_one_goes_through_nccl(options, tiny_model, monkeypatch):
    """Its all-reduces and gathers are in the graphs."""

    def connected(device):
        group = Group(torch.device("cuda", 0))
        group.connect(dist.HashStore())
        groups.append(group)
        return group

    groups: list[Group] = []
    found = []
    for _ in range(2):
        with new_llm(tiny_model("qwen3"), 1, device="cuda", max_num_seqs=8, **options) as llm:
            assert llm.engine.runner.group.is_connected == bool(groups)
            assert bool(llm.engine.runner.graphs.sizes) == (not options)
            found.append(run_all(llm))
        monkeypatch.setattr("nanovllm.engine.llm_engine.Group", connected)
    assert_same(*found, tolerance=1e-4)
    groups[0].abort()


def test_an_error_of_a_request_leaves_the_ranks_in_step(tiny_model):
    def refuse(token_ids, logits):
        if len(token_ids) == 3:
            raise RuntimeError("a processor that fails")
        return logits

    with new_llm(tiny_model("qwen3"), 2) as llm:
        (expected,) = llm.generate([[1, 2]], PARAMS[0], use_tqdm=False)
        with pytest.raises(RuntimeError, match="a processor that fails"):
            llm.generate([[3]], SamplingParams(max_tokens=9, logits_processors=[refuse]), use_tqdm=False)
        (output,) = llm.generate([[1, 2]], PARAMS[0], use_tqdm=False)
        assert output["token_ids"] == expected["token_ids"]


def test_another_signals_handler_in_the_middle_of_a_step_ends_the_model(tiny_model, monkeypatch):
    """The other rank has been sent a step that this one does not launch: it waits, and must not be waited for."""

    def terminated(packed, step):
        raise SystemExit(3)

    llm = new_llm(tiny_model("qwen3"), 2)
    workers = workers_of(llm)
    monkeypatch.setattr(llm.engine.runner, "forward", terminated)
    with pytest.raises(SystemExit):
        llm.generate([[1, 2]], PARAMS[0], use_tqdm=False)
    assert_ended(workers)
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate([[1]], use_tqdm=False)


@on_both
def test_a_worker_that_is_killed_ends_the_call(device, tiny_model):
    llm = new_llm(tiny_model("qwen3"), 2, device=device, max_num_seqs=8)
    (worker,) = workers_of(llm)
    increments = llm.stream([[1, 2]], greedy(100, ignore_eos=True))
    next(increments)
    worker.kill()
    with pytest.raises(RuntimeError, match="rank 1 failed: its process ended with exit code -9"):
        list(increments)
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate([[1]], use_tqdm=False)


@on_both
def test_a_worker_that_is_killed_while_the_ranks_meet(device, tiny_model, monkeypatch):
    """Nothing ends the meeting of NCCL's ranks; on the CPU it is a stand-in that waits as long."""
    connect, never = Group.connect, threading.Event()

    def meet(group, store):
        for child in filter(is_ours, psutil.Process().children()):
            child.kill()
        return connect(group, store) if device == "cuda" else never.wait()

    monkeypatch.setattr(Group, "connect", meet)
    with pytest.raises(RuntimeError, match="rank 1 failed: its process ended with exit code -9"):
        new_llm(tiny_model("qwen3"), 2, device=device, max_num_seqs=8)
    never.set()
    monkeypatch.undo()
    with new_llm(tiny_model("qwen3"), 2, device=device, max_num_seqs=8) as llm:
        assert len(llm.generate([[1, 2]], PARAMS[0], use_tqdm=False)[0]["token_ids"]) == 12


@pytest.mark.parametrize(
    ("model_class", "message"),
    [(FailsAtStart, "no room for this rank's weights"), (FailsInTheMiddle, "no room for this step")],
)
def test_an_exception_of_a_worker_is_reported(model_class, message, tiny_model):
    with pytest.raises(RuntimeError, match=f"(?s)rank 1 failed: MemoryError: {message}"):  # noqa: PT012
        llm = new_llm(tiny_model("qwen3"), 2, model_class=model_class)
        llm.generate([[1, 2]], PARAMS[0], use_tqdm=False)


def test_a_wait_that_an_abort_ends_has_no_result():
    """It ends NCCL's kernels without an error, and without what they should have written."""
    group = Group(size=2)

    def aborted(*_):
        group.abort()
        return SimpleNamespace(wait=lambda: None)

    group.backend = SimpleNamespace(allreduce=aborted)
    with pytest.raises(RuntimeError, match="a rank has failed"):
        group.least(3)


def test_a_worker_that_fails_while_rank_0_sees_no_error(tiny_model, monkeypatch):
    begun, begin = [], Workers.begin
    monkeypatch.setattr(Workers, "begin", lambda workers, config: begun.append(workers) or begin(workers, config))
    monkeypatch.setattr(Group, "least", lambda group, value: begun[0].has_failed.wait(60) and value)
    with pytest.raises(RuntimeError, match="rank 1 failed: MemoryError: no room for this rank's weights"):
        new_llm(tiny_model("qwen3"), 2, model_class=FailsAtStart)


def start_script(
    folder: Path, device: str, *arguments: str, first_gpu: int = 0, fork: str = ""
) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A script without a main guard, and its children, once its LLM is there. It goes on when it is told to."""
    command = [sys.executable, "-c", START + fork + GENERATE, str(folder), device, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")[first_gpu : first_gpu + 2]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    process = subprocess.Popen(command, **pipes, env=environment, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    return process, list(filter(is_ours, psutil.Process(process.pid).children()))


def tell(process: subprocess.Popen) -> None:
    process.stdin.write("go on\n")
    process.stdin.flush()


def assert_ends_well(process: subprocess.Popen, workers: list[psutil.Process]) -> str:
    """What the script has written, when it and its one worker are gone."""
    output = process.communicate(timeout=60)[0]
    assert [len(token_ids) for token_ids in json.loads(output)] == [5, 5]
    assert process.returncode == 0
    assert len(workers) == 1
    assert_ended(workers)
    return output


@pytest.mark.parametrize(
    ("device", "first_gpus"),
    [
        ("cpu", [0, 0]),
        pytest.param("cuda", [0, 0], marks=pytest.mark.gpu(2), id="same GPUs"),
        pytest.param("cuda", [0, 2], marks=pytest.mark.gpu(4), id="own GPUs"),
    ],
)
def test_two_engines_beside_each_other_and_a_normal_exit(device, first_gpus, tiny_model):
    started = [start_script(tiny_model("qwen3"), device, first_gpu=first) for first in first_gpus]
    for process, _ in started:
        tell(process)
    first, second = (assert_ends_well(*processes) for processes in started)
    assert first == second


def test_a_forked_child_owns_nothing_of_the_ranks(tiny_model):
    """Its calls are refused; its exit and its `del` leave the parent's workers alone, and do not hang."""
    process, workers = start_script(tiny_model("qwen3"), "cpu", fork=FORK)
    tell(process)
    assert_ends_well(process, workers)


@on_both
def test_ctrl_c_leaves_an_engine_that_works(device, tiny_model):
    process, workers = start_script(tiny_model("qwen3"), device, "endless")
    tell(process)
    os.killpg(process.pid, signal.SIGINT)
    assert_ends_well(process, workers)


@pytest.mark.parametrize(
    ("device", "fork"), [("cpu", ""), ("cpu", FORK), pytest.param("cuda", "", marks=pytest.mark.gpu(2))]
)
def test_workers_go_with_rank_0_that_is_killed_also_while_a_forked_child_lives(device, fork, tiny_model):
    process, children = start_script(tiny_model("qwen3"), device, "endless", fork=fork)
    workers = [child for child in children if "nanovllm.parallel.workers" in " ".join(child.cmdline())]
    forked = [child for child in children if child not in workers]
    assert (len(workers), len(forked)) == (1, bool(fork))
    tell(process)
    try:
        process.kill()
        process.wait()
        assert_ended(workers)
        assert all(child.is_running() for child in forked)
    finally:
        for child in forked:
            child.kill()


@pytest.mark.parametrize(
    ("device", "num_nodes"), [("cpu", 1), ("cpu", 2), pytest.param("cuda", 1, marks=pytest.mark.gpu(2))]
)
def test_torchrun(device, num_nodes, tiny_model, tmp_path):
    """The ranks that it starts become one engine, twice; two nodes are two torchruns on this machine."""
    folder = tiny_model("qwen3")
    script = tmp_path / "script.py"
    script.write_text(START + SECOND + START + GENERATE + SENDS_AT_ONCE_AND_NOTICES_A_HOST_THAT_IS_GONE)
    place = ["--standalone"]
    if num_nodes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = [f"--nnodes={num_nodes}", "--master-addr=127.0.0.1", f"--master-port={server.getsockname()[1]}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *place, f"--nproc-per-node={2 // num_nodes}"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    nodes = [
        subprocess.Popen([*torchrun, f"--node-rank={i}", str(script), str(folder), device], **pipes, text=True)
        for i in range(num_nodes)
    ]
    try:
        ended = [(*node.communicate(timeout=200), node.returncode) for node in nodes]
    finally:  # were they stuck, they would outlive torchrun
        for node in [node for node in nodes if node.poll() is None]:
            for left in [*psutil.Process(node.pid).children(recursive=True), node]:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
    with new_llm(folder, 1, device=device, max_num_seqs=8) as llm:
        outputs = llm.generate([[1, 2, 3], [4]], greedy(5, ignore_eos=True), use_tqdm=False)
    assert [returncode for _, _, returncode in ended] == [0] * num_nodes, ended
    lines = "".join(stdout for stdout, _, _ in ended).splitlines()
    assert [json.loads(line) for line in lines if line.startswith("[[")] == [[o["token_ids"] for o in outputs]]


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 3), ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2), ({"intermediate_size": 50}, 4)],
)
def test_sizes_that_cannot_be_cut_are_named(changes, size, tiny_model):
    message = rf"tensor_parallel_size must divide .* got {size} for \d+ attention heads, \d+ key"
    with pytest.raises(ValueError, match=message):
        new_llm(tiny_model("qwen3", **changes), size)


def test_what_every_rank_refuses_is_a_value_error(tiny_model):
    """Whichever of them says so first."""
    with pytest.raises(ValueError, match="the KV pool has 2 blocks"):
        new_llm(tiny_model("qwen3"), 2, num_kvcache_blocks=2)


def test_a_worker_that_begins_when_rank_0_is_gone_ends():
    """It would wait minutes for a store that nobody has any more."""
    ours, theirs = socket.socketpair()
    command = "from nanovllm.parallel.workers import main; main()"
    arguments = ["1", "2", "1", str(theirs.fileno())]
    worker = subprocess.Popen([sys.executable, "-c", command, *arguments], pass_fds=[theirs.fileno()])
    for end in ours, theirs:
        end.close()
    assert worker.wait(60) == 0


def test_a_class_that_workers_cannot_import_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(FailsAtStart, "__module__", "__main__")
    with pytest.raises(ValueError, match="model_class must be in a module that other processes can import"):
        new_llm(tiny_model("qwen3"), 2, model_class=FailsAtStart)


def test_a_model_that_does_not_fit_says_how_many_ranks_would_do():
    check_weights_fit(60 * GIB, 80 * GIB, 0.9, 1)
    with pytest.raises(
        ValueError, match=r"take 73.00 GiB on each of 2 GPUs, .* is 72.00 GiB; tensor_parallel_size must be at least 3"
    ):
        check_weights_fit(73 * GIB, 80 * GIB, 0.9, 2)
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 7"):
        check_weights_fit(500 * GIB, 80 * GIB, 0.9, 1)


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 9))
def test_shares_cover_everything_once_or_are_replicas(size, count, unit):
    shares = [Group(rank=rank, size=size).share(count, unit) for rank in range(size)]
    if count % size == 0:
        assert [i for s in shares for i in range(s.start, s.start + s.size)] == list(range(count * unit))
    elif size % count == 0:
        assert [s.start for s in shares] == [rank * count // size * unit for rank in range(size)]
        assert {s.start for s in shares} == set(range(0, count * unit, unit))
    tokens = [vocabulary_share(count, Group(rank=rank, size=size)) for rank in range(size)]
    assert [i for s in tokens for i in range(s.start, s.start + s.size)][:count] == list(range(count))
    assert len({s.size for s in tokens}) == 1
