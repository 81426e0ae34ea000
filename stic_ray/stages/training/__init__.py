"""Stages `dpo` and `sft`: TRL's trainers in Ray Train workers under DeepSpeed ZeRO."""
