"""One file a peer, each with `train(job)`: its shortest idiomatic use, all that is optional off unless asked for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A way to train.

    Args:
        module: what it is imported as; a missing one leaves the peer out.
        package: what it is called where it is installed from.
        has_defaults: whether it brings a logger, a bar or checkpoints without being asked to.
        note: how it differs from the hand-written loop in what it computes.
    """

    module: str
    package: str
    has_defaults: bool = False
    note: str = ""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


PEERS = {
    "hand": Peer("torch", "torch"),
    "trainkit": Peer("trainkit", "trainkit", has_defaults=True),
    "lightning": Peer("lightning", "lightning", has_defaults=True),
    "accelerate": Peer("accelerate", "accelerate"),
    "ignite": Peer("ignite", "pytorch-ignite"),
    "transformers": Peer("transformers", "transformers", has_defaults=True),
    "keras": Peer("keras", "keras", has_defaults=True, note="has optimizers of its own, with another epsilon in Adam"),
    "skorch": Peer("skorch", "skorch", has_defaults=True),
    "fastai": Peer("fastai", "fastai", has_defaults=True),
}
