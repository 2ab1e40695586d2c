"""Speed and memory of Video-LaVIT's tokenizers, its video U-Net and its motion extraction, on the CPU in float32.

    python benchmarks/video_lavit.py                         # released sizes; up to about 9 GB of memory
    python benchmarks/video_lavit.py --quick                 # small networks, to see that it works
    python benchmarks/video_lavit.py --only unet --height 128 --width 192
    python benchmarks/video_lavit.py --only extraction --video clip.mp4

Networks: each is saved with random weights and measured in a process of its own that loads it with `from_pretrained`, so
the peak memory is that of a user's process: imports, weights, activations. In it, runs of the network and of a large
matrix product take turns, so that both see the same machine; rates are medians, and the share is the network's rate
divided by the product's. Operations are counted on the meta device (multiply and add are two). The target is a share of
0.85.
Extraction: `read_motion_vectors` in turns with a plain decode + re-encode of the same clip with the same settings; the
ratio of their medians. The target is a ratio of 1.5.
Results go to benchmarks/results/video_lavit.json and .md (with --quick only to the screen).
"""

import tempfile
from fractions import Fraction
from pathlib import Path
from statistics import median

from measuring import (
    at_least,
    at_most,
    call,
    count_operations,
    earlier,
    finish,
    judge,
    markdown,
    matrix_product,
    on_meta,
    options,
    parameter_count,
    peak_gb,
    serve,
    set_up,
    take_turns,
    verdict,
)

NETWORKS = ("visual_tokenizer", "motion_encode", "motion_decode", "unet")
NETWORK_TARGETS, EXTRACTION_TARGETS = {"share": at_least(0.85)}, {"ratio": at_most(1.5)}
# The original's seconds for one image and one clip on a two-core machine; shown for comparison only.
ORIGINAL_SECONDS = {"visual_tokenizer": 5.9, "motion_encode": 9.0, "motion_decode": 9.6}
QUICK = {
    "visual_tokenizer": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
                         "merger_num_hidden_layers": 1, "merger_num_attention_heads": 4, "codebook_size": 64},
    "motion_encode": {"hidden_size": 64, "layers_per_stage": 1},
    "motion_decode": {"hidden_size": 64, "layers_per_stage": 1},
    "unet": {"block_out_channels": (32, 64, 64, 64), "num_attention_heads": (1, 2, 2, 2), "cross_attention_dim": 32},
}  # fmt: skip


def network_class(name):
    import cinetok

    if name == "unet":
        return cinetok.VideoLavitUNetSpatioTemporalConditionModel
    return cinetok.VideoLavitVisualTokenizer if name == "visual_tokenizer" else cinetok.VideoLavitMotionTokenizer


def save_network(name, folder, quick):
    """Writes a network with random weights. Runs in a process of its own, to keep its memory out of the measurement."""
    import torch

    torch.manual_seed(0)
    kind, arguments = network_class(name), QUICK[name] if quick else {}
    module = kind(**arguments) if name == "unet" else kind(kind.config_class(**arguments))
    module.save_pretrained(folder)


def forward(name, module, height, width, device="cpu"):
    """One run of a network."""
    import torch

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


def measure_network(name, folder, repeats, threads, quick, height, width):
    """(where, measurements). Runs in a process of its own."""
    import torch

    record = set_up(threads)
    module = network_class(name).from_pretrained(folder).eval()

    def run():
        forward(name, module, height, width)

    with torch.no_grad():
        run()
        peak = peak_gb()  # before the products add to it
        product, operations = matrix_product(512 if quick else 3072)
        seconds = take_turns([product, run, product], repeats)
    meta = on_meta(module)
    work = count_operations(lambda: forward(name, meta, height, width, "meta"))
    rate, product_rate = work / median(seconds[run]), operations / median(seconds[product])
    row = {
        "gflop": work / 1e9,
        "seconds": median(seconds[run]),
        "original_seconds": None if quick else ORIGINAL_SECONDS.get(name),
        "gflop_per_s": rate / 1e9,
        "matrix_product_gflop_per_s": product_rate / 1e9,
        "share": rate / product_rate,
        "process_peak_gb": peak,
        "parameters": parameter_count(module),
        "repeats": repeats,
    }
    if name == "unet":
        row["frames"] = [24, height, width]
    return record, judge(row, NETWORK_TARGETS)


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


def measure_extraction(video, repeats, threads, quick):
    """(where, ratio of the time of `read_motion_vectors` to that of a plain decode + re-encode). Runs in a process."""
    from cinetok import read_motion_vectors

    record, rows = set_up(threads), {}
    with tempfile.TemporaryDirectory() as folder:
        path = video or synthetic_clip(Path(folder) / "clip.mp4", seconds=2 if quick else 8)
        for fps in (6, 12):

            def plain(fps=fps):
                plain_transcode(path, fps)

            def extract(fps=fps):
                read_motion_vectors(path, fps)

            seconds = {function: median(times) for function, times in take_turns([plain, extract], repeats).items()}
            row = {"plain_seconds": seconds[plain], "seconds": seconds[extract], "repeats": repeats}
            rows[f"{fps} fps"] = judge({**row, "ratio": seconds[extract] / seconds[plain]}, EXTRACTION_TARGETS)
    return record, rows


def network_table(rows):
    header = [
        "network",
        "GFLOP",
        "seconds",
        "original, s",
        "GFLOP/s",
        "matrix products, GFLOP/s",
        "share",
        "target",
        "",
    ]
    lines = [
        [
            name,
            f"{row['gflop']:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['original_seconds']:.1f}" if row["original_seconds"] else "",
            f"{row['gflop_per_s']:.0f}",
            f"{row['matrix_product_gflop_per_s']:.0f}",
            f"{row['share']:.2f}",
            *verdict(row, "share"),
            f"{row['process_peak_gb']:.2f}",
            f"{row['parameters'] / 1e6:.1f}",
        ]
        for name, row in rows.items()
    ]
    return markdown([*header, "process peak, GB", "parameters, M"], lines)


def extraction_table(rows):
    lines = [
        [
            name,
            f"{row['plain_seconds']:.3f}",
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.2f}",
            *verdict(row, "ratio"),
        ]
        for name, row in rows.items()
    ]
    header = ["motion extraction", "plain decode + re-encode, s", "with vectors, s", "ratio", "target", ""]
    return markdown(header, lines)


def main():
    serve(save_network, measure_network, measure_extraction)
    parser = options(__doc__, "video_lavit.json and .md", repeats=3)
    parser.add_argument("--only", action="append", choices=(*NETWORKS, "extraction"))
    parser.add_argument("--height", type=int, default=128, help="of the U-Net's frames in pixels")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--video", help="clip for the extraction; default: a synthetic one")
    arguments = parser.parse_args()
    chosen, quick, networks, extraction = arguments.only or (*NETWORKS, "extraction"), arguments.quick, {}, {}
    common = {"threads": arguments.threads, "quick": quick}
    for name in [name for name in NETWORKS if name in chosen]:
        size = {"height": arguments.height, "width": arguments.width}
        with tempfile.TemporaryDirectory() as folder:
            call(save_network, name=name, folder=folder, quick=quick)
            record, networks[name] = call(
                measure_network, name=name, folder=folder, repeats=arguments.repeats, **common, **size
            )
    if "extraction" in chosen:
        record, extraction = call(
            measure_extraction, video=arguments.video, repeats=max(3, arguments.repeats), **common
        )
    if not quick:
        path = arguments.output / "video_lavit.json"
        networks = {**earlier(path, record, "networks"), **networks}
        networks = {name: networks[name] for name in NETWORKS if name in networks}
        extraction = extraction or earlier(path, record, "extraction")
    tables = [network_table(networks)] * bool(networks) + [extraction_table(extraction)] * bool(extraction)
    record = {**record, "networks": networks, "extraction": extraction}
    finish(arguments, "video_lavit", "Video-LaVIT", record, "\n".join(tables))


if __name__ == "__main__":
    main()
