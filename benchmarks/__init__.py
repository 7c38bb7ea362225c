"""The same user code in a hand-written loop, in trainkit and in its peers: `python -m benchmarks`. See README.md."""
