"""What is legal and usually regretted. Each warning has a code that scripts can rely on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bigbatch.config import RunConfig

from .plan import Plan, PlanWarning

ADAPTIVE = ("lamb", "adagrad", "rmsprop", "adadelta", "adam", "adamw", "radam", "nadam")


def plan_warnings(config: RunConfig, plan: Plan) -> Plan:
    """The plan with its warnings filled in."""
    return dataclasses.replace(plan, warnings=tuple(PlanWarning(*pair) for pair in _warnings(config, plan)))


def _warnings(config: RunConfig, plan: Plan) -> Iterator[tuple[str, str]]:
    optim, batch = config.optim, plan.global_batch
    if optim.name == "lars" and optim.weight_decay == 0 and not any(g.weight_decay for g in optim.groups or ()):
        yield (
            "lars_without_decay",
            (
                "optim.weight_decay is 0: LARS counts on decay to bound the weight norm that its trust ratio follows; "
                "1e-4 to 5e-4 is usual (arXiv:1708.03888)"
            ),
        )
    end = plan.samples if plan.last == "cross" else plan.epoch_samples
    _, last = plan.batches.before(end)
    if end - last < plan.batch(last) and plan.last != "drop":
        which = "the run's last window" if plan.last == "cross" else "each epoch's last window"
        of = f"{end - last} of {plan.batch(last)} samples"
        yield "short_last_window", f"{which} has {of}; it counts as a full step at the full rate"
    largest = plan.batches.stages[-1][1]
    if largest > 0.1 * plan.dataset_size:
        what = f"the largest batch of the ramp, {largest}," if largest > batch else "a batch"
        share = f"{largest / plan.dataset_size:.0%} of the {plan.dataset_size} training samples"
        way_out = " (arXiv:1711.00489 asks B ≪ N); batch.max limits it" if largest > batch else ""
        yield "large_share_of_data", f"{what} is {share}; few steps are left{way_out}"
    if plan.lr_scale > 32:
        yield (
            "lr_scaled_above_32",
            (
                f"the rate is scaled {plan.lr_scale:g} times; the linear rule was shown to hold to 32 times "
                "(256 to 8,192, arXiv:1706.02677)"
            ),
        )
    if plan.lr_scale >= 4 and not plan.warmup_samples and config.decay.kind != "one_cycle":
        yield (
            "scaled_without_warmup",
            f"the rate is scaled {plan.lr_scale:g} times without a warmup (arXiv:1706.02677, 2.2)",
        )
    if plan.warmup_samples and plan.schedule.start == plan.lr_peak:
        yield (
            "flat_warmup",
            f"the warmup starts at the peak, {plan.lr_peak:g}: it changes nothing; set warmup.start=zero",
        )
    if config.scaling.rule == "linear" and optim.name in ADAPTIVE and plan.lr_scale > 1:
        yield (
            "linear_rule_for_adaptive",
            f"{optim.name} was scaled with the square root of the batch (arXiv:1904.00962)",
        )
    if plan.checkpoint_every % plan.eval_every:
        yield (
            "best_seldom_judged",
            f"checkpoint.every {config.checkpoint.every} is no multiple of eval.every {config.eval.every}: a "
            "checkpoint without an evaluation at its step cannot be the best one",
        )
    if config.batch.micro == "auto" and plan.micro_batch < min(8, plan.global_batch // plan.world_size):
        yield (
            "tiny_micro_batch",
            f"batch.global has no larger micro batch than {plan.micro_batch}; one with more divisors is faster",
        )
    if plan.bn_span and not plan.bn_groups_fixed and largest > plan.micro_batch:
        yield (
            "span_follows_micro",
            (
                f"batch norm is over each micro batch of {plan.micro_batch}, so another layout is another run; "
                f"set norm.span={plan.micro_batch} to fix it (no effect on a model without batch norm)"
            ),
        )
    if config.parallel.compression != "none" and plan.world_size > 1:
        memory = "; a resumed run forgets its error feedback" if config.parallel.compression == "powersgd" else ""
        yield (
            "compressed_exchange",
            f"parallel.compression {config.parallel.compression} rounds what each process sends, so another number of "
            f"processes is another run{memory}",
        )
