"""Package metadata. Settings of the development tools live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

TIMM = "timm>=1.0.20"
OPEN_CLIP = "open_clip_torch>=3.0"
SKLEARN = "scikit-learn>=1.4"
HTTP, S3 = "aiohttp>=3.9", "s3fs>=2024.6"

setup(
    name="visft_ds",
    version="0.1.0",
    description="Supervised fine-tuning of vision foundation models (ViSFT) on DeepSpeed",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["visft_ds", "visft_ds.*"]),
    package_data={"visft_ds": ["py.typed"]},
    install_requires=[
        "torch>=2.10,<2.16",
        "torchvision>=0.25",
        "deepspeed==0.19.8",  # the engine relies on behaviour that was tested with this version only
        "peft>=0.18",
        "webdataset>=1.0.2",
        "pycocotools>=2.0.8",
        "faster-coco-eval>=1.7",
        "tensorboard>=2.18",
        "numpy>=1.26",
        "scipy>=1.11",
        "safetensors>=0.4.5",
        "pydantic>=2.8",
        "psutil>=5.9",
        "orjson>=3.10",
        "ijson>=3.3",  # for annotation files beyond 1 GiB
        "simplejpeg>=1.8",
        "isal>=1.7",
        "fsspec>=2024.6",
        "pillow>=10.3",
        "rich>=13.7",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "eval": [TIMM, OPEN_CLIP, SKLEARN],
        "remote": [HTTP, S3, "gcsfs>=2024.6", "huggingface_hub>=0.25"],
        "hub": ["huggingface_hub>=0.30"],
        "dev": [
            TIMM,
            OPEN_CLIP,
            SKLEARN,
            "mlxtend>=0.23",
            HTTP,
            S3,
            "moto[server,s3]>=5.0",
            "transformers>=5.0",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "scipy-stubs>=1.11",
            "triton>=3.9,<3.10; sys_platform == 'linux'",
            "pycocoevalcap>=1.2",
        ],
    },
)
