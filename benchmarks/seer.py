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
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MIN_RATIO, MAX_PEAK_GB = 0.95, 5.2
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


def count_flops(config, shape):
    """Operations of the convolutions and linear layers of one forward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import cinetok

    with torch.device("meta"):
        unet = cinetok.SeerUNet3DConditionModel.from_config(config).requires_grad_(False)
        sample = torch.empty(1, config["in_channels"], *shape)
        text = torch.empty(1, shape[0], TOKENS, config["cross_attention_dim"])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(sample, 500, text)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "attention" not in str(operation))


def measure(folder, repeats, threads, quick):
    """Runs in the child process: one measurement as a dict."""
    import torch

    import cinetok

    torch.set_num_threads(threads)
    unet = cinetok.SeerUNet3DConditionModel.from_pretrained(folder).eval()
    shape = QUICK_SHAPE if quick else SHAPE
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, unet.config.in_channels, *shape, generator=generator)
    text = torch.randn(1, shape[0], TOKENS, unet.config.cross_attention_dim, generator=generator)
    side = 512 if quick else 2048

    def timed(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    with torch.inference_mode():
        unet(sample, 500, text)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # before the products add to it
        left, right = torch.randn(side, side), torch.randn(side, side)
        output = torch.empty(side, side)
        timed(lambda: torch.mm(left, right, out=output))
        product_seconds, unet_seconds = [], []
        for _ in range(repeats):
            product_seconds += [timed(lambda: torch.mm(left, right, out=output)) for _ in range(5)]
            unet_seconds.append(timed(lambda: unet(sample, 500, text)))
            product_seconds += [timed(lambda: torch.mm(left, right, out=output)) for _ in range(5)]
    rate = 2 * side**3 / statistics.median(product_seconds)
    seconds, counted = statistics.median(unet_seconds), count_flops(unet.config, shape) / 1e12
    work = counted if quick else RELEASED_TFLOP
    return {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "num_frames": shape[0],
        "tflop": work,
        "tflop_counted": counted,
        "seconds": seconds,
        "matrix_product_gflop_per_s": rate / 1e9,
        "ratio": work * 1e12 / seconds / rate,
        "ratio_of_counted": counted * 1e12 / seconds / rate,
        "process_peak_gb": peak,
        "repeats": repeats,
        "threads": threads,
        "torch": torch.__version__,
    }


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(row):
    """The measurement as a markdown table."""
    return "\n".join(
        [
            f"| one U-Net forward, {row['num_frames']} frames | measured | target |",
            "|---|---|---|",
            f"| rate over that of matrix products | {row['ratio']:.3f} | {MIN_RATIO} |",
            f"| the same with our count of the work | {row['ratio_of_counted']:.3f} | |",
            f"| process peak, GB | {row['process_peak_gb']:.2f} | {MAX_PEAK_GB} |",
            f"| time, s | {row['seconds']:.2f} | |",
            f"| work, TFLOP (our count) | {row['tflop']:.3f} ({row['tflop_counted']:.3f}) | |",
            f"| matrix products, GFLOP/s | {row['matrix_product_gflop_per_s']:.0f} | |",
            f"| parameters, M | {row['parameters'] / 1e6:.1f} | |",
            "",
        ]
    )


def call(*arguments):
    """Runs this file in a process of its own and returns what it printed last."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().split("\n")[-1] if done.stdout.strip() else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small configuration, nothing written")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of seer.json and seer.md")
    parser.add_argument("--save", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.save:
        save_model(arguments.save, arguments.quick)
        return
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.repeats, arguments.threads, arguments.quick)))
        return
    quick = ["--quick"] if arguments.quick else []
    with tempfile.TemporaryDirectory() as folder:
        call("--save", folder, *quick)
        row = json.loads(
            call("--measure", folder, "--repeats", arguments.repeats, "--threads", arguments.threads, *quick)
        )
    print(table(row))
    if arguments.quick:
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"machine": processor_name(), "dtype": "float32", "cpu": row}
    (arguments.output / "seer.json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"# Seer's U-Net on {record['machine']}, {row['threads']} threads, float32\n\n"
    (arguments.output / "seer.md").write_text(heading + table(row))


if __name__ == "__main__":
    main()
