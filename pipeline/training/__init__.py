"""Training a VAE: the data, the loop, the checkpoints, the export. Torch without Ray; jobs/finetune_vae.py scales it.

The run is a function of its config and seed: which samples, which crops, which noise follow from (seed, step), never
from how many workers share the work or from when it was interrupted.
"""
