"""All metadata and dependencies of lowmem. `profiles/` is installed as package data (`lowmem/profiles`)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The one place of the version is lowmem/__init__.py, which setup must not import.
INIT = (ROOT / "lowmem" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0]
DATA = ["scikit-learn>=1.4", "Pillow>=10"]
PLOTS = ["matplotlib>=3.8", "jinja2>=3"]
TEXT = ["tokenizers>=0.21"]
HUGGINGFACE = ["transformers>=5.20", "peft>=0.19", "datasets>=4", *TEXT]
LOGGERS = ["tensorboard>=2.15"]
DEV = [
    "filelock>=3",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "ruff>=0.9",
    "mypy>=1.14",
    "types-PyYAML",
    "types-psutil",
]

setup(
    name="lowmem",
    version=VERSION,
    description="Train models that do not fit: one block at a time, with a memory budget you can check",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["lowmem", "lowmem.*"]), "lowmem.profiles"],
    package_dir={"lowmem": "lowmem", "lowmem.profiles": "profiles"},
    package_data={
        "lowmem": ["py.typed"],
        "lowmem.reporting": ["*.j2"],
        "lowmem.profiles": ["hardware/*.yaml", "recipes/*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "bitsandbytes>=0.50",
        "deepspeed>=0.17; platform_system == 'Linux'",
        "psutil>=5.9",
        "nvidia-ml-py>=12",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pydantic>=2.8",
        "PyYAML>=6",
        "rich>=13",
        "typer>=0.15",
        "filelock>=3.13",
        "xxhash>=3.4",
    ],
    extras_require={
        "data": DATA,
        "plots": PLOTS,
        "text": TEXT,
        "huggingface": HUGGINGFACE,
        "loggers": LOGGERS,
        "dev": DEV,
        "all": DATA + PLOTS + HUGGINGFACE + LOGGERS + DEV,
    },
    entry_points={"console_scripts": ["lowmem = lowmem.cli:main"]},
)
