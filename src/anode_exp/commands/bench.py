"""``bench``: training steps of several compositions, and of usual ways to train, timed in turn."""

from __future__ import annotations

from anode_exp.commands.arguments import Parser, help_text, own_settings
from anode_exp.composition import BASELINES, bench_entries, folder
from anode_exp.config import BenchSettings, split_settings

ABOUT = "time of a training step of several compositions, and of usual ways to train, in turn"
EXAMPLES = (
    "bench model=squeezenext solver=rk2",
    "bench 'compare=[gradient=full_backprop, gradient=dto_checkpoint solver=rk4, baseline=dataloader]'",
    "bench model=squeezenext 'compare=[runtime.compile=false, runtime.compile=true, seeds=5]'",
)


def main(arguments: list[str]) -> None:
    parsed = Parser("bench").parse_intermixed_args(arguments)
    if parsed.help:
        print(
            help_text(
                "bench [GROUP=OPTION …] [KEY=VALUE …] [compare=LIST]",
                f"Bench: {ABOUT}. The other settings are those of train and shared by all entries.",
                [
                    (
                        "settings",
                        [
                            *own_settings(BenchSettings),
                            ("hydra.run.dir=outputs/DATE/TIME-bench", "where table and records go"),
                        ],
                    ),
                    ("baselines", [(f"baseline={name}", text) for name, text in BASELINES.items()]),
                ],
                EXAMPLES,
            )
        )
        return
    entries, rounds = bench_entries(parsed.settings)
    directory = folder(split_settings(BenchSettings, parsed.settings, "bench")[1], "bench")

    from anode_exp.bench import run_bench  # imports torch

    run_bench(entries, rounds, directory)
