"""The page about one dataset: facts from its documents, windows looked at, latents, seams."""
