"""Video processor of VidTwin: VidTok's preprocessing at the size VidTwin was trained at."""

from ..vidtok.video_processing_vidtok import VidTokVideoProcessor


class VidTwinVideoProcessor(VidTokVideoProcessor):
    r"""[`VidTokVideoProcessor`] with VidTwin's defaults: 224x224 pixels, and 16 frames read from files.

    Pass `num_frames=None` to read whole files: the model cuts clips of any length into windows. The size must be that
    of the model's configuration.
    """

    def __init__(self, size=None, crop_size=None, num_frames=16, **kwargs):
        super().__init__(
            size={"shortest_edge": 224} if size is None else size,
            crop_size={"height": 224, "width": 224} if crop_size is None else crop_size,
            num_frames=num_frames,
            **kwargs,
        )


__all__ = ["VidTwinVideoProcessor"]
