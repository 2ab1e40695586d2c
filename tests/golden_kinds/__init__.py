"""Golden cases: what a case folder is (`GoldenCase`), how tensors are compared, and the runners of every kind.

A runner is a function `run(case)` decorated with `@golden(system, kind)` in `golden_kinds/<system>.py`. It reads inputs
with `case.input(name)`, and hands every result to `case.check(name, tensor)`; tolerances come from the case alone.
"""

import importlib
import json
import lzma
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, load_file

SYSTEMS = ("vidtok", "vidtwin", "divot", "video_lavit", "seer")
RUNNERS = {}
DEFERRED = {}  # (system, kind) -> the issue that will run it; listed, neither passed nor failed


def golden(system, kind):
    def register(run):
        RUNNERS[system, kind] = run
        return run

    return register


def defer(system, kind, reason):
    DEFERRED[system, kind] = reason


def load_runners(system):
    """Imports the runners of one system (only what is run is imported)."""
    if system in SYSTEMS and (Path(__file__).parent / f"{system}.py").exists():
        importlib.import_module(f"golden_kinds.{system}")


def load_tensors(path):
    """The tensors of a .safetensors file, or of one packed by `tests/pack_goldens.py` (.safetensors.xz)."""
    path = Path(path)
    return load(lzma.decompress(path.read_bytes())) if path.suffix == ".xz" else load_file(path)


def plain_file(path, folder):
    """`path`, or, where only `path`.xz exists, a plain copy of it in `folder` (for what reads files itself)."""
    path = Path(path)
    if path.exists():
        return path
    plain = Path(folder) / path.name
    plain.write_bytes(lzma.decompress(path.with_name(path.name + ".xz").read_bytes()))
    return plain


@dataclass
class Tolerance:
    """`atol`/`rtol` as in torch.allclose; `mean_atol` bounds the mean absolute difference as well, where given."""

    atol: float = 0.0
    rtol: float = 0.0
    mean_atol: float | None = None

    @classmethod
    def parse(cls, spec):
        """Reads the forms the cases use: {"atol", "rtol"}, "exact", "+-1 ...", "atol 1e-5 rtol 1e-4", and
        "max abs difference <= a and mean abs difference <= b"."""
        if isinstance(spec, (int, float)):
            return cls(atol=float(spec))
        if isinstance(spec, dict):
            return cls(float(spec.get("atol", 0.0)), float(spec.get("rtol", 0.0)))
        if spec.startswith("exact"):
            return cls()
        if spec.startswith(("+-1", "±1")):
            return cls(atol=1.0)
        number = r"([0-9.]+(?:e[+-]?[0-9]+)?)"

        def find(pattern):
            match = re.search(pattern + number, spec)
            return float(match.group(1)) if match else None

        atol, rtol = find(r"atol "), find(r"rtol ")
        max_abs, mean_abs = find(r"max abs difference <= "), find(r"mean abs difference <= ")
        if max_abs is not None:
            return cls(atol=max_abs, mean_atol=mean_abs)
        if atol is None and rtol is None:
            raise ValueError(f"no tolerance found in {spec!r}")
        return cls(atol or 0.0, rtol or 0.0)


@dataclass
class Row:
    name: str
    passed: bool
    max_abs: float = 0.0
    max_rel: float = 0.0
    tolerance: str = ""
    note: str = ""


@dataclass
class GoldenCase:
    """One case folder: `spec` (case.json), `config` (config.json), the recorded tensors, and the comparisons made."""

    path: Path
    spec: dict = field(init=False)
    config: dict = field(init=False)
    rows: list = field(default_factory=list)

    def __post_init__(self):
        self.path = Path(self.path)
        self.spec = json.loads((self.path / "case.json").read_text())
        config = self.path / "config.json"
        self.config = json.loads(config.read_text()) if config.exists() else {}
        io = next(self.path.glob("io.safetensors*"), None)
        self.recorded = load_tensors(io) if io is not None else {}
        self._inputs, self._checked = set(), set()

    @property
    def system(self):
        return self.spec["system"]

    @property
    def kind(self):
        return self.spec["kind"]

    @property
    def tolerance_spec(self):
        return self.spec.get("tolerance", self.spec.get("suggested_tolerance"))

    def file(self, name):
        """A file the case refers to, plain or packed: in the case's folder, beside it, or in a folder beside it."""
        for folder in (self.path, self.path.parent):
            for path in (folder / name, folder / f"{name}.xz"):
                if path.exists():
                    return path
        raise FileNotFoundError(f"{self.path}: the case refers to {name}, which is neither in it nor beside it")

    def weights(self, name=None):
        """The recorded weights under their original names; stored 8- and 16-bit floats are cast to float32 (exact).

        Without a name: the case's own, or those its `weights_from` names: a file name (what follows is a remark), or
        `{"file": name, "prefix": "unet."}` for the tensors below a prefix.
        """
        prefix = ""
        source = self.spec.get("weights_from") or self.config.get("weights_from")
        if name is None and isinstance(source, dict):
            name, prefix = source["file"], source.get("prefix", "")
        elif name is None and source:
            name = source.split()[0]
        stored = load_tensors(self.file((name or "weights.safetensors").removeprefix("../")))
        return {
            k.removeprefix(prefix): v.float() if v.is_floating_point() and v.element_size() < 4 else v
            for k, v in stored.items()
            if k.startswith(prefix)
        }

    def has(self, name):
        return name in self.recorded

    def names(self, prefix=""):
        return [name for name in self.recorded if name.startswith(prefix)]

    def input(self, name):
        """A recorded input. It counts as used."""
        self._inputs.add(name)
        return self.recorded[name]

    def ignore(self, name, why):
        """Declares a recorded tensor that is neither an input nor a result (say why); shown in the report."""
        self._inputs.add(name)
        self.rows.append(Row(name, True, note=f"not compared: {why}"))

    def tolerance(self, group=None):
        spec = self.tolerance_spec
        if group is not None and isinstance(spec, dict):
            spec = spec[group]
        return Tolerance.parse(spec)

    def check(self, name, value, group=None, tolerance=None):
        """Compares `value` with the recorded tensor `name`. Integers and booleans must be equal unless the case gives
        them a tolerance (`group`). `tolerance` is for tolerances a runner has read from the case itself."""
        expected = self.recorded[name]
        self._checked.add(name)
        value = torch.as_tensor(value).detach()
        if tuple(value.shape) != tuple(expected.shape):
            if value.numel() == expected.numel() == 1:
                value = value.reshape(expected.shape)
            else:
                note = f"shape {tuple(value.shape)}, recorded {tuple(expected.shape)}"
                self.rows.append(Row(name, False, float("inf"), float("inf"), note=note))
                return
        exact = group is None and tolerance is None and not expected.is_floating_point()
        limit = Tolerance() if exact else (tolerance or self.tolerance(group))
        self.rows.append(compare(name, value, expected, limit))

    def check_value(self, name, value, expected):
        """Compares plain values recorded in JSON (lists, strings, numbers): they must be equal."""
        note = "" if value == expected else f"got {value!r}, recorded {expected!r}"[:200]
        self.rows.append(Row(name, value == expected, tolerance="exact", note=note))

    def unused(self):
        return sorted(set(self.recorded) - self._inputs - self._checked)


def compare(name, value, expected, limit):
    value, expected = value.double(), expected.double()
    if expected.numel() == 0:
        return Row(name, True, note="empty")
    difference = (value - expected).abs()
    within = difference <= limit.atol + limit.rtol * expected.abs()
    mean_ok = limit.mean_atol is None or difference.mean().item() <= limit.mean_atol
    passed = bool(within.all()) and mean_ok and bool(torch.isfinite(difference).all())
    text = f"atol {limit.atol:g} rtol {limit.rtol:g}" + (
        f" mean {limit.mean_atol:g}" if limit.mean_atol is not None else ""
    )
    relative = difference.max().item() / max(expected.abs().max().item(), 1e-12)
    return Row(name, passed, difference.max().item(), relative, text)


def find_cases(folders):
    """Every folder below `folders` that holds a case.json, sorted."""
    return sorted({p.parent for folder in folders for p in Path(folder).rglob("case.json")})
