"""How far a dataset is, from its store alone: no cluster is asked, and nothing is written.

A shard is done when its receipt stands, and a receipt's time is when it was done: one listing gives both. What was
rejected is in the receipts; of a finished dataset the manifest has it. A `StatusReader` keeps what it has read, so
that looking again costs a listing and the receipts that came since. Which shards are slow, and whether the driver is
alive, is in the run's own short file, which it writes twice a minute (run_log.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ValidationError

from pipeline.dataset import MANIFEST, DatasetFolder
from pipeline.documents import Counts, Manifest, RunFile
from pipeline.errors import DatasetError
from pipeline.run_log import BEAT_SECONDS
from pipeline.storage import StampedObject, Store

RATE_SECONDS = 900.0
"""The rate is that of the last quarter of an hour..."""
RATE_SHARDS = 20
"""...or of so many shards, if they took longer."""
SILENT_AFTER = 4 * BEAT_SECONDS


class RunPulse(BaseModel):
    """What runs/ID.json says of the latest run; fields that an older release did not write are None or empty."""

    run_id: str
    started_unix: float
    outcome: str
    written_unix: float | None = None
    driver_host: str = ""
    shards_total: int | None = None
    num_set_aside: int = 0
    slowest_shards: tuple[tuple[str, float], ...] = ()
    """Seconds of the slowest shards that this run committed, slowest first."""
    under_way: tuple[tuple[str, float], ...] = ()
    """Seconds since the shards were begun that have been in work for longest, as of `written_unix`."""

    @property
    def is_running(self) -> bool:
        return self.outcome == "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast receipts came."""

    shards: int
    frames: int
    """Stored, of those shards."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatus:
    """One look."""

    url: str
    now_unix: float
    run_file: RunFile
    done: int
    total: int | None
    """Shards of the source; None if no run has said so yet."""
    finished: bool
    """The manifest stands and covers every receipt."""
    counts: Counts
    rejections: dict[str, int]
    payload_bytes: int
    windows_not_proven: int
    """Of those that encode.proof_share chose: a reference ran out of memory."""
    rate: Rate | None
    """None while fewer than two receipts of this run stand."""
    last_receipt_seconds: float | None
    """Since the last receipt; None if there is none or the store has no times."""
    run: RunPulse | None

    @property
    def left(self) -> int | None:
        if self.total is None:
            return None
        return max(0, self.total - self.done - (self.run.num_set_aside if self.run else 0))

    @property
    def eta_seconds(self) -> float | None:
        """For what is left at the present rate; None if nothing is left or the rate is not known."""
        if not self.left or self.rate is None or self.run is None or not self.run.is_running:
            return None
        return self.left * self.rate.seconds / self.rate.shards

    @property
    def driver_silent_seconds(self) -> float | None:
        """How long a run that should go on has said nothing; None if all is well or no run goes on."""
        if self.run is None or not self.run.is_running or self.run.written_unix is None:
            return None
        silent = self.now_unix - self.run.written_unix
        return silent if silent > SILENT_AFTER else None


@dataclass(slots=True)
class _Tally:
    """Totals over the receipts read so far."""

    counts: Counts = field(default_factory=Counts)
    rejections: Counter[str] = field(default_factory=Counter)
    payload_bytes: int = 0
    windows_not_proven: int = 0
    frames: dict[str, int] = field(default_factory=dict)
    """Frames stored, by shard."""


class StatusReader:
    """Looks at one dataset, any number of times."""

    def __init__(self, store: Store) -> None:
        self._folder = DatasetFolder(store)
        self._tally = _Tally()
        self._finished: tuple[str, Manifest] | None = None

    def read(self) -> DatasetStatus:
        """DatasetError if this is no dataset, or a receipt is damaged; StorageError if the store refuses."""
        run_file = self._folder.run_file()
        now = time.time()
        receipts = {
            name.removesuffix(".json"): stamp
            for name, stamp in self._folder.store.modified("receipts", ".json").items()
        }
        run = self._latest_run()
        manifest = self._manifest(receipts)
        totals = self._totals(receipts, manifest)
        times = {name: at for name, stamp in receipts.items() if (at := stamp.modified_unix) is not None}
        total = run.shards_total if run is not None else None
        return DatasetStatus(
            url=self._folder.store.full_url(""),
            now_unix=now,
            run_file=run_file,
            done=len(receipts),
            total=len(receipts) + len(manifest.set_aside) if manifest is not None else total,
            finished=manifest is not None,
            counts=totals.counts,
            rejections=dict(totals.rejections.most_common()),
            payload_bytes=totals.payload_bytes,
            windows_not_proven=totals.windows_not_proven,
            rate=_rate(times, totals.frames, run, now),
            last_receipt_seconds=max(0.0, now - max(times.values())) if times else None,
            run=run,
        )

    def _latest_run(self) -> RunPulse | None:
        """Run ids begin with the time of their start."""
        names = sorted(self._folder.store.names("runs", ".json"))
        if not names:
            return None
        content = self._folder.store.read_bytes(f"runs/{names[-1]}")
        try:
            return RunPulse.model_validate_json(content)
        except ValidationError as error:
            raise DatasetError(
                f"{self._folder.store.full_url('runs/' + names[-1])}: not a run report: {error}"
            ) from error

    def _manifest(self, receipts: Mapping[str, StampedObject]) -> Manifest | None:
        """The manifest if it covers exactly these receipts."""
        info = self._folder.store.info(MANIFEST)
        if info is None:
            return None
        version = f"{info.size} {info.etag}"
        if self._finished is None or self._finished[0] != version:
            self._finished = version, self._folder.manifest()
        manifest = self._finished[1]
        return manifest if {shard.id for shard in manifest.shards} == receipts.keys() else None

    def _totals(self, receipts: Mapping[str, StampedObject], manifest: Manifest | None) -> _Tally:
        """The manifest's, else those of the receipts, of which only new ones are read."""
        if manifest is not None:
            rejections = Counter(manifest.rejections)
            return _Tally(manifest.counts, rejections, manifest.payload_bytes, manifest.windows_not_proven)
        if self._tally.frames.keys() - receipts.keys():  # somebody took receipts away, to encode shards anew
            self._tally = _Tally()
        tally = self._tally
        new = {name: receipts[name].etag for name in sorted(receipts.keys() - tally.frames.keys())}
        for receipt in self._folder.receipt_summaries(new):
            tally.counts = tally.counts.plus(receipt.counts)
            tally.rejections.update(rejection.error_class for rejection in receipt.rejections)
            tally.payload_bytes += receipt.payload.size
            tally.windows_not_proven += receipt.tile_proof.windows_out_of_memory if receipt.tile_proof else 0
            tally.frames[receipt.shard_id] = receipt.counts.frames_stored
        return tally


def _rate(times: Mapping[str, float], frames: Mapping[str, int], run: RunPulse | None, now: float) -> Rate | None:
    """Of the latest run's last receipts. While it goes on, up to now: if nothing comes any more the rate falls."""
    if run is None:
        return None
    # a store's clock may be off a little from the driver's; a receipt of this run is never older than its start
    mine = sorted((at, name) for name, at in times.items() if at >= run.started_unix - 1.0)
    recent = [pair for pair in mine if pair[0] >= now - RATE_SECONDS]
    if len(recent) < RATE_SHARDS:
        recent = mine[-RATE_SHARDS:]
    if len(recent) < 2:
        return None
    end = now if run.is_running else recent[-1][0]
    counted = [name for _, name in recent[1:]]  # the first one opens the span
    seconds = max(1e-3, end - recent[0][0])
    return Rate(shards=len(counted), frames=sum(frames.get(name, 0) for name in counted), seconds=seconds)
