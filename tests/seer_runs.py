"""Short runs of the tiny Seer pipeline, in this process and in a fresh one."""

import pytest
import torch
from model_cases import seer as tiny
from python_process import run_python


@pytest.fixture(scope="module", name="pipe")
def pipe_fixture():
    return tiny.pipeline()


def arguments_of_run(seed=0, **changes):
    return {
        "prompt": "close book",
        "image": torch.rand(3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(7)),
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
    } | changes


def run(pipe, seed=0, **changes):
    """Frames (batch, frames, 3, height, width) of a short run."""
    return pipe(**arguments_of_run(seed, **changes)).frames


_FRESH = """
import sys, torch, cinetok
from diffusers import DiffusionPipeline
pipes = cinetok.SeerPipeline.from_pretrained(sys.argv[1]), DiffusionPipeline.from_pretrained(sys.argv[1])
assert all(type(pipe) is cinetok.SeerPipeline for pipe in pipes)
image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(7))
frames = [
    pipe(
        "close book", image, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).frames
    for pipe in pipes
]
assert torch.equal(frames[0], frames[1])
torch.save(frames[0], sys.argv[2])
"""


def fresh_process_frames(folder, tmp_path):
    """The frames of `run` from a saved pipeline, loaded by its own class and by diffusers' in a new process."""
    run_python(_FRESH, folder, tmp_path / "frames.pt")
    return torch.load(tmp_path / "frames.pt", weights_only=True)
