"""Mixed precision with a GradScaler, gradient clipping between synchronize() and step(), a scheduler."""

import warnings

import horovod.torch as hvd
import torch
import torch.nn as nn
import torch.optim as optim


def main():
    hvd.init()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = optim.AdamW(model.parameters(), lr=0.01 * hvd.size())
    hvd.broadcast_parameters(model.named_parameters(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    assert isinstance(optimizer, optim.AdamW)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    data = torch.randn(16, 10, generator=torch.Generator().manual_seed(hvd.rank()))
    target = data.sum(1, keepdim=True)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(data).float(), target)
        scaler.scale(loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        norms = hvd.allgather(norm.reshape(1), name="norms")
        assert torch.equal(norms, norms[:1].expand_as(norms)), norms
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(hvd.allreduce(loss.detach(), name="loss").item())
    assert losses[-1] < 0.5 * losses[0], losses

    # A step after synchronize() that does not say so is warned of, as ever.
    loss = model(torch.ones(2, 10)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("skip_synchronize" in str(warning.message) for warning in caught)

    # A process set, a sparse embedding, an all-to-all, and handles that are polled.
    evens = hvd.add_process_set(hvd.ProcessSet([0])) if hvd.size() > 1 else hvd.global_process_set
    if evens.included():
        assert hvd.allreduce(torch.ones(2), op=hvd.Sum, process_set=evens).tolist() == [1.0, 1.0]
    handle = hvd.allreduce_async_(torch.full((3,), float(hvd.rank())), op=hvd.Max, name="highest")
    while not hvd.poll(handle):
        pass
    assert hvd.synchronize(handle).tolist() == [hvd.size() - 1.0] * 3
    received, splits = hvd.alltoall(torch.arange(hvd.size()), splits=torch.ones(hvd.size(), dtype=torch.int32))
    assert received.tolist() == [hvd.rank()] * hvd.size() and splits.tolist() == [1] * hvd.size()
    assert hvd.allreduce(torch.tensor([2.0]), average=False).item() == 2.0 * hvd.size()
    if hvd.rank() == 0:
        print("done on", hvd.size())
    hvd.shutdown()


if __name__ == "__main__":
    main()
