"""Quality measures of reconstructed video: PSNR and SSIM by the rules of VidTok's evaluation, and their streaming sum."""

from .frame_quality import VideoQuality, psnr, ssim

__all__ = ["VideoQuality", "psnr", "ssim"]
