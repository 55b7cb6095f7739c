"""Elastic training: committed state, a failure in the middle of an epoch, and an epoch that goes on after it."""

import horovod.torch as hvd
import torch
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH_SIZE, LR = 2, 2, 0.01

hvd.init()
torch.manual_seed(hvd.rank())
inputs = torch.randn(16 * hvd.size(), 3, generator=torch.Generator().manual_seed(1))
dataset = TensorDataset(torch.arange(len(inputs)), inputs)
sampler = hvd.elastic.ElasticSampler(dataset, shuffle=True, seed=5)
loader = DataLoader(dataset, batch_size=BATCH_SIZE, sampler=sampler)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=LR)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
failures = []
resets = []
seen = {epoch: [] for epoch in range(EPOCHS)}


def on_state_reset():
    resets.append((state.epoch, state.batch))
    for group in optimizer.param_groups:
        group["lr"] = LR * hvd.size()


@hvd.elastic.run
def train(state):
    for state.epoch in range(state.epoch, EPOCHS):  # noqa: B020
        del seen[state.epoch][state.batch :]
        for ids, rows in loader:
            optimizer.zero_grad()
            state.model(rows).square().mean().backward()
            optimizer.step()
            seen[state.epoch].append(ids.tolist())
            sampler.record_batch(state.batch, BATCH_SIZE)
            state.batch += 1
            if state.epoch == 1 and state.batch == 5 and not failures:
                failures.append(1)
                raise hvd.HorovodInternalError("pretended, on every rank at once")
            if state.batch % 3 == 0:
                state.commit()
        state.batch = 0
        sampler.set_epoch(state.epoch + 1)
        state.commit()
    return "finished"


state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, batch=0)
state.register_reset_callbacks([on_state_reset])
assert train(state) == "finished"
assert failures and resets == [(1, 3)], resets
for epoch in range(EPOCHS):
    everyones = [i for part in hvd.allgather_object(seen[epoch]) for batch in part for i in batch]
    assert sorted(everyones) == list(range(len(dataset))), (epoch, sorted(everyones))
weights = hvd.allgather(model.weight.detach(), name="weights")
assert torch.equal(weights, weights[:1].expand_as(weights))
if hvd.rank() == 0:
    print("done on", hvd.size())
