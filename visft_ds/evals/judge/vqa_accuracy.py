"""Accuracy of an answer against those of ten people, as VQA's evaluation defines it
(https://visualqa.org/evaluation.html; https://github.com/GT-Vision-Lab/VQA is the script of record).

Of the ten, nine are asked at a time: an answer that three or more of them gave is right, that of two by two
thirds, of one by a third; the accuracy is the mean over the ten ways to leave one out. Answers are brought to
one form only where the ten differ as they are written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_AGREEING = 3  # people who make an answer right
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_COUNTED)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # an apostrophe and a colon are none
_MOST_PERIODS = 32  # of the script, which hands a flag over as a count
#: Words that are put right where one of their apostrophes is missing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""


def _written_shorter() -> dict[str, str]:
    """Contraction without one of its apostrophes -> contraction."""
    contractions = {"somebody'd": "somebodyd"}  # as in the script
    for word in _CONTRACTIONS.split():
        for index, sign in enumerate(word):
            if sign == "'":
                contractions[word[:index] + word[index + 1 :]] = word
    return contractions


_CONTRACTED = _written_shorter()


def stripped(answer: str) -> str:
    """The answer in one line, without spaces around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalised(answer: str) -> str:
    """The answer in lower case, without punctuation and articles, numbers to ten as digits."""
    text = answer
    has_thousands = re.search(r"\d,\d", answer) is not None
    for mark in _MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or has_thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=_MOST_PERIODS)
    words = []
    for word in text.lower().split():
        word = _DIGITS.get(word, word)
        if word not in _ARTICLES:
            words.append(_CONTRACTED.get(word, word))
    return " ".join(words)


def accuracy(answer: str, truths: Sequence[str]) -> float:
    """Accuracy in [0, 1] of an answer; against a single true answer, as in GQA, 1 where they are equal."""
    own = stripped(answer)
    known = [stripped(truth) for truth in truths]
    if len(known) == 1:
        return float(normalised(own) == normalised(known[0]))
    if len(set(known)) > 1:
        own = normalised(own)
        known = [normalised(truth) for truth in known]
    agreeing = known.count(own)
    total = 0.0
    for truth in known:
        others = agreeing - 1 if truth == own else agreeing
        total += min(1.0, others / _AGREEING)
    return total / len(known)
