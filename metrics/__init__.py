"""Quality of reconstructed video: PSNR and SSIM by the rules of VidTok's evaluation, and their streaming average."""

from .frame_quality import VideoQuality, psnr, ssim

__all__ = ["VideoQuality", "psnr", "ssim"]
