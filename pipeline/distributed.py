"""What the processes of a stage tell each other, compute together, and hold a part of each.

Every helper is right with one process and no process group, on gloo and on nccl; and where no
parameter is sharded.
"""

import ctypes
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pipeline.disk import file_md5, write_bytes
from pipeline.errors import InputError, one_line
from pipeline.monitor import Monitor

PATIENCE = 300.0  # seconds
# The backend's own limit, for where the monitor fails, in those of the monitor: it does not know
# whether the others get on.
BACKEND_PATIENCE = 12
BLOCK = 0.01  # of all parameters: what has fewer is not worth a message of its own

_monitor: Monitor | None = None  # of the processes that train together, where there are more
# By which the parts of a sharded training are sent beside its steps, from CPU to CPU.
_beside: Any = None


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """Every rank's tensor, stacked in the order of the ranks: (...) -> (world_size, ...)."""
    if world_size() == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The picklable value of one rank, for all."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, source)
    return values[0]


def share_files(paths: Sequence[Path]) -> None:
    """Give every machine the files that the first rank names, as they are there.

    A machine that has them, since it sees the same disk, gets nothing.
    """
    wanted = broadcast_object({path: file_md5(path) for path in paths})
    alone = os.environ.get("LOCAL_RANK", "0") == "0"  # of its machine's ranks the one that writes
    lacking = [p for p, md5 in wanted.items() if alone and not (p.is_file() and file_md5(p) == md5)]
    everywhere = set().union(*gather_objects(lacking))
    for path in (path for path in wanted if path in everywhere):
        content = broadcast_object(path.read_bytes() if rank() == 0 else None)
        if path in lacking:
            write_bytes(path, content)
        alive()


def at(what: str, allowance: float = 0.0) -> None:
    """Tell the other ranks that this one is at a place that all come to, in the same order.

    There it may rightly do nothing to be seen for so many seconds more.
    """
    if _monitor is not None:
        _monitor.at(what, allowance)


def alive() -> None:
    """Tell them that it gets on there, however long it takes."""
    if _monitor is not None:
        _monitor.alive()


def when_lost(call: Callable[[], object]) -> None:
    """Have this called before the process ends since another one holds it up."""
    if _monitor is not None:
        _monitor.lost = call


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def check_devices(device: str, gpus: int, option: str = "train.") -> None:
    """Refuse what the machine does not have, before any process starts.

    `option` is what stands before `device` and `gpus` where a user sets them.

    Raises:
        InputError: names the parameter, what was asked for and what is there.
    """
    there = torch.cuda.device_count()
    if device == "cuda" and not there:
        raise InputError(
            f"{option}device: cuda and {option}gpus: {gpus}, but this machine shows 0 GPUs; use "
            "auto or cpu"
        )
    if device != "cpu" and 0 < there < gpus:
        raise InputError(
            f"{option}gpus: {gpus}, but this machine shows {there}; use at most {there}, or "
            f"{option}device=cpu"
        )


def processes_here(device: str, asked: int) -> int:
    """As many processes as asked for, but no more than this machine has GPUs for."""
    if device == "cpu" or not torch.cuda.is_available():
        return asked
    return min(asked, torch.cuda.device_count())


def free_cores() -> int:
    """The cores that this process may use, at least 1: of the machine, or less of a container.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max)
    """
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, int(quota) // int(period))
    return max(1, allowed)


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent does, however that dies (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died just before
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def process_group(device: str, patience: float = PATIENCE) -> Iterator[torch.device]:
    """Join the processes that a launcher has started beside this one, and yield its device.

    A process that does not get on with anything for `patience` seconds, while others wait for it,
    ends all of them.

    The launcher says in WORLD_SIZE how many there are, in RANK and LOCAL_RANK which of all and
    which of this machine's this one is, in MASTER_ADDR and MASTER_PORT where they meet: what
    torchrun sets, and what anything else can set that starts processes.
    """
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(free_cores())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(own)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield own
        return
    limit = timedelta(seconds=BACKEND_PATIENCE * patience)
    backend = "nccl" if use_cuda else "gloo"
    dist.init_process_group(backend, timeout=limit, device_id=own if use_cuda else None)
    well = False
    try:
        with _monitored(patience):
            yield own
        well = True
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        text = re.sub(r"\A\[\S+\] ", "", one_line(error))
        sys.exit(f"rank {rank()} has lost another process: {text}")
    finally:
        # Where one rank alone has an error, NCCL would wait for the others, and they for this one.
        if well or backend == "gloo":
            dist.destroy_process_group()


@contextmanager
def _monitored(patience: float) -> Iterator[None]:
    """Watch the other ranks, and be watched by them."""
    global _monitor
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=patience)
    store = dist.TCPStore(address, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    _monitor = Monitor(store, rank(), world_size(), patience)
    barrier()
    _monitor.start()
    done = False
    try:
        yield
        done = True
    finally:
        _monitor.close(done)
        _monitor = None


def described(device: torch.device) -> str:
    """What the processes compute on, for a reader."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    processes, threads = world_size(), torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    if processes == 1:
        return f"1 process on {what}, with {threads} CPU thread{plural}"
    return f"{processes} processes on {what}, each with {threads} CPU thread{plural}"


def machine(device: torch.device) -> dict[str, Any]:
    """On what, and by what, a result is computed.

    Where all of it is equal, and so is train.parallel, every bit is.
    """
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": what,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed what draws the first weights; with `deterministic`, refuse kernels that vary."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else every tensor is filled before it is computed: a tenth of a step, to find code that
        # reads what nobody wrote.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False


def parallelize(
    network: nn.Module,
    device: torch.device,
    *,
    sharded: bool = False,
    copies: Sequence[nn.Module] = (),
) -> nn.Module:
    """The network as it trains, on its device: on one process itself; on more with synchronous BN.

    There it is in DDP, or it is `sharded`: each process holds a part of every parameter, of its
    gradient and of what the optimizer knows of it. Its `copies`, which never train, go along.

    It is changed in place: so this comes before the optimizer, which has to know the parameters as
    they train.

    Raises:
        InputError: a layer or a parameter can't be shared so; the text names it.
    """
    if sharded and world_size() > 1:
        global _beside
        _beside = dist.new_group(backend="gloo")
        synchronize_batch_norm(network)
        for one in (network, *copies):
            shard(one, device)
        return network
    for one in (network, *copies):
        one.to(device)
    if world_size() == 1:
        return network
    with warnings.catch_warnings():
        # torch 2.14 has another name for it, torch 2.10 does not know that one.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        parallel = DistributedDataParallel(
            synchronize_batch_norm(network),
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,  # synchronous BN keeps them equal
            gradient_as_bucket_view=True,
        )
    parallel.register_comm_hook(None, _summed)
    return parallel


def _summed(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The sum of the ranks' gradients, which are parts of one sum: DDP itself would average."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


def accumulating(model: nn.Module) -> AbstractContextManager[None]:
    """Keep the gradients of a backward to this rank: more microbatches of the batch follow.

    Of a sharded model they are summed at once, as each rank has room for its part of them alone.
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def shard(network: nn.Module, device: torch.device) -> None:
    """Cut every parameter, in place, into parts of which each process holds one, on its device.

    Block by block they are brought there, and later made whole to compute and cut again. Buffers
    are not cut: they are small. Gradients are summed over the processes, as DDP's are here, in the
    parameters' own type. What else is rounded is autocast's to say, as in DDP: FSDP's own policy
    would round all parameters of a block, those of norms too, and so change the result.

    Raises:
        InputError: names a parameter that can't be cut.

    Sources: https://arxiv.org/abs/2304.11277, and
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    names = list(network.named_parameters(remove_duplicate=False))
    for number, (name, parameter) in enumerate(names):
        if parameter.dim() == 0 or any(parameter is other for _, other in names[:number]):
            reason = "is shared by two layers" if parameter.dim() else "is a single number"
            raise InputError(
                f"train.parallel: fsdp can't cut {name}, which {reason}; use train.parallel: ddp"
            )
    # It warns of blocks that return views, as they must not be changed in place. Ours never are,
    # and of another network the backward would find a block that is not whole, and fail.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    network.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in [*blocks(network), network]:
        unit = fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=module is not network,  # whose backward begins right after it
            shard_placement_fn=_cut_along,
        )
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are made whole one at a time, inner ones first.

    They are the entries of lists and sequences that are modules of several layers, as the blocks of
    a transformer and of a ResNet's stages, each with at least BLOCK of all parameters that no block
    inside it has. What is left belongs to the network itself.

    An entry has to be called as the module that it is, and no other part may compute with its
    parameters. Sequences in sequences are taken apart instead: some networks call their layers.
    """
    least = BLOCK * sum(parameter.numel() for parameter in network.parameters())
    lists = nn.Sequential | nn.ModuleList
    entries = [
        entry
        for module in network.modules()
        if isinstance(module, lists)
        for entry in module.children()
        if [*entry.children()] and not isinstance(entry, lists)
    ]
    taken: set[nn.Parameter] = set()
    found = []
    for entry in reversed(entries):  # modules() has the outer ones first
        own = set(entry.parameters()) - taken
        if sum(parameter.numel() for parameter in own) >= least > 0:
            found.append(entry)
            taken |= own
    return found


def _cut_along(parameter: nn.Parameter) -> Shard:
    """The first axis; where that is shorter than there are ranks, the longest that they divide."""
    sizes, ranks = parameter.shape, world_size()
    even = [axis for axis, size in enumerate(sizes) if size % ranks == 0]
    if sizes[0] >= ranks or not even:
        return Shard(0)
    return Shard(max(even, key=sizes.__getitem__))


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Every process holds the whole of a sharded network meanwhile, to evaluate it.

    So a process may call it as often as its own images ask for, or not at all.
    """
    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not network, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part, on all of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, in memory as `like` is: where that is sharded, this rank's part."""
    copy = torch.empty_like(like)
    if not isinstance(copy, DTensor):
        return copy.copy_(tensor)
    pieces = tensor.chunk(world_size(), _axis(copy))
    if rank() < len(pieces):
        copy.to_local().copy_(pieces[rank()])
    return copy


def _axis(tensor: DTensor) -> int:
    """The axis along which it is cut, by torch.chunk, into one piece a rank; the last have none."""
    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    return placement.dim


def all_finite(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Whether all values of all ranks' parts are; waits for the device."""
    held = (one.to_local() if isinstance(one, DTensor) else one for one in tensors)
    found = torch.stack([one.isfinite().all().to(device) for one in held])
    return not sum_over_ranks((~found.all()).double()).item()


class _Part(NamedTuple):
    """This rank's part of a tensor of `shape`, which is cut along an axis; on the CPU."""

    held: Tensor
    shape: torch.Size
    axis: int


def to_first_rank(states: Any) -> Callable[[], Any]:
    """Copy what dicts and lists of tensors hold now, and say how the first rank gets it whole.

    What is returned has to be called on every rank, by any thread, while the training goes on: it
    gives the first the same dicts and lists with whole tensors on the CPU, each with memory of its
    own, and the others None.
    """
    copies = _each(states, _copied)

    def put_together() -> Any:
        joined = _each(copies, _joined)
        return joined if rank() == 0 else None

    return put_together


def _each(value: Any, make: Callable[[Any], Any]) -> Any:
    match value:
        case Tensor() | _Part():
            return make(value)
        case dict():
            return {name: _each(item, make) for name, item in value.items()}
        case list():
            return [_each(item, make) for item in value]
        case _:
            return value


def _copied(tensor: Tensor) -> Tensor | _Part | None:
    """What the first rank will need of this one."""
    if not isinstance(tensor, DTensor):
        return _on_cpu(tensor) if rank() == 0 else None
    return _Part(_on_cpu(tensor.to_local()), tensor.shape, _axis(tensor))


def _on_cpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _joined(copy: Tensor | _Part) -> Tensor | None:
    """The whole tensor on the first rank."""
    if isinstance(copy, Tensor):
        return copy
    if rank() != 0:
        if copy.held.numel():
            dist.send(copy.held, 0, group=_beside)
        return None
    joined = torch.empty(copy.shape, dtype=copy.held.dtype)
    for source, piece in enumerate(joined.chunk(world_size(), copy.axis)):
        held = copy.held if source == 0 else torch.empty(piece.shape, dtype=piece.dtype)
        if source:
            dist.recv(held, source, group=_beside)
        piece.copy_(held)
    return joined


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batches of all ranks, which hold equally many values.

    Unlike torch's it runs on the CPU too, and it keeps what follows the normalisation in the layer
    it replaces (timm's BatchNormAct2d carries its activation).
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        assert norm.momentum is not None
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)
        self.act: nn.Module | None = getattr(norm, "act", None)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C,H,W)."""
        x = self._normalize(x) if self.training else super().forward(x)
        return x if self.act is None else self.act(x)

    def _normalize(self, x: Tensor) -> Tensor:
        result, mean, variance = _SyncNormalization.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            count = x.numel() // x.shape[1] * world_size()
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
                self.num_batches_tracked += 1
        return cast("Tensor", result)


class _SyncNormalization(torch.autograd.Function):
    """Normalise by the mean and variance over all ranks.

    The variance is the mean of the ranks' variances about the common mean, never E[x^2] - E[x]^2,
    which cancels. Source: https://arxiv.org/abs/1502.03167
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Statistics of bf16 input in fp32, as torch keeps them; nothing is updated.
        exact = x.to(torch.promote_types(x.dtype, weight.dtype))
        local_mean, local_variance = torch.batch_norm_update_stats(exact, None, None, 0.0)
        means, variances = gather(torch.stack([local_mean, local_variance])).unbind(dim=1)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = ctx.saved_tensors
        gradient, exact = gradients[0].to(weight.dtype), x.to(weight.dtype)
        inverse_std = (variance + ctx.eps).rsqrt()
        given = (gradient, exact, weight, None, None, mean, inverse_std, True, ctx.eps)
        sums_alone = (False, True, True)
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(*given, sums_alone)
        sums = sum_over_ranks(torch.stack([of_weight, of_bias]))
        scale = weight * inverse_std
        slope, shift = sums / (x.numel() // x.shape[1] * world_size()) * -scale
        of_x = F.batch_norm(exact, mean, variance, slope, shift, eps=ctx.eps)
        of_x.addcmul_(gradient, scale[:, None, None])
        return of_x.to(x.dtype), of_weight, of_bias, None


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Replace every BN layer below `model` by a synchronous one that holds the same tensors.

    Raises:
        InputError: names a BN layer of a kind that is not known to be replaced exactly.
    """
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            if not (isinstance(child, nn.BatchNorm2d) and child.affine):
                raise InputError(
                    f"{name}: {type(child).__name__} has no synchronous form; use train.gpus: 1"
                )
            setattr(model, name, SyncBatchNorm(child))
        else:
            synchronize_batch_norm(child)
    return model
