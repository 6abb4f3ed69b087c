"""A merge needs the memory of a few tensors, however large the file: here one of the shape of EVA-CLIP's 10 GB."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from visft_ds.interop.adapter import Adapter
from visft_ds.interop.files import TensorInfo, open_weights
from visft_ds.interop.layouts import Tower, tower_names, tower_of
from visft_ds.interop.visft import write_visft_lora
from visft_ds.interop.writing import write_torch
from visft_ds.models.eva_vit import build_backbone

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
#: Base as .pt, the pages it is written from, and the result.
NEEDED = 32 * GB


def _infos(tower: Tower) -> dict[str, TensorInfo]:
    """The tensors of EVA02_CLIP_E_psz14_plus_s9B.pt, by the published table: 10,089,778,178 bytes for 64 blocks."""
    shapes: dict[str, tuple[int, ...]] = {f"visual.{name}": shape for name, shape in tower_names(tower).items()}
    width, text = tower.width, 1280
    shapes |= {"visual.head.weight": (1024, width), "visual.head.bias": (1024,), "logit_scale": ()}
    shapes |= {"text.positional_embedding": (77, text), "text.token_embedding.weight": (49408, text)}
    shapes |= {"text.text_projection": (text, 1024), "text.ln_final.weight": (text,), "text.ln_final.bias": (text,)}
    block = {"attn.in_proj_weight": (3 * text, text), "attn.in_proj_bias": (3 * text,)}
    block |= {"attn.out_proj.weight": (text, text), "attn.out_proj.bias": (text,)}
    block |= {"mlp.c_fc.weight": (4 * text, text), "mlp.c_fc.bias": (4 * text,)}
    block |= {"mlp.c_proj.weight": (text, 4 * text), "mlp.c_proj.bias": (text,)}
    block |= {f"{norm}.{part}": (text,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    for index in range(32):
        shapes |= {f"text.transformer.resblocks.{index}.{name}": shape for name, shape in block.items()}
    return {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}


def _write_base(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    noise = (0.02 * torch.randn(1 << 20)).bfloat16()

    def produce(name: str) -> Tensor:
        info = infos[name]
        return noise.repeat(-(-info.numel // len(noise)))[: info.numel].reshape(info.shape)

    write_torch(path, infos, produce)


def _anonymous(pid: int) -> int:
    """Bytes of memory that are no pages of a file; 0 when the process has ended."""
    try:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(match[1]) if match else 0


@pytest.mark.slow
def test_ten_gigabytes_are_merged_in_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED // GB} GB of free disk, {free // GB} GB are there")
    tower = replace(tower_of(build_backbone("eva_e", device="meta")), class_token=True)
    infos = _infos(tower)
    assert sum(info.nbytes for info in infos.values()) == 10_089_778_178
    base, lora, out = tmp_path / "base.pt", tmp_path / "lora.pt", tmp_path / "out.safetensors"
    empty = Adapter(64, 1.0, ("q", "v"), {}, published=True)
    shapes = empty.expected_shapes(tower)
    write_visft_lora(replace(empty, tensors={name: torch.randn(shape) for name, shape in shapes.items()}), lora)
    _write_base(base, infos)
    command = [sys.executable, str(ROOT / "tools/merge_lora.py"), "--base", base, "--adapter", lora, "--out", out]
    command += ["--format", "eva_clip", "--dtype", "bf16", "--max-shard-size", "4GB"]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, said
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\npeak {peak / 1e6:.0f} MB anonymous, {used.ru_utime + used.ru_stime:.0f} s of CPU time\n{said}")
    # Measured 439 MB: Python and torch, the adapter (117 MB), and an MLP matrix and its like in fp32 (110 MB).
    assert peak < 1 * GB, f"{peak / 1e6:.0f} MB"
    result = open_weights(tmp_path / "out.safetensors.index.json")
    assert len(result) == len(infos) and {info.dtype for info in result.infos.values()} == {torch.bfloat16}
