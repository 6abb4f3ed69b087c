"""Tokenizer of captions for caption metrics.

COCO's caption scores are defined on the output of Stanford's Penn Treebank tokenizer (release 3.4.1, a Java
program, as called by https://github.com/tylin/coco-caption) with most punctuation taken out. `ptb_words`
follows the same rules, as far as they can matter for a caption, without Java: contractions are split
("isn't": is n't), abbreviations and numbers stay whole, hyphens and slashes join words, brackets become words
such as "-lrb-".

Both agree on all 255 captions of 51 COCO images and on more than 99 % of English prose. Known differences:
words joined by a dot together with a hyphen or digits, more than two slashes, emoticons beyond the usual
ones, letters with a superscript, mixed fractions, apostrophes within unusual words, graves as apostrophes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Name of these rules; it belongs beside every number that was computed with them.
TOKENIZER = "visft-ptb-1"

#: Tokens that are taken out, by the list of coco-caption; quotation marks are never produced in the first
#: place.
_DROPPED = frozenset([".", "?", "!", ",", ":", "-", "--", "...", ";"])
_RENAMED: Mapping[str, str] = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    # The Treebank has no signs for other currencies than the dollar; the Java program puts these in their
    # place.
    "£": "#",
    "€": "$",
    "¢": "cents",
}
_PREPARED: Mapping[str, str] = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "…": "...",
    "–": "--",
    "—": "--",
    "―": "--",
    "½": " 1/2 ",
    "¼": " 1/4 ",
    "¾": " 3/4 ",
    "⅓": " 1/3 ",
    "⅔": " 2/3 ",
}
_PREPARE = re.compile("|".join(map(re.escape, _PREPARED)))

_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|ave|mt|jr|sr|inc|co|corp|ltd|jan|feb|mar|apr|jun|jul|aug|sept|oct|nov|dec|mon|tue|tues|wed|thu|"
    "thurs|fri|blvd|rd|sgt|capt|lt|col|gov|sen|rep|rev|gen|prof|calif|fla|ariz|conn|penn|vs|etc|ft|ph\\.d"
)
#: What follows a single letter whose full stop ends a sentence. At the end of a caption the Java program lets
#: the first word of whichever caption comes next decide; it is taken to begin a sentence here.
_SENTENCE_END = r"\W*$ | \s+(?-i:A|The|This|Then|There|In|If|It)\b"
#: One token, by the first alternative that fits. `[^\W_]` is a letter or digit of any script.
_TOKEN = re.compile(
    rf"""
      </?[a-z][^<>]*>                                            # a tag, such as <unk>
    | (?:https?://|www\.)[^\s"()<>]*[^\s"()<>.,;:!?']            # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | \#[a-z]\w* | @[a-z]\w*                                     # hashtags, names
    | (?<!\S)[:;=][-']?[()dp](?![^\W_])                          # emoticons
    | 'n'(?!\s*$)                                                # rock 'n' roll
    | (?:(?<=[^\W_])|(?<=\s))'(?:s|m|d|re|ve|ll|n)(?![^\W_])     # clitics, behind their word
    | (?<=[^\W_])n't(?![^\W_])
    | '\d\ds?(?=[\s.,;:!?]|$) | (?<![^\W_])'(?:em|til|cause)\b   # the '90s, 'em
    | (?<![^\W_])'t(?=is\b|was\b)
    | (?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|lem(?=me\b)|gim(?=me\b)|y'(?=all\b))
    | (?:{_ABBREVIATIONS})\.(?![^\W_])
    | (?:nos?|art|fig|pp)\.(?=\s*\d)
    | (?:[^\W\d_]\.){{2,}}(?![^\W_]|\.)                           # initials: u.s., a.m.
    | [^\W\d_]\.(?![^\W_]|\.)(?!{_SENTENCE_END})                 # J. Smith; not "in bowl b."
    | (?-i:[A-Z]+&[A-Z]+)(?![^\W_])                              # AT&T
    | [^\W\d_]+(?:\.[^\W\d_]+)+                                  # a.k.a, foo.com, "stop.The"
    | (?:o|d|l|c|j|qu|ma)'[a-z]{{2,}}\b | (?:ol|somethin)'       # o'clock, ma'am
    | [^\W_]+?(?=n't(?![^\W_]))                                  # is(n't)
    | [^\W_]+(?:(?:[-/]|_+)[^\W_]+)+                             # t-shirt, and/or, 24/7
    | [-+]?(?:\d+(?:[.,:]\d+)+|\.\d+)                            # 1,000  3.5  4:30  -.5
    | [-+]\d+(?![^\W_])
    | [^\W_]+                                                    # a word or number
    | \.+ | -{{2,}} | [!?]+ | _+ | \*+ | \#+ | @+                # signs that stay together
    | [^\s"'`]                                                   # any other sign
    """,
    re.VERBOSE | re.IGNORECASE,
)


def ptb_words(caption: str) -> list[str]:
    """The words of a caption, lower case, without punctuation; none for an empty caption."""
    text = _PREPARE.sub(lambda match: _PREPARED[match[0]], caption)
    words = []
    for token in _TOKEN.findall(text):
        token = "..." if token[0] == "." and not token.strip(".") else token
        token = "--" if token in ("---", "----") else token
        if token in _DROPPED or _is_emoji(token):
            continue
        words.append("".join(_RENAMED.get(sign, sign) for sign in token.lower()))
    return words


def _is_emoji(token: str) -> bool:
    """Signs beyond the basic plane, which the Java program cannot read and leaves out."""
    return len(token) == 1 and ord(token) > 0xFFFF and not token.isalpha()
