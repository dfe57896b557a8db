"""What `latents evaluate` is made of."""
