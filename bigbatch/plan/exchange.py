"""What lies where, and how gradients travel: the parallel section, checked and explained."""

from __future__ import annotations

from bigbatch.config import ConfigError, RunConfig
from bigbatch.config.models import Parallel

STRATEGIES = {
    "ddp": ("each process holds parameters, gradients and optimiser state", "Li et al. 2020, arXiv:2006.15704"),
    "zero1": (
        "optimiser state is split by whole parameters, balanced by size",
        "Rajbhandari et al. 2019, arXiv:1910.02054",
    ),
    "fsdp2": ("parameters, gradients and optimiser state are sharded", "Zhao et al. 2023, arXiv:2304.11277"),
    "deepspeed": (
        ("ZeRO 0: nothing is split", "ZeRO 1: optimiser state is split", "ZeRO 2: gradients and state are split"),
        "Rajbhandari et al. 2019, arXiv:1910.02054",
    ),
}
COMPRESSIONS = {
    "bf16": ("gradients are rounded to bf16 for the exchange: half the bytes of float32", "recipe"),
    "fp16": ("gradients are rounded to fp16 for the exchange: half the bytes of float32", "recipe"),
    "powersgd": ("matrices travel as low-rank factors, with error feedback", "Vogels et al. 2019, arXiv:1905.13727"),
}


def check_exchange(config: RunConfig) -> None:
    """ConfigError for what does not go together."""
    parallel = config.parallel
    strategy, stage, compression = parallel.strategy, parallel.zero_stage, parallel.compression
    if stage is not None and strategy != "deepspeed":
        raise ConfigError(
            f"parallel.zero_stage = {stage}: belongs to parallel.strategy=deepspeed, and {strategy} is set; remove it"
        )
    if stage == 3:
        raise ConfigError(
            "parallel.zero_stage = 3: not supported, since layers are cut there before the forward pass; use "
            "parallel.strategy=fsdp2, which shards the parameters too, or zero_stage 1 or 2"
        )
    if compression == "powersgd" and strategy not in ("ddp", "zero1"):
        raise ConfigError(
            f"parallel.compression = powersgd: {strategy} exchanges gradients in parts; use bf16, or ddp or zero1"
        )
    if compression == "powersgd" and config.precision == "fp16":
        raise ConfigError(
            "parallel.compression = powersgd: its error feedback does not follow the loss scale of precision=fp16; use "
            "precision bf16 or fp32, or compression fp16"
        )
    if parallel.powersgd_rank != Parallel().powersgd_rank and compression != "powersgd":
        raise ConfigError(
            f"parallel.powersgd_rank = {parallel.powersgd_rank}: belongs to parallel.compression=powersgd, and "
            f"{compression} is set; remove it"
        )
    if strategy == "zero1" and getattr(config.optim, "prenormalize", False):
        raise ConfigError(
            "optim.prenormalize = True: divides by the norm of all gradients, of which a process has some "
            "under zero1; use parallel.strategy ddp or fsdp2"
        )
    if strategy == "deepspeed" and config.precision == "fp64":
        raise ConfigError(
            "precision = fp64: DeepSpeed keeps its weights in float32; set precision=fp32 (verify takes fp64 unless "
            "told), or use parallel.strategy ddp, zero1 or fsdp2"
        )
    if strategy == "deepspeed" and stage != 0 and config.clip.kind == "adaptive":
        raise ConfigError(
            "clip.kind = adaptive: ZeRO cuts through the rows it clips; use parallel.strategy ddp, zero1 or fsdp2"
        )


def describe_strategy(parallel: Parallel, *, world_size: int) -> tuple[str, str, str]:
    """Value, why and source of the strategy."""
    why, source = STRATEGIES[parallel.strategy]
    if world_size == 1:
        return parallel.strategy, "one process holds everything, whatever the strategy", source
    if parallel.strategy != "deepspeed":
        return parallel.strategy, str(why), source
    stage = 1 if parallel.zero_stage is None else parallel.zero_stage
    return f"deepspeed, ZeRO {stage}", why[stage], source


def describe_compression(parallel: Parallel) -> tuple[str, str, str]:
    """Value, why and source of the compression."""
    why, source = COMPRESSIONS[parallel.compression]
    value = parallel.compression
    return (f"powersgd, rank {parallel.powersgd_rank}" if value == "powersgd" else value), why, source
