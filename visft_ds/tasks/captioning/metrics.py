"""Caption metrics in plain Python: CIDEr, BLEU-1 to 4, ROUGE-L, as coco-caption defines them.

The numbers are those of https://github.com/tylin/coco-caption on the same words; `tokenizer.ptb_words` cuts
captions into words. CIDEr is CIDEr-D of its paper (arXiv 1411.5726), as papers report it: it depends on the
set of images, and is 0 for one image. BLEU and ROUGE-L go from 0 to 1, CIDEr from 0 to 10; papers print 100
times as much.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from visft_ds.tasks import Annotations, Numbers, Truth
from visft_ds.tasks.captioning.tokenizer import ptb_words

_ORDERS = (1, 2, 3, 4)
_SIGMA = (
    6.0  #: words; width of CIDEr's penalty for another length than the reference's (arXiv 1411.5726, eq. 4)
)
_BETA = 1.2  #: weight of recall in ROUGE-L, as in coco-caption
#: coco-caption's guards of BLEU against zeros; they show where no 4-gram of a small corpus is right.
_TINY = 1e-15
_SMALL = 1e-9

Words = Sequence[str]
Gram = tuple[str, ...]


def caption_metrics(truth: Truth, results: Annotations) -> Numbers:
    """Scores of one caption for each image against its references.

    Entries of `truth["annotations"]` and `results` have image_id and caption, as COCO's; images without a
    reference are left out. Keys: "caption/CIDEr", "caption/BLEU-1" ... "caption/BLEU-4", "caption/ROUGE-L".

    Raises ValueError if there is no image.
    """
    references: dict[int, list[Words]] = {}
    for entry in truth["annotations"]:
        references.setdefault(entry["image_id"], []).append(ptb_words(entry["caption"]))
    candidates = {result["image_id"]: result["caption"] for result in results}
    if not references:
        raise ValueError("no image has captions to compare with")
    images = sorted(references)
    true = [references[image] for image in images]
    generated = [ptb_words(candidates[image]) for image in images]
    scores = {"caption/CIDEr": sum(cider_of_images(true, generated)) / len(images)}
    for order, score in zip(_ORDERS, _bleu(true, generated), strict=True):
        scores[f"caption/BLEU-{order}"] = score
    scores["caption/ROUGE-L"] = sum(map(_rouge, true, generated)) / len(images)
    return scores


def _ngrams(words: Words, order: int) -> Counter[Gram]:
    """Counts of the n-grams of this order."""
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def cider_of_images(true: Sequence[Sequence[Words]], generated: Sequence[Words]) -> list[float]:
    """CIDEr-D of each image without stemming: the mean over references and orders, times 10.

    Args:
        true: of each image its references; in how many images an n-gram is there is counted over all of them.
        generated: of each image its caption.
    """
    of_orders = [_cider_of_order(true, generated, order) for order in _ORDERS]
    return [10 * sum(similarities) / len(_ORDERS) for similarities in zip(*of_orders, strict=True)]


def _cider_of_order(
    true: Sequence[Sequence[Words]], generated: Sequence[Words], order: int
) -> Iterator[float]:
    """Of each image the mean over its references of the clipped cosine of n-grams, weighted by tf-idf."""
    images: Counter[Gram] = Counter()  # with a reference that has the n-gram
    for references in true:
        images.update({gram for reference in references for gram in _ngrams(reference, order)})

    log_images = math.log(len(true))

    def weighted(words: Words) -> dict[Gram, float]:
        weights = {}
        for gram, count in _ngrams(words, order).items():
            # An n-gram that no reference has weighs like one that a single image has.
            rarity = log_images - math.log(images.get(gram, 1))
            weights[gram] = count * rarity
        return weights

    for references, words in zip(true, generated, strict=True):
        candidate = weighted(words)
        similarities = 0.0
        for reference in references:
            # coco-caption takes the number of bigrams for the length, one less than the number of words.
            bigrams = max(len(words) - 1, 0)
            excess = bigrams - max(len(reference) - 1, 0)
            penalty = math.exp(-(excess**2) / (2 * _SIGMA**2))
            similarities += penalty * _clipped_cosine(candidate, weighted(reference))
        yield similarities / len(references)


def _clipped_cosine(candidate: Mapping[Gram, float], reference: Mapping[Gram, float]) -> float:
    """Cosine of a candidate and a reference, to which a word counts no more often than the reference has
    it.
    """
    length = math.hypot(*candidate.values())
    reference_length = math.hypot(*reference.values())
    if not length or not reference_length:
        return 0.0
    common = 0.0
    for gram, value in candidate.items():
        weight = reference.get(gram, 0.0)
        common += min(value, weight) * weight
    return common / (length * reference_length)


def _bleu(true: Sequence[Sequence[Words]], generated: Sequence[Words]) -> list[float]:
    """BLEU-1 to 4 of the corpus (Papineni et al., ACL 2002); the reference length is the closest one."""
    length = sum(len(words) for words in generated)
    closest = sum(map(_closest_length, true, generated))
    brevity = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / brevity) if brevity < 1 else 1.0
    scores = []
    product = 1.0
    for order in _ORDERS:
        right = 0
        guessed = 0
        for references, words in zip(true, generated, strict=True):
            most: Counter[Gram] = Counter()
            for reference in references:
                most |= _ngrams(reference, order)
            counts = _ngrams(words, order)
            right += (counts & most).total()
            guessed += counts.total()
        product *= (right + _TINY) / (guessed + _SMALL)
        scores.append(product ** (1 / order) * penalty)
    return scores


def _closest_length(references: Sequence[Words], words: Words) -> int:
    """Number of words of the reference whose length is closest; of two the shorter one."""
    lengths = [len(reference) for reference in references]
    return min(lengths, key=lambda length: (abs(length - len(words)), length))


def _rouge(references: Sequence[Words], words: Words) -> float:
    """ROUGE-L of one image: best precision and best recall, each over the references (Lin, 2004)."""
    precision = 0.0
    recall = 0.0
    for reference in references:
        common = _longest_common(words, reference)
        if common:
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(reference))
    if not precision:
        return 0.0
    weight = _BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)  # for each beginning of the second
    for word in first:
        corner = 0
        for end, other in enumerate(second, start=1):
            above = lengths[end]
            if word == other:
                lengths[end] = corner + 1
            else:
                lengths[end] = max(above, lengths[end - 1])
            corner = above
    return lengths[-1]
