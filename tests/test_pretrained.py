"""Weights by name: the hub's cache, a fake hub on loopback, and every refusal as one message."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import COMMIT, FakeHub, Repository, fake_hub
from visft_ds.pretrained import PUBLISHED, HubFile, fetch, local, weights_among, weights_of_timm

WEIGHTS = bytes(range(256)) * 4096
NAME = "hf-hub:some/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)
    card = {"license": "other", "license_name": "ours"}
    repository = Repository({"model.safetensors": WEIGHTS, "README.md": b"a model"}, card)
    with fake_hub(monkeypatch, tmp_path / "cache", some__model=repository) as found:
        yield found


def test_what_is_fetched_is_found_again_without_a_network(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert local(NAME) == Path(NAME)
    path = fetch(NAME)
    assert path.read_bytes() == WEIGHTS
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fetching"))
    assert line == f"fetching model.safetensors of {hub.url}/some/model: 1.0 MB, licence: ours"
    asked = len(hub.requests)
    assert fetch(NAME) == local(NAME) == local(f"{NAME}/model.safetensors") == local(f"{NAME}@{COMMIT}") == path
    assert len(hub.requests) == asked


def test_a_cut_connection_goes_on_where_it_was(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.cut_after = 350_000
    assert fetch(NAME).read_bytes() == WEIGHTS
    assert any(request.endswith("bytes=300000-") for request in hub.requests)


def test_a_file_of_another_content_is_refused_and_removed(hub: FakeHub) -> None:
    hub.spoiled = True
    with pytest.raises(ValueError, match=r"is damaged and was removed: sha256 .*Fetch it again"):
        fetch(NAME)
    hub.spoiled = False
    assert local(NAME) == Path(NAME)
    assert fetch(NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:some/other", r"^hf-hub:some/other: there is no http://\S+/some/other, or it is private"),
        ("hf-hub:some/model@v2", "has no revision v2"),
        ("hf-hub:some/model/x.pt", "some/model has README.md, model.safetensors, and not x.pt$"),
        ("hf-hub:some", "write hf-hub:ORG/NAME, hf-hub:ORG/NAME@REVISION or"),
        ("hf-hub:some/model/../x.pt", "write hf-hub:ORG/NAME"),
    ],
)
def test_names_that_there_are_not(hub: FakeHub, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(name)


def test_a_licence_that_has_to_be_accepted(hub: FakeHub) -> None:
    hub.repositories["some/model"].gated = True
    with pytest.raises(
        ValueError,
        match=r"^hf-hub:some/model: its licence has to be accepted first, at http://\S+/some/model;",
    ):
        fetch(NAME)
    assert local(NAME) == Path(NAME)


def test_no_weight_file_to_take(hub: FakeHub) -> None:
    hub.repositories["some/model"].files = {"a.pt": b"1", "b.pt": b"2", "flax_model.msgpack": b"3"}
    with pytest.raises(
        ValueError, match=r"model has a\.pt, b\.pt, .*and not weights of a usual name; name a file of it"
    ):
        fetch(NAME)


def test_a_file_that_was_fetched_by_its_name_is_not_that_of_the_repository(hub: FakeHub) -> None:
    hub.repositories["some/model"].files = {"a.pt": b"1", "b.pt": b"2"}
    assert fetch(f"{NAME}/a.pt") == local(f"{NAME}/a.pt") and local(NAME) == Path(NAME)
    with pytest.raises(ValueError, match="name a file of it"):
        fetch(NAME)


def test_a_network_that_answers_for_the_hub(hub: FakeHub) -> None:
    hub.portal = True
    with pytest.raises(ValueError, match="does not answer as the hub does"):
        fetch(NAME)


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(ValueError, match=r"^hf-hub:some/model: http://\S+ cannot be reached \(.*give its path$"):
        fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids to fetch it"):
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


def test_weights_among() -> None:
    assert weights_among(["open_clip_model.safetensors", "model.safetensors", "x.pt"]) == "model.safetensors"
    assert weights_among(["x.pt", "config.json"]) == "x.pt"
    assert weights_among(["x.pt", "y.pt"]) is None and weights_among([]) is None


def test_published_weights_have_names() -> None:
    assert all(HubFile.parse(name).file for name in PUBLISHED.values())


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_dinov4.lvd1689m", "has no model .* did you mean timm:vit_base_patch16_dinov3"),
        (
            "vit_base_patch16_clip_224.opena",
            "did you mean timm:vit_base_patch16_clip_224.openai[?] there are: ",
        ),
        ("legacy_senet154.in1k", "no weights of legacy_senet154.in1k on the hub"),
    ],
)
def test_weights_that_timm_has_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of_timm(name)
