"""`cinetok chat`: questions about a video or an image."""

import sys

from . import common
from .common import CommandError, Result, existing_video
from .models import find_model

HELP = "ask questions about a video or an image"
EXAMPLE = """  cinetok chat "What happens in this video?" --video clip.mp4 --model divot_comprehension
  cinetok chat --video clip.mp4 --model divot_llm_sft_comp --tokenizer divot_tokenizer
  cinetok chat "What is in the picture?" --image photo.jpg --model video_lavit_language_model_sft"""


def add_arguments(parser):
    parser.add_argument("question", nargs="?", help="the question; without it, questions are read line by line")
    parser.add_argument("--video", metavar="FILE", help="video the question is about")
    parser.add_argument("--image", metavar="FILE", help="image the question is about")
    common.add_model(parser, "Divot or Video-LaVIT understanding model", required=True)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="Divot: video tokenizer for a language model's folder")
    parser.add_argument("--max-new-tokens", type=common.positive_int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=common.positive_float, metavar="X", help="draw words at this temperature")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest word")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--offload", action="store_true", help="keep idle parts off the GPU")


def run(args):
    if (args.video is None) == (args.image is None):
        raise CommandError("give a --video or an --image")
    existing_video(args.video or args.image)
    if args.greedy and args.temperature is not None:
        raise CommandError("--greedy and --temperature exclude each other")
    folder = find_model(args.model, "chat")
    chat = (_DivotChat if folder.kind.system == "divot" else _VideoLavitChat)(args, folder)
    data = {"model": str(folder.path), "video": args.video, "image": args.image}
    if args.question:
        answer = chat.ask(args.question)
        return Result({**data, "question": args.question, "answer": answer}, "" if chat.streams else answer)
    turns = []
    interactive = sys.stdin.isatty() and not args.json
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip():
            answer = chat.ask(line.strip())
            turns.append({"question": line.strip(), "answer": answer})
            if not args.json and not chat.streams:
                print(answer, file=args.stdout, flush=True)
    if not turns:
        raise CommandError("no question given")
    return Result({**data, "turns": turns})


class _Chat:
    """A conversation about one video or image; earlier turns stay in view."""

    streams = False  # whether `ask` prints the answer itself, while it is written

    def __init__(self, args, folder):
        from .loading import seeded

        self.args, self.turns, self.generator = args, [], seeded(args)
        self.kind = "video" if args.video is not None else "image"
        self.pipeline = self.load(folder)

    def visual(self):
        if self.kind == "video":
            return self.args.video
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(self.args.image).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise CommandError(f"{self.args.image}: not a readable image") from error

    def options(self):
        options = {"generator": self.generator}
        if self.args.max_new_tokens is not None:
            options["max_new_tokens"] = self.args.max_new_tokens
        if self.args.greedy:
            options["do_sample"] = False
        if self.args.temperature is not None:
            options.update(do_sample=True, temperature=self.args.temperature)
        return options

    def ask(self, question):
        self.turns.append({"role": "user", "content": question})
        answer = self.answer()
        self.turns.append({"role": "assistant", "content": answer})
        return answer


class _DivotChat(_Chat):
    def load(self, folder):
        import cinetok

        from . import loading

        args = self.args
        self.streams = not args.json and args.stdout.isatty()
        if folder.is_pipeline:
            if args.tokenizer:
                raise CommandError(f"--tokenizer: {folder.path} is a whole pipeline and holds one already")
            pipeline = loading.load_pipeline(folder, args)
        else:
            if not args.tokenizer:
                raise CommandError(
                    f"{folder.path}: is a language model alone; name its --tokenizer (a Divot tokenizer)"
                )
            tokenizer = find_model(args.tokenizer)
            if tokenizer.name != "divot_tokenizer":
                raise CommandError(f"{tokenizer.path}: is a {tokenizer.kind.title}, not a Divot tokenizer")
            loading.quiet_libraries(args)
            device, dtype = loading.placement(args)
            with loading.load_errors(folder.path):
                pipeline = cinetok.DivotComprehensionPipeline.from_parts(folder.path, tokenizer.path, dtype=dtype)
            pipeline = loading.settle(pipeline, args, device)
        self.features, self.num_clips = pipeline.encode_video(**{self.kind: self.visual()})
        return pipeline

    def answer(self):
        first, *rest = self.turns
        content = [{"type": self.kind}, {"type": "text", "text": first["content"]}]
        messages = [{"role": "user", "content": content}, *rest]
        inputs = {"messages": messages, "features": self.features, "num_clips": self.num_clips, **self.options()}
        if not self.streams:
            return self.pipeline(**inputs).texts[0]
        pieces = []
        for piece in self.pipeline.stream(**inputs):
            print(piece, end="", file=self.args.stdout, flush=True)
            pieces.append(piece)
        print(file=self.args.stdout)
        return "".join(pieces).strip()


class _VideoLavitChat(_Chat):
    def load(self, folder):
        import cinetok

        from . import loading

        if self.args.tokenizer:
            raise CommandError("--tokenizer is for Divot; Video-LaVIT's understanding model holds its tokenizers")
        if folder.is_pipeline:
            return loading.load_pipeline(folder, self.args)
        loading.quiet_libraries(self.args)
        device, dtype = loading.placement(self.args)
        with loading.load_errors(folder.path):
            pipeline = cinetok.VideoLavitUnderstandingPipeline.from_model(folder.path, dtype=dtype)
        return loading.settle(pipeline, self.args, device)

    def answer(self):
        return self.pipeline(list(self.turns), **{self.kind: self.visual()}, **self.options()).answers[0]
