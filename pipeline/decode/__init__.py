"""Clip bytes -> windows of uint8 RGB frames, in processes that can be killed."""

from pipeline.decode.clips import ClipSummary
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodeEvent, DecodePool, WindowReady

__all__ = ["ClipDone", "ClipRetracted", "ClipSummary", "DecodeEvent", "DecodePool", "WindowReady"]
