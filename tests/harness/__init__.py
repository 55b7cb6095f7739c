"""Tests under a real ``mpirun``, shown as ordinary pytest items. ``tests/conftest.py`` tells how to write them.

- ``launcher.py``  which MPI this environment has, and the command line and environment that start a job with it
- ``job.py``       one job in a session of its own: output to files, ended whole
- ``plugin.py``    in pytest's own process: chooses what runs together, and reports it
- ``rankjob.py``   one such job: started, read while it goes on, ended when it is silent for too long
- ``rank.py``      in each rank of the job: runs pytest on the chosen tests and records what happened
- ``verdict.py``   pure: the records of all ranks of one test -> passed, skipped, or who failed and why
"""
