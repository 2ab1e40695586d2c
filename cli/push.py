"""`cinetok push`: a converted or trained folder -> the Hub."""

from pathlib import Path

from .common import CommandError, Result

HELP = "upload a model folder to the Hugging Face Hub"
EXAMPLE = """  cinetok push vidtok_kl_causal_488_4chn me/vidtok_kl_causal_488_4chn
  cinetok push my_model me/my_model --private --message "Second stage of training\""""


def add_arguments(parser):
    parser.add_argument("folder", help="folder with a model and its card (README.md)")
    parser.add_argument("id", metavar="ID", help='repository on the Hub, "user/name"; created if there is none')
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")


def run(args):
    if not Path(args.folder).is_dir():
        raise CommandError(f"{args.folder}: no such folder")
    from ..conversion.hub import push_folder
    from .loading import quiet_libraries

    quiet_libraries(args)
    url = push_folder(args.folder, args.id, private=args.private or None, commit_message=args.message)
    return Result({"folder": args.folder, "id": args.id, "url": url}, f"pushed {args.folder} to {url}")
