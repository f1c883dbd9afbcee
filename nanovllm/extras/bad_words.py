"""Bad words: texts that a completion does not contain, by vLLM's rule. The last token of one is banned where those before it have
just been drawn."""

from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanovllm.sampling_params import LogitsProcessor


def ban_words(words: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> LogitsProcessor:
    """A logits processor. A word is banned as it is tokenized by itself, and, if that takes as many tokens, after a space."""
    banned: list[list[int]] = []
    for word in words:
        plain, spaced = tokenizer([word.lstrip(), " " + word.lstrip()], add_special_tokens=False)["input_ids"]
        banned += [plain, spaced] if len(plain) == len(spaced) else [plain]

    def ban(drawn: list[int], logits: Tensor) -> Tensor:
        last = [ids[-1] for ids in banned if ids and drawn[len(drawn) - len(ids) + 1 :] == ids[:-1]]
        logits[last] = -float("inf")
        return logits

    return ban
