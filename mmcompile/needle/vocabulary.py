"""The words of the task, a tokenizer that has just these, and their token ids for any tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "diamond", "hexagon")
NUMBERS = tuple(str(number) for number in range(10, 100))  # two digits each
NOUNS = _words(
    "river mill house road bridge garden boat tree bird lamp market tower field forest lake hill wall door table "
    "window train horse dog cat cloud storm village castle ship harbour island valley stone letter clock painter "
    "farmer child teacher baker sailor doctor king soldier"
)
PLURALS = _words("boats trees birds lamps houses horses clouds ships stones letters clocks farmers sailors doors")
ADJECTIVES = _words("old small quiet bright heavy narrow distant cold warm broken gentle empty early late tall round")
VERBS = _words("follows watches crosses passes leaves finds paints carries guards hears visits repairs opens draws")
PLACES = _words("near behind beside above below before after under over between")
OTHERS = _words("the a and of there are were is on in what number card shows answer then once some many . ? : ,")
WORDS = tuple(dict.fromkeys((*COLOURS, *SHAPES, *NUMBERS, *NOUNS, *PLURALS, *ADJECTIVES, *VERBS, *PLACES, *OTHERS)))
WORD_NUMBER = {word: number for number, word in enumerate(WORDS)}

END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (END, UNKNOWN, VISION_START, VISION_END, IMAGE, VIDEO)

Ids = NDArray[np.int64]


def word_tokenizer() -> Any:
    """A fast tokenizer of transformers that knows the special tokens and `WORDS`, one token a word.

    Words stand between spaces. `save_pretrained` writes it, `AutoTokenizer.from_pretrained` reads it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=[VISION_START, VISION_END, IMAGE, VIDEO],
    )


def numbered(text: str) -> Ids:
    """The places in `WORDS` of the words of a text, int64 `[words]`."""
    return np.array([WORD_NUMBER[word] for word in text.split()], dtype=np.int64)


class WordTokens:
    """The token ids of every word of `WORDS`, as a tokenizer gives them after a space.

    answer_prefix: the ids that every number begins with (a lone space, in some tokenizers); they belong to the
    question. answers: of each number, the first id after them.
    """

    def __init__(self, tokenizer: Any) -> None:
        ids = [list(tokenizer.encode(f" {word}", add_special_tokens=False)) for word in WORDS]
        self._lengths = np.array([len(one) for one in ids])
        self._firsts = np.cumsum(self._lengths) - self._lengths
        self._flat = np.array([token for one in ids for token in one], dtype=np.int64)
        numbers = [ids[WORD_NUMBER[number]] for number in NUMBERS]
        shared = 0
        while len({tuple(one[: shared + 1]) for one in numbers}) == 1:
            shared += 1
        self.answer_prefix: Ids = np.array(numbers[0][:shared], dtype=np.int64)
        self.answers: Ids = np.array([one[shared] for one in numbers], dtype=np.int64)

    def starts(self, words: Ids) -> Ids:
        """Where each word's tokens begin when they stand in a row."""
        lengths = self._lengths[words]
        return np.cumsum(lengths) - lengths

    def encode(self, words: Ids) -> Ids:
        """Token ids of words given by their places in `WORDS`, in a row."""
        lengths = self._lengths[words]
        offsets = np.arange(lengths.sum()) - np.repeat(self.starts(words), lengths)
        return self._flat[np.repeat(self._firsts[words], lengths) + offsets]
