"""Golden kinds of VidTwin."""

import copy
import re

import torch

from cinetok.conversion import state_dict_names
from cinetok.conversion.checkpoints import load_strict
from cinetok.conversion.vidtwin import config_from_original
from cinetok.modeling.vidtwin.modeling_vidtwin import VidTwinModel

from . import Tolerance, defer, golden

defer("vidtwin", "loss", "the adversarial loss belongs to the trainers")
defer("vidtwin", "sched", "learning-rate schedules belong to the trainers")

_LATENTS = ("structure", "dynamics_x", "dynamics_y")


@golden("vidtwin", "vidtwin")
def run_vidtwin(case):
    config = config_from_original(case.config)
    model = VidTwinModel(config).eval()
    load_strict(model, state_dict_names("vidtwin", "model", config).to_hf(case.weights()), str(case.path))
    runs = {"reconstruct": _reconstruct, "cross": _cross, "only_part": _only_part}
    rounded = None
    for call in case.spec["plan"]["calls"]:
        if call.get("precision") == "mixed":
            rounded = rounded or with_rounded_blocks(model)
            # The path for training calls every layer as a module, whose hooks round; nothing here needs a gradient.
            with torch.enable_grad():
                runs[call["op"]](case, rounded, call)
        else:
            with torch.no_grad():
                runs[call["op"]](case, model, call)


def with_rounded_blocks(model):
    """A copy of a float32 model that computes as the published code does on a GPU, in the emulation of the cases.

    The blocks run under float16 autocast: linear layers take and give float16, with float16 weights and float32 sums
    (facts on VidTwin, section 2, "Precision"; `description` of the cases). Attention is given, and gives, bfloat16. The
    residual is not rounded. Emulated by rounding float32 values; the model itself has no such mode, and does not need one.
    """

    def rounds_to(module, dtype):
        def rounded(x):
            return x.to(dtype).to(x.dtype)

        module.register_forward_pre_hook(lambda module, args: (rounded(args[0]), *args[1:]))
        module.register_forward_hook(lambda module, args, output: rounded(output))
        return rounded

    model = copy.deepcopy(model).requires_grad_(False)
    for name, module in model.named_modules():
        if ".blocks." not in name:
            continue
        if isinstance(module, torch.nn.Linear):
            rounded = rounds_to(module, torch.float16)
            for parameter in module.parameters():
                parameter.data = rounded(parameter.data)
        elif name.rsplit(".", 1)[-1] in ("attn", "attn_temp"):
            rounds_to(module, torch.bfloat16)
    return model


def _reconstruct(case, model, call):
    tag = call["tag"]
    names = case.names(f"mid.{tag}.") if call.get("capture") else []
    captured, handles = {}, []

    def capture(recorded, module, of_input=False):
        # Called modules overwrite: what is recorded of a module that runs twice is its second run.
        if of_input:
            hook = lambda module, args: captured.__setitem__(recorded, args[0].clone())  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = lambda module, args, output: captured.__setitem__(recorded, output.clone())  # noqa: E731
            handles.append(module.register_forward_hook(hook))

    for name in names:
        capture(name, model.get_submodule(name.removeprefix(f"mid.{tag}.")))
    capture(f"output.{tag}.z", model.encoder)
    capture(f"output.{tag}.decoder_input", model.decoder, of_input=True)
    latents = _encode(case, model, call["x"], call.get("noise"), tag, call)
    video = model.decode(latents.structure, latents.dynamics_x, latents.dynamics_y).reconstruction
    for handle in handles:
        handle.remove()
    for name, value in captured.items():
        _check(case, name, value, call)
    _check(case, f"output.{tag}.recon", video.transpose(1, 2), call)


def _cross(case, model, call):
    tag = call["tag"]
    a = _encode(case, model, call["x_structure"], call.get("noise_structure"), f"{tag}.A", call)
    b = _encode(case, model, call["x_dynamics"], call.get("noise_dynamics"), f"{tag}.B", call)
    video = model.decode(a.structure, b.dynamics_x, b.dynamics_y).reconstruction
    _check(case, f"output.{tag}.recon", video.transpose(1, 2), call)
    if not call.get("noise_structure") and not call.get("noise_dynamics"):
        inputs = [case.input(call[name]).transpose(1, 2) for name in ("x_structure", "x_dynamics")]
        _check(case, f"output.{tag}.recon", model.reenact(*inputs).reconstruction.transpose(1, 2), call)


def _only_part(case, model, call):
    tag = call["tag"]
    latents = _encode(case, model, call["x"], call.get("noise"), tag, call)
    content = model.decode(structure=latents.structure, branch="structure").reconstruction
    motion = model.decode(dynamics_x=latents.dynamics_x, dynamics_y=latents.dynamics_y, branch="dynamics")
    _check(case, f"output.{tag}.recon_content", content.transpose(1, 2), call)
    _check(case, f"output.{tag}.recon_motion", motion.reconstruction.transpose(1, 2), call)


def _encode(case, model, x, noise, tag, call):
    """Encodes and compares latents, moments and KL."""
    noise = [case.input(name) for name in noise] if noise else None
    latents = model.encode(case.input(x).transpose(1, 2), noise=noise)
    for name in _LATENTS:
        _check(case, f"output.{tag}.{name}_moments", getattr(latents.posteriors, name).parameters, call)
        _check(case, f"output.{tag}.{name}", getattr(latents, name), call)
    _check(case, f"output.{tag}.kl_loss", latents.kl_loss, call, scalar=True)
    return latents


def _check(case, name, value, call, scalar=False):
    """Applies the tolerance the case states in words: per tensor, for scalars, and for the emulated mixed precision."""
    if not case.has(name):
        return
    text = case.tolerance_spec
    limit = case.tolerance()
    number = r"([0-9.]+(?:e[+-]?[0-9]+)?)"
    if call.get("precision") == "mixed":
        limit = Tolerance(atol=float(re.search(r"mixed_precision[^;]*<= " + number, text).group(1)))
    if scalar:
        found = re.search(r"scalars[^;]*rtol " + number, text)
        limit = Tolerance(limit.atol, float(found.group(1)) if found else limit.rtol)
    case.check(name, value, tolerance=limit)
