"""Packages of the wheel; everything else stands in pyproject.toml.

ds_configs/ has its only copy at the top, and is installed inside of visft_ds.
"""

import sys

from setuptools import find_packages, setup

CONFIGURATIONS = {
    "visft_ds.ds_configs": "ds_configs",
    "visft_ds.ds_configs.engines": "ds_configs/engines",
    "visft_ds.ds_configs.models": "ds_configs/models",
}
#: An editable installation is the folder itself: configurations are read where they are.
EDITABLE = "editable_wheel" in sys.argv
INSTALLED = {} if EDITABLE else CONFIGURATIONS

setup(
    packages=[*find_packages(include=["visft_ds", "visft_ds.*"]), *INSTALLED],
    package_dir={"": "."} if EDITABLE else INSTALLED,
    package_data={
        "": ["*.j2", "*.csv", "*.html"],
        "visft_ds": ["py.typed"],
        **{package: ["*.json"] for package in INSTALLED},
    },
)
