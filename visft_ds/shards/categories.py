"""Mapping from the categories of the source to those of the shards."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from visft_ds.data.shards import Category
from visft_ds.tasks.classes import COCO_NAMES

_MAPPED_FIELDS = {"id", "name"}


@dataclass(frozen=True)
class CategoryMap:
    """The category table of a split, and the mapping of the source's ids: an id that is not in `ids` is unknown."""

    categories: tuple[Category, ...]
    ids: Mapping[int, int | None]  #: id in the source -> id in the shards; None: annotations of it are dropped


def map_categories(entries: Sequence[Mapping[str, Any]], rule: str, file: bytes | None, where: str) -> CategoryMap:
    """The categories of a COCO file after the rule that was asked for.

    Args:
        entries: `categories` of the COCO file.
        rule: "keep" (as they are), "coco80" (COCO's 80 by their raw ids; others are dropped), or the name of `file`.
        file: with other rules: a JSON object from a category's name or id to {"id", "name"}, or to null, which drops
            it; "*" stands for all that are not named.
        where: the COCO file, for messages.

    Raises:
        ValueError: malformed categories; two with one id; not COCO's 80; a file of another form, or one that leaves
            categories of the source open or names some that do not exist.
    """
    names = _names(entries, where)
    if rule == "keep":
        return CategoryMap(_table(names), {number: number for number in names})
    if rule == "coco80":
        wrong = [f"{n} is {names.get(n)!r}, not {name!r}" for n, name in COCO_NAMES.items() if names.get(n) != name]
        if wrong:
            raise ValueError(
                f"--categories coco80: {where} does not have COCO's 80 categories: id {'; '.join(wrong[:3])}"
                f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Use keep, or a file that maps them."
            )
        return CategoryMap(_table(COCO_NAMES), {number: number if number in COCO_NAMES else None for number in names})
    assert file is not None, "a rule that is no word is a file"
    return _mapped(names, _read_rules(file, rule), rule, where)


def _names(entries: Sequence[Mapping[str, Any]], where: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        number: Any = entry.get("id")
        if not _is_id(number) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{where}: category {entry!r} needs an integer 'id' and a string 'name'")
        if number in names:
            raise ValueError(f"{where}: two categories have id {number}; category ids must be unique")
        names[number] = entry["name"]
    return names


def _table(names: Mapping[int, str]) -> tuple[Category, ...]:
    return tuple(Category(place, number, names[number]) for place, number in enumerate(sorted(names)))


def _read_rules(file: bytes, rule: str) -> dict[str, dict[str, Any] | None]:
    try:
        rules = orjson.loads(file.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise ValueError(f"--categories {rule} is not valid JSON: {error}") from error
    if not isinstance(rules, dict):
        raise ValueError(f"--categories {rule} must be a JSON object, not {type(rules).__name__}")
    for source, target in rules.items():
        if target is None:
            continue
        fits = isinstance(target, dict) and target.keys() == _MAPPED_FIELDS
        if not fits or not _is_id(target["id"]) or not isinstance(target["name"], str):
            raise ValueError(
                f'--categories {rule}: {source!r} goes to {target!r}; give {{"id": NUMBER, "name": "..."}}, or null '
                "to drop it"
            )
    return rules


def _mapped(names: Mapping[int, str], rules: Mapping[str, dict[str, Any] | None], rule: str, where: str) -> CategoryMap:
    known = {*names.values(), *map(str, names), "*"}
    strangers = [repr(source) for source in rules if source not in known]
    if strangers:
        raise ValueError(f"--categories {rule} names {', '.join(strangers[:5])}, which {where} does not have")
    targets: dict[int, str] = {}
    ids: dict[int, int | None] = {}
    for number, name in names.items():
        given = [key for key in (str(number), name) if key in rules]
        if not given and "*" not in rules:
            raise ValueError(
                f"--categories {rule} says nothing about category {number} ({name!r}) of {where}; name every one, "
                'or add "*": null to drop the rest'
            )
        target = rules[given[0] if given else "*"]
        ids[number] = None if target is None else target["id"]
        if target is not None and targets.setdefault(target["id"], target["name"]) != target["name"]:
            raise ValueError(
                f"--categories {rule} gives id {target['id']} two names: {targets[target['id']]!r} and "
                f"{target['name']!r}"
            )
    return CategoryMap(_table(targets), ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
