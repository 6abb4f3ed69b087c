"""Words of captions, their ids, and what travels with a head."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visft_ds.tasks.vocabulary import TOKENIZER, Vocabulary, caption_words

COUNTS = {"dog": 7, "a": 20, "cat": 7, "zebra": 6, "rare": 5}


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
    vocabulary = Vocabulary.from_counts(COUNTS, min_count=6)
    words, ids = caption_words(text), vocabulary.encode(text)
    assert caption_words(" ".join(words)) == words  # cutting again changes nothing: shards and heads agree
    assert len(ids) == len(words) + 2
    assert ids[0] == vocabulary.start
    assert ids[-1] == vocabulary.end
    assert all(0 < one < vocabulary.size for one in ids)


def test_ids_are_those_of_the_published_heads() -> None:
    vocabulary = Vocabulary.from_counts(COUNTS, min_count=6)
    # More than five times, by falling count; equal counts alphabetically, whatever the order of the mapping.
    assert vocabulary.words == ("a", "cat", "dog", "zebra")
    assert Vocabulary.from_counts(dict(reversed(COUNTS.items())), min_count=6) == vocabulary
    assert vocabulary.encode("A zebra, unheard of") == [6, 1, 4, 5, 5, 7]
    assert (vocabulary.pad, vocabulary.unknown, vocabulary.start, vocabulary.end) == (0, 5, 6, 7)
    assert vocabulary.size == 8
    assert Vocabulary.from_counts(COUNTS, min_count=5).words[-1] == "rare"


def test_captions_of_five_hundred_words_and_of_none() -> None:
    vocabulary = Vocabulary.from_counts(COUNTS, min_count=6)
    assert len(vocabulary.encode("dog " * 500)) == 502
    for nothing in ("", "?!", "\U0001f355"):
        assert vocabulary.encode(nothing) == [vocabulary.start, vocabulary.end]


def test_decode() -> None:
    vocabulary = Vocabulary.from_counts(COUNTS, min_count=6)
    assert vocabulary.decode(vocabulary.encode("A dog, unheard of")) == "a dog <unk> <unk>"
    assert vocabulary.decode([6, 1, 3, 7, 2, 0, 0]) == "a dog"  # nothing behind <end>
    assert vocabulary.decode([]) == ""
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=r"not in this vocabulary of 8 ids \(0\.\.7\)"):
            vocabulary.decode([wrong])


def test_json_round_trip_and_fingerprint() -> None:
    vocabulary = Vocabulary.from_counts(COUNTS, min_count=6)
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert again.fingerprint == vocabulary.fingerprint
    # The same words with other ids are another vocabulary.
    assert Vocabulary(vocabulary.words[::-1]).fingerprint != vocabulary.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ["cat", "a", "dog", "zebra"]}, "fingerprint differs"),
        ({"tokenizer": "spaces"}, f"tokenizer 'spaces'; this program has '{TOKENIZER}'"),
        ({"version": 2}, "version 2"),
        ({"format": "word map"}, "format 'word map'"),
        ({"words": "a cat"}, "no list of words"),
    ],
)
def test_changed_files_are_refused(change: dict[str, object], message: str) -> None:
    fields = Vocabulary.from_counts(COUNTS, min_count=6).to_dict()
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_dict(fields | change)


def test_useless_counts_are_refused_with_a_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"none of the 5 different words .* 21 times .*occurs 20 times.*lower min_count"
    ):
        Vocabulary.from_counts(COUNTS, min_count=21)
    with pytest.raises(ValueError, match="make the shards with --captions"):
        Vocabulary.from_counts({}, min_count=6)
    with pytest.raises(ValueError, match="min_count 0 is not allowed"):
        Vocabulary.from_counts(COUNTS, min_count=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "at least one word"), (("a", "b", "a"), "more than once: 'a'"), (("<unk>", "b"), "'<unk>' cannot be words")],
)
def test_impossible_words_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(words)


def test_word_map_of_a_published_head() -> None:
    word_map = {"a": 1, "surfboard": 2, "<unk>": 3, "<start>": 4, "<end>": 5, "<pad>": 0}
    assert Vocabulary.from_word_map(word_map).words == ("a", "surfboard")
    for wrong in ({"a": 7}, {"<end>": 3, "<unk>": 5}, {"<pad>": 1, "a": 0}):
        with pytest.raises(ValueError, match=r"ids must be 0\.\.5 without gaps"):
            Vocabulary.from_word_map(word_map | wrong)


def test_mismatch_between_head_and_shards_is_refused() -> None:
    head, shards = Vocabulary(("a", "cat", "dog")), Vocabulary(("a", "cat", "hat"))
    head.check_same(Vocabulary(("a", "cat", "dog")))
    with pytest.raises(
        ValueError, match=r"1 words only in the captioning head: 'dog'; 1 words only in the shards: 'hat'"
    ):
        head.check_same(shards)
    with pytest.raises(ValueError, match="the words are the same but their ids are not"):
        head.check_same(Vocabulary(("cat", "a", "dog")))
    head.check_size(7)
    with pytest.raises(ValueError, match=r"the captioning head has 9490 ids, the vocabulary 7"):
        head.check_size(9490)
