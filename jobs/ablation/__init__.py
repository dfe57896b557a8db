"""Ablations: variants of a finetune, run, evaluated and put in one table."""
