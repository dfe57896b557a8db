"""Batches of latents for a trainer."""
