"""The vocabulary that travels with a captioning head."""

from __future__ import annotations

from collections.abc import Mapping

from visft_ds.interop.head_file import HeadInfo
from visft_ds.tasks import TASKS
from visft_ds.tasks.vocabulary import Vocabulary


def vocabulary_in(infos: Mapping[str, HeadInfo]) -> Vocabulary | None:
    """The vocabulary that one of the heads brings along; None where none does (published heads have none).

    Raises ValueError for a damaged one.
    """
    for info in infos.values():
        if "vocabulary" in info.extra:
            return Vocabulary.from_dict(info.extra["vocabulary"])
    return None


def check_vocabulary(infos: Mapping[str, HeadInfo], vocabulary: Vocabulary | None, where: str) -> None:
    """Refuse heads that work with other words than `vocabulary`, that of `where`.

    Raises ValueError with what differs: the words, or (a head without a vocabulary of its own) their number.
    """
    for task, info in infos.items():
        if not TASKS[task].uses_vocabulary:
            continue
        assert vocabulary is not None, f"{task} works with a vocabulary"
        its_vocabulary = vocabulary_in({task: info})
        if its_vocabulary is not None:
            its_vocabulary.check_same(vocabulary, this=f"the {task} head", that=where)
        else:
            vocabulary.check_size(info.options["vocabulary_size"])
