"""VidTok's golden kinds about pixels: preprocessing, frame choice and quality measures."""

import math
import re

import numpy as np
import torch

from cinetok.metrics import psnr, ssim
from cinetok.modeling.vidtok.video_processing_vidtok import VidTokVideoProcessor
from cinetok.video.sampling import vidtok_evaluation_batches, vidtok_start_bounds, vidtok_training_indices

from . import golden


@golden("vidtok", "preprocess")
def run_preprocess(case):
    for call in case.spec["plan"]["calls"]:
        processor = VidTokVideoProcessor(
            size={"shortest_edge": call["height"]}, crop_size={"height": call["height"], "width": call["width"]}
        )
        video = processor(case.input(call["frames"]))["pixel_values_videos"]
        case.check(f"output.{call['tag']}.video", video[0].transpose(0, 1))
        frames = processor.postprocess((1.3 * video).clamp(-1, 1), output_type="pt")
        case.check(f"output.{call['tag']}.uint8_of_1p3x", frames[0].permute(0, 3, 1, 2))


@golden("vidtok", "sampling")
def run_sampling(case):
    for number, call in enumerate(case.spec["plan"].get("train_calls", [])):
        total, fps = call["total_frames"], call["video_fps"]
        num_frames, sample_fps = call["sample_num_frames"], call.get("sample_fps")
        bounds = vidtok_start_bounds(total, fps, num_frames, sample_fps)
        start = call.get("start_index", call.get("randint"))
        if case.has(f"output.train{number}.randint_bounds"):
            case.check(f"output.train{number}.randint_bounds", torch.tensor(bounds))
        indices = vidtok_training_indices(total, fps, num_frames, sample_fps, start=start or 0)
        case.check(f"output.train{number}.indices", torch.tensor(indices))
    for number, call in enumerate(case.spec["plan"].get("val_calls", [])):
        batches = vidtok_evaluation_batches(
            call["total_frames"],
            call["video_fps"],
            call["sample_fps"],
            num_frames=call["sample_num_frames"],
            chunk_frames=call["chunk_size"],
            causal=call["is_causal"],
            long_video=call.get("read_long_video", False),
            incomplete=call.get("last_frames_handle", "repeat"),
        )
        case.check(f"output.val{number}.num_batches", torch.tensor(len(batches)))
        for index, batch in enumerate(batches):
            case.check(f"output.val{number}.batch{index}", torch.tensor(batch))


@golden("vidtok", "metrics")
def run_metrics(case):
    for call in case.spec["plan"]["calls"]:
        if "formula" in call:
            x, y = _videos_by_formula(call)
        else:
            x, y = case.input(call["x"]), case.input(call["y"])
        case.check(f"output.{call['tag']}.psnr", psnr(x, y))
        case.check(f"output.{call['tag']}.ssim", ssim(x, y))


def _videos_by_formula(call):
    """Evaluates a case's `value[ch,t,h,w] = ... computed in float64` for the phases it names."""
    formula = re.search(r"=\s*(.+?)\s+computed", call["formula"]).group(1)
    phases = {name: float(value) for name, value in re.findall(r"\b([xy]): ph=([-0-9.]+[0-9])", call["formula"])}
    batch, channels = (int(re.search(p, call["formula"]).group(1)) for p in (r"batch (\d+)", r"(\d+) channels"))
    ch, t, h, w = np.meshgrid(
        *(np.arange(n, dtype=np.float64) for n in (channels, call["T"], call["H"], call["W"])), indexing="ij"
    )
    names = {"sin": np.sin, "cos": np.cos, "pi": math.pi, "ch": ch, "t": t, "h": h, "w": w, "__builtins__": {}}
    values = (eval(formula, {**names, "ph": phases[name]}) for name in ("x", "y"))
    return [torch.from_numpy(value.astype(np.float32)).expand(batch, *value.shape) for value in values]
