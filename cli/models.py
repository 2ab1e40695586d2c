"""What is in a model folder, and what each command can do with it."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .common import CommandError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Kind:
    """A kind of model folder.

    Attributes:
        title: what it is, for messages.
        system: "vidtok", "vidtwin", "divot", "video_lavit" or "seer".
        commands: subcommands that take it (all take part in `info` and `push`).
    """

    title: str
    system: str
    commands: tuple = ()


_TOKENIZER = ("reconstruct", "tokenize", "detokenize", "evaluate")
# `model_type` of config.json, or `_class_name` of model_index.json or of a diffusers config.json.
KINDS = {
    "vidtok": Kind("VidTok model", "vidtok", (*_TOKENIZER, "train")),
    "vidtwin": Kind("VidTwin model", "vidtwin", (*_TOKENIZER, "reenact", "train")),
    "VideoReconstructionPipeline": Kind("reconstruction pipeline", "vidtok", (*_TOKENIZER, "reenact")),
    "divot_tokenizer": Kind("Divot tokenizer", "divot"),
    "divot": Kind("Divot language model", "divot", ("chat", "generate")),
    "DivotReconstructionPipeline": Kind("Divot de-tokenizer", "divot", ("reconstruct", "tokenize", "detokenize")),
    "DivotTextToVideoPipeline": Kind("Divot text-to-video pipeline", "divot", ("generate",)),
    "DivotStoryPipeline": Kind("Divot story pipeline", "divot", ("generate",)),
    "DivotComprehensionPipeline": Kind("Divot comprehension pipeline", "divot", ("chat",)),
    "video_lavit": Kind("Video-LaVIT language model", "video_lavit", ("chat",)),
    "video_lavit_visual_tokenizer": Kind("Video-LaVIT visual tokenizer", "video_lavit"),
    "video_lavit_motion_tokenizer": Kind("Video-LaVIT motion tokenizer", "video_lavit"),
    "VideoLavitPipeline": Kind(
        "Video-LaVIT generation pipeline", "video_lavit", ("generate", "reconstruct", "tokenize", "detokenize")
    ),
    "VideoLavitReconstructionPipeline": Kind(
        "Video-LaVIT de-tokenizer", "video_lavit", ("reconstruct", "tokenize", "detokenize")
    ),
    "VideoLavitUnderstandingPipeline": Kind("Video-LaVIT understanding pipeline", "video_lavit", ("chat",)),
    "SeerPipeline": Kind("Seer pipeline", "seer", ("predict",)),
    "DivotUNet3DConditionModel": Kind("Divot U-Net", "divot"),
    "DivotFeatureResampler": Kind("Divot feature resampler", "divot"),
    "VideoLavitUNetSpatioTemporalConditionModel": Kind("Video-LaVIT U-Net", "video_lavit"),
    "VideoLavitMotionEncoder": Kind("Video-LaVIT motion encoder", "video_lavit"),
    "VideoLavitKeyframeDecoder": Kind("Video-LaVIT keyframe decoder", "video_lavit"),
    "SeerUNet3DConditionModel": Kind("Seer U-Net", "seer"),
    "SeerTextDecomposer": Kind("Seer text decomposer", "seer"),
}


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model: `path`, `name` in `KINDS`, `kind`, and the parsed `config`."""

    path: Path
    name: str
    kind: Kind
    config: dict

    @property
    def is_pipeline(self):
        return (self.path / "model_index.json").is_file()


def find_model(spec, command=None):
    """The model folder `spec` names.

    Args:
        spec: a folder, a Hub id (which is downloaded), or None for the model that ships with cinetok.
        command: subcommand that wants to use it; refused where the kind of model cannot do that.

    Returns:
        `ModelFolder`.

    Raises:
        CommandError: no such folder, no model in it, an unknown one, or one that cannot do the command.
    """
    path = _locate(spec)
    index, config = path / "model_index.json", path / "config.json"
    if not index.is_file() and not config.is_file():
        raise CommandError(f"{path}: no model here (neither config.json nor model_index.json)")
    file = index if index.is_file() else config
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
        name = parsed.get("_class_name") or parsed.get("model_type")
        name = name[-1] if isinstance(name, list) else name
    except (ValueError, AttributeError) as error:
        raise CommandError(f"{file}: not a valid configuration ({error})") from error
    if name not in KINDS:
        raise CommandError(
            f"{path}: its model is {name or 'not named'}, which cinetok does not know; it knows the folders that "
            "`cinetok convert` writes"
        )
    kind = KINDS[name]
    if command is not None and command not in kind.commands:
        can = " and ".join(kind.commands) or "be part of a pipeline"
        others = sorted({other.title for other in KINDS.values() if command in other.commands})
        raise CommandError(
            f"{path}: a {kind.title} cannot {command}; it can {can}. {command} takes a {', '.join(others)}"
        )
    return ModelFolder(path, name, kind, parsed)


def _locate(spec):
    if spec is None:
        from .. import assets

        return assets.bundled_folder()
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists():
        raise CommandError(f"{spec}: is a file; give the folder of a model")
    if not _HUB_ID.fullmatch(str(spec)):
        raise CommandError(f"{spec}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(str(spec)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()
        reason = first[0] if first else type(error).__name__
        raise CommandError(f"{spec}: no such folder, and not to be had from the Hub ({reason})") from error
    finally:
        if not were_disabled:
            enable_progress_bars()
