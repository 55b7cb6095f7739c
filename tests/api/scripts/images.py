"""Trains a small image model as Horovod's users do, with everything that their example scripts can be told to do."""

import argparse
import hashlib
import math
import os

import horovod.torch as hvd
import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.data.distributed
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models, transforms
from tqdm import tqdm

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=6)
parser.add_argument("--batches-per-allreduce", type=int, default=1)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--warmup-epochs", type=float, default=1)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--use-adasum", action="store_true")
parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
parser.add_argument("--checkpoint-format", default="./checkpoint-{epoch}.pth.tar")


class Metric:
    """An average over ranks and batches. Every update reduces under the same name."""

    def __init__(self, name):
        self.name = name
        self.sum = torch.tensor(0.0)
        self.n = torch.tensor(0.0)

    def update(self, value):
        self.sum += hvd.allreduce(value.detach().cpu(), name=self.name)
        self.n += 1

    @property
    def avg(self):
        return self.sum / self.n


def accuracy(output, target):
    return output.argmax(1).eq(target).float().mean()


def loader_of(train, batch_size):
    kwargs = {"num_workers": args.workers, "multiprocessing_context": "forkserver"} if args.workers else {}
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]),
        ]
    )
    dataset = datasets.ImageFolder("data/train" if train else "data/val", transform=transform)
    sampler = torch.utils.data.distributed.DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, sampler=sampler, **kwargs), sampler


def adjust_learning_rate(epoch, batch, batches):
    factor = 1.0
    if epoch < args.warmup_epochs:
        progress = epoch + (batch + 1) / batches
        factor = 1.0 / hvd.size() * (progress * (hvd.size() - 1) / args.warmup_epochs + 1)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * (1 if args.use_adasum else hvd.size()) * args.batches_per_allreduce * factor


def train(epoch):
    model.train()
    train_sampler.set_epoch(epoch)
    loss_metric, accuracy_metric = Metric("train_loss"), Metric("train_accuracy")
    with tqdm(total=len(train_loader), desc=f"train {epoch}", disable=not verbose) as progress:
        for number, (data, target) in enumerate(train_loader):
            adjust_learning_rate(epoch, number, len(train_loader))
            optimizer.zero_grad()
            for start in range(0, len(data), args.batch_size):
                part, part_target = data[start : start + args.batch_size], target[start : start + args.batch_size]
                output = model(part)
                accuracy_metric.update(accuracy(output, part_target))
                loss = F.cross_entropy(output, part_target)
                loss_metric.update(loss)
                loss.div_(math.ceil(float(len(data)) / args.batch_size))
                loss.backward()
            optimizer.step()
            progress.set_postfix({"loss": loss_metric.avg.item(), "accuracy": accuracy_metric.avg.item()})
            progress.update(1)
    if log_writer:
        log_writer.add_scalar("train/loss", loss_metric.avg, epoch)


def validate(epoch):
    model.eval()
    metric = Metric("val_accuracy")
    with torch.no_grad():
        for data, target in val_loader:
            metric.update(accuracy(model(data), target))
    if log_writer:
        log_writer.add_scalar("val/accuracy", metric.avg, epoch)


def digest():
    values = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(values).hexdigest()


if __name__ == "__main__":
    args = parser.parse_args()
    hvd.init()
    torch.manual_seed(42 + hvd.rank())
    torch.set_num_threads(1)
    verbose = 1 if hvd.rank() == 0 else 0

    resume_from_epoch = 0
    for epoch in range(args.epochs, 0, -1):
        if hvd.rank() == 0 and os.path.exists(args.checkpoint_format.format(epoch=epoch)):  # noqa: PTH110
            resume_from_epoch = epoch
            break
    resume_from_epoch = hvd.broadcast(torch.tensor(resume_from_epoch), root_rank=0, name="resume_from_epoch").item()
    log_writer = SummaryWriter("./logs") if hvd.rank() == 0 else None

    train_loader, train_sampler = loader_of(True, args.batch_size * args.batches_per_allreduce)
    val_loader, _ = loader_of(False, 10)
    model = models.resnet50(norm_layer=hvd.SyncBatchNorm)
    lr_scaler = args.batches_per_allreduce * hvd.size() if not args.use_adasum else 1
    if args.use_adasum and hvd.nccl_built():
        lr_scaler = args.batches_per_allreduce * hvd.local_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * lr_scaler, momentum=0.9, weight_decay=5e-5)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        backward_passes_per_step=args.batches_per_allreduce,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )
    if resume_from_epoch > 0 and hvd.rank() == 0:
        checkpoint = torch.load(args.checkpoint_format.format(epoch=resume_from_epoch))
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(resume_from_epoch, args.epochs):
        train(epoch)
        validate(epoch)
        if hvd.rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, args.checkpoint_format.format(epoch=epoch + 1))

    digests = hvd.allgather_object(digest(), name="digests")
    assert len(set(digests)) == 1, digests
    if hvd.rank() == 0:
        print("resumed from", resume_from_epoch, "and done on", hvd.size())
