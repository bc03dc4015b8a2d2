"""A byte budget for training: the checkpoint policy of every ODE block with which a step is fastest and still fits.

Bytes are found by dry steps on two small batches: the same operations run on both, every tensor's size is affine in the
batch size, so the live bytes after every allocation extrapolate exactly to the batch of the run. Blocks share memory in
only one way: while block i is in its forward or backward pass, the blocks before it hold what their policies keep. So

    peak(plan) = max over moments m of  live(m) + Σ_{j before m} kept_j(policy_j),

and the fastest plan below a budget is found exactly, block by block, over the plans that no other plan beats in both
bytes and time. Each block is timed separately, on a batch of the run's size, as a graph if the run replays one.

What dry steps do not see (the data set, copies of the batch, an epoch's order, libraries' workspaces, the allocator's
rounding) is measured with the run's own steps: once for the lightest plan, as a constant in every prediction, and again
for each plan that is proposed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from anode_exp.budget.plan import RESERVE, Plan, Profile, counted_bytes, fastest, lightest, policies
from anode_exp.errors import UserError
from anode_exp.gradient import GradientMode
from anode_exp.models import OdeBlock, ode_blocks, take_evaluations
from anode_exp.ode import Solver
from anode_exp.tasks.task import Batch, Task
from anode_exp.training.graphed_step import CudaCapture
from anode_exp.training.peak_memory import LiveTensorBytes, allocator_of, peak_while
from anode_exp.training.step import set_learning_rate, state_tensors, train_step
from anode_exp.training.streams import seconds_of

log = logging.getLogger(__name__)

SMALL_BATCHES = (2, 4)
REPEATS = 3  # timed passes of a block under each policy; the fastest counts


class _Timeline(LiveTensorBytes):
    """Live bytes after every allocation, with marks."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.timeline: list[int] = []
        self.marks: list[tuple[str, int, int, int]] = []  # what, block, position in the timeline, bytes alive
        super().__init__(tensors)

    def _add(self, tensor: Tensor) -> None:
        super()._add(tensor)
        self.timeline.append(self.now)

    def mark(self, what: str, block: int) -> None:
        self.marks.append((what, block, len(self.timeline), self.now))


class Planner:
    """Measures a network's policies once, and plans for any budget. The network is restored afterwards.

    Args:
        network: on its device, in training mode.
        new_optimizer: makes the optimiser of a dry step; its state is filled, and its learning rate set to 0.
        task: gives the loss of the steps.
        batch: in the run's layout.
        tick: called after every dry run, for a progress bar.
        batch_size: of the run; by default the batch's.
        rehearse: takes the run's first steps with the policies that are set, and returns their peak bytes. By default
            one eager step on the batch, which is then the run's whole batch.
        new_capture: makes the recordings of blocks to be timed; None times them eagerly.
    """

    def __init__(
        self,
        network: nn.Module,
        new_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        autocast: Callable[[], torch.autocast],
        task: Task,
        batch: Batch,
        tick: Callable[[], object] = lambda: None,
        batch_size: int | None = None,
        rehearse: Callable[[], int] | None = None,
        new_capture: Callable[[], CudaCapture] | None = None,
    ) -> None:
        self.network, self.autocast, self.task, self.tick = network, autocast, task, tick
        self.rehearse, self.new_capture = rehearse, new_capture
        # Copies: a view would count with its whole storage.
        self.batch: Batch = tuple(x.clone() for x in batch)
        self.batch_size = len(batch[0]) if batch_size is None else batch_size
        self.optimizer = new_optimizer(network)
        set_learning_rate(self.optimizer, 0.0)
        momenta = ("momentum_buffer",) if isinstance(self.optimizer, torch.optim.SGD) else ("exp_avg", "exp_avg_sq")
        for p in network.parameters():  # a run has momentum from its second step on
            self.optimizer.state[p].update({name: torch.zeros_like(p) for name in momenta})
            if len(momenta) > 1:  # Adam's
                on_host = not self.optimizer.defaults["capturable"] and not self.optimizer.defaults["fused"]
                self.optimizer.state[p]["step"] = torch.zeros((), device="cpu" if on_host else p.device)
        self.blocks = list(ode_blocks(network))
        self.device = batch[0].device
        self.choices = policies(max(b.grid.n_steps for b in self.blocks), self.blocks[0].solver)  # type: ignore[union-attr]
        self._seconds: dict[str, list[float]] = {}
        with self._undone():
            self.profiles = {name: self._profile(mode) for name, mode in self.choices.items()}
        if rehearse is not None:
            self.optimizer.state.clear()  # the run's own steps make theirs

    @staticmethod
    def dry_runs(n_steps: int, solver: Solver) -> int:
        """The most calls of ``tick``."""
        return 2 * len(policies(n_steps, solver))

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Restore weights, buffers, gradient modes and counters afterwards."""
        modes = [block.gradient for block in self.blocks]
        state = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
        try:
            yield
        finally:
            for block, mode in zip(self.blocks, modes, strict=True):
                block.gradient = mode
            self.network.load_state_dict(state)
            self.network.zero_grad(set_to_none=True)
            take_evaluations(self.network)

    def use(self, names: Sequence[str]) -> None:
        """Set each block's policy."""
        for block, name in zip(self.blocks, names, strict=True):
            block.gradient = self.choices[name]

    def _profile(self, mode: GradientMode) -> Profile:
        for block in self.blocks:
            block.gradient = mode
        (b1, first), (b2, second) = ((b, self._dry_step(b)) for b in SMALL_BATCHES)
        evaluations = [(e.forward // 2, e.backward // 2) for e in take_evaluations(self.network)]
        if [m[:3] for m in first.marks] != [m[:3] for m in second.marks]:
            raise RuntimeError("two batches of different size ran different operations")

        def at_full_batch(pair: tuple[int, int]) -> int:
            return pair[0] + (pair[1] - pair[0]) * (self.batch_size - b1) // (b2 - b1)

        live = [at_full_batch(pair) for pair in zip(first.timeline, second.timeline, strict=True)]
        marked = [at_full_batch((m1[3], m2[3])) for m1, m2 in zip(first.marks, second.marks, strict=True)]
        at = {(what, j): now for (what, j, *_), now in zip(first.marks, marked, strict=True)}
        n = len(self.blocks)
        kept = [at["leave", j] - at["enter", j] for j in range(n)]
        inside, outside = [0] * n, [0] * (n + 1)
        # Between two marks: the most bytes alive, the block in its pass if any, and how many blocks before hold theirs.
        position, holding = 0, 0
        own: int | None = None
        for (what, j, end, _), now in [*zip(first.marks, marked, strict=True), (("end", n, len(live), 0), 0)]:
            most = max([*live[position:end], now]) - sum(kept[:holding])
            if own is None:
                outside[holding] = max(outside[holding], most)
            else:
                inside[own] = max(inside[own], most)
            if what != "done" or own == j:  # of two blocks in a row, one begins before the other is marked as done
                own = j if what in ("enter", "backward") else None
                holding = j + 1 if what == "leave" else j
            position = end
        self.tick()
        return Profile(kept, inside, outside, evaluations, self._inputs)

    def _dry_step(self, size: int) -> _Timeline:
        some = torch.arange(size, device=self.device) % len(self.batch[0])
        batch = tuple(self._laid_out(x[some]) for x in self.batch)
        self._inputs: list[tuple[tuple[int, ...], torch.dtype]] = [((), torch.float32)] * len(self.blocks)
        handles = []
        self.network.zero_grad(set_to_none=True)
        with _Timeline([*state_tensors(self.network, self.optimizer), *batch]) as line:
            for i, block in enumerate(self.blocks):
                handles += [
                    block.register_forward_pre_hook(lambda _, args, i=i: self._enter(line, i, args[0])),
                    block.register_forward_hook(lambda _, args, out, i=i: self._leave(line, i, out)),
                ]
            train_step(self.network, self.optimizer, self.autocast, self.task, batch)
        for handle in handles:
            handle.remove()
        self.network.zero_grad(set_to_none=True)
        return line

    def _laid_out(self, x: Tensor) -> Tensor:
        """x in the batch's memory layout, if it has the dimensions of images."""
        last = self.batch[0].dim() == 4 and self.batch[0].is_contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x

    def _enter(self, line: _Timeline, i: int, y: Tensor) -> None:
        self._inputs[i] = tuple(y.shape[1:]), y.dtype
        if y.requires_grad:
            y.register_hook(lambda _: line.mark("done", i))
        line.mark("enter", i)

    def _leave(self, line: _Timeline, i: int, y: Tensor) -> None:
        y.register_hook(lambda _: line.mark("backward", i))
        line.mark("leave", i)

    @cached_property
    def constant_bytes(self) -> int:
        """Bytes of a step that dry steps do not see: measured minus predicted, for the lightest plan."""
        names = lightest(self.profiles)
        return self.measure(Plan(names, 0, 0.0)) - counted_bytes(self.profiles, names)

    def predict(self, names: Sequence[str]) -> int:
        """Peak bytes of a training step with these policies."""
        return counted_bytes(self.profiles, names) + self.constant_bytes

    def least(self) -> int:
        """The smallest budget that a plan fits."""
        return self.predict(lightest(self.profiles))

    def seconds(self, budget: int) -> dict[str, list[float]]:
        """Seconds of each block's forward and backward pass under every policy that could fit the budget; else inf."""
        lightest = [min(p.kept[i] for p in self.profiles.values()) for i in range(len(self.blocks))]
        room = budget - self.constant_bytes
        with self._undone():
            for name in self.choices:
                times = self._seconds.setdefault(name, [float("inf")] * len(self.blocks))
                for i, block in enumerate(self.blocks):
                    needed = sum(lightest[:i]) + self.profiles[name].inside[i]
                    if needed <= room and times[i] == float("inf"):
                        block.gradient = self.choices[name]
                        times[i] = self._time(block, *self.profiles[name].inputs[i])
                self.tick()
        return self._seconds

    def _time(self, block: OdeBlock, shape: tuple[int, ...], dtype: torch.dtype) -> float:
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(self.batch_size, *shape, generator=generator).to(self.device, dtype)
        y = self._laid_out(y).requires_grad_()

        def passes() -> None:
            y.grad = None
            with self.autocast():
                out = block(y)
            out.backward(torch.ones_like(out))

        run = self._recorded(passes)
        best = min(seconds_of(run, self.device) for _ in range(REPEATS))
        self.network.zero_grad(set_to_none=True)
        return best

    def _recorded(self, passes: Callable[[], None]) -> Callable[[], None]:
        """The passes as the run takes them, recorded if possible: eager times would be those of kernel launches."""
        if self.new_capture is None:
            return passes
        try:
            capture = self.new_capture()
            capture.warm_up(passes)
            self.network.zero_grad(set_to_none=True)
            capture.record(passes)
        except Exception as error:
            log.debug(f"timed eagerly: {error}")  # the run itself warns if it cannot be captured
            return passes
        return capture.replay

    def plan(self, budget: int) -> Plan:
        """The fastest plan whose predicted peak is at most the budget; UserError if there is none."""
        if budget < self.least():
            raise UserError(f"no plan fits {budget} bytes; give at least {self.least()}")
        names = fastest(self.profiles, self.seconds(budget), budget - self.constant_bytes)
        assert names is not None
        return self._plan_of(names)

    def _plan_of(self, names: tuple[str, ...]) -> Plan:
        return Plan(names, self.predict(names), sum(self._seconds[name][i] for i, name in enumerate(names)))

    def measure(self, plan: Plan) -> int:
        """Peak bytes of real training steps: the allocator's on CUDA, counted elsewhere."""
        with self._undone():
            self.use(plan.policies)
            if self.rehearse is not None:
                return self.rehearse()
            own = [*state_tensors(self.network, self.optimizer), *self.batch]
            step = partial(train_step, self.network, self.optimizer, self.autocast, self.task, self.batch)
            torch.cuda.empty_cache()
            return peak_while(step, own.copy, allocator_of(self.device))

    def fitted(self, budget: int) -> tuple[Plan, int]:
        """A plan whose measured peak is below the budget too, and that peak.

        Memory that kernels allocate for themselves is not predicted. If the measured peak shows it, it is subtracted
        from the budget and a new plan is made; the lightest plan is tried last.

        Raises:
            UserError: if nothing fits; names the smallest budget that does.
        """
        target = room = budget - RESERVE
        while target >= self.least():
            plan = self.plan(target)
            measured = self.measure(plan)
            if measured <= room:
                return plan, measured
            target -= max(measured - room, 2**20)
        names = lightest(self.profiles)
        self.seconds(self.least())
        measured = self.measure(Plan(names, 0, 0.0))
        if measured <= room:
            return self._plan_of(names), measured
        least = -(-(measured + RESERVE) // 2**20)
        why = f"a training step does not fit {budget / 2**20:.1f} MiB with any checkpoint policy"
        remedy = f"give {least}MiB or more, a smaller recipe.batch_size, or a smaller network"
        raise UserError(f"gradient.memory: {why}; {remedy}")

    def describe(self, plan: Plan, budget: int, measured: int) -> dict[str, Any]:
        """The plan as a record."""
        blocks = []
        for i, name in enumerate(plan.policies):
            profile, seconds = self.profiles[name], self._seconds[name][i]
            evaluations = zip(("evaluations_forward", "evaluations_backward"), profile.evaluations[i], strict=True)
            blocks.append({"policy": name, **dict(evaluations), "kept_bytes": profile.kept[i], "seconds": seconds})
        sizes = {"budget_bytes": budget, "predicted_bytes": plan.predicted_bytes, "measured_bytes": measured}
        return {**sizes, "blocks": blocks}
