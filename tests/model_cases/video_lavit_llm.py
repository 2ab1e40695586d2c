"""Tiny language models, processors and pipelines of Video-LaVIT, and the text tokenizer they share."""

import functools
import io
import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cinetok import (
    VideoLavitConfig,
    VideoLavitForCausalLM,
    VideoLavitKeyframeDecoder,
    VideoLavitMotionEncoder,
    VideoLavitMotionTokenizer,
    VideoLavitMotionTokenizerConfig,
    VideoLavitPipeline,
    VideoLavitProcessor,
    VideoLavitUnderstandingPipeline,
    VideoLavitUNetSpatioTemporalConditionModel,
    VideoLavitVisualTokenizer,
    VideoLavitVisualTokenizerConfig,
)
from cinetok.conversion.sentencepiece_llama import llama_tokenizer_from_sentencepiece
from model_cases import ModelCase, PipelineCase

TEXT_VOCAB_SIZE = 400
NUM_FRAMES, MAP_HEIGHT, MAP_WIDTH = 8, 8, 12
IMAGE_SIZE = 42

VISUAL = {
    "image_size": IMAGE_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "clip_embedding_size": 8,
    "merger_num_hidden_layers": 1,
    "merger_num_attention_heads": 2,
    "codebook_size": 32,
    "codebook_dim": 6,
}
MOTION = {
    "num_frames": NUM_FRAMES,
    "height": MAP_HEIGHT,
    "width": MAP_WIDTH,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "layers_per_stage": 1,
    "codebook_size": 40,
    "codebook_dim": 6,
}
LLAMA = {
    "vocab_size": TEXT_VOCAB_SIZE + 2 + 32 + 2 + 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
LAYOUT = {
    "text_vocab_size": TEXT_VOCAB_SIZE,
    "num_visual_codes": 32,
    "num_motion_codes": 40,
    "image_token_id": 9000,
    "video_token_id": 9001,
    "max_sequence_length": 512,
}


@functools.cache
def sentencepiece_model():
    """Bytes of a small sentencepiece BPE model of LLaMA's kind: ids 0 unk, 1 bos, 2 eos, then bytes, then pieces."""
    import sentencepiece

    text = [
        "a chat between a curious user and an artificial intelligence assistant",
        "the assistant gives helpful, detailed, and polite answers to the user's questions.",
        "a red ball rolls to the left. a blue cat sits on the mat. what is in the picture?",
        "two  spaces, three   spaces, four    spaces\nand a new line \\n",
    ] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=TEXT_VOCAB_SIZE,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def text_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(sentencepiece_model())
        return llama_tokenizer_from_sentencepiece(path, pad_token="<unk>", padding_side="left")


def processor(**options):
    return VideoLavitProcessor(
        text_tokenizer(),
        **{
            "image_token_id": LAYOUT["image_token_id"],
            "video_token_id": LAYOUT["video_token_id"],
            "image_size": IMAGE_SIZE,
            "num_motion_frames": NUM_FRAMES,
            "motion_height": MAP_HEIGHT,
            "motion_width": MAP_WIDTH,
            **options,
        },
    )


def randomize(module, seed, gain=1.0):
    """Random weights that let every input show in the output, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                is_scale = "norm" in name and name.endswith("weight") or "ln_" in name and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if is_scale else 0.1 * noise)
            elif "embed" in name or "quantize" in name or "cls_token" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
    return module.eval()


def config(with_tokenizers=True, **options):
    arguments = {"text_config": dict(LLAMA), **LAYOUT, **options}
    if with_tokenizers:
        arguments["visual_tokenizer_config"] = {**VISUAL, "projection_dim": LLAMA["hidden_size"]}
        arguments["motion_tokenizer_config"] = dict(MOTION)
    return VideoLavitConfig(**arguments)


def language_model(with_tokenizers=True, seed=0, **options):
    model = randomize(VideoLavitForCausalLM(config(with_tokenizers, **options)), seed, 2.0)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


def visual_tokenizer(seed=1):
    return randomize(VideoLavitVisualTokenizer(VideoLavitVisualTokenizerConfig(**VISUAL)), seed)


def motion_tokenizer(seed=2):
    return randomize(VideoLavitMotionTokenizer(VideoLavitMotionTokenizerConfig(**MOTION)), seed)


def _vae_blocks(channels):
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 32,
        "force_upcast": True,
    }


def keyframe_components(ancestral=False):
    """The keyframe de-tokenizer: decoder, U-Net, VAE and scheduler."""
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    ddim = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **schedule)
    return {
        "keyframe_decoder": randomize(
            VideoLavitKeyframeDecoder(
                in_channels=6,
                num_queries=9,
                hidden_size=16,
                num_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                feature_dim=12,
                prompt_dim=8,
                pooled_dim=16,
            ),
            3,
        ),
        "keyframe_unet": randomize(
            UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
                block_out_channels=[16, 32],
                layers_per_block=1,
                attention_head_dim=[2, 4],
                norm_num_groups=8,
                cross_attention_dim=24,
                transformer_layers_per_block=[1, 1],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
            ),
            4,
            0.7,
        ),
        "keyframe_vae": randomize(
            AutoencoderKL(
                **_vae_blocks([8, 16]),
                up_block_types=["UpDecoderBlock2D"] * 2,
                norm_num_groups=4,
                scaling_factor=0.13025,
            ),
            5,
            0.7,
        ),
        "keyframe_scheduler": EulerAncestralDiscreteScheduler(**schedule) if ancestral else ddim,
    }


def video_components():
    """The video de-tokenizer: U-Net, motion encoder, VAE and scheduler."""
    return {
        "unet": randomize(
            VideoLavitUNetSpatioTemporalConditionModel(
                sample_size=None,
                in_channels=10,
                out_channels=4,
                down_block_types=["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
                up_block_types=["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
                block_out_channels=[32, 32],
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24,
                layers_per_block=1,
                cross_attention_dim=16,
                transformer_layers_per_block=1,
                num_attention_heads=[2, 4],
                num_frames=NUM_FRAMES,
            ),
            6,
            0.7,
        ),
        "motion_encoder": randomize(
            VideoLavitMotionEncoder(hidden_size=16, num_layers=1, num_attention_heads=2, out_channels=16), 7
        ),
        "vae": randomize(AutoencoderKLTemporalDecoder(**_vae_blocks([32, 32]), scaling_factor=0.18215), 8, 0.7),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
            prediction_type="v_prediction",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=20.0,  # at the released 700 rounding alone moves pixels by 1e-3
        ),
    }


def generation_pipeline(ancestral=False, text_to_image=None):
    pipeline = VideoLavitPipeline(
        language_model=language_model(with_tokenizers=False),
        processor=processor(),
        visual_tokenizer=visual_tokenizer(),
        motion_tokenizer=motion_tokenizer(),
        **keyframe_components(ancestral),
        **video_components(),
        text_to_image=text_to_image,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def understanding_pipeline():
    pipeline = VideoLavitUnderstandingPipeline(model=language_model(), processor=processor())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_to_image_pipeline():
    """A Stable Diffusion of toy size, as any pipeline that can draw a key frame."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=16)
    text_config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[16, 32],
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=24,
    )
    pipeline = StableDiffusionPipeline(
        vae=keyframe_components()["keyframe_vae"],
        text_encoder=randomize(CLIPTextModel(text_config), 9),
        tokenizer=tokenizer,
        unet=randomize(unet, 10, 0.7),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------------------------- inputs


def keep_noise(seeds):
    """Gumbel noise (batch, 9, 2) strong enough to decide which positions are kept: the same number for every image."""
    noise = torch.zeros(len(seeds), 9, 2)
    for row, seed in enumerate(seeds):
        kept = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:4]
        noise[row, :, 1] = 100.0
        noise[row, kept, 0] = 200.0
    return noise


def visual_inputs(count, first_seed=0):
    """Key frames (count, 3, 42, 42) and motion maps (count, 2, 8, 8, 12), each depending on its index only."""
    frames, maps = [], []
    for index in range(count):
        generator = torch.Generator().manual_seed(first_seed + index)
        frames.append(torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))
        maps.append(torch.randn(2, NUM_FRAMES, MAP_HEIGHT, MAP_WIDTH, generator=generator))
    return torch.stack(frames), torch.stack(maps)


def _video_inputs(batch_size):
    frames, maps = visual_inputs(batch_size)
    ids = torch.stack([torch.tensor([1, 9001, 20 + i, 30, 40 + i, 50]) for i in range(batch_size)])
    labels = ids.clone()
    labels[:, :3] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": frames,
        "motion_values": maps,
        "num_clips": torch.ones(batch_size, dtype=torch.long),
        "gumbel_noise": keep_noise(range(batch_size)),
        "labels": labels,
    }


def _text_inputs(batch_size):
    ids = torch.stack([torch.tensor([1, 20 + i, 30, 402, 403, 404 + i, 401]) for i in range(batch_size)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _generation_inputs(batch_size, **options):
    return {
        "prompt": ["a red ball rolls", "a blue cat"][:batch_size],
        "height": 16,
        "width": 24,
        "keyframe_height": 16,
        "keyframe_width": 16,
        "num_inference_steps": 2,
        "keyframe_num_inference_steps": 2,
        "min_new_tokens": 4,
        "max_image_tokens": 7,
        "max_motion_tokens": 8,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(batch_size)],
        "output_type": "pt",
        **options,
    }


def picture(index=0, size=(30, 20)):
    from PIL import Image

    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(100 + index))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def _understanding_inputs(batch_size):
    return {
        "question": ["what is in the picture?", "a cat"][:batch_size],
        "image": [picture(index) for index in range(batch_size)],
        "min_new_tokens": 3,
        "max_new_tokens": 6,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(batch_size)],
    }


MODELS = [
    ModelCase(
        "video_lavit-language_model-understanding",
        language_model,
        _video_inputs,
        "logits",
        without_gradient={
            r"model\.motion_tokenizer\..*": "the language model reads its codes, which are integers",
            r"model\.visual_tokenizer\.(encode_task_layer|quantize|encoder\.norm|encoder\.head)\..*": (
                "what makes codes; the language model reads the features before them"
            ),
            r"model\.visual_tokenizer\.token_predictor\..*": "the inputs' noise decides, so its probabilities are 0 and 1",
        },
    ),
    ModelCase(
        "video_lavit-language_model-generation",
        functools.partial(language_model, with_tokenizers=False),
        _text_inputs,
        "logits",
    ),
]

PIPELINES = [
    PipelineCase("video_lavit-text_to_video", generation_pipeline, _generation_inputs, lambda output: output.frames),
    PipelineCase(
        "video_lavit-text_to_image",
        functools.partial(generation_pipeline, ancestral=True),
        functools.partial(_generation_inputs, modality="image"),
        lambda output: output.images,
    ),
    PipelineCase(
        "video_lavit-understanding", understanding_pipeline, _understanding_inputs, lambda output: output.answers
    ),
]
