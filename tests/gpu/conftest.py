"""`make gpu`: a table of what was compared, beside pytest's own words."""

from __future__ import annotations

import pytest

_ROWS: list[tuple[str, str, dict[str, object]]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.user_properties:
        _ROWS.append((report.nodeid.rpartition("::")[2], report.outcome, dict(report.user_properties)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ROWS:
        terminalreporter.section("is it right?")
        terminalreporter.write_line(f"{'case':52}{'':8}{'error':>10}{'bound':>10}{'seconds':>10}  worst")
    for name, outcome, row in _ROWS:
        numbers = f"{row['error']:>10.2g}{row['bound']:>10.2g}{row['seconds']:>10.3f}"
        terminalreporter.write_line(f"{name.removeprefix('test_'):52}{outcome:8}{numbers}  {row['worst']}")
