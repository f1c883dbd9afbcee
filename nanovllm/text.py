"""Text: what the tokenizer knows, and the text of one completion as its tokens come."""

from functools import cache, cached_property
from pathlib import Path

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.sampling_params import SamplingParams

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Text:
    """The tokenizer of a folder, loaded when it is first needed. Where there is none, every text is empty."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of_token = cache(lambda token_id: self.decode([token_id]))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        has_tokenizer = any((self.folder / name).is_file() for name in TOKENIZER_FILES)
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False) if has_tokenizer else None

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Whole characters only: bytes wait until a token completes their character.

    `text` is what is known so far; what a stop string cuts off is not in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams):
        self.text = ""
        self.stop = params.stop or ()
        self.includes_stop = params.include_stop_str_in_output
        # The last characters that are not given out yet: they may be the beginning of a stop string.
        self.num_held = 0 if self.includes_stop else max((len(stop) - 1 for stop in self.stop), default=0)
        self.num_taken = 0
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream()
        added = tokenizer.added_tokens_decoder if params.skip_special_tokens else {}
        self._skipped = frozenset(token_id for token_id, token in added.items() if token.special)

    def append(self, token_id: int, may_stop: bool = True) -> str | None:
        """Add a token; returns the stop string that its text completes, the first one if there are several."""
        if token_id in self._skipped:
            return None
        try:
            new = self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # tokenizers has no class for it
            # An invalid byte makes another text of what came before it.
            if not str(error).startswith("Invalid prefix"):
                raise
            self._stream = DecodeStream()
            new = self._stream.step(self._tokenizer, token_id)
        known = len(self.text)
        self.text += new or ""
        if not new or not may_stop:
            return None
        starts = {stop: self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self.stop}
        found = min((stop for stop in self.stop if starts[stop] >= 0), key=starts.__getitem__, default=None)
        if found is not None:
            self.text = self.text[: starts[found] + (len(found) if self.includes_stop else 0)]
        return found

    def take(self, whole: str | None = None) -> str:
        """The text that was not given out before; with the `whole` text of a completion that ended, all the rest.

        Where invalid bytes make the whole another text than its beginning was, the rest is that of the beginning.
        """
        start, text = self.num_taken, self.text
        if whole is None:
            text = text[: max(start, len(text) - self.num_held)]
        elif whole.startswith(text[:start]):
            text = whole
        self.num_taken = len(text)
        return text[start:]
