"""Detokenizer: the text of one completion as its tokens come, for stop strings and for streaming."""

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from nanovllm.sampling_params import SamplingParams


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
        self._stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)

    def append(self, token_id: int, may_stop: bool = True) -> str | None:
        """Add a token; returns the stop string that its text completes, the first one if there are several."""
        new = self._stream.step(self._tokenizer, token_id)
        if not new:
            return None
        known = len(self.text)
        self.text += new
        if not may_stop:
            return None
        found = [(self.text.find(stop, max(0, known - len(stop) + 1)), stop) for stop in self.stop]
        found = [(start, stop) for start, stop in found if start >= 0]
        if not found:
            return None
        start, stop = min(found, key=lambda place: place[0])
        self.text = self.text[: start + len(stop) if self.includes_stop else start]
        return stop

    def take(self, whole: str | None = None) -> str:
        """The text that was not given out before; with the `whole` text of a completion that ended, all the rest."""
        text = self.text[: max(self.num_taken, len(self.text) - self.num_held)] if whole is None else whole
        taken, self.num_taken = self.num_taken, len(text)
        return text[taken:]
