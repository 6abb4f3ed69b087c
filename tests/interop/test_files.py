"""Weight files: read alike from every container, refused with the reason when damaged, written whole or not
at all.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parallel.test_start import peak
from visft_ds.data.fetch import sha256_of
from visft_ds.interop.weights import Lazy, Weights, finite, open_weights, save_tensors, write_safetensors


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "half.odd": torch.randn(3, 5, generator=generator).half(),
        "single": torch.randn(7, 2, generator=generator),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6, generator=generator).t(),
        "expanded": torch.tensor(7).expand(1),
    }


def _same(file: Weights, expected: dict[str, Tensor]) -> None:
    assert sorted(file) == sorted(expected)
    for name, value in expected.items():
        assert file[name].shape == tuple(value.shape) and file[name].dtype == value.dtype
        assert torch.equal(file[name].read(), value)


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("nesting", [(), ("model",), ("module",), ("state_dict", "model")])
def test_same_tensors_from_every_container(tmp_path: Path, container: str, nesting: tuple[str, ...]) -> None:
    tensors = _tensors() if nesting else {**_tensors(), "module.some": torch.ones(2)}
    content: object = {f"module.{name}": value for name, value in tensors.items()} if nesting else tensors
    if container == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file({name: value.contiguous() for name, value in content.items()}, path)  # type: ignore[attr-defined]
    else:
        path = tmp_path / "w.pt"
        for name in reversed(nesting):
            content = {name: content, "step": 3}
        # Published ViSFT adapters have the sizes of files from before torch's zip format, which cannot be
        # mapped.
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    _same(open_weights(path), tensors)


def test_the_library_reads_what_the_streaming_writer_writes(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "w.safetensors"
    save_tensors(path, tensors, {"note": "ü"})
    read = load_file(path)
    assert sorted(read) == sorted(tensors)
    assert all(
        torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items()
    )
    assert open_weights(path).metadata["note"] == "ü" and open_weights(path).metadata["format"] == "pt"
    _same(open_weights(path), tensors)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "plain pickle":
        Path("w.pt").write_bytes(pickle.dumps({"a": _Code()}))
    else:
        torch.save({"a": _Code()}, "w.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"or holds more than tensors|protocol 4"):
        open_weights("w.pt")
    assert not Path("code-was-run").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
def test_a_part_of_a_file_is_refused(tmp_path: Path, container: str, share: float) -> None:
    path = tmp_path / ("w.safetensors" if container == "safetensors" else "w.pt")
    tensors = {"a": torch.randn(100, 100), "b": torch.randn(30)}
    if container == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=container == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"w\.(pt|safetensors): cannot be read"):
        open_weights(path)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": torch.ones(1), "epoch": 3}])
def test_contents_that_are_no_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        open_weights(tmp_path / "w.pt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {})
    before = sha256_of(path)

    def produce(name: str) -> Tensor:
        if name == "b":
            raise OSError(28, "No space left on device")
        return torch.zeros(3)

    tensors = {name: Lazy((3,), torch.float32, partial(produce, name)) for name in "ab"}
    with pytest.raises(OSError, match="No space"):
        write_safetensors(path, tensors, {})
    assert sha256_of(path) == before and os.listdir(tmp_path) == ["w.safetensors"]


def test_a_tensor_that_is_read_is_alone_in_memory(tmp_path: Path) -> None:
    """Of 64 MiB in 16 bit. On a CPU torch makes an fp32 copy of all that it sums in fp32: twice as much
    again.
    """
    count = 2**25
    save_file({"one": torch.full((count,), 0.5, dtype=torch.float16)}, tmp_path / "one.safetensors")
    file, sizes = open_weights(tmp_path / "one.safetensors"), dict[str, int]()
    with peak(sizes, "read"):
        value = file.tensor("one", torch.bfloat16)
    assert value.nbytes == 2 * count <= sizes["read peak"] + 2**20
    assert sizes["read peak"] < 2 * count + 2**24


@pytest.mark.parametrize(("place", "bad"), [(0, float("nan")), (5_000_000, float("-inf"))])
def test_a_value_that_is_not_finite_is_found_anywhere(place: int, bad: float) -> None:
    values = torch.ones(2500, 2600, dtype=torch.bfloat16)
    for part in (values, values[0, 0], values[:0]):
        assert finite(part, "it") is part
    values.view(-1)[place] = bad
    for part in (values, values.t()):
        with pytest.raises(ValueError, match="NaN"):
            finite(part, "it")


def _zip_bomb(path: Path, *, inflated: int) -> None:
    """A file of torch's whose pickle is compressed, and unpacks to a thousand times as much."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(inflated))
        archive.writestr("archive/version", "3\n")


def _contains_itself(path: Path) -> None:
    content: dict[str, object] = {"a": torch.zeros(2)}
    content["state_dict"] = {"model": content}
    torch.save(content, path)


@pytest.mark.parametrize("content", [b"hello", b"<html>", b""])
def test_a_file_that_torch_did_not_write_is_called_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no file of torch"):
        open_weights(path)


def test_pickles_without_end_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    _zip_bomb(path, inflated=2**26)
    assert path.stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"w\.pt: .* is compressed, 67,108,864 bytes unpacked"):
        open_weights(path)
    with zipfile.ZipFile(path, "w") as archive:  # lists in lists, of one byte each
        archive.writestr("archive/data.pkl", b"]" * (2**26 + 1))
    with pytest.raises(ValueError, match="beside the tensors"):
        open_weights(path)
    _contains_itself(path)
    with pytest.raises(ValueError, match="holds more than tensors: model"):
        open_weights(path)
