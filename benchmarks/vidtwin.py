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

import tempfile
from statistics import median

from measuring import (
    at_most,
    call,
    count_operations,
    finish,
    judge,
    markdown,
    on_meta,
    options,
    parameter_count,
    peak_gb,
    serve,
    set_up,
    take_turns,
    verdict,
)

TARGETS = {"slowdown": at_most(1.15), "process_peak_gb": at_most(2.0)}
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


def trunk_products(model):
    """(function that runs the matrix products of the model's first block, their operations); it has run once."""
    import torch

    config = model.config
    width, wide = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    tokens = config.num_frames * config.grid_size[0] * config.grid_size[1]
    narrow_input, wide_input = torch.randn(tokens, width), torch.randn(tokens, wide)
    block = model.encoder.blocks[0]
    layers = [block.attn.qkv, block.attn.proj, block.attn_temp.qkv, block.attn_temp.proj, block.mlp.fc1, block.mlp.fc2]
    weights = [layer.weight.t() for layer in layers]
    outputs = {size: torch.empty(tokens, size) for size in {weight.shape[1] for weight in weights}}

    def products():
        for weight in weights:
            torch.mm(narrow_input if weight.shape[0] == width else wide_input, weight, out=outputs[weight.shape[1]])

    products()
    return products, sum(2 * tokens * weight.numel() for weight in weights)


def measure(folder, repeats, threads):
    """(where, measurements). Runs in a process of its own."""
    import torch

    import cinetok

    record = set_up(threads)
    model = cinetok.VidTwinModel.from_pretrained(folder).eval()
    config = model.config
    shape = (1, config.num_frames, config.num_channels, config.height, config.width)
    video = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def run():
        latents = model.encode(video)
        return model.decode(latents.structure, latents.dynamics_x, latents.dynamics_y).reconstruction

    with torch.no_grad():
        run()
        peak = peak_gb()  # before the products add to it
        products, operations = trunk_products(model)
        seconds = take_turns([*4 * [products], run, *4 * [products]], repeats)
    meta = on_meta(model)
    meta.set_attn_implementation("eager")  # written-out attention, whose two matrix products are counted
    work = count_operations(lambda: meta(video.to("meta"), return_loss=False))
    model_seconds, rate = median(seconds[run]), operations / median(seconds[products])
    row = {
        "parameters": parameter_count(model),
        "tflop": work / 1e12,
        "seconds": model_seconds,
        "matrix_product_gflop_per_s": rate / 1e9,
        "slowdown": model_seconds * rate / work,
        "process_peak_gb": peak,
        "frames_per_second": config.num_frames / model_seconds,
        "repeats": repeats,
    }
    return record, judge(row, TARGETS)


def table(row):
    """The measurement as a markdown table."""
    return markdown(
        ["encode + decode of one window", "measured", "target", ""],
        [
            ["time over the same work in matrix products", f"{row['slowdown']:.2f}", *verdict(row, "slowdown")],
            ["process peak, GB", f"{row['process_peak_gb']:.2f}", *verdict(row, "process_peak_gb")],
            ["time, s", f"{row['seconds']:.2f}", "", ""],
            ["work, TFLOP", f"{row['tflop']:.3f}", "", ""],
            ["matrix products, GFLOP/s", f"{row['matrix_product_gflop_per_s']:.0f}", "", ""],
            ["parameters, M", f"{row['parameters'] / 1e6:.1f}", "", ""],
        ],
    )


def main():
    serve(save_model, measure)
    arguments = options(__doc__, "vidtwin.json and vidtwin.md", repeats=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        call(save_model, folder=folder, quick=arguments.quick)
        record, row = call(measure, folder=folder, repeats=arguments.repeats, threads=arguments.threads)
    finish(arguments, "vidtwin", "VidTwin", {**record, "model": row}, table(row))


if __name__ == "__main__":
    main()
