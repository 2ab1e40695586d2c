"""Configuration of VidTok (arXiv 2412.13061)."""

from transformers import PreTrainedConfig

from ..configuration import strict_config


@strict_config
class VidTokConfig(PreTrainedConfig):
    """Configuration of a VidTok video autoencoder.

    Levels are numbered from 0 (full resolution) to `len(channel_multipliers) - 1` (latent resolution). An encoder level
    in `spatial_downsample_levels` halves height and width after its blocks, a decoder level in `spatial_upsample_levels`
    doubles them; time is resampled only on levels that also resample space. The decoder's temporal levels are not the
    encoder's mirrored: the 41616 models halve time at levels 2 and 3 and double it at levels 2 and 1.

    Args:
        version: "1.0" or "1.1", required for causal models: both have the same tensors but pad and interpolate in time
            differently, so it is never guessed. Ignored (and set to None) for non-causal models.
        is_causal: whether a frame depends on earlier frames only.
        regularizer: "kl" (Gaussian posterior) or "fsq" (finite scalar quantization).
        latent_channels: channels of the latents.
        fsq_levels: number of values per latent channel, `latent_channels` entries (FSQ only).
        base_channels: width of level 0.
        channel_multipliers: width of each level in units of `base_channels`.
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        temporal_compression_ratio: frames per latent frame; must equal 2 ** (number of temporal levels).
        temporal_interpolation: "linear" or "nearest", how a v1.1 decoder doubles time (the other models repeat frames).
        norm_type: "layernorm" (all releases) or "groupnorm".
        dropout: dropout inside the residual blocks.
        sample_posterior: whether `forward` samples the posterior when it is not told (KL only). The authors' scripts
            always sample; the mean reconstructs slightly better.
        kl_loss_weight: weight of the KL term in `loss`.
        entropy_loss_weight, entropy_loss_annealing_steps, entropy_loss_annealing_factor, commitment_loss_weight: FSQ's
            auxiliary loss; the entropy weight falls linearly from factor * weight to weight during the given steps.
        aux_loss_weight: weight of FSQ's auxiliary loss in `loss`.
    """

    model_type = "vidtok"
    has_no_defaults_at_init = True  # a causal model must state its version

    version: str | None = None
    is_causal: bool = True
    regularizer: str = "kl"
    latent_channels: int = 4
    fsq_levels: list[int] | tuple[int, ...] | None = None
    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    spatial_downsample_levels: list[int] | tuple[int, ...] | None = None
    spatial_upsample_levels: list[int] | tuple[int, ...] | None = None
    temporal_downsample_levels: list[int] | tuple[int, ...] | None = None
    temporal_upsample_levels: list[int] | tuple[int, ...] | None = None
    temporal_compression_ratio: int = 4
    temporal_interpolation: str = "linear"
    norm_type: str = "layernorm"
    dropout: float | int = 0.0
    sample_posterior: bool = False
    kl_loss_weight: float | int = 1e-6
    entropy_loss_weight: float | int = 0.1
    entropy_loss_annealing_steps: int = 2000
    entropy_loss_annealing_factor: float | int = 3.0
    commitment_loss_weight: float | int = 0.25
    aux_loss_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        num_levels = len(self.channel_multipliers)
        if self.spatial_downsample_levels is None:
            self.spatial_downsample_levels = list(range(num_levels - 1))
        if self.spatial_upsample_levels is None:
            self.spatial_upsample_levels = list(range(1, num_levels))
        if self.temporal_downsample_levels is None:
            self.temporal_downsample_levels = [level for level in (num_levels - 3, num_levels - 2) if level >= 0]
        if self.temporal_upsample_levels is None:
            self.temporal_upsample_levels = [level for level in (1, 2) if level < num_levels]
        if not self.is_causal:
            self.version = None
        super().__post_init__(**kwargs)

    def validate_version(self):
        if self.is_causal and self.version not in ("1.0", "1.1"):
            raise ValueError(
                f"VidTokConfig.version must be '1.0' or '1.1' for a causal model, got {self.version!r}: both versions "
                "have the same tensors and different maths, so it has to be stated"
            )

    def validate_choices(self):
        for name, choices in (
            ("regularizer", ("kl", "fsq")),
            ("norm_type", ("layernorm", "groupnorm")),
            ("temporal_interpolation", ("linear", "nearest")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"VidTokConfig.{name} must be one of {choices}, got {getattr(self, name)!r}")

    def validate_fsq_levels(self):
        if self.regularizer != "fsq":
            return
        levels = self.fsq_levels
        if levels is None or len(levels) != self.latent_channels or min(levels) < 2:
            raise ValueError(
                f"VidTokConfig.fsq_levels must hold latent_channels={self.latent_channels} numbers of at least 2, got {levels}"
            )

    def validate_levels(self):
        num_levels = len(self.channel_multipliers)
        for name in ("spatial_downsample_levels", "temporal_downsample_levels"):
            if not set(getattr(self, name)) <= set(range(num_levels)):
                raise ValueError(f"VidTokConfig.{name} names levels outside 0..{num_levels - 1}: {getattr(self, name)}")
        for name in ("spatial_upsample_levels", "temporal_upsample_levels"):
            if not set(getattr(self, name)) <= set(range(num_levels)):
                raise ValueError(f"VidTokConfig.{name} names levels outside 0..{num_levels - 1}: {getattr(self, name)}")
        if len(self.spatial_downsample_levels) != len(self.spatial_upsample_levels):
            raise ValueError("VidTokConfig: encoder and decoder must resample space equally often")
        down = set(self.temporal_downsample_levels) & set(self.spatial_downsample_levels)
        up = set(self.temporal_upsample_levels) & set(self.spatial_upsample_levels)
        if 2 ** len(down) != self.temporal_compression_ratio or 2 ** len(up) != self.temporal_compression_ratio:
            raise ValueError(
                f"VidTokConfig.temporal_compression_ratio is {self.temporal_compression_ratio}, but time is halved "
                f"{len(down)} and doubled {len(up)} times (only on levels that also resample space)"
            )

    def validate_groupnorm(self):
        widths = [self.base_channels * m for m in self.channel_multipliers]
        if self.norm_type == "groupnorm" and any(width % 32 for width in (self.base_channels, *widths)):
            raise ValueError(f"VidTokConfig: groupnorm has 32 groups, which do not divide all widths {widths}")

    @property
    def spatial_compression_ratio(self):
        """Pixels per latent position along height and along width."""
        return 2 ** len(self.spatial_downsample_levels)

    @property
    def codebook_size(self):
        """Number of FSQ codes, or None for KL models."""
        if self.regularizer != "fsq":
            return None
        size = 1
        for levels in self.fsq_levels:
            size *= levels
        return size
