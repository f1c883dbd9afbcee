"""The examples do what they say: with a user's arguments, on the demo model or on random ones; where they need them, with
others' libraries."""

import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import DEMO_MODEL
from helpers import ROOT, greedy, load_example

from nanovllm import LLM, SamplingParams

CHUNKS = {"max_num_batched_tokens": 3, "kvcache_block_size": 5}
PROMPTS = [[(7 * i + j * j) % 128 for j in range(n)] for i, n in enumerate((1, 5, 21, 60))]


def question(text):
    return [{"role": "user", "content": text}]


# jsonl_batch


@pytest.fixture
def batch_run(text_model, tmp_path):
    """`batch_run(output)`: what the example writes about 11 rows, 3 at a time; one is too long, one line is blank."""
    lines = [json.dumps({"prompt": f"Number {i} is", "id": f"№ {i}"}) for i in range(8)]
    lines[2] = json.dumps({"messages": question("Why?"), "extra": {"a": [1, None]}}) + "\n"
    lines += [json.dumps({"prompt": "\ud800"}), json.dumps({"prompt": "long " * 300})]
    lines += [json.dumps({"messages": question(f"What is {i}?")}) for i in range(2)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")

    def run(output):
        options = ["--model", str(text_model), "--chunk", "3", "--max-tokens", "7", "--temperature", "0.7"]
        load_example("jsonl_batch").main([str(source), str(output), *options])
        return output.read_bytes()

    return run


def test_jsonl_answers_every_row_once_in_order(batch_run, tmp_path):
    rows = [json.loads(line) for line in batch_run(tmp_path / "out.jsonl").splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, *range(4, 13)]
    assert rows[2]["extra"] == {"a": [1, None]}
    assert rows[2]["prompt_tokens"] > 20 > rows[0]["prompt_tokens"], "messages go through the chat template"
    assert rows[4]["id"] == "№ 4"
    errors = [row for row in rows if "error" in row]
    assert [row["index"] for row in errors] == [9, 10]
    assert "601 tokens" in errors[1]["error"] or "max_model_len=256" in errors[1]["error"]
    for row in rows:
        if row not in errors:
            assert row["prompt_tokens"] > 0
            assert (row["completion_tokens"], row["finish_reason"]) == (7, "length")
            assert row["text"]


def test_jsonl_goes_on_after_a_cut(batch_run, tmp_path):
    whole = batch_run(tmp_path / "whole.jsonl")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    in_letter = whole.index("№".encode()) + 1
    for cut in [3, in_letter, ends[0] - 1, ends[4], ends[-1] - 1, ends[-1]]:
        output = tmp_path / f"cut{cut}.jsonl"
        output.write_bytes(whole[:cut])
        assert batch_run(output) == whole


def test_jsonl_interrupted_has_whole_chunks_and_goes_on(batch_run, tmp_path, monkeypatch):
    whole = batch_run(tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    generate, num_calls, written = LLM.generate, 0, b""

    def interrupted(*args, **kwargs):
        nonlocal num_calls, written
        num_calls += 1
        if num_calls == 4:  # the first chunk has taken two calls
            written = output.read_bytes()  # what a crash would leave: nothing is closed
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(LLM, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch_run(output)
    assert 0 < len(written) < len(whole)
    assert whole.startswith(written)
    monkeypatch.undo()
    assert batch_run(output) == whole


@pytest.mark.parametrize(
    ("line", "existing", "message"),
    [
        ("{", None, "line 2: Expecting"),
        ("[1]", None, "line 2: an object with either"),
        ('{"prompt": "a", "messages": []}', None, "line 2: an object with either"),
        ('{"prompt": 5}', None, "line 2: 'prompt' must be a text"),
        ('{"messages": "a"}', None, "line 2: .* 'messages' a list"),
        ('{"prompt": "a", "text": "b", "index": 3}', None, r"line 2: .*\['index', 'text'\]"),
        ("", '{"prompt": "a"}\n{"prompt": "b"}', "not written by this program"),
        ("", "one line", "not written by this program"),
        ("", "{\n", "not written by this program"),
    ],
)
def test_jsonl_says_which_line_is_wrong_and_leaves_a_file_of_others_alone(line, existing, message, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n' + line)
    if existing is not None:
        output.write_text(existing)
    with pytest.raises(SystemExit, match=message):
        load_example("jsonl_batch").main([str(source), str(output), "--model", "unused"])
    assert (output.read_text() if output.exists() else None) == existing


# chat


def test_chat_asks_with_the_whole_conversation(text_model, monkeypatch, capsys):
    """But for a question that is too long by itself: it is refused, and the chat goes on."""
    lines = ["One?", "Two?", "long " * 300, "Three?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    load_example("chat").main(["--model", str(text_model), "--system", "Be kind.", "--max-tokens", "6"])
    shown = capsys.readouterr().out.split("\nYou: ")[1:]
    messages = [{"role": "system", "content": "Be kind."}]
    assert "max_model_len=256" in shown.pop(2)
    assert shown.pop() == "\n"
    with LLM(text_model, use_tqdm=False) as llm:
        for line, answer in zip(("One?", "Two?", "Three?"), shown, strict=True):
            messages += question(line)
            (output,) = llm.chat(messages, greedy(6), use_tqdm=False)
            messages.append({"role": "assistant", "content": output["text"]})
            assert answer == f"Model: {output['text']}\n"


def test_chat_leaves_out_the_oldest_turns(text_model):
    """Of three turns of 100 tokens and a question one turn is left in 256 tokens, of which 100 are the answer's."""
    make_prompt = load_example("chat").make_prompt
    turns = [{"role": role, "content": f"{i} " + "word " * 50} for i in "123" for role in ("user", "assistant")]
    turns += question("And now?")
    with LLM(text_model, use_tqdm=False) as llm:
        text = llm.tokenizer.decode(prompt := make_prompt(llm, question("Hm"), turns, max_tokens=100))
    assert len(prompt) <= 156
    assert [text.count(f"\n{i} word") for i in "123"] == [0, 0, 2]
    assert "Hm" in text
    assert "And now?" in text


def test_chat_keeps_what_was_said_when_interrupted(capsys):
    def stream(prompts, params):
        yield SimpleNamespace(text="Well")
        raise KeyboardInterrupt

    assert load_example("chat").say(SimpleNamespace(stream=stream), [1], SamplingParams()) == "Well"
    assert capsys.readouterr().out == "Well\n"


# stream


def test_stream_gives_the_texts_of_generate(text_model, capsys):
    stream = load_example("stream")
    texts = stream.main(["--model", str(text_model), "--max-tokens", "12"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith(("'", '"'))]
    with LLM(text_model, use_tqdm=False) as llm:
        chats = [question(text) for text in stream.QUESTIONS]
        outputs = llm.chat(chats, greedy(12), use_tqdm=False)
    assert texts == [output["text"] for output in outputs]
    columns = [(len(line) - len(line.lstrip())) // 24 for line in shown]
    assert columns == [0, 1, 2] * 12  # they take turns
    assert [line.endswith(" [length]") for line in shown] == [False] * 33 + [True] * 3


def test_stream_race_drops_what_still_runs(exact_demo_model, monkeypatch):
    closed = []
    close = LLM.close

    def closing(self):
        if not closed:
            closed.append((self.is_finished(), self.stats()["kv_cache_usage"]))
        close(self)

    monkeypatch.setattr(LLM, "close", closing)
    texts = load_example("stream").main(["--race", "--model", str(exact_demo_model)])
    assert texts[0] == "The capital of France is Paris."
    assert all(0 < len(text) < 60 for text in texts[1:])
    assert closed == [(True, 0.0)]


# score


def test_score_equals_transformers(demo_model):
    score = load_example("score")
    texts = [" Paris.", " a city that nobody has ever been to, and that is as it should be.", " 1"]
    start = "The capital of France is"
    with LLM(demo_model, dtype="float32", use_tqdm=False) as llm:
        after_question = score.log_probabilities(llm, texts, start)
        alone = score.log_probabilities(llm, texts)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    for given, scores in ((start, after_question), ("", alone)):
        for text, ours in zip(texts, scores):
            ids = torch.tensor([tokenizer(given + text)["input_ids"]])
            num_scored = len(tokenizer(text)["input_ids"]) - (given == "")
            with torch.inference_mode():
                logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            theirs = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)[ids.shape[1] - 1 - num_scored :]
            torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-3, rtol=0)


def test_score_ranks(demo_model, capsys):
    ranked = load_example("score").main(["--question", "The capital of France is", " Rome.", " Paris."])
    assert [text for _, text in ranked] == [" Paris.", " Rome."]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["text", "Paris.", "Rome."]


# best_of_n


def test_best_of_n_is_the_likeliest(text_model, capsys):
    best_of_n = load_example("best_of_n")
    asked = "Name a colour."
    ranked = best_of_n.main([asked, "--n", "6", "--max-tokens", "10", "--model", str(text_model)])
    with LLM(text_model, use_tqdm=False) as llm:
        prompt = llm.tokenizer.apply_chat_template(question(asked), add_generation_prompt=True, return_dict=False)
        params = greedy(1, prompt_logprobs=0)
        means = []
        for completion in ranked:
            (output,) = llm.generate(prompt + completion.token_ids, params, use_tqdm=False)
            rows = output.prompt_logprobs[len(prompt) :]
            scores = [row[token].logprob for token, row in zip(completion.token_ids, rows)]
            means.append(sum(scores) / len(scores))
    ours = [best_of_n.mean_logprob(completion) for completion in ranked]
    assert ours == pytest.approx(means, abs=1e-4)
    assert len(set(ours)) == 6
    assert ours == sorted(ours, reverse=True)
    assert sorted(completion.index for completion in ranked) == list(range(6))
    assert capsys.readouterr().out.endswith(f"Best: {ranked[0].text.strip()}\n")


# own_attention


def run_tokens(folder, device, prompts=PROMPTS, **options):
    """Greedy tokens of each prompt, with their log-probabilities."""
    options = {"max_model_len": 128, "device": device, "use_tqdm": False} | options
    params = greedy(24, logprobs=0)
    with LLM(folder, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [output["token_ids"] for output in outputs]
    logprobs = [[row[token].logprob for token, row in zip(o["token_ids"], o["logprobs"])] for o in outputs]
    return tokens, torch.tensor(logprobs)


def windowed_logits(model, token_ids, window, num_sinks):
    """transformers' logits with a dense mask [1, 1, tokens, tokens] of what each token sees."""
    mask = torch.zeros(len(token_ids), len(token_ids), dtype=torch.bool, device=model.device)
    for query in range(len(token_ids)):
        mask[query, max(0, query - window + 1) : query + 1] = True
        mask[query, : min(num_sinks, query + 1)] = True
    bias = torch.zeros(mask.shape, device=model.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        return model(torch.tensor([token_ids], device=model.device), attention_mask=bias[None, None]).logits[0]


@pytest.mark.parametrize(
    ("family", "window", "num_sinks", "options"),
    [
        *(("llama", *case, options) for case in [(8, 2), (5, 0), (1, 1)] for options in ({}, CHUNKS)),
        ("qwen3", 128, 0, {}),
        ("qwen3", 1, 128, CHUNKS),
    ],
)
def test_own_attention_equals_a_dense_mask(tiny_model, device, family, window, num_sinks, options):
    folder = tiny_model(family)
    backend = load_example("own_attention").SlidingWindow(window, num_sinks)
    tokens, logprobs = run_tokens(folder, device, attention_backend=backend, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).to(device)
    plain = []
    for prompt, completion, ours in zip(PROMPTS, tokens, logprobs):
        # A token's mask does not depend on what comes later, so that one pass checks every step.
        ids, start = prompt + completion[:-1], len(prompt) - 1
        logits = windowed_logits(model, ids, window, num_sinks)[start:]
        assert logits.argmax(-1).tolist() == completion
        theirs = logits.log_softmax(-1).amax(-1).cpu()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        plain.append(windowed_logits(model, ids, len(ids), 0)[start:].argmax(-1).tolist())
    assert (plain == tokens) == (window + num_sinks >= 128), "a window changes something unless it has all tokens"


@pytest.mark.slow
def test_own_attention_needs_its_sinks(demo_model, capsys):
    """What StreamingLLM found: a window alone loses much more than a window with the first tokens."""
    arguments = [str(ROOT / "LICENSE"), "--length", "192", "--window", "32"]
    plain, with_sinks, alone = load_example("own_attention").main(arguments).values()
    assert plain < with_sinks < 2 * plain
    assert alone > 2 * with_sinks
    assert capsys.readouterr().out.count("perplexity") == 3


# own_model


@pytest.mark.parametrize("options", [{}, CHUNKS])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_own_model_equals_transformers(tmp_path, device, changes, options):
    own_model = load_example("own_model")
    model = own_model.make_random(tmp_path, **changes).to(device)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() > 0.5  # random ones, which nothing drops unseen
    tokens, logprobs = run_tokens(tmp_path, device, model_class=own_model.Granite, **options)
    for prompt, ours, our_logprobs in zip(PROMPTS, tokens, logprobs):
        ids = torch.tensor([prompt], device=device)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert whole[0, len(prompt) :].tolist() == ours
        with torch.inference_mode():
            logits = model(whole[:, :-1]).logits[0, len(prompt) - 1 :]
        theirs = logits.log_softmax(-1).amax(-1).cpu()
        torch.testing.assert_close(our_logprobs, theirs, atol=1e-4, rtol=0)


def test_own_model_shows_the_same_tokens_twice(capsys):
    load_example("own_model").main([])
    theirs, ours = (line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines())
    assert theirs == ours


def test_own_model_reads_granite_alone(tiny_model):
    granite = load_example("own_model").Granite
    with pytest.raises(ValueError, match=r"model_type of the checkpoint must be .*granite.* got 'llama'"):
        LLM(tiny_model("llama"), model_class=granite, use_tqdm=False)


# constrained_json


@pytest.fixture(scope="module")
def constrained():
    pytest.importorskip("llguidance", reason="needs llguidance")
    return load_example("constrained_json")


def test_every_answer_of_a_batch_keeps_to_its_own_schema(constrained, demo_model, capsys):
    texts = constrained.main(["--model", str(demo_model)])
    paris, ada, fruits = answers = [json.loads(text) for text in texts]
    assert list(paris) == ["name", "country", "continent"]
    assert paris["continent"] in ("Africa", "America", "Asia", "Australia", "Europe")
    assert list(ada) == ["name", "profession", "born"]
    assert 1000 <= ada["born"] <= 2100
    assert len(fruits) == 3
    assert all(re.fullmatch("[a-z]{2,15}", fruit) for fruit in fruits)
    printed = capsys.readouterr().out
    assert all(f"\n{answer}\n" in printed for answer in answers)


# lm_eval_harness


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    return load_example("lm_eval_harness")


def flatten(replies):
    """The numbers and texts in lists of lists and tuples."""
    if isinstance(replies, list | tuple):
        return [leaf for reply in replies for leaf in flatten(reply)]
    return [replies]


@pytest.mark.slow
def test_lm_eval_gives_the_scores_of_its_transformers_model(harness, demo_model, capsys):
    results = harness.main(["--model", str(demo_model), "--compare"])
    ours, theirs = results["nanovllm"], results["transformers"]
    scores = {
        (task, metric.removesuffix(",none")): (score, theirs["results"][task][metric])
        for task, metrics in ours["results"].items()
        for metric, score in metrics.items()
        if isinstance(score, float)
    }
    perplexity = scores.pop(("facts_text", "word_perplexity"))
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)
    assert scores.keys() == {("facts_choice", "acc"), ("facts_choice", "acc_norm"), ("facts_answer", "exact_match")}
    assert all(score == their_score and 0.3 < score < 0.9 for score, their_score in scores.values())

    for task in ours["samples"]:
        pairs = zip(*(result["samples"][task] for result in results.values()), strict=True)
        for our_replies, their_replies in ((a["resps"], b["resps"]) for a, b in pairs):
            assert flatten(our_replies) == pytest.approx(flatten(their_replies), abs=1e-3)


@pytest.mark.slow
def test_lm_eval_cuts_what_is_too_long_as_its_transformers_model_does(harness, demo_model):
    """Contexts lose their beginning, and a long text is scored window by window."""
    hf = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate")
    ours = harness.NanoVLLM(LLM(demo_model, device="cpu", dtype="float32", max_model_len=34, use_tqdm=False))
    assert ours.max_length == 32
    theirs = hf.HFLM(str(demo_model), device="cpu", dtype="float32", max_length=32, batch_size=1)
    story = (
        "The river was wide and slow. A fisherman named Oren mended his nets and sang about the sea, the "
        "moon and an old dog that had once belonged to his father in the"
    )
    template = "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\n"
    count = "One, two, three,"
    requests = {
        "loglikelihood": [(story, " past."), ("", "Once"), (count, " four"), (count, " and"), (count, story[:60])],
        "loglikelihood_rolling": [(story,), ("Once",), (story[:90],)],
        "generate_until": [
            (story, {"until": ["zebra", " grey"], "max_gen_toks": 12}),
            (story, {"until": "fish", "max_new_tokens": 9}),
            (template, {"until": [], "max_gen_toks": 16, "do_sample": False}),
        ],
    }
    for kind, arguments in requests.items():
        instances = [harness.Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
        our_replies, their_replies = (getattr(model, kind)(instances) for model in (ours, theirs))
        assert flatten(our_replies) == pytest.approx(flatten(their_replies), abs=1e-3), kind
        if kind == "loglikelihood":
            assert [is_greedy for _, is_greedy in our_replies] == [True, False, True, False, False]


# all


ARGUMENTS = {
    "jsonl_batch": ["in", "out"],
    "ray_batch": ["--input", "in.jsonl", "--output", "out"],
    "chat": [],
    "stream": [],
    "score": ["a"],
    "best_of_n": [],
    "own_attention": [],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_demo_model_is_asked_for(name, monkeypatch, tmp_path):
    if name == "ray_batch":
        pytest.importorskip("ray.data", reason="needs ray[data]")
    example = load_example(name)
    assert example.DEMO_MODEL.resolve() == DEMO_MODEL.resolve()
    monkeypatch.setattr(example, "DEMO_MODEL", tmp_path / "none")
    with pytest.raises(SystemExit, match="make demo"):
        example.main(ARGUMENTS[name])
