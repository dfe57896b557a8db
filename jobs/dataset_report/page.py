"""The page about one dataset, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from cvvae import spec_from_dict
from cvvae.metrics import SSIM_WINDOW
from jobs.dataset_report.facts import DatasetFacts, RunTimes
from jobs.dataset_report.latents import DEAD_STD, Components, histograms
from jobs.dataset_report.looked_at import BucketLooks, Look
from jobs.evaluation.charts import bar_chart, line_chart
from jobs.evaluation.examples import MAX_SIDE, picture_uri
from jobs.evaluation.report import windows_text
from jobs.web_page import bullets, figure, table
from pipeline.planning.compare import compare_totals

GRID = 4
WORST = 3
SHOWN_CHANNELS = 16
TIME_BINS = 30
PICTURE_MILLISECONDS = 120
HISTOGRAM_BINS = 12
ENOUGH_FOR_A_DISTRIBUTION = 3


def page_body(facts: DatasetFacts, buckets: Sequence[BucketLooks]) -> Iterator[str]:
    """HTML parts, in order."""
    manifest, counts = facts.manifest, facts.manifest.counts
    yield f"<h1>Video latents: {escape(facts.url)}</h1>"
    yield (
        f"<p>{counts.windows_stored:,} windows of {counts.clips_encoded:,} clips in {len(manifest.shards):,} shards, "
        f"{manifest.payload_bytes:,} bytes; {counts.frames_stored:,} frames.</p>"
    )
    if facts.notes:
        yield bullets(facts.notes)
    yield from _identity(facts)
    latents = [look.latent_CTHW for found in buckets for look in found.looks]
    components = Components.of(latents) if latents else None
    for found in buckets:
        yield from _bucket(found, components, facts)
    yield from _latents(facts, buckets, components)
    yield from _seams(facts, buckets)
    yield from _rejections(facts)
    yield from _throughput(facts)
    yield from _plan(facts)


def _identity(facts: DatasetFacts) -> Iterator[str]:
    identity = facts.manifest.identity
    vae = identity.vae
    moments = "mean and logvar" if identity.logvar else "mean"
    rows = {
        "identity": facts.manifest.fingerprint,
        "VAE": f"{vae.get('name')}, weights sha256 {identity.weights_sha256}",
        "normalize": f"z = (mean - {vae.get('shift_factor')}) * {vae.get('scaling_factor')}",
        "stored": f"{moments} in {identity.storage_dtype}, {facts.manifest.format}",
        "computed in": identity.compute_dtype,
        "windows": _settings_text(identity.windows.model_dump()),
        "resize": _settings_text(identity.resize.model_dump()),
        "decoders": ", ".join(f"{name}: {number} windows" for name, number in facts.manifest.decoders.items()),
        "encoded on": ", ".join(
            f"{name}: {number} shards" for name, number in sorted(facts.receipts.numerics.items())
        ),
    }
    yield "<h2>Identity</h2>"
    facts_table = table(("", ""), [(escape(name), escape(text)) for name, text in rows.items()])
    yield f'<div class="facts">{facts_table}</div>'


def _settings_text(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _bucket(found: BucketLooks, components: Components | None, facts: DatasetFacts) -> Iterator[str]:
    yield f"<h2>{escape(found.bucket)}: {windows_text(found.stored)}</h2>"
    if not found.looks:
        yield "<p>No window of it was decoded.</p>"
        return
    psnr = [look.psnr for look in found.looks]
    ssim = [look.ssim for look in found.looks if look.ssim is not None]
    text = f"{len(psnr)} decoded: PSNR {np.mean(psnr):.2f} dB, from {min(psnr):.2f} to {max(psnr):.2f}"
    text += f"; SSIM {np.mean(ssim):.4f}" if ssim else f"; no SSIM: a side is below {SSIM_WINDOW} pixels"
    yield f"<p>{text}. Source, what the stored latent decodes to, and the latent's principal components.</p>"
    charts = [("PSNR of windows (dB)", _distribution(psnr, "dB", 1))]
    if ssim:
        charts.append(("SSIM of windows", _distribution(ssim, "SSIM", 3)))
    frames = [float(np.mean(values)) for values in zip(*(look.psnr_T for look in found.looks), strict=True)]
    ticks = [str(number) for number in range(len(frames))]
    by_frame = line_chart({"PSNR": frames}, ticks, x_title="frame of the window", y_title="PSNR (dB)", decimals=2)
    charts.append(("PSNR by frame (dB)", by_frame))
    yield _charts(charts)
    stride = spec_from_dict(facts.manifest.identity.vae).space_stride
    yield _strips(found.looks[:GRID], components, stride)
    if len(found.looks) > GRID:
        yield "<h3>The worst of them</h3>"
        yield _strips(found.worst(WORST), components, stride)
    else:
        keys = ", ".join(look.key for look in found.worst(GRID))
        yield f"<p>From the worst on: {escape(keys)}.</p>"


def _distribution(values: Sequence[float], x_title: str, decimals: int) -> str:
    """ "" of fewer values than make one."""
    if len(values) < ENOUGH_FOR_A_DISTRIBUTION:
        return ""
    low, high = min(values), max(values)
    if high > low:
        decimals = max(decimals, math.ceil(-math.log10((high - low) / HISTOGRAM_BINS)))
    counts, edges = np.histogram(
        values, bins=HISTOGRAM_BINS, range=(low, high) if high > low else (low - 0.5, low + 0.5)
    )
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    return bar_chart(centres, counts.tolist(), x_title=x_title, y_title="windows", decimals=decimals)


def _charts(charts: Sequence[tuple[str, str]]) -> str:
    boxes = "".join(f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts if chart)
    return f'<div class="charts">{boxes}</div>'


def _strips(looks: Sequence[Look], components: Components | None, stride: int) -> str:
    return f'<div class="strips">{"".join(_strip(look, components, stride) for look in looks)}</div>'


def _strip(look: Look, components: Components | None, stride: int) -> str:
    milliseconds = round(1000 / look.fps) if look.fps else PICTURE_MILLISECONDS
    similarity = "" if look.ssim is None else f", SSIM {look.ssim:.4f}"
    captions = (f"{look.key}: {look.caption[:120]}", f"decoded: PSNR {look.psnr:.2f} dB{similarity}")
    figures = [
        figure(picture_uri(frames, milliseconds=max(20, milliseconds)), caption)
        for frames, caption in zip((look.source_THWC, look.decoded_THWC), captions, strict=True)
    ]
    if components is not None:
        height = look.latent_CTHW.shape[-2]
        enlarge = max(1, min(stride, MAX_SIDE // max(look.latent_CTHW.shape[-2:])))
        pictures = components.pictures(look.latent_CTHW, enlarge=enlarge)
        each = max(20, milliseconds * len(look.source_THWC) // len(pictures))
        uri = picture_uri(pictures, milliseconds=each)
        figures.append(figure(uri, f"latent, {len(pictures)} x {height} x {look.latent_CTHW.shape[-1]}, as colours"))
    return f'<div class="strip">{"".join(figures)}</div>'


def _latents(facts: DatasetFacts, buckets: Sequence[BucketLooks], components: Components | None) -> Iterator[str]:
    manifest = facts.manifest
    statistics = manifest.statistics
    yield "<h2>Latents</h2><p>Raw means, over all stored windows.</p>"
    rows = [
        (
            str(channel),
            f"{mean:.4f}",
            f"{std:.4f}",
            f"{low:.3f}",
            f"{high:.3f}",
            "carries nothing" if std < DEAD_STD else "",
        )
        for channel, (mean, std, low, high) in enumerate(
            zip(manifest.latent_mean, manifest.latent_std, statistics.minimum, statistics.maximum, strict=True)
        )
    ]
    yield table(("channel", "mean", "std", "minimum", "maximum", ""), rows)
    if components is None:
        return
    shown = histograms([look.latent_CTHW for found in buckets for look in found.looks])
    more = f"; the first {SHOWN_CHANNELS} of {len(shown)} channels" if len(shown) > SHOWN_CHANNELS else ""
    yield f"<h3>Histograms of the decoded windows' latents{more}</h3>"
    yield _charts(
        [
            (
                f"channel {one.channel}",
                bar_chart(one.centres, one.shares, x_title="value", y_title="share", decimals=2),
            )
            for one in shown[:SHOWN_CHANNELS]
        ]
    )
    shares = ", ".join(f"{share:.0%}" for share in components.shares[:SHOWN_CHANNELS])
    yield (
        f"<p>Principal components (channels of unit variance) hold {shares} of the variance; the first three are the "
        "red, green and blue of the latents above.</p>"
    )


def _seams(facts: DatasetFacts, buckets: Sequence[BucketLooks]) -> Iterator[str]:
    yield "<h2>Seams at tile borders</h2>"
    yield (
        "<p>In time: the jump of the decoding error from one frame to the next, in units of full scale; a ratio "
        "near 1 says that tile borders are not seen. In space: the error itself.</p>"
    )
    rows = []
    for found in buckets:
        ratio = found.seams.ratio()
        for place, mean in found.seams.means().items():
            shown = f"{ratio:.2f} of other latent borders" if place == "tile borders" and ratio is not None else ""
            rows.append((escape(found.bucket), place, f"{mean:.5f}", shown))
    yield table(("bucket", "place", "error", ""), rows) if rows else "<p>No window was decoded.</p>"
    if rows and not any(place == "tile borders" for _, place, _, _ in rows):
        yield "<p>All windows are one tile in time: there is no border.</p>"
    if facts.receipts.proofs:
        yield "<h3>Tiles against the model's own encode, as the receipts have it</h3>"
        yield _proof_table(facts)


def _proof_table(facts: DatasetFacts) -> str:
    proofs = sorted(facts.receipts.proofs, key=lambda one: -(one[1].alone_relative_rms or 0.0))
    rows = [
        (
            escape(shard_id),
            str(proof.windows),
            _deviation(proof.alone_relative_rms),
            _deviation(proof.untiled_relative_rms),
            str(proof.windows_out_of_memory or ""),
        )
        for shard_id, proof in proofs[:20]
    ]
    head = (
        *("shard (the 20 furthest)", "windows", "from the window by itself", "from one pass without tiles"),
        "not proven: out of memory",
    )
    not_proven = facts.manifest.windows_not_proven
    return (
        table(head, rows)
        + "<p>RMS of the difference over RMS of the latent; the worst window of each shard.</p>"
        + (f"<p>Not proven, out of memory: {not_proven:,} windows over all shards.</p>" if not_proven else "")
    )


def _deviation(relative_rms: float | None) -> str:
    return "" if relative_rms is None else f"{relative_rms:.2g}"


def _rejections(facts: DatasetFacts) -> Iterator[str]:
    counts, rejections = facts.manifest.counts, facts.manifest.rejections
    yield f"<h2>Rejected: {sum(rejections.values()):,} of {counts.samples:,} samples</h2>"
    if not rejections:
        return
    rows = [
        (escape(name), f"{number:,}", f"{number / max(1, counts.samples):.2%}") for name, number in rejections.items()
    ]
    yield table(("class", "number", "of all samples"), rows)
    for name, examples in sorted(facts.receipts.examples.items()):
        yield f"<h3>{escape(name)}</h3>"
        yield bullets([f"{key} in shard {shard_id}: {message}" for key, shard_id, message in examples])


def _throughput(facts: DatasetFacts) -> Iterator[str]:
    yield "<h2>Throughput</h2>"
    if not facts.runs:
        yield "<p>There is no report of a run.</p>"
        return
    rows = [
        (
            escape(run.run_id),
            escape(run.outcome),
            str(len(run.committed)),
            f"{run.wall_seconds:,.0f} s",
            f"{run.frames / run.wall_seconds:,.1f}" if run.wall_seconds else "",
        )
        for run in facts.runs
    ]
    yield table(("run", "outcome", "shards", "wall time", "frames/s stored"), rows)
    for run in facts.runs:
        if len(run.committed) > 1:
            yield _charts([(f"{run.run_id}: frames/s over time", _rate_chart(run))])
        if run.stage_seconds:
            stages = sorted(run.stage_seconds.items(), key=lambda one: -one[1])
            listed = ", ".join(f"{name} {value:,.0f}" for name, value in stages)
            yield f"<p>Seconds over all shards: {escape(listed)}.</p>"


def _rate_chart(run: RunTimes) -> str:
    """Frames of the shards that were committed in each stretch of the run, over its length."""
    bins = min(TIME_BINS, len(run.committed))
    length = run.committed[-1][0] / bins or 1.0
    totals = [0] * bins
    for at, frames in run.committed:
        totals[min(bins - 1, int(at / length))] += frames
    ticks = [f"{(number + 1) * length:.0f}" for number in range(bins)]
    rates: list[float | None] = [total / length for total in totals]
    return line_chart({"frames/s": rates}, ticks, x_title="seconds after the start", y_title="frames/s", decimals=1)


def _plan(facts: DatasetFacts) -> Iterator[str]:
    if facts.plan is None:
        return
    yield "<h2>Plan against actual</h2>"
    rows = [
        (
            escape(one.name),
            f"{one.planned.value:,.0f}",
            f"{one.planned.low:,.0f} to {one.planned.high:,.0f}",
            f"{one.actual:,.0f}",
            "" if one.inside else "outside",
        )
        for one in compare_totals(facts.plan, facts.manifest)
    ]
    yield table(("", "planned", "interval", "actual", ""), rows)
