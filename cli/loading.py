"""Loading of models and pipelines for commands; here the heavy imports begin."""

import contextlib
import copy
import json

from ..errors import CheckpointError
from .common import CommandError, progress


def quiet_libraries(args):
    """Keeps the libraries' own bars and notes out of the way until the command ends (cinetok's warnings still show)."""
    import diffusers
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    for library in (transformers.logging, diffusers.logging):
        args.cleanup.callback(library.set_verbosity, library.get_verbosity())
        enabled = library.is_progress_bar_enabled()
        args.cleanup.callback(library.enable_progress_bar if enabled else library.disable_progress_bar)
        if not args.debug:
            library.set_verbosity_error()
        (library.enable_progress_bar if progress(args) else library.disable_progress_bar)()
    args.cleanup.callback(disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars)
    (enable_progress_bars if progress(args) else disable_progress_bars)()


def placement(args):
    """(device, dtype) that the arguments ask for. CommandError for a device that is not there."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {args.device}: {str(error).strip().splitlines()[0]}") from error
    return device, getattr(torch, args.dtype)


@contextlib.contextmanager
def load_errors(path):
    """What the libraries raise for damaged or incomplete folders becomes one kind of error that names the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except CommandError:
        raise
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded ({reason})") from error


def load_model(cls, path, dtype, device):
    """A transformers model in eval mode; every tensor must be there.

    Raises:
        CheckpointError: files missing or damaged, tensors missing, unexpected or of other shapes.
    """
    with load_errors(path):
        model, info = cls.from_pretrained(path, dtype=dtype, output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys and name.endswith("_keys")}
    if problems:
        text = "; ".join(
            f"{len(keys)} {name.replace('_keys', '')} tensors ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for name, keys in problems.items()
        )
        raise CheckpointError(f"{path}: the weights do not fit config.json: {text}")
    check_finite(path, {"": model})
    return model.to(device).eval()


def check_finite(path, parts):
    """Raises CheckpointError, with the names of the parameters, where weights of `parts` (name -> module) are NaN or
    infinite. The range of a half precision may have made them so.
    """
    import torch

    from ..conversion.checkpoints import is_finite
    from ..conversion.mapping import shorten

    bad = {}
    for part, model in parts.items():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not is_finite(value):
                bad[f"{part}.{name}".lstrip(".")] = value.dtype
    if bad:
        half = "" if torch.float16 not in bad.values() else " (as float16; try --dtype bfloat16 or float32)"
        raise CheckpointError(f"{path}: {len(bad)} tensors hold NaN or infinite values{half}: {shorten(list(bad))}")


def load_tokenizer(folder, args):
    """(model, processor) of a VidTok or VidTwin folder or pipeline."""
    import cinetok

    quiet_libraries(args)
    device, dtype = placement(args)
    path = folder.path
    model_path, processor_path = path, path
    if folder.is_pipeline:
        model_path, processor_path = path / "tokenizer", path / "video_processor"
    name = folder.name if not folder.is_pipeline else _model_type(model_path)
    classes = {"vidtok": ("VidTokModel", "VidTokVideoProcessor"), "vidtwin": ("VidTwinModel", "VidTwinVideoProcessor")}
    if name not in classes:
        raise CommandError(f"{model_path}: expected VidTok or VidTwin, found {name}")
    model_class, processor_class = (getattr(cinetok, n) for n in classes[name])
    model = load_model(model_class, model_path, dtype, device)
    with load_errors(processor_path):
        processor = processor_class.from_pretrained(processor_path)
    return model, processor


def _model_type(path):
    with load_errors(path):
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")


def load_pipeline(folder, args, name=None):
    """A saved pipeline on its device; `name` is the class to load it as (default: the one it was saved as)."""
    import cinetok

    quiet_libraries(args)
    device, dtype = placement(args)
    with load_errors(folder.path):
        pipeline = getattr(cinetok, name or folder.name).from_pretrained(folder.path, dtype=dtype)
    return settle(pipeline, args, device)


def settle(pipeline, args, device):
    """Puts a pipeline on its device, whole or part by part, and sets its progress bars.

    Raises:
        CheckpointError: weights that are NaN or infinite.
    """
    import torch

    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    check_finite(args.model, parts)
    pipeline.set_progress_bar_config(disable=not progress(args), leave=False)
    if getattr(args, "offload", False):
        if device.type == "cpu":
            raise CommandError("--offload needs a GPU to offload from")
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def processor_for(model, processor, args):
    """The processor with the size the arguments ask for.

    VidTok keeps the video's size unless told; VidTwin's size is part of the model.
    """
    check_vidtok_options(model, args)
    if model.config.model_type == "vidtwin":
        return processor
    size, crop = getattr(args, "size", None), getattr(args, "crop", False)
    if crop and size is None:
        raise CommandError("--crop needs --size")
    processor = copy.copy(processor)
    processor.do_resize, processor.do_center_crop = size is not None, crop
    if size is not None:
        processor.size = {"shortest_edge": size}
        processor.crop_size = {"height": size, "width": size}
    return processor


def check_vidtok_options(model, args):
    """CommandError for options that VidTwin, whose window and frame size are part of the model, has no use for."""
    config = model.config
    for name in ("size", "crop", "tile_size", "chunk_frames"):
        if config.model_type == "vidtwin" and getattr(args, name, None):
            raise CommandError(
                f"--{name.replace('_', '-')} is for VidTok; this VidTwin takes {config.num_frames} frames of "
                f"{config.height}x{config.width} pixels at a time"
            )


def seeded(args):
    """A generator with the seed of the arguments."""
    import torch

    return torch.Generator().manual_seed(args.seed)
