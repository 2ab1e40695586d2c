"""Tiny models and pipelines the parametrised suite runs over: one module per system, each with `MODELS` and `PIPELINES`.

`build` functions make real classes with tiny configurations and random weights; `inputs` make one batch of two samples
for `forward`. What a case cannot do is said in `exceptions`, with the reason.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYSTEMS = ("vidtok", "vidtwin", "divot", "video_lavit", "seer", "reconstruction")


@dataclass(frozen=True)
class ModelCase:
    """A model class with a tiny configuration.

    Attributes:
        name: unique, "<system>-<variant>".
        build: () -> module in eval mode with random, non-degenerate weights.
        inputs: (batch_size) -> keyword arguments of `forward`; sample i must not depend on the batch size.
        output: key of the main result in the returned ModelOutput.
        has_loss: `forward` returns a loss for `inputs` (in training mode), so gradients can be compared.
        exceptions: name of a check ("batch", "attention", "checkpointing", "half", "sharded";
            "attention_choice": it has one implementation of attention) -> why it does not apply.
        without_gradient: pattern of parameter names (`re.fullmatch`) -> why no gradient of `inputs`' loss reaches them.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], Mapping[str, Any]]
    output: str
    has_loss: bool = True
    exceptions: Mapping[str, str] = field(default_factory=dict)
    without_gradient: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline made of tiny components.

    Attributes:
        name: unique, "<system>-<variant>".
        build: () -> pipeline.
        inputs: (batch_size) -> keyword arguments of `__call__` with `output_type="pt"` where it has one; random draws come
            from per-sample generators made inside, so that two calls are equal and batches equal single calls.
        result: (output) -> tensor or list of strings, one entry per sample.
        exceptions: name of a check ("batch", "generic_loading", "offload") -> why it does not apply.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], Mapping[str, Any]]
    result: Callable[[Any], Any]
    exceptions: Mapping[str, str] = field(default_factory=dict)


def _collect(kind):
    cases = []
    for system in SYSTEMS:
        if (Path(__file__).parent / f"{system}.py").exists():
            cases += getattr(importlib.import_module(f"model_cases.{system}"), kind, [])
    return cases


def model_cases():
    return _collect("MODELS")


def pipeline_cases():
    return _collect("PIPELINES")
