"""Where everything stands in a prompt: clips, passages, cards, facts in the text, and the questions at the end.

A video prompt is a passage, one clip and the question; the passage takes the tokens that make no whole frame. A mixed
prompt is clips with passages before, between and after them, and the question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmcompile.huggingface import ModelError
from mmcompile.needle import passages
from mmcompile.needle.layout import Layout
from mmcompile.needle.vocabulary import COLOURS, NUMBERS, SHAPES, Ids

TASKS = ("video", "mixed")
CARD, TEXT = "card", "text"
TEXT_SHARE = 0.25  # of the tokens of a mixed prompt
CLIP_TOKENS = 1024  # of a mixed prompt, on average
NEEDLES = 6  # in a prompt that is long enough


@dataclass(frozen=True)
class Needle:
    """A fact in the prompt: a card among the frames, or a sentence in the text.

    modality: "card" or "text". colour, number, shape: places in the vocabulary's lists. frame: a card's, in temporal
    patches from the start of the first clip. token, tokens: where it stands in the prompt, and how long it is there.
    """

    modality: str
    colour: int
    number: int
    shape: int = -1
    frame: int = -1
    token: int = -1
    tokens: int = 0


@dataclass(frozen=True)
class Haystack:
    """The plan of a prompt, before any frame is drawn.

    ids: int64 `[S]`, input ids. types: int32 `[S]`, `mm_token_type_ids`. clips: temporal patches of each clip.
    needles: in the order in which they are asked for, then the others. questions: int64 `[questions, 2]`, the position
    whose next token is an answer, and that answer's id; the last of them is the prompt's last position.
    """

    ids: Ids
    types: NDArray[np.int32]
    clips: list[int]
    needles: tuple[Needle, ...]
    questions: Ids


def plan(
    task: str,
    tokens: int,
    depth: float,
    rng: np.random.Generator,
    layout: Layout,
    *,
    asked: str | None = None,
    questions: int = 1,
    needles: int = NEEDLES,
) -> Haystack:
    """Lay out a prompt of exactly `tokens` tokens.

    Args:
        task: "video", or "mixed": a quarter of the tokens is text, with needles in both.
        depth: of the needle that is asked for first, among the frames or in the text: 0 first, 1 last.
        rng: of everything that the other arguments leave open.
        asked: "card" or "text", what the first question is about; None leaves it to `rng`.
        questions: how many are asked, each but the last one followed by its answer; no more than there are needles.
        needles: the most there may be, each of another colour; short prompts have fewer.

    Raises:
        ModelError: an unknown task, or too few tokens for it.
    """
    _check(task, depth, asked)
    mixed = task == "mixed"
    frames = _frame_count(tokens, mixed, questions, layout)
    clips = _parts(frames, max(2, round(frames * layout.frame_tokens / CLIP_TOKENS)) if mixed else 1, rng)
    facts = min(needles // 2, len(clips) + 1) if mixed else 0
    asked = asked or str(rng.choice((CARD, TEXT) if facts else (CARD,)))
    found = _needles(facts, min(needles - facts, frames), asked, depth, frames, rng)
    tail, positions = _tail(found[:questions], layout)
    text = tokens - frames * layout.frame_tokens - 2 * len(clips) - len(tail)
    lengths = _parts(text, len(clips) + 1, rng) if mixed else [text, 0]
    sentences = [layout.words.encode(passages.fact(one.colour, one.number)) for one in found if one.modality == TEXT]
    if mixed and min(lengths) < max(len(sentence) for sentence in sentences):
        raise ModelError(f"tokens={tokens}: too few for {facts} facts in the text of a mixed prompt")
    depths = [depth if one is found[0] else rng.random() for one in found if one.modality == TEXT]
    texts, stands = _passages(lengths, sentences, depths, rng, layout)

    ids = [texts[0]]
    for count, passage in zip(clips, texts[1:], strict=True):
        video = np.full(count * layout.frame_tokens, layout.video)
        ids += [np.array([layout.vision_start]), video, np.array([layout.vision_end]), passage]
    all_ids = np.concatenate((*ids, tail))
    starts = np.cumsum([len(part) for part in ids]) - [len(part) for part in ids]
    is_video = all_ids == layout.video
    frame_starts = np.flatnonzero(is_video)[:: layout.frame_tokens]
    facts_at = iter(starts[4 * passage] + offset for passage, offset in stands)  # four parts from passage to passage
    lengths_of = iter(len(sentence) for sentence in sentences)
    placed = tuple(
        replace(one, token=int(next(facts_at)), tokens=next(lengths_of))
        if one.modality == TEXT
        else replace(one, token=int(frame_starts[one.frame]), tokens=layout.frame_tokens)
        for one in found
    )
    positions[:, 0] += len(all_ids) - len(tail)
    return Haystack(all_ids, np.where(is_video, 2, 0).astype(np.int32), clips, placed, positions)


def _check(task: str, depth: float, asked: str | None) -> None:
    if task not in TASKS:
        raise ModelError(f"task={task!r}: must be {' or '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise ModelError(f"depth={depth}: must lie between 0 and 1")
    if asked not in (None, CARD, TEXT) or (task == "video" and asked == TEXT):
        raise ModelError(f"asked={asked!r}: must be card, or with task='mixed' text")


def _frame_count(tokens: int, mixed: bool, questions: int, layout: Layout) -> int:
    """Temporal patches in a prompt: three quarters of the tokens, or whatever the questions leave."""
    longest = max(len(layout.words.encode(passages.question(colour))) for colour in range(len(COLOURS)))
    room = tokens - questions * (longest + len(layout.words.answer_prefix) + 1) - 2
    frames = round(tokens * (1 - TEXT_SHARE) / layout.frame_tokens) if mixed else room // layout.frame_tokens
    if frames < 2:
        raise ModelError(f"tokens={tokens}: too few for two frames of {layout.frame_tokens} tokens and a question")
    return frames


def _parts(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` whole numbers that sum to `total`, none far from the others."""
    shares = rng.uniform(0.5, 1.5, size=count)
    ends = np.round(np.cumsum(shares) / shares.sum() * total).astype(np.int64)
    return np.diff(ends, prepend=0).tolist()


def _needles(facts: int, cards: int, asked: str, depth: float, frames: int, rng: np.random.Generator) -> list[Needle]:
    """Needles of different colours and numbers in random order, the one at `depth` first; cards in different frames."""
    colours = rng.permutation(len(COLOURS))[: facts + cards].tolist()
    numbers = rng.permutation(len(NUMBERS))[: facts + cards].tolist()
    kinds = [asked, *rng.permutation([CARD] * (cards - (asked == CARD)) + [TEXT] * (facts - (asked == TEXT)))]
    wanted = round(depth * (frames - 1))
    free = np.delete(np.arange(frames), wanted) if asked == CARD else np.arange(frames)
    others = iter(rng.permutation(free).tolist())
    found = []
    for place, (kind, colour, number) in enumerate(zip(kinds, colours, numbers, strict=True)):
        if kind == TEXT:
            found.append(Needle(TEXT, colour, number))
        else:
            frame = wanted if place == 0 else next(others)
            found.append(Needle(CARD, colour, number, int(rng.integers(len(SHAPES))), frame))
    return found


def _tail(asked: list[Needle], layout: Layout) -> tuple[Ids, Ids]:
    """The questions with the answers between them, and `Haystack.questions` counted from their start."""
    words, parts, positions = layout.words, [], []
    length = 0
    for needle in asked:
        question = np.concatenate((words.encode(passages.question(needle.colour)), words.answer_prefix))
        answer = words.answers[needle.number]
        length += len(question) + 1
        positions.append((length - 2, answer))
        parts += [question, np.array([answer])]
    return np.concatenate(parts[:-1]), np.array(positions, dtype=np.int64)


def _passages(
    lengths: list[int], facts: list[Ids], depths: list[float], rng: np.random.Generator, layout: Layout
) -> tuple[list[Ids], list[tuple[int, int]]]:
    """Passages of so many tokens, each with at most one of the facts between two of its sentences.

    facts: token ids. depths: of each fact in all the text. Returns the passages' ids, and of each fact its passage and
    its offset there.
    """
    starts = np.cumsum(lengths) - lengths
    hidden: dict[int, tuple[Ids, int]] = {}  # by passage: the fact, and the offset that its depth asks for
    for fact, depth in zip(facts, depths, strict=True):
        target = depth * sum(lengths)
        distance = np.abs(starts + np.array(lengths) / 2 - target) - np.array(lengths) / 2
        nearest = next(number for number in np.argsort(distance, kind="stable").tolist() if number not in hidden)
        hidden[nearest] = (fact, int(np.clip(target - starts[nearest], 0, lengths[nearest] - len(fact))))
    texts, offsets = [], {}
    for number, length in enumerate(lengths):
        words, sentences = passages.passage(length, rng)
        if number not in hidden:
            texts.append(layout.words.encode(words)[:length])
            continue
        fact, wanted = hidden[number]
        begins = layout.words.starts(words)[sentences]
        split = int(np.searchsorted(begins, wanted, side="right")) - 1
        before, after = words[: sentences[split]], words[sentences[split] :]
        texts.append(np.concatenate((layout.words.encode(before), fact, layout.words.encode(after)))[:length])
        offsets[number] = int(begins[split])
    return texts, [(number, offsets[number]) for number in hidden]
