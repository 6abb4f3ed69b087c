"""Pictures of single words with what they say.

| layout | label file | a line |
|---|---|---|
| ICDAR 2013, 2015 | `gt.txt` beside the images | `word_1.png, "Tiredness"` |
| mmocr and many others | `labels.txt`, `label.txt`, `train_label.txt`, ... | `NAME<TAB>TEXT` or `NAME TEXT` |
| MJSynth | `annotation_train.txt`, ... | `./2425/1/115_Lube_45484.jpg 45484`: the text is in the name |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from visft_ds.evals.benchmarks.images import chosen, from_files
from visft_ds.evals.benchmarks.protocol import ImageSet, check_apart

_FILES = ("gt.txt", "labels.txt", "label.txt", "labels.tsv")
_NAMED = ("{}_label.txt", "{}_labels.txt", "{}_gt.txt", "annotation_{}.txt")
_ICDAR = re.compile(r'(.+?),\s*"(.*)"$')
_OTHERS = re.compile(r"[^0-9a-z]")

#: What of a word counts: "alphanumeric" letters and digits in lower case, as most papers compare; or "all" of it.
CHARACTERS = ("alphanumeric", "all")


@dataclass(frozen=True)
class WordSet:
    """Word pictures, seen as squares whatever their shape."""

    images: ImageSet
    words: tuple[str, ...]  #: as they are compared; never empty

    def half(self, odd: bool) -> WordSet:
        """Every second word."""
        places = range(int(odd), len(self.words), 2)
        return WordSet(chosen(self.images, places), tuple(self.words[place] for place in places))


def read_train_and_test(source: str, train: str | None, test: str | None, characters: str) -> tuple[WordSet, WordSet]:
    """(train, test) of a folder. Where there is no `train`, every second word trains and the others test.

    Args:
        train, test: names of splits; by default `train`, and `test` or the folder itself.

    Raises:
        ValueError: no label file, a line without text, an image that is not there, or words without characters that
            count.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder")
    if characters not in CHARACTERS:
        raise ValueError(f"characters={characters} is not allowed; allowed: {', '.join(CHARACTERS)}")
    tests = _label_file(root, test or "test") or (None if test else _label_file(root, None))
    if tests is None:
        raise ValueError(
            f"{root} has no words: looked for {', '.join(_FILES)} in {root} and {root / (test or 'test')}, and for "
            f"{', '.join(name.format(test or 'test') for name in _NAMED)}"
        )
    learnt = _label_file(root, train or "train")
    if learnt is None:
        if train is not None:
            raise ValueError(f"{root} has no words of the split {train}")
        everything = _read(tests, characters)
        if len(everything.words) < 2:
            raise ValueError(
                f"{tests} has {len(everything.words)} word(s): a head needs some to train and some to test"
            )
        return everything.half(False), everything.half(True)
    check_apart(str(root), str(learnt), str(tests))
    return _read(learnt, characters), _read(tests, characters)


def _label_file(root: Path, split: str | None) -> Path | None:
    if split is None:
        places = [root / name for name in _FILES]
    else:
        places = [root / split / name for name in _FILES] + [root / name.format(split) for name in _NAMED]
    return next((path for path in places if path.is_file()), None)


def _read(path: Path, characters: str) -> WordSet:
    files, words = [], []
    in_name = path.name.startswith("annotation_")
    # ICDAR's files begin with a byte order mark.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        name, text = _split(line.strip())
        if in_name:
            text = Path(name).stem.partition("_")[2].partition("_")[0]
        if not text:
            raise ValueError(f"{path}, line {number}: no text after the name of the image: {line!r}")
        word = _OTHERS.sub("", text.lower()) if characters == "alphanumeric" else text
        if word:  # a lone punctuation mark has nothing that counts
            files.append(path.parent / name)
            words.append(word)
    if not words:
        raise ValueError(f"{path} has no word with {characters} characters")
    return WordSet(replace(from_files(files, path.parent), stretched=True), tuple(words))


def _split(line: str) -> tuple[str, str]:
    if match := _ICDAR.fullmatch(line):
        return match[1], match[2].replace('\\"', '"').replace("\\\\", "\\")
    name, _, text = line.partition("\t") if "\t" in line else line.partition(" ")
    return name.strip(), text.strip()
