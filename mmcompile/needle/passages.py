"""Passages of text: plain sentences that speak of colours and numbers too, but state no fact of the kind asked for."""

from __future__ import annotations

import numpy as np

from mmcompile.needle.vocabulary import ADJECTIVES, COLOURS, NOUNS, NUMBERS, PLACES, PLURALS, VERBS, Ids, numbered

# Upper-case words stand for any word of their class.
SENTENCES = (
    "the ADJECTIVE NOUN VERB the NOUN PLACE the ADJECTIVE NOUN .",
    "there are NUMBER PLURAL PLACE the NOUN .",
    "a COLOUR NOUN VERB the ADJECTIVE NOUN .",
    "once the NOUN of the NOUN VERB a COLOUR NOUN .",
    "then some PLURAL were PLACE the COLOUR NOUN .",
    "the NOUN and the NOUN are PLACE the ADJECTIVE NOUN .",
    "many ADJECTIVE PLURAL were in the NOUN .",
)
CLASSES = {
    "ADJECTIVE": ADJECTIVES,
    "NOUN": NOUNS,
    "VERB": VERBS,
    "PLACE": PLACES,
    "NUMBER": NUMBERS,
    "PLURAL": PLURALS,
    "COLOUR": COLOURS,
}
MEAN_WORDS = 9  # of a sentence, rounded up


def _slots() -> tuple[Ids, Ids, Ids]:
    """For each sentence and place, int64 `[sentences, longest]`: the word, or its class; -1 where there is none.

    The third is each class's first word, `[classes]`: the words of a class stand side by side in `WORDS`.
    """
    names = list(CLASSES)
    longest = max(len(sentence.split()) for sentence in SENTENCES)
    words = np.full((len(SENTENCES), longest), -1)
    classes = np.full((len(SENTENCES), longest), -1)
    for row, sentence in enumerate(SENTENCES):
        for column, word in enumerate(sentence.split()):
            if word in CLASSES:
                classes[row, column] = names.index(word)
            else:
                words[row, column] = numbered(word)[0]
    return words, classes, np.array([numbered(members[0])[0] for members in CLASSES.values()])


_WORDS, _CLASSES, _FIRST = _slots()
_SIZES = np.array([len(members) for members in CLASSES.values()])


def passage(words: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """At least `words` words of whole sentences.

    Returns:
        int64 `[n]`, places in `WORDS`, with n at least `words`; and int64 `[sentences]`, where each sentence begins.
    """
    count = words // 5 + 2  # no sentence is as short as five words
    kind = rng.integers(len(SENTENCES), size=count)
    fixed, classes = _WORDS[kind], _CLASSES[kind]  # [sentences, longest]
    picks = _FIRST[classes] + (rng.random(classes.shape) * _SIZES[classes]).astype(np.int64)
    chosen = np.where(classes >= 0, picks, fixed)
    present = chosen >= 0
    lengths = present.sum(1)
    return chosen[present], np.cumsum(lengths) - lengths


def fact(colour: int, number: int) -> Ids:
    """The sentence that states what a card would show."""
    return numbered(f"the {COLOURS[colour]} card shows {NUMBERS[number]} .")


def question(colour: int) -> Ids:
    """What is asked at the end; the next word is the number.

    It ends with the colour, so that the token that answers also knows what to look for: learned in one step, not two.
    """
    return numbered(f"what number is on the {COLOURS[colour]} card ? answer : {COLOURS[colour]}")
