"""What a run will cost, from a sample of its real clips; and what it did cost."""
