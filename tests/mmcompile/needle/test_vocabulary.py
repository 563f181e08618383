"""The tokenizer of the task, its sentences, and the same words for a tokenizer that cuts them up."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from mmcompile.needle.passages import CLASSES, fact, passage
from mmcompile.needle.vocabulary import NUMBERS, SPECIAL, WORD_NUMBER, WORDS, WordTokens, numbered, word_tokenizer


def test_the_tokenizer_survives_its_file(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|vision_start|> <|video_pad|> <|vision_end|> what number is on the red card ? answer : 42"
    ids = loaded(text).input_ids
    assert ids[:3] == [
        SPECIAL.index("<|vision_start|>"),
        SPECIAL.index("<|video_pad|>"),
        SPECIAL.index("<|vision_end|>"),
    ]
    assert loaded.decode(ids[3:]) == "what number is on the red card ? answer : 42"
    assert loaded.unk_token_id not in ids
    assert loaded("elephant").input_ids == [loaded.unk_token_id]
    assert len(loaded) == len(SPECIAL) + len(WORDS)


def test_every_word_is_one_token():
    tokens = WordTokens(word_tokenizer())
    words = np.arange(len(WORDS))
    assert (tokens.encode(words) == words + len(SPECIAL)).all()
    assert len(tokens.answer_prefix) == 0
    assert word_tokenizer().decode(tokens.answers[32]) == "42"


class _Letters:
    """A tokenizer with a token for the space and one for each letter, as for digits in many models."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def test_words_of_many_tokens():
    tokens = WordTokens(_Letters())
    words = fact(0, 32)
    assert "".join(map(chr, tokens.encode(words))) == " the red card shows 42 ."
    assert tokens.starts(words).tolist() == [0, 4, 8, 13, 19, 22]
    assert tokens.answer_prefix.tolist() == [ord(" ")]
    assert tokens.answers[32] == ord("4")


def test_a_class_of_words_stands_in_a_row():
    for members in CLASSES.values():
        assert [WORD_NUMBER[word] for word in members] == list(numbered(members[0])[0] + np.arange(len(members)))


@pytest.mark.parametrize("words", [1, 10, 500])
def test_passages_are_whole_sentences_without_facts(words):
    found, begins = passage(words, np.random.default_rng(0))
    text = [WORDS[word] for word in found]
    assert len(text) >= words
    assert begins[0] == 0
    assert all(text[begin - 1] == "." for begin in begins[1:])
    assert not {"card", "shows"} & set(text)
    assert words < 500 or set(NUMBERS) & set(text)
