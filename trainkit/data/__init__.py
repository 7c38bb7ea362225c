"""Where batches come from, in which order, and how they reach the device."""

from trainkit.data.combined import CombinedLoader as CombinedLoader
