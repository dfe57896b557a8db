"""Train a small latent video diffusion model on a dataset of latents, and look at what it draws. Made to be copied.

    python examples/train_latent_diffusion.py --data data/demo/latents --out data/runs/first
    torchrun --nproc-per-node 8 examples/train_latent_diffusion.py --data s3://bucket/latents --vae /path/to/vae ...

A transformer over patches of latent frames whose blocks attend over space, then over time (Latte, arXiv 2401.03048,
variant 1), with DiT's adaLN-zero (arXiv 2212.09748). Trained by flow matching (arXiv 2210.02747, straight paths) or
by v-prediction (arXiv 2202.00512); both are a path from data to noise, so one Euler sampler draws from either.

Start it again and it goes on from OUT/checkpoint.pt, bit for bit as if never stopped where kernels are deterministic:
the reader's state is in the checkpoint, and noise is a function of seed, step and rank.
B clips, C channels, T latent frames, H W latent positions, S patches of a frame, D width.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cvvae import SPECS, VideoVAE, load_vae, seeded_vae
from pipeline.checkpoints import fetch_checkpoint
from pipeline.reader import LatentBatch, LatentDataset

WORDS = 4096  # hashes of words that a caption is told apart by


@dataclass(frozen=True)
class Settings:
    """Every field is an option: --data, --steps ..."""

    data: str = "data/demo/latents"
    vae: str = "shipped://tiny-cvvae"  # a checkpoint, as of latents encode, or a name of SPECS: seeded weights
    out: str = "data/runs/latent-diffusion"
    bucket: str = ""  # TTTTTxHHHHHxWWWWW; "" is all of them
    batch_size: int = 8  # over all ranks
    steps: int = 2000
    lr: float = 1e-3
    warmup: int = 50
    objective: str = "flow"  # or "v"
    captions: float = 0.0  # 0: without; else with, and this part of them dropped, such as 0.1
    patch: int = 2
    width: int = 128
    depth: int = 4
    ema: float = 0.99
    seed: int = 0
    workers: int = 0
    start_from: str = ""  # a checkpoint of another run, for its averaged weights
    train_only: str = "all"  # or "output": the last layer alone
    checkpoint_every: int = 100
    sample_every: int = 500
    sampler_steps: int = 25

    def __post_init__(self) -> None:
        if self.objective not in ("flow", "v") or self.train_only not in ("all", "output"):
            found = (self.objective, self.train_only)
            raise ValueError(f"objective, train_only: expected flow or v, and all or output, got {found}")


def sincos(positions: Tensor, width: int) -> Tensor:
    """(N) numbers -> (N, width): Transformers' sinusoids."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Attention over a frame's patches, attention over a patch's frames, MLP; each scaled, shifted and gated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x_BTSD: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition_BD).view(len(x_BTSD), 3, 3, 1, 1, -1).unbind(1)
        for part in range(3):
            y = functional.layer_norm(x_BTSD, x_BTSD.shape[-1:]) * (1 + scale[:, part]) + shift[:, part]
            y = y.transpose(1, 2) if part == 1 else y
            if part < 2:
                flat = y.flatten(0, 1)
                y = self.attention[part](flat, flat, flat, need_weights=False)[0].view(y.shape)
            else:
                y = self.mlp(y)
            x_BTSD = x_BTSD + gate[:, part] * (y.transpose(1, 2) if part == 1 else y)
        return x_BTSD


class LatentTransformer(nn.Module):
    """(B, C, T, H, W) noisy latents, (B) times in [0, 1], captions -> the velocity, of the latents' shape."""

    def __init__(self, channels: int, settings: Settings) -> None:
        super().__init__()
        width, kernel = settings.width, (1, settings.patch, settings.patch)
        self.enter = nn.Conv3d(channels, width, kernel, stride=kernel)
        self.moment = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.caption = nn.Linear(WORDS, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads=max(1, width // 32)) for _ in range(settings.depth))
        self.output = nn.ConvTranspose3d(width, channels, kernel, stride=kernel)
        nn.init.zeros_(self.output.weight)

    def forward(self, x_BCTHW: Tensor, time_B: Tensor, captions: list[str]) -> Tensor:
        if any(side % patch for side, patch in zip(x_BCTHW.shape[2:], self.enter.kernel_size)):
            raise ValueError(f"expected sides that patches of {self.enter.kernel_size} fill, got {x_BCTHW.shape}")
        x = self.enter(x_BCTHW)
        batch, width, time, rows, columns = x.shape
        down, across = (sincos(torch.arange(n, device=x.device), width // 2) for n in (rows, columns))
        space = torch.cat([down[:, None].expand(-1, columns, -1), across.expand(rows, -1, -1)], dim=2).flatten(0, 1)
        places_TSD = sincos(torch.arange(time, device=x.device), width)[:, None] + space
        x = x.permute(0, 2, 3, 4, 1).flatten(2, 3) + places_TSD
        condition = self.moment(sincos(1000 * time_B, width)) + self.caption(bags_of_words(captions).to(x))
        for block in self.blocks:
            x = block(x, functional.silu(condition))
        x = functional.layer_norm(x, (width,)).view(batch, time, rows, columns, width)
        return self.output(x.permute(0, 4, 1, 2, 3))


def bags_of_words(captions: list[str]) -> Tensor:
    """(B, WORDS), 1 where a word's hash is: the least that a caption can be. All zeros for an empty one."""
    bags = torch.zeros(len(captions), WORDS)
    for bag, caption in zip(bags, captions):
        bag[[zlib.crc32(word.encode()) % WORDS for word in caption.lower().split()]] = 1
    return bags


def on_path(objective: str, clean: Tensor, noise: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the path is at time t, and the velocity there: what the model learns. t = 0 is data, t = 1 is noise."""
    t = time_B.view(-1, 1, 1, 1, 1)
    if objective == "flow":
        return (1 - t) * clean + t * noise, noise - clean
    alpha, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    return alpha * clean + sigma * noise, alpha * noise - sigma * clean


@torch.no_grad()
def draw(model: nn.Module, x_BCTHW: Tensor, captions: list[str], settings: Settings) -> Tensor:
    """Normalized latents from noise: Euler steps back along the path."""
    count, speed = settings.sampler_steps, 1.0 if settings.objective == "flow" else math.pi / 2
    for step in range(count, 0, -1):
        time_B = torch.full((len(x_BCTHW),), step / count, device=x_BCTHW.device)
        x_BCTHW = x_BCTHW - speed / count * model(x_BCTHW, time_B, captions)
    return x_BCTHW


def loss_of(model: nn.Module, batch: LatentBatch, settings: Settings, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity over the rows that are no padding."""
    clean = batch.latents_BCTHW
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    time_B = torch.randn(len(clean), generator=generator, device=clean.device).sigmoid()
    x, velocity = on_path(settings.objective, clean, noise, time_B)
    captions = batch.captions if settings.captions else [""] * len(clean)
    error_B = (model(x, time_B, captions).float() - velocity).square().flatten(1).mean(1)
    return error_B[~batch.is_padding_B].sum() / len(error_B)


def open_vae(name: str) -> VideoVAE:
    return (seeded_vae(SPECS[name], 0) if name in SPECS else load_vae(fetch_checkpoint(name))).eval()


class Artist:
    """Draws from the same noise every time; real.gif is what clips of the dataset look like through the VAE."""

    def __init__(self, settings: Settings, dataset: LatentDataset, device: torch.device) -> None:
        self.settings = settings
        self.vae = open_vae(settings.vae).to(device)
        if self.vae.weights_sha256 != dataset.catalog.manifest.identity.weights_sha256:
            raise ValueError(f"vae: expected the one that {settings.data} is encoded with, got {settings.vae}")
        buckets = [max(dataset.plan.buckets, key=lambda bucket: bucket.num_rows).name]
        batch = next(iter(LatentDataset(settings.data, 4, rank=0, world_size=1, buckets=buckets, tail="pad")))
        self.captions = batch.captions if settings.captions else [""] * 4
        noise_BCTHW = torch.randn(batch.latents_BCTHW.shape, generator=torch.Generator().manual_seed(1))
        self.noise_BCTHW = noise_BCTHW.to(device)
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        self._show(batch.latents_BCTHW.to(device), "real")

    def draw(self, model: LatentTransformer, step: int) -> None:
        self._show(draw(model, self.noise_BCTHW, self.captions, self.settings), f"samples-{step:06d}")

    @torch.no_grad()
    def _show(self, latents_BCTHW: Tensor, name: str) -> None:
        """NAME.gif plays the clips side by side; NAME.png has a row for each clip, a column for each frame."""
        video = self.vae.decode(self.vae.denormalize(latents_BCTHW.to(self.vae.dtype))).clamp(-1, 1)
        frames_TBHWC = ((video + 1) * 127.5).round().to(torch.uint8).permute(2, 0, 3, 4, 1).cpu()
        pictures = [Image.fromarray(torch.cat(list(frame), dim=1).numpy()) for frame in frames_TBHWC]
        path = f"{self.settings.out}/{name}"
        pictures[0].save(f"{path}.gif", save_all=True, append_images=pictures[1:], duration=100, loop=0)
        rows = [torch.cat(list(clip), dim=1) for clip in frames_TBHWC.transpose(0, 1)]
        Image.fromarray(torch.cat(rows).numpy()).save(f"{path}.png")


class Run:
    """A run on one rank: model, its moving average, optimizer, and where they stand."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if self.cuda else "gloo")
        self.checkpoint = Path(settings.out) / "checkpoint.pt"
        saved: dict[str, Any] = self._load(self.checkpoint) if self.checkpoint.exists() else {}
        options: dict[str, Any] = {"seed": settings.seed, "epochs": None, "start": saved.get("reader", 0)}
        options |= {"buckets": [settings.bucket] if settings.bucket else None, "caption_dropout": settings.captions}
        self.dataset = LatentDataset(settings.data, settings.batch_size, tail="pad", **options)
        torch.manual_seed(settings.seed)
        channels = self.dataset.catalog.spec.latent_channels
        self.model, self.average = (LatentTransformer(channels, settings).to(self.device) for _ in range(2))
        if not saved:
            first = self._load(settings.start_from)["average"] if settings.start_from else self.model.state_dict()
            saved |= {"model": first, "average": first}
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.model.requires_grad_(settings.train_only == "all").output.requires_grad_(True)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
        if "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.parallel = DistributedDataParallel(self.model) if self.world > 1 else self.model

    def step(self, batch: LatentBatch) -> float:
        """One update; the loss before it."""
        settings, number = self.settings, batch.consumed
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, number / settings.warmup)
        generator = torch.Generator(self.device)
        generator.manual_seed((settings.seed * 1_000_003 + number) * self.world + self.rank)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            loss = loss_of(self.parallel, batch.to(self.device, non_blocking=True), settings, generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.model.parameters()):
                mean.lerp_(parameter, max(1 - settings.ema, 10 / (number + 10)))
        return loss.item()

    def _load(self, path: str | Path) -> dict[str, Any]:
        return torch.load(path, weights_only=True, map_location=self.device)

    def save(self, consumed: int) -> None:
        """A checkpoint, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        new = self.checkpoint.with_suffix(".new")
        torch.save(state | {"reader": self.dataset.state(consumed), "settings": asdict(self.settings)}, new)
        new.replace(self.checkpoint)


def train(settings: Settings) -> None:
    """Train, or go on from the checkpoint."""
    run = Run(settings)
    log = Path(settings.out) / "metrics.jsonl"
    artist = Artist(settings, run.dataset, run.device) if run.rank == 0 else None
    if artist:
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= run.dataset.start))
        if run.dataset.start == 0:
            artist.draw(run.average, 0)
    for batch in DataLoader(run.dataset, batch_size=None, num_workers=settings.workers, pin_memory=run.cuda):
        step = batch.consumed
        if step > settings.steps:
            break
        loss = run.step(batch)
        if artist is None:
            continue
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            run.save(step)
            print(f"step={step} loss={loss:.4f}", flush=True)
        if step % settings.sample_every == 0 or step == settings.steps:
            artist.draw(run.average, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    train(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
