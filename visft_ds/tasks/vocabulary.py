"""Words of captions and their ids: shards count what `caption_words` finds, and heads are trained on it.

The published captioning heads were trained on the ready-made tokens of the Karpathy split. Their 9,490 ids
cannot be rebuilt from COCO's caption files: they need their word map.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

#: Name of the rules of `caption_words`; they never change under this name.
TOKENIZER = "visft-words-1"
FORMAT = "visft_ds vocabulary"
_HEADER = {"format": FORMAT, "version": 1, "tokenizer": TOKENIZER}

PAD = "<pad>"
UNKNOWN = "<unk>"
START = "<start>"
END = "<end>"
_REMEDY = "Use the vocabulary that the head was trained with, or train a new head"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def caption_words(caption: str) -> list[str]:
    """Lower-case words of a caption: runs of letters and digits of any script, with apostrophes inside a
    word.
    """
    text = unicodedata.normalize("NFKC", caption).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return _WORD.findall(text)


@dataclass
class Vocabulary:
    """The words a head knows; ids: `<pad>` 0, `words` from 1, then `<unk>`, `<start>`, `<end>`."""

    words: tuple[str, ...]  #: the word with id 1, 2, ...
    ids: dict[str, int] = field(init=False, repr=False, compare=False)
    size: int = field(init=False, repr=False, compare=False)  #: number of ids: `vocabulary_size` of a head
    #: sha256 of the tokenizer's name and the words in order: equal exactly where all ids are equal
    fingerprint: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tokens = (PAD, *self.words, UNKNOWN, START, END)
        self.ids = {token: id_ for id_, token in enumerate(tokens)}
        self.size = len(tokens)
        if not self.words or len(self.ids) != self.size or "" in self.ids:
            raise ValueError(f"a vocabulary needs words, each once and none of them empty or like {PAD}")
        self.fingerprint = hashlib.sha256(orjson.dumps([TOKENIZER, self.words])).hexdigest()

    @classmethod
    def from_word_map(cls, word_map: Mapping[str, int]) -> Vocabulary:
        """The vocabulary of a published head: word -> id, special tokens included."""
        tokens = sorted(word_map, key=word_map.__getitem__)
        in_place = [tokens[:1], tokens[-3:]] == [[PAD], [UNKNOWN, START, END]]
        if not in_place or sorted(word_map.values()) != list(range(len(tokens))):
            raise ValueError(
                f"a word map of a captioning head goes from {PAD} at 0 to {UNKNOWN}, {START}, {END}"
            )
        return cls(tuple(tokens[1:-3]))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`; raises ValueError for what this program did not write, or not in this
        form.
        """
        header = {name: fields.get(name) for name in _HEADER}
        if header != _HEADER:
            raise ValueError(f"a {FORMAT} begins with {_HEADER}, not {header}")
        return cls(tuple(fields["words"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON files and for the metadata of a saved head."""
        return {**_HEADER, "words": list(self.words)}

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of a caption that is cut into words, `<start>` and `<end>` included."""
        unknown = self.ids[UNKNOWN]
        ids = [self.ids.get(word, unknown) for word in words]
        return [self.ids[START], *ids, self.ids[END]]

    def decode(self, ids: Iterable[int]) -> str:
        """The words before the first `<end>`, joined by blanks; `<start>` and `<pad>` are left out."""
        tokens = list(self.ids)
        words = []
        for id_ in ids:
            token = tokens[id_]
            if token == END:
                break
            if token not in (PAD, START):
                words.append(token)
        return " ".join(words)

    def check_same(self, other: Vocabulary, *, this: str, that: str) -> None:
        """Raise ValueError unless every id means the same word in both."""
        if self.words == other.words:
            return
        in_one = sorted(set(self.words) ^ set(other.words))
        examples = ", ".join(map(repr, in_one[:5])) or "none"
        raise ValueError(
            f"{this} and {that} have different vocabularies, of {self.size} and {other.size} ids; words of "
            f"one of them only: {examples}. {_REMEDY}"
        )

    def check_size(self, vocabulary_size: int) -> None:
        """Raise ValueError unless a head with that many ids can use this vocabulary."""
        if vocabulary_size != self.size:
            raise ValueError(
                f"the captioning head has {vocabulary_size} ids, the vocabulary {self.size}. {_REMEDY}"
            )
