"""Two-way renaming of state dicts, written once as a table and run in both directions.

A rule's patterns are tensor names in which `*` stands for one dotted component and `**` for one or more; what they
matched is put into the other side's wildcards in order. Rules that change tensors (split, transpose, reshape) carry
both directions. No weights are needed: mappings run on meta tensors, which is how they are tested.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import CheckpointError

_WILDCARD = re.compile(r"\*\*|\*")


def _compile(pattern):
    parts = [re.escape(part) for part in _WILDCARD.split(pattern)]
    wildcards = [r"(.+)" if w == "**" else r"([^.]+)" for w in _WILDCARD.findall(pattern)]
    joined = parts[0] + "".join(w + p for w, p in zip(wildcards, parts[1:]))
    return re.compile(joined + r"\Z")


def _fill(pattern, values):
    values = iter(values)
    return _WILDCARD.sub(lambda _: next(values), pattern)


@dataclass(frozen=True)
class Rename:
    """One tensor, another name."""

    original: str
    hf: str

    @property
    def originals(self):
        return (self.original,)

    @property
    def hfs(self):
        return (self.hf,)

    def forward(self, tensors):
        return tensors

    def backward(self, tensors):
        return tensors


@dataclass(frozen=True)
class Convert:
    """A group of tensors that becomes another group, with both directions given.

    `forward` takes the tensors of `originals` in order and returns those of `hfs`; `backward` is its inverse.
    """

    originals: Sequence[str]
    hfs: Sequence[str]
    forward: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
    backward: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def split_rows(original, *hfs):
    """A fused tensor (for example query, key and value) whose rows are split evenly over several tensors."""
    return Convert(
        (original,),
        hfs,
        lambda tensors: [part.clone() for part in tensors[0].chunk(len(hfs), dim=0)],
        lambda tensors: [torch.cat(list(tensors), dim=0)],
    )


def transpose(original, hf):
    """A matrix stored the other way round."""
    swap = lambda tensors: [tensors[0].t().contiguous()]  # noqa: E731
    return Convert((original,), (hf,), swap, swap)


def append_ones(original, hf, count):
    """A tensor that gains (in our layout) `count` trailing axes of size 1: a linear weight of a 1x1 convolution."""
    return Convert(
        (original,),
        (hf,),
        lambda tensors: [tensors[0].reshape(*tensors[0].shape, *([1] * count))],
        lambda tensors: [tensors[0].reshape(tensors[0].shape[: tensors[0].ndim - count])],
    )


def drop_ones(original, hf, count):
    """A tensor that loses (in our layout) `count` trailing axes of size 1."""
    return Convert(
        (original,),
        (hf,),
        lambda tensors: [tensors[0].reshape(tensors[0].shape[: tensors[0].ndim - count])],
        lambda tensors: [tensors[0].reshape(*tensors[0].shape, *([1] * count))],
    )


@dataclass
class StateDictMapping:
    """An ordered table of rules between an original checkpoint's names and ours.

    The first rule that matches a name takes it. Names that match no rule keep their name when `keep_unmatched` is set
    and are an error otherwise. `to_hf(from_hf(x))` and `from_hf(to_hf(x))` are identities.
    """

    rules: Sequence[Rename | Convert] = ()
    keep_unmatched: bool = True
    _compiled: dict = field(default_factory=dict, init=False, repr=False)

    def to_hf(self, state_dict):
        """Original names -> ours."""
        return self._run(state_dict, "originals", "hfs", "forward")

    def from_hf(self, state_dict):
        """Our names -> original names."""
        return self._run(state_dict, "hfs", "originals", "backward")

    def _patterns(self, side):
        if side not in self._compiled:
            self._compiled[side] = [
                (rule, position, _compile(pattern))
                for rule in self.rules
                for position, pattern in enumerate(getattr(rule, side))
            ]
        return self._compiled[side]

    def _run(self, state_dict, source, target, direction):
        result, groups, unmatched = {}, {}, []
        for name, tensor in state_dict.items():
            for rule, position, pattern in self._patterns(source):
                match = pattern.match(name)
                if match:
                    groups.setdefault((id(rule), match.groups()), (rule, {}))[1][position] = tensor
                    break
            else:
                if self.keep_unmatched:
                    result[name] = tensor
                else:
                    unmatched.append(name)
        if unmatched:
            raise CheckpointError(f"names that the mapping does not know: {shorten(unmatched)}")
        for (_, wildcards), (rule, found) in groups.items():
            names = getattr(rule, source)
            missing = [_fill(names[i], wildcards) for i in range(len(names)) if i not in found]
            if missing:
                raise CheckpointError(f"tensors that belong together are incomplete, missing: {shorten(missing)}")
            converted = getattr(rule, direction)([found[i] for i in range(len(names))])
            for pattern, tensor in zip(getattr(rule, target), converted, strict=True):
                name = _fill(pattern, wildcards)
                if name in result:
                    raise CheckpointError(f"two tensors of the checkpoint map to {name}")
                result[name] = tensor
        return result


def shorten(names, limit=8):
    """The first names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@dataclass
class ManifestPart:
    """Which tensors of a released file fill which module (built on the meta device), and through which mapping.

    A part with `left_out` set holds tensors that are deliberately not loaded; the text says why.
    """

    name: str
    tensors: Sequence[str]
    module: torch.nn.Module | None = None
    mapping: StateDictMapping = field(default_factory=StateDictMapping)
    left_out: str = ""
