"""Public names and the modules that define them. `import cinetok` reads this table and imports nothing else."""

PIPELINES = {
    "VideoReconstructionPipeline": ".pipelines.pipeline_video_reconstruction",
    "DivotReconstructionPipeline": ".pipelines.divot.pipeline_divot_reconstruction",
    "DivotTextToVideoPipeline": ".pipelines.divot.pipeline_divot_text_to_video",
    "DivotStoryPipeline": ".pipelines.divot.pipeline_divot_story",
    "DivotComprehensionPipeline": ".pipelines.divot.pipeline_divot_comprehension",
    "VideoLavitPipeline": ".pipelines.video_lavit.pipeline_video_lavit",
    "VideoLavitReconstructionPipeline": ".pipelines.video_lavit.pipeline_video_lavit_reconstruction",
    "VideoLavitUnderstandingPipeline": ".pipelines.video_lavit.pipeline_video_lavit_understanding",
    "SeerPipeline": ".pipelines.seer.pipeline_seer",
}

EXPORTS = {
    # errors
    "CinetokError": ".errors",
    "CheckpointError": ".errors",
    "VideoReadError": ".errors",
    "TokenFileError": ".errors",
    # video files
    "VideoClip": ".video",
    "read_video": ".video",
    "write_video": ".video",
    "iter_video": ".video",
    "read_motion_vectors": ".video",
    # conversion
    "convert_checkpoint": ".conversion",
    # VidTok
    "VidTokConfig": ".modeling.vidtok.configuration_vidtok",
    "VidTokModel": ".modeling.vidtok.modeling_vidtok",
    "VidTokVideoProcessor": ".modeling.vidtok.video_processing_vidtok",
    # VidTwin
    "VidTwinConfig": ".modeling.vidtwin.configuration_vidtwin",
    "VidTwinModel": ".modeling.vidtwin.modeling_vidtwin",
    "VidTwinVideoProcessor": ".modeling.vidtwin.video_processing_vidtwin",
    # Divot
    "DivotTokenizerConfig": ".modeling.divot.configuration_divot",
    "DivotTokenizerModel": ".modeling.divot.modeling_divot_tokenizer",
    "DivotVideoProcessor": ".modeling.divot.video_processing_divot",
    "DivotConfig": ".modeling.divot.configuration_divot_llm",
    "DivotModel": ".modeling.divot.modeling_divot",
    "DivotForCausalLM": ".modeling.divot.modeling_divot",
    "DivotProcessor": ".modeling.divot.processing_divot",
    "DivotUNet3DConditionModel": ".modeling.divot.unet_divot",
    "DivotFeatureResampler": ".modeling.divot.resampler_divot",
    "DivotDDIMScheduler": ".modeling.divot.scheduling_divot",
    # Video-LaVIT
    "VideoLavitVisualTokenizerConfig": ".modeling.video_lavit.configuration_video_lavit",
    "VideoLavitMotionTokenizerConfig": ".modeling.video_lavit.configuration_video_lavit",
    "VideoLavitConfig": ".modeling.video_lavit.configuration_video_lavit_llm",
    "VideoLavitVisualTokenizer": ".modeling.video_lavit.modeling_visual_tokenizer",
    "VideoLavitMotionTokenizer": ".modeling.video_lavit.modeling_motion_tokenizer",
    "VideoLavitKeyframeDecoder": ".modeling.video_lavit.keyframe_decoder",
    "VideoLavitModel": ".modeling.video_lavit.modeling_video_lavit",
    "VideoLavitForCausalLM": ".modeling.video_lavit.modeling_video_lavit",
    "VideoLavitProcessor": ".modeling.video_lavit.processing_video_lavit",
    "VideoLavitUNetSpatioTemporalConditionModel": ".modeling.video_lavit.unet_video_lavit",
    "VideoLavitMotionEncoder": ".modeling.video_lavit.motion_encoder",
    "VideoLavitImageProcessor": ".modeling.video_lavit.image_processing_video_lavit",
    "VideoLavitMotionProcessor": ".modeling.video_lavit.motion_processing",
    # Seer
    "SeerUNet3DConditionModel": ".modeling.seer.unet_seer",
    "SeerTextDecomposer": ".modeling.seer.text_decomposer_seer",
    "SeerDDIMScheduler": ".modeling.seer.scheduling_seer",
    **PIPELINES,
}

# Base classes diffusers looks up by name in this namespace when it loads a component whose index entry says "cinetok".
DIFFUSERS_BASES = {
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "PreTrainedModel": "transformers",
    "ProcessorMixin": "transformers",
    "ImageProcessingMixin": "transformers.image_processing_base",
}

# model_type -> configuration class and what each Auto class answers for it.
AUTO_CLASSES = {
    "vidtok": {"config": "VidTokConfig", "model": "VidTokModel", "video_processor": "VidTokVideoProcessor"},
    "vidtwin": {"config": "VidTwinConfig", "model": "VidTwinModel", "video_processor": "VidTwinVideoProcessor"},
    "video_lavit": {
        "config": "VideoLavitConfig",
        "model": "VideoLavitModel",
        "causal_lm": "VideoLavitForCausalLM",
        "processor": "VideoLavitProcessor",
    },
    "video_lavit_visual_tokenizer": {
        "config": "VideoLavitVisualTokenizerConfig",
        "model": "VideoLavitVisualTokenizer",
        "image_processor": "VideoLavitImageProcessor",
    },
    "video_lavit_motion_tokenizer": {
        "config": "VideoLavitMotionTokenizerConfig",
        "model": "VideoLavitMotionTokenizer",
        "video_processor": "VideoLavitMotionProcessor",
    },
    "divot": {
        "config": "DivotConfig",
        "model": "DivotModel",
        "causal_lm": "DivotForCausalLM",
        "processor": "DivotProcessor",
    },
    "divot_tokenizer": {
        "config": "DivotTokenizerConfig",
        "model": "DivotTokenizerModel",
        "video_processor": "DivotVideoProcessor",
    },
}
