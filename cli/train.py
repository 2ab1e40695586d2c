"""`cinetok train`: trains a tokenizer to reconstruct videos of your own."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from . import common
from .common import CommandError, Result
from .models import find_model

HELP = "train a video tokenizer on your own videos"
EXAMPLE = """  cinetok train videos/ -o my_model --items 2000
  cinetok train videos/ -o my_model --model vidtok_kl_causal_488_4chn_v1_1 --learning-rate 1e-5
  cinetok train videos/ -o my_model --config config.json --num-frames 17 --size 128"""


def add_arguments(parser):
    parser.add_argument("videos", nargs="+", metavar="PATH", help="videos and pictures, or folders of them")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder of the trained model")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", metavar="FOLDER", help="VidTok or VidTwin to start from (default: bundled VidTok)")
    start.add_argument(
        "--config", metavar="FILE", help="config.json of a new model (VidTok or VidTwin) with random weights"
    )
    parser.add_argument("--num-frames", type=common.positive_int, metavar="N", help="frames of a training clip (17)")
    parser.add_argument("--size", type=common.positive_int, metavar="PIXELS", help="side of a training clip (128)")
    parser.add_argument(
        "--items", type=common.positive_int, default=10000, metavar="N", help="clips to train on (10000)"
    )
    parser.add_argument("--batch-size", type=common.positive_int, default=4, metavar="N", help="clips per step (4)")
    parser.add_argument("--learning-rate", type=common.positive_float, default=1e-4, metavar="X", help="peak (1e-4)")
    parser.add_argument(
        "--save-steps", type=common.positive_int, default=200, metavar="N", help="checkpoint every (200)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint; bit-exact")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")


def run(args):
    files = _find_sources(args.videos)
    output = Path(args.output)
    training = output.absolute().parent / f"{output.name}.training"
    if output.exists():
        raise CommandError(f"{output}: exists already; choose another output folder")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"{output}: the folder {output.absolute().parent} does not exist")
    if args.resume and not any(training.glob("checkpoint-*")):
        raise CommandError(f"{training}: holds no checkpoint to resume from")
    if not args.resume and training.exists():
        raise CommandError(f"{training}: left by an earlier run; pass --resume, or remove it")
    folder = None if args.config else find_model(args.model, "train")
    import torch

    from ..trainers.clips import ClipSource, RandomClips
    from ..trainers.reconstruction import train_reconstruction

    torch.manual_seed(args.seed)
    model, processor = _start(args, folder)
    num_frames, size = _clip_shape(args, model)
    clips = RandomClips([ClipSource(str(file)) for file in files], num_frames, size, args.items, seed=args.seed)
    log = train_reconstruction(
        model,
        clips,
        training,
        resume=args.resume,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        save_steps=args.save_steps,
        warmup_steps=min(100, max(1, args.items // args.batch_size // 10)),
        bf16=args.bf16,
        use_cpu=args.cpu,
        seed=args.seed,
        disable_tqdm=not common.progress(args),
    )
    facts = {"videos": [file.name for file in files], "num_frames": num_frames, "size": size, "items": args.items}
    facts.update(batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed, log=log)
    _write(model, processor, output, facts)
    shutil.rmtree(training)
    losses = [entry["loss"] for entry in log]
    data = {"output": str(output), "parameters": model.num_parameters(), "losses": losses}
    text = f"wrote {output}: {model.num_parameters():,} parameters"
    if losses:
        text += f"; loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last"
    return Result(data, text)


def _find_sources(paths):
    from .evaluate import VIDEO_SUFFIXES

    suffixes = (*VIDEO_SUFFIXES, ".png", ".jpg", ".jpeg")
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
            if not found:
                raise CommandError(f"{path}: neither videos nor pictures in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise CommandError(f"{path}: no such file or folder")
    return files


def _start(args, folder):
    """(model, processor) to train: loaded, or new from a configuration."""
    import cinetok

    from . import loading

    if folder is not None:
        args.device, args.dtype = "cpu", "float32"
        return loading.load_tokenizer(folder, args)
    loading.quiet_libraries(args)
    path = Path(args.config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values.pop("model_type", "vidtok")
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file") from error
    except (ValueError, AttributeError) as error:
        raise CommandError(f"{path}: not a valid configuration ({error})") from error
    names = {"vidtok": "VidTok", "vidtwin": "VidTwin"}
    if kind not in names:
        raise CommandError(f"{path}: model_type {kind!r} cannot be trained; choose vidtok or vidtwin")
    config = getattr(cinetok, f"{names[kind]}Config")(**values)
    model = getattr(cinetok, f"{names[kind]}Model")(config)
    if kind == "vidtwin":
        size = {"size": {"shortest_edge": min(config.height, config.width)}}
        size["crop_size"] = {"height": config.height, "width": config.width}
        return model, cinetok.VidTwinVideoProcessor(**size, num_frames=config.num_frames)
    return model, cinetok.VidTokVideoProcessor()


def _clip_shape(args, model):
    if model.config.model_type == "vidtok":
        return args.num_frames or (17 if model.config.is_causal else 16), args.size or 128
    config = model.config
    if args.size not in (None, config.height) or config.height != config.width:
        raise CommandError(f"this VidTwin takes {config.height}x{config.width} pixels; training clips are square")
    return args.num_frames or config.num_frames, config.height


def _write(model, processor, output, facts):
    """The folder appears only when it is complete."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=output.absolute().parent))
    try:
        model.to("cpu").save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
