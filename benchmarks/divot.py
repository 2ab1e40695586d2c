"""Speed and memory of Divot's tokenizer and U-Net on the CPU in float32, as a share of the matrix-product rate.

    python benchmarks/divot.py                    # released sizes; about 10 GB of memory and some minutes
    python benchmarks/divot.py --quick            # small configurations, to see that it works
    python benchmarks/divot.py --only unet --repeats 5

Every model runs in a process of its own with random weights. There, runs of the model and runs of a large float32
matrix product take turns, so that both see the same machine; rates are medians. Peak memory is that of the whole
process, imports and weights included. Operations are counted on the meta device (multiply and add count as two).
Results go to benchmarks/results/divot.json and divot.md (with --quick only to the screen).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MATRIX = 4096
# share of the matrix-product rate (at least), process peak in GB (at most)
TARGETS = {"tokenizer": (0.95, 3.9), "unet": (0.90, 7.4)}
# Operations of the original for one clip (5 frames) and one forward (16 frames of 32x32 latents). Shares refer to it:
# what this implementation saves (keys and values of the condition once instead of per frame) counts as speed.
ORIGINAL_TFLOP = {"tokenizer": 1.76, "unet": 4.94}


def build(name, quick):
    """(module on the meta device, function(module, device) that runs it once)."""
    import torch

    import cinetok

    with torch.device("meta"):
        if name == "tokenizer":
            small = {
                "vision_config": {
                    "hidden_size": 128,
                    "intermediate_size": 512,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 224,
                    "patch_size": 14,
                    "hidden_act": "gelu",
                },
                "hidden_size": 128,
                "temporal_hidden_size": 96,
                "temporal_num_layers": 2,
            }
            model = cinetok.DivotTokenizerModel(cinetok.DivotTokenizerConfig(**(small if quick else {})))
        else:
            small = {"block_out_channels": [32, 64], "attention_levels": [True, True], "attention_head_dim": 16}
            model = cinetok.DivotUNet3DConditionModel(**(small | {"cross_attention_dim": 64} if quick else {}))

    def run(module, device):
        if name == "tokenizer":
            return module(torch.zeros(1, 5, 3, 256, 256, device=device)).features
        context = torch.zeros(1, 125, module.config.cross_attention_dim, device=device)
        return module(torch.zeros(1, 4, 16, 32, 32, device=device), torch.tensor([500], device=device), context).sample

    return model.eval().requires_grad_(False), run


def fill(module):
    """Puts random weights into a module on the meta device, without a second copy of them."""
    import torch

    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


def measure(name, quick, repeats, threads):
    """Runs in the child process: one measurement as a dict."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(threads)
    model, run = build(name, quick)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, "meta")
    counted = counter.get_total_flops()
    flops = counted if quick else ORIGINAL_TFLOP[name] * 1e12
    model = fill(model)
    if name == "unet":
        model.to(memory_format=torch.channels_last)  # as after from_pretrained

    def timed(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    products, models = [], []
    with torch.no_grad():
        timed(lambda: run(model, "cpu"))  # warm-up, and the peak before the matrices of the product are there
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        size = MATRIX // 8 if quick else MATRIX
        a, b = torch.randn(size, size), torch.randn(size, size)
        timed(lambda: a @ b)
        for _ in range(repeats):
            products.append(timed(lambda: a @ b))
            models.append(timed(lambda: run(model, "cpu")))
            products.append(timed(lambda: a @ b))
    rate = 2 * size**3 / statistics.median(products)
    seconds = statistics.median(models)
    return {
        "model": name,
        "tflop": flops / 1e12,
        "tflop_counted": counted / 1e12,
        "seconds": seconds,
        "matrix_product_gflop_per_s": rate / 1e9,
        "share_of_matrix_product_rate": flops / seconds / rate,
        "process_peak_gb": peak / 1e9,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
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


def table(rows):
    """The measurements as a markdown table."""
    lines = [
        "| model | work, TFLOP | time, s | share of the matrix-product rate | target | process peak, GB | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share, peak = TARGETS[row["model"]]
        values = (
            row["model"],
            f"{row['tflop']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['share_of_matrix_product_rate']:.0%}",
            f"{share:.0%}",
            f"{row['process_peak_gb']:.2f}",
            f"{peak}",
        )
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small configurations, nothing written")
    parser.add_argument("--only", choices=sorted(TARGETS), help="measure only this model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of divot.json and divot.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.quick, arguments.repeats, arguments.threads)))
        return
    rows = []
    for name in TARGETS if arguments.only is None else [arguments.only]:
        command = [sys.executable, __file__, "--child", name, "--repeats", str(arguments.repeats)]
        command += ["--threads", str(arguments.threads), *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.strip().split("\n")[-1]))
    text = table(rows)
    print(text)
    if arguments.quick:
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "divot.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"machine": processor_name(), "dtype": "float32"}
    record["cpu"] = {**record.get("cpu", {}), **{row["model"]: row for row in rows}}
    path.write_text(json.dumps(record, indent=1) + "\n")
    known = [record["cpu"][name] for name in TARGETS if name in record["cpu"]]
    heading = f"# Divot on {record['machine']}, {known[0]['threads']} threads, float32\n\n"
    (arguments.output / "divot.md").write_text(heading + table(known))


if __name__ == "__main__":
    main()
