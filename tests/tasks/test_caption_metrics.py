"""Caption metrics against pycocoevalcap (where it is installed) and against numbers measured with it."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from visft_ds.tasks.captioning.metrics import caption_metrics
from visft_ds.tasks.captioning.tokenizer import ptb_words

NAMES = ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
REFERENCES = {
    7: [
        "A man riding a wave on top of a surfboard.",
        "The surfer isn't falling off his board!",
        "A surfer (in black) rides a big wave.",
    ],
    3: ['Two dogs\' bowls sit next to a well-known "red" couch.', "Two bowls are beside a red couch."],
    12: [
        "A clock tower at 4:30 in St. Louis",
        "A tall clock tower, seen from below...",
        "There is a clock on the tower.",
    ],
    5: ["A plate of food with broccoli and rice", "Rice & broccoli on a white plate"],
}
CANDIDATES = {
    3: "two bowls next to a couch",
    5: "a plate of rice rice rice and broccoli",
    7: "A surfer isn't riding a big wave on a surfboard.",
    12: "a clock tower in st. louis",
}
#: Measured with pycocoevalcap 1.2 on the words of its own Java tokenizer. CIDEr is its Cider, as papers
#: report it (CIDEr-D). No 4-gram is right here, so BLEU-4 also pins its guard against zeros.
MEASURED = {
    "CIDEr": 2.0565600715357943,
    "BLEU-1": 0.9057885043665107,
    "BLEU-2": 0.7431067927172761,
    "BLEU-3": 0.5186074991358772,
    "BLEU-4": 5.1634303032629664e-05,
    "ROUGE-L": 0.6814261105153959,
}

#: Captions and what the Java program (with coco-caption's list of punctuation taken out) makes of them.
MEASURED_WORDS = {
    "A man's hat isn't \"blue\" (or red) at 4:00 pm.": "a man 's hat is n't blue -lrb- or red -rrb- at 4:00 pm",
    "I can't, won't and couldn't've; they'd said it's": "i ca n't wo n't and could n't 've they 'd said it 's",
    "A well-known t-shirt/jacket costs $5.99 & 10% off...": "a well-known t-shirt/jacket costs $ 5.99 & 10 % off",
    "Mr. Smith's U.S. flag vs. the St. Louis arch, etc.": "mr. smith 's u.s. flag vs. the st. louis arch etc.",
    "rock 'n' roll \u2013 dash -- two - one": "rock 'n' roll dash two one",
    "dogs\u2019 bowls \u2026 the boss\u2019s 1,000 \u201ctoys\u201d @ home": "dogs bowls the boss 's 1,000 toys @ home",
    "cannot gimme wanna gotta 'tis o'clock ma'am y'all": "can not gim me wan na got ta 't is o'clock ma'am y' all",
    "At 10:30am, 5:15pm! wow!! ok?! the '90s and 1990's": "at 10:30 am 5:15 pm wow !! ok ?! the '90s and 1990 's",
    "a dog,a cat:b;c a STOP sign.The end": "a dog a cat b c a stop sign.the end",
    "2 x 4, 3x3, 1/2 cup, #1 [a] {b} <unk> x*y": "2 x 4 3x3 1/2 cup # 1 -lsb- a -rsb- -lcb- b -rcb- <unk> x * y",
    "No. 5, R&B and black&white, a_b; www.foo.com, foo.org": "no. 5 r&b and black & white a_b www.foo.com foo.org",
    "Caf\u00e9 \U0001f355 \u00a35 \u00bd cup": "caf\u00e9 # 5 1/2 cup",
    "'single quoted' half-eaten -leading trailing-": "single quoted half-eaten leading trailing",
    "...": "",
    "": "",
}


def scores_of(references: Mapping[int, Sequence[str]], candidates: Mapping[int, str]) -> dict[str, float]:
    """Scores of a caption for each image, texts by image."""
    entries = [{"image_id": image, "caption": text} for image, texts in references.items() for text in texts]
    results = [{"image_id": image, "caption": text} for image, text in candidates.items()]
    return caption_metrics({"annotations": entries}, results)


def named(scores: Mapping[str, float]) -> dict[str, float]:
    return {f"caption/{name}": score for name, score in scores.items()}


def corpus(seed: int, images: int, shortest: int) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Sentences of 30 words, some much more frequent than others, so that n-grams repeat and are shared."""
    rng = random.Random(seed)
    words = [f"w{index}" for index in range(30)]

    def sentence() -> str:
        weights = [1 / (index + 1) for index in range(30)]
        return " ".join(rng.choices(words, weights, k=rng.randint(shortest, 14)))

    references = {image: [sentence() for _ in range(rng.randint(1, 5))] for image in range(images)}
    return references, {image: sentence() for image in range(images)}


@pytest.mark.parametrize(("caption", "words"), MEASURED_WORDS.items())
def test_words_are_those_of_the_java_tokenizer(caption: str, words: str) -> None:
    assert " ".join(ptb_words(caption)) == words


def test_measured_scores() -> None:
    # The same formulas in another order of summation: rounding only.
    assert scores_of(REFERENCES, CANDIDATES) == pytest.approx(named(MEASURED), rel=1e-12)


def test_equal_to_pycocoevalcap() -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        pytest.skip(
            "pycocoevalcap is not installed (pip install pycocoevalcap); its measured numbers are tested anyway"
        )
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    for seed in range(12):
        # Even seeds have references without words. An empty candidate beside one of these is left out:
        # pycocoevalcap calls the two equal.
        references, candidates = corpus(seed, images=1 + seed % 7, shortest=seed % 2)
        given = {image: [*texts, "w0"] for image, texts in references.items()}
        said = {image: [text or "w0"] for image, text in candidates.items()}
        expected = {
            "CIDEr": Cider().compute_score(given, said)[0],
            "ROUGE-L": Rouge().compute_score(given, said)[0],
        }
        bleu = Bleu(4).compute_score(given, said, verbose=0)[0]
        expected |= {f"BLEU-{index + 1}": score for index, score in enumerate(bleu)}
        scores = scores_of(given, {image: text for image, (text,) in said.items()})
        # The same formulas in another order of summation: rounding only.
        assert {name: scores[f"caption/{name}"] for name in expected} == pytest.approx(
            expected, rel=1e-12, abs=1e-15
        )


def test_empty_candidates_score_nothing() -> None:
    for nothing in ("", "?", "\U0001f355"):
        scores = scores_of(REFERENCES, dict.fromkeys(REFERENCES, nothing))
        assert scores == pytest.approx(named(dict.fromkeys(NAMES, 0.0)), abs=1e-12)
    # The references' length counts where a candidate is missing: BLEU-1 of one right word out of two.
    scores = scores_of({1: ["cat"], 2: ["dog"]}, {1: "cat", 2: ""})
    assert scores["caption/BLEU-1"] == pytest.approx(np.exp(1 - 2), rel=1e-8)


def test_a_reference_without_words_counts() -> None:
    with_it, without = ({1: ["a cat", *more], 2: ["a dog"]} for more in (["..."], []))
    said = {1: "a cat", 2: "a dog"}
    ratio = scores_of(with_it, said)["caption/CIDEr"] / scores_of(without, said)["caption/CIDEr"]
    assert ratio == pytest.approx(0.75, rel=1e-12)  # half the score for one of two images


def test_images_without_references_are_left_out() -> None:
    assert scores_of(REFERENCES, {**CANDIDATES, 99: "a cat"}) == scores_of(REFERENCES, CANDIDATES)
