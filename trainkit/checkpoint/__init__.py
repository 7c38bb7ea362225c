"""Checkpoints: format.py is the bytes in a file, store.py the files in a directory, policy.py when and which."""
