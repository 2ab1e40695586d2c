"""VidTwin's encode + decode on the CPU in float32, against the same amount of matrix products, and its peak memory.

    python benchmarks/vidtwin.py                 # released size: 312.7 M parameters, about 2 GB of memory
    python benchmarks/vidtwin.py --quick         # a small configuration, to see that it works; nothing is written

The model is saved with random weights and measured in a process of its own that loads it with `from_pretrained`, so the
peak memory is that of a user's process: imports, weights, activations. In it, runs of the model and runs of the trunk's
matrix products (its own shapes) take turns, so that both see the same machine. Operations are counted on the meta
device (multiply and add count as two); attention and convolutions count too. The first line of the result is the
model's time over what its operations take at the rate of the products; medians. The target is 15 % more at most, and
2 GB.
Results: benchmarks/results/vidtwin.json and vidtwin.md.
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
MAX_SLOWDOWN, MAX_PEAK_GB = 1.15, 2.0
QUICK = {
    "num_frames": 4,
    "height": 64,
    "width": 64,
    "hidden_size": 96,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "query_hidden_size": 16,
    "query_intermediate_size": 48,
    "structure_base_channels": 16,
}


def save_model(folder, quick):
    """Writes a model with random weights. Runs in a process of its own, to keep its memory out of the measurement."""
    import torch

    import cinetok

    torch.manual_seed(0)
    cinetok.VidTwinModel(cinetok.VidTwinConfig(**(QUICK if quick else {}))).save_pretrained(folder)


def count_flops(config):
    """Operations of encode + decode of one window."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import cinetok

    with torch.device("meta"):
        model = cinetok.VidTwinModel(config).requires_grad_(False)
    # written-out attention, whose two matrix products the counter sees
    model.set_attn_implementation("eager")
    shape = (1, config.num_frames, config.num_channels, config.height, config.width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta"), return_loss=False)
    return counter.get_total_flops()


def measure(folder, repeats, threads):
    """Runs in the child process: one measurement as a dict."""
    import torch

    import cinetok

    torch.set_num_threads(threads)
    model = cinetok.VidTwinModel.from_pretrained(folder).eval()
    config = model.config
    generator = torch.Generator().manual_seed(0)
    video = torch.rand((1, config.num_frames, config.num_channels, config.height, config.width), generator=generator)
    video = video * 2 - 1

    width, wide = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    tokens = config.num_frames * config.grid_size[0] * config.grid_size[1]
    narrow_input, wide_input = torch.randn(tokens, width), torch.randn(tokens, wide)
    block = model.encoder.blocks[0]
    layers = [block.attn.qkv, block.attn.proj, block.attn_temp.qkv, block.attn_temp.proj, block.mlp.fc1, block.mlp.fc2]
    weights = [layer.weight.t() for layer in layers]
    outputs = {size: torch.empty(tokens, size) for size in {weight.shape[1] for weight in weights}}
    product_flops = sum(2 * tokens * weight.numel() for weight in weights)

    def products():
        for weight in weights:
            torch.mm(narrow_input if weight.shape[0] == width else wide_input, weight, out=outputs[weight.shape[1]])

    def run():
        latents = model.encode(video)
        return model.decode(latents.structure, latents.dynamics_x, latents.dynamics_y).reconstruction

    def timed(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    with torch.no_grad():
        run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # before the products add to it
        timed(products)
        product_seconds, model_seconds = [], []
        for _ in range(repeats):
            product_seconds += [timed(products) for _ in range(4)]
            model_seconds.append(timed(run))
            product_seconds += [timed(products) for _ in range(4)]
    rate = product_flops / statistics.median(product_seconds)
    seconds, flops = statistics.median(model_seconds), count_flops(config)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tflop": flops / 1e12,
        "seconds": seconds,
        "matrix_product_gflop_per_s": rate / 1e9,
        "slowdown": seconds * rate / flops,
        "process_peak_gb": peak,
        "frames_per_second": config.num_frames / seconds,
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
            "| encode + decode of one window | measured | target |",
            "|---|---|---|",
            f"| time over the same work in matrix products | {row['slowdown']:.2f} | {MAX_SLOWDOWN} |",
            f"| process peak, GB | {row['process_peak_gb']:.2f} | {MAX_PEAK_GB} |",
            f"| time, s | {row['seconds']:.2f} | |",
            f"| work, TFLOP | {row['tflop']:.3f} | |",
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
    return done.stdout.strip().split("\n")[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small configuration, nothing written")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of vidtwin.json and vidtwin.md")
    parser.add_argument("--save", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.save:
        save_model(arguments.save, arguments.quick)
        return
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.repeats, arguments.threads)))
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
    (arguments.output / "vidtwin.json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"# VidTwin on {record['machine']}, {row['threads']} threads, float32\n\n"
    (arguments.output / "vidtwin.md").write_text(heading + table(row))


if __name__ == "__main__":
    main()
