"""Structured outputs: what ends by itself has its form, and what ends by length begins so, in every mode."""

import json
import re
import sys

import pytest
from helpers import assert_nothing_leaks, make_llm
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.engine.sequence import NO_GRAMMAR
from nanovllm.extras import structured_outputs

llguidance = pytest.importorskip("llguidance", reason="needs llguidance")

PROMPTS = ["The capital of France is", "Once upon a time", "1, 2, 3, 4,"]


@pytest.fixture(scope="module")
def llm(tiny_model, demo_model, device) -> LLM:
    """A random model with a real tokenizer: whatever has a form, has it by the grammar."""
    folder = tiny_model(vocab_size=49152, eos_token_id=2)
    return make_llm(folder, tokenizer=str(demo_model), num_kvcache_blocks=200, device=device)


def complete(llm, form, prompts=PROMPTS, **options):
    params = SamplingParams(
        **{"max_tokens": 40, "seed": 1, "structured_outputs": StructuredOutputsParams(**form)} | options
    )
    completions = [c for output in llm.generate(prompts, params, use_tqdm=False) for c in output.outputs]
    assert_nothing_leaks(llm)
    return completions


texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=12
)


@settings(max_examples=10, deadline=None)
@given(choice=st.lists(texts, min_size=1, max_size=5), seed=st.integers(0, 9))
def test_choices(llm, choice, seed):
    assume(
        all(llm.tokenizer.decode(llm.tokenizer.encode(text)) == text for text in choice)
    )  # some characters have no tokens
    for completion in complete(llm, {"choice": choice}, seed=seed):
        assert completion.finish_reason == "stop"
        assert completion.text in choice


def test_a_character_that_no_token_begins_aborts(llm):
    for completion in complete(llm, {"choice": ["\U00040000"]}):
        assert (completion.finish_reason, completion.stop_reason) == ("abort", NO_GRAMMAR)


def test_a_grammar_that_becomes_too_complex_aborts(llm, monkeypatch):
    """llguidance then allows the end alone, which would look like a completion that is whole."""

    def limited(tokenizer, vocab_size, eos_token_ids, grammar):
        tokenizer = structured_outputs.guidance_tokenizer(tokenizer, vocab_size, eos_token_ids)
        return llguidance.LLMatcher(tokenizer, grammar, limits=llguidance.LLParserLimits(step_max_items=1), log_level=0)

    monkeypatch.setattr(structured_outputs, "compiled", limited)
    for completion in complete(llm, {"json_object": True}):
        assert (completion.finish_reason, completion.stop_reason) == ("abort", NO_GRAMMAR)


def test_no_choices_are_no_form(llm):
    assert {c.text for c in complete(llm, {"choice": [], "regex": "yes"})} == {"yes"}


pieces = st.sampled_from(["[a-c]{2}", "x+", "(yes|no)", "[0-9]{1,3}", "é?", "\\\\."])


@settings(max_examples=10, deadline=None)
@given(pattern=st.lists(pieces, min_size=1, max_size=4).map("".join), seed=st.integers(0, 9))
def test_regular_expressions(llm, pattern, seed):
    for completion in complete(llm, {"regex": pattern}, seed=seed):
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, completion.text)
        else:
            assert "x+" in pattern, "which goes on as long as it may"


values = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "boolean"},
        {"enum": ["red", "blue"]},
        {"type": "string", "maxLength": 5},
        {"type": "null"},
    ]
)
schemas = st.dictionaries(st.text("abc", min_size=1, max_size=3), values, min_size=1, max_size=3).map(
    lambda properties: {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }
)
KINDS = {"integer": int, "boolean": bool, "string": str, "null": type(None)}


@settings(max_examples=10, deadline=None)
@given(schema=schemas, as_text=st.booleans(), seed=st.integers(0, 9))
def test_json_schemas(llm, schema, as_text, seed):
    for completion in complete(llm, {"json": json.dumps(schema) if as_text else schema}, seed=seed, max_tokens=80):
        if completion.finish_reason == "length":
            assert completion.text.startswith("{")
            continue
        found = json.loads(completion.text)
        assert found.keys() == schema["properties"].keys()
        for name, kind in schema["properties"].items():
            if "enum" in kind:
                assert found[name] in kind["enum"]
            else:
                assert type(found[name]) is KINDS[kind["type"]]


def test_a_json_object_and_a_grammar_of_ones_own(llm):
    assert all(c.text.startswith("{") for c in complete(llm, {"json_object": True}))
    grammar = 'start: "<" word ">"\nword: /[a-z]{3}/'
    assert all(re.fullmatch("<[a-z]{3}>", c.text) for c in complete(llm, {"grammar": grammar}))


def test_samples_have_grammars_of_their_own_also_when_preempted(tiny_model, demo_model, llm):
    form, prompts = {"regex": "[a-z]{40}"}, [PROMPTS[0]]
    expected = [c.text for c in complete(llm, form, prompts, n=8)]
    assert len(set(expected)) == 8
    assert all(re.fullmatch("[a-z]{40}", text) for text in expected)
    folder = tiny_model(vocab_size=49152, eos_token_id=2)
    small = {"kvcache_block_size": 1, "num_kvcache_blocks": 55, "max_model_len": 48}
    preempts = make_llm(folder, tokenizer=str(demo_model), **small)
    assert [c.text for c in complete(preempts, form, prompts, n=8)] == expected
    assert preempts.stats()["num_preemptions"] > 0
    waits = make_llm(folder, tokenizer=str(demo_model), num_kvcache_blocks=200, async_scheduling=False)
    assert [c.text for c in complete(waits, form, prompts, n=8)] == expected


def test_it_ends_where_its_form_does_and_with_ignore_eos_nowhere_else(llm):
    """`x+` may end after each x, and `xx` must."""
    (short,) = complete(llm, {"regex": "xx"}, PROMPTS[:1], ignore_eos=True, min_tokens=20)
    assert (short.text, short.finish_reason) == ("xx", "stop")
    for completion in complete(llm, {"regex": "x+"}, ignore_eos=True, max_tokens=15):
        assert (len(completion.token_ids), completion.finish_reason) == (15, "length")
    for completion in complete(llm, {"regex": "x+"}, min_tokens=6, max_tokens=15):
        assert len(completion.token_ids) >= 6


def test_with_other_rules_and_log_probabilities(llm):
    (no,) = llm.tokenizer.encode("no")
    rules = {"logit_bias": {no: 100.0}, "repetition_penalty": 1.5, "top_p": 0.9, "logprobs": 2}
    (completion,) = complete(llm, {"choice": ["yes", "no"]}, PROMPTS[:1], **rules)
    assert completion.text == "no"
    assert len(completion.logprobs) == len(completion.token_ids)


def test_a_real_model_answers_in_the_form(demo_model):
    llm = LLM(str(demo_model), device="cpu", dtype="float32", max_model_len=128, num_kvcache_blocks=20, use_tqdm=False)
    (output,) = llm.generate(
        "Q: What is the capital of France? A:",
        SamplingParams(
            temperature=0, structured_outputs=StructuredOutputsParams(choice=[" Rome", " Paris", " Berlin"])
        ),
    )
    assert output["text"] == " Paris"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"grammar": "start: nothing"}, "nothing"),
        ({"regex": "("}, "regex"),
        ({"json": "{"}, "Expecting property name"),
        ({"json": {"type": "strange"}}, "strange"),
    ],
)
def test_a_form_that_cannot_be_compiled_is_refused_before_anything_runs(llm, form, message):
    with pytest.raises(ValueError, match=rf"(?s)^structured_outputs has .*{message}"):
        complete(llm, form)
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("form", [{}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"json_object": False}])
def test_a_form_is_one_thing(form):
    with pytest.raises(ValueError, match="structured_outputs must have one of"):
        StructuredOutputsParams(**form)


def test_without_llguidance_the_error_says_what_to_install(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r'pip install "nanovllm\[structured-outputs\]"'):
        complete(llm, {"regex": "a"})
