"""What a released checkpoint is. The tables themselves live in `conversion/<system>.py`, one entry per release; the
converters, the model cards, `cinetok convert --list` and the documentation read them and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One published result. `value` is in the metric's usual unit (dB for PSNR)."""

    name: str
    value: float
    dataset: str
    setting: str
    source: str


@dataclass(frozen=True)
class License:
    """A licence as the Hub wants it: an SPDX id, or "other" with a name and a link. `remark` goes in the card."""

    id: str
    name: str = ""
    link: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Release:
    """One released checkpoint.

    Attributes:
        name: what `--release` takes.
        system: "vidtok", "vidtwin", "divot", "video_lavit" or "seer".
        hub_id: the authors' repository on the Hub.
        files: the files in it that this release is made of.
        config: keyword arguments of our configuration (nested per component where there are several).
        card: the template in `model_cards/` that describes this kind of release.
        pipeline_tag: the Hub's task name.
        license: the licence of the weights.
        paper: arXiv id.
        title: a line that says what the checkpoint is.
        size: published size in bytes or words, for `convert --list`.
        metrics: published results.
        limits: sentences for the card's "Limits" section.
        notes: facts that a converter or reader must know (for example that a file was probably never published).
        base_models: Hub ids this release builds on.
        processor: keyword arguments of the processor saved beside it.
    """

    name: str
    system: str
    hub_id: str
    files: Sequence[str]
    config: Mapping[str, Any]
    card: str
    pipeline_tag: str
    license: License
    paper: str
    title: str
    size: str = ""
    metrics: Sequence[Metric] = ()
    limits: Sequence[str] = ()
    notes: Sequence[str] = ()
    base_models: Sequence[str] = ()
    processor: Mapping[str, Any] = field(default_factory=dict)
