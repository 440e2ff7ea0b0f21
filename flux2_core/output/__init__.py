"""What a run leaves: LoRA files, report, card."""
