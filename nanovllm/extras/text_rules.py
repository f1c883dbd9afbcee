"""What requests say in texts about the tokens to draw: bad words, and structured outputs."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanovllm.sampling_params import LogitsProcessor, SamplingParams


def read_texts(
    params: SamplingParams, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]
) -> Any:
    """Make a logits processor of the bad words, among those of `params`; returns the grammar of the structured outputs, or None.
    ValueError where they cannot be honoured."""
    if params.bad_words:
        params.logits_processors = (*(params.logits_processors or ()), ban_words(params.bad_words, tokenizer))
    if params.structured_outputs is None:
        return None
    from nanovllm.extras.structured_outputs import new_grammar

    return new_grammar(params.structured_outputs, tokenizer, vocab_size, eos_token_ids)


def ban_words(words: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> LogitsProcessor:
    """A logits processor by vLLM's rule: the last token of a word is banned where those before it have just been drawn. A word is
    banned as it is tokenized by itself, and, if that takes as many tokens, after a space."""
    banned: list[list[int]] = []
    for word in words:
        plain, spaced = tokenizer([word.lstrip(), " " + word.lstrip()], add_special_tokens=False)["input_ids"]
        banned += [plain, spaced] if len(plain) == len(spaced) else [plain]

    def ban(drawn: list[int], logits: Tensor) -> Tensor:
        logits[[ids[-1] for ids in banned if ids and drawn[len(drawn) - len(ids) + 1 :] == ids[:-1]]] = -float("inf")
        return logits

    return ban
