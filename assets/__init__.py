"""Small files that ship with the package: the bundled model and a sample clip."""

from pathlib import Path

from ..errors import CheckpointError

FOLDER = Path(__file__).resolve().parent
BUNDLED_MODEL = FOLDER / "vidtok_small"
SAMPLE_CLIP = FOLDER / "bunny.mp4"


def bundled_folder():
    """Folder of the bundled model. CheckpointError where the installation lacks it."""
    if not (BUNDLED_MODEL / "config.json").is_file():
        raise CheckpointError(f"{BUNDLED_MODEL}: the bundled model is missing from this installation; name a --model")
    return BUNDLED_MODEL


def load_bundled():
    """The small VidTok that ships with cinetok: (model in float32 and eval mode, processor).

    Raises:
        CheckpointError: the installation lacks it.
    """
    import torch

    from ..modeling.vidtok.modeling_vidtok import VidTokModel
    from ..modeling.vidtok.video_processing_vidtok import VidTokVideoProcessor

    folder = bundled_folder()
    model = VidTokModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, VidTokVideoProcessor.from_pretrained(folder)
