"""What the doctor finds on machines that are not well."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from visft_ds import doctor
from visft_ds.doctor import OK, PROBLEM, WARNING, Finding, main
from visft_ds.resilience import host_memory


def statuses(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.subject: finding.status for finding in findings}


def test_a_taken_port_is_named_with_the_way_around() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (finding,) = doctor.check_port(port)
        assert finding.status == WARNING and f"--master_port {port + 1}" in finding.remedy
    (finding,) = doctor.check_port(port)
    assert finding.status == OK


def test_locks_of_killed_builds_are_found_wherever_torch_puts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (finding,) = doctor.check_locks()
    assert finding.status == OK
    for name in ("py311_cpu/fused_adam", "cpu_adam"):  # the cache's own folder, and TORCH_EXTENSIONS_DIR
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    os.utime(tmp_path / "cpu_adam" / "lock", (time.time() - 7200, time.time() - 7200))
    old, new = sorted(doctor.check_locks(), key=lambda finding: finding.found)
    assert old.status == new.status == WARNING
    assert "120 minutes old" in old.found and f"rm '{tmp_path}/cpu_adam/lock'" in old.remedy


def test_a_model_that_does_not_fit_is_a_problem_only_if_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "host_memory_available", lambda: 4 * 2**30)  # between EVA-G and EVA-E
    assert statuses(doctor.check_memory()) == {"host memory": OK, "debug": OK, "eva_g": OK, "eva_e": WARNING}
    assert statuses(doctor.check_memory("eva_e"))["eva_e"] == PROBLEM
    assert statuses(doctor.check_memory("eva_g"))["eva_g"] == OK


def test_wrong_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "deepspeed": "0.18.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    needs = ["torch>=2.10", "deepspeed==0.19.8", "rich>=13.7", 'timm>=1.0; extra == "eval"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    findings = {finding.subject: finding for finding in doctor.check_packages()}
    assert findings["packages"].status == PROBLEM
    assert findings["packages"].found == "deepspeed==0.19.8 (here: 0.18.0); rich>=13.7 (here: not installed)"
    assert findings["torch"].found == "2.13.0+cpu" and findings["deepspeed"].found == "0.18.0"


def test_a_driver_without_a_matching_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    found = {finding.subject: finding for finding in doctor.check_device()}
    assert found["GPU"].status == PROBLEM and "torch with CUDA" in found["GPU"].remedy
    assert found["precision"].found == "fp32 (auto: a CPU)" and found["attention"].found.startswith("sdpa")


def test_adapters_without_effect_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor.check_lora()
    assert finding.status == OK
    monkeypatch.setattr("visft_ds.models.lora.has_effect", lambda *_: 0.0)
    (finding,) = doctor.check_lora()
    assert finding.status == PROBLEM


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    (finding,) = doctor._guarded(doctor.check_write_speed(gone))
    assert finding.status == PROBLEM and "FileNotFoundError" in finding.found
    (finding,) = doctor._guarded(doctor.check_write_speed(tmp_path))
    assert finding.status in (OK, WARNING) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "eva_x"], "known models are debug, eva_g, eva_e"),
        (["--folder", "/no/such/folder"], "is no folder"),
        (["--port", "70000"], "1 to 65535"),
    ],
)
def test_wrong_usage_is_one_message(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and named in printed.err and printed.out == ""


def test_the_exit_code_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding(OK, "a", "well"), Finding(WARNING, "b", "so so", "Do this")]
    monkeypatch.setattr("visft_ds.doctor.examine", lambda *_: iter(findings))
    assert main([]) == 0
    findings.append(Finding(PROBLEM, "c", "ill"))
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "== this machine is ready: 0 problems, 1 warnings, 1 ok"
    assert [line.split()[0] for line in lines[-3:]] == [PROBLEM, WARNING, OK]  # the worst first
    assert "so so. Do this" in lines[-2]
