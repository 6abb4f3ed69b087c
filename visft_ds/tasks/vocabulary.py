"""Words of captions and their ids.

`caption_words` is the one way in which this project cuts a caption into words: shards count words with it and heads are
trained on its output. Its name, `TOKENIZER`, is part of a vocabulary's fingerprint, so that a change of the rules can
not go unnoticed.

The published captioning heads (https://huggingface.co/TencentARC/ViSFT) were trained on another cut: the ready-made
tokens of the Karpathy split (`dataset_coco.json`), counted over training, validation *and* test captions, with ids in
the order of first appearance. Their 9,490 ids can therefore not be rebuilt from COCO's own caption files. Those heads
need their word map (a JSON object word -> id), see `Vocabulary.from_word_map`; the special ids and the minimum count
are the same here.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

#: Name of the rules of `caption_words`; they never change under this name.
TOKENIZER = "visft-words-1"
FORMAT = "visft_ds vocabulary"
VERSION = 1

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"
#: Behind the last word, in this order; `<pad>` is id 0 (as in the published heads).
_BEHIND = (UNKNOWN, START, END)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_EXAMPLES = 5


def caption_words(caption: str) -> list[str]:
    """Lower-case words of a caption: runs of letters and digits of any script, with apostrophes inside a word.

    The text is brought to Unicode's NFKC form first, typographic apostrophes become straight ones. Everything else
    separates words and is dropped: a caption of punctuation or emoji alone has no words.
    """
    text = unicodedata.normalize("NFKC", caption).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return _WORD.findall(text)


@dataclass(frozen=True)
class Vocabulary:
    """The words a head knows; ids: `<pad>` 0, `words` from 1, then `<unk>`, `<start>`, `<end>`.

    Raises ValueError for no words at all, for a word twice, and for words that no caption can contain.
    """

    words: tuple[str, ...]  #: the word with id 1, 2, ...
    tokenizer: str = TOKENIZER  #: how captions are cut into words

    def __post_init__(self) -> None:
        if self.tokenizer != TOKENIZER:
            raise ValueError(
                f"the vocabulary was made with the tokenizer {self.tokenizer!r}; this program has {TOKENIZER!r}: make "
                "the shards and the vocabulary anew with this program"
            )
        if not self.words:
            raise ValueError("a vocabulary needs at least one word: give captions, or a lower minimum count")
        if len(set(self.words)) != len(self.words):
            twice = sorted({word for word in self.words if self.words.count(word) > 1})
            raise ValueError(f"words must be unique in a vocabulary; more than once: {_some(twice)}")
        wrong = [word for word in self.words if not word or word in (PAD, *_BEHIND)]
        if wrong:
            raise ValueError(f"{_some(wrong)} cannot be words of a vocabulary: {PAD} and the like have fixed ids")

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], *, min_count: int, tokenizer: str = TOKENIZER) -> Vocabulary:
        """Words that occur at least `min_count` times, the most frequent first and equal ones in alphabetical order.

        The order is a function of the counts alone, whatever the order of the mapping. The default keeps what occurs
        more than five times, as the published heads do.

        Raises ValueError for a `min_count` below 1, and when no word is frequent enough.
        """
        if min_count < 1:
            raise ValueError(f"min_count {min_count} is not allowed: give at least 1, which keeps every word")
        kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        if not kept:
            most = max(counts.values(), default=0)
            raise ValueError(
                f"none of the {len(counts)} different words of the captions occurs {min_count} times (the most "
                f"frequent one occurs {most} times): lower min_count"
                + ("" if counts else ", or make the shards with --captions: these have no captions")
            )
        return cls(tuple(word for _, word in kept), tokenizer)

    @classmethod
    def from_word_map(cls, word_map: Mapping[str, int]) -> Vocabulary:
        """The vocabulary of a published head: word -> id, special tokens included.

        Raises ValueError unless the ids are 0 for `<pad>`, 1, 2, ... for words and the last three for `<unk>`,
        `<start>` and `<end>`.
        """
        by_id = sorted(word_map, key=word_map.__getitem__)
        specials = (by_id[:1], by_id[-3:])
        if sorted(word_map.values()) != list(range(len(word_map))) or specials != ([PAD], list(_BEHIND)):
            raise ValueError(
                f"not a word map of a captioning head: ids must be 0..{len(word_map) - 1} without gaps, {PAD} first "
                f"and {', '.join(_BEHIND)} last"
            )
        return cls(tuple(by_id[1:-3]))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`. Raises ValueError for other content, or when its fingerprint does not fit."""
        if fields.get("format") != FORMAT or fields.get("version") != VERSION:
            raise ValueError(
                f"this is no {FORMAT} of version {VERSION}: it says format {fields.get('format')!r}, "
                f"version {fields.get('version')!r}"
            )
        words = fields.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"the {FORMAT} has no list of words: take the file anew from where it came")
        vocabulary = cls(tuple(words), str(fields.get("tokenizer")))
        if fields.get("fingerprint") != vocabulary.fingerprint:
            raise ValueError(
                f"the {FORMAT} was changed after it was written (its fingerprint differs): ids would not fit the head"
            )
        return vocabulary

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON files and for the metadata of a saved head."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": self.tokenizer,
            "fingerprint": self.fingerprint,
            "words": list(self.words),
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's name and the words in order: equal exactly where all ids are equal."""
        return hashlib.sha256(orjson.dumps([self.tokenizer, self.words])).hexdigest()

    @property
    def size(self) -> int:
        """Number of ids: `vocabulary_size` of a head."""
        return len(self.words) + 4

    @property
    def pad(self) -> int:
        """Id of what fills a batch up behind the shorter captions."""
        return 0

    @property
    def unknown(self) -> int:
        """Id of every word that is not in here."""
        return len(self.words) + 1

    @property
    def start(self) -> int:
        """Id in front of the first word."""
        return len(self.words) + 2

    @property
    def end(self) -> int:
        """Id behind the last word; the highest one."""
        return len(self.words) + 3

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words, start=1)}

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption of any length, `<start>` and `<end>` included: at least two, also without words."""
        return self.encode_words(caption_words(caption))

    def encode_words(self, words: Iterable[str]) -> list[int]:
        """Ids of a caption that is cut into words already, `<start>` and `<end>` included."""
        return [self.start, *(self._ids.get(word, self.unknown) for word in words), self.end]

    def decode(self, ids: Iterable[int]) -> str:
        """The words before the first `<end>`, joined by blanks; `<start>` and `<pad>` are left out.

        Raises ValueError for an id outside 0..size - 1.
        """
        words = []
        for id_ in ids:
            if not 0 <= id_ < self.size:
                raise ValueError(f"id {id_} is not in this vocabulary of {self.size} ids (0..{self.size - 1})")
            if id_ == self.end:
                break
            if id_ not in (self.pad, self.start):
                words.append(UNKNOWN if id_ == self.unknown else self.words[id_ - 1])
        return " ".join(words)

    def check_same(self, other: Vocabulary, *, this: str = "the captioning head", that: str = "the shards") -> None:
        """Raise ValueError, with what differs, unless every id means the same word in both."""
        if self.fingerprint == other.fingerprint:
            return
        ours, foreign = set(self.words), set(other.words)
        if ours == foreign:
            difference = "the words are the same but their ids are not"
        else:
            difference = "; ".join(
                f"{len(rest)} words only in {name}: {_some(rest)}"
                for name, rest in ((this, sorted(ours - foreign)), (that, sorted(foreign - ours)))
                if rest
            )
        raise ValueError(
            f"{this} and {that} have different vocabularies: {self.size} ids ({self.fingerprint[:12]}) and "
            f"{other.size} ids ({other.fingerprint[:12]}); {difference}. Use the shards (or the minimum count) "
            "that the head was trained with, give the head's own vocabulary, or train a new head"
        )

    def check_size(self, vocabulary_size: int) -> None:
        """Raise ValueError unless a head with that many ids can use this vocabulary."""
        if vocabulary_size != self.size:
            raise ValueError(
                f"the captioning head has {vocabulary_size} ids, the vocabulary {self.size} ({len(self.words)} words "
                "and 4 special tokens): the head was trained with another vocabulary; give that, or train a new head"
            )


def _some(words: Sequence[str]) -> str:
    shown = ", ".join(repr(word) for word in words[:_EXAMPLES])
    return shown if len(words) <= _EXAMPLES else f"{shown}, ..."
