"""What the doctor finds on machines that are not well."""

from __future__ import annotations

import importlib.metadata
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visft_ds import doctor, flags
from visft_ds.config.resolve import available
from visft_ds.doctor import OK, PROBLEM, WARNING, Finding, main


def test_a_model_that_does_not_fit_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.status for finding in doctor.check_memory(None)] == [OK]
    for needed, status in ((2**20, OK), (2**60, PROBLEM)):
        monkeypatch.setattr(
            "visft_ds.planner.memory.plan_largest", lambda *_, total=needed: Namespace(total=total)
        )
        assert [finding.status for finding in doctor.check_memory("debug")] == [OK, status, status]


@pytest.mark.slow
@pytest.mark.parametrize("model", available("models"))
def test_every_shipped_model_can_be_asked_for(model: str) -> None:
    assert len(list(doctor.check_memory(model))) == 3


def test_wrong_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "deepspeed": "0.18.0", "visft_ds": "0.2.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    needs = ["torch>=2.10", "deepspeed==0.19.8", "psutil>=6", 'timm>=1.0; extra == "eval"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    found = {finding.subject: finding for finding in doctor.check_packages()}
    assert found["packages"].status == PROBLEM
    assert "deepspeed==0.19.8 (here: 0.18.0); psutil>=6 (here: not installed)" in found["packages"].message


def test_a_driver_without_a_matching_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None
    )
    found = {finding.subject: finding.status for finding in doctor.check_device()}
    assert found == {"GPU": PROBLEM, "precision": OK, "attention": OK}


def test_the_exit_code_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", "/no/such/folder"]) == 2
    findings = [Finding(OK, "a", "well"), Finding(WARNING, "b", "so so. Do this")]
    monkeypatch.setattr("visft_ds.doctor.examine", lambda *_: iter(findings))
    assert main([]) == 0
    findings.append(Finding(PROBLEM, "c", "ill"))
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == [PROBLEM, WARNING, OK]  # the worst first


def test_the_command_that_installs_names_where_the_package_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on no index; a name that is free there could be anybody's."""
    monkeypatch.chdir(Path(__file__).parents[1])
    assert flags.install_command("eval") == "pip install -e '.[eval]'"
    monkeypatch.chdir("/")
    assert flags.install_command() == f"pip install -e {Path(__file__).parents[1]}"
    origin = SimpleNamespace(read_text=lambda _: '{"url": "file:///a%20b/visft_ds-0.2.0-py3-none-any.whl"}')
    monkeypatch.setattr(flags, "CHECKOUT", None)
    monkeypatch.setattr(flags, "distribution", lambda _: origin)
    assert flags.install_command("onnx") == "pip install '/a b/visft_ds-0.2.0-py3-none-any.whl[onnx]'"
    origin.read_text = lambda _: None
    assert flags.install_command("onnx") == "pip install '.[onnx]'"
