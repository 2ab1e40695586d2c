"""Packaging: the repository root is the package `cinetok` (see CONTRIBUTING.md, "Where things live")."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py as _build_py

FOLDERS = ("modeling", "pipelines", "conversion", "trainers", "video", "metrics", "cli", "assets", "model_cards")


class build_py(_build_py):
    """Leaves this file out of the wheel (it would be shipped as cinetok/setup.py)."""

    def find_package_modules(self, package, package_dir):
        return [m for m in super().find_package_modules(package, package_dir) if m[1] not in {"setup", "conftest"}]


subpackages = find_packages(".", include=[pattern for name in FOLDERS for pattern in (name, f"{name}.*")])

train = ["accelerate>=1.10", "datasets>=4", "peft>=0.17", "trl>=1.0"]
evaluation = ["evaluate>=0.4.5"]
plots = ["matplotlib>=3.8"]
text = ["sentencepiece>=0.2", "protobuf>=4"]
everything = [*train, *evaluation, *plots, *text]

setup(
    name="cinetok",
    version="0.1.0",
    description="Hugging Face-native home of VidTok, VidTwin, Divot, Video-LaVIT and Seer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    cmdclass={"build_py": build_py},
    packages=["cinetok", *(f"cinetok.{name}" for name in subpackages)],
    package_dir={"cinetok": "."},
    package_data={
        "cinetok": ["py.typed"],
        "cinetok.model_cards": ["*.jinja", "*.md", "*/*.md"],
        "cinetok.assets": ["*.mp4", "*.md", "*/*"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "transformers>=5.20,<6",
        "diffusers>=0.40",
        "huggingface_hub>=2",
        "safetensors>=0.5",
        "accelerate>=1.10",
        "av>=14",
        "pillow>=10",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "pyyaml>=6",
    ],
    extras_require={
        "train": train,
        "eval": evaluation,
        "plots": plots,
        "text": text,
        "all": everything,
        "dev": [
            *everything,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "mypy>=1.15",
            "scikit-video>=1.1.11",
            "mistral-common>=1.8",
        ],
    },
    entry_points={"console_scripts": ["cinetok=cinetok.cli.main:main"]},
)
