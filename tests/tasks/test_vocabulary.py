"""Words of captions, their ids, and what travels with a head."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visft_ds.tasks.vocabulary import Vocabulary, caption_words

VOCABULARY = Vocabulary(("a", "cat", "dog", "zebra"))


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's hat, isn't it?", ["a", "man's", "hat", "isn't", "it"]),
        ("A man\u2019s hat", ["a", "man's", "hat"]),
        ("'quoted' dogs'", ["quoted", "dogs"]),
        ("T-shirt/jacket 4:00pm", ["t", "shirt", "jacket", "4", "00pm"]),
        ("Cafe\u0301 = CAFÉ", ["café", "café"]),  # one word, however it is composed
        ("\uff21 \U0001d54f", ["a", "x"]),  # full-width and mathematical letters
        ("snake_case", ["snake", "case"]),
        ("\U0001f355\U0001f600 !!! ... -- '' _", []),
        ("", []),
        (" \t\n", []),
    ],
)
def test_caption_words(caption: str, words: list[str]) -> None:
    assert caption_words(caption) == words


@settings(deadline=None)
@given(st.text())
def test_any_text_has_defined_words_and_ids(text: str) -> None:
    words = caption_words(text)
    assert caption_words(" ".join(words)) == words  # cutting again changes nothing: shards and heads agree
    first, *ids, last = VOCABULARY.encode(words)
    assert (first, last, len(ids)) == (6, 7, len(words)) and all(0 < token < VOCABULARY.size for token in ids)


def test_ids_begin_with_the_words() -> None:
    assert (
        VOCABULARY.encode(caption_words("A zebra, unheard of")) == [6, 1, 4, 5, 5, 7] and VOCABULARY.size == 8
    )


def test_decode() -> None:
    assert VOCABULARY.decode(VOCABULARY.encode(["a", "dog", "unheard", "of"])) == "a dog <unk> <unk>"
    assert VOCABULARY.decode([6, 1, 3, 7, 2, 0, 0]) == "a dog"  # nothing behind <end>
    assert VOCABULARY.decode([]) == ""


def test_json_round_trip_and_fingerprint() -> None:
    fields = json.loads(json.dumps(VOCABULARY.to_dict()))
    assert Vocabulary.from_dict(fields) == VOCABULARY
    # The same words with other ids are another vocabulary.
    assert Vocabulary(VOCABULARY.words[::-1]).fingerprint != VOCABULARY.fingerprint
    for change in ({"tokenizer": "spaces"}, {"version": 2}):
        with pytest.raises(ValueError, match="vocabulary"):
            Vocabulary.from_dict(fields | change)


def test_word_map_of_a_published_head() -> None:
    word_map = {"a": 1, "surfboard": 2, "<unk>": 3, "<start>": 4, "<end>": 5, "<pad>": 0}
    assert Vocabulary.from_word_map(word_map).words == ("a", "surfboard")
    with pytest.raises(ValueError, match="word map"):
        Vocabulary.from_word_map(word_map | {"<end>": 3, "<unk>": 5})
