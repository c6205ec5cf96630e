"""How a global batch is cut: micro batch × accumulation × processes, and the batch-norm span that fits the cut."""

from __future__ import annotations

from bigbatch.config import ConfigError
from bigbatch.config.models import Batch, Norm

HOFFER = "Hoffer et al. 2017, arXiv:1705.08741"
GOYAL_BN = "Goyal et al. 2017, arXiv:1706.02677, section 2.3"


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(value: int, legal: list[int]) -> int:
    """The legal value closest to ``value``; of two, the larger."""
    return min(legal, key=lambda candidate: (abs(candidate - value), -candidate))


def legal_spans(micro: int, world_size: int) -> list[int]:
    """Spans that a micro batch can have: its divisors, and itself times a number of processes that divides them all."""
    return sorted({*divisors(micro), *(micro * q for q in divisors(world_size))})


def choose_micro(batch: Batch, norm: Norm, *, world_size: int, debug: bool = False) -> tuple[int, str]:
    """The micro batch and why; ConfigError where the global batch cannot be cut as asked.

    In ``debug`` mode one process replays a run of many, and takes a whole batch-norm group of theirs at a time.
    """
    total = batch.global_
    if total % world_size:
        near = nearest(total, [total // world_size * world_size or world_size, (total // world_size + 1) * world_size])
        raise ConfigError(
            f"batch.global = {total}: does not divide over {world_size} processes; use {near} or other processes"
        )
    share = total // world_size
    span = norm.span if norm.kind == "batch" and norm.span != "micro" else None
    if batch.micro != "auto":
        if share % batch.micro:
            raise ConfigError(
                f"batch.micro = {batch.micro}: {world_size} processes × micro batch × accumulation must equal "
                f"batch.global = {total}; use batch.micro={nearest(batch.micro, divisors(share))} or auto"
            )
        if debug and span and span % batch.micro == 0 and span > batch.micro and share % span == 0:
            return span, f"batch.micro {batch.micro}, in debug mode as often as norm.span has it"
        return batch.micro, "batch.micro"
    limit = max(batch.micro_limit, span or 0) if debug else batch.micro_limit
    sizes = [size for size in divisors(share) if size <= limit]
    fitting = [size for size in sizes if span is None or span in legal_spans(size, world_size)]
    if not fitting:
        legal = sorted({s for size in sizes for s in legal_spans(size, world_size)})
        raise _span_error(span or 0, legal, f"any micro batch up to {batch.micro_limit}", world_size)
    within = f"batch.micro_limit {limit}" if limit == batch.micro_limit else f"norm.span {limit}, in debug mode"
    why = f"largest share of {share} samples per process within {within}"
    return fitting[-1], why + (f" that norm.span {span} fits" if span else "")


def choose_span(norm: Norm, *, micro: int, world_size: int) -> tuple[int | None, str, str]:
    """The batch-norm span, why, and the source; None where batch norm is converted to another kind."""
    if norm.kind != "group" and norm.groups != Norm().groups:
        raise ConfigError(f"norm.groups = {norm.groups}: norm.kind is {norm.kind}; use norm.kind=group or remove it")
    if norm.kind != "batch":
        if norm.span != "micro":
            raise ConfigError(
                f"norm.span = {norm.span}: norm.kind {norm.kind} has no span; remove it or use norm.kind=batch"
            )
        return None, f"norm.kind {norm.kind}: no statistics over the batch", "Wu & He 2018, arXiv:1803.08494"
    if norm.span == "micro":
        return micro, "norm.span micro: plain batch norm over each process's micro batch", GOYAL_BN
    span = norm.span
    legal = legal_spans(micro, world_size)
    if span not in legal:
        raise _span_error(span, legal, f"a micro batch of {micro}", world_size)
    if span > micro:
        return span, f"synchronised over {span // micro} neighbouring processes of {micro} samples", GOYAL_BN
    if span < micro:
        return span, f"ghost batch norm: {micro // span} groups in a micro batch of {micro}", HOFFER
    return span, "plain batch norm: the span is the micro batch", GOYAL_BN


def _span_error(span: int, legal: list[int], what: str, world_size: int) -> ConfigError:
    return ConfigError(
        f"norm.span = {span}: does not fit {what} on {world_size} processes (it must divide the micro batch, or be the "
        f"micro batch times a number of processes that divides {world_size}); nearest legal: {nearest(span, legal)}"
    )
