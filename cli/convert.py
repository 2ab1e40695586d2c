"""`cinetok convert`: the authors' checkpoints -> folders that load."""

import json
from pathlib import Path

from . import common
from .common import CommandError, Result

HELP = "convert an original checkpoint into a folder that loads"
EXAMPLE = """  cinetok convert --list
  cinetok convert vidtok --checkpoint vidtok_kl_causal_488_4chn.ckpt --release vidtok_kl_causal_488_4chn --output vidtok
  cinetok convert vidtok --checkpoint mine.ckpt --original-config mine.yaml --version 1.1 --output mine"""
SYSTEMS = ("vidtok", "vidtwin", "divot", "video_lavit", "seer")
# Options only some converters have.
_OPTIONS = ("version", "tokenizer", "base_model", "lora_alpha", "store_dtype")


def add_arguments(parser):
    parser.add_argument("system", nargs="?", choices=SYSTEMS, help="whose checkpoint it is")
    parser.add_argument("--list", action="store_true", help="list the released checkpoints (of the system, if given)")
    parser.add_argument("--checkpoint", nargs="+", metavar="PATH", help="file or folder, or several of them")
    parser.add_argument("--output", metavar="FOLDER", help="folder to create")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--release", metavar="NAME", help="which release the checkpoint is")
    what.add_argument("--original-config", metavar="FILE", help="the original repository's own .yaml or .json instead")
    parser.add_argument("--version", choices=("1.0", "1.1"), help="VidTok: version of an --original-config model")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="Divot, Video-LaVIT, Seer: text tokenizer, if it is elsewhere"
    )
    parser.add_argument("--base-model", metavar="PATH", help="Seer: Stable Diffusion 1.5")
    parser.add_argument("--lora-alpha", type=float, metavar="X", help="Divot: of a training output that is merged")
    parser.add_argument(
        "--store-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Divot: precision of the language model's file",
    )
    parser.add_argument(
        "--keep-training-state", action="store_true", help="also keep what only continued training needs"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="Hub id to push the folder to afterwards")


def run(args):
    if args.list:
        return _list(args)
    for name in ("system", "checkpoint", "output"):
        if getattr(args, name) is None:
            raise CommandError(f"{'SYSTEM' if name == 'system' else '--' + name} is missing (or --list)")
    if (args.release is None) == (args.original_config is None):
        raise CommandError("give --release (see `cinetok convert --list`) or --original-config")
    for path in args.checkpoint:
        if not Path(path).exists():
            raise CommandError(f"{path}: no such checkpoint")
    from ..conversion import convert_checkpoint
    from .loading import quiet_libraries

    quiet_libraries(args)
    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if "store_dtype" in options:
        options["dtype"] = options.pop("store_dtype")
    _check_options(args.system, options)
    folder = convert_checkpoint(
        args.system,
        args.checkpoint,
        args.output,
        release=args.release,
        original_config=args.original_config,
        keep_training_state=args.keep_training_state,
        push_to_hub=args.push_to_hub,
        **options,
    )
    report = {}
    if (folder / "conversion.json").is_file():
        report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    lines = [f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}"]
    lines += _left_out(report)
    if args.push_to_hub:
        lines.append(f"pushed to {args.push_to_hub}")
    return Result({"output": str(folder), "pushed_to": args.push_to_hub, "report": report}, "\n".join(lines))


def _check_options(system, options):
    known = {
        "vidtok": {"version"},
        "divot": {"tokenizer", "lora_alpha", "dtype"},
        "video_lavit": {"tokenizer"},
        "seer": {"tokenizer", "base_model"},
    }
    for name in sorted(set(options) - known.get(system, set())):
        flag = "store-dtype" if name == "dtype" else name.replace("_", "-")
        raise CommandError(f"--{flag} is not an option of {system}")


def _left_out(report):
    """What the conversion report says was not taken over."""
    left_out = report.get("left_out") or {}
    entries = report.get("left_out_entries") or []
    lines = []
    if isinstance(left_out, dict):
        lines += [f"left out: {name} ({count} tensors)" if isinstance(count, int) else f"left out: {name}: {count}"
                  for name, count in left_out.items()]  # fmt: skip
    else:
        lines += [f"left out: {name}" for name in left_out]
    if entries:
        lines.append(f"left out: entries beside the weights: {', '.join(map(str, entries))}")
    return lines


def _list(args):
    from ..conversion import releases

    found = releases(args.system)
    rows = [("SYSTEM", "RELEASE", "SIZE", "LICENSE", "FILES")]
    data = []
    for release in found:
        licence = release.license.name or release.license.id
        rows.append(
            (release.system, release.name, release.size, licence, f"{release.hub_id}: {', '.join(release.files)}")
        )
        data.append(
            {
                "system": release.system,
                "release": release.name,
                "title": release.title,
                "size": release.size,
                "license": release.license.id,
                "license_name": release.license.name,
                "hub_id": release.hub_id,
                "files": list(release.files),
                "paper": release.paper,
                "notes": list(release.notes),
            }
        )
    return Result({"releases": data}, common.table(rows))
