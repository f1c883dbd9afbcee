"""What requests say in texts about the tokens to draw: bad words and structured outputs, by the tokenizer."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from nanovllm.sampling_params import SamplingParams


def read_texts(
    params: SamplingParams, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]
) -> Any:
    """Make a logits processor of the bad words, among those of `params`; returns the matcher of the structured outputs, or None.
    ValueError where they cannot be honoured."""
    if params.bad_words:
        from nanovllm.extras.bad_words import ban_words

        params.logits_processors = (*(params.logits_processors or ()), ban_words(params.bad_words, tokenizer))
    if params.structured_outputs is None:
        return None
    from nanovllm.extras.structured_outputs import new_matcher

    return new_matcher(params.structured_outputs, tokenizer, vocab_size, eos_token_ids)
