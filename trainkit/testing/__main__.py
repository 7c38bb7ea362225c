"""The run that `trainkit certify` starts: python -m trainkit.testing DIRECTORY SAVE_EVERY, then the options of fit."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from trainkit import cli
from trainkit.testing.run import begun, prepare

if __name__ == "__main__":
    directory, save_every, *words = sys.argv[1:]
    again = ["--ckpt_path", "last"] if begun(Path(directory)) else []
    prepared = partial(prepare, directory=Path(directory), save_every=int(save_every))
    sys.exit(cli.main(["fit", *words, *again], prepared))
