"""Speed and memory of Divot-LLM with random weights, beside the matrix-product rate of the same run.

    python benchmarks/divot_llm.py                     # GPU: released size in bfloat16 (about 16 GB);
                                                       # CPU: two of the 32 layers at released width in float32 (4 GB)
    python benchmarks/divot_llm.py --quick             # a small model, to see that it works
    python benchmarks/divot_llm.py --layers 4 --repeats 5

Three steps: reading a video of 20 clips and a question ("prefill"), writing one more token of text with the cache
("decode"), and reading a prompt and drawing the features of a clip ("features"). Each takes turns with a large matrix
product, so that both see the same machine; times are medians. Operations are those of the matrix products (two per
multiply-add). Results go to benchmarks/results/divot_llm_<device>.json and .md (with --quick only to the screen).
"""

from statistics import median

import torch
from measuring import finish, markdown, matrix_product, options, parameter_count, peak_gb, set_up, take_turns

NUM_CLIPS, QUESTION, PROMPT = 20, 24, 32  # clips and tokens of text


def build(quick, layers, device, dtype):
    """`DivotForCausalLM` with random weights, made in place."""
    from cinetok import DivotConfig, DivotForCausalLM
    from cinetok.modeling.divot.configuration_divot_llm import MISTRAL_7B_DIVOT

    text = dict(MISTRAL_7B_DIVOT)
    if quick:
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    if quick or layers:
        text["num_hidden_layers"] = layers or 2
    with torch.device("meta"):
        model = DivotForCausalLM(DivotConfig(text_config=text)).to(dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    rotary = model.language_model.rotary_emb
    frequencies, _ = rotary.compute_default_rope_parameters(model.config.text_config)
    rotary.inv_freq = frequencies.to(device)
    return model.eval().requires_grad_(False)


def steps(model, device):
    """name -> (function that runs the step once, tokens it computes)."""
    config = model.config
    queries = list(config.query_token_ids)
    clip = [config.frame_start_token_id, *queries, config.frame_end_token_id]
    video = [config.video_start_token_id, *(NUM_CLIPS * clip), config.video_end_token_id]
    ids = torch.tensor([[1, *video, *range(100, 100 + QUESTION)]], device=device)
    features = torch.randn(NUM_CLIPS, config.num_query_tokens, config.feature_dim, device=device)
    mask = torch.ones(1, ids.shape[1] + 1, dtype=torch.long, device=device)
    head = [1, *range(100, 100 + PROMPT), config.video_start_token_id, config.frame_start_token_id]
    prompt = torch.tensor([[*head, *queries]], device=device)
    marks = torch.tensor([[1] * len(head) + [-1] * len(queries)], device=device)

    def prefill():
        return model(ids, attention_mask=mask[:, :-1], video_features=features, use_cache=True, logits_to_keep=1)

    cache = prefill().past_key_values
    length = ids.shape[1]

    def decode():
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)  # the token again next time

    def draw():
        return model.generate_video_features(prompt, marks, generator=torch.Generator().manual_seed(0))

    return {"prefill": (prefill, length), "decode": (decode, 1), "features": (draw, prompt.shape[1])}


def operations(model, name, tokens):
    """Operations of a step's matrix products, without attention scores."""
    text = model.language_model
    weights = sum(p.numel() for n, p in text.named_parameters() if n.endswith("_proj.weight"))
    total = 2 * tokens * weights + 2 * model.lm_head.weight.numel()
    if name == "prefill":
        matrices = [p.numel() for p in model.model.input_resampler.parameters() if p.ndim == 2]
        total += 2 * NUM_CLIPS * model.config.num_query_tokens * sum(matrices)
    if name == "features":
        matrices = [p.numel() for p in model.output_resampler.parameters() if p.ndim == 2]
        total += 2 * model.config.num_query_tokens * sum(matrices)
    return total


def measure(arguments):
    """(where, measurements)."""
    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    record = set_up(arguments.threads, str(dtype).removeprefix("torch."))
    layers = arguments.layers or (0 if device == "cuda" else 2)
    model = build(arguments.quick, layers, device, dtype)
    side = 512 if arguments.quick else 8192 if device == "cuda" else 4096
    record["device"] = torch.cuda.get_device_name() if device == "cuda" else record["machine"]
    result = {
        "layers": model.config.text_config.num_hidden_layers,
        "parameters": parameter_count(model),
        "repeats": arguments.repeats,
        "steps": {},
    }
    with torch.no_grad():
        prepared = steps(model, device)
        for run, _ in prepared.values():
            run()
        result["process_peak_gb"] = peak_gb()  # before the products add to it
        if device == "cuda":
            result["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        product, product_operations = matrix_product(side, device, dtype)
        for name, (run, tokens) in prepared.items():
            times = take_turns([run, product], arguments.repeats, device)
            seconds = median(times[run])
            rate, product_rate = operations(model, name, tokens) / seconds, product_operations / median(times[product])
            result["steps"][name] = {
                "tokens": tokens,
                "seconds": seconds,
                "tflop_per_s": rate / 1e12,
                "matrix_product_tflop_per_s": product_rate / 1e12,
                "share_of_matrix_product_rate": rate / product_rate,
                "weights_gb_per_s": sum(p.numel() * p.element_size() for p in model.parameters()) / seconds / 1e9,
            }
    return record, result


def report(record, result):
    """The measurements in words and as a markdown table."""
    lines = [
        [
            name,
            f"{row['tokens']}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['tflop_per_s']:.3g}",
            f"{row['matrix_product_tflop_per_s']:.3g}",
            f"{row['share_of_matrix_product_rate']:.0%}",
        ]
        for name, row in result["steps"].items()
    ]
    memory = f"process peak {result['process_peak_gb']:.1f} GB"
    if "gpu_peak_gb" in result:
        memory += f", GPU peak {result['gpu_peak_gb']:.1f} GB"
    text = f"{record['device']}, {result['layers']} layers, {result['parameters'] / 1e9:.2f} B parameters, {memory}"
    header = ["step", "tokens", "ms", "TFLOP/s", "matrix product TFLOP/s", "share"]
    return f"{text}\n\n{markdown(header, lines)}"


def main():
    parser = options(__doc__, "divot_llm_<device>.json and .md", repeats=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (default: 32 on a GPU, 2 on a CPU)")
    arguments = parser.parse_args()
    record, result = measure(arguments)
    finish(arguments, f"divot_llm_{arguments.device}", "Divot-LLM", {**record, **result}, report(record, result))


if __name__ == "__main__":
    main()
