"""Weights by name: the hub's cache, and a fake hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import COMMIT, FakeHub, Repository, fake_hub
from visft_ds.pretrained import PUBLISHED, fetch, local, weights_of_timm

WEIGHTS = bytes(range(256)) * 4096
NAME = "hf-hub:some/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)
    repository = Repository({"model.safetensors": WEIGHTS, "README.md": b"a model"})
    with fake_hub(monkeypatch, tmp_path / "cache", some__model=repository) as found:
        yield found


def test_what_is_fetched_is_found_again_without_a_network(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local(NAME) == Path(NAME)
    path = fetch(NAME)
    assert path.read_bytes() == WEIGHTS
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fetching"))
    assert line == f"fetching model.safetensors of {hub.url}/some/model: 1.0 MB, licence: mit"
    asked = len(hub.requests)
    assert (
        fetch(NAME) == local(NAME) == local(f"{NAME}/model.safetensors") == local(f"{NAME}@{COMMIT}") == path
    )
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hf-hub:some/other", "Repository Not Found"),
        ("hf-hub:some/model/x.pt", "has README.md, model.safetensors"),
        ("hf-hub:some/model/../x.pt", "write hf-hub:ORG/NAME"),
    ],
)
def test_names_that_there_are_not(hub: FakeHub, name: str, word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        fetch(name)
    assert str(caught.value).startswith(name)


def test_a_file_that_was_fetched_by_its_name_is_not_that_of_the_repository(hub: FakeHub) -> None:
    hub.repositories["some/model"].files = {"a.pt": b"1", "b.pt": b"2"}
    assert fetch(f"{NAME}/a.pt") == local(f"{NAME}/a.pt") and local(NAME) == Path(NAME)
    with pytest.raises(ValueError, match="name a file"):
        fetch(NAME)


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.portal = True  # that of a hotel answers for the hub
    with pytest.raises(ValueError, match="some/model: cannot be read"):
        fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        fetch(NAME)


def test_a_file_at_its_path_goes_before_the_cache(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PUBLISHED, "own.safetensors", NAME)
    own = tmp_path / "own.safetensors"
    assert local(own) == own
    cached = fetch(NAME)
    assert local(own) == cached
    own.write_bytes(b"x")
    assert local(own) == own


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vit_base_patch16_dinov3.lvd1689m", "timm/vit_base_patch16_dinov3.lvd1689m/model.safetensors"),
        ("vit_base_patch16_dinov3", "timm/vit_base_patch16_dinov3.lvd1689m/model.safetensors"),
        ("fastvit_mci0.apple_mclip", "apple/mobileclip_s0_timm/model.safetensors"),
    ],
)
def test_timm_says_where_its_weights_are(name: str, found: str) -> None:
    assert weights_of_timm(name) == f"hf-hub:{found}"


def test_weights_that_timm_has_not() -> None:
    with pytest.raises(ValueError, match="did you mean timm:vit_base_patch16_dinov3"):
        weights_of_timm("vit_base_patch16_dinov4.lvd1689m")
    with pytest.raises(ValueError, match="no weights of legacy_senet154"):
        weights_of_timm("legacy_senet154.in1k")
