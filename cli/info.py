"""`cinetok info`: what is in a model folder or in a file of tokens."""

import json
import math
from pathlib import Path

from . import common
from .common import CommandError, Result
from .models import ModelFolder, find_model

HELP = "describe a model folder or a file of tokens"
EXAMPLE = """  cinetok info
  cinetok info vidtok_kl_causal_488_4chn_v1_1
  cinetok info clip.safetensors"""
_DTYPE_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}


def add_arguments(parser):
    parser.add_argument(
        "what", nargs="?", metavar="MODEL", help="model folder, Hub id or file of tokens (default: bundled)"
    )


def run(args):
    if args.what is not None and Path(args.what).is_file():
        return _describe_tokens(args.what)
    folder = find_model(args.what)
    data = {"model": str(folder.path), "kind": folder.kind.title, "class": folder.name, "system": folder.kind.system}
    weights = _weights(folder)
    data["parameters"] = sum(part["parameters"] for part in weights.values())
    data["bytes"] = sum(part["bytes"] for part in weights.values())
    data["dtypes"] = sorted({dtype for part in weights.values() for dtype in part["dtypes"]})
    if folder.is_pipeline:
        data["components"] = _components(folder, weights)
    data.update(_compression(folder))
    data.update(_card(folder.path))
    data["commands"] = list(folder.kind.commands)
    return Result(data, _text(data))


def _text(data):
    rows = [("model", data["model"]), ("kind", data["kind"])]
    rows.append(("parameters", f"{data['parameters']:,} ({data['bytes']:,} bytes, {', '.join(data['dtypes'])})"))
    for name, component in data.get("components", {}).items():
        size = f", {component['parameters']:,} parameters" if component["parameters"] else ""
        rows.append((f"  {name}", component["class"] + size))
    rows += [
        (name.replace("_", " "), str(data[name])) for name in ("version", "latents", "compression") if name in data
    ]
    rows += [(name, str(data[name])) for name in ("license", "paper", "base_model") if name in data]
    rows.append(("commands", ", ".join(data["commands"]) or "none of its own"))
    return common.table(rows)


def _weights(folder):
    """Per component ("" for a model by itself): parameters, bytes and dtypes, read from the files' headers."""
    found = {}
    for file in sorted(folder.path.rglob("*.safetensors")):
        if file.name == "training_state.safetensors":
            continue
        relative = file.relative_to(folder.path)
        part = found.setdefault(
            relative.parts[0] if len(relative.parts) > 1 else "", {"parameters": 0, "bytes": 0, "dtypes": set()}
        )
        for dtype, shape in _header(file).values():
            part["parameters"] += math.prod(shape)
            part["bytes"] += math.prod(shape) * _DTYPE_BITS.get(dtype, 32) // 8
            part["dtypes"].add(dtype)
    if not found:
        raise CommandError(f"{folder.path}: holds no weights (*.safetensors)")
    return found


def _header(file):
    """Names, dtypes and shapes of a safetensors file, without reading its tensors."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > 200_000_000:
                raise ValueError("its header is too large")
            header = json.loads(stream.read(length))
        return {name: (value["dtype"], value["shape"]) for name, value in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{file}: not a valid safetensors file ({error})") from error


def _components(folder, weights):
    components = {}
    for name, entry in folder.config.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            components[name] = {"class": entry[1], "parameters": weights.get(name, {}).get("parameters", 0)}
    return components


def _compression(folder):
    """Shapes of the latents and how many times fewer numbers they are than pixels, counted from the configuration."""
    path, name = folder.path, folder.name
    if name == "VideoReconstructionPipeline":
        path = path / "tokenizer"
        name = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        return {"system": name, **_compression(ModelFolder(path, name, folder.kind, {}))}
    if name == "vidtwin":
        from ..modeling.vidtwin.configuration_vidtwin import VidTwinConfig

        config = VidTwinConfig.from_pretrained(path)
        counted = config.compression()
        shapes = "; ".join(
            f"{part} {'x'.join(map(str, shape))}" for part, shape in config.latent_shapes._asdict().items()
        )
        text = (
            f"{counted['ratio']:.1f} times fewer numbers ({counted['latent_values']:,} for "
            f"{counted['input_values']:,}, {100 * counted['latent_fraction']:.2f} %)"
        )
        return {
            "latents": f"per {config.num_frames} frames of {config.height}x{config.width}: {shapes}",
            "compression": text,
            "compression_ratio": counted["ratio"],
        }
    if name != "vidtok":
        return {}
    from ..modeling.vidtok.configuration_vidtok import VidTokConfig

    config = VidTokConfig.from_pretrained(path)
    time, space = config.temporal_compression_ratio, config.spatial_compression_ratio
    pixels = time * space * space * config.in_channels
    facts = {"version": config.version or "non-causal"}
    facts["latents"] = f"one position per {time} frames x {space} x {space} pixels"
    if config.regularizer == "fsq":
        bits = math.log2(config.codebook_size)
        facts["latents"] += f": one of {config.codebook_size:,} codes ({bits:g} bits)"
        facts["compression_ratio"] = pixels * 8 / bits
        facts["compression"] = f"{facts['compression_ratio']:.1f} times fewer bits (8-bit pixels to {bits:g}-bit codes)"
    else:
        facts["latents"] += f": {config.latent_channels} numbers"
        facts["compression_ratio"] = pixels / config.latent_channels
        facts["compression"] = f"{facts['compression_ratio']:g} times fewer numbers"
    return facts


def _card(path):
    """Licence, paper and base models, from the metadata of the folder's model card."""
    readme = path / "README.md"
    if not readme.is_file():
        return {}
    import yaml

    text = readme.read_text(encoding="utf-8")
    parts = text.split("---", 2)
    if not text.startswith("---") or len(parts) < 3:
        return {}
    try:
        metadata = yaml.safe_load(parts[1]) or {}
    except yaml.YAMLError:
        return {}
    facts = {}
    if metadata.get("license"):
        name, link = metadata.get("license_name"), metadata.get("license_link")
        facts["license"] = (name or metadata["license"]) + (f" ({link})" if link else "")
    paper = next((tag for tag in metadata.get("tags") or [] if str(tag).startswith("arxiv:")), None)
    if paper:
        facts["paper"] = f"https://arxiv.org/abs/{paper.split(':', 1)[1]}"
    if metadata.get("base_model"):
        base = metadata["base_model"]
        facts["base_model"] = ", ".join(base) if isinstance(base, list) else base
    return facts


def _describe_tokens(path):
    from .token_files import read_header

    _, facts, tensors = read_header(path)
    described = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
    size = Path(path).stat().st_size
    rows = [("tokens", str(path)), ("bytes", f"{size:,}")]
    facts = {**facts, **facts.pop("extra", {})}
    rows += [(name.replace("_", " "), str(value)) for name, value in facts.items() if value not in ("", None)]
    rows += [(name, f"{value['dtype']} {'x'.join(map(str, value['shape']))}") for name, value in described.items()]
    return Result({"tokens": str(path), "bytes": size, **facts, "tensors": described}, common.table(rows))
