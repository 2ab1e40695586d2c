"""Speed and memory of Video-LaVIT's tokenizers, its video U-Net and its motion extraction, on the CPU in float32.

    python benchmarks/video_lavit.py                         # released sizes; up to about 9 GB of memory
    python benchmarks/video_lavit.py --quick                 # small networks, to see that it works
    python benchmarks/video_lavit.py --only unet --height 128 --width 192
    python benchmarks/video_lavit.py --only extraction --video clip.mp4

Networks: each runs in a process of its own with random weights, in turns with a large matrix product, so that both
see the same machine; rates are medians, and the share is the network's rate divided by the product's. Operations are
counted on the meta device (multiply and add are two). Peak memory is the whole process's, imports and weights included.
Extraction: `read_motion_vectors` in turns with a plain decode + re-encode of the same clip with the same settings; the
ratio of their medians. Results go to benchmarks/results/video_lavit.json and .md (with --quick only to the screen).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("visual_tokenizer", "motion_encode", "motion_decode", "unet")
MATRIX = 3072
# The original's seconds for one image and one clip on a two-core machine; shown for comparison only.
ORIGINAL_SECONDS = {"visual_tokenizer": 5.9, "motion_encode": 9.0, "motion_decode": 9.6}
QUICK = {
    "visual_tokenizer": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
                         "merger_num_hidden_layers": 1, "merger_num_attention_heads": 4, "codebook_size": 64},
    "motion_encode": {"hidden_size": 64, "layers_per_stage": 1},
    "motion_decode": {"hidden_size": 64, "layers_per_stage": 1},
    "unet": {"block_out_channels": (32, 64, 64, 64), "num_attention_heads": (1, 2, 2, 2), "cross_attention_dim": 32},
}  # fmt: skip


def build(name, quick, height, width):
    """(module on the meta device, function(module, device) that runs it once)."""
    import torch

    from cinetok.conversion.video_lavit_parts import build as component

    arguments = QUICK[name] if quick else {}
    module = component(name if name in ("unet", "visual_tokenizer") else "motion_tokenizer", arguments)
    module.to("meta")  # diffusers' blending factors are made on the CPU regardless

    def run(module, device):
        generator = torch.Generator().manual_seed(0) if device == "cpu" else None

        def draw(*shape):
            return torch.randn(shape, generator=generator, device=device)

        if name == "visual_tokenizer":
            pixels, noise = draw(1, 3, 224, 224), draw(1, 256, 2)
            # On the meta device the number of kept positions is unknown; quantization is a negligible share.
            features = module.encoder(pixels)[:, 1:]
            scores = module.token_predictor(features) + noise
            return module.causal_encoder(features, scores[..., 0] >= scores[..., 1])
        if name == "motion_encode":
            return module.encode(draw(1, 2, 24, 20, 36)).indices
        if name == "motion_decode":
            return module.decode(quantized=draw(1, module.config.codebook_dim, 3, 5, 9)).reconstruction
        condition = draw(1, 24, 256, module.config.cross_attention_dim)
        ids = torch.tensor([[6.0, 127.0, 0.02]], device=device)
        sample = draw(1, 24, 10, height // 8, width // 8)
        return module(sample, torch.tensor(0.5, device=device), condition, ids).sample

    return module.requires_grad_(False), run


def run_network(name, quick, repeats, height, width):
    """Measures one network in this process; returns a dictionary."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module, run = build(name, quick, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(module, "meta")
    operations = counter.get_total_flops()
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    if name == "unet":
        # Spatial convolutions dominate; activations then stay channels-last from the first of them on.
        for convolution in (part for part in module.modules() if isinstance(part, torch.nn.Conv2d)):
            convolution.to(memory_format=torch.channels_last)
    side = 512 if quick else MATRIX
    left, right = torch.randn(side, side), torch.randn(side, side)
    product, seconds = torch.empty(side, side), {"network": [], "product": []}
    with torch.no_grad():
        run(module, "cpu")
        for _ in range(repeats):
            for key, call in (
                ("product", lambda: torch.mm(left, right, out=product)),
                ("network", lambda: run(module, "cpu")),
                ("product", lambda: torch.mm(left, right, out=product)),
            ):
                start = time.perf_counter()
                call()
                seconds[key].append(time.perf_counter() - start)
    network = statistics.median(seconds["network"])
    rate = operations / network
    product_rate = 2 * side**3 / statistics.median(seconds["product"])
    return {
        "gflop": operations / 1e9,
        "seconds": network,
        "original_seconds": None if quick else ORIGINAL_SECONDS.get(name),
        "gflops_per_second": rate / 1e9,
        "product_gflops_per_second": product_rate / 1e9,
        "share": rate / product_rate,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "weights_gb": sum(p.numel() * p.element_size() for p in module.parameters()) / 1e9,
    }


def plain_transcode(path, fps):
    """Decodes a clip and encodes it to MPEG-4 Part 2 at `fps`, with the settings of `read_motion_vectors`."""
    import av

    encoder, size = None, 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        graph = av.filter.Graph()
        chain = [
            graph.add_buffer(template=stream),
            graph.add("fps", str(fps)),
            graph.add("format", "yuv420p"),
            graph.add("buffersink"),
        ]
        for left, right in zip(chain, chain[1:]):
            left.link_to(right)
        graph.configure()
        encoder = av.CodecContext.create("mpeg4", "w")
        encoder.width, encoder.height, encoder.pix_fmt = stream.width, stream.height, "yuv420p"
        encoder.time_base, encoder.bit_rate, encoder.gop_size, encoder.thread_count = Fraction(1, fps), 8_000_000, 12, 1
        for frame in (*container.decode(stream), None):
            chain[0].push(frame)
            while True:
                try:
                    picture = chain[-1].pull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
                picture.pict_type = 0
                size += sum(packet.size for packet in encoder.encode(picture))
        size += sum(packet.size for packet in encoder.encode(None))
    return size


def synthetic_clip(path, seconds=8, height=360, width=640):
    """A moving texture with noise, H.264: for machines without a clip at hand."""
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (height // 8 + 40, width // 8 + 80, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for t in range(30 * seconds):
            frame = np.ascontiguousarray(texture[t : t + height, 2 * t : 2 * t + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def run_extraction(video, repeats, quick):
    """Ratio of the time of `read_motion_vectors` to that of a plain decode + re-encode."""
    from cinetok import read_motion_vectors

    with tempfile.TemporaryDirectory() as folder:
        path = video or synthetic_clip(Path(folder) / "clip.mp4", seconds=2 if quick else 8)
        results = {}
        for fps in (6, 12):
            seconds = {"plain": [], "extraction": []}
            for _ in range(max(3, repeats)):
                for key, call in (("plain", plain_transcode), ("extraction", read_motion_vectors)):
                    start = time.perf_counter()
                    call(path, fps)
                    seconds[key].append(time.perf_counter() - start)
            medians = {key: statistics.median(values) for key, values in seconds.items()}
            results[f"{fps} fps"] = {**medians, "ratio": medians["extraction"] / medians["plain"]}
    return results


def table(results):
    lines = []
    if results["networks"]:
        lines += [
            "| network | GFLOP | seconds | original, s | GFLOP/s | product, GFLOP/s | share | peak GB | weights GB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for name, row in results["networks"].items():
        original = f"{row['original_seconds']:.1f}" if row["original_seconds"] else ""
        lines.append(
            f"| {name} | {row['gflop']:.0f} | {row['seconds']:.2f} | {original} | {row['gflops_per_second']:.0f} | "
            f"{row['product_gflops_per_second']:.0f} | {row['share']:.2f} | {row['peak_gb']:.2f} | "
            f"{row['weights_gb']:.2f} |"
        )
    if results["extraction"]:
        lines += [
            "",
            "| motion extraction | plain decode + re-encode, s | with vectors, s | ratio |",
            "|---|---|---|---|",
        ]
    for name, row in results["extraction"].items():
        lines.append(f"| {name} | {row['plain']:.3f} | {row['extraction']:.3f} | {row['ratio']:.2f} |")
    return "\n".join(lines).strip()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=(*NETWORKS, "extraction"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--height", type=int, default=128, help="of the U-Net's frames in pixels")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--video", help="clip for the extraction; default: a synthetic one")
    parser.add_argument("--child", choices=NETWORKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    size = (arguments.height, arguments.width)
    if arguments.child:
        print(json.dumps(run_network(arguments.child, arguments.quick, arguments.repeats, *size)))
        return
    chosen = arguments.only or (*NETWORKS, "extraction")
    results = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "networks": {}}
    results["unet_frames"] = [24, *size]
    for name in [name for name in NETWORKS if name in chosen]:
        command = [sys.executable, __file__, "--child", name, "--repeats", str(arguments.repeats)]
        command += ["--height", str(size[0]), "--width", str(size[1])] + ["--quick"] * arguments.quick
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results["networks"][name] = json.loads(output.strip().splitlines()[-1])
    wanted = "extraction" in chosen
    results["extraction"] = run_extraction(arguments.video, arguments.repeats, arguments.quick) if wanted else {}
    print(table(results))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "video_lavit.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "video_lavit.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
