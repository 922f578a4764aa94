"""The training loop: random windows of one token tensor, AdamW, cosine schedule, averaged weights, best checkpoint.

Who calls it: tools/train_embedded.py. Test: pytest tests/null/test_train_embedded.py

Rule: the time is given, the number of steps is not. The first steps measure the step time; the schedule is then laid
over as many steps as fit, and that number is reported so that a later run can name it (--steps) and repeat the schedule.
Hazard: the text is seen dozens of times. Dropout and weight decay work against learning it by heart; the weights that
come back are the averaged ones of the validation that was best, not the last ones.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from embedded.evaluation import window_loss
from embedded.model import LlamaModel


@dataclass(frozen=True)
class TrainingPlan:
    minutes: float = 4.0
    num_steps: int | None = None  # None: as many as fit into `minutes`
    window_tokens: int = 2048
    batch_windows: int = 64
    peak_rate: float = 3e-3
    final_rate_fraction: float = 0.02
    warmup_steps: int = 200
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    average_decay: float = 0.998
    num_validations: int = 24
    seed: int = 20
    compile: bool = True


@dataclass
class TrainingResult:
    num_steps: int
    seconds: float
    compile_seconds: float
    compiled: bool
    train_loss: float  # nats a token, dropout on, mean of the last tenth of the steps
    validation_loss: float  # nats a token, of the weights that are returned
    best_step: int
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)


CALIBRATION_STEPS = 20
LOG_EVERY_S = 5.0
OVERTIME_FACTOR = 1.5  # a run this much over its time stops: the machine became slower than the calibration found it


def learning_rate(plan: TrainingPlan, step: int, num_steps: int) -> float:
    """Linear up over the warm-up, then half a cosine down to final_rate_fraction."""
    warmup = max(1, min(plan.warmup_steps, num_steps // 10))
    if step < warmup:
        return plan.peak_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    low = plan.final_rate_fraction
    return plan.peak_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: LlamaModel, plan: TrainingPlan, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() != 2]  # norms are not decayed: decay would pull them off 1
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def make_loss(model: LlamaModel, device: torch.device) -> Callable[[Tensor], Tensor]:
    def loss_of(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    return loss_of


def compiled_or_plain(
    loss_of: Callable[[Tensor], Tensor], windows: Tensor, wanted: bool, log: Callable[[str], None]
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Compiles by one forward and backward pass. Without a working compiler training goes on, slower, and says so."""
    if not wanted:
        return loss_of, False
    try:
        compiled = torch.compile(loss_of)
        compiled(windows).backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # the compiler's failures have no common class
        log(f"torch.compile failed ({type(error).__name__}: {str(error)[:400]}); training goes on without it")
        torch._dynamo.reset()
        return loss_of, False
    return compiled, True


def train(
    model: LlamaModel, tokens: Tensor, validation_tokens: Tensor, plan: TrainingPlan, log: Callable[[str], None]
) -> TrainingResult:
    """Trains in place; `model` ends with the best averaged weights. tokens: [num_tokens] i64 on the model's device."""
    device = tokens.device
    if len(tokens) <= plan.window_tokens + 1:
        raise ValueError(f"{len(tokens)} training tokens do not fill a window of {plan.window_tokens}; give more text")
    draws = torch.Generator(device=device).manual_seed(plan.seed)
    offsets = torch.arange(plan.window_tokens + 1, device=device)

    def draw_windows() -> Tensor:
        num_starts = len(tokens) - plan.window_tokens
        starts = torch.randint(num_starts, (plan.batch_windows, 1), generator=draws, device=device)
        return tokens[starts + offsets]

    def finish_queued_work() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    model.train()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, plan, fused=device.type == "cuda")
    began = time.monotonic()
    loss_of, compiled = compiled_or_plain(make_loss(model, device), draw_windows(), plan.compile, log)
    optimizer.zero_grad(set_to_none=True)
    finish_queued_work()
    compile_seconds = time.monotonic() - began
    log(f"first pass in {compile_seconds:.1f} s, compiled: {'yes' if compiled else 'no'}")

    num_steps = plan.num_steps or 10_000  # until calibrated
    validate_every = max(1, num_steps // plan.num_validations)
    best_loss, best_step, best_weights = math.inf, 0, copy.deepcopy(averaged.state_dict())
    curve: list[tuple[int, float]] = []
    losses: list[Tensor] = []
    step_tokens = plan.batch_windows * plan.window_tokens
    began = logged = calibrated = time.monotonic()
    step = 0
    while step < num_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step, num_steps)
        loss = loss_of(draw_windows())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Early on the average follows quickly, else it would remember the random start.
        decay = min(plan.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():  # else the average would record every step for a backward pass that never comes
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1.0 - decay)
        losses.append(loss.detach())
        step += 1

        if step == CALIBRATION_STEPS // 2 and plan.num_steps is None:
            finish_queued_work()
            calibrated = time.monotonic()
        elif step == CALIBRATION_STEPS and plan.num_steps is None:
            finish_queued_work()
            step_s = (time.monotonic() - calibrated) / (CALIBRATION_STEPS - CALIBRATION_STEPS // 2)
            left_s = plan.minutes * 60 - (time.monotonic() - began)
            num_steps = step + max(1, int(left_s / step_s))
            validate_every = max(1, num_steps // plan.num_validations)
            rate = f"{step_s * 1e3:.1f} ms a step, {step_tokens / step_s:,.0f} tokens/s"
            log(f"{rate}: {num_steps} steps of {step_tokens} tokens")
        if step % 10 == 0 and time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            done = int(30 * step / num_steps)
            log(
                f"[{'#' * done}{'.' * (30 - done)}] step {step}/{num_steps}  loss {loss.item():.3f}"
                f"  rate {learning_rate(plan, step, num_steps):.1e}"
                f"  {step * step_tokens / (logged - began):,.0f} tokens/s  {logged - began:.0f} s"
            )
        overtime = plan.num_steps is None and time.monotonic() - began > OVERTIME_FACTOR * plan.minutes * 60
        if step % validate_every == 0 or step == num_steps or overtime:
            validation_loss = window_loss(averaged, validation_tokens, plan.window_tokens)
            curve.append((step, round(validation_loss, 4)))
            marker = ""
            if validation_loss < best_loss:
                best_loss, best_step, marker = validation_loss, step, "  best"
                best_weights = copy.deepcopy(averaged.state_dict())
            log(f"validation at step {step}: {validation_loss:.4f} nats/token{marker}")
        if overtime:
            log(f"stopped at step {step} of {num_steps}: {OVERTIME_FACTOR} times {plan.minutes} minutes are over")
            break
    seconds = time.monotonic() - began
    if not math.isfinite(best_loss):
        raise FloatingPointError(f"no validation gave a finite loss in {step} steps; lower the learning rate")
    model.load_state_dict(best_weights)
    model.eval()
    train_loss = torch.stack(losses[-max(1, step // 10) :]).mean().item()
    return TrainingResult(step, seconds, compile_seconds, compiled, train_loss, best_loss, best_step, curve)
