"""Several hosts on one machine: namespaces that share no network, no host name and no memory, joined by links that can
be slow, far or cut. Tests and ``benchmarks/hosts.py`` run real jobs on them, over real TCP.

- ``hosts.py``    makes them, and starts jobs on them
- ``fixture.py``  the fixture ``hosts``
- ``network.sh``  within the namespaces: makes links, shapes and cuts them; everything ends with it
- ``switch.c``    between the hosts where a delay is asked for, compiled when first needed
- ``agent.sh``    in the place of ssh, by which mpirun reaches the other hosts
"""
