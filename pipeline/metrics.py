"""An encoder's figures as Prometheus metrics, through Ray's own export: each node's agent serves them.

Counts become counters, of which the growth since the last time is added, so that an actor that is restarted does not
take anything back. Every metric has the labels `dataset` (the output's URL) and `encoder`; Ray adds the node's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `label` is the name of the label that the part of a figure's name behind the dot becomes."""

    name: str
    kind: type[Counter] | type[Gauge]
    help: str
    label: str | None = None


METRICS: dict[str, Metric] = {
    "window_frames": Metric("latents_window_frames_total", Counter, "Frames of windows that were encoded."),
    "tiles": Metric("latents_tiles_total", Counter, "Tiles encoded."),
    "filler_tiles": Metric("latents_filler_tiles_total", Counter, "Blank tiles that filled up batches."),
    "state": Metric(
        "latents_encoder_seconds_total",
        Counter,
        "Seconds of an encoder by state: encode, or what it waits for (decode, store, other, no_shard).",
        "state",
    ),
    "shards": Metric("latents_shards_total", Counter, "Shards stored."),
    "samples": Metric("latents_samples_total", Counter, "Samples that came to an end."),
    "payload_bytes": Metric("latents_payload_bytes_total", Counter, "Bytes of payload stored."),
    "clip_bytes": Metric("latents_clip_bytes_total", Counter, "Bytes of the clips read."),
    "rejections": Metric("latents_rejections_total", Counter, "Rejections by class.", "error_class"),
    "retries": Metric(
        "latents_retries_total",
        Counter,
        "What was done again, by cause: decode_child, clip_lost, out_of_memory.",
        "cause",
    ),
    "clips_waiting": Metric("latents_decode_clips_waiting", Gauge, "Clips that wait for a decode process."),
    "windows_waiting": Metric("latents_decode_windows_waiting", Gauge, "Decoded windows that wait for the encoder."),
    "decode_children": Metric("latents_decode_children", Gauge, "Decode processes that run, anywhere."),
    "remote_decoders": Metric("latents_remote_decoders", Gauge, "Those of them on other nodes."),
    "remote_clips": Metric("latents_remote_clips_total", Counter, "Clips decoded on other nodes."),
    "gpu_bytes": Metric("latents_gpu_memory_bytes", Gauge, "GPU memory: allocated, reserved, peak.", "kind"),
}


class MetricsExport:
    """The metrics of one encoder."""

    def __init__(self, dataset: str, encoder: str) -> None:
        self._tags = {"dataset": dataset, "encoder": encoder}
        self._before: dict[str, float] = {}
        self._metrics = {
            figure: metric.kind(
                metric.name,
                description=metric.help,
                tag_keys=(*self._tags, *([metric.label] if metric.label else [])),
            )
            for figure, metric in METRICS.items()
        }

    def publish(self, figures: Mapping[str, float]) -> None:
        """Bring the metrics to these figures; names that are no metric are passed over."""
        for name, value in figures.items():
            family, _, part = name.partition(".")
            described, metric = METRICS.get(family), self._metrics.get(family)
            if described is None or metric is None:
                continue
            tags = self._tags | ({described.label: part} if described.label else {})
            if isinstance(metric, Gauge):
                metric.set(value, tags)
            elif value > self._before.get(name, 0.0):
                metric.inc(value - self._before.get(name, 0.0), tags)
                self._before[name] = value
