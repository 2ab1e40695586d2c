"""Tiny models and pipelines of Divot-LLM."""

import tempfile
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from cinetok import (
    DivotComprehensionPipeline,
    DivotConfig,
    DivotDDIMScheduler,
    DivotForCausalLM,
    DivotProcessor,
    DivotStoryPipeline,
    DivotTextToVideoPipeline,
    DivotVideoProcessor,
)
from cinetok.modeling.divot.processing_divot import build_divot_tokenizer

from . import ModelCase, PipelineCase

FEATURES, FEATURE_DIM = 8, 12


@cache
def _tokenizer_file():
    """A letter-by-letter tokenizer laid out like Mistral's, extended with Divot's tokens, as a folder."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyzAGIMNSTVW.,?!'[]/<>0123456789"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    folder = tempfile.mkdtemp()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


def processor():
    return DivotProcessor(
        build_divot_tokenizer(_tokenizer_file(), num_frame_tokens=FEATURES),
        DivotVideoProcessor(size=32),
        num_query_tokens=FEATURES,
    )


def llm(seed=4, **changes):
    from .divot import scramble

    ids = processor()
    text = {
        "vocab_size": len(ids.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "sliding_window": 1024,
    }
    config = {"feature_dim": FEATURE_DIM, "num_query_tokens": FEATURES, "num_gmm_components": 3}
    config |= ids.token_ids() | {"text_config": text | changes.pop("text_config", {})} | changes
    return scramble(DivotForCausalLM(DivotConfig(**config)), seed)


def _parts():
    from . import divot

    return {
        "video_tokenizer": divot.tokenizer(),
        "resampler": divot.resampler(),
        "unet": divot.unet(),
        "vae": divot.vae(),
        "scheduler": DivotDDIMScheduler(),
    }


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def talkative(model):
    """A random model that writes letters, so that its texts say something about its inputs."""
    letters = torch.tensor(processor().tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    factor = torch.zeros(len(model.lm_head.weight), 1)
    factor[letters] = 4.0
    model.lm_head.weight.mul_(factor)
    return model


def comprehension():
    from . import divot

    return _quiet(DivotComprehensionPipeline(processor(), divot.tokenizer(), talkative(llm())))


def text_to_video():
    return _quiet(DivotTextToVideoPipeline(processor=processor(), llm=llm(), **_parts()))


def story():
    return _quiet(DivotStoryPipeline(processor=processor(), llm=llm(), **_parts()))


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llm_inputs(batch_size):
    """Every sample reads one clip and writes one."""
    prompts = [f"[INST] <video>make {'ab'[i % 2]} clip [/INST]\n" for i in range(batch_size)]
    inputs = processor()(prompts, num_clips=[1] * batch_size)
    tag = processor().token_ids()["video_start_token_id"]
    tags = torch.full((batch_size, 1), tag)
    ids, mask = (torch.cat([inputs[k], t], dim=1) for k, t in (("input_ids", tags), ("attention_mask", tags * 0 + 1)))
    full = processor().with_queries(ids, mask)
    labels = full["input_ids"].masked_fill(full["attention_mask"] != 1, -100)
    labels[:, 0] = -100  # nothing comes before it, except padding
    return {
        **full,
        "labels": labels,
        "video_features": torch.stack([random((1, FEATURES, FEATURE_DIM), i) for i in range(batch_size)]),
        "target_features": torch.stack([random((1, FEATURES, FEATURE_DIM), 50 + i) for i in range(batch_size)]),
    }


def generators(batch_size):
    return [torch.Generator().manual_seed(i) for i in range(batch_size)]


def _comprehension_inputs(batch_size):
    from .divot import video

    return {
        "question": ["What is it?", "Where?", "Who is in it?"][:batch_size],
        "video": [video(i, num_frames=12 + 12 * i) for i in range(batch_size)],
        "max_new_tokens": 6,
        "generator": generators(batch_size),
    }


def _video_inputs(batch_size):
    return {
        "prompt": ["a dog runs", "the sea", "a tower at night"][:batch_size],
        "max_new_tokens": 3,
        "num_inference_steps": 2,
        "num_frames": 4,
        "generator": generators(batch_size),
        "output_type": "pt",
    }


def _story_inputs(batch_size):
    inputs = _video_inputs(batch_size)
    inputs["instruction"] = inputs.pop("prompt")
    return inputs | {"max_clips": 2, "min_clips": 2}


MODELS = [ModelCase("divot-llm", llm, llm_inputs, "logits")]
PIPELINES = [
    PipelineCase("divot-comprehension", comprehension, _comprehension_inputs, lambda output: output.texts),
    PipelineCase("divot-text-to-video", text_to_video, _video_inputs, lambda output: output.frames),
    PipelineCase(
        "divot-story",
        story,
        _story_inputs,
        lambda output: torch.stack([torch.stack([clip.frames for clip in clips]) for clips in output.stories]),
    ),
]
