"""The directory that a run of ``python -m mpiddp.as_horovod`` has first on its PYTHONPATH."""
