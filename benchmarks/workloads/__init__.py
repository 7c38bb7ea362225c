"""One file a workload: the user's code, and what is measured."""

NAMES = (
    "mlp",
    "logging",
    "cnn",
    "transformer",
    "data",
    "startup",
    "memory",
    "checkpoint",
    "growth",
    "shuffle",
    "ddp",
)
