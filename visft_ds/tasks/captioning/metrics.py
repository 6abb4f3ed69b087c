"""Caption metrics in plain Python: CIDEr, BLEU-1 to 4, ROUGE-L, as coco-caption defines them.

The numbers are those of https://github.com/tylin/coco-caption on the same words; `tokenizer.ptb_words` cuts
captions into words. CIDEr is CIDEr-D of its paper (arXiv 1411.5726), as papers report it: it depends on the
set of images, and is 0 for one image. BLEU and ROUGE-L go from 0 to 1, CIDEr from 0 to 10; papers print 100
times as much.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from visft_ds.tasks.captioning.tokenizer import ptb_words

_ORDERS = (1, 2, 3, 4)
#: Width, in words, of CIDEr's penalty for a length that differs from the reference's (arXiv 1411.5726, eq.
#: 4).
_SIGMA = 6.0
#: Weight of recall in ROUGE-L, as in coco-caption.
_BETA = 1.2
#: coco-caption's guard against zeros; it shows where no 4-gram of a small corpus is right.
_TINY, _SMALL = 1e-15, 1e-9

Words = Sequence[str]
Counts = Counter[tuple[str, ...]]


def caption_metrics(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores of one caption for each image against its references.

    Entries of `truth["annotations"]` and `results` have image_id and caption, as COCO's; images without a
    reference are left out. Keys: "caption/CIDEr", "caption/BLEU-1" ... "caption/BLEU-4", "caption/ROUGE-L".

    Raises ValueError for an image without a result, and if there is no image.
    """
    references: dict[int, list[str]] = {}
    for entry in truth["annotations"]:
        references.setdefault(entry["image_id"], []).append(entry["caption"])
    candidates = {result["image_id"]: result["caption"] for result in results}
    if not references:
        raise ValueError("no image has captions to compare with")
    if lacking := len(references.keys() - candidates.keys()):
        raise ValueError(f"{lacking} images have no candidate caption")
    images = sorted(references)
    wanted = [[ptb_words(reference) for reference in references[image]] for image in images]
    generated = [ptb_words(candidates[image]) for image in images]
    scores = {"CIDEr": _cider(wanted, generated)}
    scores |= {f"BLEU-{order}": score for order, score in zip(_ORDERS, _bleu(wanted, generated), strict=True)}
    scores["ROUGE-L"] = sum(map(_rouge, wanted, generated)) / len(images)
    return {f"caption/{name}": score for name, score in scores.items()}


def _ngrams(words: Words) -> list[Counts]:
    """Counts of each n-gram, for n = 1 to 4."""
    return [Counter(zip(*(words[start:] for start in range(order)), strict=False)) for order in _ORDERS]


def _cider(wanted: Sequence[Sequence[Words]], generated: Sequence[Words]) -> float:
    """CIDEr-D without stemming: mean over images, references and orders, times 10."""
    counted = [[_ngrams(reference) for reference in references] for references in wanted]
    frequency: Counter[tuple[str, ...]] = Counter()
    for references in counted:
        frequency.update({gram for reference in references for counts in reference for gram in counts})
    log_images = math.log(len(wanted))

    def weighted(counts: Sequence[Counts]) -> list[Mapping[tuple[str, ...], float]]:
        # tf-idf. An n-gram that no reference has weighs like one that a single image has.
        rare = [{gram: log_images - math.log(frequency.get(gram, 1)) for gram in part} for part in counts]
        return [
            {gram: part[gram] * value[gram] for gram in part}
            for part, value in zip(counts, rare, strict=True)
        ]

    total = 0.0
    for references, words in zip(counted, generated, strict=True):
        counts = _ngrams(words)
        candidate, scores = weighted(counts), []
        for reference in references:
            # coco-caption takes the number of bigrams for the length, one less than the number of words.
            penalty = math.exp(-((counts[1].total() - reference[1].total()) ** 2) / (2 * _SIGMA**2))
            scores.append(penalty * sum(map(_clipped_cosine, candidate, weighted(reference))))
        total += 10 * sum(scores) / (len(references) * len(_ORDERS))
    return total / len(generated)


def _clipped_cosine(one: Mapping[tuple[str, ...], float], two: Mapping[tuple[str, ...], float]) -> float:
    """Cosine of a candidate and a reference, to which a word counts no more often than the reference has
    it.
    """
    norms = math.sqrt(
        sum(value * value for value in one.values()) * sum(value * value for value in two.values())
    )
    common = sum(min(value, two[gram]) * two[gram] for gram, value in one.items() if gram in two)
    return common / norms if norms else 0.0


def _bleu(wanted: Sequence[Sequence[Words]], generated: Sequence[Words]) -> list[float]:
    """BLEU-1 to 4 of the corpus (Papineni et al., ACL 2002); the reference length is the closest one."""
    right, guessed = [0] * len(_ORDERS), [0] * len(_ORDERS)
    length = closest = 0
    for references, words in zip(wanted, generated, strict=True):
        length += len(words)
        closest += min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
        most = [reduce(or_, parts) for parts in zip(*map(_ngrams, references), strict=True)]
        for place, counts in enumerate(_ngrams(words)):
            right[place] += (counts & most[place]).total()
            guessed[place] += counts.total()
    brevity = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / brevity) if brevity < 1 else 1.0
    scores, product = [], 1.0
    for order, correct, total in zip(_ORDERS, right, guessed, strict=True):
        product *= (correct + _TINY) / (total + _SMALL)
        scores.append(product ** (1 / order) * penalty)
    return scores


def _rouge(references: Sequence[Words], words: Words) -> float:
    """ROUGE-L of one image: best precision and best recall, each over the references (Lin, 2004)."""
    common = [_longest_common(words, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(
        length / len(reference) for length, reference in zip(common, references, strict=True) if reference
    )
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(one: Words, two: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(two) + 1)
    for word in one:
        corner = 0
        for place, other in enumerate(two, start=1):
            above = lengths[place]
            lengths[place] = corner + 1 if word == other else max(above, lengths[place - 1])
            corner = above
    return lengths[-1]
