"""Questions about images and videos, answered by Video-LaVIT's tuned language model."""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from ...modeling.video_lavit.modeling_visual_tokenizer import check_generator, sample_gumbel
from ...modeling.video_lavit.processing_video_lavit import StopAtLiteral


@dataclass
class VideoLavitUnderstandingOutput(BaseOutput):
    """
    Args:
        answers: one string per question.
        token_ids: per question the ids of its answer, 1-D tensors on the CPU.
    """

    answers: list
    token_ids: list


class VideoLavitUnderstandingPipeline(DiffusionPipeline):
    r"""Image and video question answering with [Video-LaVIT](https://arxiv.org/abs/2402.03161).

    Args:
        model ([`VideoLavitForCausalLM`]): with tokenizers: the weights for understanding.
        processor ([`VideoLavitProcessor`]): prepares questions, images and videos.
    """

    model_cpu_offload_seq = "model"

    def __init__(self, model, processor):
        super().__init__()
        self.register_modules(model=model, processor=processor)

    @classmethod
    def from_model(cls, folder_or_hub_id, **options):
        """The pipeline over a folder (or Hub repository) that holds the model and processor at its top, as conversion
        writes it. `options` go to the model's `from_pretrained`."""
        from ...modeling.video_lavit.modeling_video_lavit import VideoLavitForCausalLM
        from ...modeling.video_lavit.processing_video_lavit import VideoLavitProcessor

        model = VideoLavitForCausalLM.from_pretrained(folder_or_hub_id, **options)
        return cls(model=model, processor=VideoLavitProcessor.from_pretrained(folder_or_hub_id))

    def check_inputs(self, questions, images, videos, generator):
        """Raises ValueError for inputs that contradict each other."""
        if self.model.model.visual_tokenizer is None:
            raise ValueError(
                "the model holds no tokenizers to read images or videos with; load weights for understanding"
            )
        if not questions:
            raise ValueError("no question given")
        for name, given in (("image", images), ("video", videos)):
            if given is not None and len(given) != len(questions):
                raise ValueError(f"{len(given)} entries of {name} for {len(questions)} questions")
        check_generator(generator, len(questions), f"{len(questions)} questions")

    @staticmethod
    def make_conversations(questions, images, videos):
        """Messages per sample: earlier turns (if any), then the visual input in front of the first user's text."""
        conversations = []
        for index, question in enumerate(questions):
            turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
            turns = [dict(turn) for turn in turns]
            first = next(turn for turn in turns if turn["role"] == "user")
            content = first["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            visuals = []
            if images is not None and images[index] is not None:
                visuals.append({"type": "image", "image": images[index]})
            if videos is not None and videos[index] is not None:
                visuals.append({"type": "video", "video": videos[index]})
            first["content"] = visuals + content
            conversations.append(turns)
        return conversations

    @torch.no_grad()
    def __call__(
        self,
        question,
        image=None,
        video=None,
        *,
        max_clips=16,
        max_new_tokens=512,
        min_new_tokens=8,
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        length_penalty=1.0,
        short_answer=False,
        system_prompt=None,
        generator=None,
        return_dict=True,
        **video_options,
    ):
        r"""Answers one question per sample.

        Args:
            question: a string, or a list with an entry per sample: a string, or messages (`role`, `content`) of
                earlier turns that end with the user's question.
            image: image or list of images (path, PIL, array, tensor), one per question; None for a question without.
            video: video or list of videos (path, file object, `MotionVectors`), one per question.
            max_clips: most clips taken from a video (a clip takes about 230 of the model's 4096 positions).
            max_new_tokens, min_new_tokens: length of an answer in ids.
            do_sample, temperature, top_k, top_p, num_beams, repetition_penalty, length_penalty: as in transformers;
                greedy by default. With `do_sample` results depend on the batch.
            short_answer: cut answers at the first punctuation mark or line break, as benchmarks of short answers want.
            system_prompt: replaces the sentence every conversation starts with.
            generator: `torch.Generator`, or a list with one per sample, for the choice of an image's positions and for
                `do_sample`.
            return_dict: return a [`VideoLavitUnderstandingOutput`] instead of a tuple.
            video_options: further arguments of `cinetok.read_motion_vectors` (`start`, `end`, `on_error`).

        Raises:
            VideoReadError: a video cannot be read.
            ValueError: contradicting inputs, an unreadable image, or a prompt with its clips that is too long.
            TypeError: something that is no question, image or video.
        """
        # 1. Inputs
        batched = isinstance(question, (list, tuple)) and not (question and isinstance(question[0], dict))
        questions = list(question) if batched else [question]
        images, videos = _as_list(image, batched), _as_list(video, batched)
        self.check_inputs(questions, images, videos, generator)

        # 2. Prompts
        conversations = self.make_conversations(questions, images, videos)
        if system_prompt is not None:
            conversations = [[{"role": "system", "content": system_prompt}, *turns] for turns in conversations]
        texts = [self.processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations]
        inputs = self.processor(
            text=texts,
            images=_visuals(conversations, "image"),
            videos=_visuals(conversations, "video"),
            max_clips=max_clips,
            **video_options,
        )
        device = self._execution_device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        config = self.model.config
        for name in ("pixel_values", "pixel_values_videos", "motion_values"):
            if name in inputs:
                inputs[name] = inputs[name].to(self.model.dtype)
        has_visuals = "pixel_values" in inputs or "pixel_values_videos" in inputs
        if has_visuals:
            inputs["gumbel_noise"] = self._keep_noise(inputs, generator)

        # 3. Answers
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if do_sample else {}
        prompt_length = inputs["input_ids"].shape[1]
        with _seeded(generator if do_sample else None, device):
            sequences = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                do_sample=do_sample,
                num_beams=num_beams,
                repetition_penalty=repetition_penalty,
                length_penalty=length_penalty,
                suppress_tokens=list(range(config.text_vocab_size, config.num_token_ids)),
                bos_token_id=self.processor.tokenizer.bos_token_id,
                eos_token_id=self.processor.tokenizer.eos_token_id,
                pad_token_id=self.processor.tokenizer.unk_token_id,
                # Where images are spliced in, generation sees the new ids only.
                stopping_criteria=[StopAtLiteral(self.processor.tokenizer, 0 if has_visuals else prompt_length)],
                **sampling,
            )
        new_ids = sequences[:, prompt_length:].cpu()
        answers = self.processor.post_process_answers(new_ids, short=short_answer)
        self.maybe_free_model_hooks()
        output = VideoLavitUnderstandingOutput(answers=answers, token_ids=list(new_ids))
        return output if return_dict else (output.answers, output.token_ids)

    def _keep_noise(self, inputs, generator):
        """Gumbel noise of all images and clips in the order of their placeholders, each from its sample's generator."""
        config = self.model.config
        clips = iter(inputs["num_clips"].tolist() if "num_clips" in inputs else ())
        like = torch.empty(1, config.visual_tokenizer_config.num_positions, 2, device=inputs["input_ids"].device)
        noise = []
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            own = generator[row] if isinstance(generator, (list, tuple)) else generator
            for token in ids:
                count = 1 if token == config.image_token_id else next(clips) if token == config.video_token_id else 0
                noise += [sample_gumbel(like, own) for _ in range(count)]
        return torch.cat(noise)


def _as_list(given, batched):
    if given is None:
        return None
    return list(given) if batched and isinstance(given, (list, tuple)) else [given]


def _visuals(conversations, kind):
    found = [
        [
            block[key]
            for turn in turns
            if not isinstance(turn["content"], str)
            for block in turn["content"]
            if block["type"] == kind
            for key in (kind, "path", "url")
            if key in block
        ]
        for turns in conversations
    ]
    return found if any(found) else None


class _seeded:
    """transformers draws from torch's global generators: seeds them from `generator` and restores them afterwards."""

    def __init__(self, generator, device):
        self.generator, self.device = generator, torch.device(device)
        self.fork = None

    def __enter__(self):
        if self.generator is None:
            return
        generators = self.generator if isinstance(self.generator, (list, tuple)) else [self.generator]
        seed = sum(
            int(torch.randint(2**31, (), generator=g, device=g.device)) * (i + 1) for i, g in enumerate(generators)
        )
        devices = [self.device] if self.device.type == "cuda" else []
        self.fork = torch.random.fork_rng(devices)
        self.fork.__enter__()
        torch.manual_seed(seed)

    def __exit__(self, *error):
        if self.fork is not None:
            self.fork.__exit__(*error)


__all__ = ["VideoLavitUnderstandingOutput", "VideoLavitUnderstandingPipeline"]
