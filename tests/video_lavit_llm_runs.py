"""Token ids, fixtures and the short call that the tests of Video-LaVIT's language models share."""

import numpy as np
import pytest
from model_cases import video_lavit_llm as tiny

from cinetok import write_video

IMAGE, VIDEO = tiny.LAYOUT["image_token_id"], tiny.LAYOUT["video_token_id"]
BOI, EOI, VISUAL = 400, 401, 402
BOM, EOM, MOTION = 434, 435, 436


@pytest.fixture(scope="module", name="writer")
def writer_fixture():
    """The language model alone, which writes codes."""
    return tiny.language_model(with_tokenizers=False)


@pytest.fixture(scope="module", name="video_file")
def video_file_fixture(tmp_path_factory):
    """A moving square, 20 frames at 6 per second."""
    path = tmp_path_factory.mktemp("video") / "square.mp4"
    frames = np.full((20, 48, 64, 3), 60, np.uint8)
    for index, frame in enumerate(frames):
        frame[10:30, 2 * index : 2 * index + 16] = (250, 40, 40)
    write_video(path, frames, fps=6)
    return path


def call(pipeline, batch_size=1, **options):
    """One short run of the pipeline that makes images and videos."""
    return pipeline(**tiny._generation_inputs(batch_size, **options))
