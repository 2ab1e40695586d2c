"""Generator-only training of a video tokenizer: reconstruction and regularization, the loss the model's `forward` returns."""

import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments


def collate(items):
    """Stacks clips (num_frames, channels, height, width) to a batch."""
    return {"pixel_values_videos": torch.stack([item["pixel_values_videos"] for item in items])}


def train_reconstruction(model, clips, output_dir, *, resume=False, **arguments):
    """Trains `model` on `clips` with transformers' `Trainer`.

    Args:
        model: a tokenizer whose forward returns a loss.
        clips: data set of {"pixel_values_videos": (num_frames, channels, height, width)}.
        output_dir: checkpoints, `log.json` and the trained model go here.
        resume: continue from the last checkpoint in `output_dir`; bit-exact.
        arguments: further `TrainingArguments`.

    Returns:
        The training log: list of dicts.
    """
    settings = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "adam_beta2": 0.99,
        "logging_steps": 20,
        "save_steps": 200,
        "save_total_limit": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "num_train_epochs": 1,
        **arguments,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **settings),
        train_dataset=clips,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    Path(output_dir, "log.json").write_text(json.dumps(log, indent=1))
    trainer.save_model()
    return log
