"""From tokens to text: one way for results, streams, stop strings and log-probabilities, with every kind of tokenizer."""

import pytest
import tokenizers
import transformers
from helpers import STORY, assert_nothing_leaks, collect, force, greedy, make_llm
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.text import CompletionText, Detokenizer, TokenTexts

SPECIAL = ["<s>", "</s>"]
WORDS = ["▁a", "▁do", "▁", "▁▁▁▁", "return", "▁Paris", "▁and", ".", "\n"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
IDS = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *WORDS])}


def as_transformers(tokenizer: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama_2_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A space begins each text and is taken away again; a character that has no token is written in bytes."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(IDS, [], byte_fallback=True, fuse_unk=True))
    n, d = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return as_transformers(tokenizer)


def metaspace_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([(t, 0.0) for t in IDS], 0, byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.ByteFallback(), d.Metaspace(prepend_scheme="first")])
    return as_transformers(tokenizer)


TOKENIZERS = {"Llama 2": llama_2_tokenizer(), "Metaspace": metaspace_tokenizer()}
TEXTS = {name: TokenTexts(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def ids(*parts: str) -> list[int]:
    """The ids of tokens; what is no token is written in bytes."""
    return [i for part in parts for i in ([IDS[part]] if part in IDS else [2 + byte for byte in part.encode()])]


def texts(text: TokenTexts, prompt: list[int], completion: list[int], **params) -> tuple[str, str, str]:
    """What generate and stream give, and what the tokens drawn have in log-probabilities."""
    whole = CompletionText(text, prompt, SamplingParams(**params))
    given_out, decoded = "", ""
    for token_id in completion:
        decoded += whole.detokenizer.text_of(token_id)
        whole.append(token_id)
        given_out += whole.take()
    rest = whole.finish()
    return whole.text, given_out + whole.take(), decoded + rest


PROMPT = ids("<s>", "▁a", "▁do")


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (PROMPT, ids("▁a", "🙂", "▁and", "é"), " a🙂 andé"),
        (PROMPT, ids("<0x0A>", "<0xF0>", "<0x9F>"), "\n��"),  # one for each byte, as transformers decodes them
        (PROMPT, ids("<0x0A>", "<0xF0>", "▁a"), "\n� a"),
        ([*PROMPT, *ids("日", "<0xF0>", "<0x9F>")], ids("<0x99>", "<0x82>", "▁a"), "🙂 a"),  # the prompt ends within it
        (ids("日本語日本語", "<0xE6>"), ids("<0x97>", "<0xA5>"), "日"),
        (ids("<s>"), ids("▁Paris", "▁and"), "Paris and"),  # nothing goes before
        (PROMPT, ids("▁a", "</s>", "▁and"), " a and"),
        (PROMPT, ids(*["<0xFF>"] * 40, "▁a"), "�" * 40 + " a"),
        ([*PROMPT, *ids("�" * 9)], ids("▁and"), " and"),  # characters of the prompt
        ([*PROMPT, *ids("�", "<0xF0>")], ids("▁and"), " and"),
        ([*PROMPT, *ids("<0xF0>")], ids("</s>"), ""),
        (PROMPT, ids("<0xF0>", "<0x9F>", "</s>", "<0x99>", "<0x82>"), "🙂"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TEXTS)
def test_a_completion_goes_on_where_the_prompt_ends(name, prompt, completion, expected):
    assert texts(TEXTS[name], prompt, completion)[:2] == (expected, expected)


parts = st.sampled_from([*WORDS, "é", "日本", "🙂", " ", "x"])


@given(st.lists(parts, min_size=1), st.lists(parts))
@pytest.mark.parametrize("name", TEXTS)
def test_prompt_and_completion_join_to_the_whole_text(name, prompt, completion):
    prompt, completion = ids("▁a", *prompt), ids(*completion)
    decode = TOKENIZERS[name].decode
    assert texts(TEXTS[name], prompt, completion) == (decode(prompt + completion)[len(decode(prompt)) :],) * 3


@given(st.data(), st.booleans())
def test_any_tokens_of_a_byte_level_tokenizer_give_the_text_that_transformers_decodes(demo_tokenizer, data, skip):
    token_ids = data.draw(st.lists(st.integers(0, 400) | st.integers(0, len(demo_tokenizer) - 1), max_size=30))
    completion = texts(TokenTexts(demo_tokenizer), [], token_ids, skip_special_tokens=skip)
    expected = demo_tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert completion[:2] == (expected, expected)


@pytest.fixture(scope="module")
def demo_tokenizer(demo_model):
    return transformers.AutoTokenizer.from_pretrained(demo_model)


@given(st.lists(st.sampled_from([IDS[token] for token in [*BYTES[0x20:0x40], *BYTES[0xE0:0xF8], "▁a", "</s>"]])))
@pytest.mark.parametrize("name", TEXTS)
def test_bytes_that_make_no_character_break_nothing(name, token_ids):
    for start in range(len(token_ids)):
        generated, streamed, decoded = texts(
            TEXTS[name], token_ids[:start], token_ids[start:], skip_special_tokens=False
        )
        assert generated == streamed == decoded


def test_candidates_are_decoded_after_the_tokens_drawn():
    detokenizer = Detokenizer(TEXTS["Llama 2"], PROMPT)
    assert detokenizer.text_of(IDS["▁Paris"]) == " Paris"
    assert [detokenizer.add(token_id) for token_id in ids("🙂")[:3]] == [""] * 3
    assert [detokenizer.text_of(i) for i in ids("<0x82>", "<0x83>", "▁a", "<0xF0>")] == ["🙂", "🙃", "��� a", ""]
    assert detokenizer.add(IDS["<0x82>"]) == "🙂"


# --- the same through an LLM -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZERS["Llama 2"].save_pretrained(folder)
    return make_llm(tiny_model("llama", vocab_size=len(IDS)), tokenizer=folder)


@pytest.mark.parametrize(
    "completion",
    [
        ids("▁Paris", "▁and", "é", "▁a"),
        ids("▁Paris", "<0x0A>", "<0xF0>", "<0x9F>"),
        ids("</s>", "🙂", "."),
        ids("xyz", "▁a"),
    ],
    ids=str,
)
def test_generate_stream_stops_and_logprobs_have_one_text(llm, completion):
    params = SamplingParams(**force(*completion), logprobs=2, ignore_eos=True, skip_special_tokens=False)
    (output,) = llm.generate([PROMPT], params)
    increments = list(llm.stream([PROMPT], params))
    assert "".join(increment.text for increment in increments) == output["text"]
    for logprobs in output["logprobs"], [row for increment in increments for row in increment.logprobs]:
        joined = "".join(row[token_id].decoded_token for token_id, row in zip(completion, logprobs, strict=True))
        assert joined == output["text"]
    first = output["text"][:3]  # it may begin with the completion's space
    for includes_stop in True, False:
        more = {"ignore_eos": True, "skip_special_tokens": False, "include_stop_str_in_output": includes_stop}
        params = SamplingParams(**force(*completion), stop=[first[1:], first], **more)
        (output,) = llm.generate([PROMPT], params)
        assert output["finish_reason"] == "stop"
        assert output["stop_reason"] == first, "of those that end with a token the first in the text"
        assert output["text"] == (first if includes_stop else "")
        assert "".join(new.text for new in llm.stream([PROMPT], params)) == output["text"]


def test_a_stream_adds_up_to_what_generate_returns_and_never_splits_a_character(demo):
    prompts = [STORY, "Emoji: 😀 🎉 你好 😀 🎉", "The quick brown fox", STORY]
    emoji = demo.tokenizer("😀🎉你", add_special_tokens=False)["input_ids"]
    assert len(emoji) > 3
    params = [
        greedy(30, logprobs=1),
        SamplingParams(n=3, max_tokens=30, seed=5, temperature=1.5, stop=["e t", "."]),
        greedy(30, stop="no such text", skip_special_tokens=False),
        SamplingParams(**force(*emoji)),
    ]
    increments = list(demo.stream(prompts, params))
    assert not any("\ufffd" in new.text for new in increments if new.prompt_index == 3)
    streamed = collect(increments)
    assert streamed[3, 0] == ("😀🎉你", emoji, "length")
    for i, output in enumerate(demo.generate(prompts, params)):
        for sample in output.outputs:
            assert streamed[i, sample.index] == (sample.text, sample.token_ids, sample.finish_reason)
    assert_nothing_leaks(demo)


def test_a_stream_comes_token_by_token_and_never_shows_what_a_stop_string_takes_away(demo):
    text = demo.generate(STORY, greedy(40))[0]["text"]
    stop = text[20:32]
    increments = list(demo.stream(STORY, greedy(40, stop=stop)))
    assert all(len(new.token_ids) == 1 for new in increments)
    assert "".join(new.text for new in increments) == text[: text.index(stop)]
    assert len([new for new in increments if new.text]) > 2
    assert (increments[-1].finish_reason, increments[-1].stop_reason) == ("stop", stop)


def test_prompt_logprobs_join_to_the_prompt(llm):
    prompt = ids("▁a", "é", "▁do", "<s>", "日本🙂", "\n", "</s>")
    (output,) = llm.generate([prompt], greedy(1, prompt_logprobs=3))
    rows = output.prompt_logprobs
    texts = ["", *(row[token_id].decoded_token for token_id, row in zip(prompt[1:], rows[1:]))]
    assert "a" + "".join(texts) == "aé do<s>日本🙂\n</s>"
    assert texts[1:3] == ["", "é"]


def test_a_skipped_token_within_a_character_takes_no_part_in_it(llm):
    completion = ids("<0xF0>", "<0x9F>", "</s>", "<0x99>", "<0x82>", "<0xF0>", "</s>")
    params = SamplingParams(**force(*completion), logprobs=0, ignore_eos=True)
    (output,) = llm.generate([PROMPT], params)
    assert output["text"] == "🙂�"
    decoded = [row[token_id].decoded_token for token_id, row in zip(completion, output["logprobs"])]
    assert decoded == ["", "", "</s>", "", "🙂", "�", "</s>"]


def test_without_detokenization_there_is_no_text(llm):
    params = greedy(3, logprobs=1, prompt_logprobs=1, detokenize=False)
    (output,) = llm.generate([PROMPT], params)
    assert (output["text"], output["token_ids"]) == ("", llm.generate([PROMPT], greedy(3))[0]["token_ids"])
    rows = [*output.prompt_logprobs[1:], *output["logprobs"]]
    assert {candidate.decoded_token for row in rows for candidate in row.values()} == {None}


def test_text_is_never_cleaned_up(demo_model):
    llm = make_llm(demo_model, dtype="float32")
    token_ids = llm.tokenizer(" x != y and a ? b")["input_ids"]
    llm.tokenizer.clean_up_tokenization_spaces = True
    assert llm.generate([[1, 2]], SamplingParams(**force(*token_ids)))[0]["text"] == " x != y and a ? b"


# --- which tokenizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (None, None, r"^tokenizer '.*nowhere' is neither a folder nor a Hub id"),
        ("tokenizer.json", '{"model": ', r"tokenizer in .* \(tokenizer\.json.*\) cannot be loaded: .*line 1 column"),
        ("tokenizer.json", '{"model": 7}', r"tokenizer in .* \(tokenizer\.json.*\) cannot be loaded"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', r"tokenizer in .* cannot be loaded: .*'str'"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_named_before_the_model_is_loaded(
    file, damage, message, tiny_model, tmp_path
):
    folder = tmp_path / "nowhere"
    if file is not None:
        TOKENIZERS["Llama 2"].save_pretrained(folder)
        (folder / file).write_text(damage)
    with pytest.raises(ValueError, match=message):
        make_llm(tiny_model(), tokenizer=folder, num_kvcache_blocks=2)  # the next thing to be refused


def test_a_tokenizer_elsewhere_is_used_also_where_its_path_no_longer_leads_there(tiny_model, tmp_path, monkeypatch):
    TOKENIZERS["Llama 2"].save_pretrained(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    llm = make_llm(tiny_model("llama", vocab_size=len(IDS)), tokenizer="tokenizer")
    monkeypatch.chdir("/")
    params = SamplingParams(**(force(*ids("▁a", "</s>", "▁a")) | {"max_tokens": 9}))
    (output,) = llm.generate(" do", params)
    assert output.prompt_token_ids == TOKENIZERS["Llama 2"](" do")["input_ids"]
    assert (output["text"], output["finish_reason"]) == (" a", "stop"), "the tokenizer's end token is known"
