"""Ranks with unequal numbers of batches: join() at the end of each epoch, then go on from the rank that came last."""

import horovod.torch as hvd
import torch

hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

for epoch in range(3):
    last_wanted = epoch % hvd.size()
    batches = 3 + 2 * ((hvd.rank() - last_wanted - 1) % hvd.size())
    for _ in range(batches):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    last = hvd.join()
    assert last == last_wanted, (epoch, last)
    hvd.broadcast_parameters(model.state_dict(), root_rank=last)
    hvd.broadcast_optimizer_state(optimizer, root_rank=last)
    weights = hvd.allgather(model.weight.detach().reshape(1, -1), name="weights")
    assert torch.equal(weights, weights[:1].expand_as(weights))

if hvd.rank() == 0:
    print("done on", hvd.size())
