"""The examples with others' libraries: answers keep to their schemas, lm-eval's scores are transformers'."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from nanovllm import LLM

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def constrained():
    pytest.importorskip("llguidance", reason="needs llguidance")
    return load_example("constrained_json")


@pytest.fixture(scope="module")
def llm(demo_model):
    with LLM(demo_model, device="cpu", dtype="float32", max_model_len=512, use_tqdm=False) as llm:
        yield llm


def keeps_to(schema, value):
    """What the example's schemas ask for."""
    if schema.get("type") == "object":
        fields = schema["properties"]
        return list(value) == list(fields) and all(keeps_to(fields[name], value[name]) for name in fields)
    if schema.get("type") == "array":
        is_long = schema["minItems"] <= len(value) <= schema["maxItems"]
        return is_long and all(keeps_to(schema["items"], item) for item in value)
    if schema.get("type") == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if "enum" in schema:
        return value in schema["enum"]
    is_short = len(value) <= schema.get("maxLength", len(value))
    return is_short and re.search(schema.get("pattern", ""), value) is not None


def test_every_answer_of_a_batch_keeps_to_its_own_schema(constrained, demo_model, capsys):
    texts = constrained.main(["--model", str(demo_model)])
    answers = [json.loads(text) for text in texts]
    assert len(answers) == len(constrained.QUESTIONS) == 3
    assert all(map(keeps_to, constrained.QUESTIONS.values(), answers))
    printed = capsys.readouterr().out
    assert all(f"\n{answer}\n" in printed for answer in answers)


def test_constrained_answers_are_the_same_alone_and_together(constrained, llm):
    requests = [(question, constrained.json_grammar(s)) for question, s in constrained.QUESTIONS.items()]
    greedy = {"temperature": 0, "max_tokens": 16}
    together = [output["text"] for output in constrained.ask(llm, requests, **greedy)]
    (alone,) = constrained.ask(llm, requests[1:2], **greedy)
    assert alone["text"] == together[1]


def test_random_completions_of_one_request_may_share_a_constraint(constrained, llm):
    grammar = constrained.LLMatcher.grammar_from_regex("(19|20)[0-9]{2}, (spring|summer|autumn|winter)")
    (output,) = constrained.ask(llm, [("When was it?", grammar)], n=4, temperature=2.0, seed=0, max_tokens=24)
    texts = {completion.text for completion in output.outputs}
    assert len(texts) > 1
    assert all(re.fullmatch("(19|20)[0-9]{2}, (spring|summer|autumn|winter)", text) for text in texts)
    assert {completion.finish_reason for completion in output.outputs} == {"stop"}


def test_a_constraint_depends_on_nothing_but_the_answer_so_far(constrained, llm):
    """Else parameters that are used again would continue the answer of before."""
    tokenizer = constrained.from_tokenizer(llm.get_tokenizer(), n_vocab=49200)
    grammar = constrained.LLMatcher.grammar_from_regex("ab|cd")
    used = constrained.Constraint(tokenizer, grammar)
    a, b, c = (llm.get_tokenizer().encode(text)[0] for text in "abc")
    for answer in [], [a], [a, b], [a], [c], []:
        logits = used(answer, torch.zeros(49200))
        assert torch.equal(logits, constrained.Constraint(tokenizer, grammar)(answer, torch.zeros(49200)))
        assert logits[49152:].max() == -torch.inf, "no token has these ids"


def test_a_grammar_that_is_none_is_refused(constrained, llm):
    with pytest.raises(ValueError, match="unclosed group"):
        constrained.ask(llm, [("?", constrained.LLMatcher.grammar_from_regex("a("))])


def flatten(replies):
    """The numbers and texts in lists of lists and tuples."""
    if isinstance(replies, list | tuple):
        return [leaf for reply in replies for leaf in flatten(reply)]
    return [replies]


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    return load_example("lm_eval_harness")


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
