"""The engine: sequences, blocks, the scheduler, and the runner that owns the device."""
