"""Batches of latents for a trainer, from what the encode job wrote. docs/training.md shows how.

Works without ray: the base installation has what it needs, the extra `s3` what S3 needs.
"""

from pipeline.reader.dataset import LatentDataset, ReaderState
from pipeline.reader.latent_batch import LatentBatch, SubWindow

__all__ = ["LatentBatch", "LatentDataset", "ReaderState", "SubWindow"]
