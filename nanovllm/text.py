"""Text: what the tokenizer knows, and the text of a sequence as its tokens come.

There is one way from tokens to text. Results, streams, stop strings and log-probabilities all have what a `Detokenizer`
gives out, token by token.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.sampling_params import SamplingParams

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")  # one of them is there
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what tokenizers make of bytes that are no character
MAX_WAITING = 64  # so many tokens wait for the end of a character at most; every new one decodes them all again


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, None if there is none; ValueError, which names its files, if it cannot be loaded."""
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.encode("a")  # some values that it has read show only now that they are wrong
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # both packages raise what they like: a panic of tokenizers is no Exception
        raise ValueError(f"the tokenizer in {str(folder)!r} ({', '.join(files)}) cannot be loaded: {error}") from error


class TokenTexts:
    """The text that tokens add to what is before them, by a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.of_token = cache(lambda token_id: self.complete([token_id]))
        self._tokenizer = tokenizer
        # Some tokenizers leave out a space where a text begins, so that all text is decoded after this one.
        self._before = tokenizer.encode("a", add_special_tokens=False)
        self._num_before = len(self._decode(self._before))

    def added(self, token_ids: Sequence[int], is_beginning: bool = False) -> str:
        """What the tokens add; `is_beginning` if there is no text before them. It ends in `INCOMPLETE` within a character."""
        if is_beginning:
            return self._decode(token_ids)
        return self._decode([*self._before, *token_ids])[self._num_before :]

    def complete(self, token_ids: Sequence[int], is_beginning: bool = False) -> str:
        """As `added`, but nothing if it ends within a character, unless MAX_WAITING tokens wait for the end of one."""
        text = self.added(token_ids, is_beginning)
        return "" if text.endswith(INCOMPLETE) and len(token_ids) < MAX_WAITING else text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Detokenizer:
    """The text of a sequence as its tokens come, in whole characters: bytes wait for those that complete their character.

    Args:
        context: the tokens before the first one.
        skipped: tokens that have no text.
    """

    def __init__(self, texts: TokenTexts, context: Sequence[int] = (), skipped: frozenset[int] = frozenset()):
        self._texts = texts
        self._skipped = skipped
        self._is_beginning = all(token_id in skipped for token_id in context)
        self._waiting = self._unfinished(context)  # tokens that end within a character
        # What an unfinished character of the context would be shown as: it is cut off, as it is not the completion's.
        self._of_context = texts.added(self._waiting) if self._waiting else ""

    @property
    def text_of(self) -> Callable[[int], str]:
        """A function from a token to what it would add now: its whole characters, nothing if it ends within one.

        Of a token that is skipped it gives the text that is left out.
        """
        return self._text_after_waiting if self._is_beginning or self._waiting else self._texts.of_token

    def add(self, token_id: int) -> str:
        """Add a token; returns the characters that it completes."""
        if token_id in self._skipped:
            return ""
        new = self.text_of(token_id)
        self._waiting.append(token_id)
        if new or not self._texts.added(self._waiting, self._is_beginning):
            self._waiting.clear()
            self._is_beginning, self._of_context = False, ""
        return new

    def _text_after_waiting(self, token_id: int) -> str:
        if token_id in self._skipped:
            return self._texts.of_token(token_id)
        return self._texts.complete([*self._waiting, token_id], self._is_beginning).removeprefix(self._of_context)

    def _unfinished(self, context: Sequence[int]) -> list[int]:
        """The last tokens of the context, if it ends within a character.

        Reading begins 4 to 7 tokens before the end. A character has at most 4 bytes, so that one ends in between, unless the
        reading began in the middle of a character.
        """
        context = [token_id for token_id in context[-16:] if token_id not in self._skipped]
        for num in range(4, 8):
            waiting: list[int] = []
            found_end = num >= len(context)
            for token_id in context[-num:]:
                waiting.append(token_id)
                if self._texts.complete(waiting):
                    waiting, found_end = [], True
            if found_end:
                return waiting
        return []

    def rest(self) -> str:
        """The text of the tokens that still wait, when no more come."""
        rest = self._texts.added(self._waiting, self._is_beginning) if self._waiting else ""
        self._waiting.clear()
        return rest.removeprefix(self._of_context)


class CompletionText:
    """The text of one completion as its tokens come; what a stop string cuts off is not in it."""

    def __init__(self, texts: TokenTexts, prompt_token_ids: Sequence[int], params: SamplingParams):
        skipped = texts.special_ids if params.skip_special_tokens else frozenset()
        self.detokenizer = Detokenizer(texts, prompt_token_ids, skipped)
        self.text = ""
        self.stop = params.stop or ()
        self.includes_stop = params.include_stop_str_in_output
        # The last characters that are not given out yet: they may be the beginning of a stop string.
        self.num_held = 0 if self.includes_stop else max((len(stop) - 1 for stop in self.stop), default=0)
        self.num_taken = 0

    def append(self, token_id: int, may_stop: bool = True) -> str | None:
        """Add a token; returns the stop string that its text completes, the first one if there are several."""
        new = self.detokenizer.add(token_id)
        known = len(self.text)
        self.text += new
        if not new or not may_stop or not self.stop:
            return None
        starts = {stop: self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self.stop}
        found = min((stop for stop in self.stop if starts[stop] >= 0), key=starts.__getitem__, default=None)
        if found is not None:
            self.text = self.text[: starts[found] + (len(found) if self.includes_stop else 0)]
        return found

    def finish(self) -> str:
        """Add, and return, what stands for a character that will not be completed."""
        rest = self.detokenizer.rest()
        self.text += rest
        self.num_held = 0
        return rest

    def take(self) -> str:
        """The text that was not given out before, but for what may yet be cut off."""
        start = self.num_taken
        self.num_taken = max(start, len(self.text) - self.num_held)
        return self.text[start : self.num_taken]
