"""A folder of another library is data: nothing of it is run, whatever its configurations ask for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch

from tests.clip_case import write_folder
from visft_ds.evals.benchmarks.encoders import Encoder
from visft_ds.evals.benchmarks.models import load_encoder, parse_model
from visft_ds.interop.foreign_code import check_config
from visft_ds.interop.open_clip import CONFIG, FILE

#: Python that leaves a trace beside itself and goes on as a tokenizer and a configuration.
CODE = """\
from pathlib import Path
Path({trace!r}).write_text("ran")
from transformers import BertConfig, BertTokenizer
class Tokenizer(BertTokenizer): pass
class Config(BertConfig): model_type = "foreign"
"""
TOKENIZER = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["foreign.Tokenizer", None]}}
MODEL = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that open_clip loads from its folder."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "image_size": 28}
    return write_folder(folder, context=8, embedding=8, text_width=16, **sizes)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the code of a folder writes once it runs; whoever asks for leave to run it gets it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "trace"


@pytest.fixture
def folder(clip: Path, trace: Path, tmp_path: Path) -> Path:
    """The model with code and a vocabulary beside it, which nothing names yet."""
    folder = Path(shutil.copytree(clip, tmp_path / "folder"))
    add_code(folder, trace)
    return folder


def add_code(folder: Path, trace: Path) -> None:
    (folder / "foreign.py").write_text(CODE.format(trace=str(trace)))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def configure(folder: Path, part: str, **settings: Any) -> None:
    """Add settings to a part of open_clip's configuration."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content["model_cfg"][part] |= settings
    write(folder / CONFIG, content)


def load(name: str) -> Encoder:
    return load_encoder(parse_model(f"open_clip:{name}"), "fp32")


def trusted(folder: Path) -> Path:
    configure(folder, "text_cfg", hf_tokenizer_name="any", tokenizer_kwargs={"trust_remote_code": True})
    write(folder / "tokenizer_config.json", TOKENIZER)
    return folder / CONFIG


def asked_for(folder: Path) -> Path:
    configure(folder, "text_cfg", hf_tokenizer_name="any")
    write(folder / "tokenizer_config.json", TOKENIZER)
    return folder / "tokenizer_config.json"


def text_model(folder: Path) -> Path:
    inner = folder / "text"
    write(inner / "config.json", MODEL)
    shutil.copy(folder / "foreign.py", inner)
    configure(folder, "text_cfg", hf_model_name=str(inner))
    return inner / "config.json"


def kernels(folder: Path) -> Path:
    write(folder / "text" / "config.json", {"model_type": "bert", "attn_implementation": "someone/kernel"})
    configure(folder, "text_cfg", hf_model_name=str(folder / "text"))
    return folder / "text" / "config.json"


def trunk(folder: Path) -> Path:
    inner = folder / "trunk"
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write(inner / "config.json", content | {"custom_code": ["foreign.py"]})
    configure(folder, "vision_cfg", timm_model_name=f"local-dir:{inner}")
    return inner / "config.json"


def far_away(folder: Path) -> Path:
    """Code that the folder of a folder asks for."""
    write(folder / "text" / "config.json", {"model_type": "bert", "backbone": str(folder / "text" / "inner")})
    write(folder / "text" / "inner" / "config.json", MODEL)
    configure(folder, "text_cfg", hf_model_name=str(folder / "text"))
    return folder / "text" / "inner" / "config.json"


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (trusted, r"model_cfg\.text_cfg\.tokenizer_kwargs\.trust_remote_code = True"),
        (asked_for, "auto_map"),
        (text_model, "auto_map"),
        (kernels, "attn_implementation = 'someone/kernel'"),
        (trunk, "custom_code"),
        (far_away, "auto_map"),
    ],
)
def test_a_folder_that_asks_for_code_is_refused_by_name(
    folder: Path, trace: Path, make: Callable[[Path], Path], key: str
) -> None:
    guilty = make(folder)
    with pytest.raises(ValueError, match=f"{guilty.name}: .*{key}") as caught:
        load(f"local-dir:{folder}")
    assert str(guilty) in str(caught.value) and "foreign code" in str(caught.value)
    assert not trace.exists()


def test_a_repository_that_asks_for_code(folder: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(model_id: str, filename: str | None = None, cache_dir: str | None = None) -> str:
        return str(folder / (filename or FILE))

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", fetch)
    configure(folder, "text_cfg", hf_tokenizer_name=str(folder), tokenizer_kwargs={"trust_remote_code": True})
    write(folder / "tokenizer_config.json", TOKENIZER)
    with pytest.raises(ValueError, match=r"hf-hub:some/one: .*trust_remote_code"):
        load("hf-hub:some/one")
    assert not trace.exists()


def test_transformers_is_told_to_run_nothing_even_where_no_search_looks(folder: Path, trace: Path) -> None:
    configure(folder, "text_cfg", hf_tokenizer_name="any", tokenizer_kwargs={"subfolder": "inner"})
    write(folder / "inner" / "tokenizer_config.json", TOKENIZER)
    add_code(folder / "inner", trace)
    with pytest.raises(ValueError, match="custom code"):
        load(f"local-dir:{folder}")
    assert not trace.exists()


def test_tokenizers_that_are_data_stay_usable(folder: Path) -> None:
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "c": 2, "at</w>": 3, "cat</w>": 4, "a": 5, "t</w>": 6}
    write(folder / "vocab.json", words)
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\nc at</w>\n")
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "auto_map": {}, "trust_remote_code": False},
    )
    configure(folder, "text_cfg", hf_tokenizer_name="any", tokenizer_kwargs={"trust_remote_code": False})
    merged = load(f"local-dir:{folder}").text
    assert merged is not None and merged.tokenize(["cat"])[0, :3].tolist() == [0, 4, 1]
    tokenizer: Any = merged.tokenize
    tokenizer.tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    assert (folder / "tokenizer.json").is_file()
    whole = load(f"local-dir:{folder}").text
    assert whole is not None and torch.equal(whole.tokenize(["cat"]), merged.tokenize(["cat"]))


class Runs:
    """Runs code where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "ran")


def test_weights_for_timm_are_never_unpickled_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader: Any = timm.models.load_checkpoint
    # As in timm 1.0.20, which unpickles anything unless it is told not to.
    monkeypatch.setattr(loader, "__defaults__", (*loader.__defaults__[:-1], False))
    trace = tmp_path / "trace"
    torch.save({"state_dict": {}, "extra": Runs(trace)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights_only"):
        load_encoder(parse_model(f"timm:test_vit:{tmp_path / 'weights.pth'}"), "fp32")
    assert not trace.exists()


def test_no_built_in_configuration_of_open_clip_is_refused() -> None:
    for name in open_clip.list_models():
        check_config(open_clip.get_model_config(name), name)
