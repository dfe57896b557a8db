"""Clip bytes -> windows of uint8 RGB frames, in processes that can be killed. Import from `pool` and `clips`."""
