"""The benchmark: every op on every backend against its rivals, on named shapes. `peft-kernels bench` runs it."""
