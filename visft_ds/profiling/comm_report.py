"""Tables of `visft profile comm`, and its CSV file for other programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visft_ds.monitor.console import Section
from visft_ds.planner.messages import COLLECTIVES
from visft_ds.profiling.collectives import COPY


def write_csv(record: Mapping[str, Any], file: Path) -> None:
    """Write a CSV file with a row for every measured call, each with hardware, ranks, time, versions and commit."""
    told = {
        "device": record["hardware"]["device"],
        "backend": record["backend"],
        "ranks": record["ranks"],
        "measured": record["measured"],
        "versions": json.dumps(record["versions"]),
        "git": json.dumps(record["git"]),
    }
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = [
            {
                **{key: call[key] for key in ("call", "bytes", "algbw", "busbw")},
                **{f"seconds_{key}": value for key, value in call["seconds"].items()},
                **told,
            }
            for call in record["calls"]
        ]
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


_CALLS = ("call", "bytes", "µs (quartiles)", "algbw GB/s", "busbw GB/s", "of a copy")
_MESSAGES = ("message", "call", "bytes", "calls", "µs a call", "busbw GB/s", "ms of a step", "")
_SHARES = ("step", "computed s", "sent s", "of it not hidden", "share of the step", "if nothing were hidden")


def make_title(record: Mapping[str, Any]) -> str:
    """Title of the tables: stage, model, engine, backend and number of processes."""
    return (
        f"communication: stage {record['stage']}, {record['model']}, {record['engine']}; {record['backend']}, "
        f"{record['ranks']} processes"
    )


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables."""
    hardware = record["hardware"]
    load = ", ".join(f"{value:.2f}" for value in record["load"])
    sections = [
        Section(
            "measured on",
            [
                ("device", f"{hardware['device']}, {hardware['cores']} cores"),
                ("load", f"{load} processes in the last 1, 5, 15 minutes before"),
                ("rounds", f"{record['options']['repeats']} after 1 to warm up; all calls in turn; the slowest rank"),
            ],
        )
    ]
    copies = {call["bytes"]: call["algbw"] for call in record["calls"] if call["call"] == COPY}
    for name in (*COLLECTIVES, COPY):
        calls = sorted((call for call in record["calls"] if call["call"] == name), key=lambda call: call["bytes"])
        sections.append(Section(name, [_call_row(call, copies) for call in calls], _CALLS))
    for name, messages in record["messages"].items():
        sections.append(Section(f"{name}: sent in a step", [_message_row(message) for message in messages], _MESSAGES))
    if record["at_start"]:
        once = record["at_start"]
        count, size = sum(one["calls"] for one in once), sum(one["calls"] * one["bytes"] for one in once)
        text = f"{count} broadcasts, {size:,} bytes, {sum(one['of_step'] for one in once):.3f} s"
        sections.append(Section("sent once, when the engine is built", [("every parameter", text)]))
    if record["update"]:
        sections.append(_update_section(record))
    rows = [_share_row(name, share) for name, share in record["share"].items()]
    title = f"predicted share of communication ({record['rates']})"
    return [*sections, Section(title, rows, _SHARES) if rows else Section(title, [("unknown", record["rates"])])]


def _call_row(call: Mapping[str, Any], copies: Mapping[int, float]) -> tuple[str, ...]:
    seconds = call["seconds"]
    of_copy = f"{100 * call['algbw'] / copies[call['bytes']]:.0f} %" if call["bytes"] in copies else ""
    return (
        call["call"],
        f"{call['bytes']:,}",
        f"{1e6 * seconds['median']:.0f}  ({1e6 * seconds['low']:.0f} .. {1e6 * seconds['high']:.0f})",
        f"{call['algbw'] / 1e9:.3f}",
        f"{call['busbw'] / 1e9:.3f}",
        of_copy if call["call"] != COPY else "",
    )


def _message_row(message: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        message["what"],
        message["collective"],
        f"{message['bytes']:,}",
        str(message["calls"]),
        f"{1e6 * message['seconds']:.0f}",
        f"{message['busbw'] / 1e9:.3f}",
        f"{1e3 * message['of_step']:.3f}",
        "" if message["measured"] else "from other sizes",
    )


def _update_section(record: Mapping[str, Any]) -> Section:
    """The engine's own calls for all that trains, beside plain ones of the same bytes."""
    found = record["update"]
    calls = ", ".join(f"{count} {name}" for name, count in sorted(found["calls"].items()))
    rows = [
        ("bytes that train", f"{found['bytes']:,}"),
        ("the engine", f"{_milliseconds(found['seconds'])} inside {calls}"),
        ("plain", f"{_milliseconds(found['plain_seconds'])} inside {' and '.join(found['plain_calls'])}"),
        ("engine / plain", "{median:.2f}  ({low:.2f} .. {high:.2f}), round by round".format(**found["ratio"])),
    ]
    return Section("averaging and update of what trains, nothing computed", rows)


def _milliseconds(spread: Mapping[str, float]) -> str:
    return f"{1e3 * spread['median']:.2f} ms ({1e3 * spread['low']:.2f} .. {1e3 * spread['high']:.2f})"


def _share_row(name: str, share: Mapping[str, float]) -> tuple[str, ...]:
    return (
        name,
        f"{share['computed_seconds']:.3f}",
        f"{share['sent_seconds']:.4f}",
        f"{share['not_hidden_seconds']:.4f}",
        f"{100 * share['share']:.2f} %",
        f"{100 * share['share_nothing_hidden']:.2f} %",
    )
