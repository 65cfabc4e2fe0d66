"""Train a GPT on prepared tokens, in one process or under torchrun.

    python train.py                                  tiny, on the newest folder under data/
    python train.py small --data mybook.txt --max-steps 3000
    python train.py --init-from smollm2 --data mybook.txt
    torchrun --nproc_per_node=4 train.py             data parallel: gloo on CPUs, nccl on GPUs
    torchrun ... train.py --parallel fsdp            each rank holds a part of the model only
    python train.py --resume                         continue where the newest run stopped

The batch and the dropout of a step follow from (seed, step) alone: a resumed run repeats the uninterrupted one (on a
CPU with as many threads and ranks bit for bit), and every number of ranks sees the same batches.
"""

import contextlib
import math
import signal
import statistics
import sys
import time
from collections import deque
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from dataloader import TokenData, evaluate, forward_loss, uncompiled
from generate import generate
from lib.checkpoint import (
    STATE,
    TrainState,
    copy_companions,
    holds_model,
    holds_weights,
    load_model,
    load_tensors,
    read_tokenizer,
    save_weights,
    training_tensors,
    weights_of,
    write_tensors,
)
from lib.cli import StopSignals, UserError, command, note, one_line, optional, run
from lib.distributed import Ranks, gather_to_main, launch, parallelize, sync_gradients
from lib.files import lock, write_json
from lib.machine import compile_blocks, peak_flops
from lib.muon import make_optimizers, update
from lib.recipe import Plan, TrainConfig, decide, lr_scale, parts_of, progress, read_flags, shape
from lib.runlog import RunLog
from model import GPT


class Run:
    """A training run as this rank sees it. train() calls its steps: train_step, report, evaluate, save."""

    def __init__(self, config: TrainConfig, plan: Plan, ranks: Ranks, state: TrainState | None) -> None:
        self.config, self.plan, self.ranks, self.dtype = config, plan, ranks, getattr(torch, plan.dtype)
        self.step, self.seconds, self.best = 0, 0.0, math.inf  # steps done, their time; lowest validation loss
        if state is not None:
            self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"] or math.inf
        self.first = self.step  # the step that this process begins with
        self.share = config.batch_size // ranks.world  # sequences of a step on this rank
        self.step_tokens = config.batch_size * plan.block_size  # on all ranks together

        ranks.threads.adapt()
        torch.manual_seed(config.seed)
        self.data = TokenData(plan.data, plan.block_size, ranks.device, config.seed)
        if self.data.meta["train"]["sha256"] != plan.data_sha256:
            raise UserError(f"--resume: {plan.out} was trained on other data than {plan.data} now holds")
        self.tokenizer = read_tokenizer(plan.data)
        shaped = shape(config, self.data.meta) if state is None else state["model_config"]
        self.model = load_model(config.init_from) if config.init_from and state is None else GPT(shaped)
        self.model.config.dropout, self.model.config.eos = plan.dropout, shaped.eos
        self.wrapped = parallelize(self.model, ranks, config.parallel, self.dtype).train()
        self.optimizers = make_optimizers(self.model, config.muon_lr, self.dtype)
        if state is not None:
            # pop: the file's pages leave the memory once they are copied
            load_tensors(training_tensors(self.model, self.optimizers), plan.out, state.pop("tensors"))

        self.peak = peak_flops(ranks.device, self.dtype) * ranks.world
        self.epoch_steps = self.data.tokens["train"] / self.step_tokens
        # By default 8 evaluations (fine-tuning: 2), at least one every 250 steps. They take at most a fifth of the
        # time: evaluating a token takes 0.4 of the time that training on it does.
        apart = 250 if config.max_minutes else math.ceil(plan.max_steps / (2 if config.init_from else 8))
        eval_steps = min(config.eval_tokens, self.data.tokens["val"]) / self.step_tokens
        self.every = config.eval_every or min(250, max(apart, math.ceil(2 * eval_steps)))
        self.signals, self.log = StopSignals(), None
        self.loss_sum = torch.zeros((), device=ranks.device)  # since the last line of the log
        self.train_losses, self.before = [], (math.inf, math.inf)  # since the last evaluation, and what that one saw
        self.eval_seconds, self.step_seconds = 0.0, 0.0  # the last evaluation's; the median step's
        self.lately, self.better = deque(maxlen=20), False

    def begin(self) -> None:
        """Open the log, say what runs, compile."""
        config, plan, ranks = self.config, self.plan, self.ranks
        size = f"{self.model.num_params() / 1e6:.2f}M parameters"
        if ranks.is_main:
            if not self.step:
                for source in filter(None, (config.init_from, plan.data)):
                    copy_companions(source, plan.out)
            self.log = RunLog(plan.out, self.step, self.data.bits_per_nat, self.epoch_steps,
                              f"{plan.out.name}: {size} on {plan.data.name}")
        minutes = f"{config.max_minutes:g} minutes, at most " if config.max_minutes else ""
        self.say(
            f"{plan.out}: {f'fine-tuning {config.init_from}' if config.init_from else config.size}, {size}, "
            f"{plan.data.name} ({self.data.tokens['train']:,} tokens), {minutes}steps {self.step} to {plan.max_steps} "
            f"({plan.max_steps / self.epoch_steps:.1f} passes) of {self.step_tokens:,} tokens\n"
            f"{ranks.world} x {ranks.device.type}, {torch.get_num_threads()} threads each, {plan.dtype}, "
            f"dropout {plan.dropout:g}, matmul peak {self.peak / 1e9:,.0f} GFLOP/s"
            + "; compiling first, some 10 seconds" * (plan.compile == "on"))
        if plan.compile == "on":
            self.compile()
        if config.init_from:  # a block's activations are computed again for its backward pass, to save memory
            for block in self.model.model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.bar = tqdm(total=1, initial=self.done(), dynamic_ncols=True, bar_format="{l_bar}{bar}|{postfix}",
                        disable=None if ranks.is_main else True)
        self.logged = self.timed = self.step  # steps whose loss is in the log; whose time has been reported
        self.clock = self.began = self.spoke = time.perf_counter()
        if config.init_from and not self.step:
            self.evaluate()
            self.best = math.inf  # the first save is of a trained model

    def compile(self) -> None:
        """Compile the blocks, in a step whose gradients are dropped. Where a rank fails, all leave them as they are."""
        compile_blocks(self.model.model.layers)
        x, y = self.data.batch(0, self.share // parts_of(self.config, self.ranks), 1)[0]
        sync_gradients(self.wrapped, on=False)  # otherwise a rank that fails would leave the others waiting
        failed = ""
        try:
            forward_loss(self.wrapped, x, y, self.dtype).backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            failed = one_line(error)
        if failed := max(self.ranks.all_values(failed)):
            note(f"torch.compile failed ({failed}); going on without it, more slowly")
            for block in self.model.model.layers:
                del block.forward  # the class's own method shows again
        self.model.zero_grad()

    def done(self) -> float:
        """The share of the run that is done. The evaluation that ends it takes as long as the last one did."""
        return progress(self.config, self.plan, self.step, self.seconds + self.eval_seconds)

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            with optional("standard output"):
                tqdm.write(text)

    def train_step(self) -> None:
        """Forward and backward over this rank's share of the batch, part by part, and a step of the optimizers."""
        config, ranks = self.config, self.ranks
        if self.plan.dropout:  # drawn from (seed, step, rank), so that a resume repeats it
            torch.manual_seed(int(np.random.SeedSequence([config.seed, self.step, ranks.rank]).generate_state(1)[0]))
        first = self.step * config.batch_size + ranks.rank * self.share
        parts = self.data.batch(first, self.share, parts_of(config, ranks))
        for i, (x, y) in enumerate(parts):
            sync_gradients(self.wrapped, on=i == len(parts) - 1)  # summed over the ranks once they are whole
            loss = forward_loss(self.wrapped, x, y, self.dtype) / len(parts)
            loss.backward()
            self.loss_sum += loss.detach()
        self.lr_scale = lr_scale(self.done(), self.step, config)
        update(self.model, self.optimizers, (config.muon_lr * self.lr_scale, config.adam_lr * self.lr_scale),
               config.weight_decay, config.grad_clip)
        self.step += 1
        if self.step == self.first + 1:  # it includes the warm-up and is not timed
            self.timed, self.began = self.step, time.perf_counter()

    def log_due(self) -> bool:  # whatever the steps take, so that equal runs have equal logs
        return self.step % 10 == 0 or self.evaluation_due()

    def evaluation_due(self) -> bool:
        return self.step % self.every == 0 or self.done() >= 1

    def report_due(self) -> bool:
        """Whether the ranks exchange losses, times and signals after this step; they all come to the same answer."""
        minutes = self.config.max_minutes
        return (self.log_due() or bool(minutes and not self.step_seconds)
                or self.step_seconds > (min(1.0, 0.3 * minutes) if minutes else 1.0)
                or (self.ranks.world == 1 and self.signals.asked is not None))

    def report(self) -> bool:
        """Loss and speed of the steps since the last report; whether a signal asked any rank to stop."""
        self.signals.say_once(self.say)
        loss = self.loss_sum.item()  # waits for the device
        now, steps = time.perf_counter(), self.step - self.timed
        loss, stops, interval, elapsed = (x / self.ranks.world for x in self.ranks.sum(
            loss / (self.step - self.logged), self.signals.asked is not None, now - self.began, now - self.clock))
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}")
        self.seconds, self.clock = self.seconds + elapsed, now
        if steps:
            self.lately.append(interval / steps)
            self.step_seconds = statistics.median(self.lately)  # the median forgets a pause
        if self.log_due() or stops:
            if self.log:
                pace = {"tokens_per_second": self.step_tokens * steps / interval} if steps else {}
                self.log.add(step=self.step, train_loss=loss, lr_scale=self.lr_scale, **pace)
            self.train_losses.append(loss)
            self.loss_sum.zero_()
            self.logged = self.step
        if self.log:
            self.bar.n = min(1, self.done())
            self.bar.set_postfix_str(f"{self.at()}, loss {loss:.3f}{self.speed()}")
            if self.bar.disable and now - self.spoke > 20 and not self.evaluation_due():
                self.spoke = now
                self.say(f"{self.at()}: train {loss:.3f} nats = {loss * self.data.bits_per_nat:.3f} bits/byte"
                         f"{self.speed()}")
        self.timed, self.began = self.step, time.perf_counter()
        return stops > 0

    def at(self) -> str:
        of = f" ({min(1, self.done()):.0%})" if self.config.max_minutes else f"/{self.plan.max_steps}"
        return f"step {self.step}{of}"

    def speed(self) -> str:
        """Speed, and the time left after an evaluation at this step."""
        if not self.step_seconds:
            return ""
        evaluations = math.ceil(self.plan.max_steps / self.every) - self.step // self.every
        left = (self.plan.max_steps - self.step) * self.step_seconds
        left += evaluations * self.eval_seconds * (self.step < self.plan.max_steps)
        if self.config.max_minutes:
            left = min(left, max(0.0, 60 * self.config.max_minutes - self.seconds))
        pace = self.step_tokens / self.step_seconds
        return f", {pace:,.0f} tokens/s ({self.model.estimate_mfu(pace, self.peak):.0%} of peak), {duration(left)} left"

    def evaluate(self) -> None:
        """The validation loss, and a sample of the model's text."""
        ranks, start = self.ranks, time.perf_counter()
        if ranks.threads.adapt():
            self.peak = peak_flops(ranks.device, self.dtype) * ranks.world
        val_loss = evaluate(self.model, self.data, self.config.eval_tokens, ranks, self.dtype)
        if not math.isfinite(val_loss):
            raise self.diverged(f"the validation loss is {val_loss}")
        self.better, self.best = val_loss < self.best, min(self.best, val_loss)
        bits, text = val_loss * self.data.bits_per_nat, ""
        if ranks.is_main and self.config.parallel != "fsdp":  # with fsdp all ranks would have to generate
            with optional("a sample of the model's text"):
                text = self.sample()
        self.eval_seconds = ranks.sum(time.perf_counter() - start)[0] / ranks.world
        train_loss = sum(self.train_losses) / max(1, len(self.train_losses))
        if self.log:
            trained = f"train {self.train_losses[-1]:.3f}, " if self.train_losses else ""
            self.log.add(step=self.step, val_loss=val_loss, val_bits_per_byte=bits, **{"sample": text} if text else {})
            self.say(f"{self.at()}: {trained}validation {val_loss:.4f} nats = {bits:.4f} bits/byte"
                     f"{'' if self.better else ' (no better)'}{self.speed()}" + f"\n  {text}" * bool(text))
        if not self.better and train_loss < self.before[0] and val_loss > self.before[1]:
            note("the validation loss rises while the training loss falls: the model learns its text by heart; "
                 f"{self.plan.out} keeps the best model; more --dropout, a smaller size or fewer steps may do better")
        self.train_losses, self.before = [], (train_loss, val_loss)
        self.seconds += self.eval_seconds
        self.clock = self.began = time.perf_counter()

    @torch.no_grad()
    def sample(self) -> str:
        """What the model writes behind the first words of the validation text, on one line."""
        prompt, _ = self.data.sequences("val", np.zeros(1, dtype=np.int64))
        self.model.eval()
        try:
            with uncompiled():
                # without a cache a GPU captures no graph, which 80 tokens would not pay for
                tokens = [token.item() for token in generate(
                    self.model, prompt[:, :32], 80, temperature=0.8, top_p=0.9, seed=self.config.seed,
                    use_cache=self.ranks.device.type != "cuda")]
        finally:
            self.model.train()
        text = "".join(self.tokenizer.decode(tokens).split(maxsplit=1)[-1:])  # from the first whole word on
        text = " / ".join(filter(None, map(str.strip, text.splitlines())))
        return "".join(letter for letter in text if letter.isprintable())

    def save(self, last: bool) -> None:
        """run.json, all that a resume needs, and the model where it is the best so far.

        The state comes before the model: after a crash between the two, a resume takes the model from the state. All
        ranks must call this: each may hold a part. last: the run is done, whatever its clock says.
        """
        seconds = max(self.seconds, 60 * (self.config.max_minutes or 0.0)) if last else self.seconds
        tensors, out = gather_to_main(training_tensors(self.model, self.optimizers), self.ranks), self.plan.out
        if self.ranks.is_main:
            weights = weights_of(tensors)
            if not all(weight.sum().isfinite() for weight in weights.values()):
                raise self.diverged("a weight is not finite")
            better = self.better or not holds_model(out)
            write_json(out / "run.json", {"flags": vars(self.config), "plan": vars(self.plan)})
            write_tensors(out / STATE, tensors, step=self.step, seconds=seconds, better=better,
                          best=self.best if math.isfinite(self.best) else None, model_config=vars(self.model.config))
            if better:
                save_weights(weights, self.model.config, out)
            self.log.plot()
        self.better, self.began = False, time.perf_counter()

    def finish(self, done: bool) -> int:
        """Say what came of the run; the exit code."""
        self.bar.close()
        out = self.plan.out
        if self.log:
            self.log.close()
            bits = self.best * self.data.bits_per_nat
            self.say(f"{out}: best validation {self.best:.4f} nats, {bits:.4f} bits/byte\n"
                     f"{self.log.curve()} the whole curve: {out / 'loss.png'}\n"
                     f"next: {command('python', 'sample.py', '--checkpoint', out)}" if done else
                     f"stopped at step {self.step}; go on with: "
                     f"{command('python', 'train.py', '--resume', '--out', out)}")
        return 0 if done else 128 + (self.signals.asked or signal.SIGTERM)

    def diverged(self, what: str) -> UserError:
        left = "keeps its last checkpoint" if holds_model(self.plan.out) else "has no checkpoint yet"
        return UserError(f"step {self.step}: {what}; {self.plan.out} {left}. Try lower --muon-lr and "
                         f"--adam-lr (now {self.config.muon_lr:g} and {self.config.adam_lr:g})")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def may_begin(config: TrainConfig, plan: Plan | None, ranks: Ranks, state: TrainState | None) -> bool:
    """False where the run has done its steps. Raises UserError where the ranks cannot do them together."""
    parts = ranks.world * parts_of(config, ranks)
    if config.batch_size % parts:
        raise UserError(f"--batch-size: expected a multiple of ranks x grad-accum = {parts}, got {config.batch_size}")
    found = ranks.all_values((f"step {state['step']} of {plan.out}", state["sha256"]) if state else ("nothing", ""))
    if len(set(found)) > 1:
        raise UserError("the ranks found different states to go on from, rank by rank: "
                        f"{', '.join(name for name, _ in found)}; expected the same on every machine")
    if state is None:
        return True
    if ranks.is_main and state["better"] and not holds_weights(plan.out, weights_of(state["tensors"])):
        with lock(plan.out, launch()):  # the run was killed before it saved its model
            save_weights(weights_of(state["tensors"]), state["model_config"], plan.out)
    if progress(config, plan, state["step"], state["seconds"]) < 1:
        return True
    if ranks.is_main:
        what = "--max-minutes" if config.max_minutes else "--max-steps"
        print(f"{plan.out} is trained for {state['step']} steps already; raise {what} to go on")
    return False


def train(config: TrainConfig, ranks: Ranks, plan: Plan | None = None, state: TrainState | None = None) -> int:
    """Train from the start, or go on from a saved plan and state.

    Returns the exit code: 0, or 128 + the signal that asked to stop.
    """
    if not may_begin(config, plan, ranks, state):
        return 0
    plan = plan or ranks.main_does(lambda: decide(config, ranks.device))
    run = Run(config, plan, ranks, state)
    with lock(plan.out, launch()) if ranks.is_main else contextlib.nullcontext(), run.signals.heard():
        run.begin()
        stop = last = False
        while not stop and not last:
            run.train_step()
            if not run.report_due():
                continue
            stop, due, last = run.report(), run.evaluation_due(), run.done() >= 1
            if due:
                run.evaluate()
            if due or stop:
                run.save(last)
        return run.finish(last)


def main() -> None:
    config, plan, state = read_flags(sys.argv[1:])
    ranks = Ranks(config.device, config.threads)
    try:
        code = train(config, ranks, plan, state)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        sys.exit(f"train.py: rank {ranks.rank} lost another rank; --resume continues from the last checkpoint")
    ranks.close()
    sys.exit(code)


if __name__ == "__main__":
    run(main)
