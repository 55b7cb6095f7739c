"""Imports everything by the names that Horovod has for it, and looks at how it was started."""

import json
import multiprocessing
import sys

import horovod
import horovod.torch as hvd
import horovod.torch.elastic
import horovod.torch.functions as functions
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.common.process_sets import ProcessSet
from horovod.common.util import check_extension, extension_available, gloo_built, mpi_built, split_list
from horovod.torch import SyncBatchNorm
from horovod.torch.compression import Compression
from horovod.torch.elastic.sampler import ElasticSampler
from horovod.torch.elastic.state import TorchState
from horovod.torch.mpi_ops import Average, allreduce, global_process_set, rank, size
from horovod.torch.optimizer import DistributedOptimizer


def in_child(queue):
    queue.put((__name__, hvd.__name__, sys.modules["horovod"].__version__))


def refusal(name):
    try:
        __import__(name)
    except ImportError as error:
        return str(error)
    return "imported"


if __name__ == "__main__":
    check_extension("horovod.torch", "HOROVOD_WITH_PYTORCH", __file__, "mpi_lib_v2")
    same = {
        "HorovodInternalError": HorovodInternalError, "SyncBatchNorm": SyncBatchNorm, "Compression": Compression,
        "DistributedOptimizer": DistributedOptimizer, "allreduce": allreduce, "rank": rank, "size": size,
        "Average": Average, "global_process_set": global_process_set, "ProcessSet": ProcessSet,
        "broadcast_object": functions.broadcast_object,
    }  # fmt: skip
    for name, value in same.items():
        assert getattr(hvd, name) is value, name
    assert hvd.elastic.TorchState is TorchState and hvd.elastic.ElasticSampler is ElasticSampler
    assert horovod.torch.elastic.run is hvd.elastic.run and issubclass(HostsUpdatedInterrupt, RuntimeError)
    assert mpi_built() and not gloo_built(verbose=True) and extension_available("torch")
    assert split_list([1, 2, 3], 2) == [[1, 2], [3]]
    try:
        horovod.run(in_child, np=2)
    except RuntimeError as error:
        run = str(error)
    children = {}
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=in_child, args=(queue,))
        process.start()
        children[method] = queue.get(timeout=60)
        process.join()
    report = {
        "argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "spec": repr(__spec__), "run": run,
        "refused": {name: refusal(name) for name in ("horovod.run", "horovod.tensorflow", "horovod.spark.torch")},
        "children": children, "doc": __doc__, "startup": [part for part in sys.path if "as_horovod" in part],
    }  # fmt: skip
    print(json.dumps(report))
    if "fail" in sys.argv:
        raise KeyError("on purpose")
