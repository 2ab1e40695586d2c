"""One forward of Seer's U-Net on the CPU in float32, against the rate of matrix products, and its peak memory.

    python benchmarks/seer.py                 # released size: 12 frames of 32x32 latents, about 5 GB of memory
    python benchmarks/seer.py --quick         # a small configuration, to see that it works; nothing is written

The U-Net is saved with random weights and measured in a process of its own that loads it with `from_pretrained`, so the
peak memory is that of a user's process: imports, weights, activations. In it, forwards and products of square matrices
take turns, so that both see the same machine. The ratio is the U-Net's rate over that of the products (medians).

The U-Net's work at the released size is taken as 2.67 TFLOP, the figure known for the authors' code. Our own count of
its convolutions and linear layers (multiply and add count as two; attention left out) is printed beside it. Targets,
which are what the authors' code reached: a ratio of 0.95 and 5.2 GB.
Results: benchmarks/results/seer.json and seer.md.
"""

import tempfile
from statistics import median

from measuring import (
    at_least,
    at_most,
    call,
    count_operations,
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

TARGETS = {"ratio": at_least(0.95), "process_peak_gb": at_most(5.2)}
RELEASED_TFLOP = 2.67
SHAPE = (12, 32, 32)  # frames, latent height, latent width
TOKENS = 77
QUICK = {"block_out_channels": (64, 64, 128, 128), "num_attention_heads": 4, "cross_attention_dim": 64}
QUICK_SHAPE = (4, 16, 16)


def save_model(folder, quick):
    """Writes a U-Net with random weights. Runs in a process of its own, to keep its memory out of the measurement."""
    import torch

    import cinetok

    torch.manual_seed(0)
    cinetok.SeerUNet3DConditionModel(**(QUICK if quick else {})).save_pretrained(folder)


def measure(folder, repeats, threads, quick):
    """(where, measurements). Runs in a process of its own."""
    import torch

    import cinetok

    record = set_up(threads)
    unet = cinetok.SeerUNet3DConditionModel.from_pretrained(folder).eval()
    shape = QUICK_SHAPE if quick else SHAPE
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, unet.config.in_channels, *shape, generator=generator)
    text = torch.randn(1, shape[0], TOKENS, unet.config.cross_attention_dim, generator=generator)

    def run():
        unet(sample, 500, text)

    with torch.inference_mode():
        run()
        peak = peak_gb()  # before the products add to it
        product, operations = matrix_product(512 if quick else 2048)
        seconds = take_turns([*5 * [product], run, *5 * [product]], repeats)
    meta = on_meta(unet)
    counted = count_operations(lambda: meta(sample.to("meta"), 500, text.to("meta")), without=["attention"])
    work = counted if quick else RELEASED_TFLOP * 1e12
    unet_seconds, rate = median(seconds[run]), operations / median(seconds[product])
    row = {
        "parameters": parameter_count(unet),
        "num_frames": shape[0],
        "tflop": work / 1e12,
        "tflop_counted": counted / 1e12,
        "seconds": unet_seconds,
        "matrix_product_gflop_per_s": rate / 1e9,
        "ratio": work / unet_seconds / rate,
        "ratio_of_counted": counted / unet_seconds / rate,
        "process_peak_gb": peak,
        "repeats": repeats,
    }
    return record, judge(row, TARGETS)


def table(row):
    """The measurement as a markdown table."""
    return markdown(
        [f"one U-Net forward, {row['num_frames']} frames", "measured", "target", ""],
        [
            ["rate over that of matrix products", f"{row['ratio']:.3f}", *verdict(row, "ratio")],
            ["the same with our count of the work", f"{row['ratio_of_counted']:.3f}", "", ""],
            ["process peak, GB", f"{row['process_peak_gb']:.2f}", *verdict(row, "process_peak_gb")],
            ["time, s", f"{row['seconds']:.2f}", "", ""],
            ["work, TFLOP (our count)", f"{row['tflop']:.3f} ({row['tflop_counted']:.3f})", "", ""],
            ["matrix products, GFLOP/s", f"{row['matrix_product_gflop_per_s']:.0f}", "", ""],
            ["parameters, M", f"{row['parameters'] / 1e6:.1f}", "", ""],
        ],
    )


def main():
    serve(save_model, measure)
    arguments = options(__doc__, "seer.json and seer.md", repeats=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        call(save_model, folder=folder, quick=arguments.quick)
        record, row = call(
            measure, folder=folder, repeats=arguments.repeats, threads=arguments.threads, quick=arguments.quick
        )
    finish(arguments, "seer", "Seer's U-Net", {**record, "unet": row}, table(row))


if __name__ == "__main__":
    main()
