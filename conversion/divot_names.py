"""Name tables of Divot's networks: the original checkpoints' names and ours, in both directions."""

from .mapping import Convert, Rename, StateDictMapping, drop_ones, split_rows


def _value(config, key):
    return config[key] if isinstance(config, dict) else getattr(config, key)


def prefixed(mapping, prefix):
    """The same table for original names that all start with `prefix`."""
    rules = []
    for rule in mapping.rules:
        if isinstance(rule, Rename):
            rules.append(Rename(prefix + rule.original, rule.hf))
        else:
            rules.append(Convert([prefix + name for name in rule.originals], rule.hfs, rule.forward, rule.backward))
    return StateDictMapping(rules, keep_unmatched=mapping.keep_unmatched)


def _resnet(original, hf):
    """A residual block of the U-Net with its temporal convolutions."""
    renames = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    }
    rules = [Rename(f"{original}.{old}.*", f"{hf}.{new}.*") for old, new in renames.items()]
    rules += [
        drop_ones(f"{original}.skip_connection.weight", f"{hf}.conv_shortcut.weight", 2),
        Rename(f"{original}.skip_connection.bias", f"{hf}.conv_shortcut.bias"),
    ]
    for i in range(1, 5):
        # "temopral" is the spelling of the checkpoints; the first convolution has no dropout in front of it.
        old, new = f"{original}.temopral_conv.conv{i}", f"{hf}.temporal_conv"
        conv = 2 if i == 1 else 3
        rules += [
            Rename(f"{old}.0.*", f"{new}.norm{i}.*"),
            drop_ones(f"{old}.{conv}.weight", f"{new}.conv{i}.weight", 1),
            Rename(f"{old}.{conv}.bias", f"{new}.conv{i}.bias"),
        ]
    return rules


def _transformer(original, hf, conv_projections=False):
    """A spatial or temporal transformer of the U-Net, all layers at once."""
    if conv_projections:
        rules = [
            drop_ones(f"{original}.{name}.weight", f"{hf}.{name}.weight", 1) for name in ("proj_in", "proj_out")
        ] + [Rename(f"{original}.{name}.bias", f"{hf}.{name}.bias") for name in ("proj_in", "proj_out")]
    else:
        rules = [Rename(f"{original}.{name}.*", f"{hf}.{name}.*") for name in ("proj_in", "proj_out")]
    old, new = f"{original}.transformer_blocks.*", f"{hf}.layers.*"
    rules += [Rename(f"{original}.norm.*", f"{hf}.norm.*")]
    rules += [
        Rename(f"{old}.attn2.to_k_ip.weight", f"{new}.attn2.to_k_image.weight"),
        Rename(f"{old}.attn2.to_v_ip.weight", f"{new}.attn2.to_v_image.weight"),
        Rename(f"{old}.attn2.alpha", f"{new}.attn2.alpha"),
        Rename(f"{old}.ff.net.2.*", f"{new}.ff.out.*"),
        split_rows(f"{old}.ff.net.0.proj.weight", f"{new}.ff.value.weight", f"{new}.ff.gate.weight"),
        split_rows(f"{old}.ff.net.0.proj.bias", f"{new}.ff.value.bias", f"{new}.ff.gate.bias"),
    ]
    rules += [Rename(f"{old}.norm{i}.*", f"{new}.norm{i}.*") for i in (1, 2, 3)]
    for attention in ("attn1", "attn2"):
        rules += [Rename(f"{old}.{attention}.to_out.0.*", f"{new}.{attention}.to_out.*")]
        rules += [
            Rename(f"{old}.{attention}.{name}.weight", f"{new}.{attention}.{name}.weight")
            for name in ("to_q", "to_k", "to_v")
        ]
    return rules


def unet_mapping(config):
    """`diffusion_model.` (prefix removed) <-> `DivotUNet3DConditionModel`."""
    layers, attention = _value(config, "layers_per_block"), list(_value(config, "attention_levels"))
    rules = [
        Rename("time_embed.0.*", "time_embedding.linear_1.*"),
        Rename("time_embed.2.*", "time_embedding.linear_2.*"),
        Rename("fps_embedding.0.*", "fs_embedding.linear_1.*"),
        Rename("fps_embedding.2.*", "fs_embedding.linear_2.*"),
        Rename("input_blocks.0.0.*", "conv_in.*"),
        Rename("out.0.*", "conv_norm_out.*"),
        Rename("out.2.*", "conv_out.*"),
        *_transformer("init_attn.0", "transformer_in", conv_projections=True),
        *_resnet("middle_block.0", "mid_resnet_1"),
        *_transformer("middle_block.1", "mid_attention"),
        *_transformer("middle_block.2", "mid_temporal_attention"),
        *_resnet("middle_block.3", "mid_resnet_2"),
    ]

    def layer(original, hf, index, has_attention):
        rules.extend(_resnet(f"{original}.0", f"{hf}.resnets.{index}"))
        if has_attention:
            rules.extend(_transformer(f"{original}.1", f"{hf}.attentions.{index}"))
            rules.extend(_transformer(f"{original}.2", f"{hf}.temporal_attentions.{index}"))

    position = 1
    for level, has_attention in enumerate(attention):
        for i in range(layers):
            layer(f"input_blocks.{position}", f"down_blocks.{level}", i, has_attention)
            position += 1
        if level < len(attention) - 1:
            rules.append(Rename(f"input_blocks.{position}.0.op.*", f"down_blocks.{level}.downsample.*"))
            position += 1
    position = 0
    for block, has_attention in enumerate(reversed(attention)):
        for i in range(layers + 1):
            layer(f"output_blocks.{position}", f"up_blocks.{block}", i, has_attention)
            position += 1
        if block < len(attention) - 1:
            slot = 3 if has_attention else 1
            rules.append(Rename(f"output_blocks.{position - 1}.{slot}.conv.*", f"up_blocks.{block}.upsample.*"))
    return StateDictMapping(rules, keep_unmatched=False)


def _resampler_rules(original="", hf=""):
    old, new = f"{original}layers.*", f"{hf}layers.*"
    return [
        Rename(f"{original}latents", f"{hf}latents"),
        *(Rename(f"{original}{name}.*", f"{hf}{name}.*") for name in ("proj_in", "proj_out", "norm_out")),
        Rename(f"{old}.0.norm1.*", f"{new}.attention.norm_input.*"),
        Rename(f"{old}.0.norm2.*", f"{new}.attention.norm_latents.*"),
        *(Rename(f"{old}.0.{n}.weight", f"{new}.attention.{n}.weight") for n in ("to_q", "to_kv", "to_out")),
        Rename(f"{old}.1.0.*", f"{new}.feed_forward.norm.*"),
        Rename(f"{old}.1.1.weight", f"{new}.feed_forward.fc1.weight"),
        Rename(f"{old}.1.3.weight", f"{new}.feed_forward.fc2.weight"),
    ]


def resampler_mapping(config=None):
    """`image_proj_model.` of a de-tokenizer (prefix removed) <-> `DivotFeatureResampler`."""
    return StateDictMapping(_resampler_rules(hf="perceiver."), keep_unmatched=False)


def vae_mapping(config):
    """`first_stage_model.` (prefix removed, CompVis names) <-> diffusers' `AutoencoderKL`."""
    levels = len(_value(config, "block_out_channels"))
    rules = [Rename("quant_conv.*", "quant_conv.*"), Rename("post_quant_conv.*", "post_quant_conv.*")]

    def resnet(original, hf):
        rules.append(Rename(f"{original}.nin_shortcut.*", f"{hf}.conv_shortcut.*"))
        rules.extend(Rename(f"{original}.{n}.*", f"{hf}.{n}.*") for n in ("norm1", "conv1", "norm2", "conv2"))

    for half in ("encoder", "decoder"):
        rules += [
            Rename(f"{half}.conv_in.*", f"{half}.conv_in.*"),
            Rename(f"{half}.norm_out.*", f"{half}.conv_norm_out.*"),
            Rename(f"{half}.conv_out.*", f"{half}.conv_out.*"),
            Rename(f"{half}.mid.attn_1.norm.*", f"{half}.mid_block.attentions.0.group_norm.*"),
        ]
        for old, new in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            attention = f"{half}.mid_block.attentions.0.{new}"
            rules += [
                drop_ones(f"{half}.mid.attn_1.{old}.weight", f"{attention}.weight", 2),
                Rename(f"{half}.mid.attn_1.{old}.bias", f"{attention}.bias"),
            ]
        resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
    for level in range(levels):
        up = levels - 1 - level
        resnet(f"encoder.down.{level}.block.*", f"encoder.down_blocks.{level}.resnets.*")
        resnet(f"decoder.up.{level}.block.*", f"decoder.up_blocks.{up}.resnets.*")
        rules += [
            Rename(f"encoder.down.{level}.downsample.conv.*", f"encoder.down_blocks.{level}.downsamplers.0.conv.*"),
            Rename(f"decoder.up.{level}.upsample.conv.*", f"decoder.up_blocks.{up}.upsamplers.0.conv.*"),
        ]
    return StateDictMapping(rules, keep_unmatched=False)


def _clip_rules(original, hf):
    old, new = f"{original}transformer.resblocks.*", f"{hf}encoder.layers.*"
    rules = [
        Rename(f"{original}class_embedding", f"{hf}embeddings.class_embedding"),
        Rename(f"{original}positional_embedding", f"{hf}embeddings.position_embedding.weight"),
        Rename(f"{original}conv1.weight", f"{hf}embeddings.patch_embedding.weight"),
        Rename(f"{original}ln_pre.*", f"{hf}pre_layrnorm.*"),
        Rename(f"{original}ln_post.*", f"{hf}post_layernorm.*"),
        Rename(f"{old}.ln_1.*", f"{new}.layer_norm1.*"),
        Rename(f"{old}.ln_2.*", f"{new}.layer_norm2.*"),
        Rename(f"{old}.mlp.c_fc.*", f"{new}.mlp.fc1.*"),
        Rename(f"{old}.mlp.c_proj.*", f"{new}.mlp.fc2.*"),
        Rename(f"{old}.attn.out_proj.*", f"{new}.self_attn.out_proj.*"),
    ]
    for kind in ("weight", "bias"):
        heads = [f"{new}.self_attn.{name}_proj.{kind}" for name in "qkv"]
        rules.append(split_rows(f"{old}.attn.in_proj_{kind}", *heads))
    return rules


def clip_vision_mapping(config=None):
    """open_clip's `visual.` names <-> the `vision_model.` part of `DivotTokenizerModel`."""
    return StateDictMapping(_clip_rules("visual.", "vision_model."), keep_unmatched=False)


def tokenizer_mapping(config=None):
    """The released tokenizer file, with `vit_model.model.visual.` merged in <-> `DivotTokenizerModel`."""
    old, new = "temporal_encoder.transformer.resblocks.*", "temporal_encoder.layers.*"
    joint_old, joint_new = "image_proj_model.blocks.*", "joint_encoder.layers.*"
    rules = [
        *_clip_rules("vit_model.model.visual.", "vision_model."),
        Rename("temporal_encoder.positional_embedding", "temporal_encoder.position_embedding"),
        Rename("temporal_encoder.input_proj.*", "temporal_encoder.proj_in.*"),
        Rename("temporal_encoder.output_proj.*", "temporal_encoder.proj_out.*"),
        Rename("temporal_encoder.ln_final.*", "temporal_encoder.norm.*"),
        Rename(f"{old}.ln_1.*", f"{new}.norm1.*"),
        Rename(f"{old}.ln_2.*", f"{new}.norm2.*"),
        Rename(f"{old}.attn.in_proj_weight", f"{new}.attention.qkv_proj.weight"),
        Rename(f"{old}.attn.in_proj_bias", f"{new}.attention.qkv_proj.bias"),
        Rename(f"{old}.attn.out_proj.*", f"{new}.attention.out_proj.*"),
        Rename(f"{old}.mlp.c_fc.*", f"{new}.mlp.fc1.*"),
        Rename(f"{old}.mlp.c_proj.*", f"{new}.mlp.fc2.*"),
        Rename("norm.*", "pooled_norm.*"),
        Rename("image_proj_model.pos_embed_spatial", "joint_encoder.spatial_position_embedding"),
        Rename("image_proj_model.pos_embed_temporal", "joint_encoder.temporal_position_embedding"),
        Rename("image_proj_model.norm.*", "joint_encoder.norm.*"),
        Rename(f"{joint_old}.norm1.*", f"{joint_new}.norm1.*"),
        Rename(f"{joint_old}.norm2.*", f"{joint_new}.norm2.*"),
        Rename(f"{joint_old}.attn.qkv.*", f"{joint_new}.attention.qkv_proj.*"),
        Rename(f"{joint_old}.attn.proj.*", f"{joint_new}.attention.out_proj.*"),
        Rename(f"{joint_old}.mlp.*.*", f"{joint_new}.mlp.*.*"),
        *_resampler_rules("image_proj_model.down_sampler.", "resampler."),
    ]
    return StateDictMapping(rules, keep_unmatched=False)


__all__ = ["clip_vision_mapping", "prefixed", "resampler_mapping", "tokenizer_mapping", "unet_mapping", "vae_mapping"]
